"""The "Wan Sharded Loader" node."""

from comfy_api.latest import io

from ..bridge import gpus, loading, model_files
from .schema import CATEGORY, WanShardedModel, hidden, schema

GPU_SLIDERS = 8
SLIDER_MAX_GIB = 256.0


class WanShardedLoader(io.ComfyNode):
    """Choose a Wan 2.2 model and how much of each GPU it may use; gives a light ``WAN_SHARDED_MODEL`` handle."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanShardedLoader",
            display_name="Wan Sharded Loader",
            category=CATEGORY,
            description="Loads both Wan 2.2 experts sharded over all GPUs, each within its memory slider, with CPU offload for what does not fit.",
            search_aliases=["multi gpu", "device_map", "wan 2.2", "split model", "vram", "distorch", "多显卡"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=model_files.model_choices(),
                    default=model_files.default_model_choice(),
                    tooltip="The Wan 2.2 I2V model: the Hugging Face Hub id (downloaded on first use, 126 GB), a folder in diffusers format inside ComfyUI's diffusers or diffusion_models folder, or 'single files' for ComfyUI's files chosen below.",
                ),
                io.Combo.Input(
                    "high_noise_model",
                    options=model_files.expert_choices(),
                    default=model_files.NONE,
                    tooltip="A file (safetensors or GGUF) in diffusion_models with the high noise expert. Needed for 'single files'; otherwise it takes the place of the model's own. Chosen alone for 'single files', the low noise expert's file is found by its name.",
                ),
                io.Combo.Input(
                    "low_noise_model",
                    options=model_files.expert_choices(),
                    default=model_files.NONE,
                    tooltip="The same for the low noise expert.",
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=model_files.part_choices("text_encoders"),
                    default=model_files.FROM_MODEL,
                    tooltip="A UMT5 file in text_encoders, such as umt5_xxl_fp8_e4m3fn_scaled.safetensors. 'from model': the model folder's own; with 'single files', the one that is found in text_encoders.",
                ),
                io.Combo.Input(
                    "vae",
                    options=model_files.part_choices("vae"),
                    default=model_files.FROM_MODEL,
                    tooltip="A Wan 2.1 VAE file, such as wan_2.1_vae.safetensors. 'from model': the model folder's own; with 'single files', the one that is found in vae. Wan I2V Sampler also takes a VAE from Load VAE.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=["default", "bf16", "fp16", "fp8_e4m3fn", "int8"],
                    default="default",
                    tooltip="Precision in which the experts' weights are kept. default: as stored, but float32 checkpoints become bf16 on GPUs. fp8_e4m3fn and int8 take about half the memory of bf16; they are widened to compute, or multiplied as they are where that was measured to be faster and near enough.",
                ),
                io.Combo.Input(
                    "device_map",
                    options=["auto", "balanced"],
                    default="balanced",
                    tooltip="Where the blocks' weights live (as in accelerate). balanced: as evenly over the GPUs as their limits allow. auto: fill GPU 0 first, then GPU 1, and so on. Who computes them is the choice of execution.",
                ),
                io.Combo.Input(
                    "execution",
                    options=["auto", "parallel", "sequential"],
                    default="auto",
                    tooltip="Who computes. parallel: all GPUs compute every block, each on its share of the video, by measured speed. sequential: one GPU at a time, block after block. auto: parallel with all GPUs, with fewer where one would slow the others down, or sequential where parallel does not fit or would be slower. The text on the node says what was chosen and why.",
                ),
                io.Combo.Input(
                    "offload",
                    options=["auto", "cpu", "none"],
                    default="auto",
                    tooltip="What happens to blocks that do not fit on the GPUs. auto: they wait in system memory and are fetched at every step. cpu: all blocks wait in system memory. none: an error instead.",
                ),
                *(cls._gpu_slider(index) for index in range(GPU_SLIDERS)),
            ],
            outputs=[
                WanShardedModel.Output(
                    display_name="model",
                    tooltip="Connect to Wan I2V Sampler. A description of what to load; the weights themselves are loaded once, by the first sampler that needs them.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @staticmethod
    def _gpu_slider(index: int) -> io.Input:
        slider = io.Float.Input(
            f"gpu{index}_gb",
            display_name=gpus.slider_label(index),
            default=0.0,
            min=-1.0,
            max=SLIDER_MAX_GIB,
            step=0.5,
            display_mode=io.NumberDisplay.slider,
            optional=True,
            tooltip=f"The most this pack may use on GPU {index}, in GiB, everything included (weights, activations, VAE). 0: automatic, what is free less a margin. Below 0: leave this GPU out. Out of memory on this GPU? Lower it.",
        )
        return slider if gpus.is_present(index) else hidden(slider)

    @classmethod
    def fingerprint_inputs(
        cls,
        model: str,
        high_noise_model: str = model_files.NONE,
        low_noise_model: str = model_files.NONE,
        text_encoder: str = model_files.FROM_MODEL,
        vae: str = model_files.FROM_MODEL,
        **_: object,
    ) -> str:
        return loading.fingerprint(model, high_noise_model, low_noise_model, text_encoder, vae)

    @classmethod
    def execute(
        cls,
        model: str,
        high_noise_model: str = model_files.NONE,
        low_noise_model: str = model_files.NONE,
        text_encoder: str = model_files.FROM_MODEL,
        vae: str = model_files.FROM_MODEL,
        weight_dtype: str = "default",
        device_map: str = "balanced",
        execution: str = "auto",
        offload: str = "auto",
        **gpu_gb: float,
    ) -> io.NodeOutput:
        handle, report, bars = loading.make_handle(
            node_id=cls.hidden.unique_id,
            model=model,
            high_noise_model=high_noise_model,
            low_noise_model=low_noise_model,
            text_encoder=text_encoder,
            vae=vae,
            weight_dtype=weight_dtype,
            device_map=device_map,
            execution=execution,
            offload=offload,
            sliders_gib=[float(gpu_gb.get(f"gpu{index}_gb", 0.0)) for index in range(GPU_SLIDERS)],
        )
        return io.NodeOutput(handle, ui={"text": (report,), "placement": (bars,)})
