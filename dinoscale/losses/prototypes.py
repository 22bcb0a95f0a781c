"""Prototypes W_k = g_k v_k / ||v_k||, or plain ones W = v, and the gradients in v and g.

Shape letters: K prototypes, k some of them, D width.
Source: Salimans and Kingma 2016 (arXiv:1602.07868).
"""

from typing import NamedTuple

import torch
from torch import Tensor

PROTOTYPES = 4096  # at most at a time: with few images their float32 copies would be larger
EPS = 1e-12  # least norm of a prototype, as in torch.nn.functional.normalize


class Prototypes(NamedTuple):
    """Some prototypes: w = scale * v, scale = g / length, length = ||v||; plain ones w = v."""

    v: Tensor  # (k, D)
    length: Tensor | None  # (k, 1); None of plain ones
    scale: Tensor | None  # (k, 1); likewise
    w: Tensor  # (k, D)


def prototypes(
    weight_v: Tensor, weight_g: Tensor | None, plain: bool, part: slice, *, dtype: torch.dtype
) -> Prototypes:
    """Rows `part` of v (K, D) and g (K, 1), or None for ones, normalised in `dtype` or plain."""
    v = weight_v[part].to(dtype)
    if plain:
        return Prototypes(v, None, None, v)
    length = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min_(EPS)
    scale = 1 / length if weight_g is None else weight_g[part].to(dtype) / length
    return Prototypes(v, length, scale, scale * v)


def all_prototypes(
    weight_v: Tensor, weight_g: Tensor | None, plain: bool, *, dtype: torch.dtype
) -> Tensor:
    """W (K, D) of v (K, D) and g (K, 1), or None for ones, in `dtype`; v itself if plain."""
    if plain:
        return weight_v.to(dtype)
    w = torch.empty(weight_v.shape, dtype=dtype, device=weight_v.device)
    for part in slices(len(weight_v), size=PROTOTYPES):
        w[part] = prototypes(weight_v, weight_g, plain, part, dtype=dtype).w
    return w


def weight_norm_backward(d_w: Tensor, chunk: Prototypes) -> tuple[Tensor, Tensor | None]:
    """Gradients in v and g from the gradient in w, which is overwritten; None in g of plain ones.

    With u = v / ||v||: d_v = g / ||v|| (d_w - <d_w,u> u) and d_g = <d_w,u>, row by row
    (Salimans and Kingma, eq. 3).
    """
    if chunk.length is None or chunk.scale is None:
        return d_w, None
    d_g = (d_w * chunk.v).sum(1, keepdim=True).div_(chunk.length)
    return d_w.addcmul_(chunk.v, d_g / chunk.length, value=-1).mul_(chunk.scale), d_g


def slices(length: int, *, size: int) -> list[slice]:
    """The positions of a dimension, `size` at a time, at least one."""
    size = max(1, size)
    return [slice(start, start + size) for start in range(0, length, size)]


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if a tensor is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
