"""Write the preset that suits an image set, as a commented file."""

from __future__ import annotations

import json
import logging
import os
import shlex
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.set_facts import SetFacts, look_at
from dinoscale.config import load_config, resolve
from dinoscale.config.resolve import without_auto
from dinoscale.convert.card import BackboneCard
from dinoscale.data.shards.remote import is_remote
from dinoscale.data.sources.source import open_source
from dinoscale.data.sources.synthetic import PREFIX
from dinoscale.errors import ConfigError, DinoscaleError
from dinoscale.recipe.choose import choose
from dinoscale.recipe.preset import Recipe, Setting

log = logging.getLogger(__name__)

_NODE_GPUS = 8  # of one node, as `dinoscale plan` assumes


def write_recipe(
    spec: str,
    out: Path,
    *,
    model: str | None,
    gpus: int,
    weights: str | None,
    images: int,
    workers: int,
) -> dict[str, Any]:
    """Look at a set and write a preset for it.

    Args:
        spec: the images, one source of data.train on a disk.
        out: the file; must not exist.
        model: s, b or l; None chooses.
        gpus: of the run.
        weights: to go on from; None trains from scratch.
        images: how many to look at.
        workers: processes that decode.

    Returns:
        The file, the line that trains with it, settings, cautions and facts, ready for JSON.

    Raises:
        CheckpointError: the weights cannot be read.
        ConfigError: the file exists or cannot be written, or the arguments do not go together.
        DataError: the images cannot be read, or not by a training.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: exists; give another name, or delete it")
    spec = _as_training_opens(spec)
    if weights is not None:
        weights = os.path.abspath(os.path.expanduser(weights))
    card = None if weights is None else _card_of(weights)
    facts = look_at(spec, images=images, workers=workers)
    recipe = choose(facts, model=model, gpus=gpus, weights=weights, card=card)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(as_yaml(recipe, facts, run_dir=f"runs/{out.stem}"))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from error
    try:
        decided = without_auto(load_config(str(out)))
        resolve(decided, world_size=gpus, num_images=facts.images)
    except DinoscaleError:
        out.unlink()
        raise
    for caution in recipe.cautions:
        log.warning("%s", caution)
    log.info("wrote %s; read it, then: %s", out, _how_to_start(out, gpus=gpus))
    return {
        "path": str(out),
        "command": next_command(out, gpus=gpus),
        "base": recipe.base,
        "settings": {setting.key: setting.value for setting in recipe.settings},
        "cautions": list(recipe.cautions),
        "facts": asdict(facts),
    }


def _as_training_opens(spec: str) -> str:
    """The source with its whole path, of those that a training opens.

    The tools of `data` read more: lists of any name and of members of shards, and tars of tars.

    Raises:
        DataError: a training does not read it, or not from a disk.
    """
    if not spec.startswith(PREFIX) and not is_remote(spec):
        spec = os.path.abspath(os.path.expanduser(spec))
        if not os.path.isfile(spec):
            return spec  # a folder or a pattern, which all read alike
    open_source(spec)
    return spec


def _card_of(weights: str) -> BackboneCard:
    from dinoscale.convert.weights_file import load_backbone  # torch

    return load_backbone(weights)[1]


def as_yaml(recipe: Recipe, facts: SetFacts, *, run_dir: str) -> str:
    """The preset as a commented file."""
    low, median = facts.short_side
    head = [
        f"{facts.images:,} images of {facts.spec}; {facts.sample:,} were looked at: short side"
        f" {median} px in the median, 5 % below {low} px.",
        *recipe.cautions,
    ]
    lines = [line for text in head for line in _comment(text, indent="")]
    lines += [f"defaults: [{recipe.base}]", "", f"run_dir: {_text(run_dir)}"]
    settings = [*recipe.settings, Setting("data.train", facts.spec, "")]
    for section in dict.fromkeys(setting.key.split(".")[0] for setting in settings):
        lines += ["", f"{section}:"]
        for setting in settings:
            name, key = setting.key.split(".")
            if name == section:
                lines += _comment(setting.why, indent="  ") if setting.why else []
                lines.append(f"  {key}: {_text(setting.value)}")
    return "\n".join(lines) + "\n"


def _comment(text: str, *, indent: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")


def _text(value: object) -> str:
    """A value as YAML, in one line; YAML reads JSON."""
    return json.dumps(value, ensure_ascii=False)


def next_command(path: Path, *, gpus: int) -> str:
    """The line that trains with the preset; beyond a node, it is for nodes in a file `hostfile`."""
    name = shlex.quote(str(path))
    if gpus > _NODE_GPUS:
        return f"dinoscale launch {name} --hostfile hostfile"
    start = "dinoscale" if gpus == 1 else f"torchrun --nproc-per-node {gpus} -m dinoscale"
    return f"{start} train {name}"


def _how_to_start(path: Path, *, gpus: int) -> str:
    """The same in words."""
    command = next_command(path, gpus=gpus)
    if gpus <= _NODE_GPUS:
        return command
    return (
        f"{command} (a line `node1 slots={_NODE_GPUS}` for each node, {gpus} GPUs in all; under"
        f" Slurm: srun python -m dinoscale train {shlex.quote(str(path))}, one task for each GPU)"
    )
