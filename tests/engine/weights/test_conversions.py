"""What is converted on its way from a file: read with what else, waited for when, and never taken for done before it is."""

import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from expert_reference import in_use
from safetensors.torch import load_file, save_file
from tiny_single_files import file_names
from wan_sharded.engine.checkpoints.single_file import open_expert_file
from wan_sharded.engine.checkpoints.stored import StoredTensor
from wan_sharded.engine.weights import keeping, pieces
from wan_sharded.engine.weights.expert import CPU, Expert
from wan_sharded.engine.weights.precision import Precision
from wan_sharded.engine.weights.reading import Reading, TensorReader

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
PROJECTION = "blocks.1.attn1.to_q"
BLOCKS = ("blocks.0", "blocks.1")


def file_of(folder: Path, form: str) -> Path:
    return folder / file_names(form)["transformer"]


@pytest.fixture
def expert(tiny_single_files: Path) -> Expert:
    """Of a file whose scales stand beside its matrices."""
    return Expert("high noise expert", open_expert_file(file_of(tiny_single_files, "fp8_scaled_old")), Precision(BF16, BF16, "F8_E4M3"))


@pytest.fixture
def slow_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing has been read when it is looked at for the first time."""
    read_at = pieces.read_at

    def slow(file: object, rest: memoryview, offset: int) -> None:
        time.sleep(0.02)
        read_at(file, rest, offset)

    monkeypatch.setattr(pieces, "read_at", slow)


def bring_later(expert: Expert, part: str) -> None:
    expert.bring(part, CPU, CPU, packed=True, later=True)


def bring_unconverted(expert: Expert, part: str) -> None:
    """It has been read when this returns, but not before."""
    held, read_at = threading.Event(), pieces.read_at

    def slow(file: object, rest: memoryview, offset: int) -> None:
        assert held.wait(timeout=30)
        read_at(file, rest, offset)

    with mock.patch.object(pieces, "read_at", slow):
        bring_later(expert, part)
        held.set()
        expert._keeper.reader.finish()


def scales_of(expert: Expert, part: str) -> torch.Tensor:
    return expert.block_weights(part)["attn1.to_q.weight_scale"]


def assert_scales_are_right(expert: Expert, tiny_single_files: Path, parts: tuple[str, ...] = BLOCKS) -> None:
    stored = load_file(file_of(tiny_single_files, "fp8_scaled_old"))
    for part in parts:
        assert (scales_of(expert, part) == stored[f"{part}.self_attn.q.scale_weight"]).all(), part


def test_much_that_is_converted_is_read_first(expert: Expert, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for, while the rest arrives."""
    monkeypatch.setattr(keeping, "WAITING_BYTES", 1)
    asked: list[tuple[bool, str]] = []
    begin = TensorReader.begin

    def watched(reader: TensorReader, wanted: list[tuple[StoredTensor, torch.Tensor]], *, urgent: bool = False) -> Reading:
        asked.extend((urgent, stored.key) for stored, _ in wanted)
        return begin(reader, wanted, urgent=urgent)

    monkeypatch.setattr(TensorReader, "begin", watched)
    expert.bring("blocks.1", CPU, CPU, packed=True)
    urgent = {is_urgent: {key for also, key in asked if also == is_urgent} for is_urgent in (True, False)}
    assert "blocks.1.self_attn.q.weight" in urgent[False]
    assert "blocks.1.self_attn.q.scale_weight" in urgent[True] and not any("scale_weight" in key for key in urgent[False])


def test_a_failed_conversion_leaves_nothing_to_be_read(expert: Expert, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread would write into memory that is let go. Where it is much, and so read first."""
    monkeypatch.setattr(keeping, "WAITING_BYTES", 1)
    held, read_at = threading.Event(), pieces.read_at

    def slow(file: object, rest: memoryview, offset: int) -> None:
        if rest.nbytes > 1000:  # no scale
            held.wait(timeout=0.2)
        read_at(file, rest, offset)

    def fails(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 2048)
        patch.setattr(pieces, "read_at", slow)
        patch.setattr(keeping, "_kept_scales", fails)
        with pytest.raises(MemoryError, match="no room"):
            expert.bring("blocks.1", CPU, CPU, packed=True)
        assert expert._keeper.reader._under_way == []
    expert.bring("blocks.1", CPU, CPU, packed=True)
    assert torch.isfinite(in_use(expert, F32)[f"{PROJECTION}.weight"]).all()


def test_little_that_is_converted_is_read_along_and_waits(tiny_single_files: Path, expert: Expert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is there: what is asked for later is begun before it is waited for. But not longer than it must."""
    held, read_at, asked = threading.Event(), pieces.read_at, []
    begin = TensorReader.begin

    def slow(file: object, rest: memoryview, offset: int) -> None:
        assert held.wait(timeout=30)
        read_at(file, rest, offset)

    def watched(reader: TensorReader, wanted: list[tuple[StoredTensor, torch.Tensor]], *, urgent: bool = False) -> Reading:
        asked.append({stored.key for stored, _ in wanted})
        return begin(reader, wanted, urgent=urgent)

    monkeypatch.setattr(pieces, "read_at", slow)
    monkeypatch.setattr(TensorReader, "begin", watched)
    for part in BLOCKS:
        bring_later(expert, part)
    assert len(asked) == 2 and all({f"blocks.{i}.self_attn.q.weight", f"blocks.{i}.self_attn.q.scale_weight"} <= asked[i] for i in (0, 1))
    assert len(expert._keeper._waiting) == 2
    held.set()
    expert._keeper.reader.finish()
    bring_later(expert, "proj_out")
    assert len(expert._keeper._waiting) <= 1, "what has arrived is converted with the next"
    expert.arrived()
    assert_scales_are_right(expert, tiny_single_files)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.usefixtures("slow_reading")
def test_scales_of_a_file_without_any_are_made_though_nothing_is_read_for_them(
    tiny_single_files: Path, tmp_path: Path, later: bool
) -> None:
    """In such a file, where everything else is as it is kept, nothing that is converted has a byte to wait for."""
    stored = load_file(file_of(tiny_single_files, "fp8"))
    save_file({name: tensor if tensor.dtype == FP8 else tensor.float() for name, tensor in stored.items()}, tmp_path / "a.safetensors")
    expert = Expert("high noise expert", open_expert_file(tmp_path / "a.safetensors"), Precision(F32, F32, "F8_E4M3"))
    for part in BLOCKS:
        expert.bring(part, CPU, CPU, packed=True, later=later)
        if later:
            expert.arrived()
        assert torch.equal(scales_of(expert, part), torch.ones_like(scales_of(expert, part))), part


def test_what_is_kept_as_it_is_does_not_wait_to_be_converted(tiny_single_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it read again after a load that ended early."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2048)  # a single one would be read at once
    expert = Expert("high noise expert", open_expert_file(file_of(tiny_single_files, "original_fp32")), Precision(F32, F32))
    bring_unconverted(expert, "blocks.1")
    assert not expert._keeper._waiting
    expert.drop_arriving()
    assert expert.packed("blocks.1") is not None


@pytest.mark.usefixtures("slow_reading")
@pytest.mark.parametrize(("blocks", "waiting"), [(0.5, 0), (1.5, 1), (2.5, 2)])
def test_not_much_to_be_converted_waits_in_memory(
    tiny_single_files: Path, expert: Expert, monkeypatch: pytest.MonkeyPatch, blocks: float, waiting: int
) -> None:
    """Of all parts together."""
    bring_unconverted(expert, "blocks.1")
    size = expert._keeper._waiting[0].raw_bytes
    expert.drop_arriving()
    monkeypatch.setattr(keeping, "WAITING_BYTES", int(blocks * size))
    for part in BLOCKS:
        bring_later(expert, part)
    assert len(expert._keeper._waiting) == waiting
    expert.arrived()
    assert_scales_are_right(expert, tiny_single_files)


def test_what_has_not_been_converted_is_forgotten_with_what_has_not_arrived(tiny_single_files: Path, expert: Expert) -> None:
    """Its bytes are all there, but its scales are nothing."""
    for part in BLOCKS:
        bring_unconverted(expert, part)
    expert.drop_arriving()
    assert expert.packed("blocks.1") is None and expert.packed("blocks.0") is not None
    for part in BLOCKS:
        bring_later(expert, part)
    expert.arrived()
    assert_scales_are_right(expert, tiny_single_files)


@pytest.mark.parametrize("met", ["with the next", "at the end"])
def test_a_conversion_that_fails_later_loses_only_what_is_not_there(
    tiny_single_files: Path, expert: Expert, monkeypatch: pytest.MonkeyPatch, met: str
) -> None:

    def fails(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        bring_unconverted(expert, "blocks.0")
        if met == "at the end":
            bring_unconverted(expert, "blocks.1")
        patch.setattr(keeping, "_kept_scales", fails)
        with pytest.raises(MemoryError, match="no room"):
            expert.arrived() if met == "at the end" else bring_later(expert, "blocks.1")
        expert.drop_arriving()
    kept = [part for part in ("blocks.0", "blocks.1") if expert.packed(part) is not None]
    assert kept == (["blocks.0"] if met == "at the end" else [])
    for part in BLOCKS:
        bring_later(expert, part)
    expert.arrived()
    assert_scales_are_right(expert, tiny_single_files)


@pytest.mark.usefixtures("slow_reading")
def test_what_was_let_go_is_not_in_the_way_of_the_next_load(
    tiny_single_files: Path, expert: Expert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2048)  # so that some have not begun
    for part in BLOCKS:
        bring_later(expert, part)
    expert.drop_arriving()
    assert expert.packed("blocks.0") is None and expert.packed("blocks.1") is None
    monkeypatch.undo()
    for part in BLOCKS:
        bring_later(expert, part)
    expert.arrived()
    assert_scales_are_right(expert, tiny_single_files)


class Large:
    """A bf16 file that is quantized as it is read, each matrix a batch: what is asked for, and converted, in which order."""

    def __init__(self, tiny_single_files: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(keeping, "WAITING_BYTES", 1000)
        monkeypatch.setattr(keeping, "BATCH_BYTES", 1)
        size = load_file(file_of(tiny_single_files, "original_bf16"))["blocks.1.self_attn.q.weight"].nbytes
        self.matrix_bytes = size
        monkeypatch.setattr(pieces, "PIECE_BYTES", size // 2)  # a single one would be read at once
        self.expert = Expert(
            "high noise expert", open_expert_file(file_of(tiny_single_files, "original_bf16")), Precision(BF16, torch.int8)
        )
        self.happened: list[str] = []
        self.most_bytes = 0
        begin, convert = TensorReader.begin, keeping._Batch.convert

        def watched(reader: TensorReader, wanted: list[tuple[StoredTensor, torch.Tensor]], *, urgent: bool = False) -> Reading:
            self.happened.extend(f"begin {stored.key}" for stored, _ in wanted if urgent)
            under_way = sum(batch.raw_bytes for batch in self.expert._keeper._large)
            self.most_bytes = max(self.most_bytes, under_way + sum(stored.size_bytes for stored, _ in wanted if urgent))
            return begin(reader, wanted, urgent=urgent)

        def converted(batch: keeping._Batch) -> None:
            self.happened.extend(f"convert {stored.key}" for stored in batch.raws if batch.raw_bytes > keeping.WAITING_BYTES)
            convert(batch)

        monkeypatch.setattr(TensorReader, "begin", watched)
        monkeypatch.setattr(keeping._Batch, "convert", converted)


@pytest.mark.usefixtures("slow_reading")
@pytest.mark.parametrize("beside", [0, 1, 2])  # 0: each is converted before the next is begun
def test_what_is_large_is_read_while_what_was_read_before_is_converted(
    tiny_single_files: Path, monkeypatch: pytest.MonkeyPatch, beside: int
) -> None:
    large = Large(tiny_single_files, monkeypatch)
    monkeypatch.setattr(keeping, "LARGE_BYTES", beside * large.matrix_bytes)
    large.expert.bring("blocks.1", CPU, CPU, packed=True)
    begun = [what.removeprefix("begin ") for what in large.happened if what.startswith("begin")]
    assert [what.removeprefix("convert ") for what in large.happened if what.startswith("convert")] == begun and len(begun) > 8
    compared = 0
    for number, key in enumerate(begun):
        others = begun[number : number + beside + 2]
        if len(others) == beside + 2 and all("_attn." in other and other.endswith(".weight") for other in others):  # of one size
            compared += 1
            at = large.happened.index(f"convert {key}")
            assert large.happened.index(f"begin {others[-2]}") < at < large.happened.index(f"begin {others[-1]}"), key
    assert compared > 1
    assert large.most_bytes <= (beside + 1) * large.matrix_bytes + large.matrix_bytes, "a matrix of the feed-forward is twice as large"
    assert not large.expert._keeper._large
    held = in_use(large.expert, F32)
    stored = load_file(file_of(tiny_single_files, "original_bf16"))["blocks.1.self_attn.q.weight"].float()
    assert (held[f"{PROJECTION}.weight"] - stored).abs().max() < stored.abs().max() / 100


@pytest.mark.usefixtures("slow_reading")
def test_what_is_large_and_was_read_is_not_kept_for_others(tiny_single_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes memory beside all that arrives."""
    large = Large(tiny_single_files, monkeypatch)
    bring_later(large.expert, "blocks.0")
    large.expert._keeper.reader.finish()
    before = list(large.expert._keeper._large)
    assert before
    bring_later(large.expert, "patch_embedding")
    assert not large.expert._keeper._large
    bring_later(large.expert, "blocks.1")
    assert large.expert._keeper._large
    large.expert.drop_arriving()
    assert not large.expert._keeper._large and large.expert.packed("blocks.1") is None


@pytest.mark.usefixtures("slow_reading")
@pytest.mark.parametrize("refused", [1, 2])
def test_where_no_more_is_to_be_had_what_waits_is_converted_first(
    tiny_single_files: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    """It takes no more memory than before then, and less than that is an error."""
    large, rooms, refusals = Large(tiny_single_files, monkeypatch), keeping._rooms_for, []

    def refuses(sources: list[StoredTensor], device: torch.device) -> tuple[dict[StoredTensor, torch.Tensor], list[keeping.ToRead]]:
        if len(large.expert._keeper._large) >= 3 or (refusals and len(refusals) < refused):
            refusals.append(len(large.expert._keeper._large))
            raise torch.OutOfMemoryError("no room")
        return rooms(sources, device)

    monkeypatch.setattr(keeping, "_rooms_for", refuses)
    if refused == 2:
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            large.expert.bring("blocks.1", CPU, CPU, packed=True)
        assert refusals == [3, 0] and not large.expert._keeper._large
        return
    large.expert.bring("blocks.1", CPU, CPU, packed=True)
    assert refusals and set(refusals) == {3}
    stored = load_file(file_of(tiny_single_files, "original_bf16"))["blocks.1.ffn.0.weight"].float()
    held = in_use(large.expert, F32)["blocks.1.ffn.net.0.proj.weight"]
    assert (held - stored).abs().max() < stored.abs().max() / 100


@pytest.mark.usefixtures("slow_reading")
def test_what_waits_is_forgotten_with_a_conversion_that_failed(tiny_single_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a part comes into another's memory, after which nobody closes what reads."""
    large = Large(tiny_single_files, monkeypatch)
    flat = torch.empty(large.expert.part_bytes("blocks.1"), dtype=torch.uint8)

    def fails(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "quantized_rows", fails)
        with pytest.raises(MemoryError, match="no room"):
            large.expert.bring_into("blocks.1", flat, CPU)
    assert not large.expert._keeper._large and not large.expert._keeper._waiting
    large.expert.bring_into("blocks.1", flat, CPU)
    assert torch.isfinite(in_use(large.expert, F32)[f"{PROJECTION}.weight"]).all()
