"""Activation checkpointing of a block: keep some activations for the backward, recompute the rest.

In units of tokens x width, a block with an MLP of ratio 4 keeps about 17 without recomputation.
Non-reentrant checkpoints only: the other kind fails under ZeRO-2 and 3 when a block runs twice.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# pointwise: keep the outputs of the matrix products and of the attention (10 units).
# all_but_attention: keep the input of the block and the output of its attention (2 units).
# block: keep the input only (1 unit).
Recompute = Literal["pointwise", "all_but_attention", "block"]

_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "attention",  # the operator of cpu_bf16.py, like "linear" below
}
_PRODUCTS = {"mm", "addmm", "linear"}


def checkpointed(what: Recompute, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call `function(*args)`, which draws no random numbers, with activation checkpointing."""
    run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if what in _CONTEXTS:
        run = functools.partial(run, context_fn=_CONTEXTS[what])
    result: Tensor = run(function, *args)
    return result


def _keep_attention(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return _keep_if(_name(operator) in _ATTENTION)


def _keep_products_too(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    name = _name(operator)
    if name in _PRODUCTS:
        # (..., weight transposed) or (x, weight, bias)
        into, out = args[1].shape[::-1] if name == "linear" else args[-1].shape
        # The MLP's last product, the only one that narrows, is only summed: no backward needs it.
        return _keep_if(out >= into)
    return _keep_if(name in _ATTENTION)


def _name(operator: Any) -> str:
    """Name of a torch operator without its overload."""
    return str(operator.__name__).split(".")[0]


def _keep_if(wanted: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


_CONTEXTS: dict[Recompute, Callable[[], Any]] = {
    "all_but_attention": functools.partial(create_selective_checkpoint_contexts, _keep_attention),
    "pointwise": functools.partial(create_selective_checkpoint_contexts, _keep_products_too),
}
