"""The text encoder from single files: what a folder's encoder gives, in every form, wherever it is put, and nothing left after an error."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_text_encoder
from tiny_encoder_files import FORMS, write_umt5_file
from transformers import AutoTokenizer, UMT5EncoderModel
from wan_sharded.engine import Callbacks, ImageToVideoRequest, ModelHandle, open_model
from wan_sharded.engine.checkpoints.stored import ModelFiles, StoredTensor
from wan_sharded.engine.errors import Cancelled, CheckpointError
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.pipeline import text as text_module
from wan_sharded.engine.pipeline import text_encoder_file
from wan_sharded.engine.pipeline.image_to_video import ImageToVideo
from wan_sharded.engine.pipeline.text import MAX_TOKENS, open_text_encoder
from wan_sharded.engine.pipeline.text_encoder_file import FileTextEncoder, SentencePieceTokenizer
from wan_sharded.engine.weights.reading import TensorReader

PROMPTS = ["A white cat wearing sunglasses sits on a surfboard.", "色调艳丽，过曝，静态", ""]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def spiece(tiny_checkpoint: Path) -> bytes:
    return (tiny_checkpoint / "tokenizer" / "spiece.model").read_bytes()


@pytest.fixture
def encoder(tiny_checkpoint: Path) -> UMT5EncoderModel:
    return UMT5EncoderModel.from_pretrained(tiny_checkpoint / "text_encoder")


@pytest.fixture
def write(encoder: UMT5EncoderModel, spiece: bytes, tmp_path: Path) -> Callable[..., Path]:
    """The tiny checkpoint's text encoder as a single file, with a change."""

    def make(form: str, change: Callable[[dict[str, torch.Tensor]], object] | None = None) -> Path:
        file = tmp_path / f"umt5_{form}.safetensors"
        write_umt5_file(file, encoder, spiece, form)
        if change:
            tensors = load_file(file)
            change(tensors)
            save_file(tensors, file)
        return file

    return make


@pytest.fixture
def files(tiny_checkpoint: Path) -> Callable[..., ModelFiles]:
    """The tiny checkpoint with other files in the place of some."""
    model = open_model(tiny_checkpoint).model
    return lambda **parts: replace(model, **parts)


def embeddings(model: ModelFiles, prompts: list[str] = PROMPTS, *, narrow: bool = False) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat(text_module._encode_in(open_text_encoder(model, narrow=narrow), prompts, None, ["cpu"], Callbacks()))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("form", DTYPES)
def test_a_file_gives_what_a_folder_gives(
    encoder: UMT5EncoderModel, write: Callable[..., Path], files: Callable[..., ModelFiles], tmp_path: Path, form: str
) -> None:
    """To the last bit, in the same dtype; float16 included, where transformers keeps a part in float32."""
    encoder.to(DTYPES[form]).save_pretrained(tmp_path / "text_encoder")
    folder = embeddings(files(text_encoder=tmp_path / "text_encoder"))
    file = embeddings(files(text_encoder=write(form), tokenizer=None))
    assert file.dtype == DTYPES[form] and torch.equal(file, folder)
    assert file.shape == (3, MAX_TOKENS, 32) and file[2, 1:].abs().max() == 0, "padded with zeros"


@pytest.mark.parametrize("form", ["fp8_scaled_old", "fp8_scaled_new", "fp8"])
def test_fp8_gives_what_its_widened_weights_give(
    encoder: UMT5EncoderModel, write: Callable[..., Path], files: Callable[..., ModelFiles], tmp_path: Path, form: str
) -> None:
    exact = embeddings(files())
    file = write(form)
    stored = load_file(file)
    widened = {}
    for name in (name for name, _ in encoder.named_parameters()):
        module = name.removesuffix(".weight")
        scale = stored.get(f"{module}.scale_weight", stored.get(f"{module}.weight_scale"))
        widened[name] = stored[name].float() * (1 if scale is None else scale)
    encoder.load_state_dict(widened, strict=False)
    encoder.save_pretrained(tmp_path / "text_encoder")
    got = embeddings(files(text_encoder=file, tokenizer=None))
    assert got.dtype == torch.float32
    assert torch.equal(got, embeddings(files(text_encoder=tmp_path / "text_encoder")))
    assert 1e-3 < relative(got, exact) < 0.15, "fp8 has four bits for a value"


def test_a_scale_per_row(write: Callable[..., Path], files: Callable[..., ModelFiles]) -> None:
    module = "encoder.block.0.layer.0.SelfAttention.q"

    def per_row(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{module}.weight_scale"] = tensors[f"{module}.weight_scale"].expand(32).reshape(32, 1).contiguous()

    one = embeddings(files(text_encoder=write("fp8_scaled_new"), tokenizer=None))
    assert torch.equal(embeddings(files(text_encoder=write("fp8_scaled_new", per_row), tokenizer=None)), one)

    def other(tensors: dict[str, torch.Tensor]) -> None:
        per_row(tensors)
        tensors[f"{module}.weight_scale"][3] *= 2

    assert not torch.equal(embeddings(files(text_encoder=write("fp8_scaled_new", other), tokenizer=None)), one)


def test_float32_becomes_bf16_where_asked(write: Callable[..., Path], files: Callable[..., ModelFiles]) -> None:
    """As on GPUs, where the published weights' 32 bits would not fit."""
    assert torch.equal(
        embeddings(files(text_encoder=write("fp32"), tokenizer=None), narrow=True),
        embeddings(files(text_encoder=write("bf16"), tokenizer=None)),
    )
    assert torch.equal(embeddings(files(), narrow=True), embeddings(files(text_encoder=write("bf16"), tokenizer=None)))
    fp16 = files(text_encoder=write("fp16"), tokenizer=None)
    assert torch.equal(embeddings(fp16, narrow=True), embeddings(fp16)), "nothing else does"


@pytest.mark.parametrize("form", FORMS)
def test_what_it_will_take_is_what_it_takes(write: Callable[..., Path], files: Callable[..., ModelFiles], form: str) -> None:
    source = open_text_encoder(files(text_encoder=write(form), tokenizer=None), narrow=False)
    model = source.load(None, lambda: None).model
    assert sum(parameter.numel() * parameter.itemsize for parameter in model.parameters()) == source.weight_bytes
    if "scaled" in form:
        matrices = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".stored"))
        rest = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(".stored"))
        assert matrices < source.weight_bytes <= matrices + 4 * rest, "a byte for each value of a matrix"


def test_what_a_folder_will_take(encoder: UMT5EncoderModel, files: Callable[..., ModelFiles], tmp_path: Path) -> None:
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    assert open_text_encoder(files(), narrow=False).weight_bytes == 4 * parameters
    assert open_text_encoder(files(), narrow=True).weight_bytes == 2 * parameters
    encoder.half().save_pretrained(tmp_path / "text_encoder")
    source = open_text_encoder(files(text_encoder=tmp_path / "text_encoder"), narrow=True)
    model = source.load(None, lambda: None).model
    assert source.weight_bytes == sum(parameter.numel() * parameter.itemsize for parameter in model.parameters()) > 2 * parameters


@pytest.mark.parametrize("form", ["bf16", "fp16", "fp8_scaled_old"])
def test_each_tensor_is_read_once_and_none_is_held_twice(
    write: Callable[..., Path], files: Callable[..., ModelFiles], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    read: list[str] = []
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    real = TensorReader.read

    def watched(self: TensorReader, stored: StoredTensor) -> torch.Tensor:
        nonlocal most
        most = max(most, len(alive))
        read.append(stored.key)
        tensor = real(self, stored)
        alive.add(tensor)
        return tensor

    file = write(form)
    monkeypatch.setattr(TensorReader, "read", watched)
    # Moving to a GPU makes a tensor of its own; here ``to`` must as well, so that what is read could go.
    monkeypatch.setattr(text_encoder_file, "_place", lambda name, places: torch.device("meta"))
    open_text_encoder(files(text_encoder=file, tokenizer=None), narrow=False).load(None, lambda: None)
    assert sorted(read) == sorted(key for key in load_file(file) if key not in ("spiece_model", "scaled_fp8"))
    assert most <= 1


@pytest.mark.parametrize("form", ["fp8_scaled_old", "fp16", "bf16"])
def test_what_waits_in_system_memory(write: Callable[..., Path], files: Callable[..., ModelFiles], form: str) -> None:
    """accelerate's hooks bring a module's weights for the moment; fp8 matrices and their scales must come whole."""
    loaded = open_text_encoder(files(text_encoder=write(form), tokenizer=None), narrow=False).load(None, lambda: None)
    given = loaded.tokenizer(PROMPTS, max_length=16)
    with torch.inference_mode():
        expected = loaded.model(given.input_ids, given.attention_mask).last_hidden_state
        cpu_offload(loaded.model, torch.device("cpu"))
        assert {parameter.device.type for parameter in loaded.model.parameters()} == {"meta"}
        assert torch.equal(loaded.model(given.input_ids, given.attention_mask).last_hidden_state, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ["fp8_scaled_old", "fp16", "bf16"])
def test_one_gpu_and_what_does_not_fit_there(write: Callable[..., Path], files: Callable[..., ModelFiles], form: str) -> None:
    source = open_text_encoder(files(text_encoder=write(form), tokenizer=None), narrow=True)
    expected = torch.cat(text_module._encode_in(source, PROMPTS, None, ["cpu"], Callbacks()))
    # All of it, the table and some of the rest, nothing: what comes first decides.
    for part, places in ((3.0, {"cuda:0"}), (0.95, {"cuda:0", "meta"}), (0.1, {"cpu"})):
        room: dict[int | str, int] = {0: int(part * source.weight_bytes), "cpu": 3 * source.weight_bytes}
        model = source.load(room, lambda: None).model
        assert {str(parameter.device) for parameter in model.parameters()} == places
        got = torch.cat(text_module._encode_in(source, PROMPTS, room, ["cuda:0"], Callbacks()))
        assert relative(got, expected) < 1e-5 if source.name.endswith("old.safetensors") else relative(got, expected) < 2e-2


def test_rooms_are_filled_one_after_the_other(write: Callable[..., Path], files: Callable[..., ModelFiles]) -> None:
    """As transformers does it for folders; a block stays whole."""
    source = open_text_encoder(files(text_encoder=write("fp8_scaled_old"), tokenizer=None), narrow=False)
    assert isinstance(source, FileTextEncoder)
    skeleton = source._skeleton()
    places = text_encoder_file._places(skeleton, {0: 10_000_000, "cpu": 10_000_000})
    assert set(places.values()) == {0}
    table = skeleton.shared.weight.numel() * skeleton.shared.weight.itemsize
    places = text_encoder_file._places(skeleton, {0: 2 * table, 1: 10_000_000, "cpu": 10_000_000})
    found = {name: text_encoder_file._place(name, places) for name, _ in skeleton.named_parameters()}
    assert found["shared.weight"] == 0 and found["encoder.final_layer_norm.weight"] == 1
    for block in range(2):
        assert len({place for name, place in found.items() if name.startswith(f"encoder.block.{block}.")}) == 1
    places = text_encoder_file._places(skeleton, {0: 2 * table, "cpu": 10_000_000})
    assert set(places.values()) == {0, "cpu"}
    assert infer_auto_device_map(skeleton, {0: 2 * table, "cpu": 10_000_000}, no_split_module_classes=["UMT5Block"]) == places


def test_a_whole_run_with_a_file(
    tiny_checkpoint: Path, write: Callable[..., Path], files: Callable[..., ModelFiles], make_request: Callable[..., ImageToVideoRequest]
) -> None:
    engine, request = ImageToVideo(ModelOwner()), make_request(num_inference_steps=1, num_frames=1)
    expected = engine(open_model(tiny_checkpoint), request).frames
    assert torch.equal(engine(ModelHandle(files(text_encoder=write("fp32"), tokenizer=None)), request).frames, expected)
    fp8 = engine(ModelHandle(files(text_encoder=write("fp8_scaled_old"), tokenizer=None)), request).frames
    assert torch.isfinite(fp8).all() and not torch.equal(fp8, expected)


def test_a_folders_tokenizer_beside_a_file(
    tiny_checkpoint: Path, encoder: UMT5EncoderModel, files: Callable[..., ModelFiles], tmp_path: Path
) -> None:
    write_umt5_file(tmp_path / "bare.safetensors", encoder, None, "fp32")
    model = files(text_encoder=tmp_path / "bare.safetensors", tokenizer=tiny_checkpoint / "tokenizer")
    assert torch.equal(embeddings(model), embeddings(files()))
    with pytest.raises(CheckpointError, match="bare.safetensors has no tokenizer inside .the tensor spiece_model"):
        embeddings(replace(model, tokenizer=None))
    with pytest.raises(CheckpointError, match="a text encoder without a tokenizer beside it"):
        embeddings(files(tokenizer=None))


# ---- tokens


TEXTS = [
    *PROMPTS,
    "A   sailing  boat   drifts;  (slowly),  across -- a 'calm' lake... at 100%?!",
    " blanks before and behind ",
    "emoji 🐱🐱🏄‍♀️ and Ωмега, ünknown",
    "一只小船在平静的湖面上缓缓漂过，夕阳下的山。 mixed English",
    "The camera moves closer while the clouds pass over the mountains. " * 60,
    "静" * 511,
    "静" * 2000,
    "🐱",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens_are_the_folders(tiny_checkpoint: Path, spiece: bytes, text: str) -> None:
    options = {"padding": "max_length", "max_length": 512, "truncation": True, "return_attention_mask": True, "return_tensors": "pt"}
    expected = AutoTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")([text, "and"], add_special_tokens=True, **options)
    got = SentencePieceTokenizer(spiece)([text, "and"], add_special_tokens=True, **options)
    assert torch.equal(got.input_ids, expected.input_ids) and torch.equal(got.attention_mask, expected.attention_mask)
    assert got.input_ids.dtype == torch.int64 and got.input_ids.shape == (2, 512)


# ---- what is wrong with a file


def encoders() -> int:
    gc.collect()
    return sum(isinstance(found, UMT5EncoderModel) for found in gc.get_objects())


def breaks(file: Path, files: Callable[..., ModelFiles], words: str) -> None:
    """The error names the file, and nothing of the encoder stays in memory."""
    before = encoders()
    with pytest.raises(CheckpointError, match=file.name) as caught:
        embeddings(files(text_encoder=file, tokenizer=None))
    assert words in str(caught.value)
    del caught
    assert encoders() == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 9])
def test_a_file_that_is_none(files: Callable[..., ModelFiles], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.safetensors").write_bytes(content)
    breaks(tmp_path / "broken.safetensors", files, "Download it again")


def test_pickled_and_gguf_files(files: Callable[..., ModelFiles], tmp_path: Path) -> None:
    breaks(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", files, "which can run code")
    breaks(tmp_path / "umt5-xxl-encoder-Q8_0.gguf", files, "connect positive_conditioning")


def test_a_tokenizer_that_is_none(write: Callable[..., Path], files: Callable[..., ModelFiles], spiece: bytes) -> None:
    def put(content: bytes) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda tensors: tensors.update(spiece_model=torch.frombuffer(bytearray(content), dtype=torch.uint8))

    for content in (b"no model", spiece[:1000]):
        with pytest.raises(CheckpointError, match="The tokenizer inside umt5_fp16.safetensors could not be read"):
            embeddings(files(text_encoder=write("fp16", put(content)), tokenizer=None))
    small = make_text_encoder(100, torch.Generator().manual_seed(0))
    file = write("fp16")
    write_umt5_file(file, small, spiece, "fp16")
    with pytest.raises(CheckpointError, match="umt5_fp16.safetensors knows [0-9]+ tokens, its encoder 100"):
        embeddings(files(text_encoder=file, tokenizer=None))


def test_a_file_that_shrinks_after_it_was_checked(write: Callable[..., Path], files: Callable[..., ModelFiles]) -> None:
    file = write("fp16")
    source = open_text_encoder(files(text_encoder=file, tokenizer=None), narrow=False)
    file.write_bytes(file.read_bytes()[:-10_000])
    with pytest.raises(CheckpointError, match="umt5_fp16.safetensors"):
        source.load(None, lambda: None)
    file.unlink()
    with pytest.raises(CheckpointError, match="umt5_fp16.safetensors"):
        source.load(None, lambda: None)


def test_values_that_are_no_numbers(write: Callable[..., Path], files: Callable[..., ModelFiles]) -> None:
    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.block.0.layer.0.SelfAttention.q.scale_weight"].fill_(torch.inf)

    breaks(write("fp8_scaled_old", overflow), files, "no numbers (NaN or infinite)")


def test_cancel_while_it_is_read(write: Callable[..., Path], files: Callable[..., ModelFiles]) -> None:
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 10:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        open_text_encoder(files(text_encoder=write("bf16"), tokenizer=None), narrow=False).load(None, check)
