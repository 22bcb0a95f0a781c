"""Online k-NN of the teacher on a labelled set, with the features shared out over ranks."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dinoscale import distributed
from dinoscale.config.schema import RunConfig
from dinoscale.data.decode import Decoder, Picture
from dinoscale.data.sources import Source, open_source
from dinoscale.evaluate.features import extract_features
from dinoscale.evaluate.knn import knn_accuracy, renumber_classes


class Probe:
    """Classifies a labelled test set by its neighbours in a labelled train set.

    Each rank extracts its share of the features without a collective in between, so an unreadable
    image on one rank keeps nobody waiting. The number is that of an exported checkpoint, up to the
    compute dtype.
    """

    def __init__(self, config: RunConfig) -> None:
        """Open `eval.train` and `eval.test`.

        Raises:
            DataError: a set cannot be opened, has no labels, or they have different classes.
        """
        assert config.eval.train is not None
        assert config.eval.test is not None
        self._config = config
        decoder = Decoder(config.data.channels, config.data.white)
        bank = open_source(config.eval.train, decoder)
        test = open_source(config.eval.test, decoder)
        self._renumber = renumber_classes(bank, test)
        rank, world_size = distributed.rank(), distributed.world_size()
        self._bank = _Share(bank, rank=rank, world_size=world_size)
        self._test = _Share(test, rank=rank, world_size=world_size)

    def measure(
        self, backbone: nn.Module, device: torch.device, on_batch: Callable[[], None]
    ) -> float:
        """Top-1 accuracy in percent, on every rank; all ranks call it.

        Args:
            backbone: ordinary weights, whole on every rank.
            device: of the backbone.
            on_batch: called after each batch of images.
        """
        bank, bank_labels = self._gather(self._bank, backbone, device, on_batch)
        test, test_labels = self._gather(self._test, backbone, device, on_batch)
        top1 = 0.0
        if distributed.rank() == 0:
            k, labels = self._config.eval.k, self._renumber[test_labels]
            top1 = knn_accuracy(bank, bank_labels, test, labels, ks=(k,))[k].top1
        return distributed.broadcast_object(top1)

    def _gather(
        self,
        share: "_Share",
        backbone: nn.Module,
        device: torch.device,
        on_batch: Callable[[], None],
    ) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of all ranks, on the CPU."""
        config = self._config
        features, labels = extract_features(
            backbone,
            share,
            resize=config.eval.resize,
            crop=config.eval.crop,
            mean=config.data.mean,
            std=config.data.std,
            batch_size=config.eval.batch_size,
            device=device,
            num_workers=min(config.data.num_workers, 2),
            on_batch=on_batch,
        )
        parts = distributed.gather_objects((features.cpu().numpy(), labels.cpu().numpy()))
        whole, classes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return torch.from_numpy(whole), torch.from_numpy(classes)


class _Share:
    """Every W-th image of a source, from this rank's on."""

    def __init__(self, source: Source, *, rank: int, world_size: int) -> None:
        self._source = source
        self._indices = np.arange(rank, len(source), world_size)

    def __len__(self) -> int:
        return len(self._indices)

    def path(self, index: int) -> str:
        return self._source.path(int(self._indices[index]))

    def picture(self, index: int) -> Picture:
        return self._source.picture(int(self._indices[index]))

    @property
    def labels(self) -> NDArray[np.int64] | None:
        labels = self._source.labels
        return None if labels is None else labels[self._indices]

    @property
    def class_names(self) -> list[str] | None:
        return self._source.class_names
