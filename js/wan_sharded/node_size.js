/** How high a node is. */

/** Make the node high enough for its visible widgets; never smaller, so that a user's own size stays. */
export function fitHeight(node) {
  const [, needed] = node.computeSize();
  if (node.size[1] >= needed) return;
  node.setSize([node.size[0], needed]);
  node.setDirtyCanvas(true, true);
}

/** Do so whenever a video comes in; the classic canvas of frontend 1.32 lets it stick out of the node. */
export function fitVideos(node) {
  const addCustomWidget = node.addCustomWidget;
  node.addCustomWidget = function (widget) {
    const added = addCustomWidget.apply(this, arguments);
    if (widget?.name === "video-preview" && widget.element) {
      const changed = new MutationObserver(() => requestAnimationFrame(() => fitHeight(node)));
      changed.observe(widget.element, { childList: true });
    }
    return added;
  };
}
