"""The log file of a rank, and the terminal beside it."""

import io
import logging
import os
import select
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dinoscale.runtime import logs

FULL = Path("/dev/full")


@pytest.fixture(autouse=True)
def _no_file_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    yield
    logs.forget_file()


def test_each_start_is_appended_under_its_header(tmp_path: Path) -> None:
    for start in ("first", "second"):
        assert logs.to_file(tmp_path / "logs", rank=3, header=start) is None
        logging.getLogger("dinoscale.x").info("of the %s", start)
        logs.note("error: no more")
    lines = (tmp_path / "logs" / "rank_00003.log").read_text().splitlines()
    said = [line.split(" ", 3)[3] for line in lines]
    first = ["first", "of the first", "error: no more"]
    assert said == [*first, "second", "of the second", "error: no more"]


def test_folder_that_cannot_be_made_is_reported_without_a_crash(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert logs.to_file(tmp_path / "file", rank=0, header="") == "File exists"
    logs.note("to nowhere")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_full_disk_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rank_00000.log").symlink_to(FULL)
    assert logs.to_file(tmp_path, rank=0, header="begins") is None
    for _ in range(3):
        logging.getLogger("dinoscale.x").info("more")
    said = [record.getMessage() for record in caplog.records if "cannot write" in record.message]
    assert len(said) == 1
    assert "No space left on device" in said[0]


def test_file_system_that_does_not_answer_blocks_no_exit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_LOG_EXIT_S", 0.1)
    os.mkfifo(tmp_path / "rank_00000.log")
    reader = os.open(tmp_path / "rank_00000.log", os.O_RDONLY | os.O_NONBLOCK)
    assert logs.to_file(tmp_path, rank=0, header="begins") is None
    os.read(reader, 2**16)
    stuck = threading.Thread(target=logs.note, args=("x" * 2**20,))
    stuck.start()  # holds the lock of the file from now on
    while not _holds_text(reader):
        time.sleep(0.01)
    begin = time.monotonic()
    logs.log_exit("error: it hangs")
    assert time.monotonic() - begin < 30
    assert capfd.readouterr().err == "error: it hangs\n"
    while stuck.is_alive():
        with suppress(BlockingIOError):
            os.read(reader, 2**16)
    os.close(reader)


def _holds_text(pipe: int) -> bool:
    waiting, _, _ = select.select([pipe], [], [], 0)
    return bool(waiting)


@pytest.mark.parametrize(("rank", "terminal"), [(0, "IW"), (2, "W")])
def test_other_ranks_show_warnings_only_and_write_everything(
    tmp_path: Path, rank: int, terminal: str
) -> None:
    program = textwrap.dedent(f"""
        import logging
        from pathlib import Path
        from dinoscale.runtime import logs
        logs.to_terminal({rank})
        logs.to_file(Path({str(tmp_path)!r}), rank={rank}, header="begins")
        logging.info("all is well")
        logging.warning("something is wrong")
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    shown = done.stderr.splitlines()
    assert "".join(line[0] for line in shown) == terminal
    assert all(f" rank {rank}: " in line for line in shown)
    kept = (tmp_path / f"rank_{rank:05d}.log").read_text().splitlines()
    assert [line[0] for line in kept] == ["-", "I", "W"]


_SAY = """
    import os, sys
    from dinoscale.runtime import logs
    logs.shield_terminal()
    logs.to_terminal(0)
    opened = os.open(__file__, os.O_RDONLY)
    for _ in range(3):
        print("a result", flush=True)
        print("x" * 100_000, file=sys.stderr, flush=True)
        logs.log.warning("something is wrong")
    with open(sys.argv[1], "w") as file:
        print(opened > 2, logs.stdout_error(), file=file)
    os._exit(7)
"""


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("streams", "lost"),
    [
        ("1>&- 2>&-", "None"),
        ("0<&- 2>&-", "None"),
        (">/dev/full 2>/dev/full", "[Errno 28] No space left on device"),
        ("| true", "None"),
        ("2> >(sleep 20)", "None"),  # a pipe that nobody reads: no room after the first lines
    ],
)
def test_closed_full_and_blocked_streams_neither_end_nor_hold_up_a_process(
    tmp_path: Path, streams: str, lost: str
) -> None:
    (tmp_path / "say.py").write_text(textwrap.dedent(_SAY))
    line = f"set -o pipefail; '{sys.executable}' say.py found {streams}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, timeout=200, check=False, stdout=subprocess.DEVNULL
    )
    assert done.returncode == 7
    assert (tmp_path / "found").read_text() == f"True {lost}\n"


@pytest.mark.parametrize("waits", [True, False])
def test_closed_streams_and_unencodable_names_end_no_process(
    monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    ascii_only, closed = io.TextIOWrapper(io.BytesIO(), "ascii"), io.StringIO()
    closed.close()
    for inner, error in ((ascii_only, UnicodeEncodeError), (closed, ValueError)):
        monkeypatch.setattr(sys, "stdout", logs._Lossy(inner, waits=waits))
        print("\u00e9", flush=True)
        assert isinstance(logs.stdout_error(), error)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("stdout", "stderr", "code"),
    [("/dev/full", "err", 1), ("out", "/dev/full", 0), ("&-", "err", 0)],
)
def test_result_on_stdout_must_arrive(tmp_path: Path, stdout: str, stderr: str, code: int) -> None:
    line = f"'{sys.executable}' -m dinoscale presets >{stdout} 2>{stderr}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, timeout=200, check=False)
    assert done.returncode == code
    if stderr == "err":
        said = (tmp_path / "err").read_text()
        assert ("error: the printed output is incomplete: stdout: No space" in said) == bool(code)
        assert "Traceback" not in said


def test_help_reaches_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dinoscale", "--help"], capture_output=True, text=True, check=True
    )
    assert "exit codes" in done.stdout
    assert done.stderr == ""
