"""Forward by forward, from the first on: seconds, shares, where each GPU waited, its clock and power. For what a median hides.

    python benchmarks/forwards.py [--gpus 4] [--size 1280x720x81] [--layers 40] [--count 10]

Every forward is waited for. Milliseconds of a block are medians over a forward's timed blocks: work and waits by turns, as in "project +
wait + attention of a group of heads + wait + attention of the last group and the rest of the block". What of a forward is in neither is
waiting for weights, or for the host. Clocks and power are nvidia-smi's, averages over the forward.
"""

import argparse
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean, median

import torch
from parallel import place
from random_expert import random_expert, random_inputs
from record import Row, record
from wan_sharded.engine.parallel.crew import Crew, Share
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.parallel.state import State
from wan_sharded.engine.parallel.workers import Worker

SAMPLE_MS = 100
# When, and of which GPU by nvidia-smi's index: megahertz and watts.
Samples = list[tuple[float, int, float, float]]


@contextmanager
def clocks(devices: list[torch.device]) -> Iterator[Samples]:
    """Inside, what nvidia-smi says of these GPUs ten times a second. It is ended with it: who asks the driver holds others up."""
    names = ",".join(f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices)
    query = "--query-gpu=index,clocks.sm,power.draw.instant"
    samples: Samples = []
    try:
        process = subprocess.Popen(
            ["nvidia-smi", f"--id={names}", query, "--format=csv,noheader,nounits", f"--loop-ms={SAMPLE_MS}"],
            stdout=subprocess.PIPE,
            text=True,
        )
    except OSError:
        yield samples
        return

    def read() -> None:
        for line in process.stdout or ():
            cells = line.split(",")
            if len(cells) == 3 and all(cell.strip().replace(".", "", 1).isdigit() for cell in cells):
                samples.append((time.perf_counter(), int(cells[0]), float(cells[1]), float(cells[2])))

    reading = threading.Thread(target=read)
    reading.start()
    try:
        yield samples
    finally:
        process.kill()
        process.wait()
        reading.join()


def in_words(samples: Samples, begin: float, end: float) -> str:
    """Averages of each GPU over a stretch of time, its first sample left out, which is of the time before."""
    by_gpu: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for when, index, clock, power in samples:
        if begin + SAMPLE_MS / 1e3 < when < end:
            by_gpu[index].append((clock, power))
    return ", ".join(f"{mean(c for c, _ in found):.0f} MHz {mean(p for _, p in found):.0f} W" for _, found in sorted(by_gpu.items()))


def laps(state: State) -> str:
    """Medians of what a worker's timed blocks took, work and waits by turns; milliseconds."""
    blocks = [[a.seconds_until(b) * 1e3 for a, b in zip(one, one[1:], strict=False)] for one in state.timed]
    return "+".join(f"{median(lap):.1f}" for lap in zip(*blocks, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--size", default="1280x720x81")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--name", default="forwards", help="of the results file; empty: print only")
    a = parser.parse_args()
    if not 0 < a.gpus <= torch.cuda.device_count():
        sys.exit(f"needs {max(1, a.gpus)} GPUs")
    devices = [torch.device("cuda", index) for index in range(a.gpus)]
    inputs = [random_inputs(*(int(n) for n in a.size.split("x")), devices[0], torch.bfloat16, seed) for seed in range(2)]
    expert = random_expert(devices[0], num_layers=a.layers)
    place(expert, devices, devices[0])
    workers = [Worker(index, device) for index, device in enumerate(devices)]
    crew = Crew([Share(worker, 1.0, range_tokens=1 << 30) for worker in workers], workers[0])
    forward = ParallelForward(expert, crew, BlockFunctions(expert.math), forwards_left=lambda: 10**6)
    rows = []
    with torch.inference_mode(), clocks(devices) as samples:
        for number in range(a.count):
            crew.settle()
            began = time.perf_counter()
            forward(**inputs[number % len(inputs)], return_dict=False)
            queued = time.perf_counter() - began
            crew.settle()
            ended = time.perf_counter()
            states = forward._last
            row = Row(a.size, f"forward {number + 1}", a.gpus, "bf16", ended - began)
            row.note = (
                f"queued in {queued:.2f} s; tokens {'/'.join(str(state.count) for state in states)}; "
                f"ms a block {', '.join(map(laps, states))}; {in_words(samples, began, ended)}"
            )
            rows.append(row)
            print(row, flush=True)
    record(a.name, "Forward by forward: seconds", rows, append=bool(a.name))


if __name__ == "__main__":
    main()
