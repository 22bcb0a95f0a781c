"""What counts as another input, another command and another version of the code."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.build_shards import _sizes
from dinoscale.data.sources.folder import FolderSource
from dinoscale.errors import UnavailableError
from dinoscale.runtime.fingerprint import (
    code_fingerprint,
    differences,
    files_fingerprint,
    fingerprint,
)
from dinoscale.runtime.retry import RetryBudget


def _print_of(folder: Path) -> dict[str, object]:
    images = files_fingerprint(str(folder), sorted(str(path) for path in folder.glob("*.jpg")))
    return fingerprint(input={"images": images}, command={"sides": (1, 2)}, code={})


def _keep_size_and_time(file: Path) -> None:
    before = file.stat()
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda _: None, []),
        (_keep_size_and_time, ["times"]),
        (lambda file: file.rename(file.with_name("c.jpg")), ["names", "times"]),
        (lambda file: file.write_bytes(b"longer"), ["sizes", "times"]),
        (lambda file: file.unlink(), ["names", "number", "sizes", "times"]),
    ],
)
def test_what_changed_of_the_input_is_named(
    tmp_path: Path, change: Callable[[Path], object], named: list[str]
) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    kept = _print_of(tmp_path)
    change(tmp_path / "b.jpg")
    assert differences(kept, _print_of(tmp_path)) == [f"input.images.{part}" for part in named]


def test_the_same_files_below_another_folder_are_another_input(tmp_path: Path) -> None:
    prints = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"x")
        prints.append(_print_of(tmp_path / name))
    assert differences(*prints) == ["input.images.root", "input.images.times"]


@pytest.mark.parametrize(
    ("kept", "named"),
    [
        (None, ["everything"]),
        ("5fe2", ["everything"]),
        ({"input": {}, "code": {}}, ["command"]),
        ({"input": {}, "command": {"side": 1, "seed": 0}, "code": {}}, ["command.seed"]),
        ({"input": {}, "command": {"side": None}, "code": {}}, ["command.side"]),
    ],
)
def test_what_differs_is_named(kept: object, named: list[str]) -> None:
    now = fingerprint(input={}, command={"side": 1}, code={})
    assert differences(kept, now) == named


def test_comments_and_docstrings_do_not_change_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoscale.runtime.fingerprint._ROOT", tmp_path)
    package = tmp_path / "dinoscale"
    package.mkdir()
    (package / "other.py").write_text("import numpy\n")
    (package / "used.py").write_text('"""Why."""\nX = 1\n')
    main = "def f():\n    from dinoscale import used\n    return used\n"
    (package / "main.py").write_text(main)
    seen = []
    for file, text in [
        ("main", main),
        ("other", "import torch\n"),  # nobody imports it
        ("used", '"""Because."""\n\nX = (1)  # one\n'),
        ("main", main.replace("    return", "\n    return")),
        ("used", "X = 2\n"),
        ("used", "import PIL.Image\nX = 2\n"),
    ]:
        (package / f"{file}.py").write_text(text)
        code_fingerprint.cache_clear()
        seen.append(code_fingerprint("dinoscale.main"))
    code_fingerprint.cache_clear()
    digests = [found["dinoscale"] for found in seen]
    assert digests[0] == digests[1] == digests[2] == digests[3]
    assert len(set(digests)) == 3
    assert [name for name in seen[-1] if name not in seen[0]] == ["pillow"]


class _Disk:
    """Fails with an error of the file system as often as it is told."""

    def __init__(self, failures: int, number: int = errno.ESTALE):
        self.failures, self.number, self.asked = failures, number, 0

    def read(self) -> str:
        self.asked += 1
        if self.failures:
            self.failures -= 1
            raise OSError(self.number, os.strerror(self.number))
        return "content"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def test_the_retry_budget_is_for_an_outage_not_for_each_file(slept: list[float]) -> None:
    retries = RetryBudget((1.0, 2.0))
    assert retries.read(_Disk(2).read, "a") == "content"
    assert retries.read(_Disk(1).read, "b") == "content"  # another outage
    assert slept == [1.0, 2.0, 1.0]
    slept.clear()
    for _ in range(5):
        with pytest.raises(OSError, match="tale"):
            retries.read(_Disk(9).read, "c")
    assert slept == [1.0, 2.0]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_a_permanent_error_is_not_retried(slept: list[float], number: int) -> None:
    disk = _Disk(1, number)
    with pytest.raises(OSError, match=os.strerror(number)):
        RetryBudget().read(disk.read, "a")
    assert (disk.asked, slept) == (1, [])


@pytest.mark.parametrize("sizes", [False, True])
def test_threads_in_one_outage_do_not_share_a_retry_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, sizes: bool
) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(32)]
    for path in paths:
        path.write_bytes(b"12")
    source = FolderSource(str(tmp_path))
    lost = dict.fromkeys(map(str, paths), 2)
    pause, status = time.sleep, os.stat

    def fails_twice(path: Any, **how: Any) -> os.stat_result:
        if lost.get(path, 0):
            lost[path] -= 1
            raise OSError(errno.ESTALE, "Stale")
        return status(path, **how)

    monkeypatch.setattr("os.stat", fails_twice)
    monkeypatch.setattr("time.sleep", lambda _: pause(0.02))
    if sizes:
        assert _sizes(source).tolist() == [2] * len(paths)
    else:
        assert files_fingerprint(str(tmp_path), map(str, paths))["number"] == len(paths)
    assert not any(lost.values())


def test_an_unavailable_file_system_is_not_a_changed_input(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.stat", lambda _: _Disk(1).read())
    with pytest.raises(UnavailableError, match="cannot read the size of /a: Stale") as refused:
        files_fingerprint("/", ["/a"])
    assert refused.value.exit_code == 69
    assert sum(slept) == 63
