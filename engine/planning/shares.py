"""How many tokens each device computes. Pure."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

# Shares that would save less than this stay as they are: every change of sizes costs the allocator and the kernels something.
WORTHWHILE_GAIN = 0.01
# What one forward takes varies by some percent, so after a single one so much more must be expected to be gained, after n over the root of n.
DOUBT = 0.05
# Of forwards that take longer than this, in seconds, less is doubted: what a change that was not needed costs does not grow with them.
SHORT_FORWARD = 8.0
# Forwards that are looked at, so that it is never less than 1.8 %.
REMEMBERED = 40
# A device that takes so much more or less than before, twice in a row, does so for a reason: what was before does not count any more.
CHANGED = 0.06
# GPUs at the limit of their power seem to compute the faster the longer they wait, so that shares which follow all of what was measured
# swing to the other side. So much of a difference is followed: a third of it is left at most, whether speeds stay as they are, or each is in
# inverse proportion to the share. What gains more than this has another reason, the first times.
FOLLOWED = 2 / 3
SMALL_GAIN = 0.1
# Where shares are changed again and again, twice and then three times as much is doubted.
MOST_DOUBTS = 3


def share_tokens(tokens: int, weights: Sequence[float], most: Sequence[float] | None = None) -> list[int]:
    """Share tokens out in proportion to speeds.

    Args:
        tokens: L, above 0.
        weights: one per device, 0 or more, in any unit of speed; not all 0.
        most: the largest fraction each device may take (its memory's limit); their sum is 1 or more. Default: all of it.

    Returns:
        Tokens per device, in the same order; their sum is ``tokens``.

    Raises:
        ValueError: no speed is above 0, or the limits leave tokens over.
    """
    limits = [1.0] * len(weights) if most is None else list(most)
    if not any(weight > 0 for weight in weights) or min(weights) < 0:
        raise ValueError(f"speeds are {list(weights)}; at least one must be above 0, and none below")
    if sum(limits) < 1 - 1e-9:
        raise ValueError(f"the largest shares {limits} leave tokens over")
    fractions = within_limits([weight / sum(weights) for weight in weights], limits)
    # Ends of the ranges are rounded, so that the sum is exact and no device is off by more than one.
    ends = [round(tokens * sum(fractions[: i + 1])) for i in range(len(fractions))]
    ends[-1] = tokens
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def within_limits(fractions: Sequence[float], limits: Sequence[float]) -> list[float]:
    """Fractions cut to their limits, what is cut off going to the others in proportion. Limits whose sum is below 1 leave some over."""
    free = set(range(len(fractions)))
    result = list(fractions)
    while True:
        over = [i for i in free if result[i] > limits[i] + 1e-12]
        if not over:
            return result
        for i in over:
            result[i] = limits[i]
            free.discard(i)
        left = 1 - sum(result[i] for i in range(len(result)) if i not in free)
        total = sum(fractions[i] for i in free)
        for i in free:
            result[i] = left * (fractions[i] / total if total > 0 else 1 / len(free))


class MeasuredSeconds:
    """How long devices were busy with their shares in the forwards since the shares were last changed.

    Shares that follow every single forward never settle, and each change of sizes makes the allocators ask for memory anew. The first
    forward of new sizes is not looked at: it may hold devices up, and those that were held up compute faster for a moment (their limit is
    power), so that shares would change again by what was measured in it.
    """

    def __init__(self) -> None:
        self._shares: tuple[int, ...] = ()
        self._seconds: deque[tuple[float, ...]] = deque(maxlen=REMEMBERED)
        # How often the shares of this many tokens were changed, without a reason that is known; the first time, by a calibration, is none.
        self._changes = -1

    def forget(self) -> None:
        """What was measured does not hold any more, nor what it was measured of."""
        self._shares, self._changes = (), -1
        self._seconds.clear()

    def add(self, shares: Sequence[int], seconds: Sequence[float]) -> None:
        """One more forward's tokens and seconds of each device."""
        before, self._shares = self._shares, tuple(shares)
        if before and before != self._shares:
            self._changes = self._changes + 1 if sum(before) == sum(self._shares) else -1
            self._seconds.clear()
            return
        self._seconds.append(tuple(seconds))
        latest = list(self._seconds)[-2:]
        before = list(self._seconds)[:-2]
        if before and any(_changed(usual, *now) for usual, *now in zip(_usual(before), *latest, strict=True)):
            self._seconds, self._changes = deque(latest, maxlen=REMEMBERED), -1

    @property
    def usual(self) -> list[float]:
        """Seconds of each device: the median, of an even number the lower one, since what is odd takes longer. Nothing is known yet: none."""
        return _usual(self._seconds)

    @property
    def all_from(self) -> float:
        """What must be expected to be gained for all of a difference to be followed: where shares were changed before, nothing is enough."""
        return SMALL_GAIN if self._changes <= 0 else 1.0

    def worthwhile_gain(self, forward_seconds: float) -> float:
        """What must be expected to be gained by other shares, of a forward's time: less where more forwards were measured, or long ones;
        more where shares were changed before, and should have been right then.

        Args:
            forward_seconds: what a forward takes.
        """
        doubt = DOUBT * min(MOST_DOUBTS, 1 + max(0, self._changes)) * min(1.0, SHORT_FORWARD / max(forward_seconds, 1e-9))
        return WORTHWHILE_GAIN + doubt / max(1, len(self._seconds)) ** 0.5


def _usual(forwards: Iterable[tuple[float, ...]]) -> list[float]:
    return [sorted(device)[(len(device) - 1) // 2] for device in zip(*forwards, strict=True)]


def _changed(usual: float, *latest: float) -> bool:
    return min(latest) > (1 + CHANGED) * usual or max(latest) < (1 - CHANGED) * usual


def better_speeds(
    shares: Sequence[int],
    seconds: Sequence[float],
    most: Sequence[float] | None = None,
    gain: float = WORTHWHILE_GAIN,
    all_from: float = 0.0,
) -> list[float] | None:
    """Speeds to share out by from now on, if that is worth it.

    Args:
        shares: tokens each device computed.
        seconds: how long each was busy with them, waiting left out; none where that is not known.
        most: as for :func:`share_tokens`.
        gain: the fraction of the time that other shares must save.
        all_from: where other shares are expected to save less than this, only a part of the difference is followed.

    Returns:
        The devices' speeds (tokens per second, where all of it is followed), or ``None`` where less would be gained.
    """
    if len(shares) < 2 or not seconds or min(seconds) <= 0 or min(shares) <= 0:
        return None
    speeds = [tokens / second for tokens, second in zip(shares, seconds, strict=True)]
    new = share_tokens(sum(shares), speeds, most)
    expected = max(tokens / speed for tokens, speed in zip(new, speeds, strict=True))
    if expected >= (1 - gain) * max(seconds):
        return None
    if expected <= (1 - all_from) * max(seconds):
        return speeds
    return [tokens / second**FOLLOWED for tokens, second in zip(shares, seconds, strict=True)]


def token_ranges(shares: Sequence[int]) -> list[slice]:
    """The shares as ranges of tokens, one behind the other."""
    ends = [sum(shares[: i + 1]) for i in range(len(shares))]
    return [slice(end - share, end) for share, end in zip(shares, ends, strict=True)]


def proportions(numbers: Mapping[int, float]) -> dict[int, float]:
    """Numbers as fractions of their sum."""
    total = sum(numbers.values())
    return {key: value / total for key, value in numbers.items()}
