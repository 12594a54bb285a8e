/**
 * The browser side of ComfyUI-Wan-Sharded: GPU sliders named after the GPUs of this server, a picture of the placement and a
 * button that measures the GPUs on the loader, a read-only text on the loader (where the model was placed), on the sampler (notes on
 * the run), on the LoRA node (what it changes) and on the export (what was written), and the moving live picture on the sampler.
 *
 * ComfyUI loads every .js file below this folder as an extension; only this one registers something.
 */
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { useOwnFileNames } from "./wan_sharded/file_names.js";
import { setUpGpuSliders, shownSliders, widgetNames } from "./wan_sharded/gpu_sliders.js";
import { nodeByExecutionId } from "./wan_sharded/graph.js";
import { drawNoStill, showPicture } from "./wan_sharded/live_picture.js";
import { addMeasureButton } from "./wan_sharded/measure_button.js";
import { fitHeight, fitVideos } from "./wan_sharded/node_size.js";
import { addPlacementPicture, restorePlacement, showPlacement } from "./wan_sharded/placement_picture.js";
import { addTextArea, restoreText, showText } from "./wan_sharded/text_area.js";
import { say } from "./wan_sharded/words.js";

const LOADER = "WanShardedLoader";
const SAMPLER = "WanShardedI2VSampler";
const EXPORT = "WanShardedVideoExport";
const LORA = "WanShardedLora";
// The nodes, each with a text area: its words while it is empty, by their key, and its height.
const TEXTS = {
  [LOADER]: { placeholder: "emptyPlacement", heightPx: 160 },
  [SAMPLER]: { placeholder: "emptyNotes", heightPx: 100 },
  [EXPORT]: { placeholder: "emptyExport", heightPx: 40 },
  [LORA]: { placeholder: "emptyLora", heightPx: 60 },
};
const MIN_WIDTH_PX = 400;
const PICTURE = /\.(gif|webp|png)$/;

app.registerExtension({
  name: "wan_sharded",

  setup() {
    api.addEventListener("wan_sharded.status", ({ detail }) => {
      const node = nodeByExecutionId(app, detail?.node);
      if (node) showText(node, detail.text);
    });
    api.addEventListener("wan_sharded.placement", ({ detail }) => {
      const node = nodeByExecutionId(app, detail?.node);
      if (node) showPlacement(node, detail.bars);
    });
    api.addEventListener("b_preview_with_metadata", ({ detail }) => {
      const node = nodeByExecutionId(app, detail?.displayNodeId ?? detail?.nodeId);
      if (node?.comfyClass === SAMPLER) showPicture(node, detail.blob);
    });
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!(nodeData.name in TEXTS)) return;
    nodeData.fallbackWidgetsValuesNames = widgetNames(nodeData);
    if (nodeData.name === SAMPLER) drawNoStill(nodeType);

    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text) showText(this, output.text.join("\n"));
      if (output?.placement) showPlacement(this, output.placement[0]);
    };

    const onConfigure = nodeType.prototype.onConfigure;
    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments);
      useOwnFileNames(this);
      restoreText(this);
      restorePlacement(this);
      fitHeight(this); // the file's size may have suited a machine with fewer GPUs
    };
  },

  // Synchronous on purpose: a file's values are applied right after this, and by then the widgets must stand.
  nodeCreated(node) {
    const kind = node.comfyClass;
    if (!(kind in TEXTS)) return;
    if (kind === EXPORT) {
      tellPreviewMediaType(node);
      fitVideos(node);
    }
    if (kind === LOADER) {
      setUpGpuSliders(node);
      addPlacementPicture(node, shownSliders(node).length + 1); // a bar for each GPU, and one for system memory or the CPU
    }
    const { placeholder, heightPx } = TEXTS[kind];
    addTextArea(node, say(placeholder), heightPx);
    if (kind === LOADER) addMeasureButton(node, SAMPLER);
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, MIN_WIDTH_PX), height]);
  },
});

/**
 * Nodes 2.0 of frontend 1.32 takes a result for a video only on nodes with a VIDEO input, or where this property says so. Read off the
 * result whenever it is asked for: newer frontends ask before onExecuted.
 */
function tellPreviewMediaType(node) {
  Object.defineProperty(node, "previewMediaType", {
    get() {
      const id = node.graph && node.graph !== app.graph ? `${node.graph.id}:${node.id}` : node.id;
      return PICTURE.test(app.nodeOutputs[id]?.images?.[0]?.filename) ? "image" : "video";
    },
    set() {}, // the frontend's own guess
    configurable: true,
  });
}
