"""Trained heads as files, and the state of their training beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dinoscale.errors import CheckpointError
from dinoscale.evaluate.classification.resumable_training import TrainingState, save_tensors
from dinoscale.evaluate.dense_probes.linear_head import LinearHead
from dinoscale.evaluate.dense_probes.pairs import Pairs
from dinoscale.runtime.fingerprint import code_fingerprint, files_fingerprint, fingerprint

_CARD = "head"  # key in the metadata of the file
_STATES = {"trained": "resume", "untrained": "untrained.resume", "colors": "colors.resume"}
_UNREADABLE = (
    *(OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError),
    RuntimeError,  # of tensors that are no head; RecursionError of a card is one, too
)


@dataclass(frozen=True, eq=False)
class KeptHead:
    """A trained head from a file.

    Attributes:
        path: of the file.
        head: in eval mode, on the CPU.
        card: as `save_head` was given it.
    """

    path: str
    head: LinearHead
    card: Mapping[str, Any]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within, whatever the card lacks is a CheckpointError that names the file."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path}: its card is incomplete. Train the head again, with --out"
            ) from error

    def require_settings(self, settings: Mapping[str, object]) -> None:
        """Refuse, by CheckpointError, to test otherwise than after the training.

        Args:
            settings: all that change a number, as they are now.
        """
        before = self.card["protocol"]
        names = [*dict.fromkeys([*before, *settings])]
        names.remove("network")  # the digest says that it is the same
        changed = [name for name in names if before.get(name) != settings.get(name)]
        if changed:
            raise CheckpointError(
                f"{self.path} was trained with another {', '.join(changed)} than the card of the"
                " weights or this version has. Train the head again"
            )


def state_beside(
    out: Path | None,
    features: str,
    *,
    backbone: Mapping[str, object] | None,
    train: Pairs,
    protocol: Mapping[str, object],
    module: str,
) -> TrainingState:
    """The state of a training beside `out`, of which three may go on.

    Args:
        out: file of the head of the trained backbone; None saves nothing.
        features: trained, untrained or colors.
        backbone: `LoadedBackbone.identity` of that of the features, if they have one.
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
            "backbone": backbone,
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


def load_head(path: str | Path, *, task: str) -> KeptHead:
    """Read the file of a kept head.

    Args:
        path: of the file.
        task: that must have trained it.

    Raises:
        CheckpointError: it is missing, damaged, or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {})[_CARD])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        outputs, width = state["linear.weight"].shape[:2]
        head = LinearHead(width, outputs, seed=0)
        head.load_state_dict(state)
        trained_by, _ = card["task"], card["backbone"]
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path} is no kept head: name a file that `evaluate {task}` wrote with --out"
        ) from error
    if trained_by != task:
        raise CheckpointError(f"{path} was kept by `evaluate {trained_by}`, not by {task}")
    return KeptHead(str(path), head.eval(), card)


def remove_states(out: Path) -> None:
    """Delete the states of all trainings beside `out`: they are done and reported."""
    for ending in _STATES.values():
        out.with_name(f"{out.name}.{ending}").unlink(missing_ok=True)
