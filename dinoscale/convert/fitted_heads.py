"""Projection heads of weights of any source, fitted to those that a run's settings describe."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.convert.coverage import coverage_of
from dinoscale.engine.build import shapes_only
from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.models.weight_names import from_reference


def fitted_head(
    head: Mapping[str, Tensor] | None,
    wanted: Mapping[str, Tensor],
    *,
    path: str,
    key: str,
    section: str,
    remedy: str,
) -> dict[str, Tensor]:
    """Every tensor that is wanted of one projection head.

    Args:
        head: its tensors, as a file names them; None if there is none.
        wanted: those of the run's head, by their names in it, or some of them.
        path: where they are from.
        key: the setting that names it.
        section: of the settings of the run's head.
        remedy: what to do about a head that is absent.

    Raises:
        CheckpointError: the norms of the prototypes are others than the settings say.
        ConfigError: there is none, or not of these sizes.
    """
    what = "own head of patch tokens" if section.endswith("patch_head") else "projection head"
    if head is None:
        raise ConfigError(f"{key}: {path} has no {what}; {remedy}")
    frozen_norm = "last_layer.weight_g" not in wanted
    try:
        state = from_reference(head, norm_last_layer=frozen_norm)
    except CheckpointError as error:
        text = f"the {what} of {path} is not that of {section}.*"
        raise CheckpointError(f"{key}: {text}: {error}") from error
    norms = "last_layer.weight_g"
    if norms in wanted and norms not in state and "last_layer.weight_v" in state:
        state[norms] = torch.ones(len(state["last_layer.weight_v"]), 1)
    coverage = coverage_of(state, wanted)
    if not coverage.complete:
        raise ConfigError(
            f"{key}: the {what} of {path} is not that of {section}.* ({coverage}); "
            f"change {section}.*, or {remedy}"
        )
    return state


def fitted_teacher_heads(
    config: RunConfig,
    given: Mapping[str, Mapping[str, Tensor] | None],
    *,
    path: str,
    key: str,
    remedy: str,
    layer: str = "",
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """Tensors of the head of a frozen teacher and of that of its patches, as `distill` has them.

    Args:
        config: of the run.
        given: tensors of `head` and `patch_head`, by their names in it; None of an absent one.
        path: where they are from.
        key: the setting that names it.
        remedy: what to do about a head that is absent.
        layer: what their names begin with, where a head is not needed whole.

    Raises:
        CheckpointError: the norms of its prototypes are others than `distill` says.
        ConfigError: they are not of the sizes of `distill`, or one is absent or too many.
    """
    network = shapes_only(config.of_teacher)
    heads: dict[str, dict[str, Tensor]] = {}
    for name, target in (("head", network.head), ("patch_head", network.patch_head)):
        if target is not None:
            wanted = {k: v for k, v in target.state_dict().items() if k.startswith(layer)}
            heads[name] = fitted_head(
                *(given.get(name), wanted),
                path=path,
                key=key,
                section=f"distill.{name}",
                remedy=remedy,
            )
    if "patch_head" not in heads and given.get("patch_head") and config.ibot.loss_weight:
        raise ConfigError(
            f"{key}: {path} has a head of its own for patch tokens, and distill.* has none; "
            "give distill.head and distill.patch_head"
        )
    return heads.get("head"), heads.get("patch_head")
