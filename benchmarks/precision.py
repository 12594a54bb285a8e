"""Weights in few bits at the real 14B shape: error of the output, seconds per forward, memory; one GPU.

    python benchmarks/precision.py [--layers 40] [--sizes 832x480x81] [--repeats 3]

Each precision is computed in the two ways there are: widened next to the product, and multiplied by the GPU as it is, which rounds the
activations too. Errors are against diffusers in float32 with the same bf16 weights, at a small size; diffusers' own bf16 stands beside
them. LoRAs beside the product are timed as well.
"""

import argparse

import parallel  # sets the pack up
import torch
from parallel import clean, diffusers_row, relative, sharded_row, timed_forward
from random_expert import diffusers_model, random_inputs
from record import Row, record
from wan_sharded.engine.parallel.workers import Worker
from wan_sharded.engine.weights.precision import Precision

BF16 = torch.bfloat16
SMALL = (832, 480, 17)
WAYS = {
    "bf16": {"precision": Precision(BF16, BF16)},
    "fp8, widened": {"precision": Precision(BF16, torch.float8_e4m3fn)},
    "fp8, multiplied": {"precision": Precision(BF16, torch.float8_e4m3fn), "multiply_few_bits": True},
    "fp8, as measured": {"precision": Precision(BF16, torch.float8_e4m3fn), "multiply_few_bits": None},
    "int8, widened": {"precision": Precision(BF16, torch.int8)},
    "int8, multiplied": {"precision": Precision(BF16, torch.int8), "multiply_few_bits": True},
    "int8, as measured": {"precision": Precision(BF16, torch.int8), "multiply_few_bits": None},
}


def truth(inputs: list[dict], layers: int) -> tuple[list[torch.Tensor], float | None]:
    """The outputs in float32, and the error of diffusers' bf16."""
    exact = [{k: v.float() if v.is_floating_point() else v for k, v in given.items()} for given in inputs]
    _, _, outputs = timed_forward(diffusers_model("cuda:0", num_layers=layers, dtype=torch.float32), exact, 2)
    clean()
    _, _, theirs = timed_forward(diffusers_model("cuda:0", num_layers=layers), inputs, 2)
    clean()
    return outputs, relative(theirs, outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--sizes", default="832x480x81")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="precision", help="of the results file; empty: print only")
    a = parser.parse_args()
    small = [random_inputs(*SMALL, "cuda:0", BF16, seed) for seed in range(3)]
    exact, theirs = truth(small, a.layers)
    case = "x".join(map(str, SMALL))
    rows = [Row(case, "diffusers", 1, "bf16", rel_err=theirs, note="against float32")]
    for what, options in WAYS.items():
        for compiled in (False, True) if "measured" not in what else (True,):
            name = f"wan-sharded {what}, {'compiled' if compiled else 'eager'}"
            workers = [Worker(0, torch.device("cuda:0"))]
            rows.append(sharded_row(case, small, a.layers, 2, workers, what=name, compiled=compiled, reference=exact, **options))
    for size in [tuple(int(n) for n in size.split("x")) for size in a.sizes.split(",")]:
        case = "x".join(map(str, size))
        inputs = [random_inputs(*size, "cuda:0", BF16, seed) for seed in range(2)]
        row, outputs = diffusers_row(case, inputs, a.layers, 2, balanced=False)
        rows.append(row)
        clean()
        for what, options in {
            **WAYS,
            "bf16 + LoRA of rank 64": {"lora_rank": 64},
            "fp8, widened + LoRA of rank 64": {**WAYS["fp8, widened"], "lora_rank": 64},
        }.items():
            reference = None if "LoRA" in what else outputs
            workers = [Worker(0, torch.device("cuda:0"))]
            rows.append(sharded_row(case, inputs, a.layers, a.repeats, workers, what=f"wan-sharded {what}", reference=reference, **options))
    title = "Weights in few bits, one forward: seconds, peak of tensors, error against float32 (small size) or diffusers' bf16"
    record(a.name, title, rows, append=bool(a.name))


if __name__ == "__main__":
    assert parallel
    main()
