"""What a block keeps for its backward: some activations; the others are made again.

In units of tokens x width, autograd keeps about 17 of a block with an MLP of ratio 4. Seven of
them are a norm or an activation away from another one, or its copy, and a block that is not
compiled never keeps those. Activation checkpointing keeps still fewer of the other 10.
Non-reentrant checkpoints only: the other kind fails under ZeRO-2 and 3 when a block runs twice.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# pointwise: keep the outputs of the matrix products and of the attention (10 units); in a block
#     that is not compiled, which keeps no more anyway, nothing else than without checkpointing.
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


class _Saved:
    """A tensor that autograd saved, or how to make it again."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor
        self._make: Callable[[], Tensor] | None = None

    def value(self) -> Tensor:
        if self._make is None:
            assert self._tensor is not None
            return self._tensor
        with torch.no_grad():
            return self._make()

    def forget(self, whole: Tensor, make: Callable[[], Tensor]) -> bool:
        """Keep only how to make `whole`, of the same storage, if it is that or its transpose."""
        assert self._tensor is not None
        if self._tensor.storage_offset() != whole.storage_offset():
            return False  # ZeRO keeps many weights in one storage
        size, stride = self._tensor.shape, self._tensor.stride()
        self._tensor, self._make = None, lambda: make().as_strided(size, stride)
        return True


_saved: ContextVar[dict[int, list[_Saved]] | None] = ContextVar("_saved", default=None)


@contextmanager
def saving_little() -> Iterator[None]:
    """What autograd saves in this context can be given to `remake`; not within `checkpointed`."""
    by_address: dict[int, list[_Saved]] = {}

    def save(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        by_address.setdefault(tensor.untyped_storage().data_ptr(), []).append(saved)
        return saved

    before = _saved.set(by_address)
    try:
        with saved_tensors_hooks(save, _Saved.value):
            yield
    finally:
        _saved.reset(before)
        by_address.clear()  # autograd keeps `save`, and would keep all until it needs none


def is_saving_little() -> bool:
    """Whether this is within `saving_little`."""
    return _saved.get() is not None


def remake(tensor: Tensor, make: Callable[[], Tensor]) -> None:
    """Keep neither a tensor nor its transpose for the backward, which makes it again.

    Without effect outside `saving_little`.

    Args:
        tensor: alive since it was saved.
        make: returns the same values with the same strides; called without gradients.
    """
    if torch.compiler.is_compiling():
        return  # the compiler chooses what it keeps
    by_address = _saved.get()
    if by_address:
        address = tensor.untyped_storage().data_ptr()
        kept = by_address.pop(address, [])
        by_address[address] = [saved for saved in kept if not saved.forget(tensor, make)]


def checkpointed(
    what: Recompute, function: Callable[..., Tensor], tokens: Tensor, *args: Any
) -> Tensor:
    """Call `function(tokens, *args)`, which draws no random numbers, with activation checkpointing.

    Args:
        what: is recomputed.
        function: of a block.
        tokens: (..., D).
        args: further ones.
    """
    run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if what in _POLICIES:
        policy = functools.partial(_POLICIES[what], width=tokens.shape[-1])
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        run = functools.partial(run, context_fn=contexts)
    result: Tensor = run(function, tokens, *args)
    return result


def _keep_attention(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return _keep_if(_name(operator) in _ATTENTION)


def _keep_products_too(
    _: Any, operator: Any, *args: Any, width: int, **__: Any
) -> CheckpointPolicy:
    name = _name(operator)
    if name in _PRODUCTS:
        # (..., weight transposed) or (x, weight, bias)
        into, out = args[1].shape[::-1] if name == "linear" else args[-1].shape
        # The MLP's last product, which narrows, is only summed: no backward needs it. Nor does it
        # need those of adapters, to their rank and from it: both are small to make again.
        return _keep_if(out >= into >= width)
    return _keep_if(name in _ATTENTION)


def _name(operator: Any) -> str:
    """Name of a torch operator without its overload."""
    return str(operator.__name__).split(".")[0]


def _keep_if(wanted: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


_POLICIES: dict[Recompute, Callable[..., CheckpointPolicy]] = {
    "all_but_attention": _keep_attention,
    "pointwise": _keep_products_too,
}
