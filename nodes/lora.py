"""The "Wan Sharded LoRA" node."""

from typing import Any

from comfy_api.latest import io

from ..bridge import loras
from .schema import CATEGORY, WanShardedModel, schema


class WanShardedLora(io.ComfyNode):
    """Add a LoRA to each expert of a ``WAN_SHARDED_MODEL``; reads no weights yet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="WanShardedLora",
            display_name="Wan Sharded LoRA",
            category=CATEGORY,
            description="Adds a LoRA to each Wan 2.2 expert, such as those for 4 steps. Several of these nodes in a row add up.",
            search_aliases=["lora loader", "lightx2v", "lightning", "4 steps", "wan 2.2"],
            inputs=[
                WanShardedModel.Input("model", tooltip="From Wan Sharded Loader, or from another Wan Sharded LoRA."),
                cls._lora("high"),
                cls._strength("high"),
                cls._lora("low"),
                cls._strength("low"),
            ],
            outputs=[
                WanShardedModel.Output(
                    display_name="model",
                    tooltip="The model with these LoRAs. Connect to Wan I2V Sampler, or to another Wan Sharded LoRA.",
                )
            ],
        )

    @staticmethod
    def _lora(level: str) -> io.Input:
        return io.Combo.Input(
            f"{level}_noise_lora",
            options=loras.lora_choices(),
            default=loras.NONE,
            tooltip=f"The LoRA for the {level} noise expert, a safetensors file in ComfyUI's loras folder. none: that expert stays as it is. A file whose name says that it is for the other expert is refused.",
        )

    @staticmethod
    def _strength(level: str) -> io.Input:
        return io.Float.Input(
            f"{level}_noise_strength",
            default=1.0,
            min=-10.0,
            max=10.0,
            step=0.05,
            tooltip=f"How strongly it is added to the {level} noise expert. 1: as it was trained. 0: not at all.",
        )

    @classmethod
    def fingerprint_inputs(cls, high_noise_lora: str | None = None, low_noise_lora: str | None = None, **_: object) -> str:
        return loras.fingerprint(high_noise_lora, low_noise_lora)

    @classmethod
    def execute(
        cls,
        model: Any,
        high_noise_lora: str = loras.NONE,
        high_noise_strength: float = 1.0,
        low_noise_lora: str = loras.NONE,
        low_noise_strength: float = 1.0,
    ) -> io.NodeOutput:
        handle, report = loras.add_loras(
            model,
            high_noise_lora=high_noise_lora,
            high_noise_strength=high_noise_strength,
            low_noise_lora=low_noise_lora,
            low_noise_strength=low_noise_strength,
        )
        return io.NodeOutput(handle, ui={"text": (report,)})
