import itertools
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dinoscale.data.augmentation.multi_crop import CropArrays, MultiCrop, eval_transform
from dinoscale.data.decoding.decode import BadSampleError, Picture, UnavailableSampleError
from dinoscale.data.loader import Batch, eval_batches, map_in_workers, train_batches
from dinoscale.data.order.sampler import StepSampler
from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.mixture import MixedSource
from dinoscale.data.sources.source import Source
from dinoscale.errors import DataError, UnavailableError
from tests.unit.data.conftest import picture

CROPS = MultiCrop(global_size=12, local_size=6, num_local=2)


@dataclass
class Pictures:
    """A Source in memory; `failing` maps numbers of images to the error of reading them."""

    count: int
    failing: dict[int, Exception]

    labels = None
    class_names = None

    def __len__(self) -> int:
        return self.count

    def path(self, index: int) -> str:
        return f"picture {index}"

    def picture(self, index: int) -> Picture:
        if index in self.failing:
            raise self.failing[index]
        return Picture.of(np.asarray(picture(index, width=20, height=16)), self.path(index))


def _crops(source: Source, image: int, *, epoch: int, sample: int) -> CropArrays:
    """Of one image, cropped as the image `sample`."""
    arrays = CROPS.arrays(count=1)
    CROPS(source.picture(image), arrays, 0, seed=0, epoch=epoch, sample=sample)
    return CropArrays(*(array[:, 0] for array in arrays))


def _pixels(source: Source, index: int) -> np.ndarray:
    return source.picture(index).pixels()


def _bad(*numbers: int) -> dict[int, Exception]:
    return {i: BadSampleError(f"picture {i}", "the file is empty") for i in numbers}


def _train(
    source: Source,
    *,
    batch_size: int = 4,
    micro: int = 2,
    rank: int = 0,
    world: int = 1,
    steps: tuple[int, int] = (0, 8),
    workers: int = 0,
    seed: int = 0,
    quotas: Sequence[int] | None = None,
) -> Iterator[Batch]:
    return train_batches(
        source,
        CROPS,
        batch_size=batch_size,
        micro_batch_size=micro,
        seed=seed,
        rank=rank,
        world_size=world,
        start_step=steps[0],
        stop_step=steps[1],
        num_workers=workers,
        quotas=quotas,
    )


def _assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.global_crops, b.global_crops)
        assert torch.equal(a.local_crops, b.local_crops)
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert a.bad == b.bad


def test_batches_hold_the_crops_of_the_sampled_images() -> None:
    source = Pictures(10, {})
    batches = list(_train(source, steps=(0, 5)))
    sampler = StepSampler(
        sizes=[10], quotas=[10], batch_size=4, micro_batch_size=2, world_size=1, seed=0
    )
    assert len(batches) == 10  # five steps of two micro-batches, two steps an epoch
    for number, batch in enumerate(batches):
        step, micro_batch = divmod(number, 2)
        ids = sampler.micro_batch(step, micro_batch=micro_batch, rank=0).ids
        assert batch.sample_ids.tolist() == ids.tolist()
        assert batch.global_crops.shape == (2, 2, 12, 12, 3)
        assert batch.local_crops.shape == (2, 2, 6, 6, 3)
        assert batch.global_crops.dtype == torch.uint8
        for place, sample in enumerate(ids.tolist()):
            crops = _crops(source, sample, epoch=step // 2, sample=sample)
            np.testing.assert_array_equal(batch.global_crops[:, place].numpy(), crops[0])
            np.testing.assert_array_equal(batch.local_crops[:, place].numpy(), crops[1])
            np.testing.assert_array_equal(batch.params[:, place], crops.params)


@pytest.mark.parametrize("workers", [1, 3])
def test_number_of_workers_changes_nothing(workers: int) -> None:
    source = Pictures(17, _bad(3, 5, 11))
    _assert_same(list(_train(source, workers=workers)), list(_train(source)))


def test_resumed_run_continues_bit_for_bit() -> None:
    source = Pictures(17, _bad(3, 5))
    whole = list(_train(source))
    _assert_same(list(_train(source, steps=(5, 8), workers=2)), whole[10:])


def test_ranks_and_accumulation_only_split_the_step() -> None:
    source = Pictures(17, _bad(3))
    (whole,) = _train(source, batch_size=8, micro=8, steps=(1, 2))
    ranks = [
        list(_train(source, batch_size=8, micro=2, rank=r, world=2, steps=(1, 2))) for r in (0, 1)
    ]
    parts = list(itertools.chain(*zip(*ranks, strict=True)))
    assert torch.equal(torch.cat([p.global_crops for p in parts], 1), whole.global_crops)
    assert torch.equal(torch.cat([p.local_crops for p in parts], 1), whole.local_crops)
    assert torch.equal(torch.cat([p.sample_ids for p in parts]), whole.sample_ids)


def test_image_that_comes_again_within_an_epoch_is_cropped_anew() -> None:
    source = Pictures(4, {})
    (batch,) = _train(source, batch_size=12, micro=12, steps=(0, 1), quotas=[12])
    for sample in range(4):
        places = (batch.sample_ids == sample).nonzero().flatten().tolist()
        shown = [batch.global_crops[:, place] for place in places]
        assert len(shown) == 3
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(shown, 2))
        for repeat, crops in enumerate(shown):
            expected = _crops(source, sample, epoch=repeat, sample=sample)
            np.testing.assert_array_equal(crops.numpy(), expected[0])


def test_a_mixture_replaces_an_image_by_one_of_the_same_source() -> None:
    source = MixedSource([Pictures(6, _bad(2)), Pictures(60, _bad(0, 1, 2))])
    batches = list(_train(source, steps=(0, 40), quotas=[40, 120], workers=2))
    bad = [sample for batch in batches for sample in batch.bad]
    assert {sample.sample_id for sample in bad} == {2, 6, 7, 8}
    for sample in bad:
        assert (sample.sample_id < 6) == (sample.replaced_by < 6)
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert int((ids < 6).sum()) == 40


def test_unreadable_image_is_replaced_and_reported() -> None:
    source = Pictures(17, _bad(3, 5))
    batches = list(_train(source, steps=(0, 4)))  # one epoch
    bad = [sample for batch in batches for sample in batch.bad]
    order = [i for batch in batches for i in batch.sample_ids.tolist()]
    assert {3, 5} & set(order) <= {sample.sample_id for sample in bad} <= {3, 5}
    assert bad
    for sample in bad:
        assert (sample.path, sample.error) == (f"picture {sample.sample_id}", "the file is empty")
        assert sample.replaced_by not in (3, 5)
        assert sample.repeat == 0
    first = bad[0]
    place = order.index(first.sample_id)
    crops = _crops(source, first.replaced_by, epoch=0, sample=first.sample_id)
    shown = torch.cat([batch.global_crops for batch in batches], 1)[:, place]
    np.testing.assert_array_equal(shown.numpy(), crops[0])


def test_replacement_changes_with_the_epoch() -> None:
    batches = _train(Pictures(40, _bad(3)), batch_size=40, micro=40, steps=(0, 6))
    assert len({sample.replaced_by for batch in batches for sample in batch.bad}) > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_source_without_readable_images_stops_with_examples(workers: int) -> None:
    with pytest.raises(DataError) as caught:
        list(_train(Pictures(8, _bad(*range(8))), workers=workers))
    assert "10 images in a row are unreadable" in str(caught.value)
    assert "the file is empty" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert not isinstance(caught.value, UnavailableError)


def test_source_whose_images_are_all_unavailable_is_no_wrong_input() -> None:
    failing = {i: UnavailableSampleError(f"picture {i}", "stale file handle") for i in range(8)}
    with pytest.raises(UnavailableError) as caught:
        list(_train(Pictures(8, failing)))
    examples = str(caught.value).splitlines()[1:-1]
    assert len(examples) == 3
    assert all(line.endswith(": stale file handle") for line in examples)


@pytest.mark.parametrize("workers", [0, 1])
def test_any_error_in_a_worker_arrives_as_one_line(workers: int) -> None:
    source = Pictures(8, {i: KeyError("surprise") for i in range(8)})
    with pytest.raises(DataError, match=r"^the input pipeline failed: KeyError: 'surprise'$"):
        list(_train(source, workers=workers))


def test_worker_that_dies_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"worker ended unexpectedly.*data\.num_workers"):
        list(_train(_Killing(8, {}), workers=1))


class _Killing(Pictures):
    """Ends the process that reads it, as the kernel does when memory runs out."""

    def picture(self, index: int) -> Picture:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().picture(index)


def test_interrupting_a_worker_does_not_stop_it() -> None:
    batches = _train(Pictures(8, {}), workers=1)
    first = next(batches)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    _assert_same([first, *batches], list(_train(Pictures(8, {}))))


def test_workers_end_with_the_iterator() -> None:
    batches = _train(Pictures(8, {}), workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # type: ignore[attr-defined]  # a generator
    assert multiprocessing.active_children() == []


class _Waits(Dataset[int]):
    """Its second item is long in coming, as from a storage that is tried again."""

    def __init__(self) -> None:
        self.waits = multiprocessing.Event()

    def __getitem__(self, item: int) -> int:
        if item:
            self.waits.set()
            time.sleep(600)
        return item


def test_workers_that_wait_for_a_storage_end_with_the_iterator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    items = _Waits()
    answers = map_in_workers(items, range(9), num_workers=1, pin_memory=False)
    assert next(answers) == 0
    assert items.waits.wait(60)  # a worker that has not begun on it ends by itself
    (worker,) = multiprocessing.active_children()
    answers.close()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL


def test_workers_end_with_an_error_that_is_still_looked_at() -> None:
    with pytest.raises(DataError) as caught:
        list(_train(Pictures(8, _bad(*range(8))), workers=2))
    assert multiprocessing.active_children() == []
    assert caught.tb is not None


def test_loading_leaves_the_global_generators_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(_train(Pictures(8, {}), workers=1))
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_numbers_that_do_not_fit_are_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        _train(Pictures(8, {}), batch_size=4, micro=3)
    with pytest.raises(ValueError, match="start_step"):
        _train(Pictures(8, {}), steps=(3, 2))


def _evaluate(
    source: Source, *, workers: int = 0, ids: np.ndarray | None = None
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return list(
        eval_batches(source, resize=14, crop=12, batch_size=4, num_workers=workers, ids=ids)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_image_once_in_order(workers: int) -> None:
    source = Pictures(10, {})
    batches = _evaluate(source, workers=workers)
    assert [len(ids) for _, _, ids in batches] == [4, 4, 2]
    assert torch.cat([ids for _, _, ids in batches]).tolist() == list(range(10))
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == [-1] * 10
    images = torch.cat([images for images, _, _ in batches])
    np.testing.assert_array_equal(
        images[9].numpy(), eval_transform(_pixels(source, 9), resize=14, crop=12)
    )


def test_evaluation_skips_unreadable_images(caplog: pytest.LogCaptureFixture) -> None:
    source = Pictures(10, _bad(0, 1, 2, 3, 5))
    with caplog.at_level(logging.WARNING):
        batches = _evaluate(source)
    assert [ids.tolist() for _, _, ids in batches] == [[4, 6, 7], [8, 9]]
    for images, labels, ids in batches:
        assert len(images) == len(labels) == len(ids)
        for image, number in zip(images, ids.tolist(), strict=True):
            expected = eval_transform(_pixels(source, number), resize=14, crop=12)
            np.testing.assert_array_equal(image.numpy(), expected)
    assert "left out 5 of 10 images" in caplog.text


def test_evaluation_of_a_share_keeps_numbers_and_labels(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = image_folder(6, broken=(4,))
    for i in range(6):
        (tmp_path / "classes" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03}.jpg").rename(tmp_path / "classes" / str(i % 2) / f"{i}.jpg")
    source = FolderSource(str(tmp_path / "classes"))  # 0, 2, 4 of class 0, then 1, 3, 5
    ((images, labels, ids),) = _evaluate(source, ids=np.array([1, 2, 3, 5]))
    assert ids.tolist() == [1, 3, 5]
    assert labels.tolist() == [0, 1, 1]
    assert images.shape == (3, 3, 12, 12)
