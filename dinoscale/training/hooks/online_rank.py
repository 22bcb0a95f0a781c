"""RankMe of the teacher on images that it trains on, for runs that are measured no other way.

Of the guard's images they are those of `held_out`, which shares how they are measured.

Shape letters: N images, D width.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dinoscale.config import RunConfig
from dinoscale.data.shards.stream import StreamSource
from dinoscale.data.sources.mixture import MixedSource
from dinoscale.data.sources.source import StoredSource
from dinoscale.data.sources.subset import SubsetSource
from dinoscale.errors import DataError
from dinoscale.evaluate.features import extract_unlabelled
from dinoscale.evaluate.label_free.spectrum import alpha_req, rankme
from dinoscale.runtime import distributed

log = logging.getLogger(__name__)


def as_in_run(
    config: RunConfig, device: torch.device, on_batch: Callable[[], None]
) -> dict[str, Any]:
    """How `extract_features` and `extract_unlabelled` prepare images as the run says."""
    return {
        "resize": config.eval.resize,
        "crop": config.eval.crop,
        "mean": config.data.mean,
        "std": config.data.std,
        "batch_size": config.eval.batch_size,
        "device": device,
        "num_workers": config.data.num_workers,  # those of the training are idle meanwhile
        "on_batch": on_batch,
    }


def of_spectrum(features: Tensor) -> dict[str, float]:
    """`rankme` of features (N, D), in directions, and `alpha_req`, unless the rank is too low."""
    found = {"rankme": rankme(features)}
    alpha = alpha_req(features)
    return found if alpha is None else found | {"alpha_req": alpha}


class OnlineRank:
    """RankMe and alpha-ReQ of a fixed choice of the training images.

    The numbers are those of `dinoscale evaluate rank` of the same images and the exported
    checkpoint, up to the compute dtype.
    """

    def __init__(self, config: RunConfig, images: StoredSource) -> None:
        """Choose the images: of a mixture from its first source, of a subset from the subset.

        Args:
            config: of the run, `eval.rank_images` >= 1.
            images: of the training, stored ones.
        """
        first = images.parts[0] if isinstance(images, MixedSource) else images
        count = min(config.eval.rank_images, len(first))
        # A subset is the beginning of the choice that `evaluate rank` makes of the whole.
        whole = first.whole if isinstance(first, SubsetSource) else first
        self._source = whole if count == len(whole) else SubsetSource(whole, images=count)
        self._config = config

    def measure(
        self, backbone: nn.Module, device: torch.device, on_batch: Callable[[], None]
    ) -> dict[str, float]:
        """Numbers by their names in metrics.jsonl, the same on every rank; all ranks call it.

        Args:
            backbone: ordinary weights, whole on every rank.
            device: of the backbone.
            on_batch: called after each batch; an exception on one rank ends it on all.

        Returns:
            As `of_spectrum`, and `rank_images`, how many images could be read: RankMe is at most
            this, whatever the width.

        Raises:
            DinoscaleError: on every rank.
        """
        features, _ = extract_unlabelled(
            backbone, self._source, **as_in_run(self._config, device, on_batch)
        )
        if not len(features):
            raise DataError(f"none of {len(self._source)} training images can be read")
        first = distributed.rank() == 0  # others may differ in the last bit
        found = distributed.together(lambda: of_spectrum(features) if first else None)
        values = distributed.broadcast_object(found) or {}
        return values | {"rank_images": len(features)}


def online_rank(config: RunConfig, images: StoredSource) -> OnlineRank | None:
    """The measurement of a run; None where k-NN or the guard measures, or no image is stored.

    Args:
        config: of the run.
        images: of the training.
    """
    measured = config.eval.train is not None or config.guard.every_steps is not None
    if measured or not config.eval.rank_images:
        return None
    if isinstance(images, StreamSource):
        log.info("RankMe is not measured, as the training images are streamed (eval.rank_images)")
        return None
    return OnlineRank(config, images)
