"""What all tests share: a cache, reports that can be sent, their order, the minutes they took."""

import gc
import math
import os
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says more about the machine than about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Minutes for the tests of each folder; three workers at once make them 19.
BUDGET_MIN = {
    "multinode": 8.0,
    "faults": 9.5,
    "distributed": 13.0,
    "e2e": 11.5,
    "golden": 1.5,
    "golden23": 2.5,
    "gpu": 0.5,
    "unit": 10.5,
}
_WAITING, _SHORT = ("multinode", "faults"), ("unit", "elsewhere")
_ROOT = Path(__file__).resolve().parent
_crashed: list[str] = []  # workers of pytest-xdist


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("DINOSCALE_CACHE")
    os.environ["DINOSCALE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["DINOSCALE_CACHE"]
    else:
        os.environ["DINOSCALE_CACHE"] = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that often wait for others take turns with those that compute; short ones come last.

    So one worker has the cores while the other waits, and none is left with a long file at the end.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in sorted(
        items, key=lambda item: [*BUDGET_MIN, "elsewhere"].index(_folder(item.path))
    ):
        files.setdefault(item.path, []).append(item)
    long = [path for path in files if _folder(path) not in _SHORT]
    waiting = [path for path in long if _folder(path) in _WAITING]
    computing = [path for path in long if _folder(path) not in _WAITING]
    turns = [path for pair in zip_longest(waiting, computing) for path in pair if path]
    items[:] = [item for path in dict.fromkeys([*turns, *files]) for item in files[path]]


def pytest_collection_finish() -> None:
    """What thousands of tests and their modules consist of stays: no collection looks at it again.

    Measurements of memory collect garbage and list all objects, and processes that are forked from
    this one keep sharing these pages.
    """
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _libraries_stay() -> None:
    """So do libraries that a test before has imported: there may be a million objects in them."""
    gc.collect()
    gc.freeze()


def _folder(path: Path) -> str:
    """The one of `BUDGET_MIN` that holds a test file, else "elsewhere"."""
    inside = (name for name in BUDGET_MIN if _ROOT / name in path.parents)
    return next(inside, "elsewhere")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """File names that are no Unicode stand in captured logs; workers send text only."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """A worker ended; with an error, if it was not asked to."""
    if error:
        _crashed.append(f"{node}: {error}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A session that lost a worker failed: pytest-xdist may end it with code 0 and no test run."""
    if _crashed:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How long each folder took, and which took more than its share."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[_folder(terminalreporter.config.rootpath / report.location[0])] += (
                    report.duration
                )
    if not seconds:
        return
    terminalreporter.section("minutes of tests")
    for folder, spent in seconds.most_common():
        budget = BUDGET_MIN.get(folder, math.inf)
        over = f", over its share of {budget:g}" if spent > 60 * budget else ""
        terminalreporter.write_line(f"{folder:12} {spent / 60:5.1f}{over}")
