"""Loading and saving refuse the same on every rank, and survive faults."""

import errno
import io
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoscale.checkpoint.layout import EMA, MASTER, directory, part_of, shard_file
from dinoscale.checkpoint.load import Checkpoint, open_run
from dinoscale.checkpoint.retention import clear_leftovers
from dinoscale.errors import CheckpointError
from tests.distributed.tiny_run import take_step, tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def exercise(folder: str) -> dict[str, Any]:
    """On every rank: save, then try loads and saves that must fail; return the messages."""
    from dinoscale.engine.build import build_pair
    from dinoscale.runtime import distributed
    from dinoscale.training.resume import find_checkpoint, restore

    root, rank = Path(folder), distributed.rank()
    config = tiny_config(engine={"zero_stage": 2, "precision": "fp32"})
    plan = tiny_plan(config)
    student, teacher = build_pair(config, plan)
    other = build_pair(tiny_config(head={"hidden_dim": 23, "num_prototypes": 33}), plan)
    take_step(student, teacher, config, plan, 0)
    _save(root / "good", 1, student, teacher)
    if rank == 0:
        for name in ("no_shard", "cut_shard", "spare"):
            shutil.copytree(root / "good", root / name)
        (directory(root / "no_shard", 1) / shard_file(1)).unlink()
        cut = directory(root / "cut_shard", 1) / shard_file(0)
        cut.write_bytes(cut.read_bytes()[:-1000])
        stale = part_of(directory(root / "stale", 1))
        stale.mkdir(parents=True)  # left behind by a crash of a run on three ranks
        shutil.copy(directory(root / "good", 1) / shard_file(1), stale / shard_file(2))
        clear_leftovers(root / "stale")
    distributed.gather_objects(None)

    def open_and_restore(name: str, pair: Any) -> None:
        path = directory(root / name, 1)
        restore(distributed.together(lambda: Checkpoint(path)), *pair)

    messages = {
        "other_model": _refusal(lambda: open_and_restore("good", other)),
        "no_shard": _refusal(lambda: open_and_restore("no_shard", (student, teacher))),
        "cut_shard": _refusal(lambda: open_and_restore("cut_shard", (student, teacher))),
    }
    for case, fault in (("stale_handle", errno.ESTALE), ("other_view", errno.ENOENT)):
        with _without(shard_file(1), fault) if rank == 1 else nullcontext():
            messages[case] = _refusal(lambda: find_checkpoint(root / "spare"))
    own = {0: (shard_file(0), errno.ENOENT), 1: (shard_file(1), errno.EIO)}  # each has one of them
    with _without(*own[rank]):
        messages["two_errors"] = _refusal(lambda: find_checkpoint(root / "spare"))
    messages["untouched"] = str(directory(root / "spare", 1).is_dir())
    _save(root / "stale", 1, student, teacher)
    open_and_restore("stale", (student, teacher))
    take_step(student, teacher, config, plan, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:  # a full disk, as far as one process can have one
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    messages["full_disk"] = _refusal(lambda: _save(root / "good", 2, student, teacher))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    messages["left_by_full_disk"] = str(directory(root / "good", 2).exists())
    _save(root / "good", 3, student, teacher)
    messages["drawn"] = str(_resume_draws(root / "good", config, plan, student))
    if rank == 0:
        linked = directory(root / "good", 1)  # what cannot be deleted as a folder
        linked.rename(root / "elsewhere")
        linked.symlink_to(root / "elsewhere")
        (root / "good" / "checkpoints" / "step_00000000").touch()  # is none, and stays
    _save(root / "good", 4, student, teacher, keep_last=2)
    return messages


def _resume_draws(run_dir: Path, config: Any, plan: Any, student: Any) -> bool:
    """Whether a resume draws numbers, all of which it would replace; it restores every weight."""
    from dinoscale.training.resume import find_checkpoint
    from dinoscale.training.trainer import _networks

    torch.rand(1)  # else the generator is as a seed has left it
    state = torch.get_rng_state()
    restored, _ = _networks(config, plan, None, find_checkpoint(run_dir))
    assert all(map(torch.equal, restored.master, student.master))
    return not torch.equal(state, torch.get_rng_state())


def _save(run_dir: Path, step: int, student: Any, teacher: Any, *, keep_last: int = 5) -> None:
    from dinoscale.checkpoint.retention import Keep
    from dinoscale.checkpoint.save import Saver

    saver = Saver(run_dir, Keep(last=keep_last))
    about: dict[str, Any] = {"saved_at": "then", "progress": {"knn_top1": None}}
    about |= {"config": {"engine": {"zero_stage": 2}}, "plan": {"world_size": 2}}
    assert saver.begin(step, student, teacher, about) is None
    result = saver.wait()
    assert result is not None
    if result.error is not None:
        raise CheckpointError(result.error)


@contextmanager
def _without(name: str, fault: int) -> Iterator[None]:
    """A machine whose file system fails to open a file and does not list it."""
    opened, listed, sleep = io.open, os.listdir, time.sleep

    def failing(path: Any, *arguments: Any, **named: Any) -> Any:
        if os.path.basename(path) == name:
            raise OSError(fault, os.strerror(fault))
        return opened(path, *arguments, **named)

    io.open, os.listdir, time.sleep = (  # type: ignore[assignment]  # a disk and a clock
        failing,
        lambda path: [entry for entry in listed(path) if entry != name],
        lambda _seconds: None,
    )
    try:
        yield
    finally:
        io.open, os.listdir, time.sleep = opened, listed, sleep


def _refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "nothing refused"


@pytest.fixture(scope="module")
def exercised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """The folder of checkpoints, and each rank's messages."""
    root = tmp_path_factory.mktemp("checkpoints")
    function = "tests.distributed.test_checkpoint:exercise"
    return root, run_distributed(function, world_size=2, timeout_s=240, folder=str(root))


@pytest.mark.parametrize(
    ("case", "texts"),
    [
        ("other_model", ["another model", "head.mlp.0.bias is 22 there and 23 here", "run_dir"]),
        ("no_shard", ["is not a complete checkpoint", shard_file(1)]),
        ("cut_shard", ["is not a complete checkpoint"]),
        (
            "stale_handle",
            ["rank 1 on ", shard_file(1), "ESTALE 116", "may be intact and was not changed"],
        ),
        ("other_view", ["rank 1 sees other files", "(5 files, CRC", "start again"]),
        ("two_errors", ["rank 1 sees other files", "start again"]),
        ("untouched", ["True"]),
        ("drawn", ["False"]),
        ("full_disk", ["rank 1 cannot write", "File too large"]),
    ],
)
def test_refusal_is_a_sentence_on_every_rank(
    exercised: tuple[Path, list[dict[str, str]]], case: str, texts: list[str]
) -> None:
    for messages in exercised[1]:
        for text in texts:
            assert text in messages[case]


def test_failed_save_leaves_earlier_and_later_checkpoints_whole(
    exercised: tuple[Path, list[dict[str, str]]],
) -> None:
    root, of_ranks = exercised
    assert [messages["left_by_full_disk"] for messages in of_ranks] == ["False", "False"]
    for step in (3, 4):
        checkpoint = Checkpoint(directory(root / "good", step))
        checkpoint.require(checkpoint.shapes, {"center": (33,)})


def test_old_checkpoints_are_deleted_and_one_that_cannot_be_does_not_stop_the_run(
    exercised: tuple[Path, list[dict[str, str]]],
) -> None:
    names = {path.name for path in (exercised[0] / "good" / "checkpoints").glob("step_*")}
    assert names == {"step_00000000", "step_00000003", "step_00000004"}
    assert (exercised[0] / "good" / "checkpoints" / ".step_00000001.removed").exists()


def test_shard_left_by_a_crash_does_not_enter_the_next_checkpoint(
    exercised: tuple[Path, list[dict[str, str]]],
) -> None:
    path = directory(exercised[0] / "stale", 1)
    assert sorted(file.name for file in path.glob("shard_*")) == [shard_file(0), shard_file(1)]
    of_run, good = Checkpoint(path), Checkpoint(directory(exercised[0] / "spare", 1))
    for kind in (MASTER, EMA):
        first, second = of_run.full(kind), good.full(kind)
        assert all(torch.equal(first[name], second[name]) for name in second)


def test_half_written_directory_is_ignored(
    exercised: tuple[Path, list[dict[str, str]]], tmp_path: Path
) -> None:
    shutil.copytree(exercised[0] / "good", tmp_path / "run")
    half = tmp_path / "run" / "checkpoints" / ".step_00000009.part"
    half.mkdir()
    (half / shard_file(0)).write_bytes(b"")
    assert open_run(tmp_path / "run").path == directory(tmp_path / "run", 4)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        open_run(tmp_path / "elsewhere")
