"""What copies between two GPUs add to a block: directly and staged through system memory, with and without what travels.

    python benchmarks/links.py [--layers 12] [--size 832x480x81]

Half of the blocks live on either GPU, so a block's weights come from the other GPU for one of the two, beside keys and values for both.
"Not held back" lets whole blocks set out as soon as there is a buffer for them; this pack holds most of a block back until the keys and
values of the block before have arrived (engine/parallel/fetching.py). Seconds are per block.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from unittest import mock

import torch
from parallel import keep_shares, place
from random_expert import random_expert, random_inputs
from record import Row, record
from wan_sharded.engine.parallel import blocks as blocks_module
from wan_sharded.engine.parallel import fetching as fetching_module
from wan_sharded.engine.parallel.crew import Crew, Share
from wan_sharded.engine.parallel.fetching import Fetcher
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.parallel.workers import Worker

CPU = torch.device("cpu")


def _not_copied(fetcher: Fetcher, slot_number: int) -> None:
    """In place of a block that sets out: whatever the buffer has."""
    if fetcher._started < len(fetcher._order):
        block = fetcher._order[fetcher._started]
        fetcher._started += 1
        fetcher._arriving[block] = (slot_number, fetcher._worker.mark())


def _not_pulled(loop, reader, writer, group: int) -> None:
    """In place of a pull of keys and values: whatever the reader's copy has."""
    reader.arrived[group].append(None)


@contextmanager
def changed(*, weights: bool, keys: bool, held_back: bool) -> Iterator[None]:
    """Forwards that leave some of the copies out, or let them go at once."""
    with (
        mock.patch.object(Fetcher, "_start", Fetcher._start if weights else _not_copied),
        mock.patch.object(blocks_module.BlockLoop, "_pull", blocks_module.BlockLoop._pull if keys else _not_pulled),
        mock.patch.object(fetching_module, "AHEAD_SHARE", fetching_module.AHEAD_SHARE if held_back else 1),
    ):
        yield


def block_seconds(expert, inputs: list[dict], devices: list[torch.device], staged: bool, repeats: int, **changes: bool) -> list[float]:
    """Seconds per block of forwards with equal shares, compiled."""
    workers = [Worker(index, device) for index, device in enumerate(devices)]
    crew = Crew([Share(worker, 1.0, range_tokens=1 << 30) for worker in workers], workers[0], staged=staged)
    forward = ParallelForward(expert, crew, BlockFunctions(expert.math), forwards_left=lambda: 10**6)
    keep_shares(forward, workers)
    forward._functions.compile()
    seconds = []
    with torch.inference_mode():
        forward(**inputs[0], return_dict=False)
        with changed(**{"weights": True, "keys": True, "held_back": True, **changes}):
            for number in range(repeats + 1):
                crew.settle()
                began = time.perf_counter()
                forward(**inputs[number % len(inputs)], return_dict=False)
                crew.settle()
                seconds.append((time.perf_counter() - began) / len(expert.model.blocks))
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", default="832x480x81")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="links", help="of the results file; empty: print only")
    a = parser.parse_args()
    if torch.cuda.device_count() < 2:
        sys.exit("needs two GPUs")
    devices = [torch.device("cuda", index) for index in range(2)]
    inputs = [random_inputs(*(int(n) for n in a.size.split("x")), devices[0], torch.bfloat16, seed) for seed in range(2)]
    expert = random_expert(devices[0], num_layers=a.layers)
    rows = []
    for homes, where in ((devices, "half of the blocks on either GPU"), ([CPU], "all blocks in system memory")):
        place(expert, homes, devices[0])
        for staged in (False, True):
            for what, changes in {
                "all copies": {},
                "weights not held back": {"held_back": False},
                "no weights": {"weights": False},
                "no keys and values": {"keys": False},
            }.items():
                seconds = block_seconds(expert, inputs, devices, staged, a.repeats, **changes)
                row = Row(a.size, f"{'staged' if staged else 'direct'}, {what}", 2, "bf16", median(seconds))
                row.note = f"{where}; {' '.join(f'{s * 1e3:.1f}' for s in seconds)} ms"
                rows.append(row)
                print(row, flush=True)
    record(a.name, "Copies between two GPUs: seconds of one block", rows, append=bool(a.name))


if __name__ == "__main__":
    main()
