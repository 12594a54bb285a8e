"""Keys of LoRA files: which weight of a Wan 2.2 expert each is about, and what it holds of it. Knows names only, reads nothing.

Names are looked up in a list of the weights that there are, with dots and underscores alike. So kohya's underscores are never guessed at,
and what belongs to another model, Wan 2.1's image layers among them, is not found.

Source: the key forms of ComfyUI's comfy/lora.py and comfy/weight_adapter, of diffusers' lora_conversion_utils.py, of musubi-tuner, and of
lightx2v's tools/extract/lora_extractor.py, whose ``diff``, ``diff_b`` and ``diff_m`` stand for weight, bias and modulation.
"""

import re
from dataclasses import dataclass

from .wan_names import PREFIXES, diffusers_name

DOWN, UP, ALPHA, DIFFERENCE = "down", "up", "alpha", "difference"

_PREFIXES = (
    *PREFIXES,
    "base_model.model.",  # PEFT
    "transformer.",  # diffusers
    "pipe.dit.",  # DiffSynth-Studio
    "lora_unet_",  # kohya's scripts, musubi-tuner
    "lora_transformer_",  # OneTrainer
    "lycoris_",  # SimpleTuner
    "_",  # "lora_unet__": Wan Fun
)
_MODULATION = "modulation"
_ATTENTION = ("q", "k", "v", "o", "norm_q", "norm_k")
_IN_BLOCK = (*(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in _ATTENTION), "norm3", "ffn.0", "ffn.2")
_OUTSIDE = (
    "patch_embedding",
    *("text_embedding.0", "text_embedding.2"),
    *("time_embedding.0", "time_embedding.2", "time_projection.1"),
    *("head.head", f"head.{_MODULATION}"),
)
_WAN_NAMES = (*_OUTSIDE, *(f"blocks.0.{name}" for name in (*_IN_BLOCK, _MODULATION)))
_WITHOUT_BIAS = (".norm_q", ".norm_k")
_TABLES = "scale_shift_table"

# A key's end -> what it means. An adapter may have a name of its own before ".weight".
_ENDS = {
    DOWN: r"lora_down\.weight|lora_A(?:\.[\w-]+)?\.weight|lora_A|lora\.down\.weight|lora_linear_layer\.down\.weight",
    UP: r"lora_up\.weight|lora_B(?:\.[\w-]+)?\.weight|lora_B|lora\.up\.weight|lora_linear_layer\.up\.weight",
    ALPHA: r"alpha",
    DIFFERENCE: r"diff|diff_b|diff_m",
}
_UNSUPPORTED = {
    "LoHa": r"hada_w[12]_[ab]|hada_t[12]",
    "LoKr": r"lokr_w[12](?:_[ab])?|lokr_t2",
    "DoRA": r"dora_scale|lora_magnitude_vector(?:\.[\w-]+)?(?:\.weight)?",
    "GLoRA": r"[ab][12]\.weight",
    "OFT or BOFT": r"oft_blocks|oft_diag|oft_R(?:\.[\w-]+)?\.weight|rescale",
    "LoRA with a third matrix (lora_mid)": r"lora_mid\.weight",
    "LoRA with a bias of its own (lora_B.bias)": r"lora_(?:B|up)(?:\.[\w-]+)?\.bias",
    "LoRA in scaled fp8": r"lora_\w+\.(?:scale_weight|weight_scale|comfy_quant)",
    "LyCORIS file with norms (w_norm)": r"[wb]_norm",
    "LoRA that reshapes weights (reshape_weight)": r"reshape_weight",
    "LoRA that replaces weights (set_weight)": r"set_weight",
}
_KEY = re.compile(rf"(?P<name>.+)\.(?P<end>{'|'.join((*_ENDS.values(), *_UNSUPPORTED.values()))})")
_ROLES = {role: re.compile(end) for role, end in {**_ENDS, **_UNSUPPORTED}.items()}
_BLOCK = re.compile(r"blocks_([0-9]{1,4})_(.+)")


@dataclass(frozen=True)
class Target:
    """What a key is about.

    Attributes:
        role: ``DOWN``, ``UP``, ``ALPHA`` or ``DIFFERENCE``, or the kind of adapter, in words, that this pack cannot add.
        name: diffusers' name: of the parameter for a difference, else of the module.
    """

    role: str
    name: str

    @property
    def supported(self) -> bool:
        return self.role in _ENDS


def target_of(key: str) -> Target | None:
    """What a LoRA file's key is about; ``None`` where a Wan 2.2 expert has no such weight, or where it is no LoRA's key."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    role = next(role for role, pattern in _ROLES.items() if pattern.fullmatch(match["end"]))
    name = _parameter(match["name"], match["end"]) if role == DIFFERENCE else module_of(match["name"])
    if name is None or (role in (DOWN, UP, ALPHA) and name.endswith(_TABLES)):  # nobody changes modulations by low rank
        return None
    return Target(role, name)


def module_of(name: str) -> str | None:
    """diffusers' name of a module, or of the modulation, in any program's spelling; ``None`` for what a Wan 2.2 expert does not have."""
    flat = _flat(_without_prefixes(name))
    block = _BLOCK.fullmatch(flat)
    if block is None:
        return _MODULES.get(flat)
    known = _MODULES.get(f"blocks_0_{block[2]}")
    return None if known is None else known.replace("blocks.0.", f"blocks.{int(block[1])}.", 1)


def _parameter(name: str, end: str) -> str | None:
    if end == "diff_m":
        return module_of(f"{name}.{_MODULATION}")
    kind = "bias" if end == "diff_b" else "weight"
    for suffix in ("weight", "bias"):  # "....bias.diff" is the general way to say "....diff_b"
        if end == "diff" and name.endswith(f".{suffix}"):
            name, kind = name.removesuffix(f".{suffix}"), suffix
    module = module_of(name)
    if module is None or (kind == "bias" and module.endswith((*_WITHOUT_BIAS, _TABLES))):
        return None
    return module if module.endswith(_TABLES) else f"{module}.{kind}"


def _without_prefixes(name: str) -> str:
    while found := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name[len(found) :]
    return name


def _flat(name: str) -> str:
    return name.replace(".", "_")


# Flat name in Wan's or in diffusers' spelling -> diffusers' name; the blocks' by those of the first block.
_MODULES = {_flat(spelling): diffusers_name(name) for name in _WAN_NAMES for spelling in (name, diffusers_name(name))}
