/** The loader's "Measure GPUs" button: asks the server for the speeds of the GPUs and their links, and shows the answer on the node. */
import { api } from "/scripts/api.js";
import { firstBehind } from "./graph.js";
import { showPlacement } from "./placement_picture.js";
import { selectText, showText } from "./text_area.js";
import { say } from "./words.js";

// What the server plans with, besides the sliders and the size.
const CHOICES = ["weight_dtype", "device_map", "execution", "offload"];
const SIZE = ["width", "height", "length"];

/** Values of some of a node's widgets by name; those that another node fills have none of their own. */
function values(node, wanted) {
  const linked = new Set((node.inputs ?? []).filter((input) => input.link != null).map((input) => input.name));
  const found = (node.widgets ?? []).filter((widget) => wanted(widget.name) && !linked.has(widget.name));
  return Object.fromEntries(found.map((widget) => [widget.name, widget.value]));
}

/** What is asked for: the loader's choices, for the size of the sampler behind it. */
function question(node, samplerType) {
  const sampler = firstBehind(node, samplerType);
  return {
    ...values(node, (name) => CHOICES.includes(name) || /^gpu\d+_gb$/.test(name)),
    ...(sampler ? values(sampler, (name) => SIZE.includes(name)) : {}),
  };
}

/** What an answer says went wrong; a server that failed unexpectedly does not answer in JSON. */
function errorIn(body) {
  try {
    return JSON.parse(body).error;
  } catch {
    return undefined;
  }
}

async function measure(node, samplerType) {
  const response = await api.fetchApi("/wan_sharded/calibrate", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(question(node, samplerType)),
  });
  const body = await response.text();
  if (!response.ok) throw new Error(errorIn(body) ?? `${response.status} ${response.statusText}`);
  const answer = JSON.parse(body);
  showText(node, answer.text);
  showPlacement(node, answer.plan.bars);
  selectText(node);
}

/** Add the button, behind all other widgets. */
export function addMeasureButton(node, samplerType) {
  let running = false;
  const widget = node.addWidget(
    "button",
    say("measure"), // what older frontends show in Nodes 2.0; the label is what all others show
    "",
    async () => {
      if (running) return;
      running = true;
      widget.label = say("measuring");
      showText(node, say("measuring"));
      node.setDirtyCanvas?.(true, true);
      try {
        await measure(node, samplerType);
      } catch (error) {
        showText(node, say("measureFailed", { why: error.message }));
      } finally {
        running = false;
        widget.label = say("measure");
        node.setDirtyCanvas?.(true, true);
      }
    },
    { serialize: false }, // not in the prompt
  );
  widget.serialize = false; // not in the workflow file
  widget.label = say("measure");
  widget.tooltip = say("measureTip");
}
