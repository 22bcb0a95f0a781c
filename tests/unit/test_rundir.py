"""One run at a time in a run directory, and files that a failed write leaves as they were."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dinoscale.config import parse_config
from dinoscale.errors import DinoscaleError, OutputError
from dinoscale.training import run_directory

_HOLD = textwrap.dedent("""
    import sys
    from pathlib import Path
    from dinoscale.training import run_directory
    file = run_directory.lock(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
""")


def test_second_run_is_refused_while_the_first_lives_and_let_in_when_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path / "run")]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    monkeypatch.setattr(run_directory, "_LOCK_WAIT_S", 0.1)
    try:
        with pytest.raises(DinoscaleError, match=r"another run is using .*run; .* run_dir=PATH"):
            run_directory.lock(tmp_path / "run")
    finally:
        first.kill()
        first.wait()
    run_directory.lock(tmp_path / "run").close()


def test_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DinoscaleError, match=r"cannot write to .*file/run"):
        run_directory.lock(tmp_path / "file" / "run")


def test_what_deepspeed_was_told_is_written_for_both_networks(tmp_path: Path) -> None:
    told = {"student": {"gradient_clipping": 0.0}, "teacher": None}
    run_directory.prepare(parse_config({"run_dir": str(tmp_path)}), told)
    assert json.loads((tmp_path / "deepspeed.json").read_text()) == told


def test_a_folder_of_something_else_keeps_its_settings(tmp_path: Path) -> None:
    settings = tmp_path / "config.yaml"
    settings.write_text("mine: 1\n")
    config = parse_config({"run_dir": str(tmp_path)})
    with pytest.raises(OutputError, match=r"config\.yaml belongs to no run"):
        run_directory.prepare(config, {})
    assert settings.read_text() == "mine: 1\n"
    settings.unlink()
    run_directory.prepare(config, {})
    run_directory.prepare(config, {})
