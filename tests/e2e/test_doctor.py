"""`dinoscale doctor`: one line on every rank, a sentence for each fault, no trace left behind."""

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dinoscale.config import dump_config
from tests.distributed.tiny_run import tiny_config
from tests.e2e.local_files import dinoscale_on_local_files
from tests.forked import Forked
from tests.ports import free_port

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    config = tiny_config(
        run_dir=str(tmp_path / "new" / "run"),
        data={"train": "synthetic:shapes?images=24&size=16", "num_workers": 0},
        engine={"precision": "fp32"},
    )
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    return str(path)


def _start(*arguments: str, **variables: str) -> Forked:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not re.match(r"(RANK|WORLD_SIZE|LOCAL_|MASTER_|SLURM_|OMPI_|TORCHELASTIC|WANDB)", name)
    }
    environment = {**kept, "OMP_NUM_THREADS": "1", **variables}
    return Forked(dinoscale_on_local_files, ["doctor", *arguments], environment=environment)


def _end(process: Forked, *, code: int) -> tuple[str, str]:
    try:
        out, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "Traceback" not in said, said
    assert process.returncode == code, said
    return out, said


def _examine(*arguments: str, code: int, **variables: str) -> dict[str, Any]:
    out, said = _end(_start(*arguments, **variables), code=code)
    return _parsed(out, said)


def _parsed(out: str, said: str) -> dict[str, Any]:
    """The one JSON object; every check of it was printed, too."""
    (line,) = out.splitlines()
    found: dict[str, Any] = json.loads(line)
    verdicts = [check["verdict"] for check in found["checks"]]
    assert found["problems"] == verdicts.count("problem")
    assert found["warnings"] == verdicts.count("warning")
    for check in found["checks"]:
        assert f"  {check['verdict']:8} {check['name']}: {check['text']}" in said.splitlines()
    assert said.splitlines()[-1].startswith("verdict: ")
    return found


def _problems(found: dict[str, Any]) -> dict[str, str]:
    return {c["name"]: c["text"] for c in found["checks"] if c["verdict"] == "problem"}


def _two_ranks(
    *both: str, own: tuple[list[str], list[str]] = ([], []), **variables: str
) -> list[Forked]:
    port = str(free_port())
    return [
        _start(
            *both,
            *own[rank],
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            **variables,
        )
        for rank in range(2)
    ]


def test_machine_without_a_configuration_is_fit() -> None:
    found = _examine(code=0)
    names = {check["name"] for check in found["checks"]}
    assert names == {
        "meeting", "versions", "libraries", "devices", "cores", "precision", "shared memory",
        "open files", "environment", "network",
    }  # fmt: skip
    assert not _problems(found)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_are_fit_and_nothing_is_left_behind(config_file: str) -> None:
    secret = "do-not-print-7f3a"
    first, second = _two_ranks(config_file, WANDB_API_KEY=secret, NCCL_COMMENT=secret)
    out, said = _end(first, code=0)
    other_out, other_said = _end(second, code=0)
    found = _parsed(out, said)
    texts = {check["name"]: check["text"] for check in found["checks"]}
    assert not _problems(found)
    assert "all-reduce over 2 ranks" in texts["network"]
    assert "clocks" in texts
    assert "24 images" in texts["data.train"]
    assert "4 steps per epoch" in texts["plan"]
    assert "by 2 ranks" in texts["run_dir"]
    assert "NCCL_COMMENT" in texts["environment"]
    assert secret not in out + said + other_out + other_said
    assert other_out == ""
    assert not (Path(config_file).parent / "new").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_rank_that_does_not_see_run_dir_is_named(config_file: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    ranks = _two_ranks(config_file, own=([f"run_dir={here}"], [f"run_dir={there}"]))
    out, said = _end(ranks[0], code=2)
    _end(ranks[1], code=2)
    problems = _problems(_parsed(out, said))
    assert problems.keys() == {"config", "run_dir"}
    assert problems["run_dir"].startswith("rank 1 (")
    assert str(there) in problems["run_dir"]
    assert str(there) in problems["config"]
    assert list(here.iterdir()) == list(there.iterdir()) == []


@pytest.mark.distributed
@pytest.mark.slow
def test_faults_of_one_rank_are_named_and_nobody_waits(config_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    own = (["data.train=synthetic:shapes?images=12&size=16"], [f"data.train={folder}"])
    ranks = _two_ranks(config_file, *("eval.train=/none", "eval.test=/none"), own=own)
    out, said = _end(ranks[0], code=2)
    _end(ranks[1], code=2)
    problems = _problems(_parsed(out, said))
    assert problems.keys() == {"config", "data.train", "eval.train", "eval.test"}
    assert "12 images on rank 0 but 1 on rank 1" in problems["data.train"]


@pytest.mark.distributed
@pytest.mark.slow
def test_wrong_configuration_of_one_rank_leaves_the_machine_checks(config_file: str) -> None:
    ranks = _two_ranks(config_file, own=([], ["crops.num_locl=3"]))
    out, said = _end(ranks[0], code=2)
    _end(ranks[1], code=2)
    found = _parsed(out, said)
    assert _problems(found).keys() == {"config"}
    assert _problems(found)["config"].startswith("rank 1 (")
    assert "did you mean" in _problems(found)["config"]
    assert "all-reduce over 2 ranks" in said


@pytest.mark.slow
def test_rank_that_never_comes_is_waited_for_no_longer_than_asked(config_file: str) -> None:
    variables = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    begin = time.monotonic()
    found = _examine(config_file, "--timeout", "3", code=2, **variables)
    assert time.monotonic() - begin < 100  # 10 s on an idle machine; would be 300 by default
    assert _problems(found).keys() == {"meeting"}
    assert "rank 0 only" in _problems(found)["meeting"]


@pytest.mark.distributed
@pytest.mark.slow
def test_rank_that_falls_silent_is_waited_for_no_longer_than_asked(config_file: str) -> None:
    """Rank 1 hangs in opening its images: what should count them sends nothing."""
    silent = ["data.train=pipe:cat a.tar", "data.manifest=pipe:sleep 50"]
    ranks = _two_ranks(
        *("--timeout", "10", config_file),  # first: argparse wants it so
        own=(["data.train=synthetic:shapes"], silent),
        DINOSCALE_ALLOW_PIPE="1",
    )
    try:
        out, said = _end(ranks[0], code=2)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    (line,) = out.splitlines()
    assert "answer" in _problems(json.loads(line)), said


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29999"}, "no-such-host.invalid"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"}, "MASTER_PORT='port'"),
    ],
)
def test_unusable_meeting_place_is_named(variables: dict[str, str], says: str) -> None:
    found = _examine(code=2, RANK="0", WORLD_SIZE="2", **variables)
    assert says in _problems(found)["meeting"]


def test_taken_port_is_named() -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        found = _examine(code=2, MASTER_PORT=port, **variables)
    assert f"port {port}" in _problems(found)["meeting"]


@pytest.mark.slow
def test_unreadable_images_are_a_problem(config_file: str, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.jpg").write_text("<html>not found</html>")
    problems = _problems(_examine(config_file, f"data.train={folder}", code=2))
    assert problems.keys() == {"data.train"}
    assert "8 of 8" in problems["data.train"]
    assert "0.jpg" in problems["data.train"]


@pytest.mark.slow
def test_file_in_place_of_run_dir_and_missing_images_are_problems(
    config_file: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    overrides = (f"run_dir={file}", f"data.train={tmp_path / 'none'}")
    problems = _problems(_examine(config_file, *overrides, code=2))
    assert problems.keys() == {"data.train", "run_dir"}
    assert str(file) in problems["run_dir"]
    assert str(tmp_path / "none") in problems["data.train"]
    assert file.read_text() == "kept"


@pytest.mark.slow
def test_model_whose_checkpoint_cannot_fit_is_a_problem(config_file: str) -> None:
    sizes = ("model.embed_dim=4000000", "model.num_heads=1000", "model.depth=12")
    problems = _problems(_examine(config_file, *sizes, code=2))
    assert problems.keys() == {"disk"}
    assert "one checkpoint needs" in problems["disk"]


@pytest.mark.slow
def test_batch_that_does_not_fit_and_unknown_model_are_problems(config_file: str) -> None:
    overrides = ("train.batch_size=60", "model.backbone=vit_smal_patch16_224")
    problems = _problems(_examine(config_file, *overrides, code=2))
    assert problems.keys() == {"plan", "model"}
    assert "do not fill one batch" in problems["plan"]
