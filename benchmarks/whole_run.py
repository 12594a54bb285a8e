"""Whole videos at the real 14B shape on two capped GPUs, beside the guide's own script in the same run.

    python benchmarks/whole_run.py --checkpoint FOLDER [--gib 15 11] [--layers 40] [--cases int8,fp8_e4m3fn,bf16]

Each case plans, loads, encodes, takes steps on both sides of the expert switch and decodes. Peaks are what the driver counts
on each GPU, CUDA context included. The guide's script (``device_map`` with ``max_memory`` at the caps) runs with torch's
allocator held to the same caps, once as written and once with room left for activations.
"""

import argparse
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
pack = ModuleType("wan_sharded")
pack.__path__ = [str(ROOT)]
sys.modules["wan_sharded"] = pack
sys.path.insert(0, str(ROOT / "benchmarks"))

import psutil  # noqa: E402  after the engine, which sets torch's allocator up
import torch  # noqa: E402
from real_shape import make_real_shape_checkpoint  # noqa: E402
from record import Row, record  # noqa: E402
from wan_sharded.engine import IMAGE_TO_VIDEO, OWNER, Callbacks, ImageToVideoRequest, open_model, probe  # noqa: E402
from wan_sharded.engine.planning.budgets import CONTEXT_BYTES  # noqa: E402
from wan_sharded.engine.planning.footprint import VideoShape, transformer_activation_bytes  # noqa: E402

GIB = 1024**3


class PeakWatch(threading.Thread):
    """Samples what the driver counts on each GPU, every few milliseconds, over what it counted before CUDA began here."""

    def __init__(self, baseline: list[int]):
        super().__init__(daemon=True)
        self.baseline, self.peaks, self.host, self.running = baseline, [0] * len(baseline), 0, True

    def run(self) -> None:
        process = psutil.Process()
        while self.running:
            for i, used in enumerate(used_bytes()):
                self.peaks[i] = max(self.peaks[i], used - self.baseline[i])
            memory = process.memory_info()
            self.host = max(self.host, memory.rss - getattr(memory, "shared", 0))
            time.sleep(0.005)


def idle_bytes() -> list[int]:
    """Bytes in use on each GPU that CUDA is to see (CUDA_VISIBLE_DEVICES: their numbers), before it starts here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", *(["-i", visible] if visible else [])]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [int(line) * 1024**2 for line in lines]


def used_bytes() -> list[int]:
    """Bytes in use on each GPU, by the driver."""
    used = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        used.append(total - free)
    return used


@contextmanager
def watched(baseline: list[int]) -> Iterator[PeakWatch]:
    watch = PeakWatch(baseline)
    watch.start()
    try:
        yield watch
    finally:
        watch.running = False
        watch.join()


def cap(gib: list[float]) -> None:
    """Hold torch's allocator to the caps, less the CUDA context that lives outside it."""
    for i, limit in enumerate(gib):
        torch.cuda.set_per_process_memory_fraction((limit * GIB - CONTEXT_BYTES) / torch.cuda.get_device_properties(i).total_memory, i)


def sharded_case(
    folder: Path, shape: VideoShape, dtype: str, device_map: str, execution: str, gib: list[float], baseline: list[int], steps: int
) -> Row:
    """One video by this pack."""
    row = Row(str(shape), f"wan-sharded {device_map}, {execution}", len(gib), dtype)
    stages: list[str] = []
    began = time.perf_counter()

    def stamp(words: str) -> None:
        held = "/".join(
            f"{torch.cuda.max_memory_reserved(i) / GIB:.1f}:{torch.cuda.max_memory_allocated(i) / GIB:.1f}" for i in range(len(gib))
        )
        stages.append(f"{words} at {time.perf_counter() - began:.1f} s [{held}]")

    callbacks = Callbacks(
        on_stage=stamp,
        on_load=lambda done, total, what: stamp(f"{what} {done}/{total}") if done in (0, total) else None,
        on_step=lambda report: stamp(f"step {report.step} {report.seconds:.2f} s"),
    )
    try:
        handle = open_model(folder, weight_dtype=dtype, device_map=device_map, execution=execution, max_memory_gib=dict(enumerate(gib)))
        picture = torch.rand(shape.height, shape.width, 3, generator=torch.Generator().manual_seed(1))
        request = ImageToVideoRequest(
            image=picture,
            prompt="a boat on a lake",
            width=shape.width,
            height=shape.height,
            num_frames=shape.num_frames,
            num_inference_steps=steps,
            switch_step=steps // 2,
            guidance_scale=1.0,
            seed=7,
        )
        with watched(baseline) as watch:
            result = IMAGE_TO_VIDEO(handle, request, callbacks)
        print(result.placement, *result.notes, sep="\n", flush=True)
        plan = OWNER.loaded.plan
        on_gpu = [len([1 for home in p.homes.values() if home != "cpu"]) for p in plan.placements.values()]
        seconds = sorted(result.step_seconds[1 : steps // 2] + result.step_seconds[steps // 2 + 1 :])
        row.seconds = seconds[len(seconds) // 2]
        row.peak_gib = [peak / GIB for peak in watch.peaks]
        row.host_gib = watch.host / GIB
        kept = all(peak <= limit for peak, limit in zip(row.peak_gib, gib, strict=True))
        torch_peaks = "/".join(f"{p / GIB:.1f}" for p in result.peak_bytes.values())
        expected = "/".join(
            f"{max(p.predicted_peak_bytes(b.device.index) for p in plan.placements.values()) / GIB:.1f}" for b in plan.budgets
        )
        allocated = "/".join(f"{torch.cuda.max_memory_allocated(i) / GIB:.1f}" for i in range(len(gib)))
        finite = bool(torch.isfinite(result.frames).all())
        row.note = f"whole run {time.perf_counter() - began:.0f} s; parts on GPUs {on_gpu[0]}/{len(plan.placements['transformer'].homes)}; "
        row.note += f"torch reserved {torch_peaks}, allocated {allocated}, expected {expected}; {'within' if kept else 'ABOVE'} the sliders; frames {'finite' if finite else 'NOT FINITE'}"
    except Exception as error:
        traceback.print_exc()
        row.note = f"FAILED: {type(error).__name__}: {str(error)[:200]}"
    print("; ".join(stages), flush=True)
    print(row, flush=True)
    return row


def guide_case(folder: Path, shape: VideoShape, max_memory_gb: list[float], gib: list[float], baseline: list[int]) -> Row:
    """One expert's forward the way the guide does it: from_pretrained with device_map and max_memory."""
    from diffusers import WanTransformer3DModel

    row = Row(str(shape), f"device_map balanced, max_memory {'/'.join(f'{m:g}GB' for m in max_memory_gb)}", len(gib), "bf16")
    model = None
    try:
        began = time.perf_counter()
        limits = {i: f"{m:g}GB" for i, m in enumerate(max_memory_gb)}
        with watched(baseline) as watch:
            model = WanTransformer3DModel.from_pretrained(
                folder, subfolder="transformer", torch_dtype=torch.bfloat16, device_map="balanced", max_memory={**limits, "cpu": "200GB"}
            )
            loading = time.perf_counter() - began
            row.seconds = forward_seconds(model, shape, "cuda:0", repeats=2)
        row.peak_gib = [peak / GIB for peak in watch.peaks]
        row.host_gib = watch.host / GIB
        row.note = f"one expert only; loading {loading:.0f} s"
    except Exception as error:
        row.note = f"FAILED: {type(error).__name__}: {str(error)[:120]}"
    del model
    clean()
    print(row, flush=True)
    return row


def forward_seconds(model, shape: VideoShape, device: str, repeats: int) -> float:
    """Median seconds of one forward after one warm-up."""
    latents = torch.randn(1, 36, shape.latent_frames, shape.height // 8, shape.width // 8, device=device, dtype=torch.bfloat16)
    text = torch.randn(1, 512, 4096, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with torch.no_grad():
            model(hidden_states=latents, timestep=torch.tensor([900], device=device), encoder_hidden_states=text, return_dict=False)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[repeats // 2]


def clean() -> None:
    OWNER.release()
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--gib", type=float, nargs="+", default=[15, 11])
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--cases", default="int8,fp8_e4m3fn,bf16")
    parser.add_argument("--maps", default="balanced,auto")
    parser.add_argument("--executions", default="auto", help="auto, parallel, sequential")
    parser.add_argument("--size", type=int, nargs=3, default=[832, 480, 81], metavar=("WIDTH", "HEIGHT", "FRAMES"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--no-guide", action="store_true")
    parser.add_argument("--name", default="whole_run", help="of the results file; empty: print only")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after so long")
    a = parser.parse_args()
    baseline = idle_bytes()
    began = time.perf_counter()
    make_real_shape_checkpoint(a.checkpoint, num_layers=a.layers)
    print(f"checkpoint after {time.perf_counter() - began:.0f} s", flush=True)
    clean()
    shape = VideoShape(*a.size)
    print(f"activations expected: {transformer_activation_bytes(shape, 5120, 2, probe.fragmentation()) / GIB:.2f} GiB", flush=True)
    rows = []
    for dtype in a.cases.split(","):
        for device_map, execution in itertools.product(a.maps.split(","), a.executions.split(",")):
            if time.perf_counter() - began < a.seconds:
                rows.append(sharded_case(a.checkpoint, shape, dtype, device_map, execution, a.gib, baseline, a.steps))
        clean()
    if not a.no_guide:
        cap(a.gib)
        rows.append(guide_case(a.checkpoint, shape, a.gib, a.gib, baseline))
        rows.append(guide_case(a.checkpoint, shape, [g - 5 for g in a.gib], a.gib, baseline))
    title = f"Whole run, sliders {' and '.join(f'{g:g}' for g in a.gib)} GiB: seconds per step of one forward"
    print(f"allocator {torch.cuda.get_allocator_backend()} {os.environ.get('PYTORCH_CUDA_ALLOC_CONF')}", flush=True)
    record(a.name, title, rows, append=bool(a.name))


if __name__ == "__main__":
    main()
