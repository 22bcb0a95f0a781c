"""The Gram network: an earlier teacher, frozen, whose patches stay the measure of similarity.

It begins as given weights, or as the EMA teacher at the first refresh, and each refresh overwrites
it with the EMA. How it is sharded: `frozen/network.py`.

Source: Simeoni et al. 2025 (arXiv:2508.10104), section 4; when it is refreshed, the authors' code.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dinoscale.config.schema import RunConfig
from dinoscale.config.sections.objectives import GramConfig
from dinoscale.engine.frozen.network import FrozenBackbone
from dinoscale.engine.micro_batch import MicroBatch
from dinoscale.losses.patch_grid import resized


def crop_size_of(config: RunConfig) -> int:
    """Side of the Gram network's crops in pixels."""
    return config.gram.crop_size or config.crops.global_size


def refreshes_after(step: int, rule: GramConfig, *, done: int) -> bool:
    """Whether zero-based `step` ends with a refresh, if there have been `done` of them."""
    every, most = rule.refresh_every_steps, rule.max_refreshes
    if every is None or (most is not None and done >= most):
        return False
    return step + 1 >= rule.first_refresh_step and (step + 1) % every == 0


class GramNetwork:
    """A frozen backbone that the average refreshes.

    Attributes:
        backbone: its weights.
        refreshes: how often it was overwritten with the EMA; None while there are no weights yet.
    """

    def __init__(self, backbone: FrozenBackbone, rule: GramConfig) -> None:
        """Take a backbone, whose values are not used, and the rule of its refreshes."""
        self.backbone, self._rule = backbone, rule
        self.refreshes: int | None = None

    def features(self, batch: MicroBatch) -> Tensor | None:
        """Patch features of the Gram crops on the student's grid, (2 * B, P, D).

        None while there are no weights yet.
        """
        if self.refreshes is None:
            return None
        assert batch.gram_crops is not None
        _, features = self.backbone.tokens(batch.gram_crops.flatten(0, 1))
        side = batch.global_crops.shape[-1] // self.backbone.network.backbone.patch_size
        return resized(features, num_patches=side**2, interpolation="bicubic")

    def update(self, step: int, ema: Sequence[Tensor]) -> None:
        """Refresh the weights if that is due.

        Also after a step that was skipped, whose average is that of the step before: the authors'
        code counts steps, and whether one was skipped is known on the device only.

        Args:
            step: zero-based optimizer step that was just taken.
            ema: float32 views of the average, as in `Teacher`.
        """
        if refreshes_after(step, self._rule, done=self.refreshes or 0):
            self.refresh(ema)

    def refresh(self, ema: Sequence[Tensor]) -> None:
        """Overwrite the weights with the average; collective."""
        self.backbone.take(ema)
        self.refreshes = 1 if self.refreshes is None else self.refreshes + 1

    def load(self, weights: Mapping[str, Tensor] | None) -> None:
        """Begin with given weights, see `FrozenBackbone.load`; collective."""
        self.backbone.load(weights)
        self.refreshes = 0

    def restore(self, read: Callable[[str, int, int], Tensor], refreshes: int | None) -> None:
        """Set the weights from full tensors; collective.

        Args:
            read: (parameter name, first element, count) -> (count,) float32.
            refreshes: of the checkpoint; None if it has no Gram network. Weights that were given
                then stay, those of a refresh that came later are forgotten.

        Raises:
            DinoscaleError: on every rank, if `read` raises it on one.
        """
        if refreshes is None:
            self.refreshes = 0 if self.refreshes == 0 else None
            return
        self.backbone.restore(read)
        self.refreshes = refreshes
