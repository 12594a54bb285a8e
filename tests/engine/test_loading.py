"""What is got ready ahead while experts are loaded. On imagined GPUs; that it is faster is for benchmarks/loading.py."""

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_bench import Bench
from imagined_machine import TinyExpert
from wan_sharded.engine import host_memory, open_model
from wan_sharded.engine import loaded as loaded_module
from wan_sharded.engine.errors import CheckpointError
from wan_sharded.engine.host_pool import HostPool
from wan_sharded.engine.planning.devices import GIB
from wan_sharded.engine.system_memory import SystemMemory, system_memory
from wan_sharded.engine.weights import pieces, reading
from wan_sharded.engine.weights.expert import CPU, NOWHERE, Expert

AHEAD = "wan-sharded-memory"


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
