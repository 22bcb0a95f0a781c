"""Online k-NN of the teacher on a labelled set, with feature extraction divided among ranks.

Where the images have masks, as drawn ones do, their patches are classified too.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from dinoscale.config.schema import RunConfig
from dinoscale.data.decoding.decode import Decoder
from dinoscale.data.sources.mixture import require_few_left_out
from dinoscale.data.sources.source import Source, StoredSource, open_source
from dinoscale.data.sources.synthetic import PREFIX, ShapesSource
from dinoscale.errors import DataError
from dinoscale.evaluate.classification.knn import knn_accuracy
from dinoscale.evaluate.classification.labelled_sets import renumber_classes
from dinoscale.evaluate.dense.patch_knn import PatchKnn, PatchPixels, PatchTokens
from dinoscale.evaluate.features import extract_features
from dinoscale.evaluate.label_free.spectrum import RANKME_IMAGES, rankme
from dinoscale.training.hooks.online_rank import as_in_run

PATCHES_OF = 400  # images of each set, whose patches are classified


def drawn_images_caution(config: RunConfig) -> str | None:
    """A warning if drawn images are classified by a network that trains on others.

    So it is where a run inherits from the quickstart and changes data.train alone.
    """
    specs = [part.source for part in config.data.sources]
    drawn = str(config.eval.train).startswith(PREFIX)
    if not drawn or any(spec.startswith(PREFIX) for spec in specs):
        return None
    return (
        "k-NN is measured on drawn images, not on yours: eval.train is"
        f" {config.eval.train}. Set eval.train and eval.test to labelled images of your own, or"
        " both to null"
    )


def patch_knn(config: RunConfig, train: Source, test: Source) -> PatchKnn | None:
    """How patches of the first images of two sets are classified; None unless both are drawn.

    Args:
        config: of the run.
        train: `eval.train`.
        test: `eval.test`.
    """
    if not (isinstance(train, ShapesSource) and isinstance(test, ShapesSource)):
        return None
    return PatchKnn(
        train=replace(train, images=min(PATCHES_OF, len(train))),
        test=replace(test, images=min(PATCHES_OF, len(test))),
        k=config.eval.k,
        resize=config.eval.resize,
        crop=config.eval.crop,
        mean=config.data.mean,
        std=config.data.std,
        batch_size=config.eval.batch_size,
    )


def patch_pixels_top1(config: RunConfig) -> float:
    """The same accuracy in percent of the pixels of drawn patches, without a network.

    Raises:
        DataError: a set cannot be opened.
    """
    assert config.eval.train is not None
    assert config.eval.test is not None
    found = patch_knn(config, open_source(config.eval.train), open_source(config.eval.test))
    patch_size = config.model.effective_patch_size
    assert found is not None
    assert patch_size is not None
    pixels = PatchPixels(crop=config.eval.crop, patch_size=patch_size)
    return found.measure(pixels, device=torch.device("cpu"))


class Measured(NamedTuple):
    """What the features of one network say.

    Attributes:
        top1: k-NN accuracy in percent of the test images.
        rankme: effective rank of the features of the train images, of 25,000 of them at most.
        patch_top1: k-NN accuracy in percent of the patches of test images; None without masks.
    """

    top1: float
    rankme: float
    patch_top1: float | None

    def metrics(self) -> dict[str, float]:
        """Numbers by their names in metrics.jsonl."""
        of_patches = {} if self.patch_top1 is None else {"patch_knn_top1": self.patch_top1}
        return {"knn_top1": self.top1, "rankme": self.rankme, **of_patches}


class OnlineKnn:
    """k-NN classification of a labelled test set by the features of a labelled train set.

    Each rank extracts its share of the features without a collective in between, so an unreadable
    image on one rank blocks no other, and classifies its share of the test set. The accuracy is
    that of the exported checkpoint, up to the compute dtype.

    Attributes:
        sets: `eval.train` and `eval.test`.
    """

    def __init__(
        self, config: RunConfig, open_set: Callable[[str, Decoder], StoredSource] = open_source
    ) -> None:
        """Open `eval.train` and `eval.test`.

        Args:
            config: of the run.
            open_set: opens a source from its specification.

        Raises:
            DataError: a set cannot be opened, more than `data.max_bad_fraction` of it is left out,
                it has no labels, or the test set has other classes.
        """
        assert config.eval.train is not None
        assert config.eval.test is not None
        self._config = config
        decoder = Decoder(config.data.channels, config.data.max_pixel_value)
        train = open_set(config.eval.train, decoder)
        test = open_set(config.eval.test, decoder)
        for spec, source in ((config.eval.train, train), (config.eval.test, test)):
            require_few_left_out(source, spec, max_lost=config.data.max_bad_fraction)
        self._renumber = renumber_classes(train, test)
        self.sets = self._train, self._test = train, test
        self._patches = patch_knn(config, train, test)

    def measure(
        self, backbone: nn.Module, device: torch.device, on_batch: Callable[[], None]
    ) -> Measured:
        """Top-1 accuracy, and RankMe of the same features, on every rank; all ranks call it.

        Args:
            backbone: ordinary weights, whole on every rank.
            device: of the backbone.
            on_batch: called after each batch of images and each chunk of classified ones; an
                exception on one rank ends the measurement on all.

        Raises:
            DinoscaleError: on every rank.
        """
        config = self._config
        prepared = as_in_run(config, device, on_batch)
        train, train_labels = extract_features(backbone, self._train, **prepared)
        test, test_labels = extract_features(backbone, self._test, **prepared)
        for name, source, found in (("train", self._train, train), ("test", self._test, test)):
            if not len(found):
                raise DataError(f"eval.{name}: none of the {len(source)} images can be read")
        k, labels = config.eval.k, self._renumber.to(device)[test_labels]
        accuracy = knn_accuracy(train, train_labels, test, labels, ks=(k,), on_chunk=on_batch)
        on_batch()
        some = train[:: math.ceil(len(train) / RANKME_IMAGES)]
        return Measured(
            accuracy[k].top1, rankme(some), self._patch_top1(backbone, device, on_batch)
        )

    def _patch_top1(
        self, backbone: nn.Module, device: torch.device, on_batch: Callable[[], None]
    ) -> float | None:
        if self._patches is None or not hasattr(backbone, "features"):
            return None
        tokens = PatchTokens(backbone, crop=self._config.eval.crop)
        return self._patches.measure(tokens, device=device, on_batch=on_batch)
