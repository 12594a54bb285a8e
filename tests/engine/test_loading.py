"""What is got ready ahead while experts are loaded, and in which order they are. On imagined GPUs; that it is faster is for benchmarks/loading.py."""

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_bench import Bench
from imagined_machine import TinyExpert, imagined_machine, machine
from wan_sharded.engine import host_memory, open_model
from wan_sharded.engine import loaded as loaded_module
from wan_sharded.engine.errors import CheckpointError, InvalidRequestError, PlacementError
from wan_sharded.engine.host_pool import HostPool
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.planning.devices import GIB, DeviceInfo
from wan_sharded.engine.planning.footprint import VideoShape
from wan_sharded.engine.planning.placement import HOST, Placement
from wan_sharded.engine.system_memory import SystemMemory, system_memory
from wan_sharded.engine.weights import pieces, reading
from wan_sharded.engine.weights.expert import CPU, NOWHERE, Expert
from wan_sharded.engine.weights.reading import TensorReader

AHEAD = "wan-sharded-memory"
SHAPE = VideoShape(64, 48, 5)


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Kept as it is, with the weight_dtype that is asked for here."""
    return make_checkpoint(num_blocks=6)


@pytest.fixture
def converted(make_checkpoint: Callable[..., Path]) -> Path:
    """Kept as something else."""
    return make_checkpoint(num_blocks=6, dtype=torch.bfloat16)


def on_host(expert: Expert, part: str) -> torch.Tensor | None:
    """A part's one piece of memory, where it is system memory."""
    packed = expert.packed(part)
    return packed.flat if packed is not None and packed.flat.device == CPU else None


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that made memory on the host."""
    found: list[str] = []
    host_buffer = host_memory.host_buffer

    def watched(size: int) -> torch.Tensor:
        found.append(threading.current_thread().name)
        return host_buffer(size)

    monkeypatch.setattr(host_memory, "host_buffer", watched)
    return found


@pytest.mark.parametrize("in_comfyui", [False, True])
def test_a_blocks_memory_on_the_host_is_made_while_the_one_before_is_read(
    bench: Callable[..., Bench], converted: Path, makers: list[str], in_comfyui: bool
) -> None:
    """Also under inference mode, as ComfyUI runs everything: it does not hold in other threads."""
    with torch.inference_mode(in_comfyui):
        made_while_read(bench(), converted, makers)


def made_while_read(one: Bench, converted: Path, makers: list[str]) -> None:
    expected = one.run(open_model(converted, weight_dtype="fp32", execution="parallel")).frames
    one.owner.release()
    assert makers == []
    handle = open_model(converted, weight_dtype="fp32", execution="parallel", offload="cpu")
    assert torch.equal(one.run(handle).frames, expected)
    # Of each expert the first block's by the one who reads.
    here = threading.current_thread().name
    assert makers == [here, *[AHEAD] * 5] * 2
    assert torch.equal(one.run(handle).frames, expected)
    assert len(makers) == 12, "all stand there already"


def test_what_stands_there_already_is_not_made_again(bench: Callable[..., Bench], converted: Path, makers: list[str]) -> None:
    """Some blocks were dropped, as where system memory was short."""
    one = bench()
    handle = open_model(converted, weight_dtype="fp32", execution="parallel", offload="cpu")
    expected = one.run(handle).frames
    model = one.owner.loaded
    assert model is not None
    for block in (1, 2, 4):
        model._undispatch("transformer")
        model.experts["transformer"].drop(f"blocks.{block}")
    model._host_pool.clear()
    makers.clear()
    assert torch.equal(one.run(handle).frames, expected)
    here = threading.current_thread().name
    assert makers == [here, AHEAD, here]


def test_a_cancel_leaves_nothing_that_was_made_ahead(
    bench: Callable[..., Bench], converted: Path, makers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bench()
    handle = open_model(converted, weight_dtype="fp32", execution="parallel", offload="cpu")
    pools: list[HostPool] = []
    take = HostPool.take

    def cancelled(pool: HostPool, size: int, *, locked: bool) -> torch.Tensor:
        pools.append(pool)
        if len(pools) == 3:
            raise KeyboardInterrupt
        return take(pool, size, locked=locked)

    with monkeypatch.context() as patch:
        patch.setattr(HostPool, "take", cancelled)
        with pytest.raises(KeyboardInterrupt):
            one.run(handle)
    assert AHEAD in makers and pools[0]._ahead is None
    assert torch.isfinite(one.run(handle).frames).all()


@pytest.mark.parametrize("kept", ["as it is", "as it is, taken when it is read", "converted"])
@pytest.mark.parametrize("room", [1.5, 2.5, 4.0])
def test_no_more_is_made_than_the_system_has_room_for(
    bench: Callable[..., Bench], checkpoint: Path, converted: Path, monkeypatch: pytest.MonkeyPatch, room: float, kept: str
) -> None:
    """Blocks beyond that are mapped, or loose; what was made is used, and nothing less. The second expert's take the first one's place, where
    those can't be read as they are."""
    one, is_converted = bench(), kept == "converted"
    handle = open_model(converted if is_converted else checkpoint, weight_dtype="fp32", execution="parallel", offload="cpu")
    made: list[weakref.ref[torch.Tensor]] = []
    read_bytes: list[int] = []
    maker = "host_buffer" if is_converted else "unlocked_buffer"
    make, read_at = getattr(host_memory, maker), pieces.read_at

    def counted(size: int) -> torch.Tensor:
        buffer = make(size)
        made.append(weakref.ref(buffer))
        return buffer

    def slow(file: object, rest: memoryview, offset: int) -> None:
        time.sleep(0.01)
        address, begins = np.frombuffer(rest, np.uint8).ctypes.data, [(buffer.data_ptr(), buffer.numel()) for buffer in live()]
        read_at(file, rest, offset)
        if any(begin <= address < begin + size for begin, size in begins):
            read_bytes.append(rest.nbytes)

    def live() -> list[torch.Tensor]:
        return [buffer for memory in made if (buffer := memory()) is not None]

    def live_bytes() -> int:
        return sum(buffer.numel() for buffer in live())

    monkeypatch.setattr(host_memory, maker, counted)
    monkeypatch.setattr(pieces, "read_at", slow)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64 * 1024)
    expert = TinyExpert(checkpoint)

    def memory() -> SystemMemory:
        plan = one.owner.loaded.plan if one.owner.loaded is not None else None
        reserved = plan.reserve.host_bytes + plan.frames_bytes if plan is not None else 0
        taken = sum(read_bytes) if kept == "as it is, taken when it is read" else live_bytes()
        return replace(system_memory(), available=reserved + int(room * expert.block_bytes) - taken)

    monkeypatch.setattr(loaded_module, "system_memory", memory)
    assert torch.isfinite(one.run(handle).frames).all()
    assert len(made) == int(room) * (2 if is_converted else 1)
    model = one.owner.loaded
    assert model is not None
    used = {part: sum(on_host(expert, name) is not None for name in expert.parts) for part, expert in model.experts.items()}
    stays = ("transformer_2", "transformer") if is_converted else ("transformer", "transformer_2")
    assert [used[part] for part in stays] == [int(room), 0], "all that was made is used"
    assert live_bytes() == int(room) * expert.block_bytes


def test_what_leaves_a_gpu_goes_to_its_file_where_the_system_has_no_room(
    bench: Callable[..., Bench], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has it as it is kept."""
    one = bench()
    expected = one.run(open_model(checkpoint, weight_dtype="fp32", execution="parallel")).frames
    model = one.owner.loaded
    assert model is not None and sum(on_host(expert, name) is not None for expert in model.experts.values() for name in expert.parts) == 0
    monkeypatch.setattr(loaded_module, "system_memory", lambda: SystemMemory(64 * GIB, 0))
    taken: list[int] = []
    take = HostPool.take
    monkeypatch.setattr(HostPool, "take", lambda pool, size, **options: taken.append(size) or take(pool, size, **options))
    assert torch.equal(one.run(open_model(checkpoint, weight_dtype="fp32", execution="parallel", offload="cpu")).frames, expected)
    assert one.owner.loaded is model and taken == []
    assert all(expert.location(f"blocks.{i}") == CPU for expert in model.experts.values() for i in range(6))


@pytest.mark.parametrize("needed_for", ["the other expert", "frames"])
def test_memory_that_waits_unused_goes_before_any_weights(
    bench: Callable[..., Bench], converted: Path, monkeypatch: pytest.MonkeyPatch, needed_for: str
) -> None:
    one = bench()
    one.run(open_model(converted, weight_dtype="int8", execution="parallel", offload="cpu"))
    model = one.owner.loaded
    assert model is not None
    plan, pool, size = model.planned(), model._host_pool, model.experts["transformer"].part_bytes("blocks.0")
    model.experts["transformer"].drop("blocks.0")
    unused, waiting = pool.unused_bytes, model.host_memory_bytes()
    assert unused >= size
    kept = plan.frames_bytes + (plan.reserve.host_bytes if needed_for == "the other expert" else plan.reserve.host_bytes // 2 - size)
    monkeypatch.setattr(loaded_module, "system_memory", lambda: SystemMemory(64 * GIB, kept + size // 2 + unused - pool.unused_bytes))
    if needed_for == "frames":
        model.make_room_for_frames()
    else:
        model._make_room_on_host("transformer", "blocks.0")
    assert model.host_memory_bytes() == waiting and pool.unused_bytes == 0


# ---- locked behind what is read


def test_what_is_read_in_place_is_locked_when_all_of_it_is_there(
    bench: Callable[..., Bench], checkpoint: Path, makers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread: whoever reads goes on. And all is, before anything computes."""
    one = bench()
    handle = open_model(checkpoint, weight_dtype="fp32", execution="parallel", offload="cpu")
    expected = one.run(handle).frames
    one.owner.release()
    there: dict[int, torch.Tensor] = {}
    lockers: set[str] = set()
    lock_filled, read_at = host_memory.lock_filled, pieces.read_at

    def locked(buffer: torch.Tensor) -> bool:
        lockers.add(threading.current_thread().name)
        there[buffer.data_ptr()] = buffer.clone()
        return lock_filled(buffer)

    def slow(file: object, rest: memoryview, offset: int) -> None:
        time.sleep(0.005)
        read_at(file, rest, offset)

    monkeypatch.setattr(host_memory, "lock_filled", locked)
    monkeypatch.setattr(pieces, "read_at", slow)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 16 * 1024)
    assert torch.equal(one.run(handle).frames, expected)
    model = one.owner.loaded
    assert model is not None and model._host_pool.unfilled_bytes == 0
    flats = [flat for expert in model.experts.values() for name in expert.parts if (flat := on_host(expert, name)) is not None]
    assert len(flats) == len(there) == 12 and all(torch.equal(there[flat.data_ptr()], flat) for flat in flats)
    assert lockers == {"wan-sharded-locking"} and makers == []


# ---- blocks that are still on their way


@pytest.mark.parametrize("met", ["a cancel", "a file that can't be read"])
def test_blocks_on_their_way_are_forgotten_when_a_run_ends(
    bench: Callable[..., Bench], checkpoint: Path, monkeypatch: pytest.MonkeyPatch, met: str
) -> None:
    """Whether they are there is not known. The next run reads them again, and no others."""
    others, one = set(threading.enumerate()), bench()
    handle = open_model(checkpoint, weight_dtype="fp32", execution="parallel", offload="cpu")
    expected = one.run(handle).frames
    one.owner.release()
    one.forget()
    brought: list[str] = []
    bring, read_at = Expert.bring, pieces.read_at
    held = threading.Event()

    def slow(file: object, rest: memoryview, offset: int) -> None:
        if "blocks.3" in brought:
            held.wait(timeout=0.3)
            if met != "a cancel":
                raise OSError("bad luck")
        read_at(file, rest, offset)

    def watched(expert: Expert, part: str, *arguments: object, **options: object) -> None:
        if met == "a cancel" and "blocks.3" in brought:
            raise KeyboardInterrupt
        brought.append(part)
        bring(expert, part, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "AHEAD_BYTES", 1)
        patch.setattr(pieces, "PIECE_BYTES", 16 * 1024)  # so that some have not begun
        patch.setattr(pieces, "read_at", slow)
        patch.setattr(Expert, "bring", watched)
        with pytest.raises(KeyboardInterrupt if met == "a cancel" else CheckpointError):
            one.run(handle)
    model = one.owner.loaded
    assert model is not None
    expert = model.experts["transformer"]
    kept = [part for part in expert.parts if expert.packed(part) is not None]
    assert "blocks.3" not in kept and expert.location("blocks.3") == NOWHERE
    assert "blocks.0" in kept, "it was all there"
    own = ("wan-sharded-reader", "wan-sharded-locking")
    assert [thread for thread in threading.enumerate() if thread.name.startswith(own) and thread not in others] == []
    assert model._host_pool.unfilled_bytes == 0
    one.forget()
    assert torch.equal(one.run(handle).frames, expected)
    assert any(name.startswith("blocks.3.") for name in one.read)
    assert not any(name.startswith("blocks.0.") for name in one.read[: one.read.index("blocks.5.attn1.to_q.weight") + 1])


def test_all_has_arrived_before_anything_computes(bench: Callable[..., Bench], checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slowly it is read."""
    one = bench()
    handle = open_model(checkpoint, weight_dtype="fp32", execution="parallel", offload="cpu")
    expected = one.run(handle).frames
    one.owner.release()
    read_at = pieces.read_at

    def slow(file: object, rest: memoryview, offset: int) -> None:
        time.sleep(0.01)
        read_at(file, rest, offset)

    monkeypatch.setattr(pieces, "read_at", slow)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 16 * 1024)
    assert torch.equal(one.run(handle).frames, expected)


# ---- what loading takes, and its order


class Prepared(list[str]):
    """What becomes of readers that were told of what will be read."""

    readers: list[TensorReader]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Prepared:
    found = Prepared()
    found.readers = []

    def happens(reader: TensorReader, name: str) -> None:
        found.append(name)
        found.readers.append(reader)

    for name in ("prepare", "close", "give_back_buffers"):
        monkeypatch.setattr(TensorReader, name, lambda reader, name=name: happens(reader, name))
    return found


def test_what_loading_takes_is_made_behind_the_planning_of_what_is_to_be_loaded(checkpoint: Path, prepared: Prepared) -> None:
    owner, handle = ModelOwner(), open_model(checkpoint, weight_dtype="fp32")
    owner.dry_plan(handle, imagined_machine(2), SHAPE)
    assert prepared == []
    loaded = owner.obtain(handle, imagined_machine(2), SHAPE)
    assert owner.obtain(handle, imagined_machine(2), SHAPE) is loaded
    assert prepared == ["prepare"]
    assert prepared.readers == [expert._keeper.reader for expert in loaded.experts.values()][:1], "it is the one that will read"
    ModelOwner().obtain(open_model(checkpoint, weight_dtype="fp32", offload="cpu"), imagined_machine(2), SHAPE)
    ModelOwner().obtain(handle, machine(DeviceInfo(0, "CPU", "cpu", 64 * GIB, 60 * GIB, is_gpu=False)), SHAPE)
    assert prepared == ["prepare"], "nothing much comes to a GPU"


def test_what_was_made_for_a_plan_that_there_is_not_is_given_back(checkpoint: Path, prepared: Prepared) -> None:
    with pytest.raises(PlacementError):
        ModelOwner().obtain(open_model(checkpoint, weight_dtype="fp32", max_memory_gib={0: 0.1}), imagined_machine(1), SHAPE)
    assert prepared == ["prepare", "close", "give_back_buffers"]


def test_a_run_that_ends_before_it_reads_keeps_no_thread(bench: Callable[..., Bench], checkpoint: Path, prepared: Prepared) -> None:
    one = bench(1)
    with pytest.raises(InvalidRequestError):
        one.run(open_model(checkpoint, weight_dtype="fp32"), prompt_embeds=torch.ones(1, 3, 31))
    assert prepared[:2] == ["prepare", "close"] and len(set(map(id, prepared.readers))) == 1


def test_what_comes_to_several_gpus_comes_to_all_at_once(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in order, and each has all when the others have; what leaves a GPU goes first, and what stays does not count."""
    loaded = ModelOwner().obtain(open_model(make_checkpoint(num_blocks=9), weight_dtype="fp32"), imagined_machine(2), SHAPE)
    expert, placement = loaded.experts["transformer"], loaded.planned().placements["transformer"]
    homes: dict[str, int | str] = {name: 0 for name in placement.homes} | {f"blocks.{i}": 1 for i in (6, 7, 8)} | {"blocks.2": HOST}
    order = loaded._in_turn(expert, replace(placement, homes=homes))
    assert order[0] == "blocks.2" and sorted(order) == sorted(homes)
    blocks = [name for name in order[1:] if name.startswith("blocks.")]
    assert [[name for name in blocks if homes[name] == gpu] for gpu in (0, 1)] == [
        [f"blocks.{i}" for i in (0, 1, 3, 4, 5)], [f"blocks.{i}" for i in (6, 7, 8)],
    ]  # fmt: skip
    came = {0: 0, 1: 0}
    total = {gpu: sum(expert.part_bytes(name) for name, home in homes.items() if home == gpu) for gpu in came}
    for name in order[1:]:
        came[homes[name]] += expert.part_bytes(name)  # type: ignore[index]
        shares = [came[gpu] / total[gpu] for gpu in came]
        assert abs(shares[0] - shares[1]) <= 0.34, "one of GPU 1's three blocks"
    for name in ("blocks.6", "blocks.7"):
        expert._locations[name] = torch.device("lazy:1")
    order = loaded._in_turn(expert, replace(placement, homes=homes))
    assert order.index("blocks.8") < order.index("blocks.1"), "it is all that is to come there"
    with monkeypatch.context() as patch:  # and what other LoRAs change comes again
        patch.setattr(expert, "is_current", lambda name: False)
        again = loaded._in_turn(expert, replace(placement, homes=homes))
        assert again.index("blocks.8") > again.index("blocks.1")
    expert._locations["blocks.5"] = torch.device("lazy:1")
    assert loaded._in_turn(expert, replace(placement, homes=homes))[:2] == ["blocks.2", "blocks.5"], "it leaves a GPU, too"


def test_that_is_how_they_are_brought(
    bench: Callable[..., Bench], make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, brought, asked = bench(2), [], []
    bring, in_turn = Expert.bring, loaded_module.LoadedModel._in_turn

    def watched(expert: Expert, part: str, *arguments: Any, **options: Any) -> None:
        brought.append((expert.name, part))
        bring(expert, part, *arguments, **options)

    def backwards(model: loaded_module.LoadedModel, expert: Expert, placement: Placement) -> list[str]:
        order = in_turn(model, expert, placement)[::-1]
        asked.extend((expert.name, part) for part in order if expert.location(part) != model._device(placement.homes[part]))
        return order

    monkeypatch.setattr(Expert, "bring", watched)
    monkeypatch.setattr(loaded_module.LoadedModel, "_in_turn", backwards)
    one.run(open_model(make_checkpoint(num_blocks=4), weight_dtype="fp32"))
    assert brought == asked and len(asked) > 8
