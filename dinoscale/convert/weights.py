"""One network of a source, whatever its format: named tensors and a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from dinoscale.convert.card import BackboneCard

Network = Literal["teacher", "student"]

Kind = Literal[
    "run",  # a checkpoint of a run, from the files of all its ranks
    "dinoscale",  # our own safetensors file, with a card
    "reference",  # the authors' full checkpoint or a bare state dict under their names
    "timm",  # the same names with timm's config.json, or layers that only timm's models have
    "hf",  # ViTModel or ViTForImageClassification of Hugging Face's transformers
]


@dataclass(frozen=True, eq=False)
class Adapted:
    """A backbone as it was trained, with its adapters apart.

    Attributes:
        state: all its tensors, those of adapters among them.
        rank: of the adapters.
        alpha: they are multiplied by alpha / rank.
    """

    state: dict[str, Tensor]
    rank: int
    alpha: float


@dataclass(frozen=True, eq=False)
class Weights:
    """One network of a source, on the CPU, in the dtype of the file.

    Attributes:
        backbone: all its tensors in the file under the reference's names, as in `models.vit`,
            whether or not they fit the card's architecture (`weights_file.build` checks).
        head: tensors of the projection head of the class token under the names of
            `models.heads.DinoHead`, without `last_layer.weight_g` where all prototype norms are 1;
            None where there is no head.
        card: its architecture and preprocessing.
        kind: format of the source.
        left_out: names in the file that belong to neither, such as those of a classifier.
        network: which of the two it is; the default where the source holds only one.
        run: of a run, its checkpoint's name, step, k-NN accuracy in percent and configuration.
        patch_head: tensors of the patch tokens' own head, as `head`; None where they have none.
        maps: of a run that follows features the maps to them, by their names in the network.
        adapted: of a run with adapters the backbone into whose matrices they are merged here.
    """

    backbone: dict[str, Tensor]
    head: dict[str, Tensor] | None
    card: BackboneCard
    kind: Kind
    left_out: tuple[str, ...] = ()
    network: Network = "teacher"
    run: Mapping[str, object] | None = None
    patch_head: dict[str, Tensor] | None = None
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    adapted: Adapted | None = None

    @property
    def is_rotary(self) -> bool:
        """Whether it is a ViT with rotary positions, which are no tensors."""
        return "pos_embed" not in self.backbone and "cls_token" in self.backbone

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of each network that is there, by its name in `models.network`."""
        parts = {"backbone": self.backbone, "head": self.head, "patch_head": self.patch_head}
        return {name: state for name, state in parts.items() if state is not None}
