"""How long a forward should take, what holds it up, and which devices had better take part. Pure.

A rough figure from each device's speed at matrix products and the links' speeds: good enough to leave a device out that would
slow the others down, and to say what is the bottleneck. Shares are corrected from measured blocks afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, median_high

from .devices import DeviceInfo, Links
from .footprint import VideoShape
from .placement import HOST, Placement
from .shares import proportions

# What a whole forward reaches of a device's speed at matrix products, attention and what stands between them included (0.69 of it plain, 0.71
# to 0.81 compiled, where measured, on one to four H200s).
REACHED_SHARE = 0.7
# And of what copies of all GPUs reach together where they do nothing else (0.73 to 0.83 with three and four staged H200s, where system
# memory, or what they share on the way there, carried half of what their links could take both ways). The nearer it comes to that, the more
# is assumed. Of fewer GPUs than were measured as much is assumed as of all.
REACHED_TOGETHER, SHARED = 2 / 3, 0.6
# Where they reach more than this of what their links could take, the links are all there is to say.
LINKS_TOGETHER = 0.75
# A device takes part, and parallel is preferred, unless it makes a forward longer by more than this.
WORSE_BY = 1.03
# GPUs of one name that were measured no further from most of them count as equal: a moment's measuring says no more, and shares that are off
# by 1 % cost equal GPUs more than that.
ALIKE = 0.05
NO_LINKS = Links()


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
        slow_together: whether it is what all of them can copy from and to system memory.
    """

    seconds: float
    limit: str
    slow_link: DeviceInfo | None = None
    slow_together: bool = False


def speed_shares(devices: Mapping[int, DeviceInfo]) -> dict[int, float]:
    """Fractions of the tokens in proportion to the devices' speeds; equal ones where a speed is unknown, and for devices of one kind that are
    about as fast."""
    speeds = {index: float(device.speed_tflops or 0) for index, device in devices.items()}
    if not all(speeds.values()):
        return proportions(dict.fromkeys(devices, 1.0))
    kinds: dict[str, list[int]] = {}
    for index, device in devices.items():
        kinds.setdefault(device.name, []).append(index)
    for kind in kinds.values():
        usual = median_high(speeds[index] for index in kind)
        alike = [index for index in kind if abs(speeds[index] - usual) <= ALIKE * usual]
        speeds.update(dict.fromkeys(alike, mean(speeds[index] for index in alike)))
    return proportions(speeds)


def forecast(
    placement: Placement, devices: Mapping[int, DeviceInfo], work: Work, links: Links = NO_LINKS, shares: Mapping[int, float] | None = None
) -> Forecast | None:
    """One forward with a placement; ``None`` where a speed is unknown.

    Args:
        placement: of the working expert.
        devices: those that take part, by visible index.
        work: the forward's.
        links: between the devices; what goes no direct way goes through system memory.
        shares: the devices' fractions of the tokens; by default those of their speeds.
    """
    if any(not device.speed_tflops for device in devices.values()):
        return None
    if not placement.parallel:
        return _sequential(placement, devices, work)
    return _parallel(placement, devices, work, links, shares or speed_shares(devices))


def _compute_seconds(device: DeviceInfo, flops: float) -> float:
    return flops / (REACHED_SHARE * 1e12 * float(device.speed_tflops or 1))


def _link_seconds(device: DeviceInfo, nbytes: float) -> float:
    return nbytes / device.link_bytes_per_s if device.link_bytes_per_s else 0.0


def _parallel(placement: Placement, devices: Mapping[int, DeviceInfo], work: Work, links: Links, shares: Mapping[int, float]) -> Forecast:
    blocks = [part for part in placement.homes if part.startswith("blocks.")]
    at_home = {home: sum(placement.sizes[part] for part in blocks if placement.homes[part] == home) for home in (HOST, *devices)}
    worst, copied = Forecast(0.0, "computing"), 0.0
    for index, device in devices.items():
        relayed, direct = 0.0, 0.0
        for other in devices:
            if other != index:
                nbytes = at_home[other] + work.exchanged_bytes * shares[other]
                speed = links.direct.get((other, index))
                direct += nbytes / speed if speed else 0.0
                relayed += 0.0 if speed else nbytes
        # What is relayed is written to system memory, too.
        copied += at_home[HOST] + 2 * relayed
        through_memory = _link_seconds(device, at_home[HOST] + relayed)
        computing = Forecast(_compute_seconds(device, work.flops * shares[index]), "computing")
        # The ways into a GPU may be one and the same.
        linked = Forecast(through_memory + direct, _link_words(device, direct > through_memory), device)
        worst = max(worst, computing, linked, key=lambda found: found.seconds)
    together = _together_seconds(copied, devices, links)
    if together <= worst.seconds:
        return worst
    if _of_their_links(devices, links) > LINKS_TOGETHER:
        slowest = min(devices.values(), key=lambda device: float(device.link_bytes_per_s or 0))
        return Forecast(together, _link_words(slowest, direct=False), slowest)
    carried = float(links.together_bytes_per_s or 0) / 1e9
    return Forecast(together, f"what the GPUs copy from and to system memory together, {carried:.1f} GB/s", slow_together=True)


def _of_their_links(devices: Mapping[int, DeviceInfo], links: Links) -> float:
    """What all GPUs copy together, of what their links could take both ways; 1 where that is not known."""
    both_ways = sum(2 * (device.link_bytes_per_s or 0) for device in devices.values())
    return min(1.0, links.together_bytes_per_s / both_ways) if links.together_bytes_per_s and both_ways else 1.0


def _together_seconds(copied_bytes: float, devices: Mapping[int, DeviceInfo], links: Links) -> float:
    if not links.together_bytes_per_s or len(devices) < 2:
        return 0.0
    nearer = max(0.0, _of_their_links(devices, links) - SHARED) / (1 - SHARED)
    reached = REACHED_TOGETHER + (1 - REACHED_TOGETHER) * nearer
    return copied_bytes / (reached * links.together_bytes_per_s)


def _link_words(device: DeviceInfo, direct: bool) -> str:
    if direct:
        return f"the link from the other GPUs to {device.label}"
    return f"the link of {device.label}, {(device.link_bytes_per_s or 0) / 1e9:.1f} GB/s"


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
