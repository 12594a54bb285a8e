"""How much memory a run needs besides the weights. Pure arithmetic; the constants come from measurements.

Shapes: B batch, F latent frames, H/W latent height/width, L tokens, D width.
"""

import math
from dataclasses import dataclass

from .devices import GIB

# A block works on ranges of tokens (transformer/lean_block.py): large enough to fill a GPU, small enough that what stands
# beside the whole tensors hardly counts.
MIN_RANGE_TOKENS = 4096
MAX_RANGES = 8
# In tensors of B*L*D elements in the compute dtype, a block holds most either in attention (hidden state, Q, K, V, result), or
# after it: input, attention's result and output whole, and in the feed-forward so many more of one range (norms and gates
# pass through float32). Counted by tests/engine/transformer; diffusers' own block holds 10.4 whole ones (benchmarks/footprint.py).
ATTENTION_TENSORS = 5.7
WHOLE_TENSORS = 3.2
RANGE_TENSORS = 11.0
# With several devices on every block, each holds everybody's keys and values, and of its own tokens the hidden state, the query and
# attention's result (while its head groups are put together, twice), then the hidden state and the result.
EVERYBODYS_KEYS = 2
OWN_ATTENTION_TENSORS = 4.2
OWN_WHOLE_TENSORS = 2.2
# What torch's allocator holds at a peak, over what is allocated, because freed memory is in pieces of the wrong size: with
# segments that grow, with CUDA's own pool (ComfyUI's default), and with torch's default (benchmarks/whole_run.py).
FRAGMENTATION = 1.1
FRAGMENTATION_ASYNC = 1.4
FRAGMENTATION_NATIVE = 1.4
# Latents, conditions, text embeddings, the solver's history and small change.
RUN_OVERHEAD_BYTES = int(0.25 * GIB)

# Wan 2.1's VAE works frame chunk by frame chunk, so its peak follows the picture's area, not the length. Measured on an
# H200 in float32 (benchmarks/footprint.py): 7.2 / 9.2 GiB for encoding / decoding 480x832x81, 16.1 / 20.7 for 720x1280x81.
VAE_ENCODE_BYTES_PER_PIXEL_FLOAT32 = 16_700
VAE_DECODE_BYTES_PER_PIXEL_FLOAT32 = 22_300
VAE_WEIGHTS_BYTES_FLOAT32 = 508_000_000
# The tile that diffusers decodes at a time (256x256 pixels), used when the whole picture does not fit.
VAE_TILE_PIXELS = 256 * 256


@dataclass(frozen=True)
class VideoShape:
    """The size of one run.

    Attributes:
        width, height: pixels, multiples of 16.
        num_frames: 4n+1.
        batch_size: videos made at once.
    """

    width: int
    height: int
    num_frames: int
    batch_size: int = 1

    @property
    def latent_frames(self) -> int:
        return (self.num_frames - 1) // 4 + 1

    @property
    def tokens(self) -> int:
        """L: patches of 1x2x2 latents, which are 8x8 pixels each."""
        return self.latent_frames * (self.height // 16) * (self.width // 16)

    def __str__(self) -> str:
        batch = f" x{self.batch_size}" if self.batch_size > 1 else ""
        return f"{self.width}x{self.height}x{self.num_frames}{batch}"


def range_tokens(tokens: int) -> int:
    """How many tokens a block works on at a time."""
    return min(tokens, max(MIN_RANGE_TOKENS, -(-tokens // MAX_RANGES)))


def transformer_activation_bytes(
    shape: VideoShape, width: int, element_bytes: int, fragmentation: float = FRAGMENTATION, widened_bytes: int = 0
) -> int:
    """Peak of one forward besides weights, on a device that computes whole blocks.

    Args:
        shape: the run's size.
        width: D, the transformer's inner width (5120 for 14B).
        element_bytes: of the compute dtype.
        fragmentation: of the allocator.
        widened_bytes: what one quantized matrix takes while it is multiplied.
    """
    tokens = max(ATTENTION_TENSORS * shape.tokens, WHOLE_TENSORS * shape.tokens + RANGE_TENSORS * range_tokens(shape.tokens))
    block = tokens * shape.batch_size * width * element_bytes + widened_bytes
    return int(fragmentation * block) + RUN_OVERHEAD_BYTES


def worker_activation_bytes(
    shape: VideoShape,
    width: int,
    element_bytes: int,
    *,
    share: float,
    main: bool,
    fragmentation: float = FRAGMENTATION,
    widened_bytes: int = 0,
) -> int:
    """Peak of one forward besides weights, on one of several devices that compute every block together.

    Args:
        share: the fraction of the tokens it computes.
        main: it hands the tokens out, and holds them all before the blocks.
        shape, width, element_bytes, fragmentation, widened_bytes: as for :func:`transformer_activation_bytes`.
    """
    own = share * shape.tokens
    attention = EVERYBODYS_KEYS * shape.tokens + OWN_ATTENTION_TENSORS * own
    rest = EVERYBODYS_KEYS * shape.tokens + OWN_WHOLE_TENSORS * own + RANGE_TENSORS * range_tokens(math.ceil(own))
    # All tokens, and each worker's copy of its own on the way there, beside the last forward's keys and values.
    handing_out = (EVERYBODYS_KEYS + 2) * shape.tokens if main else 0
    block = max(attention, rest, handing_out) * shape.batch_size * width * element_bytes + widened_bytes
    return int(fragmentation * block) + RUN_OVERHEAD_BYTES


def affordable_range_tokens(own_tokens: int, spare_bytes: int, batch_size: int, width: int, element_bytes: int) -> int:
    """How many tokens a block may work on at a time where more memory is free than was planned for: larger ranges fill a GPU better."""
    per_token = _range_token_bytes(batch_size, width, element_bytes)
    return min(own_tokens, range_tokens(own_tokens) + int(max(0, spare_bytes) / per_token))


def wider_ranges_bytes(own_tokens: int, worked_on: int, batch_size: int, width: int, element_bytes: int) -> int:
    """What working on ``worked_on`` tokens at a time takes over what is planned for."""
    return math.ceil(max(0, worked_on - range_tokens(own_tokens)) * _range_token_bytes(batch_size, width, element_bytes))


def _range_token_bytes(batch_size: int, width: int, element_bytes: int) -> float:
    return RANGE_TENSORS * FRAGMENTATION_NATIVE * batch_size * width * element_bytes


def vae_bytes(shape: VideoShape, *, decode: bool, element_bytes: int, tiled: bool, fragmentation: float = FRAGMENTATION) -> int:
    """Peak of encoding or decoding one video, VAE weights included.

    Args:
        shape: the run's size; the batch is worked through one video at a time.
        decode: decoding rather than encoding.
        element_bytes: of the VAE's dtype.
        tiled: diffusers' spatial tiling is on.
        fragmentation: of the allocator.
    """
    per_pixel = VAE_DECODE_BYTES_PER_PIXEL_FLOAT32 if decode else VAE_ENCODE_BYTES_PER_PIXEL_FLOAT32
    pixels = shape.width * shape.height
    worked = min(pixels, VAE_TILE_PIXELS) if tiled else pixels
    # The video itself, and while it is put together a second copy of it; decoded tiles overlap and all stand beside it.
    copies = 3.2 if tiled and decode else 2
    video = copies * 3 * shape.num_frames * pixels * element_bytes
    return int(fragmentation * ((per_pixel * worked + VAE_WEIGHTS_BYTES_FLOAT32) * element_bytes / 4 + video))


def host_bytes(shape: VideoShape, *, vae_on_host: bool) -> int:
    """System memory that a run's pictures take at their peak, weights aside: all videos in float32, stacked and put in order.

    Args:
        shape: the run's size.
        vae_on_host: the VAE works there too, in tiles if need be.
    """
    frames = 4 * 3 * shape.batch_size * shape.num_frames * shape.width * shape.height * 4
    return frames + (vae_bytes(shape, decode=True, element_bytes=4, tiled=True) if vae_on_host else 0)
