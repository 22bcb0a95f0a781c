"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SubCommands = argparse._SubParsersAction[argparse.ArgumentParser]

_CONFIG_HELP = "name of a preset (see `dinoscale presets`) or path of a YAML file"
_OVERRIDE_HELP = "settings that override the file, for example optim.lr=1e-3"
DATA_HELP = "labelled images: a folder of class folders, tar shards, or synthetic:..."
UNTRAINED_HELP = "also measure the same architecture with random weights"
BATCH_HELP = "images per forward pass (default 64)"
WORKERS_HELP = "processes that decode images (default 2)"


def add_config(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add CONFIG and the settings that override it."""
    command.add_argument(
        "config", nargs=None if required else "?", metavar="CONFIG", help=_CONFIG_HELP
    )
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDE_HELP)


def add_weights(command: argparse.ArgumentParser) -> None:
    """Add WEIGHTS, and the options for what the file does not record."""
    command.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="run directory, checkpoint, file of `dinoscale convert`, DINO's .pth, or a folder of"
        " timm or Hugging Face",
    )
    command.add_argument(
        "--network",
        choices=("teacher", "student"),
        default="teacher",
        help="which network of a run or a full checkpoint (default teacher)",
    )
    command.add_argument(
        "--num-heads",
        type=int,
        metavar="N",
        help="attention heads, for files that do not record them (default: heads of width 64)",
    )
