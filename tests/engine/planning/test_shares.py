"""How tokens are shared out: exactly, in proportion, within limits; and corrected from measured times in one step."""

import math
import random

import pytest
from wan_sharded.engine.planning.shares import (
    FOLLOWED,
    SMALL_GAIN,
    WORTHWHILE_GAIN,
    MeasuredSeconds,
    better_speeds,
    proportions,
    share_tokens,
    token_ranges,
)

TOKENS = 32_760


def random_speeds(dice: random.Random) -> list[float]:
    """Of one to eight devices, from equal to a thousand times as fast; some at 0, never all."""
    speeds = [dice.choice([0.0, 1.0, 1.0, 10 ** dice.uniform(-1.5, 1.5)]) for _ in range(dice.randint(1, 8))]
    speeds[dice.randrange(len(speeds))] = dice.uniform(0.5, 2)
    return speeds


def random_limits(dice: random.Random, count: int) -> list[float]:
    """Fractions up to 1 whose sum is 1 or more, often hardly more."""
    parts = [dice.uniform(0.01, 1) for _ in range(count)]
    return [min(1.0, part / sum(parts) * dice.choice([1.0, 1.02, 1.5, 4.0]) + 1e-9) for part in parts]


def test_nothing_is_lost_and_nobody_is_off_by_more_than_a_token() -> None:
    dice = random.Random(1)
    for _ in range(2000):
        tokens, speeds = dice.choice([1, 2, 7, 105, TOKENS, 75_600, 10**6 + 3]), random_speeds(dice)
        shares = share_tokens(tokens, speeds)
        assert sum(shares) == tokens and min(shares) >= 0, (tokens, speeds, shares)
        for share, speed in zip(shares, speeds, strict=True):
            assert abs(share - tokens * speed / sum(speeds)) <= 1 + 1e-6, (tokens, speeds, shares)


@pytest.mark.parametrize(
    ("tokens", "speeds", "shares"),
    [
        (10, [1.0], [10]),
        (105, [3.0, 1.0], [79, 26]),
        (TOKENS, [1.0, 1.0], [16_380, 16_380]),
        (2, [1.0, 1.0, 1.0], [1, 0, 1]),
        (100, [0.0, 5.0, 0.0], [0, 100, 0]),
        (100, [800, 200], [80, 20]),
    ],
    ids=str,
)
def test_shares_by_hand(tokens: int, speeds: list[float], shares: list[int]) -> None:
    assert share_tokens(tokens, speeds) == shares


def test_limits_are_kept_and_what_is_cut_off_goes_to_the_others_in_proportion() -> None:
    assert share_tokens(1000, [8, 1, 1], [0.5, 1, 1]) == [500, 250, 250]
    assert share_tokens(1000, [6, 3, 1], [0.4, 1, 1]) == [400, 450, 150]
    # The second is over its limit only with what the first may not take.
    assert share_tokens(1000, [6, 3, 1], [0.4, 0.4, 1]) == [400, 400, 200]
    # Even to one that is not expected to do anything.
    assert share_tokens(1000, [1, 0], [0.7, 1]) == [700, 300]
    assert share_tokens(1000, [5, 1, 1], [0.25, 0.25, 0.5]) == [250, 250, 500]


def test_limits_of_random_machines() -> None:
    dice = random.Random(2)
    cut = 0
    for _ in range(2000):
        tokens, speeds = dice.choice([3, 105, TOKENS]), random_speeds(dice)
        most = random_limits(dice, len(speeds))
        shares = share_tokens(tokens, speeds, most)
        case = (tokens, speeds, most, shares)
        assert sum(shares) == tokens and min(shares) >= 0, case
        assert all(share <= limit * tokens + 1 + 1e-6 for share, limit in zip(shares, most, strict=True)), case
        free = [i for i, share in enumerate(shares) if share < most[i] * tokens - 2 and speeds[i] > 0]
        # Whoever is not at a limit has as much as the others in proportion to the speed.
        for i in free:
            for j in free:
                assert abs(shares[i] * speeds[j] - shares[j] * speeds[i]) <= speeds[i] + speeds[j] + 1e-6, case
        cut += shares != share_tokens(tokens, speeds)
    assert 200 < cut < 1900, "the cases must be of both kinds"


@pytest.mark.parametrize("speeds", [[], [0.0], [0.0, 0.0], [1.0, -0.5]], ids=str)
def test_impossible_speeds(speeds: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one must be above 0, and none below"):
        share_tokens(10, speeds)


def test_impossible_limits() -> None:
    with pytest.raises(ValueError, match=r"the largest shares \[0.5, 0.4\] leave tokens over"):
        share_tokens(10, [1, 1], [0.5, 0.4])
    assert share_tokens(10, [1, 1], [0.5, 0.5]) == [5, 5]


def seconds_of(shares: list[int], speeds: list[float]) -> list[float]:
    return [share / speed for share, speed in zip(shares, speeds, strict=True)]


def test_one_correction_is_enough_for_constant_speeds() -> None:
    dice = random.Random(3)
    corrected = 0
    for _ in range(500):
        real = [10 ** dice.uniform(2, 4) for _ in range(dice.randint(2, 8))]
        guessed = [speed * dice.uniform(0.3, 3) for speed in real]
        most = random_limits(dice, len(real)) if dice.random() < 0.5 else None
        shares = share_tokens(TOKENS, guessed, most)
        seconds = seconds_of(shares, real)
        found = better_speeds(shares, seconds, most)
        if found is None:
            continue
        assert found == pytest.approx(real)
        again = share_tokens(TOKENS, found, most)
        faster = seconds_of(again, real)
        assert max(faster) < (1 - WORTHWHILE_GAIN) * max(seconds)
        if most is None:
            assert max(faster) < 1.02 * TOKENS / sum(real)
        assert better_speeds(again, faster, most) is None
        corrected += 1
    assert corrected > 300


def test_devices_that_finish_together_are_left_alone() -> None:
    assert better_speeds([60, 40], [1.0, 1.0]) is None
    assert better_speeds([6000, 4000], [1.0, 1.005]) is None, "what would be gained is not worth a change"
    assert better_speeds([6000, 4000], [1.0, 1.1], gain=0.06) is None
    assert better_speeds([6000, 4000], [1.0, 1.3]) == pytest.approx([6000, 4000 / 1.3])
    # Unequal, but the one that could do more may not.
    assert better_speeds([7000, 3000], [1.0, 2.0], [0.7, 1.0]) is None


@pytest.mark.parametrize(
    ("shares", "seconds"), [([100], [1.0]), ([100, 0], [1.0, 0.0]), ([100, 50], [1.0, 0.0]), ([0, 50], [1.0, 1.0])], ids=str
)
def test_nothing_is_learnt_where_nothing_was_measured(shares: list[int], seconds: list[float]) -> None:
    assert better_speeds(shares, seconds) is None


def test_ranges_cover_all_tokens_in_order() -> None:
    assert token_ranges([3, 0, 5]) == [slice(0, 3), slice(3, 3), slice(3, 8)]
    dice = random.Random(4)
    for _ in range(200):
        shares = share_tokens(dice.choice([1, 105, 1000]), random_speeds(dice))
        ranges = token_ranges(shares)
        assert [index for span in ranges for index in range(span.start, span.stop)] == list(range(sum(shares)))
        assert [span.stop - span.start for span in ranges] == shares


def test_proportions() -> None:
    assert proportions({2: 3.0, 0: 1.0}) == {2: 0.75, 0: 0.25}


# ---- shares that settle


def shares_of_forwards(
    speeds: list[float],
    noise: float,
    forwards: int,
    dice: random.Random,
    given: list[int],
    *,
    answering: float = 0.0,
) -> list[list[int]]:
    """The shares of one forward after the other, each corrected by those before it; speeds fall with that power of what a device is given."""
    measured, found = MeasuredSeconds(), [given]
    for _ in range(forwards):
        seconds = [second * dice.uniform(1 - noise, 1 + noise) for second in seconds_of(found[-1], answered(speeds, found[-1], answering))]
        measured.add(found[-1], seconds)
        better = better_speeds(found[-1], measured.usual, None, measured.worthwhile_gain(3.0), measured.all_from)
        found.append(share_tokens(TOKENS, better) if better else found[-1])
    return found


def answered(speeds: list[float], shares: list[int], answering: float) -> list[float]:
    """The speeds with these shares, where they are those given with equal ones."""
    return [speed * (sum(shares) / len(shares) / share) ** answering for speed, share in zip(speeds, shares, strict=True)]


@pytest.mark.parametrize("answering", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("off", [1.05, 1.1, 1.2])
def test_shares_settle_where_speeds_answer_to_them(answering: float, off: float) -> None:
    """Equal GPUs that are held back by their power, begun with shares that are off."""
    speeds, best = [5000.0, 5000.0], TOKENS / 10_000
    for seed in range(20):
        begun = share_tokens(TOKENS, [off, 1.0])
        found = shares_of_forwards(speeds, 0.003, 40, random.Random(seed), begun, answering=answering)
        taken = [max(seconds_of(shares, answered(speeds, shares, answering))) for shares in found]
        assert max(taken[30:]) < 1.04 * best, (seed, [seconds / best for seconds in taken])
        assert sum(a != b for a, b in zip(found, found[1:], strict=False)) <= 5


def test_of_a_small_difference_a_third_is_left_at_most() -> None:
    """Whether speeds answer not at all, or as much as can be: there following all of it would leave as much on the other side."""
    shares, off = [5100, 4900], math.log(5100 / 4900)
    for answering in (0.0, 0.25, 0.5, 0.75, 1.0):
        speeds = answered([100.0, 100.0], shares, answering)
        better = better_speeds(shares, seconds_of(shares, speeds), gain=0.0, all_from=SMALL_GAIN)
        assert better is not None
        first, second = share_tokens(10_000, better)
        assert abs(math.log(first / second)) <= off / 3 + 1e-3
        assert better_speeds(shares, seconds_of(shares, speeds), gain=0.0) == pytest.approx(speeds)


def test_a_large_difference_is_followed_at_once_the_first_times() -> None:
    shares, seconds, all_of_it = [5000, 5000], [1.0, 1.3], pytest.approx([5000, 5000 / 1.3])
    assert better_speeds(shares, seconds, all_from=SMALL_GAIN) == all_of_it
    assert better_speeds(shares, [1.0, 1.2], all_from=SMALL_GAIN) == pytest.approx([5000, 5000 / 1.2**FOLLOWED])
    measured = MeasuredSeconds()
    for number, expected in enumerate((SMALL_GAIN, SMALL_GAIN, SMALL_GAIN, 1.0, 1.0)):
        assert measured.all_from == expected
        measured.add([5000 + number, 5000 - number], seconds)
    assert better_speeds(shares, seconds, all_from=measured.all_from) == pytest.approx([5000, 5000 / 1.3**FOLLOWED])


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_equal_devices_whose_times_vary_keep_their_shares(devices: int) -> None:
    """Nearly: following each forward, they would change in most of them."""
    dice = random.Random(devices)
    equal = share_tokens(TOKENS, [1.0] * devices)
    changes = 0
    for _ in range(50):
        found = shares_of_forwards([5000.0] * devices, 0.03, 30, dice, equal)
        changes += sum(a != b for a, b in zip(found, found[1:], strict=False))
        assert all(abs(share - TOKENS / devices) < 0.04 * TOKENS / devices for shares in found for share in shares)
    assert changes < 0.05 * 50 * 30


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("faster", [1.08, 1.3, 3.0])
def test_unequal_devices_finish_together_after_few_forwards(faster: float, noise: float) -> None:
    speeds = [5000.0 * faster, 5000.0]
    best = TOKENS / sum(speeds)
    for seed in range(50):
        found = shares_of_forwards(speeds, noise, 40, random.Random(seed), share_tokens(TOKENS, [1.0, 1.0]))
        assert all(max(seconds_of(shares, speeds)) < 1.035 * best for shares in found[8:])
        changes = sum(a != b for a, b in zip(found, found[1:], strict=False))
        assert 1 <= changes <= 3


@pytest.mark.parametrize("slower", [1.1, 1.3, 2.0])
@pytest.mark.parametrize("devices", [2, 4])
def test_what_changes_for_good_is_noticed_after_two_forwards(slower: float, devices: int) -> None:
    """Another program has begun to use the last device. One forward alone may be an odd one."""
    equal, measured = [1000] * devices, MeasuredSeconds()
    for _ in range(60):
        measured.add(equal, [1.0] * devices)
    for found in (None, pytest.approx([1000.0] * (devices - 1) + [1000 / slower])):
        measured.add(equal, [1.0] * (devices - 1) + [slower])
        assert better_speeds(equal, measured.usual, None, measured.worthwhile_gain(3.0)) == found
    measured.add(equal, [1.0] * (devices - 1) + [slower])
    assert measured.usual[-1] == slower, "what was before does not come back"


def test_single_odd_forwards_change_nothing() -> None:
    dice, measured, equal = random.Random(1), MeasuredSeconds(), [8190] * 4
    for number in range(200):
        seconds = [dice.uniform(0.99, 1.01) for _ in equal]
        if number % 10 == 5:
            seconds[number % 4] *= 1.2
        measured.add(equal, seconds)
        assert better_speeds(equal, measured.usual, None, measured.worthwhile_gain(3.0)) is None


def test_small_differences_need_many_forwards() -> None:
    """And the smallest never count: the limit is what is worth a change, and what is still doubted after forty."""
    measured = MeasuredSeconds()
    for difference, forwards in ((0.14, 1), (0.07, 5), (0.04, 30), (0.03, None)):
        measured.forget()
        needed = None
        for number in range(1, 200):
            measured.add([500, 500], [1.0, 1.0 + difference])
            if needed is None and better_speeds([500, 500], measured.usual, None, measured.worthwhile_gain(3.0)):
                needed = number
        assert needed == forwards, difference


def test_other_shares_are_measured_anew() -> None:
    """From the second forward on; and doubted more each time they are changed, but for the first, a calibration's."""
    measured = MeasuredSeconds()
    measured.add([500, 500], [1.0, 1.1])
    doubt = measured.worthwhile_gain(3.0) - WORTHWHILE_GAIN
    measured.add([500, 500], [1.0, 1.1])
    assert 0 < measured.worthwhile_gain(3.0) - WORTHWHILE_GAIN < doubt
    for changes, shares in zip((1, 2, 3, 3), ([520, 480], [530, 470], [500, 500], [510, 490]), strict=True):
        measured.add(shares, [9.0, 1.0])
        assert measured.usual == [] and better_speeds(shares, measured.usual) is None
        measured.add(shares, [1.02, 1.04])
        assert measured.usual == [1.02, 1.04]
        assert measured.worthwhile_gain(3.0) - WORTHWHILE_GAIN == pytest.approx(changes * doubt)
    measured.add([5200, 4800], [9.0, 1.0])  # another video's
    measured.add([5200, 4800], [1.02, 1.04])
    assert measured.usual == [1.02, 1.04] and measured.worthwhile_gain(3.0) - WORTHWHILE_GAIN == pytest.approx(doubt)
    measured.forget()
    measured.add([520, 480], [2.0, 2.0])
    assert measured.usual == [2.0, 2.0] and measured.worthwhile_gain(3.0) - WORTHWHILE_GAIN == pytest.approx(doubt)


@pytest.mark.parametrize("slower", [1.1, 1.15, 1.5])
def test_a_device_that_others_use_at_times_is_corrected_each_time(slower: float) -> None:
    """However often: what changes for good is no reason to doubt."""
    measured, shares = MeasuredSeconds(), [16380, 16380]
    for number in range(20):
        speeds = [5000.0, 5000.0 / slower if number % 2 else 5000.0]
        for _ in range(30):
            measured.add(shares, seconds_of(shares, speeds))
            better = better_speeds(shares, measured.usual, None, measured.worthwhile_gain(3.0))
            shares = share_tokens(TOKENS, better) if better else shares
        assert max(seconds_of(shares, speeds)) < 1.035 * TOKENS / sum(speeds), number


def test_shares_settle_though_new_sizes_disturb_what_is_measured() -> None:
    """Equal devices, given shares that are 4 % off; in a forward of new sizes some seem a tenth faster."""
    for seed in range(50):
        dice, measured = random.Random(seed), MeasuredSeconds()
        shares, changed, changes = share_tokens(TOKENS, [1.0, 1.04, 0.96, 1.0]), False, 0
        for _ in range(40):
            disturbance = 0.1 if changed else 0.01
            seconds = [second * dice.uniform(1 - disturbance, 1) for second in seconds_of(shares, [5000.0] * 4)]
            measured.add(shares, seconds)
            better = better_speeds(shares, measured.usual, None, measured.worthwhile_gain(3.0))
            before, shares = shares, share_tokens(TOKENS, better) if better else shares
            changed = shares != before
            changes += changed
        assert changes <= 2, seed
        assert max(shares) < 1.025 * TOKENS / 4, seed


def test_long_forwards_are_corrected_by_smaller_differences() -> None:
    """A consumer card's take a minute; what new sizes cost is nothing beside it."""
    measured = MeasuredSeconds()
    measured.add([500, 500], [1.0, 1.05])
    gains = [measured.worthwhile_gain(seconds) for seconds in (0.0, 1.0, 8.0, 16.0, 80.0)]
    assert gains[0] == gains[1] == gains[2] > gains[3] > gains[4] > WORTHWHILE_GAIN
    assert better_speeds([500, 500], measured.usual, None, gains[0]) is None
    assert better_speeds([500, 500], measured.usual, None, gains[4]) is not None
