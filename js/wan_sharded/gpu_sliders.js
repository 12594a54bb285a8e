/**
 * The eight `gpu<i>_gb` sliders of the loader: hidden where this server has no such GPU, labelled with its name where it
 * has. A hidden slider keeps its place and its value, and none ever changes a value by itself, so a workflow file survives
 * a visit to another machine unchanged.
 */

/** Input options by name, as the server's schema gives them. */
function optionsByName(nodeData) {
  const inputs = { ...nodeData.input?.required, ...nodeData.input?.optional };
  return Object.fromEntries(Object.entries(inputs).map(([name, [, options]]) => [name, options ?? {}]));
}

/** Gigabytes at the end of a label ("GPU 0 · RTX 5060 Ti 16 GB"), or undefined. */
function gigabytes(label) {
  const found = /(\d+) GB$/.exec(label ?? "");
  return found ? Number(found[1]) : undefined;
}

/**
 * Hide and label the GPU sliders of a new node.
 *
 * Older frontends ignore the schema's `display_name`, and their classic canvas its `hidden`, so both are set by hand.
 */
export function setUpGpuSliders(node) {
  const optionsOf = optionsByName(node.constructor.nodeData);
  for (const widget of node.widgets ?? []) {
    if (!/^gpu\d+_gb$/.test(widget.name)) continue;
    const { hidden = false, display_name: label, step } = optionsOf[widget.name] ?? {};
    widget.hidden = hidden;
    widget.options.hidden = hidden;
    // Frontend 1.32 leaves room for hidden widgets; 4 pixels is what it adds to every widget's height.
    if (hidden) widget.computeSize = () => [0, -4];
    if (label) widget.label = label;
    // The server takes the same maximum everywhere. Here the slider ends at the GPU's size, so that it can be aimed with;
    // a larger value from a file stays until somebody moves the slider.
    widget.options.max = gigabytes(label) ?? widget.options.max;
    widget.options.round = step;
  }
}

/** The sliders of the GPUs that this server has. */
export function shownSliders(node) {
  return (node.widgets ?? []).filter((widget) => /^gpu\d+_gb$/.test(widget.name) && !widget.hidden);
}

/**
 * Names of the node's widgets in the order of a file's `widgets_values`.
 *
 * Newer frontends restore values by name when `nodeData.fallbackWidgetsValuesNames` holds this list.
 */
export function widgetNames(nodeData) {
  const names = [];
  for (const section of ["required", "optional"]) {
    for (const [name, [type, options]] of Object.entries(nodeData.input?.[section] ?? {})) {
      if (!Array.isArray(type) && !["COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"].includes(type)) continue;
      names.push(name);
      if (options?.control_after_generate) names.push("control_after_generate");
    }
  }
  return names;
}
