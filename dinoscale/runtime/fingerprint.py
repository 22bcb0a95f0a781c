"""Fingerprint of a result: its input, the command, and the version of the code.

It is stored with the result, as JSON, and compared before the result is used again. `differences`
names what has changed; results of different fingerprints are never mixed.
"""

import ast
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path

from dinoscale.runtime.retry import RetryBudget, is_permanent, read_error
from dinoscale.runtime.versions import package_version

Fingerprint = dict[str, object]  # JSON; see `fingerprint`

_ROOT = Path(__file__).resolve().parents[2]  # folder of our packages
_OURS = ("dinoscale", "data_tools")
_LIBRARIES = {
    "PIL": "pillow", "numpy": "numpy", "scipy": "scipy", "simplejpeg": "simplejpeg",
    "sklearn": "scikit-learn", "tifffile": "tifffile", "timm": "timm", "torch": "torch",
    "torchvision": "torchvision",
}  # fmt: skip
_DIGITS = 16  # of a digest
_STAT_THREADS = 16  # `stat` waits for the file system, not for the processor
_AT_ONCE = 4096  # files whose `stat` is held in memory


def fingerprint(
    *, input: Mapping[str, object], command: Mapping[str, object], code: Mapping[str, object]
) -> Fingerprint:
    """Collect what a result depends on, in the form that JSON gives back.

    Args:
        input: what was read, by its names in messages: `files_fingerprint` of files, or text.
        command: what was done with it: settings by name, or the arguments of a command line.
        code: `code_fingerprint` of the modules that did it.
    """
    parts = {"input": input, "command": command, "code": code}
    loaded: Fingerprint = json.loads(json.dumps(parts))
    return loaded


def differences(kept: object, now: object) -> list[str]:
    """Names of the entries that have changed, such as `input.images.times`, or `everything`.

    Args:
        kept: the older fingerprint, as it was read from a file; None if there is none.
        now: the fingerprint of the same work today.
    """
    return [".".join(path) or "everything" for path in _differing(kept, now)]


def _differing(kept: object, now: object) -> Iterator[tuple[str, ...]]:
    if not (isinstance(kept, dict) and isinstance(now, dict)):
        if kept != now:
            yield ()
        return
    for name in sorted(kept.keys() | now.keys()):
        if (name in kept) != (name in now):
            yield (name,)
        else:
            yield from ((name, *rest) for rest in _differing(kept[name], now[name]))


def digest_of(value: object) -> str:
    """16 hexadecimal digits of the SHA-256 of anything that JSON holds."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def files_fingerprint(root: str, paths: Iterable[str]) -> dict[str, object]:
    """Digests of the names, sizes and times of files, and of their root folder.

    Times are those of the last change of the content (`mtime`) and of anything (`ctime`, which no
    program can set): so a file replaced by another of its size is noticed even under its old
    `mtime`. An unreadable file enters with its error number.

    Args:
        root: the folder; names below it are relative to it. The same files below another root
            differ in `root` and `times` only.
        paths: absolute, in a fixed order.

    Raises:
        UnavailableError: the file system still failed after about a minute.
    """
    digests = {part: hashlib.sha256() for part in ("names", "sizes", "times")}
    number, folder = 0, os.path.join(root, "")

    def state(path: str) -> tuple[int, str]:
        try:
            # Each its own budget: threads would use up a common one at once.
            found = RetryBudget().read(lambda: os.stat(path), path)
        except OSError as error:
            if is_permanent(error):
                return -1, str(error.errno)
            raise read_error(f"the size of {path}", error) from error
        return found.st_size, f"{found.st_mtime_ns} {found.st_ctime_ns}"

    rest = iter(paths)
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        while some := [*islice(rest, _AT_ONCE)]:
            for path, (size, times) in zip(some, pool.map(state, some), strict=True):
                digests["names"].update(os.fsencode(path.removeprefix(folder)) + b"\0")
                digests["sizes"].update(f"{size}\n".encode())
                digests["times"].update(f"{times}\n".encode())
                number += 1
    hexadecimal = {part: digest.hexdigest()[:_DIGITS] for part, digest in digests.items()}
    return {"root": digest_of(os.fsencode(root).hex()), "number": number, **hexadecimal}


@cache
def code_fingerprint(*modules: str) -> dict[str, object]:
    """Digest of our own modules and all of ours that they import; versions of the libraries.

    Comments, docstrings and line breaks do not change it.

    Args:
        modules: e.g. `data_tools.build_shards`.
    """
    trees = dict(sorted(_reached(modules)))
    named = {name.partition(".")[0] for tree in trees.values() for name in _imports(tree)}
    libraries = {
        library: package_version(library)
        for module, library in _LIBRARIES.items()
        if module in named
    }
    dumps = [[name, ast.dump(tree)] for name, tree in trees.items()]
    return {"dinoscale": digest_of(dumps), "python": platform.python_version(), **libraries}


def _reached(modules: Iterable[str]) -> Iterator[tuple[str, ast.Module]]:
    """Our own among these modules and all that they import, with their syntax trees."""
    seen, waiting = set(), [*modules]
    while waiting:
        name = waiting.pop()
        path = _path_of(name)
        if path is None or path in seen:
            continue
        seen.add(path)
        tree = _without_docstrings(ast.parse(path.read_bytes()))
        waiting += _imports(tree)
        yield name, tree


def _path_of(module: str) -> Path | None:
    """File of one of our modules, None for any other name."""
    if module.partition(".")[0] not in _OURS:
        return None
    place = _ROOT.joinpath(*module.split("."))
    found = [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    return found[0] if found else None


def _imports(tree: ast.Module) -> Iterator[str]:
    """Modules imported anywhere in a module, and imported names that may be modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            del node.body[0]
    return tree
