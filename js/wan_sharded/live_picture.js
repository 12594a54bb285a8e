/**
 * The live picture of a node in the classic canvas. What arrives is an animated PNG; the canvas would draw its first frame
 * only, an <img> plays it. Nodes 2.0 shows live pictures in an <img> of its own, so there is nothing to do there.
 *
 * The widget comes with the first picture, after all others, and is not serialised.
 */
import { fitHeight } from "./node_size.js";

const NAME = "wan_sharded_picture";
const MARGIN_PX = 20; // what the classic canvas leaves around a DOM widget, above and below together

function pictureWidget(node) {
  return node.widgets?.find((widget) => widget.name === NAME);
}

function addWidget(node) {
  const img = document.createElement("img");
  img.style.cssText = "width: 100%; height: 100%; object-fit: contain;";
  const heightPx = () => (img.naturalWidth ? (node.size[0] * img.naturalHeight) / img.naturalWidth : 0);
  const widget = node.addDOMWidget(NAME, NAME, img, {
    serialize: false, // not in the prompt
    hideOnZoom: false,
    getMinHeight: () => heightPx() + MARGIN_PX,
  });
  widget.serialize = false; // not in the workflow file
  return widget;
}

/** Keep the classic canvas from drawing the still of a live picture below the moving one. */
export function drawNoStill(nodeType) {
  nodeType.prototype.onDrawBackground = function () {};
}

/** Play a picture (a Blob of any format that browsers know) on a node; it stays until the next one. */
export function showPicture(node, blob) {
  const widget = pictureWidget(node);
  if (LiteGraph.vueNodesMode) {
    if (widget) node.removeWidget(widget); // left from the classic canvas
    return;
  }
  const img = (widget ?? addWidget(node)).element;
  const last = img.src;
  img.onload = () => {
    if (last) URL.revokeObjectURL(last);
    fitHeight(node);
  };
  img.src = URL.createObjectURL(blob);
}
