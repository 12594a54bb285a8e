/**
 * What each node showed last, because undo, a change of tab and a reload of the page make all nodes anew. Kept by the browser for this
 * tab only, and never in a workflow file.
 */

const PREFIX = "wan_sharded";

function key(node, what) {
  return node.graph && [PREFIX, what, node.graph.rootGraph?.id, node.graph.id, node.id].join("/");
}

/** Remember a value that JSON can hold as the last of its kind (`what`) of a node. */
export function remember(node, what, value) {
  try {
    sessionStorage.setItem(key(node, what), JSON.stringify(value));
  } catch {
    // The browser has no room or allows none: then it is shown until the node is made anew.
  }
}

/** The value that was remembered, or undefined. */
export function recalled(node, what) {
  try {
    return node.graph ? (JSON.parse(sessionStorage.getItem(key(node, what))) ?? undefined) : undefined;
  } catch {
    return undefined;
  }
}
