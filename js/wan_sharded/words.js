/** The texts that this pack's JavaScript shows, in the language of ComfyUI's page. */
import { app } from "/scripts/app.js";

const ENGLISH = {
  picture: "Memory of each GPU",
  emptyPicture: "Memory of each GPU. Seen here when the workflow runs.",
  transformer: "High noise expert",
  transformer_2: "Low noise expert",
  fetched: "Blocks being fetched",
  activations: "Activations",
  cuda: "CUDA itself",
  frames: "Frames",
  free: "Free for this pack",
  spare: "Above the limit",
  taken: "Other programs",
  waiting: "{what}, waiting",
  vae: "VAE, in its turn",
  limit: "Limit",
  slider: "Slider",
  measured: "Measured peak",
  peak: "peak {gib}",
  leftOut: "left out",
  systemMemory: "System memory",
  ofLimit: "{used} of {limit} GiB",
  gib: "{what}: {gib} GiB",
  measure: "Measure GPUs",
  measuring: "Measuring ...",
  measureTip: "Measures the GPUs and their links for some seconds, without a model. The text can be put into a bug report.",
  measureFailed: "The GPUs could not be measured: {why}",
  emptyPlacement: "Placement: which GPU holds what. Seen here when the workflow runs.",
  emptyNotes: "Notes on the run: settings, time, memory. Seen here when the workflow runs.",
  emptyExport: "The file, and what its format had no place for. Seen here when the workflow runs.",
  emptyLora: "What each LoRA changes. Seen here when the workflow runs.",
};

const CHINESE = {
  picture: "每块 GPU 的显存",
  emptyPicture: "每块 GPU 的显存。运行工作流后显示在这里。",
  transformer: "高噪声专家",
  transformer_2: "低噪声专家",
  fetched: "正在取来的 block",
  activations: "激活值",
  cuda: "CUDA 本身",
  frames: "视频帧",
  free: "本包可用的空闲",
  spare: "上限以上",
  taken: "其他程序",
  waiting: "{what}（等待中）",
  vae: "VAE（轮到它时）",
  limit: "上限",
  slider: "滑块",
  measured: "实测峰值",
  peak: "峰值 {gib}",
  leftOut: "不使用",
  systemMemory: "系统内存",
  ofLimit: "{used} / {limit} GiB",
  gib: "{what}：{gib} GiB",
  measure: "测量 GPU",
  measuring: "正在测量……",
  measureTip: "不需要模型，用几秒钟测量各 GPU 及其链路的速度。得到的文字可以放进问题报告。",
  measureFailed: "无法测量 GPU：{why}",
  emptyPlacement: "放置：哪块 GPU 存放什么。运行工作流后显示在这里。",
  emptyNotes: "运行说明：设置、用时、显存。运行工作流后显示在这里。",
  emptyExport: "写出的文件，以及其格式容纳不下的内容。运行工作流后显示在这里。",
  emptyLora: "每个 LoRA 改变了什么。运行工作流后显示在这里。",
};

function language() {
  return app.extensionManager?.setting?.get?.("Comfy.Locale") ?? app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en";
}

/** A text by its key; `{name}` in it is replaced by `values.name`. */
export function say(key, values = {}) {
  const texts = language() === "zh" ? CHINESE : ENGLISH;
  return (texts[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
