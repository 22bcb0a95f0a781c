"""Trained heads as files, and the state of their training beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from dinoscale.evaluate.classification.resumable_training import TrainingState, save_tensors
from dinoscale.evaluate.dense_probes.linear_head import LinearHead
from dinoscale.evaluate.dense_probes.pairs import Pairs
from dinoscale.evaluate.feature_cache import weights_digest
from dinoscale.runtime.fingerprint import code_fingerprint, files_fingerprint, fingerprint

_CARD = "head"  # key in the metadata of the file
_STATES = {"trained": "resume", "untrained": "untrained.resume", "colors": "colors.resume"}


def state_beside(
    out: Path | None,
    features: str,
    *,
    backbone: nn.Module | None,
    train: Pairs,
    protocol: Mapping[str, object],
    module: str,
) -> TrainingState:
    """The state of a training beside `out`, of which three may go on.

    Args:
        out: file of the head of the trained backbone; None saves nothing.
        features: trained, untrained or colors.
        backbone: of the features, if they have one.
        train: what the head learns from.
        protocol: all settings that change a number.
        module: the one that trains.

    Raises:
        UnavailableError: the file system of the set failed for a minute.
    """
    if out is None:
        return TrainingState(None, {})
    made_from = fingerprint(
        input={
            "weights": None if backbone is None else weights_digest(backbone),
            "train": files_fingerprint("", train.files()),
        },
        command=protocol,
        code=code_fingerprint(module),
    )
    return TrainingState(out.with_name(f"{out.name}.{_STATES[features]}"), made_from)


def save_head(head: LinearHead, path: Path, card: Mapping[str, object]) -> None:
    """Write a head with its card, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    save_tensors(path, head.state_dict(), {_CARD: json.dumps(card)})


def remove_states(out: Path) -> None:
    """Delete the states of all trainings beside `out`: they are done and reported."""
    for ending in _STATES.values():
        out.with_name(f"{out.name}.{ending}").unlink(missing_ok=True)
