"""A server that makes one video after another holds no more memory at the end than soon after its beginning."""

import psutil
import pytest
from comfy_server import ComfyServer
from demo import make_prompt, node_of

pytestmark = pytest.mark.slow

MIB = 1024**2
# Width, height, length, batch size, steps: every prompt is of another size than the one before.
SIZES = [(64, 64, 5, 1, 2), (128, 96, 9, 1, 2), (96, 128, 5, 2, 3), (160, 96, 13, 1, 2), (64, 64, 17, 1, 2)]
PROMPTS, SETTLED_AFTER = 30, 15
ALLOWED_GROWTH_BYTES = 20 * MIB


def test_thirty_prompts_of_changing_sizes(comfy_server: ComfyServer) -> None:
    held: list[int] = []
    for number in range(PROMPTS):
        prompt = make_prompt(comfy_server)
        width, height, length, batch, steps = SIZES[number % len(SIZES)]
        node_of(prompt, "WanShardedI2VSampler").update(
            width=width, height=height, length=length, batch_size=batch, steps=steps, seed=9000 + number
        )
        comfy_server.run(prompt)
        held.append(psutil.Process(comfy_server.process_id).memory_info().rss)
    # The most of several prompts, since one may end before the memory of another size is given back.
    early, late = max(held[SETTLED_AFTER - 5 : SETTLED_AFTER]), max(held[-5:])
    assert late - early <= ALLOWED_GROWTH_BYTES, [size // MIB for size in held]
