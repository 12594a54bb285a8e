"""How heads are grouped: keys and values travel and are used group by group, so that attention of the first begins while the others arrive."""

from collections.abc import Callable, Iterable, Sequence

# Over a fast link a small first group is enough to hide the way: this part of the heads, or, where attention gains by it, that one.
FIRST_GROUP_SHARES = (5, 10)
# Over a slow one more groups hide more of it.
SLOW_LINK_GROUPS = 5
# A multiprocessor does attention of so many queries of one head at a time, by torch's kernels for this head width (measured on an H200).
QUERY_TILE = 128


def head_groups(heads: int, *, slow_links: bool, rounds: Callable[[Sequence[int]], float] = lambda groups: 0) -> list[int]:
    """Heads per group, in order; their sum is ``heads``.

    Args:
        heads: N.
        slow_links: whether what travels goes through system memory.
        rounds: what attention takes with these groups, in any unit; of first groups it decides between, the larger one hides more.
    """
    if slow_links:
        count = min(SLOW_LINK_GROUPS, heads)
        return [heads * (i + 1) // count - heads * i // count for i in range(count)]
    firsts = (max(1, heads // share) for share in FIRST_GROUP_SHARES)
    return min(([first, heads - first] if heads > first else [heads] for first in firsts), key=rounds)


def attention_rounds(groups: Sequence[int], queries: int, multiprocessors: Iterable[int]) -> int:
    """What attention takes on several GPUs, group after group: rounds of each, times the multiprocessors that it keeps.

    A group's last round leaves multiprocessors without work; where there are few rounds, how many groups end so shows: with 132 of them and
    16380 queries, 8 and 32 heads take 8 + 32 rounds, 4 and 36 take 4 + 35.

    Args:
        groups: heads per group.
        queries: of each GPU.
        multiprocessors: of each GPU.
    """
    tiles = -(-queries // QUERY_TILE)
    return sum(-(-count * tiles // at_once) * at_once for at_once in multiprocessors for count in groups)
