"""How long a forward should take, what holds it up, and which devices had better take part. Pure.

A rough figure from each device's speed at matrix products and each link's speed: good enough to leave a device out that would
slow the others down, and to say what is the bottleneck. Shares are corrected from measured blocks afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .devices import DeviceInfo
from .footprint import VideoShape
from .placement import HOST, Placement
from .shares import proportions

# What a whole forward reaches of a device's speed at matrix products, attention and what stands between them included
# (about two thirds where measured, on an H200).
REACHED_SHARE = 0.65
# A device takes part, and parallel is preferred, unless it makes a forward longer by more than this.
WORSE_BY = 1.03


@dataclass(frozen=True)
class Work:
    """One forward's work.

    Attributes:
        tokens: L times the batch.
        flops: of all blocks.
        exchanged_bytes: keys and values of all tokens and blocks.
    """

    tokens: int
    flops: float
    exchanged_bytes: float

    @classmethod
    def of(cls, shape: VideoShape, *, width: int, ffn_width: int, blocks: int, element_bytes: int) -> "Work":
        tokens = shape.tokens * shape.batch_size
        # Self-attention's four matrices, cross-attention's two, the feed-forward's two; then queries with keys, weights with values.
        per_token = 2 * (6 * width * width + 2 * width * ffn_width) + 4 * shape.tokens * width
        return cls(tokens, float(blocks * tokens * per_token), float(blocks * tokens * 2 * width * element_bytes))


@dataclass(frozen=True)
class Forecast:
    """What is expected of one forward.

    Attributes:
        seconds: how long it takes.
        limit: what holds it up, in words.
        slow_link: the device whose link does, if it is a link.
    """

    seconds: float
    limit: str
    slow_link: DeviceInfo | None = None


def speed_shares(devices: Mapping[int, DeviceInfo]) -> dict[int, float]:
    """Fractions of the tokens in proportion to the devices' speeds; equal ones where a speed is unknown."""
    speeds = {index: device.speed_tflops for index, device in devices.items()}
    if any(not speed for speed in speeds.values()):
        return proportions(dict.fromkeys(devices, 1.0))
    return proportions({index: float(speed or 0) for index, speed in speeds.items()})


def forecast(placement: Placement, devices: Mapping[int, DeviceInfo], work: Work) -> Forecast | None:
    """One forward with a placement; ``None`` where a speed is unknown.

    Args:
        placement: of the working expert.
        devices: those that take part, by visible index.
        work: the forward's.
    """
    if any(not device.speed_tflops for device in devices.values()):
        return None
    return _parallel(placement, devices, work) if placement.parallel else _sequential(placement, devices, work)


def _compute_seconds(device: DeviceInfo, flops: float) -> float:
    return flops / (REACHED_SHARE * 1e12 * float(device.speed_tflops or 1))


def _link_seconds(device: DeviceInfo, nbytes: float) -> float:
    return nbytes / device.link_bytes_per_s if device.link_bytes_per_s else 0.0


def _parallel(placement: Placement, devices: Mapping[int, DeviceInfo], work: Work) -> Forecast:
    shares = speed_shares(devices)
    blocks = [part for part in placement.homes if part.startswith("blocks.")]
    worst = Forecast(0.0, "computing")
    for index, device in devices.items():
        computing = _compute_seconds(device, work.flops * shares[index])
        fetched = sum(placement.sizes[part] for part in blocks if placement.homes[part] != index)
        keys = work.exchanged_bytes * (1 - shares[index]) if len(devices) > 1 else 0.0
        link = _link_seconds(device, fetched + keys)
        if max(computing, link) > worst.seconds:
            words = "computing" if computing >= link else f"the link of {device.label}, {(device.link_bytes_per_s or 0) / 1e9:.1f} GB/s"
            worst = Forecast(max(computing, link), words, device if link > computing else None)
    return worst


def _sequential(placement: Placement, devices: Mapping[int, DeviceInfo], work: Work) -> Forecast:
    blocks = [part for part in placement.homes if part.startswith("blocks.")]
    main, seconds, fetching = devices[placement.main_device], 0.0, 0.0
    for part in blocks:
        home = placement.homes[part]
        device = main if home == HOST else devices[int(home)]
        seconds += _compute_seconds(device, work.flops / len(blocks))
        fetching += _link_seconds(main, placement.sizes[part]) if home == HOST else 0.0
    limit = "computing, one GPU at a time" if seconds >= fetching else f"the link of {main.label}"
    return Forecast(seconds + fetching, limit, main if fetching > seconds else None)
