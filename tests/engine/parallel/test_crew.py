"""The memory that a crew keeps for what its workers exchange and fetch."""

import torch
from crews import CPU, cpu_workers, crew_of
from wan_sharded.engine.parallel.crew import Crew
from wan_sharded.engine.parallel.fetching import BUFFERS


def test_links_are_slow_where_copies_are_said_to_be_staged() -> None:
    shares = crew_of(cpu_workers(2)).shares
    assert Crew(shares, shares[0].worker, staged=True).slow_links()
    assert not Crew(shares, shares[0].worker, staged=False).slow_links()
    assert not Crew(shares, shares[0].worker).slow_links(), "no GPU is among them"


def test_there_is_a_link_for_each_purpose_and_pair() -> None:
    """So that weights don't wait for keys and values, nor one reader for another."""
    crew = crew_of(cpu_workers(3))
    one, two, three = crew.workers
    links = [
        crew.link("keys", CPU, one, two),
        crew.link("keys", CPU, one, three),
        crew.link("keys", CPU, two, three),
        crew.link("weights", CPU, one),
        crew.link("weights", CPU, two),
    ]
    assert len({id(link) for link in links}) == 5
    assert crew.link("keys", CPU, one, two) is links[0] and crew.link("weights", CPU, one) is links[3]


def test_every_worker_has_room_for_everybodys_keys_and_values() -> None:
    crew = crew_of(cpu_workers(3))
    rooms = crew.exchanges(2, 105, [1, 4], 16, torch.bfloat16)
    assert len(rooms) == 3
    for room in rooms:
        for tensors in (room.keys, room.values):
            assert [tuple(t.shape) for t in tensors] == [(2, 105, 1, 16), (2, 105, 4, 16)]
            assert all(t.dtype == torch.bfloat16 for t in tensors)
        assert all(both.is_contiguous() for both in room.both)
    pointers = {t.data_ptr() for room in rooms for t in (*room.keys, *room.values)}
    assert len(pointers) == 12, "each its own"


def test_rooms_are_kept_while_the_size_stays() -> None:
    crew = crew_of(cpu_workers(2))
    first = crew.exchanges(1, 105, [1, 4], 16, torch.float32)
    again = crew.exchanges(1, 105, [1, 4], 16, torch.float32)
    assert all(a is b for a, b in zip(first, again, strict=True))
    for size in ((2, 105, [1, 4], 16, torch.float32), (1, 70, [1, 4], 16, torch.float32), (1, 105, [5], 16, torch.float32)):
        other = crew.exchanges(*size)
        assert not any(a is b for a in first for b in other) and other[0].keys[0].shape[:2] == size[:2]
    crew.give_back_buffers()
    assert not any(a is b for a in other for b in crew.exchanges(1, 105, [5], 16, torch.float32))


def test_buffers_for_blocks_are_kept_while_they_are_large_enough() -> None:
    crew = crew_of(cpu_workers(2))
    one, two = crew.workers
    first = crew.slots(one, 1000)
    assert len(first) == BUFFERS and all(slot.flat.shape == (1000,) and slot.flat.dtype == torch.uint8 for slot in first)
    assert len({slot.flat.data_ptr() for slot in (*first, *crew.slots(two, 1000))}) == 2 * BUFFERS
    assert crew.slots(one, 1000) is first and crew.slots(one, 10) is first
    larger = crew.slots(one, 1001)
    assert larger is not first and all(slot.flat.numel() == 1001 for slot in larger)
    crew.give_back_buffers()
    assert crew.slots(one, 10)[0].flat.numel() == 10
