"""Arguments that several commands share, and the evaluation options made of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoscale.evaluate.classification.answers import Details
    from dinoscale.evaluate.frozen_backbone import ExtractionOptions, LoadOptions

    SubCommands = argparse._SubParsersAction[argparse.ArgumentParser]

_CONFIG_HELP = "name of a preset (see `dinoscale presets`) or path of a YAML file"
_OVERRIDE_HELP = "settings that override the file, for example optim.lr=1e-3"
IMAGES_HELP = "an image, a folder, tar shards, or synthetic:..."
LABELLED_HELP = "labelled images: a folder of class folders, tar shards, or synthetic:..."


def add_config(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add CONFIG, and settings that override it."""
    command.add_argument(
        "config", nargs=None if required else "?", metavar="CONFIG", help=_CONFIG_HELP
    )
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDE_HELP)


def add_weights(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add WEIGHTS, and which network of them."""
    command.add_argument(
        "weights",
        nargs=None if required else "?",
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
    add_number(command, "--num-heads", "of weights that do not state it, if heads are not 64 wide")


def add_labelled_sets(task: argparse.ArgumentParser) -> None:
    """Add --train and --test."""
    for option in ("--train", "--test"):
        task.add_argument(option, required=True, metavar="DATA", help=LABELLED_HELP)


def add_labels(task: argparse.ArgumentParser) -> None:
    """Add --labels."""
    task.add_argument(
        "--labels",
        metavar="FILE.json",
        help="several right classes for each test image: ReaL's real.json, or an object {IMAGE:"
        " [CLASSES]}; default: the class of each image",
    )


def add_details(task: argparse.ArgumentParser) -> None:
    """Add --per-class and --predictions."""
    task.add_argument(
        "--per-class",
        action="store_true",
        help="also report the accuracy of each class, and the confusion matrix",
    )
    task.add_argument(
        "--predictions",
        metavar="FILE.npz|FILE.csv",
        help="write the answer for each test image to this file",
    )


def details_of(options: argparse.Namespace) -> Details:
    """What to report of single images, by the options of `add_details`."""
    from dinoscale.evaluate.classification.answers import Details

    return Details(per_class=options.per_class, predictions=options.predictions)


def add_untrained(task: argparse.ArgumentParser) -> None:
    """Add --untrained."""
    task.add_argument(
        "--untrained",
        action="store_true",
        help="also measure the same architecture with fresh weights",
    )


def add_number(
    task: argparse.ArgumentParser,
    option: str,
    says: str,
    *,
    default: float | None = None,
    kind: type[int | float] = int,
    metavar: str = "N",
) -> None:
    """Add an option that takes a number; its help ends with the default, if there is one."""
    ending = "" if default is None else f", default {default:g}"
    task.add_argument(option, type=kind, default=default, metavar=metavar, help=f"{says}{ending}")


def add_sizes(task: argparse.ArgumentParser, *, crop: str) -> None:
    """Add --resize and --crop; `crop` says what is special about the crop."""
    own = "default WEIGHTS' own"
    resize = f"short side of an image before the crop, {own}"
    add_number(task, "--resize", resize, metavar="PIXELS")
    add_number(task, "--crop", f"side of the center crop{crop}, {own}", metavar="PIXELS")


def add_batch_size(task: argparse.ArgumentParser, *, of: str = "") -> None:
    """Add --batch-size of forwards without gradients; `of` precedes its help."""
    add_number(task, "--batch-size", f"{of}images in one forward", default=64)


def add_num_workers(task: argparse.ArgumentParser, *, of: str = "", of_rank: str = "") -> None:
    """Add --num-workers; `of` precedes its help, `of_rank` says that each rank has its own."""
    add_number(task, "--num-workers", f"{of}processes{of_rank} that decode images", default=2)


def add_no_cache(task: argparse.ArgumentParser, *, of: str = "", also: str = "") -> None:
    """Add --no-cache; `of` precedes its help, `also` ends it."""
    says = f"{of}neither read nor cache features{also}"
    task.add_argument("--no-cache", action="store_true", help=says)


def add_extraction(task: argparse.ArgumentParser, *, crop: str) -> None:
    """Add how features of sets are extracted by all ranks; `crop` as of `add_sizes`."""
    add_sizes(task, crop=crop)
    add_batch_size(task)
    add_num_workers(task, of_rank=" of each rank")


def add_size(task: argparse.ArgumentParser, *, also: str = "") -> None:
    """Add --size and --square of tasks on whole images; `also` ends the help of the size."""
    says = f"short side of the images that the network sees, default 480{also}"
    add_number(task, "--size", says, metavar="PIXELS")
    task.add_argument(
        "--square",
        action="store_true",
        help="squeeze images to squares, as in the reference's figures; default: keep their shape",
    )


def whole_images_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a task on whole images, by `add_weights` and `add_size`."""
    size = {} if options.size is None else {"size": options.size}
    return {"options": load_options(options), **size, "square": options.square}


def load_options(options: argparse.Namespace) -> LoadOptions:
    """Which network to load, by the options of `add_weights`."""
    from dinoscale.evaluate.frozen_backbone import LoadOptions

    return LoadOptions(network=options.network, num_heads=options.num_heads)


def extraction_options(options: argparse.Namespace, **more: Any) -> ExtractionOptions:
    """Which network to load and how to extract features.

    Args:
        options: of `add_weights` and `add_num_workers`, maybe of `add_sizes` and `add_no_cache`.
        more: `batch_size`, where --batch-size is that of forwards.
    """
    from dinoscale.evaluate.frozen_backbone import ExtractionOptions

    sizes = {name: getattr(options, name, None) for name in ("resize", "crop")}
    return ExtractionOptions(
        network=options.network,
        num_heads=options.num_heads,
        num_workers=options.num_workers,
        **{**sizes, "cache": not getattr(options, "no_cache", False), **more},
    )
