"""A frozen teacher whose outputs were computed before the run, and stored.

A micro-batch brings what the network's forward would have found in it. Of heads these are the unit
vectors before the prototypes: temperature, centering and Sinkhorn-Knopp act in the run, as ever.
The network is not built; the prototypes, s K D bytes of each head, are whole on every rank.
Shape letters: K prototypes, D width before them, s bytes of the compute dtype.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinoscale.engine.frozen.seen import Seen
from dinoscale.engine.micro_batch import FeatureTargets, MicroBatch
from dinoscale.engine.student import materialize
from dinoscale.models.network import DinoNetwork
from dinoscale.runtime import distributed

LAST_LAYER = ".last_layer."  # in the names of prototypes in a network


class StoredHeads:
    """The prototypes of a frozen teacher, which its stored unit vectors meet.

    Attributes:
        identity: digest of the teacher's weights, on rank 0; None until the prototypes are there.
    """

    def __init__(self, network: DinoNetwork, dtype: torch.dtype) -> None:
        """Allocate the prototypes, all zero.

        Args:
            network: of the teacher, on the meta device.
            dtype: of the prototypes.
        """
        self.identity: str | None = None
        heads = {"head": network.head, "patch_head": network.patch_head}
        self._layers = {
            name: head.last_layer.requires_grad_(False)
            for name, head in heads.items()
            if head is not None
        }
        for layer in self._layers.values():
            materialize(layer, dtype)
        self._weights: dict[str, nn.Parameter] = {
            f"{name}{LAST_LAYER}{key}": value
            for name, layer in self._layers.items()
            for key, value in layer.named_parameters()
        }
        for value in self._weights.values():
            nn.init.zeros_(value)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor] | None, *, identity: str | None) -> None:
        """Set the prototypes; collective. Arguments as of `FrozenTeacher.load`."""
        for name, own in self._weights.items():
            value = torch.empty(own.shape)
            if weights is not None and distributed.rank() == 0:
                value.copy_(weights[name])
            distributed.broadcast(value)
            own.copy_(value)
        self.identity = identity

    def look(self, batch: MicroBatch, seen: Seen) -> None:
        """Show what is stored of a micro-batch."""
        assert batch.stored is not None
        classes, patches = batch.stored
        head, own_of_patches = self._layers["head"], self._layers.get("patch_head")
        if patches is None:
            head(classes, lambda x, *w: seen.of_prototypes(x, None, *w))
        elif own_of_patches is None:
            n = len(classes)
            # As a network's they lie behind each other: a product may round by where rows begin.
            rows = torch.cat((classes, patches))
            head(rows, lambda x, *w: seen.of_prototypes(x[:n], x[n:], *w))
        else:
            head(classes, lambda x, *w: seen.of_prototypes(x, None, *w))
            own_of_patches(patches, lambda y, *w: seen.of_prototypes(None, y, *w))

    def num_bytes(self) -> int:
        """Bytes that this rank holds."""
        return sum(value.numel() * value.element_size() for value in self._weights.values())


class StoredFeatures:
    """The stored features of a frozen teacher.

    Attributes:
        identity: digest of the teacher's weights, on rank 0; None until it is known.
    """

    def __init__(self) -> None:
        """There is nothing to allocate."""
        self.identity: str | None = None

    def load(self, _weights: Mapping[str, Tensor] | None, *, identity: str | None) -> None:
        """Note whose features they are."""
        self.identity = identity

    def targets(self, batch: MicroBatch) -> FeatureTargets:
        """What is stored of a micro-batch."""
        assert batch.stored is not None
        return FeatureTargets(*batch.stored)

    def num_bytes(self) -> int:
        """None."""
        return 0
