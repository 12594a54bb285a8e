"""How heads are grouped for their way from GPU to GPU."""

import pytest
from crews import cpu_workers, crew_of
from wan_sharded.engine import probe
from wan_sharded.engine.parallel.groups import FIRST_GROUP_SHARES, SLOW_LINK_GROUPS, attention_rounds, head_groups

H200_MULTIPROCESSORS = 132


@pytest.mark.parametrize("slow_links", [False, True])
def test_groups_hold_all_heads(slow_links: bool) -> None:
    for heads in range(1, 130):
        groups = head_groups(heads, slow_links=slow_links)
        assert sum(groups) == heads and min(groups) > 0, heads


def test_slow_links_give_more_groups() -> None:
    """So that more of the way is hidden behind attention over the groups before."""
    for heads in range(3, 130):
        assert len(head_groups(heads, slow_links=True)) > len(head_groups(heads, slow_links=False)), heads
    assert head_groups(40, slow_links=True) == [8, 8, 8, 8, 8]
    assert head_groups(40, slow_links=False) == [8, 32]
    assert head_groups(24, slow_links=False) == [4, 20]


def test_groups_over_slow_links_are_even() -> None:
    for heads in range(1, 130):
        groups = head_groups(heads, slow_links=True)
        assert max(groups) - min(groups) <= 1 and len(groups) == min(heads, SLOW_LINK_GROUPS), heads


def test_the_first_group_over_fast_links_is_small() -> None:
    for heads in range(2, 130):
        first, _ = head_groups(heads, slow_links=False)
        assert first == max(1, heads // FIRST_GROUP_SHARES[0]), heads
    assert head_groups(1, slow_links=False) == head_groups(1, slow_links=True) == [1]


def test_the_first_group_is_smaller_where_attention_takes_fewer_rounds_then() -> None:
    assert head_groups(40, slow_links=False, rounds=lambda groups: groups[0]) == [4, 36]
    assert head_groups(40, slow_links=False, rounds=lambda groups: -groups[0]) == [8, 32]
    assert head_groups(40, slow_links=True, rounds=lambda groups: len(groups)) == [8, 8, 8, 8, 8], "a slow link matters more"


@pytest.mark.parametrize(
    "gpus, tokens, expected",
    [
        (2, 32760, [4, 36]),  # 832x480x81: 39 rounds instead of 40
        (4, 32760, [8, 32]),  # 20 either way
        (2, 75600, [8, 32]),  # 1280x720x81: 90 either way
        (4, 75600, [8, 32]),  # 45 instead of 46
    ],
)
def test_rounds_decide_as_measured_on_h200s(gpus: int, tokens: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "multiprocessors", lambda device: H200_MULTIPROCESSORS)
    assert crew_of(cpu_workers(gpus)).head_groups(40, tokens) == expected


def test_rounds_are_counted_group_by_group_and_gpu_by_gpu() -> None:
    # 128 tiles a head; 40 heads in one group, in two, and in two on two GPUs of which one does all tiles of a head at once.
    assert attention_rounds([40], 16380, [132]) == 39 * 132
    assert attention_rounds([8, 32], 16380, [132]) == 40 * 132
    assert attention_rounds([8, 32], 16380, [132, 128]) == 40 * 132 + 40 * 128
    assert attention_rounds([40], 1, [7]) == 6 * 7, "a few queries are a tile, too"


def test_groups_do_not_depend_on_how_tokens_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other groups would be compiled for anew each time shares are corrected."""
    monkeypatch.setattr(probe, "multiprocessors", lambda device: H200_MULTIPROCESSORS)
    crew = crew_of(cpu_workers(2))
    for speed in (1.0, 1.3, 7.0):
        crew.shares[0].speed = speed
        assert crew.head_groups(40, 32760) == [4, 36], speed
    # With the shares of the last it would be the other one.
    assert attention_rounds([8, 32], 28665, [132]) <= attention_rounds([4, 36], 28665, [132])
