"""Wan's own tensor names in diffusers' spelling. Called by the readers of single files and of LoRAs.

Both name the same weights of the same layers; only diffusers' q, k and v are spelled out and its embedders stand together. In Wan's own
code norm3 is the norm before cross-attention, which diffusers calls norm2; the other norm of that pair has no weights in either.
"""

# Whatever a program saved the model inside.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "net.")

# Path -> path, the longest that fits counts. Outside blocks:
_MODEL = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
# Inside a block:
_BLOCK = {
    "self_attn": "attn1",
    "cross_attn": "attn2",
    **{f"self_attn.{wan}": f"attn1.{ours}" for wan, ours in _ATTENTION.items()},
    **{f"cross_attn.{wan}": f"attn2.{ours}" for wan, ours in _ATTENTION.items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}


def diffusers_name(original: str) -> str:
    """A parameter's or module's name in diffusers' ``WanTransformer3DModel``.

    Args:
        original: Wan's own name, as "blocks.0.self_attn.q.weight" or "diffusion_model.head.head". What is no name of Wan's, and what has
            diffusers' spelling already, comes back unchanged but for the prefix.
    """
    name = without_prefix(original)
    number = block_number(name)
    if number is None:
        return _renamed(name, _MODEL)
    begin = f"blocks.{number}"
    inside = name.removeprefix(begin).removeprefix(".")
    return f"{begin}.{_renamed(inside, _BLOCK)}" if inside else name


def without_prefix(name: str) -> str:
    """The name without what a program put before all names."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def block_number(name: str) -> str | None:
    """The number, as written, of the block that a name without prefix lies in."""
    head, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return number if head == "blocks" and number.isascii() and number.isdigit() else None


def _renamed(path: str, table: dict[str, str]) -> str:
    """The path with its first segments replaced, as many as the table knows together."""
    segments = path.split(".")
    for count in range(len(segments), 0, -1):
        found = table.get(".".join(segments[:count]))
        if found is not None:
            return ".".join([found, *segments[count:]])
    return path
