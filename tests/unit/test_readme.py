"""READMEs: commands of every kind are shown, and each link leads somewhere.

`tests/e2e/test_readme_commands.py` runs the commands.
"""

import re

import pytest

from dinoscale import cli
from dinoscale.config import list_presets
from tests.forked import ROOT
from tests.readmes import NAMES, commands_of, text_of

_NO_LETTER = re.compile(r"[^\w\- ]")


def test_readmes_have_commands_of_every_kind() -> None:
    said = {line.split()[0] for name in NAMES for line in commands_of(name)}
    (subparsers,) = (x for x in cli.parser()._actions if x.dest == "command")
    assert subparsers.choices is not None
    assert said >= set(subparsers.choices) - {"quickstart"}


def test_every_task_of_evaluate_is_shown() -> None:
    lines = commands_of("dinoscale/evaluate/README.md")
    said = {line.split()[1] for line in lines if line.startswith("evaluate ")}
    assert said == {
        *("knn", "linear", "logistic", "finetune", "probe", "attention", "segment", "pca"),
        *("video", "retrieve", "copies", "rank", "segmentation", "depth"),
        *("discover", "correspond", "transfer", "compare"),
    }


def test_readme_is_short_and_names_every_preset() -> None:
    text = text_of("README.md")
    assert len(text.splitlines()) < 200
    named = [name for name in list_presets() if not name.startswith("quickstart")]
    assert not [name for name in named if f"`{name}`" not in text]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(name)):
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
    scripts = re.findall(r"\./(launchers/\w+\.sh)", text_of(name))
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111, script
    named = re.findall(r"`((?:[a-z_]+/)+\w+\.py)", text_of(name))
    for module in named:
        found = (ROOT / module, ROOT / "dinoscale" / module, (ROOT / name).parent / module)
        assert any(path.is_file() for path in found), module
