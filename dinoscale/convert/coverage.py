"""Coverage of a network by a set of weights: missing and unexpected tensors, by name and number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES_SHOWN = 8  # per kind of mismatch in a message


@dataclass(frozen=True)
class Coverage:
    """Names of tensors in which weights and a network differ; without any the load is complete.

    Attributes:
        expected: number of tensors of the network.
        missing: its tensors that the weights lack.
        unexpected: tensors of the weights that the network does not have.
        reshaped: tensors of another shape or kind of number, each as `name [found] for [expected]`.
        not_finite: tensors that hold an infinity or a NaN.
    """

    expected: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()

    @property
    def loaded(self) -> int:
        """Number of the network's tensors that are present in the right shape."""
        return self.expected - len(self.missing) - len(self.reshaped)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, left over, of another shape or not finite."""
        return not (self.missing or self.unexpected or self.reshaped or self.not_finite)

    def __str__(self) -> str:
        """`211 of 211 tensors`, or what is wrong, in one sentence."""
        if self.complete:
            return f"{self.loaded} of {self.expected} tensors"
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape or type": self.reshaped,
            "not finite": self.not_finite,
        }
        wrong = [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]
        return "; ".join([f"{self.loaded} of {self.expected} tensors fit", *wrong])


def coverage_of(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Coverage:
    """Compare weights with the tensors of a network, which may be on the meta device."""
    common = [name for name in expected if name in state]
    return Coverage(
        expected=len(expected),
        missing=tuple(name for name in expected if name not in state),
        unexpected=tuple(name for name in state if name not in expected),
        reshaped=tuple(
            f"{name} {_form(state[name])} for {_form(expected[name])}"
            for name in common
            if _form(state[name]) != _form(expected[name])
        ),
        not_finite=tuple(name for name in common if not _finite(state[name])),
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.is_floating_point() else tensor  # 8 bit is not implemented
    return bool(torch.isfinite(wide).all())


def _form(tensor: Tensor) -> str:
    """Shape, and the kind of number where it is not real."""
    if tensor.is_floating_point():
        return str([*tensor.shape])
    return f"{[*tensor.shape]} {str(tensor.dtype).removeprefix('torch.')}"
