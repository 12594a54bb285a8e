"""A server that makes one video after another holds no more memory at the end than soon after its beginning."""

from collections.abc import Callable

import psutil
import pytest
from comfy_server import ComfyServer
from demo import make_prompt, node_of

pytestmark = pytest.mark.slow

MIB = 1024**2
# Width, height, length, batch size, steps: every prompt is of another size than the one before.
SIZES = [(64, 64, 5, 1, 2), (128, 96, 9, 1, 2), (96, 128, 5, 2, 3), (160, 96, 13, 1, 2), (64, 64, 17, 1, 2)]
PROMPTS, SETTLED_AFTER = 30, 15
ALLOWED_GROWTH_BYTES = 8 * MIB
# glibc otherwise keeps freed memory in its heaps, tens of MiB more or less from run to run; tensors shall go back at once.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(MIB // 4), "MALLOC_ARENA_MAX": "2"}


def test_thirty_prompts_of_changing_sizes(start_comfy_server: Callable[..., ComfyServer]) -> None:
    server = start_comfy_server(environment=FREED_AT_ONCE)
    held: list[int] = []
    for number in range(PROMPTS):
        prompt = make_prompt(server)
        width, height, length, batch, steps = SIZES[number % len(SIZES)]
        node_of(prompt, "WanShardedI2VSampler").update(
            width=width, height=height, length=length, batch_size=batch, steps=steps, seed=9000 + number
        )
        server.run(prompt)
        held.append(psutil.Process(server.process_id).memory_info().rss)
    server.stop()
    # The least of several prompts: now and then one is read before its memory has been given back; what leaks stays in all of them.
    early, late = min(held[SETTLED_AFTER - 5 : SETTLED_AFTER]), min(held[-5:])
    assert late - early <= ALLOWED_GROWTH_BYTES, "MiB held: " + " ".join(str(size // MIB) for size in held)
