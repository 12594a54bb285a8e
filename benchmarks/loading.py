"""From files in the page cache to where weights live: seconds, GB/s beside what the read and the link allow, host memory; one GPU or several.

    python benchmarks/loading.py [--layers 40] [--folder FOLDER] [--forms fp8,bf16,q4_k] [--gpus 1] [--slow-links 1]

Writes single files of the real 14B shape first (14 GB an expert in fp8, 29 GB in bf16, 9 GB in GGUF's Q4_K), then loads both experts as a run would: to the GPU, to page-locked host memory, and quantized on the way. Beside it: reading the file alone,
copying over the link alone, both at once with nothing else to be done, and safetensors' own ``safe_open`` with ``.to("cuda")``. At last, LoRAs are added, made weaker, and removed.

With several GPUs, what comes to all of them at once, and beside it, in the same run, to one after another. ``--slow-links 2,4`` has all that is sent to a GPU sent several times, as over slower links; the row of the links alone is without.
"""

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import cycle
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
pack = ModuleType("wan_sharded")
pack.__path__ = [str(ROOT)]
sys.modules["wan_sharded"] = pack
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]
GPUS = int(sys.argv[sys.argv.index("--gpus") + 1]) if "--gpus" in sys.argv else 1
# Those that take part share the experts.
os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(GPUS)))).split(",")[:GPUS])

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from accelerate import init_empty_weights  # noqa: E402
from diffusers import WanTransformer3DModel  # noqa: E402
from random_expert import WAN_14B  # noqa: E402
from record import Row, record  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tiny_single_files import original_name  # noqa: E402
from wan_sharded.engine import open_model, probe  # noqa: E402
from wan_sharded.engine.checkpoints.lora import LoraChoice, open_lora_file  # noqa: E402
from wan_sharded.engine.host_memory import host_buffer  # noqa: E402
from wan_sharded.engine.loaded import LoadedModel  # noqa: E402
from wan_sharded.engine.owner import ModelOwner  # noqa: E402
from wan_sharded.engine.planning.footprint import VideoShape  # noqa: E402
from wan_sharded.engine.planning.placement import HOST, Placement  # noqa: E402
from wan_sharded.engine.weights import library_reads, sending  # noqa: E402
from wan_sharded.engine.weights.driver_copies import Copied, DriverCopies, Filled  # noqa: E402
from wan_sharded.engine.weights.errands import Errand, Reading  # noqa: E402
from wan_sharded.engine.weights.expert import Expert  # noqa: E402
from wan_sharded.engine.weights.pieces import Piece, Stretch  # noqa: E402

GB, GIB = 1e9, 1024**3
SHAPE = VideoShape(832, 480, 81)
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
CHUNK = 64 * 1024**2
# Buffers that stay in the processor's cache are read into much faster.
SMALL_CHUNK = 8 * 1024**2
STEPS = {"high": "transformer", "low": "transformer_2"}


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of some tensors, full of small finite numbers of any type."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    chunk = torch.randint(0x20, 0x38, (CHUNK,), dtype=torch.uint8).numpy().data
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        while offset:
            offset -= file.write(chunk[:offset])


def write_gguf(path: Path, layers: int, kind: str) -> None:
    """A GGUF file of an expert: the blocks' matrices in a quantized type, as full of small finite numbers."""
    import gguf

    which, plain = gguf.GGMLQuantizationType[kind.upper()], gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(path, "wan")
    for name, (_, shape) in expert_tensors(layers, fp8=False).items():
        few = name.startswith("blocks.") and len(shape) == 2
        elements, size = gguf.GGML_QUANT_SIZES[which if few else plain]
        nbytes = torch.Size(shape).numel() // elements * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, which if few else plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    padded = [writer.ggml_pad(info.nbytes, writer.data_alignment) for info in writer.tensors[0].values()]
    writer.close()
    chunk = torch.randint(0x20, 0x38, (CHUNK,), dtype=torch.uint8).numpy().data
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % writer.data_alignment))
        left = sum(padded)
        while left:
            left -= file.write(chunk[:left])


def expert_tensors(layers: int, *, fp8: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    with init_empty_weights():
        model = WanTransformer3DModel(**WAN_14B, num_layers=layers)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        few = fp8 and name.endswith(".weight") and parameter.ndim == 2
        found[original_name(name)] = ("F8_E4M3" if few else "BF16", tuple(parameter.shape))
        if few:
            found[original_name(name).removesuffix("weight") + "scale_weight"] = ("F32", ())
    return {**found, **({"scaled_fp8": ("F8_E4M3", (0,))} if fp8 else {})}


def lora_tensors(layers: int, rank: int = 64) -> dict[str, tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (_, shape) in expert_tensors(layers, fp8=False).items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            module = f"diffusion_model.{name.removesuffix('.weight')}"
            found[f"{module}.lora_down.weight"], found[f"{module}.lora_up.weight"] = ("BF16", (rank, shape[1])), ("BF16", (shape[0], rank))
    return found


class HostPeak:
    """The most that this process held of host memory while inside, beyond what it held before; pages of mapped files left out."""

    def __enter__(self):
        self._before, self.peak_bytes, self._stop = self._held(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    @staticmethod
    def _held() -> int:
        info = psutil.Process().memory_info()
        return info.rss - info.shared

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, self._held() - self._before)

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.held_bytes = self._held() - self._before


def rate(case: str, what: str, dtype: str, size_bytes: int, seconds: float, note: str = "") -> Row:
    row = Row(case, what, GPUS, dtype, seconds, note=f"{size_bytes / GB:.1f} GB, {size_bytes / GB / seconds:.1f} GB/s{note}")
    print(row, flush=True)
    return row


def read_into_new(path: Path, threads: int, chunk: int) -> float:
    """Seconds to read a file into memory that the system has yet to give, and not page-locked."""
    size = path.stat().st_size
    memory = np.empty(size, dtype=np.uint8).data
    mine = threading.local()

    def work(start: int) -> None:
        if not hasattr(mine, "file"):
            mine.file = path.open("rb", buffering=0)
        mine.file.seek(start)
        mine.file.readinto(memory[start : start + chunk])

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(0, size, chunk)))
    return time.perf_counter() - began


def read_alone(path: Path, threads: int, chunk: int, by_turns: int = 1) -> float:
    """Seconds to read a file into page-locked memory, a buffer or several for each thread, that are used again and again."""
    buffers = [[host_buffer(chunk).numpy().data for _ in range(by_turns)] for _ in range(threads)]
    starts = iter(range(0, path.stat().st_size, chunk))
    lock = threading.Lock()

    def work(buffers) -> None:
        with path.open("rb", buffering=0) as file:
            for buffer in cycle(buffers):
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                file.seek(start)
                file.readinto(buffer)

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, buffers))
    return time.perf_counter() - began


def synchronize() -> None:
    for gpu in range(GPUS):
        torch.cuda.synchronize(gpu)


@contextmanager
def slow_links(times: Mapping[int, int]) -> Iterator[None]:
    """Inside, all that the pack sends to a GPU is sent so many times, as over a link that takes so many times as long."""
    queue, queue_copies = DriverCopies.queue, sending._queue_copies

    def by_driver(copies: DriverCopies, stream: torch.cuda.Stream, filled: Sequence[Filled]) -> Copied:
        for _ in range(times[stream.device_index] - 1):
            copies.give_back(queue(copies, stream, filled))
        return queue(copies, stream, filled)

    def by_torch(stream: torch.cuda.Stream, sendings: Sequence[sending.Sending]) -> torch.cuda.Event:
        for _ in range(times[stream.device_index] - 1):
            queue_copies(stream, sendings)
        return queue_copies(stream, sendings)

    with mock.patch.object(DriverCopies, "queue", by_driver), mock.patch.object(sending, "_queue_copies", by_torch):
        yield


def link_alone(size_bytes: int) -> float:
    memory = host_buffer(1024**3)
    there = [torch.empty_like(memory, device=f"cuda:{gpu}") for gpu in range(GPUS)]
    began = 0.0
    for times in (1, 4):
        synchronize()
        began = time.perf_counter()
        for target in there * times:
            target.copy_(memory, non_blocking=True)
    synchronize()
    return (time.perf_counter() - began) / 4 * size_bytes / memory.numel() / GPUS


def read_and_send_alone(path: Path) -> float:
    """Seconds to read a file and send it to the GPUs by what the pack uses, with every piece and every buffer at hand and nothing else to be
    done."""
    size = path.stat().st_size
    each = -(-size // GPUS)
    there = [torch.empty(min(each, size - gpu * each), dtype=torch.uint8, device=f"cuda:{gpu}") for gpu in range(GPUS)]
    reads, seconds = library_reads.LibraryReads(library_reads.Buffers()), 0.0
    for _ in range(2):  # the first time makes the buffers
        synchronize()
        reading, step, errands = Reading(), library_reads.PIECE_BYTES, list[Errand]()
        for gpu, memory in enumerate(there):
            for begin in range(0, memory.numel(), step):
                one = Stretch(memory, begin, min(step, memory.numel() - begin))
                piece = Piece(path, 0, gpu * each + begin, one.size_bytes, ((0, one),))
                errands.append(Errand(piece, reading, torch.cuda.current_stream(gpu)))
        reading.add(len(errands), size)
        began = time.perf_counter()
        reads.begin(errands, urgent=False)
        reading.wait()
        synchronize()
        seconds = time.perf_counter() - began
    reads.close()
    return seconds


def lock_alone(size_bytes: int, *, touched: bool) -> float:
    """Seconds to have so much new system memory page-locked: by the driver alone, or after several threads have touched it (host_buffer)."""
    step, seconds = 1024**3, 0.0
    for _ in range(4):
        began = time.perf_counter()
        if touched:
            memory = host_buffer(step)
            assert memory.is_pinned()
            seconds += time.perf_counter() - began
        else:
            memory = np.empty(step, dtype=np.uint8)
            torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, step, 0)
            seconds += time.perf_counter() - began
            torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)
        del memory
    return seconds / 4 * size_bytes / step


def safetensors_alone(path: Path) -> float:
    began = time.perf_counter()
    with safe_open(path, framework="pt", device="cpu") as file:
        kept = [file.get_tensor(name).to("cuda") for name in file.keys()]
    torch.cuda.synchronize()
    del kept
    return time.perf_counter() - began


def one_after_another(loaded: LoadedModel, expert: Expert, placement: Placement) -> list[str]:
    """Instead of what comes to all GPUs at once."""
    return sorted(placement.homes, key=lambda name: placement.homes[name] != HOST)


class Loading:
    """Loads both experts of a pair of files as a run does."""

    def __init__(self, case: str, high: Path, low: Path, weight_dtype: str, offload: str):
        self.case, self.weight_dtype = case, weight_dtype
        self.file_bytes = high.stat().st_size + low.stat().st_size
        self.handle = open_model(None, high_noise_model=high, low_noise_model=low, weight_dtype=weight_dtype, offload=offload)
        self.owner = ModelOwner()

    def activate(self, loras: dict | None = None) -> float:
        from dataclasses import replace

        # What is loaded is made and planned before; that takes about a second, whatever the files.
        loaded = self.owner.obtain(replace(self.handle, loras=loras or {}), probe.probe_machine(), SHAPE)
        began = time.perf_counter()
        for part in STEPS.values():
            loaded.activate(part, lambda: None, lambda done, total, what: None)
        synchronize()
        return time.perf_counter() - began

    def rows(self, what: str) -> list[Row]:
        """The first time, which includes what a process does once; again; and its memory, since watching takes time."""
        first = rate(self.case, f"{what}, the first time", self.weight_dtype, self.file_bytes, self.activate())
        self.owner.release()
        seconds = self.activate()
        self.owner.release()
        with HostPeak() as host:
            self.activate()
        loaded = self.owner.loaded
        assert loaded is not None and loaded.plan is not None
        lives = loaded.resident_bytes(torch.device("cpu"))
        row = rate(
            self.case, what, self.weight_dtype, self.file_bytes, seconds,
            f"; {lives / GB:.1f} GB live on the host, peak {host.peak_bytes / GB:.1f} GB, held after {host.held_bytes / GB:.1f} GB",
        )  # fmt: skip
        row.peak_gib = [torch.cuda.max_memory_allocated(gpu) / GIB for gpu in range(GPUS)]
        row.host_gib = host.peak_bytes / GIB
        return [first, row]

    def by_turns(self, what: str, loads: int = 5) -> list[Row]:
        """To all GPUs at once, and to one after another: means of some loads each, in turn."""
        ways = {"all GPUs at once": LoadedModel._in_turn, "one GPU after another": one_after_another}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(loads):
            for way in list(ways)[:: -1 if turn % 2 else 1]:
                self.owner.release()
                with mock.patch.object(LoadedModel, "_in_turn", ways[way]):
                    seconds[way].append(self.activate())
        each = {way: " ".join(f"{one:.2f}" for one in found) for way, found in seconds.items()}
        return [
            rate(self.case, f"{what}, {way}", self.weight_dtype, self.file_bytes, sum(found) / loads, f"; mean of {each[way]} s, in turn")
            for way, found in seconds.items()
        ]


def add_rows(rows: list[Row], form: str, pair: Sequence[Path], a: argparse.Namespace) -> None:
    both = 2 * pair[0].stat().st_size
    case = f"both experts, {form} file" + (f", links {a.slow_links} times as slow" if a.slow_links else "")
    for threads, chunk, by_turns in (
        (1, CHUNK, 1),
        (8, CHUNK, 1),
        (8, SMALL_CHUNK, 2),
        (12, SMALL_CHUNK, 2),
        (8, SMALL_CHUNK, 1),
        (16, SMALL_CHUNK, 1),
        # As what sends to the GPU reads, but with Python's threads (engine/weights/library_reads.py).
        (14, SMALL_CHUNK // 2, 3),
    ):
        if GPUS > 1 and by_turns == 1:
            continue
        words = f"reading alone, {threads} thread{'s' if threads > 1 else ''}, {chunk // 1024**2} MiB each at a time"
        words += f", {by_turns} buffers by turns" if by_turns > 1 else ""
        rows.append(rate(case, words, form, both, sum(read_alone(file, threads, chunk, by_turns) for file in pair)))
    words = f"reading alone, 12 threads, {SMALL_CHUNK // 1024**2} MiB each at a time, into new memory"
    rows.append(rate(case, words, form, both, sum(read_into_new(file, 12, SMALL_CHUNK) for file in pair)))
    rows.append(rate(case, "the link alone", form, both, link_alone(both)))
    if library_reads.available():
        words = "reading and sending alone, as the pack does, all pieces at hand"
        rows.append(rate(case, words, form, both, sum(read_and_send_alone(file) for file in pair)))
        torch.cuda.empty_cache()
    if form == "fp8" and GPUS == 1:
        for touched, what in ((False, "page-locking alone"), (True, "page-locking alone, touched by threads first")):
            rows.append(rate(case, what, form, both, lock_alone(both, touched=touched)))
    if form == "fp8" and GPUS == 1:
        rows.append(rate(case, 'safe_open and .to("cuda")', form, both, sum(safetensors_alone(file) for file in pair)))
    for what, dtype, offload in (("to the GPU", "default", "auto"), ("to the host", "default", "cpu"), ("to the GPU", "int8", "auto")):
        if (form != "bf16" and dtype == "int8") or (offload == "cpu" and GPUS > 1):
            continue
        torch.cuda.empty_cache()
        for gpu in range(GPUS):
            torch.cuda.reset_peak_memory_stats(gpu)
        one = Loading(case, *pair, dtype, offload)
        try:
            rows += one.rows(f"wan-sharded, {what}")
            if offload == "auto" and dtype == "default" and library_reads.available():
                one.owner.release()
                with mock.patch.object(library_reads, "available", lambda: False):
                    rows += one.rows(f"wan-sharded, {what}, Python's threads reading")
            if GPUS > 1:
                rows += one.by_turns(f"wan-sharded, {what}")
                with mock.patch.object(library_reads, "available", lambda: False):
                    rows += one.by_turns(f"wan-sharded, {what}, Python's threads reading")
            if form == "fp8" and GPUS == 1:
                rows += lora_rows(one, a.folder, a.layers)
        except Exception as error:
            rows.append(Row(case, what, GPUS, dtype, note=f"FAILED: {type(error).__name__}: {str(error)[:300]}"))
            print(rows[-1], flush=True)
        one.owner.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--forms", default="fp8,bf16,q4_k", help="of the files: fp8, bf16, or a type of GGUF")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--slow-links", help="how many times as long each GPU's link is to take: 2,4")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wan-loading")
    parser.add_argument("--name", default="loading", help="of the results file; empty: print only")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    times = dict(enumerate(map(int, a.slow_links.split(",")))) if a.slow_links else {}
    if a.gpus != GPUS or (times and len(times) != GPUS):
        parser.error("write --gpus 2, and a number for each of them behind --slow-links")
    rows: list[Row] = []
    probe.probe_machine()
    try:
        for form in a.forms.split(","):
            gguf = form not in ("fp8", "bf16")
            pair = [a.folder / f"wan2.2_i2v_{level}_noise_14B_{form}.{'gguf' if gguf else 'safetensors'}" for level in STEPS]
            if gguf:
                write_gguf(pair[0], a.layers, form)
            else:
                write(pair[0], expert_tensors(a.layers, fp8=form == "fp8"))
            shutil.copyfile(*pair)
            with slow_links(times) if a.slow_links else nullcontext():
                add_rows(rows, form, pair, a)
            for file in pair:
                file.unlink()
    finally:  # also of a run that is cut short
        record(a.name, "Loading both experts from files in the page cache: seconds", rows, append=bool(a.name))


def lora_rows(one: Loading, folder: Path, layers: int) -> list[Row]:
    """Both experts loaded already: LoRAs come, change their strength, and go."""
    file = folder / "lora.safetensors"
    write(file, lora_tensors(layers))
    lora = open_lora_file(file)
    rows = []
    where = one.case if not one.handle.offload == "cpu" else f"{one.case}, on the host"
    for what, strength in (("LoRA of rank 64 added", 1.0), ("its strength changed", 0.5), ("removed", 0.0)):
        loras = {part: (LoraChoice(lora, strength),) for part in STEPS.values()} if strength else {}
        rows.append(rate(where, f"wan-sharded, {what}", one.weight_dtype, 2 * file.stat().st_size, one.activate(loras)))
    return rows


if __name__ == "__main__":
    main()
