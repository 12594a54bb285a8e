/**
 * A read-only text area below a node's widgets. It is added last and not serialised, so it leaves `widgets_values` alone.
 */
import { recalled, remember } from "./last_shown.js";

const NAME = "wan_sharded_text";
const MARGIN_PX = 20; // what the classic canvas leaves around a DOM widget, above and below together
const STYLE = "width: 100%; box-sizing: border-box; font-size: 11px; line-height: 1.4; resize: none;";

function element(node) {
  return node.widgets?.find((widget) => widget.name === NAME)?.element;
}

/** Add a text area at least `heightPx` high; `placeholder` is seen until there is something to say. */
export function addTextArea(node, placeholder, heightPx) {
  const area = document.createElement("textarea");
  area.className = "comfy-multiline-input";
  area.style.cssText = `${STYLE} min-height: ${heightPx}px;`;
  area.readOnly = true;
  area.spellcheck = false;
  area.placeholder = placeholder;
  const widget = node.addDOMWidget(NAME, NAME, area, {
    serialize: false, // not in the prompt
    hideOnZoom: false,
    getMinHeight: () => heightPx + MARGIN_PX,
    getValue: () => area.value,
    setValue: (text) => (area.value = text ?? ""),
  });
  widget.serialize = false; // not in the workflow file
}

/** Show `text`; does nothing on a node without a text area. */
export function showText(node, text) {
  const area = element(node);
  if (!area) return;
  area.value = text ?? "";
  remember(node, "text", area.value);
}

/** Show what the node showed before the graph was loaded again. */
export function restoreText(node) {
  const area = element(node);
  if (area && node.graph) area.value = recalled(node, "text") ?? "";
}

/** Select all of the text, so that the keyboard copies it. */
export function selectText(node) {
  const area = element(node);
  area?.focus({ preventScroll: true });
  area?.select();
}
