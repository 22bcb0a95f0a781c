"""The numbers of a run, and the first that differs between two runs.

The reference's names of tensors and sub-networks are translated into ours.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.golden23.reference_names import in_our_names, our_tensors

Record = dict[str, Any]
"""The numbers of a run.

losses: per step, by the reference's names, means over ranks.
grad, student, teacher: per step, norm of every tensor; grad is before clipping.
parts: per step, norm of the gradient over each sub-network.
centers: per step, norms after it, "dino" and "ibot"; empty with Sinkhorn-Knopp.
last: after the last step, "student", "teacher", "centers" -> name -> tensor.
"""
PER_STEP = ("losses", "parts", "grad", "student", "teacher", "centers")


@dataclass(frozen=True)
class Bounds:
    """Largest relative errors of a loss, of a norm, and norm-wise of a tensor at the end."""

    losses: float
    norms: float
    tensors: float


def parts_of(norms: Mapping[str, float]) -> dict[str, float]:
    """Norms over the sub-networks from those of their tensors."""
    return {
        part: math.hypot(*(norms[name] for name in of_part))
        for part, of_part in itertools.groupby(sorted(norms), key=lambda name: name.split(".")[0])
    }


def renamed(record: Record) -> Record:
    """The record of a reference's run with our names of tensors and sub-networks."""
    per_step = {
        kind: [in_our_names(norms, math.hypot) for norms in record[kind]]
        for kind in ("parts", "grad", "student", "teacher")
        if kind in record
    }
    last = record["last"]
    networks = {
        which: our_tensors(last[which]) for which in ("student", "teacher") if which in last
    }
    return record | per_step | {"last": last | networks}


def require(found: Record, expected: Record, bounds: Bounds, *, label: str) -> None:
    """Fail with the first step and number that differ by more than the bounds."""
    for step in range(len(expected["losses"])):
        for kind in (kind for kind in PER_STEP if kind in expected):
            bound = bounds.losses if kind == "losses" else bounds.norms
            numbers, wanted = found[kind][step], expected[kind][step]
            assert numbers.keys() == wanted.keys(), (label, kind, numbers.keys() ^ wanted.keys())
            for name, value in wanted.items():
                if is_qkv_bias(name) and kind != "grad":
                    continue
                if not abs(numbers[name] - value) <= bound * abs(value):
                    raise AssertionError(
                        f"{label}, step {step}, {kind} {name}: {numbers[name]!r} instead of "
                        f"{value!r}, off by {abs(numbers[name] - value) / abs(value):.1e}"
                    )
    for which, wanted in expected["last"].items():
        errors = distances(found["last"][which], wanted)
        worst = max(errors, key=lambda name: errors[name], default=None)
        if worst is not None and errors[worst] > bounds.tensors:
            raise AssertionError(
                f"{label}, at the end, {which} {worst}: off by {errors[worst]:.1e}"
            )


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of every tensor, norm of the difference over norm.

    Of qkv.bias without the key's third: its gradient is zero but for rounding, along which AdamW
    steps.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    errors = {}
    for name, wanted in expected.items():
        pair = found[name].double().flatten(), wanted.double().flatten()
        if is_qkv_bias(name):
            pair = tuple(torch.cat((x.chunk(3)[0], x.chunk(3)[2])) for x in pair)
        errors[name] = float((pair[0] - pair[1]).norm() / pair[1].norm().clamp_min(1e-12))
    return errors


def is_qkv_bias(name: str) -> bool:
    """Whether a third of the tensor is the keys' bias."""
    return name.endswith("attn.qkv.bias")
