"""Where the time of a forward goes on each GPU: what computes, what it waits for, and how long the host needs to queue it.

    python benchmarks/timeline.py [--gpus 2] [--size 832x480x81] [--layers 20]

One compiled forward with shares by measured speed, seen by torch's profiler. Per GPU and block: milliseconds of each kind of kernel on the
stream that computes, milliseconds in which that stream had nothing to run, and before which kernels those gaps were. Profiling
itself takes time, so the seconds are those of forwards without it.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from parallel import place, settled, timed_forward
from random_expert import random_expert, random_inputs
from record import Row, record
from torch.profiler import ProfilerActivity, profile
from wan_sharded.engine.parallel.blocks import BlockLoop
from wan_sharded.engine.parallel.crew import Crew, Share
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.parallel.workers import Worker

# A kernel's kind, by what its name has in it.
KINDS = {
    "compiled": ("triton",),  # whose names hold those of what they are made of
    "attention": ("fmha", "flash", "sdpa", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "matmul"),
    "copies": ("memcpy", "memset"),
}


def kind_of(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lowered for word in words)), "other kernels")


def device_events(trace: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What ran on GPUs, of a trace in Chrome's format, whose process is the GPU and whose thread the stream; times in microseconds."""
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            yield event


def host_calls(trace: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """What was asked of CUDA: a call's name -> how often, and milliseconds in all."""
    found: dict[str, tuple[int, float]] = {}
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in ("cuda_runtime", "cuda_driver"):
            count, milliseconds = found.get(event["name"], (0, 0.0))
            found[event["name"]] = (count + 1, milliseconds + event["dur"] / 1e3)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def where_time_goes(trace: dict[str, Any], blocks: int) -> dict[int, dict[str, Any]]:
    """Device index -> milliseconds a block of each kind, and of gaps by the kernel after them, on the stream that computes most."""
    streams: dict[int, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for event in device_events(trace):
        streams[event["pid"]][event["tid"]].append(event)
    found: dict[int, dict[str, Any]] = {}
    for device, by_stream in sorted(streams.items()):
        events = max(by_stream.values(), key=lambda them: sum(e["dur"] for e in them if e["cat"] == "kernel"))
        events.sort(key=lambda event: event["ts"])
        kinds: Counter[str] = Counter()
        gaps: Counter[str] = Counter()
        ended = events[0]["ts"]
        for event in events:
            kinds[kind_of(event["name"])] += event["dur"]
            gaps[kind_of(event["name"])] += max(0.0, event["ts"] - ended)
            ended = max(ended, event["ts"] + event["dur"])
        found[device] = {
            "span": (ended - events[0]["ts"]) / 1e3 / blocks,
            "kinds": {kind: micro / 1e3 / blocks for kind, micro in kinds.most_common()},
            "gaps": {kind: micro / 1e3 / blocks for kind, micro in gaps.most_common()},
            "kernels": len(events) / blocks,
            "attention": attention_calls(events, blocks),
            "largest": Counter({e["name"][:60]: 0 for e in events}),
        }
        for event in events:
            found[device]["largest"][event["name"][:60]] += event["dur"] / 1e3 / blocks
    return found


def attention_calls(events: list[dict[str, Any]], blocks: int) -> list[float]:
    """Median milliseconds of a block's first call of attention, of its second, and so on; nothing where blocks differ in their calls."""
    calls = [event["dur"] / 1e3 for event in events if kind_of(event["name"]) == "attention"]
    per_block, rest = divmod(len(calls), blocks)
    return [] if rest else [median(calls[number::per_block]) for number in range(per_block)]


def profiled(call, given: dict) -> dict[str, Any]:
    """A trace of one forward."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as running, torch.inference_mode():
            call(**given, return_dict=False)
            for device in range(torch.cuda.device_count()):
                torch.cuda.synchronize(device)
        running.export_chrome_trace(str(path))
        return json.loads(path.read_text())


def queueing(call, given: dict) -> float:
    """Median milliseconds in which the host queues one block on all GPUs, waiting for none of them."""
    seconds: list[float] = []
    plain = BlockLoop._run_block

    def timed(*arguments, **options) -> None:
        began = time.perf_counter()
        plain(*arguments, **options)
        seconds.append(time.perf_counter() - began)

    with mock.patch.object(BlockLoop, "_run_block", timed), torch.inference_mode():
        call(**given, return_dict=False)
    return median(seconds) * 1e3


def in_words(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value:.2f}" for kind, value in milliseconds.items() if value >= 0.01)


def measure(expert, gpus: int, size: str, layers: int, repeats: int, kernels: int) -> list[Row]:
    """The rows of one case: the whole, and each GPU."""
    devices = [torch.device("cuda", index) for index in range(gpus)]
    inputs = [random_inputs(*(int(n) for n in size.split("x")), devices[0], torch.bfloat16, seed) for seed in range(2)]
    place(expert, devices, devices[0])
    workers = [Worker(index, device) for index, device in enumerate(devices)]
    crew = Crew([Share(worker, 1.0, range_tokens=1 << 30) for worker in workers], workers[0])
    forward = ParallelForward(expert, crew, BlockFunctions(expert.math), forwards_left=lambda: 10**6)
    tokens = settled(forward, inputs[0])  # calibrates, compiles, corrects the shares
    seconds, _, _ = timed_forward(forward, inputs, repeats)
    row = Row(size, "wan-sharded", gpus, "bf16", seconds)
    row.note = f"{seconds / layers * 1e3:.2f} ms a block; the host queues a block in {queueing(forward, inputs[0]):.2f} ms; tokens {tokens}"
    rows = [row]
    print(row, flush=True)
    trace = profiled(forward, inputs[1])
    for device, found in where_time_goes(trace, layers).items():
        computing = Row(size, f"GPU {device}", gpus, "bf16")
        gaps = {f"before {kind}": value for kind, value in found["gaps"].items()}
        computing.note = (
            f"ms a block: {found['span']:.2f} in all; {in_words(found['kinds'])}; "
            f"attention call by call {'/'.join(f'{call:.2f}' for call in found['attention'])}; "
            f"nothing to run {sum(gaps.values()):.2f} ({in_words(gaps)}); {found['kernels']:.0f} kernels"
        )
        rows.append(computing)
        print(computing, flush=True)
        for name, value in found["largest"].most_common(kernels):
            print(f"  {value:8.3f} {name}", flush=True)
    calls = ", ".join(f"{name} {count} in {milliseconds:.1f} ms" for name, (count, milliseconds) in list(host_calls(trace).items())[:8])
    rows.append(Row(size, "host", gpus, "bf16", note=f"asked of CUDA in one forward: {calls}"))
    print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default=str(torch.cuda.device_count()), help="how many take part; several cases: 1,2,4")
    parser.add_argument("--size", default="832x480x81", help="several cases: 832x480x81,1280x720x81")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kernels", type=int, default=0, help="print so many of the kernels that take longest")
    parser.add_argument("--name", default="timeline", help="of the results file; empty: print only")
    a = parser.parse_args()
    counts = [int(count) for count in a.gpus.split(",")]
    if not 0 < min(counts) <= max(counts) <= torch.cuda.device_count():
        sys.exit(f"needs {max(1, *counts)} GPUs")
    expert = random_expert(torch.device("cuda", 0), num_layers=a.layers)
    rows = []
    for gpus in counts:
        for size in a.size.split(","):
            rows += measure(expert, gpus, size, a.layers, a.repeats, a.kernels)
    record(a.name, "Where the time of a forward goes: milliseconds a block", rows, append=bool(a.name))


if __name__ == "__main__":
    main()
