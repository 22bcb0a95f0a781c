"""Fast bfloat16 products on CPUs without bfloat16 instructions.

On such a CPU a float32 product takes a third of the time of a bfloat16 one. Both sum in float32, so
the factors are upcast to float32 and the result is rounded once: the precision is the same, and the
tensors between layers stay bfloat16. On every other device nothing changes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _lacks_bfloat16() -> bool:
    """Whether this is an x86 CPU without bfloat16 instructions; False if torch cannot tell."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has_them = found.get("avx512_bf16", True) or found.get("amx_bf16", True)
    return found.get("architecture") == "x86_64" and not has_them


LACKS_BFLOAT16 = _lacks_bfloat16()


class Linear(nn.Linear):
    """`nn.Linear`, fast in bfloat16 on every CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)


def upcast_linear(module: nn.Module) -> None:
    """Turn every `nn.Linear` inside a module into a `Linear`; parameters keep their names."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, fast in bfloat16 on every CPU."""
    if _upcasts(x):
        result: Tensor = _linear(x, weight, bias)
        return result
    return F.linear(x, weight, bias)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention`, whose backward is fast in bfloat16 on every CPU."""
    if _upcasts(q):
        result: Tensor = _attention(q, k, v)[0]
        return result
    return F.scaled_dot_product_attention(q, k, v)


def _upcasts(x: Tensor) -> bool:
    return LACKS_BFLOAT16 and x.dtype is torch.bfloat16 and x.device.type == "cpu"


@torch.library.custom_op("dinoscale::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], len(weight))


def _keep_factors(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wide = gradient.float().flatten(0, -2)
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    d_x = (wide @ weight.float()).to(x.dtype).view_as(x) if wants_x else None
    d_weight = (wide.T @ x.float().flatten(0, -2)).to(weight.dtype) if wants_weight else None
    return d_x, d_weight, wide.sum(0).to(x.dtype) if wants_bias else None


_linear.register_autograd(_linear_backward, setup_context=_keep_factors)


@torch.library.custom_op("dinoscale::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, logsumexp = _attend(q, k, v)
    return out, logsumexp


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, logsumexp = _attend(q, k, v)
    return out, logsumexp


def _keep_attended(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _attention_backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    q, k, v, out, logsumexp = ctx.saved_tensors
    wide = _attend_backward(
        gradient.float(), q.float(), k.float(), v.float(), out.float(), logsumexp, 0.0, False
    )
    return tuple(d.to(q.dtype) for d in wide)


_attention.register_autograd(_attention_backward, setup_context=_keep_attended)
