"""Verdicts as sentences, printed as they are reached, and as one JSON object."""

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One finding; the text of a warning or a problem ends with the remedy."""

    name: str
    verdict: Verdict
    text: str


def ok(name: str, text: str) -> Check:
    """A finding that needs no action."""
    return Check(name, "ok", text)


def warning(name: str, text: str) -> Check:
    """A finding with which the run can start, but may be slow or end early."""
    return Check(name, "warning", text)


def problem(name: str, text: str) -> Check:
    """A finding with which the run would not start, or not finish."""
    return Check(name, "problem", text)


@dataclass
class Report:
    """Checks in the order they were made.

    Attributes:
        active: print each check on stderr; false on all ranks but 0.
        checks: made so far.
        lost: the error of a rank that stopped answering, after which no collective may follow; or
            None.
    """

    active: bool
    checks: list[Check] = field(default_factory=list)
    lost: str | None = None

    def section(self, title: str, checks: Iterable[Check]) -> None:
        """Add checks under a heading."""
        self._say(title)
        for check in checks:
            self.checks.append(check)
            self._say(f"  {check.verdict:8} {check.name}: {check.text}")

    def count(self, verdict: Verdict) -> int:
        """Number of checks with this verdict."""
        return sum(check.verdict == verdict for check in self.checks)

    def close(self) -> None:
        """Print the overall verdict."""
        problems, warnings = self.count("problem"), self.count("warning")
        found = f"{count_text(problems, 'problem')}, {count_text(warnings, 'warning')}"
        self._say(f"verdict: {'not fit to train' if problems else 'fit to train'} ({found})")

    def as_json(self) -> dict[str, Any]:
        """Counts and checks, ready for JSON."""
        return {
            "problems": self.count("problem"),
            "warnings": self.count("warning"),
            "checks": [asdict(check) for check in self.checks],
        }

    def _say(self, line: str) -> None:
        if self.active:
            print(line, file=sys.stderr, flush=True)


def size_text(num_bytes: float) -> str:
    """Bytes in powers of 1000, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.3g} {unit}" if num_bytes < 1000 else f"{num_bytes:.0f} {unit}"


def count_text(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
