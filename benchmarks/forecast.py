"""What a forward is expected to take, and what it takes: with 1 .. N GPUs, copies between them direct and staged; and what `auto` chooses.

    python benchmarks/forecast.py [--size 832x480x81] [--repeats 3] [--copies direct,staged]

Expected as the loader node says it: from matrix products and links that are measured in a moment. Measured with compiled blocks, shares
as they settle, every weight stored once. "staged" is a machine whose GPUs can't reach each other's memory.
"""

import argparse
import sys
from dataclasses import replace

import parallel  # sets the pack up
import torch
from parallel import sharded_row
from random_expert import random_inputs
from record import Row, record
from wan_sharded.engine import probe
from wan_sharded.engine.calibration import model_shape
from wan_sharded.engine.handle import ModelHandle
from wan_sharded.engine.owner import ModelOwner
from wan_sharded.engine.parallel.workers import Worker
from wan_sharded.engine.planning.devices import Links, Machine
from wan_sharded.engine.planning.footprint import VideoShape
from wan_sharded.engine.plans import Plan


def plan_of(machine: Machine, shape: VideoShape, execution: str) -> Plan:
    handle = ModelHandle(model_shape(), "default", "balanced", execution, "auto", {})
    return ModelOwner().dry_plan(handle, machine, shape)


def expected_words(plan: Plan) -> str:
    assert plan.expected is not None
    return f"expected {plan.expected.seconds:.2f} s, the limit is {plan.expected.limit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="832x480x81")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copies", default="direct,staged", help="between GPUs")
    parser.add_argument("--name", default="forecast", help="of the results file; empty: print only")
    a = parser.parse_args()
    if unknown := set(a.copies.split(",")) - {"direct", "staged"}:
        parser.error(f"--copies has {', '.join(sorted(unknown))}; choose from direct, staged")
    size = [int(n) for n in a.size.split("x")]
    gpus = torch.cuda.device_count()
    if gpus < 2:
        sys.exit("needs two GPUs")
    machine = probe.probe_machine()
    direct = ", ".join(f"{one} to {other} {speed / 1e9:.0f}" for (one, other), speed in machine.links.direct.items())
    own = ", ".join(f"{(device.link_bytes_per_s or 0) / 1e9:.0f}" for device in machine.devices)
    print(f"links in GB/s: {own}; {direct}; together {(machine.links.together_bytes_per_s or 0) / 1e9:.0f}", flush=True)
    inputs = [random_inputs(*size, "cuda:0", torch.bfloat16, seed) for seed in range(2)]
    rows: list[Row] = []
    measured: dict[int, float | None] = {}
    for way in a.copies.split(","):
        staged = way == "staged"
        links = machine.links if not staged else Links(together_bytes_per_s=machine.links.together_bytes_per_s)
        for count in range(1, gpus + 1):
            if count == 1 and measured:
                continue
            some = replace(machine, devices=machine.devices[:count], links=links)
            expected = expected_words(plan_of(some, VideoShape(*size), "parallel"))
            print(f"{way}, {count} GPU{'s' if count > 1 else ''}: {expected}", flush=True)
            workers = [Worker(device.index, torch.device(device.torch_device)) for device in some.devices]
            row = sharded_row(a.size, inputs, a.layers, a.repeats, workers, what=way if count > 1 else "alone", staged=staged)
            row.note = f"{expected}; {row.note}"
            rows.append(row)
            measured[count] = row.seconds
        chosen = plan_of(replace(machine, links=links), VideoShape(*size), "auto")
        count = len(chosen.budgets)
        note = f"{count} GPUs; {expected_words(chosen)}; measured with {', '.join(f'{n}: {s or 0:.2f} s' for n, s in measured.items())}"
        rows.append(Row(a.size, f"auto, {way}", count, "bf16", measured[count], note=note))
        print(rows[-1], flush=True)
    record(a.name, "What is expected of a forward, and what it takes: seconds", rows, append=bool(a.name))


if __name__ == "__main__":
    assert parallel
    main()
