"""`dinoscale data`: from images to shards to their inspection, and killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.forked import run_module

_ROOT = Path(__file__).resolve().parents[2]
_TOOLS = (
    "build-shards", "dataset-stats", "deduplicate", "index", "inspect-shards", "synthetic",
    "verify-shards",
)  # fmt: skip


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "dinoscale", "data", *map(str, arguments)]


def _data(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = run_module("dinoscale", "data", *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def _result(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    result = json.loads(_data(*arguments, code=code).stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures in two classes, large enough that shrinking them takes a second or two."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(120):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((900, 700)).save(folder / "ab"[i % 2] / f"{i}.jpg")
    return folder


@pytest.mark.parametrize("tool", _TOOLS)
def test_help_teaches_with_an_example(tool: str) -> None:
    text = _data(tool, "--help").stdout
    assert f"example:\n  dinoscale data {tool} " in text
    assert "--workers" in text


def test_help_lists_every_tool() -> None:
    text = _data("--help").stdout
    assert all(tool in text for tool in _TOOLS)


def test_module_of_its_own_is_the_same_command() -> None:
    ours = subprocess.run(
        [sys.executable, "-m", "data_tools", "build-shards", "--help"],
        capture_output=True, text=True, timeout=240, cwd=_ROOT,
    )  # fmt: skip
    assert ours.stdout == _data("build-shards", "--help").stdout


def test_from_images_to_shards_and_back(photographs: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    built = _result("build-shards", photographs, shards, "--shard-bytes", "512KiB")
    assert (built["samples"], built["left_out"]) == (120, 0)
    assert _result("verify-shards", shards)["images"] == 120
    seen = _result("inspect-shards", shards, "--sheet", tmp_path / "sheet.png")
    assert seen["classes"]["images_of"] == {"0": 60, "1": 60}
    stats = _data("dataset-stats", shards, "--images", "20").stdout.splitlines()
    assert stats[0].startswith("data.mean=[")
    assert json.loads(stats[1])["images"] == 20
    assert _result("deduplicate", shards, "--exact")["groups"] == 0


def test_damage_ends_with_1_and_mistakes_with_2(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    _result("synthetic", shards, "--images", "9", "--size", "16", "--workers", "1")
    shard = shards / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    assert _result("verify-shards", shards, code=1)["bad"] == 2
    done = _data("inspect-shards", tmp_path / "nowhere", code=2)
    assert "error: " in done.stderr
    assert done.stdout == ""
    done = _data("verify-shards", shards, "--white", "255", code=2)
    assert done.stderr == "error: --white: renamed, write --max-pixel-value\n"


def _heed_interrupts() -> None:
    """A shell starts its background jobs, tests among them, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _start(photographs: Path, out: Path) -> subprocess.Popen[str]:
    """Shrink pictures with two workers, until two shards are there and noted."""
    process = subprocess.Popen(
        _command(*_ARGUMENTS, photographs, out),
        stderr=subprocess.PIPE, text=True, cwd=_ROOT, start_new_session=True,
        preexec_fn=_heed_interrupts,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    journal = out / ".progress.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:  # its head, two shards
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


_ARGUMENTS = ("build-shards", "--max-side", "100", "--shard-bytes", "64KiB", "--workers", "2")


@pytest.fixture(scope="module")
def whole(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of a build that nobody stopped."""
    out = tmp_path_factory.mktemp("built") / "whole"
    _result(*_ARGUMENTS, "--workers", "1", photographs, out)
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_build_goes_on_to_the_same_bytes(
    photographs: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = _start(photographs, out)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C in a terminal
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=200)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in said
    deadline = time.monotonic() + 100
    while _of_session(process.pid):  # its workers end too
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (out / "manifest.json").exists()
    for shard in out.glob("*.tar"):
        assert shard.read_bytes() == (whole / shard.name).read_bytes()
    again = _result(*_ARGUMENTS, photographs, out)
    assert again["shards_kept"] >= 2
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def _of_session(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
