"""Convolutional networks with the forward signature of our ViT: ResNets and ConvNeXts.

Source: He et al. 2016 (arXiv:1512.03385); Caron et al. 2021 (arXiv:2104.14294), table 2; Liu et al.
2022 (arXiv:2201.03545).
"""

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dinoscale.models.sync_bn import cast_weights, convert_sync_batch_norm
from dinoscale.models.vit import group_by_resolution

STRIDE = 32  # pixels of an image along a side of a place of the last map


class ConvNet(nn.Module):
    """A convolutional network without its classifier: crops to pooled features.

    Parameter and buffer names are those of torchvision's ResNets (`conv1`, `layer1.0.conv1`, ...),
    or those of timm's ConvNeXts (`stem.0`, `stages.0.blocks.0.conv_dw`, ...) with `norm` for
    `head.norm`.

    Attributes:
        name: of the architecture, as `zoo.build_backbone` takes it, without a tag of weights.
        embed_dim: D, channels of the last map.
        depth: 0, as no block has stochastic depth.
        patch_size: 1, as any image size is valid.
        checkpoint_every, recompute: have no effect; activations are always stored.
        subset_rate: has no effect; there is no stochastic depth.
    """

    def __init__(
        self,
        name: str,
        layers: Iterable[tuple[str, nn.Module]],
        *,
        embed_dim: int,
        norm: nn.Module | None = None,
    ) -> None:
        """Adopt the layers of another network, without its pooling.

        Args:
            name: of the architecture.
            layers: in their order, with their names.
            embed_dim: D.
            norm: of maps (N, D, rows, columns) over their channels, also of pooled ones; None for
                none.
        """
        super().__init__()
        self.name, self.embed_dim = name, embed_dim
        self.depth = 0
        self.patch_size = 1
        self.checkpoint_every = 0
        self.recompute = "block"
        self.subset_rate = 0.0
        self._layers = []
        for own_name, layer in layers:
            self.add_module(own_name, layer)
            self._layers.append(own_name)
        self.norm = nn.Identity() if norm is None else norm

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return next(m.in_channels for m in self.modules() if isinstance(m, nn.Conv2d))

    def forward(
        self, crops: Sequence[Tensor], keep: Tensor | None = None, *, all_patches: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return pooled features; batch norm sees one resolution at a time.

        Args:
            crops: tensors (N_i, C, H_i, W_i), normalised pixels.
            keep: None; a convolutional network has no stochastic depth here.
            all_patches: return the last map of the first crops, too.

        Returns:
            (sum N_i, D), rows in the order of `crops`; with `all_patches` also the places of the
            first crops' last map (N_0, rows * columns, D), row by row. Both are normalised as the
            network has it: the pooled features of a ConvNeXt after pooling.

        Raises:
            ValueError: `keep` is given, or there are no crops.
        """
        if keep is not None:
            raise ValueError("a convolutional network has no stochastic depth: keep must be None")
        rows, places = [], None
        for x in group_by_resolution(crops):
            for name in self._layers:
                x = self.get_submodule(name)(x)
            if all_patches and places is None:
                places = self.norm(x)[: len(crops[0])].flatten(2).mT
            rows.append(self.norm(F.adaptive_avg_pool2d(x, 1)).flatten(1))
        pooled = torch.cat(rows)
        return pooled if places is None else (pooled, places)


@dataclass(frozen=True)
class ForwardCounts:
    """What a forward without gradient needs, over the global crops of an image.

    Attributes:
        parameters: scalars in the weights.
        embed_dim: D.
        patch_size: pixels along a side of a place of the last map.
        flops: two for each product.
        live_bytes: of the tensors that are alive at once, at most, without the crops and what the
            convolutions of a library need beside their results.
    """

    parameters: int
    embed_dim: int
    patch_size: int
    flops: int
    live_bytes: int


def forward_counts(
    network: ConvNet, *, images: int, size: int, dtype: torch.dtype
) -> ForwardCounts:
    """Count a forward in evaluation mode with the layers and dtypes of a run.

    A run's batch norms are `SyncBatchNorm`s, which go through float32 copies in bfloat16.

    Args:
        network: on the meta device.
        images: crops.
        size: pixels along a side of a crop.
        dtype: of weights and crops.
    """
    network = copy.deepcopy(network).eval()
    convert_sync_batch_norm(network, lambda summand: summand)
    cast_weights(network, dtype)
    crops = torch.empty(images, network.in_chans, size, size, device="meta", dtype=dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as flops, _Live() as live:
        network([crops], all_patches=True)
    return ForwardCounts(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        embed_dim=network.embed_dim,
        patch_size=STRIDE,
        flops=flops.get_total_flops(),
        live_bytes=live.most,
    )


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are computed inside, while they are alive.

    Attributes:
        most: at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._tensors: dict[int, int] = {}  # by storage, which views share

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._tensors:
            self._tensors[key] = 0
            self._now += size
            self.most = max(self.most, self._now)
        self._tensors[key] += 1
        weakref.finalize(tensor, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self._now -= size
