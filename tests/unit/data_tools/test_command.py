import re
import shlex
from pathlib import Path

import pytest

from dinoscale import cli
from dinoscale.errors import DataError

_README = Path(__file__).resolve().parents[3] / "data_tools" / "README.md"


def _command_lines() -> list[str]:
    block, *_ = re.findall(r"```bash\n(.*?)```", _README.read_text(), re.DOTALL)  # of the tools
    return [line.removeprefix("dinoscale ") for line in block.splitlines()]


@pytest.mark.parametrize("line", _command_lines())
def test_command_of_the_readme_parses(line: str) -> None:
    assert cli.parser().parse_args(shlex.split(line)).command == "data"


def test_readme_shows_every_tool() -> None:
    modules = {path.stem for path in _README.parent.glob("*.py")}
    shown = {line.split()[1].replace("-", "_") for line in _command_lines()}
    assert shown <= modules
    assert len(shown) == 6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["build-shards", "SRC", "OUT", "--shard-bytes", "much"], "is not a size"),
        (["build-shards", "SRC", "OUT", "--workers", "0"], "--workers"),
        (["build-shards", "NOWHERE", "OUT"], "does not exist"),
        (["index", "SRC", "--workers", "0"], "--workers"),
        (["index", "NOWHERE"], "does not exist"),
        (["inspect-shards", "SRC", "--sheet", "a.jpg"], "is a PNG"),
        (["inspect-shards", "SRC", "--sheet", "a.png", "--sheet-images", "0"], "--sheet-images"),
        (["inspect-shards", "synthetic:shapes?images=3"], "reads files on a disk"),
        (["verify-shards", "pipe:cat a.tar"], "pipe:"),
        (["dataset-stats", "SRC", "--images", "-3"], "--images"),
        (["deduplicate", "SRC", "--radius", "9"], "--radius"),
        (["deduplicate", "SRC", "--keep-list", "SRC/class 0/000.v1.jpg/x"], "cannot write"),
        (["deduplicate", "SRC", "--out", "SRC"], "Is a directory"),
        (["deduplicate", "SRC", "--keep-list", "SRC"], "Is a directory"),
        (["inspect-shards", "SRC", "--sheet", "SRC/class 0/000.v1.jpg/x.png"], "cannot write"),
        (["synthetic", "OUT", "--images", "0"], "images=0"),
        (["synthetic", "OUT", "--size", "2"], "size=2"),
        (["synthetic", "OUT", "--seed", "-1"], "seed=-1"),
        (["synthetic", "SRC/class 0/000.v1.jpg"], "cannot write"),
        (["verify-shards", "SRC", "--out", "SRC/class 0/000.v1.jpg/x"], "cannot write"),
    ],
)
def test_mistakes_are_named(
    class_folder: object, tmp_path: Path, arguments: list[str], says: str
) -> None:
    assert callable(class_folder)
    places = {"SRC": str(class_folder(3)), "OUT": str(tmp_path / "out")}
    places["NOWHERE"] = str(tmp_path / "nowhere")
    filled = [re.sub("SRC|OUT|NOWHERE", lambda m: places[m[0]], text) for text in arguments]
    with pytest.raises(DataError, match=says):
        cli.run(["data", *filled])
    assert not (tmp_path / "out" / "manifest.json").exists()
