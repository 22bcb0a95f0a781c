"""Online k-NN of the teacher on a labelled set, with the features of all ranks."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from dinoscale import distributed
from dinoscale.config.schema import RunConfig
from dinoscale.data.sources import Source, open_source
from dinoscale.evaluate.features import extract_features
from dinoscale.evaluate.knn import knn_accuracy

log = logging.getLogger(__name__)


class Probe:
    """Classifies a labelled test set by its neighbours in a labelled train set.

    Every rank extracts its share of the features, without collectives in between, so an unreadable
    image on one rank keeps nobody waiting.
    """

    def __init__(self, config: RunConfig) -> None:
        """Open `eval.train` and `eval.test`.

        Raises:
            DataError: a set cannot be opened, or has no labels.
        """
        assert config.eval.train is not None
        assert config.eval.test is not None
        self._config = config
        self._sets = [_Share(open_source(s)) for s in (config.eval.train, config.eval.test)]

    def measure(self, backbone: nn.Module, device: torch.device) -> dict[str, float]:
        """Top-1 accuracy in percent, equal on all ranks; a collective call.

        Args:
            backbone: the teacher's, ordinary weights on every rank.
            device: of the backbone.
        """
        (bank, bank_labels), (test, test_labels) = (
            self._gather(share, backbone, device) for share in self._sets
        )
        k = self._config.eval.k
        result = knn_accuracy(bank, bank_labels, test, test_labels, ks=(k,))
        return {"knn_top1": result[k].top1}
