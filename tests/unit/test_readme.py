"""READMEs: each command line parses, each setting in it exists, each link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from dinoscale import cli
from dinoscale.config import list_presets, load_config

ROOT = Path(__file__).resolve().parents[2]
READMES = sorted(
    path for path in ROOT.rglob("README.md") if not path.relative_to(ROOT).parts[0].startswith(".")
)
NAMES = [str(path.relative_to(ROOT)) for path in READMES]
_LAUNCHED = re.compile(r"^(?:.*?-m dinoscale|deepspeed --module dinoscale|dinoscale) (.*)$")
_CONFIGURED = ("train", "config", "doctor", "bench", "show", "plan", "launch")
_NO_LETTER = re.compile(r"[^\w\- ]")


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _commands(name: str) -> list[str]:
    found = []
    for block in re.findall(r"```bash\n(.*?)```", _text(name), re.DOTALL):
        for variable, value in re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE):
            block = block.replace(f"${variable}", value)
        lines = [line.split(" #")[0].strip() for line in block.replace("\\\n", "").splitlines()]
        found += [match[1] for line in lines if (match := _LAUNCHED.match(line))]
    return found


@pytest.mark.parametrize(
    ("name", "line"), [(name, line) for name in NAMES for line in _commands(name)]
)
def test_command_of_a_readme_parses(name: str, line: str) -> None:
    options, settings = cli.parser().parse_known_args(shlex.split(line))
    if options.command == "data":
        return  # its own parser reads the rest
    assert not [word for word in settings if word.startswith("-") or "=" not in word], name
    if options.command in _CONFIGURED and options.config in list_presets():
        load_config(options.config, [*options.overrides, *settings])


def test_readmes_have_commands_of_every_kind() -> None:
    said = {line.split()[0] for name in NAMES for line in _commands(name)}
    (subparsers,) = (x for x in cli.parser()._actions if x.dest == "command")
    assert subparsers.choices is not None
    assert said >= set(subparsers.choices) - {"quickstart"}


def test_every_task_of_evaluate_is_shown() -> None:
    lines = _commands("dinoscale/evaluate/README.md")
    said = {line.split()[1] for line in lines if line.startswith("evaluate ")}
    assert said == {
        *("knn", "linear", "logistic", "finetune", "attention", "segment", "pca"),
        *("video", "retrieve", "copies", "compare"),
    }


def test_readme_is_short_and_names_every_preset() -> None:
    text = _text("README.md")
    assert len(text.splitlines()) < 200
    missing = [name for name in list_presets() if f"`{name}`" not in text and name != "quickstart"]
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", _text(name)):
        file, _, heading = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        path = path / "README.md" if path.is_dir() else path
        assert path.is_file(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {_NO_LETTER.sub("", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, target


@pytest.mark.parametrize("name", NAMES)
def test_scripts_and_modules_that_are_named_exist(name: str) -> None:
    scripts = re.findall(r"\./(launchers/\w+\.sh)", _text(name))
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111, script
    named = re.findall(r"`((?:[a-z_]+/)+\w+\.py)", _text(name))
    for module in named:
        found = (ROOT / module, ROOT / "dinoscale" / module, (ROOT / name).parent / module)
        assert any(path.is_file() for path in found), module
