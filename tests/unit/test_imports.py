"""Imports point one way, heavy libraries stay where they belong, and every setting is read."""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from dinoscale.config import RunConfig

PACKAGE = Path(__file__).resolve().parents[2] / "dinoscale"
DATA_TOOLS = PACKAGE.parent / "data_tools"

# A module imports from its own part or from parts of lower levels, never from a neighbour.
LEVELS: list[set[str]] = [
    {"errors"},
    {"runtime"},
    {"config"},
    {"data", "models", "losses"},
    {"engine"},
    {"checkpoint"},
    {"convert"},
    {"evaluate"},
    {"cluster"},
    {"training"},
    {"planning"},
    {"reports"},
    {"data_tools"},
    {"scaling", "recipe"},
    {"cli"},
    {"__main__"},
]
DATA_TOOLS_READ = {"errors", "runtime", "data", "convert", "evaluate"}  # nothing of a training
LEAVES = {"data", "models", "losses"}  # take tensors and numbers, never a config
ONLY_IN = {
    "deepspeed": ("engine/",),
    "torch.distributed": ("runtime/distributed.py",),
    "timm": ("models/", "convert/formats/to_timm.py"),
    "torchvision": ("models/",),
    "pydantic": ("config/",),
    "yaml": ("config/",),
    "matplotlib": ("evaluate/", "reports/", "scaling/"),
    "tifffile": ("data/",),
    "sklearn": ("evaluate/",),
    "transformers": ("convert/formats/to_hf.py",),
    "onnx": ("convert/formats/to_graphs.py",),
    "onnxruntime": ("convert/formats/to_graphs.py",),
    "scipy": ("evaluate/", "scaling/"),
}


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def _nodes(path: Path) -> tuple[ast.AST, ...]:
    """Of a file's syntax tree that tell what it imports and reads; parsed once for all tests."""
    kinds = (ast.Import, ast.ImportFrom, ast.Attribute, ast.arg)
    return tuple(n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kinds))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            if node.module in ("dinoscale", "torch"):
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _part(dotted: str) -> str:
    """The part of ours that a module belongs to, empty for the modules of others."""
    pieces = dotted.split(".")
    if pieces[0] == "data_tools":
        return "data_tools"
    return pieces[1] if pieces[0] == "dinoscale" and len(pieces) > 1 else ""


def _level(part: str) -> int:
    (level,) = [number for number, parts in enumerate(LEVELS) if part in parts]
    return level


def test_imports_point_to_lower_levels_only() -> None:
    wrong = []
    for path in _files():
        relative = path.relative_to(PACKAGE)
        own = relative.parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name, line in _imports(path):
            part = _part(name)
            if not part or part == own:
                continue
            if _level(part) >= _level(own):
                wrong.append(f"{relative}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_data_tools_need_neither_config_nor_engine() -> None:
    files = sorted(path for path in DATA_TOOLS.rglob("*.py") if path.name != "__main__.py")
    names = ("kmeans", "hierarchy", "neighbours", "search", "retrieve")
    with_torch = {"features.py", *(f"curation/{name}.py" for name in names)}
    assert with_torch <= {str(path.relative_to(DATA_TOOLS)) for path in files}
    for path in files:
        parts = {_part(name) for name, _ in _imports(path)} - {"", "data_tools"}
        if path.parent.name == "curation":
            parts -= {"reports"}  # its pages
        assert parts <= DATA_TOOLS_READ, (path.name, parts)
        heavy = {name.split(".")[0] for name, _ in _imports(path)} & {"torch", *ONLY_IN}
        if str(path.relative_to(DATA_TOOLS)) in with_torch:
            heavy -= {"torch"}
        assert not heavy, (path.name, heavy)


def test_cores_are_counted_in_one_place() -> None:
    for path in [*_files(), *DATA_TOOLS.rglob("*.py")]:
        found = re.findall("cpu_count|sched_getaffinity", path.read_text())
        assert path.name == "cores.py" or not found, (path, found)


def test_leaves_do_not_import_the_config() -> None:
    for path in _files():
        relative = path.relative_to(PACKAGE)
        if relative.parts[0].removesuffix(".py") in LEAVES:
            named = [name for name, _ in _imports(path) if name.startswith("dinoscale.config")]
            assert not named, (relative, named)


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_where_they_belong(library: str) -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in _files()
        for name, _ in _imports(path)
        if name == library or name.startswith(f"{library}.")
    }
    assert users, f"nothing imports {library}: remove the rule, or the dependency"
    outside = {user for user in users if not user.startswith(ONLY_IN[library])}
    assert not outside


def _fields(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation)


def test_every_setting_is_read_outside_the_config() -> None:
    """Read: an attribute somewhere, or a parameter that its section is unpacked into."""
    read = set()
    for path in _files():
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] == "config" and relative.name != "resolve.py":
            continue
        for node in _nodes(path):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.arg):
                read.add(node.arg)
    unread = set(_fields(RunConfig)) - read
    assert not unread


def test_every_library_is_a_declared_dependency() -> None:
    """Not one that is there only because another one needs it."""
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    declared = {name.lower() for name in re.findall(r'^  "([\w-]+)[>=\[]', text, re.MULTILINE)}
    declared |= set(re.findall(r'"([\w-]+)>=', text))
    called = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "faiss": "faiss-cpu"}
    called["pydantic_core"] = "pydantic"  # of one version, pinned by it
    own = {"dinoscale", "data_tools", "_typeshed", *sys.stdlib_module_names}
    files = [*_files(), *DATA_TOOLS.rglob("*.py")]
    used = {name.split(".")[0] for path in files for name, _ in _imports(path)} - own
    assert {called.get(name, name) for name in used} - declared == set()
