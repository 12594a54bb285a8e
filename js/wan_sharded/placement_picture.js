/**
 * The placement at a glance on the loader: a bar for each GPU and one for system memory, with what is planned in it, the slider's limit as
 * a line and the measured peak as a mark. Plain HTML, so it is the same on the classic canvas and in Nodes 2.0, and in the theme's colours.
 * Like the text it is not serialised, so it leaves `widgets_values` alone.
 */
import { recalled, remember } from "./last_shown.js";
import { say } from "./words.js";

const NAME = "wan_sharded_placement";
const MARGIN_PX = 20; // as for the text area
const ROW_PX = 33;
const LEGEND_PX = 52;
// Medium colours, with enough contrast on dark and on light themes, and apart from each other for most colour-blind people.
const COLOURS = {
  transformer: "#3b82c4",
  transformer_2: "#d08a2e",
  fetched: "#8a63b8",
  activations: "#2f9e77",
  cuda: "#7c8794",
  frames: "#b8577d",
  vae: "#c2504a",
};
const STYLES = {
  box: "width: 100%; box-sizing: border-box; font: 11px/1.3 sans-serif; color: var(--input-text); background: var(--comfy-input-bg); border-radius: 4px; padding: 4px 8px; overflow: hidden;",
  head: "display: flex; justify-content: space-between; gap: 8px; white-space: nowrap; overflow: hidden;",
  bar: "position: relative; height: 13px; margin: 1px 0 4px; background: var(--comfy-menu-bg); outline: 1px solid var(--border-color);",
  legend: "display: flex; flex-wrap: wrap; gap: 1px 10px; margin-top: 2px;",
};

/** A striped surface in a colour: for what only waits, and what others have. */
function stripes(colour) {
  return `repeating-linear-gradient(135deg, ${colour} 0 3px, transparent 3px 6px)`;
}

function fill(kind, waiting) {
  const colour = kind === "taken" ? "var(--descrip-text)" : COLOURS[kind];
  if (!colour) return "transparent";
  return waiting || kind === "taken" ? stripes(colour) : colour;
}

function make(tag, style, text = "") {
  const made = document.createElement(tag);
  made.style.cssText = style;
  made.textContent = text;
  return made;
}

/** Say in words what something stands for, to the pointer and to screen readers. */
function described(piece, words) {
  piece.title = words;
  piece.setAttribute("role", "img");
  piece.setAttribute("aria-label", words);
  return piece;
}

function nameOf(kind, waiting) {
  return waiting ? say("waiting", { what: say(kind) }) : say(kind);
}

function amount(what, gib) {
  return say("gib", { what, gib: gib.toFixed(1) });
}

/** The parts of a bar, and behind them what is free for this pack, what is above its limit, and what others have. */
function pieces(bar) {
  const used = bar.parts.reduce((sum, part) => sum + part.gib, 0);
  const ours = Math.max(used, bar.limit_gib);
  const total = Math.max(bar.total_gib, ours);
  const rest = [
    { kind: "free", gib: ours - used },
    { kind: "spare", gib: total - ours - Math.min(bar.taken_gib, total - ours) },
    { kind: "taken", gib: Math.min(bar.taken_gib, total - ours) },
  ];
  return { used, total, all: [...bar.parts, ...rest].filter((piece) => piece.gib >= 0.05) };
}

function line(left, style, words) {
  return described(make("div", `position: absolute; left: calc(${Math.min(left, 1) * 100}% - 1px); ${style}`), words);
}

function drawnBar(bar) {
  const { total, all } = pieces(bar);
  const drawn = make("div", STYLES.bar);
  const share = (gib) => gib / (total || 1);
  let begin = 0;
  for (const { kind, gib, waiting } of all) {
    const place = `position: absolute; top: 0; bottom: 0; left: ${share(begin) * 100}%; width: ${share(gib) * 100}%;`;
    const piece = described(make("div", `${place} background: ${fill(kind, waiting)};`), amount(nameOf(kind, waiting), gib));
    piece.dataset.kind = kind;
    drawn.append(piece);
    begin += gib;
  }
  const cuda = bar.parts.find((part) => part.kind === "cuda")?.gib ?? 0;
  if (bar.vae_gib) {
    const style = `position: absolute; bottom: 0; left: 0; height: 3px; width: ${Math.min(1, share(cuda + bar.vae_gib)) * 100}%; background: ${COLOURS.vae};`;
    drawn.append(described(make("div", style), amount(say("vae"), bar.vae_gib)));
  }
  if (bar.limit_gib) {
    const words = amount(say(bar.automatic ? "limit" : "slider"), bar.limit_gib);
    const limit = line(share(bar.limit_gib), "top: -2px; bottom: -2px; width: 2px; background: var(--input-text);", words);
    limit.dataset.mark = "limit";
    drawn.append(limit);
  }
  if (bar.measured_gib != null) {
    // Measured is what torch held; the bar begins with what CUDA takes besides.
    const style = "top: -3px; margin-left: -4px; border: 5px solid transparent; border-top: 7px solid var(--input-text); border-bottom: 0;";
    const mark = line(share(cuda + bar.measured_gib), style, amount(say("measured"), bar.measured_gib));
    mark.dataset.mark = "measured";
    drawn.append(mark);
  }
  return drawn;
}

function figures(bar) {
  if (bar.left_out) return say("leftOut");
  const measured = bar.measured_gib == null ? "" : ` · ${say("peak", { gib: bar.measured_gib.toFixed(1) })}`;
  return say("ofLimit", { used: pieces(bar).used.toFixed(1), limit: bar.limit_gib.toFixed(1) }) + measured;
}

function drawnRow(bar) {
  const label = bar.label === "system memory" ? say("systemMemory") : bar.label;
  const row = make("div", "");
  row.setAttribute("role", "group");
  row.setAttribute("aria-label", `${label}, ${figures(bar)}`);
  const head = make("div", STYLES.head);
  head.append(make("span", "overflow: hidden; text-overflow: ellipsis;", label), make("span", "", figures(bar)));
  row.append(head, drawnBar(bar));
  return row;
}

function drawnLegend(bars) {
  const legend = make("div", STYLES.legend);
  const entry = (swatch, words) => {
    const item = make("span", "display: inline-flex; align-items: center; gap: 4px; white-space: nowrap;");
    item.append(make("span", `display: inline-block; ${swatch}`), words);
    legend.append(item);
  };
  const seen = new Set();
  for (const { kind, waiting } of bars.flatMap((bar) => pieces(bar).all)) {
    const name = nameOf(kind, waiting);
    if (kind === "free" || kind === "spare" || seen.has(name)) continue;
    seen.add(name);
    entry(`width: 9px; height: 9px; background: ${fill(kind, waiting)};`, name);
  }
  if (bars.some((bar) => bar.vae_gib)) entry(`width: 9px; height: 3px; background: ${COLOURS.vae};`, say("vae"));
  entry("width: 2px; height: 11px; background: var(--input-text);", say("limit"));
  if (bars.some((bar) => bar.measured_gib != null)) {
    entry("border: 5px solid transparent; border-top: 7px solid var(--input-text); border-bottom: 0;", say("measured"));
  }
  return legend;
}

function heightFor(rows) {
  return rows * ROW_PX + LEGEND_PX;
}

function widgetOf(node) {
  return node.widgets?.find((widget) => widget.name === NAME);
}

function draw(box, bars) {
  box.replaceChildren();
  if (bars?.length) box.append(...bars.map(drawnRow), drawnLegend(bars));
  else box.append(make("div", "opacity: 0.6;", say("emptyPicture")));
}

/** Add the picture, with room for so many bars. */
export function addPlacementPicture(node, rows) {
  const box = make("div", STYLES.box);
  box.setAttribute("aria-label", say("picture"));
  box.setAttribute("role", "group");
  draw(box, []);
  box.dataset.rows = rows;
  box.style.minHeight = `${heightFor(rows)}px`;
  const widget = node.addDOMWidget(NAME, NAME, box, {
    serialize: false, // not in the prompt
    hideOnZoom: false,
    getMinHeight: () => heightFor(Number(box.dataset.rows)) + MARGIN_PX,
    getMaxHeight: () => heightFor(Number(box.dataset.rows)) + MARGIN_PX,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // not in the workflow file
}

/** Show bars as the server sends them; does nothing on a node without a picture. No bars (what does not fit) clear it. */
export function showPlacement(node, bars) {
  const box = widgetOf(node)?.element;
  if (!box) return;
  if (bars?.length > Number(box.dataset.rows)) {
    box.dataset.rows = bars.length;
    box.style.minHeight = `${heightFor(bars.length)}px`;
  }
  draw(box, bars);
  remember(node, "placement", bars ?? []);
}

/** Show what the node showed before the graph was loaded again. */
export function restorePlacement(node) {
  const box = widgetOf(node)?.element;
  if (!box) return;
  const bars = recalled(node, "placement");
  if (bars) showPlacement(node, bars);
  else draw(box, []);
}
