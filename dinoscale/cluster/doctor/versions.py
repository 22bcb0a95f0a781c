"""Check that libraries are installed, load, have tested versions, and are equal on all ranks."""

import importlib
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dinoscale.cluster.doctor.report import Check, ok, problem, warning
from dinoscale.runtime.hosts import ranks_text
from dinoscale.runtime.versions import package_version

Versions = Mapping[str, str | None]  # package, "python" or "commit" -> version, None if absent

# As in pyproject.toml, which a test compares: (first version that works, first untested version).
SUPPORTED = {
    "torch": ("2.6", "2.14"),
    "torchvision": ("0.21", "0.29"),
    "deepspeed": ("0.19.8", "0.20"),
    "timm": ("1.0.24", None),
    "webdataset": ("0.2.90", None),
    "numpy": ("1.26", None),
    "pillow": ("10.3", None),
    "safetensors": ("0.4.3", None),
    "pydantic": ("2.7", None),
}
# What a training must import, and the module that imports it.
_LOADED = {
    "torchvision": "torchvision",
    "timm": "timm",
    "deepspeed": "dinoscale.engine.student",
    "the data pipeline": "dinoscale.data.loader",
}


def installed() -> dict[str, str | None]:
    """Version of python and of each package of `SUPPORTED`."""
    return {
        "python": platform.python_version(),
        **{package: package_version(package) for package in SUPPORTED},
    }


def load() -> dict[str, str]:
    """Import what a training imports; returns the reasons of failures, by name."""
    failures = {name: _why_not(module) for name, module in _LOADED.items()}
    return {name: reason for name, reason in failures.items() if reason}


def _why_not(module: str) -> str | None:
    try:
        importlib.import_module("dinoscale.models._torchvision").ensure_torchvision()
        importlib.import_module(module)
    except Exception as error:  # a library that does not load may raise anything
        first = (str(error).splitlines() or [""])[0][:300]
        return f"{type(error).__name__}: {first}"
    return None


def torchvision_has_operators() -> bool:
    """Whether its compiled operators fit this torch; call it only if `load` found no failure."""
    return bool(importlib.import_module("torchvision.extension")._has_ops())


def judge_versions(of_ranks: Sequence[Versions], hosts: list[str]) -> list[Check]:
    """Find versions that are known not to work, untested, or different between ranks."""
    checks = []
    for package in SUPPORTED:
        for rank, versions in enumerate(of_ranks):
            check = _judge_version(package, versions.get(package))
            if check:
                where = ranks_text([rank], hosts) + " has " if len(of_ranks) > 1 else ""
                checks.append(replace(check, text=where + check.text))
                break  # the other ranks are most likely the same
    checks += judge_equal(of_ranks, hosts)
    said = ", ".join(f"{name} {found or 'absent'}" for name, found in of_ranks[0].items())
    return checks or [ok("versions", said)]


def judge_equal(of_ranks: Sequence[Versions], hosts: list[str]) -> list[Check]:
    """Find versions that differ from rank 0's."""
    checks = []
    for name, first in of_ranks[0].items():
        different = [r for r, found in enumerate(of_ranks) if found.get(name, first) != first]
        if different:
            checks.append(
                problem(
                    "versions",
                    f"{name} is {first} on rank 0 ({hosts[0]}) but"
                    f" {of_ranks[different[0]][name]} on {ranks_text(different, hosts)};"
                    " use one environment and one checkout on all nodes",
                )
            )
    return checks


def _judge_version(package: str, found: str | None) -> Check | None:
    first, after = SUPPORTED[package]
    wanted = f"{package}>={first}" + (f",<{after}" if after else "")
    if found is None:
        return problem("versions", f"no {package}; pip install '{wanted}'")
    if _number(found) < _number(first):
        text = f"{package} {found}, which is not known to work; pip install '{wanted}'"
        return problem("versions", text)
    if after is not None and _number(found) >= _number(after):
        text = f"{package} {found}, newer than the tested versions; pip install '{wanted}'"
        return warning("versions", text)
    return None


def _number(text: str) -> tuple[int, ...]:
    """The first three numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", text)
    return tuple(int(piece or 0) for piece in match.groups()) if match else (0, 0, 0)


def judge_loading(of_ranks: Sequence[Mapping[str, str]], hosts: list[str]) -> list[Check]:
    """Find libraries that cannot be imported."""
    return [
        problem(
            "libraries",
            f"{name} does not load on {ranks_text([rank], hosts)}: {reason};"
            " reinstall it, see launchers/setup.sh",
        )
        for rank, failures in enumerate(of_ranks)
        for name, reason in failures.items()
    ]


def judge_operators(of_ranks: Sequence[bool], hosts: list[str]) -> list[Check]:
    """Find a torchvision built for another torch, which loads without its operators."""
    without = [rank for rank, has in enumerate(of_ranks) if not has]
    if not without:
        return [ok("libraries", "deepspeed, timm and torchvision load")]
    return [
        warning(
            "libraries",
            f"torchvision's compiled operators do not load on {ranks_text(without, hosts)}:"
            " it was built for another torch; training does not need them, but install torch and"
            " torchvision from the same index",
        )
    ]
