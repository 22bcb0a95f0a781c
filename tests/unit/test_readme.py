"""Every command line of the README parses, and every setting in it exists."""

import re
import shlex
from pathlib import Path

import pytest

from dinoscale import cli
from dinoscale.config import list_presets, load_config

ROOT = Path(__file__).resolve().parents[2]
_LAUNCHED = re.compile(r"^(?:.*?-m dinoscale|deepspeed --module dinoscale|dinoscale) (.*)$")


def _command_lines() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [match[1] for line in lines if (match := _LAUNCHED.match(line))]


@pytest.mark.parametrize("line", _command_lines())
def test_command_of_the_readme_parses(line: str) -> None:
    options, settings = cli.parser().parse_known_args(shlex.split(line))
    assert not [word for word in settings if word.startswith("-") or "=" not in word]
    if options.command in ("train", "config", "doctor", "bench", "show", "plan", "launch"):
        load_config(options.config, [*options.overrides, *settings])


def test_readme_has_commands_of_every_kind() -> None:
    said = {line.split()[0] for line in _command_lines()}
    assert said >= {"train", "doctor", "config", "presets", "checkpoint", "export", "evaluate"}
    assert said >= {"bench", "show", "plan", "convert", "launch", "sweep", "report"}


def test_readme_evaluates_every_task() -> None:
    said = {line.split()[1] for line in _command_lines() if line.startswith("evaluate ")}
    assert said == {
        *("knn", "linear", "logistic", "finetune", "attention", "segment", "pca"),
        *("video", "retrieve", "copies", "compare"),
    }


def test_scripts_of_the_readme_exist() -> None:
    scripts = re.findall(r"\./launchers/\w+\.sh", (ROOT / "README.md").read_text())
    assert scripts
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111, script


def test_readme_lists_every_preset() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [name for name in list_presets() if f"`{name}`" not in text and name != "quickstart"]
    assert not missing
