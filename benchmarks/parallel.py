"""Seconds per forward of one 14B expert: this pack on one GPU and on all, beside diffusers' ways, in one run on one machine.

    python benchmarks/parallel.py [--sizes 832x480x81,1280x720x81] [--layers 40] [--without ulysses,device_map]

Compares diffusers on one GPU, ``device_map="balanced"``, diffusers' Ulysses attention with FSDP (a process per GPU, NCCL), and this
pack with 1 .. N GPUs, every weight stored once; on one GPU also with all blocks in system memory, and, where there is but one, as two
workers of it, which shows that the parts work together and not how fast. Where FlashAttention 3 is installed (pip install fa3-fwd), this
pack chooses it; then rows show diffusers with it too, and this pack without. Outputs are compared with diffusers' bf16 at the same size, and, at a small size
and ten layers, with diffusers in float32. Fails where they don't agree.
"""

import argparse
import gc
import os
import queue
import sys
import time
import traceback
from pathlib import Path
from statistics import median
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
pack = ModuleType("wan_sharded")
pack.__path__ = [str(ROOT)]
sys.modules["wan_sharded"] = pack
sys.path.insert(0, str(ROOT / "benchmarks"))

from flash_3 import DIFFUSERS_BACKEND, attention_by, flash_3_here, offer_to_diffusers  # noqa: E402

offer_to_diffusers()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from random_expert import diffusers_model, random_expert, random_inputs, random_lora  # noqa: E402
from record import Row, record  # noqa: E402
from wan_sharded.engine.parallel.crew import Crew, Share  # noqa: E402
from wan_sharded.engine.parallel.forward import ParallelForward  # noqa: E402
from wan_sharded.engine.parallel.functions import BlockFunctions, can_compile  # noqa: E402
from wan_sharded.engine.parallel.workers import Worker, new_stream  # noqa: E402
from wan_sharded.engine.transformer.self_attention import choices  # noqa: E402
from wan_sharded.engine.weights.precision import Precision  # noqa: E402

GIB = 1024**3
# So many with the same shares, and at most so many until then.
SETTLED_FORWARDS, SETTLING_FORWARDS = 5, 12
CPU = torch.device("cpu")
# Compiling alone moves outputs of random weights by 1.7e-2 from those of bf16; and of an error against float32, over diffusers' own bf16.
AGREES_WITH_BF16, OF_ITS_ERROR = 2e-2, 1.1


def timed_forward(call, inputs: list[dict], repeats: int) -> tuple[float, float, list[torch.Tensor]]:
    """Median seconds of one forward, median seconds until the host had queued it, and the outputs for each input; one warm-up."""
    seconds, queued, outputs = [], [], []
    for number in range(repeats + 1):
        given = inputs[number % len(inputs)]
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        with torch.inference_mode():
            output = call(**given, return_dict=False)[0]
        queued.append(time.perf_counter() - began)
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        if number < len(inputs):
            outputs.append(output.float().cpu())
    print("forward by forward:", " ".join(f"{one:.3f}" for one in seconds), "s", flush=True)
    return median(seconds[1:]), median(queued[1:]), outputs


def settled(forward: ParallelForward, given: dict) -> list[int]:
    """Tokens of each worker once forwards don't change them any more."""
    tokens: list[list[int]] = []
    with torch.inference_mode():
        while len(tokens) < SETTLED_FORWARDS or (
            len(tokens) < SETTLING_FORWARDS and any(t != tokens[-1] for t in tokens[-SETTLED_FORWARDS:])
        ):
            forward(**given, return_dict=False)
            tokens.append([timing.tokens for timing in forward.latest_timings().values()])
            if len(tokens[0]) == 1:
                break
    return tokens[-1]


def keep_shares(forward: ParallelForward, workers: list[Worker]) -> None:
    """Have forwards neither calibrate nor change shares."""
    for worker in workers:
        worker.is_timed = True
    forward._crew.measured.worthwhile_gain = lambda forward_seconds: 1.0  # nothing gains all of it


def relative(ours: list[torch.Tensor], theirs: list[torch.Tensor] | None) -> float | None:
    if not theirs:
        return None
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


class PeakBytes:
    """What the allocator held at most on each GPU while inside."""

    def __enter__(self):
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
        return self

    def __exit__(self, *_):
        self.gib = [torch.cuda.max_memory_allocated(device) / GIB for device in range(torch.cuda.device_count())]


def diffusers_row(
    case: str, inputs: list[dict], layers: int, repeats: int, *, balanced: bool = False, flash: bool = False
) -> tuple[Row, list[torch.Tensor]]:
    """diffusers eager on one GPU, or with its blocks shared out evenly over all GPUs by accelerate; with FlashAttention 3 if told so."""
    gpus = torch.cuda.device_count() if balanced else 1
    row = Row(case, ("device_map" if balanced else "diffusers") + ", FlashAttention 3" * flash, gpus, "bf16")
    if balanced:
        from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
        from diffusers import WanTransformer3DModel
        from wan_sharded.engine.weights.drawn import WAN_14B

        with init_empty_weights():
            empty = WanTransformer3DModel(**{**WAN_14B, "num_layers": layers}).to(torch.bfloat16)
        share = sum(p.nbytes for p in empty.parameters()) / gpus * 1.03
        device_map = infer_auto_device_map(
            empty, max_memory=dict.fromkeys(range(gpus), int(share)) | {gpus - 1: 10**12}, no_split_module_classes=["WanTransformerBlock"]
        )

        def where(name: str) -> str:
            found = max((part for part in device_map if name == part or name.startswith(f"{part}.") or part == ""), key=len)
            return f"cuda:{device_map[found]}"

        model = dispatch_model(diffusers_model(where, num_layers=layers), device_map)
    else:
        model = diffusers_model("cuda:0", num_layers=layers)
    if flash:
        model.set_attention_backend(DIFFUSERS_BACKEND)
    with PeakBytes() as peak:
        row.seconds, _, outputs = timed_forward(model, inputs, repeats)
    row.peak_gib = peak.gib[:gpus]
    return row, outputs


def sharded_row(
    case: str,
    inputs: list[dict],
    layers: int,
    repeats: int,
    workers: list[Worker],
    *,
    what: str = "wan-sharded",
    compiled: bool = True,
    homes: list[torch.device] | None = None,
    staged: bool | None = None,
    reference: list[torch.Tensor] | None = None,
    range_tokens: int = 1 << 30,
    expert=None,
    precision: Precision | None = None,
    multiply_few_bits: bool | None = False,
    lora_rank: int = 0,
) -> Row:
    """This pack with these workers; blocks live on their devices in turn, or where ``homes`` says."""
    row = Row(case, what, len({w.device for w in workers}), str(precision or "bf16").split()[0])
    crew = forward = None
    try:
        expert = expert or random_expert(torch.device("cuda:0"), num_layers=layers, precision=precision)
        if lora_rank:
            expert.use_loras([random_lora(expert, lora_rank)])
        homes = homes or [w.device for w in workers]
        place(expert, homes, workers[0].device)
        crew = Crew(
            [Share(worker, 1.0, range_tokens=range_tokens, multiply_few_bits=multiply_few_bits) for worker in workers],
            workers[0],
            staged=staged,
        )
        functions = BlockFunctions(expert.math)
        forward = ParallelForward(expert, crew, functions, forwards_left=lambda: 10**6 if compiled else 0)
        began = time.perf_counter()
        with torch.inference_mode():
            forward(**inputs[0], return_dict=False)
        torch.cuda.synchronize()
        first = time.perf_counter() - began
        settled(forward, inputs[0])
        with PeakBytes() as peak:
            row.seconds, queued, outputs = timed_forward(forward, inputs, repeats)
        row.peak_gib = peak.gib[: row.gpus]
        row.rel_err = relative(outputs, reference)
        shares = "/".join(str(t.tokens) for t in forward.timings)
        busy = "/".join(f"{t.seconds * 1e3:.1f}" for t in forward.timings)
        flash = "; attention by FlashAttention 3" * any(
            choice.flash for choice in choices((w.device for w in workers), torch.bfloat16).values()
        )
        chosen = "" if multiply_few_bits is not None else f"few bits multiplied: {crew.shares[0].multiplies_few_bits(expert.name)}; "
        row.note = f"{chosen}{'compiled' if functions.compiled else 'eager'}; first {first:.1f} s; queued in {queued:.2f} s; tokens {shares}, busy {busy} ms a block{flash}"
        if functions.failure:
            row.note += f"; compiling failed: {functions.failure[:150]}"
    except Exception as error:
        traceback.print_exc()
        row.note = f"FAILED: {type(error).__name__}: {str(error)[:200]}"
    print(row, flush=True)
    del crew, forward, expert
    clean()
    return row


def place(expert, homes: list[torch.device], main: torch.device) -> None:
    """Blocks to these homes in turn, runs of neighbours together; everything else to the main device."""
    blocks = [part for part in expert.parts if part.startswith("blocks.")]
    for part in expert.parts:
        home = homes[blocks.index(part) * len(homes) // len(blocks)] if part in blocks else main
        expert.bring(part, home, main, packed=True if part in blocks else None)


def ulysses_process(rank: int, world: int, sizes: list[tuple[int, int, int]], layers: int, repeats: int, fsdp: bool, results) -> None:
    """One process of diffusers' context parallelism."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29531")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=world, device_id=device)
    from diffusers import ContextParallelConfig
    from torch.distributed.fsdp import fully_shard

    model = diffusers_model(device, num_layers=layers)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    if fsdp:
        for block in model.blocks:
            fully_shard(block, ignored_params={p for p in block.parameters() if p.dtype == torch.float32})
    for size in sizes:
        inputs = [random_inputs(*size, device, torch.bfloat16, seed) for seed in range(2)]
        dist.barrier()
        with PeakBytes() as peak:
            seconds, _, outputs = timed_forward(model, inputs, repeats)
        peaks: list = [None] * world
        dist.all_gather_object(peaks, peak.gib[rank])
        if rank == 0:
            results.put((size, seconds, peaks, outputs))
    dist.barrier()
    dist.destroy_process_group()


def result_of(running: mp.ProcessContext, results, seconds: float = 240) -> tuple:
    """The next result of these processes; raises what one of them raised."""
    ends = time.perf_counter() + seconds
    while True:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            running.join(timeout=0)
            if time.perf_counter() > ends:
                raise


def ulysses_rows(sizes: list[tuple[int, int, int]], layers: int, repeats: int, references: dict, *, fsdp: bool) -> list[Row]:
    """By torch's attention: diffusers can't shard FlashAttention 3 that is installed."""
    world = torch.cuda.device_count()
    context = mp.get_context("spawn")
    results = context.Queue()
    what = "ulysses_fsdp" if fsdp else "ulysses"
    rows = []
    try:
        running = mp.spawn(ulysses_process, (world, sizes, layers, repeats, fsdp, results), nprocs=world, join=False)
        for _ in sizes:
            size, seconds, peaks, outputs = result_of(running, results)
            row = Row("x".join(map(str, size)), what, world, "bf16", seconds, peaks)
            row.rel_err = relative(outputs, references.get(size))
            rows.append(row)
            print(row, flush=True)
        while not running.join():
            pass
    except Exception as error:
        traceback.print_exc()
        rows.append(Row("", what, world, "bf16", note=f"FAILED: {type(error).__name__}: {str(error)[:200]}"))
    return rows


def precision_rows(layers: int = 10) -> list[Row]:
    """Errors against diffusers in float32 at a small size: diffusers' bf16, this pack's bf16 plain and compiled, alone and as two workers."""
    size = (832, 480, 17)
    case = "x".join(map(str, size))
    inputs = [random_inputs(*size, "cuda:0", torch.bfloat16, seed) for seed in range(3)]
    exact = [{k: v.float() if v.is_floating_point() else v for k, v in given.items()} for given in inputs]
    _, _, truth = timed_forward(diffusers_model("cuda:0", num_layers=layers, dtype=torch.float32), exact, 2)
    clean()
    _, _, theirs = timed_forward(diffusers_model("cuda:0", num_layers=layers), inputs, 2)
    clean()
    rows = [Row(case, "diffusers", 1, "bf16", rel_err=relative(theirs, truth), note=f"against float32, {layers} layers")]
    device = torch.device("cuda:0")
    for compiled in (False, True):
        for count in (1, 2):
            workers = [Worker(i, device, new_stream(device) if count > 1 else None) for i in range(count)]
            what = f"wan-sharded {'compiled' if compiled else 'eager'}, {count} worker{'s' if count > 1 else ''} of one GPU"
            row = sharded_row(case, inputs, layers, 2, workers, what=what, compiled=compiled, reference=truth)
            row.seconds, row.peak_gib = None, []
            rows.append(row)
    return rows


def disagreements(rows: list[Row], most: float) -> list[str]:
    """Those that failed or are further from what they were compared with than that."""
    return [
        f"{row.case} {row.what}: error {row.rel_err}, at most {most:.2e}; {row.note}"
        for row in rows
        if row.note.startswith("FAILED") or (row.rel_err is not None and not row.rel_err <= most)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="832x480x81,1280x720x81")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--without",
        default="",
        help="cases to leave out, by what stands between the commas of their names: ulysses,device_map,eager,1 GPU,...",
    )
    parser.add_argument("--no-precision", action="store_true")
    parser.add_argument("--name", default="parallel", help="of the results file; empty: print only")
    a = parser.parse_args()
    sizes = [tuple(int(n) for n in size.split("x")) for size in a.sizes.split(",")]
    gpus = torch.cuda.device_count()
    devices = [torch.device("cuda", i) for i in range(gpus)]
    rows: list[Row] = []
    small = [] if a.no_precision else precision_rows()
    references: dict = {}
    flash = flash_3_here()
    print(f"can compile: {can_compile()}; FlashAttention 3: {flash}", flush=True)
    left_out = [name for name in a.without.split(",") if name]

    def wanted(what: str) -> bool:
        return not set(what.split(", ")).intersection(left_out)

    for size in sizes:
        case = "x".join(map(str, size))
        inputs = [random_inputs(*size, "cuda:0", torch.bfloat16, seed) for seed in range(2)]
        if wanted("diffusers"):
            row, references[size] = diffusers_row(case, inputs, a.layers, a.repeats)
            rows.append(row)
            print(row, flush=True)
            clean()
        if flash and wanted("diffusers, FlashAttention 3"):
            row, outputs = diffusers_row(case, inputs, a.layers, a.repeats, flash=True)
            row.rel_err = relative(outputs, references.get(size))
            rows.append(row)
            print(row, flush=True)
            clean()
        if gpus > 1 and wanted("device_map"):
            row, _ = diffusers_row(case, inputs, a.layers, 2, balanced=True)
            rows.append(row)
            print(row, flush=True)
            clean()
        cases: list[tuple[list[Worker], dict]] = []
        for count in sorted({1, 2, gpus} & set(range(1, gpus + 1))):
            what = f"wan-sharded, {count} GPU{'s' if count > 1 else ''}"
            cases.append(([Worker(i, devices[i]) for i in range(count)], {"what": what}))
            if flash and (count == 1 or size == sizes[0]):
                cases.append(([Worker(i, devices[i]) for i in range(count)], {"what": f"{what}, torch's attention"}))
        if gpus > 1:
            for options in ({"what": "wan-sharded, copies staged", "staged": True}, {"what": "wan-sharded, eager", "compiled": False}):
                cases.append(([Worker(i, devices[i]) for i in range(2)], options))
        if size == sizes[0]:
            first: list[dict] = [{"what": "wan-sharded, eager, 1 GPU", "compiled": False}]
            first.append({"what": "wan-sharded, all blocks in system memory", "homes": [CPU]})
            cases += [([Worker(0, devices[0])], options) for options in first]
        if size == sizes[0] and gpus == 1:
            shared_by_two: list[dict] = [{"what": "wan-sharded, two workers of one GPU"}]
            shared_by_two.append({"what": "wan-sharded, two workers of one GPU, staged", "homes": [CPU, devices[0]], "staged": True})
            cases += [([Worker(i, devices[0], new_stream(devices[0])) for i in range(2)], options) for options in shared_by_two]
        for workers, options in cases:
            if wanted(options["what"]):
                with attention_by(torch_alone=options["what"].endswith("torch's attention")):
                    rows.append(sharded_row(case, inputs, a.layers, a.repeats, workers, reference=references.get(size), **options))
    for fsdp in (True, False) if gpus > 1 else ():
        if wanted("ulysses_fsdp" if fsdp else "ulysses"):
            rows += ulysses_rows(sizes, a.layers, a.repeats, references, fsdp=fsdp)
    record(a.name, "One forward: seconds, peak of tensors on each GPU, error against diffusers' bf16", small + rows, append=bool(a.name))
    found = disagreements(rows, AGREES_WITH_BF16)
    if small:
        found += disagreements(small, OF_ITS_ERROR * (small[0].rel_err or 0.0))
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
