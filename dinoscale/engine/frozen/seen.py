"""What a teacher's network computes of a micro-batch, from which targets follow.

Shape letters: N rows, D width before the prototypes, K prototypes.
"""

from typing import NamedTuple

from torch import Tensor


class Projected(NamedTuple):
    """Unit vectors and the prototypes that they meet; targets are a softmax of their products."""

    units: Tensor  # (N, D)
    weight_v: Tensor  # (K, D)
    weight_g: Tensor | None  # (K, 1)
    plain: bool


class Seen:
    """What the teacher's network computes of a micro-batch, see `models.network.Objective`."""

    wants_patches = wants_features = False
    classes: Projected
    patches: Projected | None = None

    def __init__(self, *, copies: bool, earlier: "Seen | None" = None) -> None:
        """Take what is seen next.

        Args:
            copies: of the prototypes, which are there during the forward only.
            earlier: of the same step and weights, whose copies serve again.
        """
        self._copies, self._earlier = copies, earlier

    def of_class_tokens(self, tokens: Tensor) -> None:
        """Nothing: the targets are those of the heads."""

    def of_patches(self, tokens: Tensor) -> Tensor:
        """Nothing: not wanted."""
        raise NotImplementedError

    def of_features(self, classes: Tensor | None, patches: Tensor | None) -> Tensor:
        """Nothing: not wanted."""
        raise NotImplementedError

    def of_prototypes(
        self,
        classes: Tensor | None,
        patches: Tensor | None,
        weight_v: Tensor,
        weight_g: Tensor | None,
        plain: bool = False,
    ) -> Tensor:
        """Keep them; the result is not used."""
        if self._earlier is not None:
            same = self._earlier.patches if classes is None else self._earlier.classes
            assert same is not None
            _, weight_v, weight_g, _ = same
        elif self._copies:
            weight_v, weight_g = weight_v.clone(), None if weight_g is None else weight_g.clone()
        if classes is not None:
            self.classes = Projected(classes, weight_v, weight_g, plain)
        if patches is not None:
            self.patches = Projected(patches, weight_v, weight_g, plain)
        return weight_v.new_zeros(())
