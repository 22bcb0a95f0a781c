"""Transformer block on packed tokens, optionally compiled and with activation checkpointing.

Shape letters: N images, L tokens per image, T tokens of all images together, D width.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinoscale.models.activation_checkpointing import (
    Recompute,
    checkpointed,
    is_saving_little,
    remake,
    saving_little,
)
from dinoscale.models.compiling import Compiled
from dinoscale.models.cpu_bf16 import Linear, attention, linear
from dinoscale.models.rope import Rotation, rotate, turn

Layout = tuple[tuple[int, int], ...]  # (images, tokens per image) of each resolution, in order


class Subset(NamedTuple):
    """The images for which a branch is computed; the branch is dropped for the others.

    Attributes:
        rows: int64 (T',), indices of their tokens among the T.
        weights: (T', 1), multipliers of the branch.
        layout: of the T' tokens.
    """

    rows: Tensor
    weights: Tensor
    layout: Layout


Keep = Tensor | tuple[Subset, Subset] | None  # of the branches of a block, see `Block.forward`
Rotations = Sequence[Rotation] | None  # of each resolution; None where positions do not rotate


class KeylessBias(Linear):
    """Queries, keys and values of one matrix, without the keys' bias: its third does not act."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., 3 D)."""
        of_queries, of_keys, of_values = self.bias.chunk(3)
        bias = torch.cat((of_queries, torch.zeros_like(of_keys), of_values))
        return linear(x, self.weight, bias)


def mask_key_bias(blocks: Iterable[nn.Module]) -> None:
    """Switch off the bias of the keys in every block; parameters keep their names."""
    for block in blocks:
        block.get_submodule("attn.qkv").__class__ = KeylessBias


class Attention(nn.Module):
    """Multi-head self-attention within each image of a packed sequence."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.num_heads: int = source.num_heads
        self.head_dim: int = source.head_dim
        self.qkv = source.qkv
        self.q_norm = source.q_norm
        self.k_norm = source.k_norm
        self.norm = getattr(source, "norm", nn.Identity())  # older timm has none
        self.proj = source.proj

    def forward(self, tokens: Tensor, layout: Layout, rotations: Rotations = None) -> Tensor:
        """Map tokens (T, D) to (T, D)."""
        groups = self._heads(tokens, layout, rotations)
        # Each (N, L, heads, head_dim).
        outputs = [attention(q, k, v).transpose(1, 2) for q, k, v in groups]
        packed = torch.cat([out.flatten(0, 1) for out in outputs])  # (T, heads, head_dim)
        sizes = [n * length for n, length in layout]
        for out, copy in zip(outputs, packed.detach().split(sizes), strict=True):
            _keep_copy(out, copy.view_as(out))
        return self.proj(self.norm(packed.flatten(1)))  # type: ignore[no-any-return]  # untyped

    def weights(
        self,
        tokens: Tensor,
        layout: Layout,
        rotations: Rotations = None,
        *,
        queries: int | None = None,
    ) -> Tensor:
        """Attention of tokens (N*L, D) of one resolution: (N, heads, L, L), rows sum to 1.

        With `queries`, only the rows of the first `queries` tokens: (N, heads, queries, L).
        """
        ((q, k, _),) = self._heads(tokens, layout, rotations)
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = q[:, :, :queries].to(dtype) @ k.to(dtype).transpose(-2, -1)  # (N, heads, L, L)
        return torch.softmax(scores * self.head_dim**-0.5, dim=-1)

    def _heads(
        self, tokens: Tensor, layout: Layout, rotations: Rotations
    ) -> list[tuple[Tensor, ...]]:
        """Queries, keys and values of each resolution, each (N, heads, L, head_dim)."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.num_heads, self.head_dim))
        if not isinstance(self.q_norm, nn.Identity) or not isinstance(self.k_norm, nn.Identity):
            q, k, v = qkv.unbind(1)
            qkv = torch.stack((self.q_norm(q), self.k_norm(k), v), dim=1)
        if torch.compiler.is_compiling():
            groups = _unpacked(qkv, layout)
            if rotations is None:
                return groups
            turned = zip(groups, rotations, strict=True)
            return [(rotate(q, by), rotate(k, by), v) for (q, k, v), by in turned]
        # Selective checkpointing may keep the product's result as it was.
        overwrite = not torch.is_grad_enabled() or is_saving_little()
        heads = _Unpacked.apply(qkv, layout, rotations, overwrite)  # type: ignore[no-untyped-call]
        return [heads[i : i + 3] for i in range(0, len(heads), 3)]


def _unpacked(qkv: Tensor, layout: Layout) -> list[tuple[Tensor, ...]]:
    """Views of queries, keys and values (T, 3, heads, head_dim): (N, heads, L, head_dim) each."""
    parts = qkv.split([n * length for n, length in layout])
    return [
        part.unflatten(0, at).transpose(1, 3).unbind(2)
        for part, at in zip(parts, layout, strict=True)
    ]


class _Unpacked(torch.autograd.Function):
    """`_unpacked`, then queries and keys turn.

    It overwrites them where nothing else needs them, so that attention keeps no second copy. The
    backward writes the gradients of all three, turned back, once into one tensor, where autograd
    would copy them for each resolution and again for all.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, layout: Layout, rotations: Rotations, overwrite: bool
    ) -> tuple[Tensor, ...]:
        ctx.layout, ctx.rotations, ctx.shape = layout, rotations, qkv.shape
        groups = _unpacked(qkv, layout)
        if rotations is None:
            return tuple(itertools.chain(*groups))
        turned = qkv if overwrite else torch.empty_like(qkv[:, :2])
        sizes = [n * length for n, length in layout]
        for part, into, at, by in zip(
            qkv[:, :2].split(sizes), turned[:, :2].split(sizes), layout, rotations, strict=True
        ):
            turn(part.unflatten(0, at), by, into=into.unflatten(0, at))
        pairs = zip(_unpacked(turned, layout), groups, strict=True)
        return tuple(itertools.chain(*((q, k, v) for (q, k, *_), (*_, v) in pairs)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        whole = gradients[0].new_empty(ctx.shape)
        targets = itertools.chain(*_unpacked(whole, ctx.layout))
        for index, (gradient, target) in enumerate(zip(gradients, targets, strict=True)):
            if ctx.rotations is None or index % 3 == 2:
                target.copy_(gradient)
                continue
            by = ctx.rotations[index // 3]
            turn(gradient.transpose(1, 2), by, into=target.transpose(1, 2), back=True)
        return whole, None, None, None


def _keep_copy(tensor: Tensor, copy: Tensor) -> None:
    """For the backward, if its strides are those of the tensor, which depends on the device."""
    if copy.stride() == tensor.stride():
        remake(tensor, lambda: copy)


class ScaledLinear(Linear):
    """A linear layer and the layer scale after it, gamma (x W^T + b), as one product.

    Scales the weights instead of the outputs. So these need not be kept for the gradient of gamma,
    which follows from that of the scaled weights.
    """

    _scale: tuple[Any]  # in a tuple: the scale is not a submodule of this layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if torch.compiler.is_compiling():  # its graph would keep the scaled weights
            return self._scale[0].gamma * linear(x, self.weight, self.bias)  # type: ignore[no-any-return]  # of timm
        weight = self._scaled_weight()
        result = linear(x, weight, None if self.bias is None else self._scale[0].gamma * self.bias)
        remake(weight, self._scaled_weight)
        return result

    def _scaled_weight(self) -> Tensor:
        return self._scale[0].gamma[:, None] * self.weight  # type: ignore[no-any-return]  # of timm

    @classmethod
    def adopt(cls, layer: nn.Linear, scale: nn.Module) -> None:
        """Have a layer scale its weights, unless `scale` is the identity."""
        if not isinstance(scale, nn.Identity):
            layer.__class__ = cls
            layer._scale = (scale,)  # type: ignore[assignment]  # an attribute of the new class


class _Adapted(Linear):
    """A linear layer and a low-rank adapter: y = W x + b + (alpha / r) B A x.

    A (r, in) is drawn as a linear layer's weight is, B (out, r) is 0, so that an adapted network
    begins as the one without adapters. Their names are `lora_a` and `lora_b` beside `weight`, and
    the layer's own tensors keep theirs.
    Source: Hu et al. 2021 (arXiv:2106.09685), section 4.1. Differs: all matrices of a block have
    one, in place of those of queries and values alone.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return super().forward(x) + linear(linear(x, self.lora_a, None), self._scaled_b(), None)

    def _scaled_b(self) -> Tensor:
        return self.lora_scale * self.lora_b


class _AdaptedKeylessBias(_Adapted, KeylessBias):
    """A `KeylessBias` likewise."""


class _AdaptedScaledLinear(_Adapted, ScaledLinear):
    """A `ScaledLinear` likewise; the layer scale acts on the adapter, too."""

    def _scaled_b(self) -> Tensor:
        return self._scale[0].gamma[:, None] * super()._scaled_b()  # type: ignore[no-any-return]  # of timm


_ADAPTED = {
    Linear: _Adapted,
    KeylessBias: _AdaptedKeylessBias,
    ScaledLinear: _AdaptedScaledLinear,
}


def add_adapters(blocks: Iterable[nn.Module], *, rank: int, alpha: float) -> None:
    """Give every matrix of the blocks an adapter, in place.

    Args:
        blocks: of a `VisionTransformer`.
        rank: r, at least 1.
        alpha: the adapter is multiplied by alpha / r.
    """
    for block in blocks:
        for layer in list(block.modules()):
            adapted: Any = _ADAPTED.get(type(layer))  # type: ignore[arg-type]  # of any module
            if adapted is not None:
                _adapt(layer, adapted, rank=rank, scale=alpha / rank)


def _adapt(layer: Any, adapted: type[_Adapted], *, rank: int, scale: float) -> None:
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    layer.lora_a = nn.Parameter(torch.empty(rank, layer.in_features, **like))
    nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))
    layer.lora_b = nn.Parameter(torch.zeros(layer.out_features, rank, **like))
    layer.lora_scale = scale
    layer.__class__ = adapted


class Block(nn.Module):
    """Pre-norm transformer block on packed tokens; adopts the layers of a timm block.

    All inputs are arguments, and the children run only inside its forward, so it can be a ZeRO-3
    leaf module, be checkpointed and be compiled by itself.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.norm1 = source.norm1
        self.attn = Attention(source.attn)
        self.ls1 = source.ls1
        self.norm2 = source.norm2
        self.mlp = source.mlp
        self.ls2 = source.ls2
        ScaledLinear.adopt(self.attn.proj, self.ls1)
        ScaledLinear.adopt(self.mlp.fc2, self.ls2)

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        keep: Keep = None,
        rotations: Rotations = None,
        *,
        recompute: Recompute | None = None,
        compiled: bool = False,
    ) -> Tensor:
        """Add both branches: x <- x + keep[0] * attention(x), then x <- x + keep[1] * mlp(x).

        Args:
            tokens: x, (T, D).
            layout: how the T tokens split into resolutions and images.
            keep: (2, T, 1) multipliers of the two branches, float32; or the subset of images for
                which each branch is computed; None for ones.
            rotations: of queries and keys, one for each resolution of `layout`; None for none.
            recompute: which activations the backward pass recomputes; None for those that eager
                blocks always do.
            compiled: run a compiled graph that all blocks share; eager where compiling fails.
        """
        run = _run
        if compiled:
            run = _compiled_subsets if isinstance(keep, tuple) else _compiled
        return run(self, tokens, layout, keep, rotations, recompute)

    def add_branches(
        self, tokens: Tensor, layout: Layout, keep: Keep, rotations: Rotations
    ) -> Tensor:
        """Do what `forward` does, without compiling or checkpointing."""
        keep_attention, keep_mlp = (None, None) if keep is None else (keep[0], keep[1])

        def attend(x: Tensor, at: Layout) -> Tensor:
            return _of_norm(self.norm1, x, lambda normalised: self.attn(normalised, at, rotations))

        def widen(x: Tensor, _: Layout) -> Tensor:
            return _of_norm(self.norm2, x, lambda normalised: _feed_forward(self.mlp, normalised))

        tokens = _add(tokens, layout, keep_attention, attend)
        return _add(tokens, layout, keep_mlp, widen)


def _of_norm(norm: nn.Module, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """The branch of the normalised tokens, which are made again from the tokens x (T, D)."""
    normalised = norm(x)
    result = branch(normalised)
    kept = x.detach()
    remake(normalised, lambda: norm.forward(kept))  # not a call, which would run ZeRO's hooks
    return result


def _feed_forward(mlp: Any, x: Tensor) -> Tensor:
    """An MLP or SwiGLU of timm, of tokens (T, D).

    Only what its first layer returns is kept for the backward. The activation, and the product of a
    SwiGLU, are made again from that.
    """
    if not torch.is_grad_enabled():
        return mlp(x)  # type: ignore[no-any-return]  # of timm; frees its tensors as early as it can
    gate, *factors = _first_layer(mlp, x)
    activated = mlp.act(gate)
    hidden = activated * factors[0] if factors else activated
    result: Tensor = mlp.fc2(mlp.norm(hidden))
    kept, *others = (first.detach() for first in (gate, *factors))
    remake(activated, lambda: mlp.act.forward(kept))
    if others:
        remake(hidden, lambda: mlp.act.forward(kept) * others[0])
    return result


def _first_layer(mlp: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Input of the activation, and of a SwiGLU its factor, each (T, H)."""
    if hasattr(mlp, "fc1_g"):  # a layer for each
        return mlp.fc1_g(x), mlp.fc1_x(x)
    first: Tensor = mlp.fc1(x)
    if not hasattr(mlp, "gate_last"):
        return (first,)
    halves = first.chunk(2, dim=-1)
    return halves[::-1] if mlp.gate_last else halves


def _add(
    tokens: Tensor,
    layout: Layout,
    keep: Tensor | Subset | None,
    branch: Callable[[Tensor, Layout], Tensor],
) -> Tensor:
    """Tokens (T, D) plus the kept part of a residual branch.

    The multipliers are float32 even if the tokens are not: rounded to bf16, 1 / (1 - r) would give
    the branch a mean of 0.996 to 1.003 instead of 1.
    """
    if keep is None:
        return tokens + branch(tokens, layout)
    if isinstance(keep, Tensor):
        return torch.addcmul(tokens, branch(tokens, layout), keep).to(tokens.dtype)
    kept = branch(tokens.index_select(0, keep.rows), keep.layout)  # (T', D)
    return tokens.index_add(0, keep.rows, (kept * keep.weights).to(kept.dtype))


def _run(
    block: Block,
    tokens: Tensor,
    layout: Layout,
    keep: Keep,
    rotations: Rotations,
    recompute: Recompute | None,
) -> Tensor:
    compiling = torch.compiler.is_compiling()
    if not torch.is_grad_enabled() or (recompute is None and compiling):
        return block.add_branches(tokens, layout, keep, rotations)
    if recompute is None or (recompute == "pointwise" and not compiling):
        with saving_little():
            tokens = block.add_branches(tokens, layout, keep, rotations)
            for parameter in block.parameters():
                # What stage 3 gathers for the forward is freed after it, and gathered again.
                remake(parameter, parameter.detach)
        return tokens
    # Inside the block, not around it: stage 3 then gathers its weights once for the backward.
    return checkpointed(recompute, block.add_branches, tokens, layout, keep, rotations)


def _run_subsets(
    block: Block,
    tokens: Tensor,
    layout: Layout,
    keep: Keep,
    rotations: Rotations,
    recompute: Recompute | None,
) -> Tensor:
    return _run(block, tokens, layout, keep, rotations, recompute)


_compiled = Compiled(_run, name="transformer blocks", dynamic=False)
# Subset sizes change from block to block; after the second block the compiler makes them dynamic.
_compiled_subsets = Compiled(_run_subsets, name="transformer blocks", dynamic=None)
