"""GPUs of different speed on one forward: the last of them is limited to a part of its multiprocessors.

    python benchmarks/unequal.py [--sms 44,66] [--size 832x480x81] [--layers 40]

For each limit: a fast GPU alone, the limited one alone, all together with shares by measured speed, and all with equal shares, as
packs do that split evenly. ``note`` says what the forward takes over 1 / (sum of all speeds), the best there is. The limit is a
green context of the last GPU: kernels queued on its stream have so many multiprocessors. Memory and links stay those of the GPU.
"""

import argparse
import sys

import torch
from parallel import clean, keep_shares, place, relative, settled, timed_forward
from random_expert import random_expert, random_inputs
from record import Row, record
from wan_sharded.engine.parallel.crew import Crew, Share
from wan_sharded.engine.parallel.forward import ParallelForward
from wan_sharded.engine.parallel.functions import BlockFunctions
from wan_sharded.engine.parallel.workers import Worker


def measure(expert, inputs, workers: list[Worker], repeats: int, *, equal: bool = False, staged: bool | None = None):
    """Median seconds of a forward, the outputs, and the shares in words."""
    crew = Crew([Share(worker, 1.0, range_tokens=1 << 30) for worker in workers], workers[0], staged=staged)
    forward = ParallelForward(expert, crew, BlockFunctions(expert.math), forwards_left=lambda: 10**6)
    if equal:
        forward._functions.compile()  # nothing is calibrated here that it would be decided by
        keep_shares(forward, workers)
    settled(forward, inputs[0])  # calibrates, compiles, corrects the shares
    seconds, _, outputs = timed_forward(forward, inputs, repeats)
    busy = "/".join(f"{timing.seconds * 1e3:.1f}" for timing in forward.latest_timings().values())
    words = "equal shares" if equal else "tokens " + "/".join(str(t.tokens) for t in forward.timings)
    return seconds, outputs, f"{words}, busy {busy} ms a block"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sms", default="44,66", help="multiprocessors left to the last GPU")
    parser.add_argument("--size", default="832x480x81")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="unequal", help="of the results file; empty: print only")
    a = parser.parse_args()
    if torch.cuda.device_count() < 2:
        sys.exit("needs two GPUs")
    from torch.cuda.green_contexts import GreenContext

    *fast, slow = (torch.device("cuda", i) for i in range(torch.cuda.device_count()))
    gpus = len(fast) + 1
    inputs = [random_inputs(*(int(n) for n in a.size.split("x")), fast[0], torch.bfloat16, seed) for seed in range(2)]
    rows: list[Row] = []
    expert = random_expert(fast[0], num_layers=a.layers)
    place(expert, fast[:1], fast[0])
    alone, reference, _ = measure(expert, inputs, [Worker(0, fast[0])], a.repeats)
    rows.append(Row(a.size, "fast GPU alone", 1, "bf16", alone))
    print(rows[-1], flush=True)
    for sms in (int(n) for n in a.sms.split(",")):
        place(expert, [slow], slow)
        context = GreenContext.create(num_sms=sms, device_id=slow.index)

        def limited(context=context) -> Worker:
            return Worker(slow.index, slow, context.Stream())

        other, _, _ = measure(expert, inputs, [limited()], a.repeats)
        best = 1 / (len(fast) / alone + 1 / other)
        limit = f"last GPU with {sms} of {torch.cuda.get_device_properties(slow).multi_processor_count} multiprocessors"
        rows.append(Row(a.size, f"limited GPU alone, {sms} multiprocessors", 1, "bf16", other))
        print(rows[-1], flush=True)
        place(expert, [*fast, slow], fast[0])
        for what, options in {
            "wan-sharded": {},
            "wan-sharded, equal shares": {"equal": True},
            "wan-sharded, copies staged": {"staged": True},
        }.items():
            seconds, outputs, words = measure(
                expert, inputs, [*(Worker(device.index, device) for device in fast), limited()], a.repeats, **options
            )
            row = Row(a.size, what, gpus, "bf16", seconds, rel_err=relative(outputs, reference))
            row.note = f"{limit}; {words}; {seconds / best:.3f} of the best, {best:.2f} s"
            rows.append(row)
            print(row, flush=True)
        clean()
    record(a.name, "GPUs of different speed: seconds of one forward", rows, append=bool(a.name))


if __name__ == "__main__":
    main()
