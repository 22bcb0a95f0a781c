"""Two forms of one loss side by side: the same numbers, their time in turns, and their memory."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dinoscale.planning.bench.budget import in_turns, say
from dinoscale.planning.bench.tensor_memory import with_peak_bytes

Form = Callable[..., Tensor]


def compare_forms(
    forms: dict[str, Form],
    inputs: tuple[Tensor, ...],
    *,
    turns: int,
    low: torch.dtype,
    limit_s: float,
) -> dict[str, Any]:
    """Seconds, bytes and ratios of a loss with its gradients.

    Args:
        forms: "ours" and then another, by name: tensors like `inputs` -> scalar.
        inputs: what both are computed from and differentiated in.
        turns: measurements of each form, in turn.
        low: bfloat16, under which the other form runs autocast, or float32.
        limit_s: seconds for all turns.

    Returns:
        JSON-able: seconds (median, least, largest), peak bytes of all tensors, inputs included,
        and the ratios other / ours of seconds within a turn, ours / other of bytes.
    """
    other = next(name for name in forms if name != "ours")

    def as_theirs(*leaves: Tensor) -> Tensor:
        with torch.autocast(leaves[0].device.type, low, enabled=low is torch.bfloat16):
            return forms[other](*leaves)

    both = {"ours": forms["ours"], other: as_theirs}
    tolerance = 0.1 if low is torch.bfloat16 else 1e-3
    for mine, theirs in zip(*(_run(form, inputs) for form in both.values()), strict=True):
        error = torch.linalg.vector_norm(mine.float() - theirs.float())
        assert error <= tolerance * torch.linalg.vector_norm(theirs.float()), float(error)
    del mine, theirs
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for _ in in_turns(turns, limit_s=limit_s):
        for name, form in both.items():
            begin = time.perf_counter()
            _run(form, inputs)[0].item()  # waits for the device
            seconds[name].append(time.perf_counter() - begin)
        say(", ".join(f"{name} {times[-1]:.3g} s" for name, times in seconds.items()))
    peaks = {name: with_peak_bytes(partial(_run, form, inputs))[1] for name, form in both.items()}
    faster = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {
        "seconds": {name: _spread(times) for name, times in seconds.items()},
        "peak_bytes": peaks,
        "faster": _spread(faster),
        "memory": peaks["ours"] / peaks[other],
    }


def _run(form: Form, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Loss and gradients of fresh leaves with the values of `inputs`."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    loss = form(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
