"""The search for the largest micro-batch, on a machine whose limit is known."""

import contextlib
import io
import resource
import signal
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from dinoscale.config import micro_batch_sizes, parse_config, resolve
from dinoscale.errors import ConfigError, PreemptedError, RunFailedError, UnavailableError
from dinoscale.runtime import distributed
from dinoscale.runtime.launcher_env import Process
from dinoscale.runtime.preemption import SIGNALS
from dinoscale.training.feed import masks_of
from dinoscale.training.micro_batch import search
from dinoscale.training.micro_batch.search import Outcome, _judge, _outcome, largest_that_fits
from dinoscale.training.micro_batch.trial import _masks, _shortened

MOST_TRIALS = 9


def _search(candidates: list[int], limit: int) -> tuple[int | None, int]:
    """The size found where all up to `limit` fit, and the number of trials."""
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest_that_fits(candidates, fits)
    assert len(set(tried)) == len(tried)
    return found, len(tried)


@pytest.mark.parametrize("images_per_rank", [1, 2, 7, 48, 1024, 5040, 720720])
def test_every_planted_limit_is_found_in_less_than_ten_trials(images_per_rank: int) -> None:
    config = parse_config({"train": {"batch_size": 2 * images_per_rank}})
    sizes = micro_batch_sizes(config, world_size=2)
    assert (sizes[0], sizes[-1]) == (1, images_per_rank)
    assert all(images_per_rank % size == 0 for size in sizes)
    for limit in {0, *sizes, *(size - 1 for size in sizes), *(size + 1 for size in sizes)}:
        found, trials = _search(sizes, limit)
        assert found == max((size for size in sizes if size <= limit), default=None)
        assert trials <= MOST_TRIALS


def test_without_candidates_none_fits() -> None:
    assert _search([], 8) == (None, 0)


def test_gpu_that_lets_no_second_process_in_is_named_with_the_remedy() -> None:
    lines = ["RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable"]
    lines += [f"advice of CUDA {number}" for number in range(8)]
    outcome = _outcome(None, 1, io.BytesIO("\n".join(lines).encode()))
    with pytest.raises(ConfigError, match=r"GPU of rank 1 .*EXCLUSIVE_PROCESS.*set to DEFAULT"):
        _judge([Outcome("cut off"), outcome], 64)


@pytest.mark.parametrize(
    "last_words",  # each seen of a trial whose limit of memory was lowered bit by bit
    [
        "SystemError: error return without exception set",
        "SystemError: <function build at 0x7f> returned NULL without setting an exception",
        "RuntimeError: can't start new thread",
        "RuntimeError: Resource temporarily unavailable",
        "terminate called without an active exception",
    ],
)
def test_a_limited_trial_that_cannot_say_memory_is_too_large(
    last_words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = '{"limit_bytes": 9}\n' + last_words
    assert _outcome(None, 1, io.BytesIO(limited.encode())).verdict == "too large"
    assert _outcome(None, 1, io.BytesIO(last_words.encode())).verdict == "failed"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**28, 2**28))  # as by `ulimit -d`
    assert _outcome(None, 1, io.BytesIO(last_words.encode())).verdict == "too large"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_trial_that_a_signal_to_stop_ended_did_not_fail(number: signal.Signals) -> None:
    outcome = _outcome(None, -number, io.BytesIO())
    with pytest.raises(PreemptedError):
        _judge([outcome, Outcome("cut off")], 8)


def test_trial_whose_images_were_out_of_reach_ends_the_run_as_that() -> None:
    outcome = _outcome(None, UnavailableError.exit_code, io.BytesIO(b"cannot read /shared/a.tar"))
    with pytest.raises(UnavailableError, match=r"cannot read /shared/a\.tar"):
        _judge([outcome], 64)


def test_trials_that_were_cut_off_though_none_failed_do_not_fit() -> None:
    for others in ([], [Outcome("cut off")], [Outcome("fits", peak_bytes=9)]):
        with pytest.raises(RunFailedError, match=r"trial of 8 was cut off on .* failed on no"):
            _judge([*others, Outcome("cut off")], 8)
    assert not _judge([Outcome("too large"), Outcome("cut off")], 8)


def test_a_trial_at_the_port_of_an_earlier_one_is_not_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "free_port", lambda: 1)
    held: dict[str, str] = {}
    store = SimpleNamespace(get=held.get, set=held.__setitem__)
    monkeypatch.setattr(distributed, "KeyValueStore", lambda: store)
    asked = []

    def wait(_: object, __: object, cut_off: Callable[[], bool]) -> str:
        asked.append(cut_off())
        return "too large"

    monkeypatch.setattr(search, "_start", lambda *_: contextlib.nullcontext(_Ended()))
    monkeypatch.setattr(search, "_wait", wait)
    for size in (4, 2):
        search._try(parse_config({}), Process(0, 1, 0, 1), size, lambda: False)
    assert asked == [False, False]


class _Ended:
    """A child that has ended."""

    returncode = 1

    def kill(self) -> None:
        """Nothing is left to end."""


def test_a_trial_masks_as_many_patches_as_the_run_at_most() -> None:
    config = parse_config({"ibot": {"loss_weight": 1.0, "mask_rule": "dinov2"}})
    tried = _masks(config, 16, torch.device("cpu"))
    drawn = [masks_of(config, step=step, first_image=0, images=16) for step in range(50)]
    assert tried is not None
    counts = [len(masks.rows) for masks in drawn if masks is not None]
    assert len(counts) == 50
    assert 0.85 * len(tried.rows) < max(counts) <= len(tried.rows)
    assert _masks(parse_config({}), 16, torch.device("cpu")) is None


def test_a_trial_of_a_run_of_one_epoch_has_a_gram_network() -> None:
    train = {"epochs": 1, "steps_per_epoch": 9, "micro_batch_size": "auto"}
    gram = {"loss_weight": 1.0, "refresh_every_steps": 3}
    config = parse_config({"train": train, "optim": {"warmup_epochs": 0}, "gram": gram})
    tried = _shortened(config, 4, world_size=1, passes=2)
    assert resolve(tried, world_size=1, num_images=8).total_steps == 2
