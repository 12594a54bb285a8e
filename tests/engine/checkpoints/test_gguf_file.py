"""GGUF headers: what the gguf package says of whole files, and our error for everything that can be wrong with one."""

import math
import random
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import tiny_single_files as forms
from wan_files import SMALL, i2v_expert
from wan_sharded.engine.checkpoints import gguf_file
from wan_sharded.engine.checkpoints.gguf_file import check_widenable, read_gguf_header, widenable_types
from wan_sharded.engine.checkpoints.single_file import open_expert_file
from wan_sharded.engine.checkpoints.stored import StoredTensor
from wan_sharded.engine.errors import CheckpointError, UnsupportedError

GGUF_TYPES = {kind.name: kind for kind in gguf.GGUFValueType}
F32, F16, Q8_0, Q4_K = 0, 1, 8, 12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "wan_high.gguf"


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(key: str, kind: str, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", GGUF_TYPES[kind]) + value


def array(kind: str, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", GGUF_TYPES[kind], count) + values


def tensor(name: str | bytes, dims: tuple[int, ...] = (32, 4), kind: int = F32, offset: int = 0) -> bytes:
    """An entry; ``dims`` in GGUF's order, [in, out]."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def whole(
    *tensors: bytes,
    fields: tuple[bytes, ...] = (),
    data: int = 4096,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """The bytes of a file."""
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(fields)))) + b"".join(fields) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment + data)


def test_the_hand_made_files_are_real_ones(path: Path) -> None:
    path.write_bytes(
        whole(tensor("a.weight"), tensor("b.weight", (256, 2), Q4_K, 512), fields=(field("general.name", "STRING", text("x")),))
    )
    assert_same_as_the_package(path)


def assert_same_as_the_package(path: Path) -> None:
    theirs = {one.name: one for one in gguf.GGUFReader(path).tensors}
    ours = read_gguf_header(path)
    assert ours.keys() == theirs.keys()
    for name, stored in ours.items():
        one = theirs[name]
        assert (stored.file, stored.key) == (path, name)
        assert stored.dtype in (one.tensor_type.name, f"GGUF:{one.tensor_type.name}")
        assert (stored.gguf_type is None) == (one.tensor_type.name in ("F32", "F16", "BF16"))
        assert stored.shape == tuple(int(size) for size in reversed(one.shape))
        assert (stored.offset, stored.size_bytes) == (one.data_offset, one.n_bytes)


@pytest.mark.parametrize("form", [form for form in forms.FORMS if form.startswith("gguf_")])
def test_files_as_people_have_them(tiny_single_files: Path, form: str) -> None:
    assert_same_as_the_package(tiny_single_files / forms.file_names(form)["transformer"])


@pytest.mark.parametrize("kind", sorted(gguf.GGML_QUANT_SIZES))
def test_every_type(path: Path, kind: Any) -> None:
    elements, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    path.write_bytes(whole(tensor("a", (3 * elements, 5), kind), data=15 * size_bytes))
    assert_same_as_the_package(path)
    path.write_bytes(whole(tensor("a", (3 * elements, 5), kind), data=15 * size_bytes - 1))
    assert "the file at" in refused(path), "the last byte is missing"


def test_what_can_be_widened() -> None:
    from diffusers.quantizers.gguf.utils import dequantize_functions

    assert widenable_types() == {kind.name for kind in dequantize_functions} - {"BF16"}
    assert widenable_types() >= {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}


@pytest.mark.parametrize("kind", [kind.name for kind in gguf.GGML_QUANT_SIZES])
def test_a_type_that_can_not_be_widened_is_named(path: Path, kind: str) -> None:
    plain = kind in ("F32", "F16", "BF16")
    tensors = {"blocks.0.attn1.to_q.weight": StoredTensor(path, "x", kind if plain else f"GGUF:{kind}", (256, 256), 0, 1)}
    if plain or kind in widenable_types():
        check_widenable("wan.gguf", tensors)
        return
    with pytest.raises(CheckpointError) as caught:
        check_widenable("wan.gguf", tensors)
    assert all(word in str(caught.value) for word in ("wan.gguf", "blocks.0.attn1.to_q.weight", f"type {kind}", "Q4_K_M"))


def write_expert(path: Path, kind: int, *, fields: tuple[bytes, ...] = (), **shapes: tuple[int, ...]) -> None:
    """An expert of zeros, the matrices of its blocks of a type, and other dims, in GGUF's order, for some tensors."""
    entries, offset = [], 0
    for name, (_, shape) in i2v_expert(**{**SMALL, "width": 256}).items():
        matrix = name.startswith("blocks.") and len(shape) == 2
        elements, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind if matrix else F32)]
        entries.append(tensor(name, shapes.get(name.replace(".", "_"), shape[::-1]), kind if matrix else F32, offset))
        offset += -(-math.prod(shape) // elements * size_bytes // 32) * 32
    path.write_bytes(whole(*entries, fields=fields, data=offset))


def test_an_expert_of_another_type(path: Path) -> None:
    write_expert(path, Q4_K)
    assert open_expert_file(path).stored_dtype == "GGUF:Q4_K"
    write_expert(path, gguf.GGMLQuantizationType.IQ2_XS)
    message = refused(path)
    assert "IQ2_XS" in message and "blocks.0.attn1.to_q.weight" in message and "Choose" in message


def test_sizes_of_one_that_llama_cpp_drops(path: Path) -> None:
    write_expert(path, Q8_0, blocks_1_modulation=(256, 6), head_modulation=(256, 2))
    tensors = open_expert_file(path).tensors
    assert read_gguf_header(path)["blocks.1.modulation"].shape == (6, 256)
    assert {tensors[name].shape for name in ("blocks.0.scale_shift_table", "blocks.1.scale_shift_table")} == {(1, 6, 256)}
    assert tensors["scale_shift_table"].shape == (1, 2, 256)


PATCH = (256, 36, 1, 2, 2)


def kept_shape(name: str, *shape: int, kind: str = "INT32") -> bytes:
    values = struct.pack(f"<{len(shape)}{'i' if kind == 'INT32' else 'q'}", *shape)
    return field(f"comfy.gguf.orig_shape.{name}", "ARRAY", array(kind, len(shape), values))


def test_shapes_that_comfyui_gguf_keeps(path: Path) -> None:
    write_expert(path, Q8_0, patch_embedding_weight=(math.prod(PATCH[1:]), 256), fields=(kept_shape("patch_embedding.weight", *PATCH),))
    assert open_expert_file(path).tensors["patch_embedding.weight"].shape == PATCH
    write_expert(path, Q8_0, patch_embedding_weight=(math.prod(PATCH[1:]), 256))
    assert "five sizes" in refused(path), "no one knows the shape"


def test_the_package_is_not_installed(path: Path, monkeypatch: pytest.MonkeyPatch, no_cache: None) -> None:
    path.write_bytes(whole())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match="pip install gguf"):
        open_expert_file(path)


@pytest.fixture
def no_cache() -> Iterator[None]:
    gguf_file._types.cache_clear()
    yield
    gguf_file._types.cache_clear()


def test_alignment_and_versions(path: Path) -> None:
    aligned = field("general.alignment", "UINT32", struct.pack("<I", 256))
    path.write_bytes(whole(tensor("a"), tensor("b", offset=512), fields=(aligned,), alignment=256, version=2))
    assert read_gguf_header(path)["a"].offset % 256 == 0
    assert_same_as_the_package(path)


def test_fields_of_all_kinds_are_passed_over(path: Path) -> None:
    sizes = {"UINT8": 1, "INT8": 1, "UINT16": 2, "INT16": 2, "UINT32": 4, "INT32": 4, "FLOAT32": 4, "BOOL": 1, "UINT64": 8, "INT64": 8}
    fields = [field(f"a.{kind}", kind, b"\1" * size) for kind, size in sizes.items()]
    fields += [field(f"b.{kind}", "ARRAY", array(kind, 3, b"\1" * (3 * size))) for kind, size in sizes.items()]
    fields += [
        field("c", "FLOAT64", b"\0" * 8),
        field("d", "STRING", text("words")),
        field("e", "ARRAY", array("STRING", 2, text("a") + text(""))),
    ]
    path.write_bytes(whole(tensor("a"), fields=tuple(fields)))
    assert_same_as_the_package(path)


def refused(path: Path, read: Callable[[Path], object] = open_expert_file) -> str:
    """The message; it names the file and says what to do."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert path.name in message
    assert any(word in message for word in ("ownload", "Choose", "Check")), message
    return message


HUGE = 2**63
# What is wrong -> the words that say so, and the file.
DAMAGE: dict[str, tuple[str, bytes]] = {
    "no bytes": ("ends within its header", b""),
    "the magic alone": ("ends within its header", b"GGUF"),
    "another magic": ("does not begin with GGUF", whole(magic=b"GGML")),
    "version 1": ("of version 1", whole(version=1)),
    "version 4": ("of version 4", whole(version=4)),
    "big-endian": ("is big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0)),
    "an absurd number of tensors": ("claims 9223372036854775808 tensors", whole(counts=(HUGE, 0))),
    "an absurd number of fields": ("9223372036854775808 fields", whole(counts=(0, HUGE))),
    "more tensors than there are": ("two tensors of one name", whole(tensor("a"), counts=(9, 0))),
    "more fields than there are": ("bytes long", whole(tensor("a"), counts=(1, 40))),
    "an absurd name": ("bytes long", whole(struct.pack("<Q", HUGE) + b"a")),
    "a long name": ("1025 bytes long", whole(tensor("a" * 1025))),
    "a name that is no text": ("no text", whole(tensor(b"\xff\xfe"))),
    "two tensors of one name": ("two tensors of one name", whole(tensor("a"), tensor("a", offset=512))),
    "too many dimensions": ("9 dimensions", whole(tensor("a", (1,) * 9))),
    "an absurd number of dimensions": ("4294967295 dimensions", whole(text("a") + struct.pack("<I", 2**32 - 1))),
    "an absurd size": ("the file at", whole(tensor("a", (HUGE, HUGE)))),
    "sizes whose product is small in 64 bits": ("the file at", whole(tensor("a", (2**32, 2**32)))),
    "an unknown type": ("the type 77", whole(tensor("a", kind=77))),
    "an absurd type": ("the type 4294967295", whole(tensor("a", kind=2**32 - 1))),
    "a type that was removed": ("the type 4,", whole(tensor("a", kind=4))),
    "rows that don't fill blocks": ("blocks of Q8_0", whole(tensor("a", (33, 32), Q8_0))),
    "one number of a quantized type": ("blocks of Q8_0", whole(tensor("a", (), Q8_0))),
    "an absurd offset": ("the file at", whole(tensor("a", offset=HUGE))),
    "an offset just outside": ("end at byte 4193, the file at 4192", whole(tensor("a", offset=4096 - 511))),
    "tensors that overlap": ("b shares bytes", whole(tensor("a"), tensor("b", offset=480))),
    "the same bytes twice": ("shares bytes", whole(tensor("a"), tensor("b"))),
    "no data": ("the file at", whole(tensor("a"), data=0)),
    "an unknown kind of field": ("unknown type 99", whole(tensor("a"), fields=(text("x") + struct.pack("<I", 99),))),
    "an absurd text": ("ends within its header", whole(tensor("a"), fields=(field("x", "STRING", struct.pack("<Q", HUGE)),))),
    "an absurd array": ("ends within its header", whole(tensor("a"), fields=(field("x", "ARRAY", array("UINT8", HUGE, b"")),))),
    "an array with an absurd size in bytes": (
        "ends within its header",
        whole(tensor("a"), fields=(field("x", "ARRAY", array("UINT64", 2**61 + 1, b"")),)),
    ),
    "an absurd array of texts": ("more than 1000000 texts", whole(tensor("a"), fields=(field("x", "ARRAY", array("STRING", HUGE, b"")),))),
    "arrays within arrays": (
        "unknown type 9",
        whole(tensor("a"), fields=(field("x", "ARRAY", array("ARRAY", 1, array("UINT8", 1, b"\0"))),)),
    ),
    "an alignment that is no number": (
        "general.alignment is no number",
        whole(tensor("a"), fields=(field("general.alignment", "STRING", text("32")),)),
    ),
    **{
        f"an alignment of {value}": (
            f"general.alignment is {value}",
            whole(tensor("a"), fields=(field("general.alignment", "UINT32", struct.pack("<I", value)),)),
        )
        for value in (0, 3, 2**21, 2**32 - 1)
    },
    "a kept shape of another size": ("both [4, 32] and [4, 33]", whole(tensor("a"), fields=(kept_shape("a", 4, 33),))),
    "a kept shape with minus signs": ("both [4, 32] and [-4, -32]", whole(tensor("a"), fields=(kept_shape("a", -4, -32),))),
    "a kept shape of zeros": ("both [4, 32] and [0, 0]", whole(tensor("a"), fields=(kept_shape("a", 0, 0),))),
    "a kept shape without numbers": ("both [4, 32] and []", whole(tensor("a"), fields=(kept_shape("a"),))),
    "a kept shape of long numbers": ("no shape", whole(tensor("a"), fields=(kept_shape("a", 4, 32, kind="INT64"),))),
    "a kept shape of very many numbers": ("no shape", whole(tensor("a"), fields=(kept_shape("a", *[1] * 9),))),
    "a kept shape whose rows don't fill blocks": ("blocks of Q8_0", whole(tensor("a", (32, 4), Q8_0), fields=(kept_shape("a", 32, 4),))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(path: Path, damage: str) -> None:
    words, data = DAMAGE[damage]
    path.write_bytes(data)
    message = refused(path)
    assert "is no whole GGUF file" in message and words in message


def test_many_arrays_of_texts_are_counted_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passing over each takes a moment, so all of a file's together must not take long."""
    monkeypatch.setattr(gguf_file, "MAX_TEXTS", 5)
    path.write_bytes(whole(tensor("a"), fields=(field("x", "ARRAY", array("STRING", 3, text("") * 3)),)))
    assert read_gguf_header(path)
    path.write_bytes(whole(tensor("a"), fields=(field("x", "ARRAY", array("STRING", 3, text("") * 3)),) * 2))
    assert "more than 5 texts" in refused(path)


def test_what_the_damaged_files_are_made_of_is_whole(path: Path) -> None:
    """So it is the damage that is refused."""
    fields = (kept_shape("a", 2, 64), field("x", "ARRAY", array("STRING", 1, text("a"))))
    path.write_bytes(whole(tensor("a"), tensor("b", offset=512), tensor("c", offset=4096 - 512), fields=fields))
    assert {name: stored.shape for name, stored in read_gguf_header(path).items()} == {"a": (2, 64), "b": (4, 32), "c": (4, 32)}


def test_no_header_can_be_cut_short(path: Path) -> None:
    complete = whole(
        tensor("a"),
        tensor("b", offset=512),
        fields=(kept_shape("a", 4, 32), field("x", "ARRAY", array("STRING", 2, text("ab") * 2))),
        data=1024,
    )
    for length in range(len(complete)):
        path.write_bytes(complete[:length])
        refused(path, read_gguf_header)
    path.write_bytes(complete)
    assert len(read_gguf_header(path)) == 2


def test_random_damage(path: Path) -> None:
    """Whatever happens to the bytes: a description that fits the file, or our error."""
    fields = (kept_shape("a", 4, 32), field("x", "ARRAY", array("STRING", 2, text("ab") * 2)), field("y", "UINT32", b"abcd"))
    complete = whole(tensor("a"), tensor("b", (256, 2), Q4_K, 512), tensor("c", (32, 4), F16, 1024), fields=fields, data=1280)
    header = len(complete) - 1280
    dice = random.Random(0)
    read = 0
    for _ in range(800):
        damaged = bytearray(complete)
        for _ in range(dice.choice([1, 1, 2, 8])):
            damaged[dice.randrange(4, header)] = dice.choice([0, 1, 8, 9, 127, 128, 255, dice.randrange(256)])
        path.write_bytes(damaged)
        try:
            tensors = read_gguf_header(path)
        except CheckpointError:
            continue
        read += 1
        assert all(stored.offset + stored.size_bytes <= len(complete) and stored.size_bytes >= 0 for stored in tensors.values())
    assert 30 < read < 770


def test_other_models_are_named_before_their_types_matter(path: Path) -> None:
    names = ("enc.blk.0.attn_q.weight", "enc.blk.1.attn_rel_b.weight", "token_embd.weight")
    path.write_bytes(whole(*(tensor(name, (256, 1), gguf.GGMLQuantizationType.IQ1_S, 64 * n) for n, name in enumerate(names))))
    assert "is a UMT5 text encoder" in refused(path)


def test_unreadable_files(path: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refused(path, read_gguf_header)
    assert "cannot be read" in refused(tmp_path, read_gguf_header)


def test_the_scripts_blocks_have_the_size_of_weights(tmp_path: Path) -> None:
    """For every type that can be widened, so that tests may compute with any of them."""
    values = numpy.random.default_rng(0).standard_normal((4, 512)).astype(numpy.float32) / math.sqrt(512)
    for name in sorted(widenable_types()):
        kind = gguf.GGMLQuantizationType[name]
        known = name in forms.K_QUANTS
        data = forms._k_quantized(values, kind, numpy.random.default_rng(0)) if known else gguf.quants.quantize(values, kind)
        widened = gguf.quants.dequantize(data, kind)
        assert widened.shape == values.shape
        assert 0.7 < widened.std() / values.std() < 1.4, name
        assert abs(widened.mean()) < 0.3 * values.std(), name
