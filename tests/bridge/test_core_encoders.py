"""ComfyUI's own text encoder and VAE, loaded from the same single files by ComfyUI, give what this pack's give.

Sizes are given to ComfyUI through the option that it has for that. Its loader takes a file for UMT5-XXL by its 24 blocks and its width of
4096: one encoder here has both, and is thin in all else. The VAE's layers are those of the published one, with fewer channels.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

cli_args = pytest.importorskip("comfy.cli_args", reason="put a ComfyUI folder on PYTHONPATH to run this")
if not torch.cuda.is_available():
    cli_args.args.cpu = True  # before comfy.model_management looks for a GPU

import comfy.model_management as management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.text_encoders.wan  # noqa: E402
import comfy.utils  # noqa: E402
from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer  # noqa: E402
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean  # noqa: E402
from tiny_checkpoint import make_text_encoder, make_tokenizer, make_vae  # noqa: E402
from tiny_core_clip import SMALL, cores_clip  # noqa: E402
from tiny_encoder_files import FORMS, write_umt5_file, write_vae_file  # noqa: E402
from wan_sharded.bridge.core_vae import CoreVae  # noqa: E402
from wan_sharded.engine import Callbacks, open_model  # noqa: E402
from wan_sharded.engine.checkpoints.stored import ModelFiles  # noqa: E402
from wan_sharded.engine.pipeline import text as text_module  # noqa: E402
from wan_sharded.engine.pipeline.text_encoder_file import SentencePieceTokenizer  # noqa: E402
from wan_sharded.engine.pipeline.vae import ModelVae  # noqa: E402
from wan_sharded.engine.planning.footprint import VideoShape  # noqa: E402

PUBLISHED = {"d_model": 4096, "num_layers": 24, "d_ff": 24, "d_kv": 8, "num_heads": 2}
# ComfyUI reads parentheses as weights, and encodes more than 512 tokens without cutting, so there are neither.
PROMPTS = [
    "A white cat wearing sunglasses sits on a surfboard.",
    "色调艳丽，过曝，静态，细节模糊不清 and English, emoji 🐱 Ω" + " cat" * 90,
]
# Relative error of the embeddings against ComfyUI, which computes in float32. Where this pack does so too, only the order of the sums
# differs. In 16 bits it computes as transformers does, and what each block rounds adds up; bf16 is eight times coarser than fp16. Measured:
# 1e-6 (4e-6 over 24 blocks), 1.2e-3 and 1.0e-2.
FLOAT32_ERROR = 2e-5
ERRORS = {"fp16": 2e-3, "bf16": 1.6e-2}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    management.unload_all_models()


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    make_tokenizer(file)
    return file.read_bytes()


@pytest.fixture(scope="module")
def text_encoder(spiece: bytes, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A file of a form and of sizes, always of the same weights."""
    import sentencepiece

    vocab_size = sentencepiece.SentencePieceProcessor(model_proto=spiece).get_piece_size()
    folder = tmp_path_factory.mktemp("text_encoders")

    def make(form: str, sizes: dict[str, int] = SMALL) -> Path:
        file = folder / f"{form}_{sizes['d_model']}.safetensors"
        if not file.exists():
            write_umt5_file(file, make_text_encoder(vocab_size, torch.Generator().manual_seed(0), **sizes), spiece, form)
        return file

    return make


def cores_embeddings(clip: Any, prompts: list[str] = PROMPTS) -> list[torch.Tensor]:
    """Core's CLIP Text Encode, given what Wan's own code and diffusers make of a prompt before it becomes tokens."""
    return [clip.encode_from_tokens(clip.tokenize(prompt_clean(prompt))) for prompt in prompts]


def our_embeddings(file: Path, prompts: list[str] = PROMPTS) -> list[torch.Tensor]:
    model = ModelFiles("core's", {}, text_encoder=file, tokenizer=None, vae=None, fingerprint="")
    source = text_module.open_text_encoder(model, narrow=False)
    return text_module._encode_in(source, prompts, None, ["cpu"], Callbacks())


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("form", [form for form in FORMS if form != "fp8_scaled_new"])
def test_embeddings_are_cores(text_encoder: Callable[..., Path], form: str) -> None:
    """fp8, plain and scaled, is widened to float32 by both."""
    with torch.inference_mode():
        cores, ours = cores_embeddings(cores_clip(text_encoder(form))), our_embeddings(text_encoder(form))
    for core, our in zip(cores, ours, strict=True):
        assert our.shape == core.shape == (1, 512, 32)
        assert relative(our, core) <= ERRORS.get(form, FLOAT32_ERROR)
        assert torch.equal(our.abs().amax(-1) > 0, core.abs().amax(-1) > 0), "the same number of tokens"


def test_the_newer_spelling_of_scales(text_encoder: Callable[..., Path]) -> None:
    """This version of ComfyUI reads it only if it is told so beside the file."""
    file = text_encoder("fp8_scaled_new")
    keys = [key for key in comfy.utils.load_torch_file(str(file)) if key.endswith(".comfy_quant")]
    layers = {key.removesuffix(".comfy_quant"): {"format": "float8_e4m3fn"} for key in keys}
    with torch.inference_mode():
        cores = cores_embeddings(cores_clip(file, quantization_metadata=json.dumps({"layers": layers})))
        old, new = our_embeddings(text_encoder("fp8_scaled_old")), our_embeddings(file)
    for one, other, core in zip(old, new, cores, strict=True):
        assert torch.equal(one, other)
        assert relative(other, core) <= FLOAT32_ERROR


def test_cores_loader_takes_the_file_too(text_encoder: Callable[..., Path]) -> None:
    """Load CLIP, type wan, from the file to embeddings."""
    file = text_encoder("fp8_scaled_old", PUBLISHED)
    sizes = {**PUBLISHED, "vocab_size": comfy.utils.load_torch_file(str(file))["shared.weight"].shape[0]}
    with torch.inference_mode():
        clip = comfy.sd.load_clip([str(file)], clip_type=comfy.sd.CLIPType.WAN, model_options={"umt5xxl_model_config": sizes})
        (core,), (our,) = cores_embeddings(clip, PROMPTS[:1]), our_embeddings(file, PROMPTS[:1])
    assert our.shape == core.shape == (1, 512, 4096)
    assert relative(our, core) <= FLOAT32_ERROR


@pytest.mark.parametrize("prompt", [*PROMPTS, "a   b,  c ", "", "静" * 600])
def test_tokens_are_cores(spiece: bytes, prompt: str) -> None:
    core = SPieceTokenizer(torch.frombuffer(bytearray(spiece), dtype=torch.uint8))(prompt)["input_ids"]
    ours = SentencePieceTokenizer(spiece)([prompt], max_length=512)
    length = min(512, len(core))
    assert ours.input_ids[0, : length - 1].tolist() == core[: length - 1] and ours.input_ids[0, length - 1] == core[-1]
    assert int(ours.attention_mask.sum()) == length and not ours.input_ids[0, length:].any()


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("vae") / "wan_2.1_vae.safetensors"
    write_vae_file(file, make_vae(torch.Generator().manual_seed(3), num_res_blocks=2))
    return file


# Both compute in float32, with sums in another order. Latents relative to the largest, pixels in -1..1; measured: 4e-7 and 2e-6.
LATENTS_ERROR, PIXELS_ERROR = 1e-5, 2e-5


def test_latents_and_frames_are_cores(vae_file: Path, tiny_checkpoint: Path) -> None:
    core: Any = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(vae_file)), dtype=torch.float32)
    assert core.latent_channels == 16
    handle = open_model(tiny_checkpoint)
    cores = CoreVae(core, handle)
    model = ModelFiles("core's", {}, text_encoder=None, tokenizer=None, vae=vae_file, fingerprint="")
    ours = ModelVae(model, SimpleNamespace(), VideoShape(64, 48, 9), lambda: None, lambda note: None)._in(torch.float32)  # type: ignore[arg-type]
    video = torch.rand(1, 3, 9, 48, 64, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.inference_mode():
        latents = ours.encode(video).latent_dist.mode()
        assert float((cores.encode(video) - latents).abs().max()) <= LATENTS_ERROR * float(latents.abs().max())
        frames = ours.decode(latents, return_dict=False)[0].clamp(-1, 1)
        assert float((cores.decode(latents) - frames).abs().max()) <= PIXELS_ERROR
    assert list(cores.config.latents_mean) == list(ours.config.latents_mean)
