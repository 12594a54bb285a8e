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
