"""The order of streamed images: exact where it must be, local where it may be."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoscale.data.loader import _num_sharing_workers
from dinoscale.data.shards.stream import Blocks
from dinoscale.data.shards.stream_readers import StreamSampler


def _sampler(
    counts: list[int],
    *,
    quota: int | None = None,
    lanes: int = 2,
    block: int = 4,
    batch: int = 4,
    micro: int = 2,
    world: int = 1,
) -> StreamSampler:
    return StreamSampler(
        Blocks(counts, block_size=block),
        quota=quota or sum(counts),
        lanes=lanes,
        batch_size=batch,
        micro_batch_size=micro,
        world_size=world,
        seed=0,
    )


COUNTS_OF_SHARDS = st.lists(st.integers(1, 20), min_size=1, max_size=8)


@settings(deadline=None, max_examples=50)
@given(counts=COUNTS_OF_SHARDS, block=st.integers(1, 9))
def test_blocks_are_neighbours_of_one_shard_and_cover_all(counts: list[int], block: int) -> None:
    blocks = Blocks(counts, block_size=block)
    found = list(dict.fromkeys(blocks.block_of(i) for i in range(sum(counts))))
    assert [i for part in found for i in part] == list(range(sum(counts)))
    lengths: dict[int, set[int]] = {}
    for part in found:
        assert len(part) <= block
        assert blocks.shard_of(part.start) == blocks.shard_of(part.stop - 1)
        lengths.setdefault(blocks.shard_of(part.start), set()).add(len(part))
    assert all(max(of_shard) - min(of_shard) <= 1 for of_shard in lengths.values())


@settings(deadline=None, max_examples=50)
@given(
    counts=COUNTS_OF_SHARDS,
    block=st.integers(1, 9),
    lanes=st.integers(1, 5),
    slots=st.integers(1, 4),
    micro=st.integers(1, 3),
    whole=st.booleans(),
    steps=st.integers(1, 20),
)
def test_all_images_are_drawn_equally_often(
    counts: list[int], block: int, lanes: int, slots: int, micro: int, whole: bool, steps: int
) -> None:
    total, batch = sum(counts), slots * micro
    quota = max(total, batch) if whole else steps * batch
    sampler = _sampler(counts, quota=quota, lanes=lanes, block=block, batch=batch, micro=micro)
    drawn = np.zeros(total, dtype=int)
    for epoch in range(3):
        first = epoch * sampler.steps_per_epoch
        draws = [sampler.step(first + place) for place in range(sampler.steps_per_epoch)]
        ids = np.concatenate([draw.ids for draw in draws])
        repeats = np.concatenate([draw.repeats for draw in draws])
        pairs = set(zip(ids.tolist(), repeats.tolist(), strict=True))
        assert len(pairs) == len(ids)  # so crops differ when an image comes again
        assert ids.min() >= 0
        np.add.at(drawn, ids, 1)
        if not whole:
            assert np.ptp(drawn) <= 1
        elif total >= batch:
            assert np.bincount(ids).max() == 1
            assert {r for _, r in pairs} == {epoch}


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(4, 20), min_size=1, max_size=8),
    lanes=st.integers(1, 5),
    world=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    workers=st.integers(1, 4),
    start=st.integers(0, 12),
)
def test_ranks_workers_and_resuming_only_split_the_sequence(
    counts: list[int], lanes: int, world: int, accumulation: int, workers: int, start: int
) -> None:
    batch = world * accumulation * 2
    quota = max(sum(counts), batch)
    one = _sampler(counts, quota=quota, lanes=lanes, batch=batch)
    many = _sampler(counts, quota=quota, lanes=lanes, batch=batch, world=world)
    workers = _num_sharing_workers(lanes * accumulation, workers)
    owner: dict[tuple[int, int, int], int] = {}  # lane of rank 0 in an epoch -> its worker
    for number, step in enumerate(range(start, start + 6)):
        parts = [
            many.micro_batch(step, micro_batch=m, rank=r)
            for m in range(accumulation)
            for r in range(world)
        ]
        assert np.concatenate([p.ids for p in parts]).tolist() == one.step(step).ids.tolist()
        epoch, within = divmod(step, many.steps_per_epoch)
        for m in range(accumulation):
            worker = (number * accumulation + m) % workers  # the loader serves them in turn
            assert owner.setdefault((epoch, within % lanes, m), worker) == worker


def test_a_lane_reads_its_shards_from_front_to_back() -> None:
    """Block after block; only its ends may lie within a shard."""
    sampler = _sampler([100] * 20, lanes=4, block=8, batch=16, micro=4)
    blocks = Blocks([100] * 20, block_size=8)
    for slot in range(4):
        read: list[range] = []
        for step in range(0, sampler.steps_per_epoch, 4):
            for index in sampler.micro_batch(step, micro_batch=slot, rank=0).ids.tolist():
                if not read or index not in read[-1]:
                    read.append(blocks.block_of(index))
        assert len(read) == len(set(read))
        for a, b in itertools.pairwise(read):
            assert b.start == a.stop or (a.stop % 100 == 0 and b.start % 100 == 0)


def test_images_of_a_block_and_shards_are_shuffled() -> None:
    sampler = _sampler([100] * 20, lanes=1, block=50, batch=100, micro=100)
    first, later = (sampler.step(step).ids for step in (0, 20))
    assert first.tolist() != later.tolist()
    assert (np.diff(first) == 1).mean() < 0.1
    assert len({int(i) // 100 for i in first}) == 1
    one_shard = _sampler([100], lanes=1, block=100, batch=100, micro=100)
    assert one_shard.step(0).ids.tolist() != one_shard.step(1).ids.tolist()
    order = [int(sampler.step(step).ids[0]) // 100 for step in range(20)]
    assert sorted(order) == list(range(20))
    assert order != sorted(order)


def test_workers_share_lanes_equally_and_as_many_as_can() -> None:
    for lanes, workers in itertools.product(range(1, 30), range(12)):
        used = _num_sharing_workers(lanes, workers)
        can = [count for count in range(1, workers + 1) if lanes % count == 0]
        assert used == max(can, default=0)
