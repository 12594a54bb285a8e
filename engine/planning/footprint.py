"""How much memory a run needs besides the weights. Pure arithmetic; the constants come from measurements.

Shapes: B batch, F latent frames, H/W latent height/width, L tokens, D width.
"""

from dataclasses import dataclass

from .devices import GIB

# One Wan block at its peak holds about this many tensors of B*L*D elements in the compute dtype (norms, gates and rotary
# embedding pass through float32; the feed-forward is 2.7 D wide). Measured: benchmarks/RESULTS.md, "sequential".
BLOCK_PEAK_TENSORS = 10.0
# Latents, conditions, text embeddings, the solver's history and small change.
RUN_OVERHEAD_BYTES = int(0.25 * GIB)

# Wan 2.1's VAE works frame chunk by frame chunk, so its peak follows the picture's area, not the length. Measured at
# 480x832 and 720x1280 (DESIGN: 7.3 / 9.6 and 16.1 / 21.6 GiB in float32).
VAE_ENCODE_BYTES_PER_PIXEL_FLOAT32 = 18_500
VAE_DECODE_BYTES_PER_PIXEL_FLOAT32 = 25_500
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


def transformer_activation_bytes(shape: VideoShape, width: int, element_bytes: int) -> int:
    """Peak of one forward besides weights, on a device that computes whole blocks.

    Args:
        shape: the run's size.
        width: D, the transformer's inner width (5120 for 14B).
        element_bytes: of the compute dtype.
    """
    return int(BLOCK_PEAK_TENSORS * shape.batch_size * shape.tokens * width * element_bytes) + RUN_OVERHEAD_BYTES


def vae_bytes(shape: VideoShape, *, decode: bool, element_bytes: int, tiled: bool) -> int:
    """Peak of encoding or decoding one video, VAE weights included.

    Args:
        shape: the run's size; the batch is worked through one video at a time.
        decode: decoding rather than encoding.
        element_bytes: of the VAE's dtype.
        tiled: diffusers' spatial tiling is on.
    """
    per_pixel = VAE_DECODE_BYTES_PER_PIXEL_FLOAT32 if decode else VAE_ENCODE_BYTES_PER_PIXEL_FLOAT32
    pixels = shape.width * shape.height
    worked = min(pixels, VAE_TILE_PIXELS) if tiled else pixels
    # The video itself, and while it is put together a second copy of it.
    video = 2 * 3 * shape.num_frames * pixels * element_bytes
    return int((per_pixel * worked + VAE_WEIGHTS_BYTES_FLOAT32) * element_bytes / 4) + video
