/** Finding nodes by the ids the server uses. */

/**
 * The node an execution id names: "7" on the canvas itself, "12:3" for node 3 inside the subgraph node 12.
 *
 * @returns the node, or undefined where the open workflow has none (another tab's run, a node made by expansion)
 */
export function nodeByExecutionId(app, executionId) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const id of String(executionId ?? "").split(":")) {
    node = graph?.getNodeById(id);
    graph = node?.subgraph;
  }
  return node ?? undefined;
}

/** The first node of a type that gets something from this one, directly or through others of the same graph; undefined where none does. */
export function firstBehind(node, type, seen = new Set()) {
  seen.add(node.id);
  const links = (node.outputs ?? []).flatMap((output) => output.links ?? []);
  const targets = links.map((id) => node.graph.getNodeById(node.graph.getLink(id)?.target_id)).filter((target) => target && !seen.has(target.id));
  const found = targets.find((target) => target.comfyClass === type);
  return found ?? targets.map((target) => firstBehind(target, type, seen)).find(Boolean);
}
