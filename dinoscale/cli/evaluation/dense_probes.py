"""`dinoscale evaluate segmentation | depth`: parse, call one function."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import (
    add_num_workers,
    add_number,
    add_untrained,
    add_weights,
    extraction_options,
)

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands
    from dinoscale.evaluate.dense_probes.linear_head import Recipe
    from dinoscale.evaluate.dense_probes.probe import ProbeOptions
    from dinoscale.evaluate.dense_probes.target_files import Part
    from dinoscale.evaluate.segmentation.layouts import Layout
    from dinoscale.evaluate.segmentation.protocols import Knn, Linear, Logistic

_IMAGES = "images: a folder, a .txt list, or tar shards"
# Options that --head leaves to the user, and what the parser adds.
_WITH_HEAD = {
    *("command", "run", "task", "weights", "network", "num_heads", "head", "fingerprint"),
    *("test", "test_masks", "test_depths", "data", "pictures", "batch_size", "num_workers"),
}
# Options of --protocol by their names, and of which protocols they are.
_PATCHES, _LINEAR = ("knn", "logistic"), ("linear",)
_OF_PROTOCOLS = {
    **{"k": ("knn",), "temp": ("knn",), "bank": _PATCHES, "c": ("logistic",)},
    **dict.fromkeys(("crop", "stride", "ratio", "iterations", "lr", "weight_decay"), _LINEAR),
    "train_batch_size": _LINEAR,
}


def add_dense_probes(tasks: SubCommands) -> None:
    """Add the tasks on the class and the distance of every pixel."""
    _add_segmentation(tasks)
    _add_depth(tasks)


def _add_segmentation(tasks: SubCommands) -> None:
    task = tasks.add_parser(
        "segmentation",
        help="the class of every pixel from frozen patch features: mean IoU, three protocols",
        description="Learn classes of pixels on --train, and test on --test. `--protocol knn`:"
        " votes of the most similar patches, nothing is trained. `logistic`: a logistic regression"
        " on patches. `linear` (DINOv3): batch norm and a linear layer, trained on random crops,"
        " tested by sliding windows. A mask holds a class number in each pixel (gray, 16 bits or"
        " with a palette); 255 is void and does not count. It has the name of its image in a folder"
        " of its own, or is KEY.mask.png beside KEY.jpg in shards.",
        epilog="example: dinoscale evaluate segmentation weights.safetensors --data VOC2012",
    )
    add_weights(task)
    _add_sets(task, target="mask")
    task.add_argument(
        "--data",
        metavar="DIR",
        help="in place of these: PASCAL VOC 2012, ADEChallengeData2016 or Cityscapes as unpacked,"
        " its train and val parts",
    )
    add_number(task, "--classes", "number of classes, default the highest of the train masks + 1")
    task.add_argument(
        "--ignore-zero", action="store_true", help="0 in masks is void, classes begin at 1"
    )
    task.add_argument(
        "--binary",
        action="store_true",
        help="masks show one object: a gray one where it is brighter than 127",
    )
    task.add_argument("--protocol", choices=("knn", "logistic", "linear"), help="default knn")
    add_number(task, "--layers", "last blocks whose patch tokens are joined, default 1")
    add_number(task, "--size", "short side of images, default 512", metavar="PIXELS")
    add_number(task, "--k", "of knn: patches that vote, default 30")
    add_number(task, "--temp", "of knn: of the votes, default 0.07", kind=float, metavar="T")
    says = "of knn, logistic: most patches of the train set, default 200000"
    add_number(task, "--bank", says)
    says = (
        "of logistic: inverse strengths of the penalty to choose from, default 8 from 0.01 to 1e5"
    )
    task.add_argument("--c", type=float, nargs="+", metavar="C", help=says)
    _add_training(task, lr=1e-3, weight_decay=1e-3, iterations=40_000)
    says = "of linear: side of crops and windows, default 512, or --size if that is less"
    add_number(task, "--crop", says, metavar="PIXELS")
    says = "of linear: pixels between two windows, default 2/3 of them (341)"
    add_number(task, "--stride", says, metavar="PIXELS")
    task.add_argument(
        "--ratio",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of linear: scales of train images, default 0.5 2",
    )
    task.add_argument(
        "--pictures",
        metavar="DIR",
        help="write a sheet there: test images with the classes found, and the true ones",
    )
    _add_common(task)
    task.set_defaults(run=_evaluate_segmentation)


def _add_depth(tasks: SubCommands) -> None:
    task = tasks.add_parser(
        "depth",
        help="the distance of every pixel from frozen patch features",
        description="Train batch norm and a linear layer on random crops of --train, whose outputs"
        " weigh bins of depth, and test on whole images of --test (DINOv3). The score is the share"
        " of the pixels within a factor of 1.25, 1.25^2 and 1.25^3; `errors` has RMSE in metres and"
        " the mean relative error, with the mirrored image; `single` is without. A depth picture"
        " has 16 bits, 0 is a hole. It has the name of its image (or sync_depth_N for rgb_N) in a"
        " folder of its own, or is KEY.depth.png beside KEY.jpg in shards.",
        epilog="example: dinoscale evaluate depth weights.safetensors --train nyu/train"
        " --train-depths nyu/train-depth --test nyu/test --test-depths nyu/test-depth --eigen-crop",
    )
    add_weights(task)
    _add_sets(task, target="depth")
    says = "numbers of a depth picture in a metre, default 1000 (NYUv2); 256 of KITTI"
    add_number(task, "--depth-scale", says, kind=float, metavar="X")
    says = "of the bins, default 0.001; nearer pixels are holes"
    add_number(task, "--min-depth", says, kind=float, metavar="METRES")
    says = "of the bins, default 10; farther pixels are holes"
    add_number(task, "--max-depth", says, kind=float, metavar="METRES")
    add_number(task, "--bins", "of depth, default 256")
    says = "blocks, evenly spread over the network, whose patch tokens are joined, default 1"
    add_number(task, "--layers", says)
    add_number(task, "--size", "short side of images, default their own", metavar="PIXELS")
    task.add_argument(
        "--crop",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of train crops, in pixels, default 416 544",
    )
    task.add_argument(
        "--eigen-crop", action="store_true", help="score the middle part, as on NYUv2's pictures"
    )
    _add_training(task, lr=3e-4, weight_decay=1e-4, iterations=38_400)
    _add_common(task)
    task.set_defaults(run=_evaluate_depth)


def _add_sets(task: argparse.ArgumentParser, *, target: str) -> None:
    """Add images and targets of both sets; the test set may be called val too."""
    for names in (("--train",), ("--test", "--val")):
        dest = names[0].strip("-")
        task.add_argument(*names, dest=dest, metavar="IMAGES", help=_IMAGES)
        task.add_argument(
            *(f"{name}-{target}s" for name in names),
            dest=f"{dest}_{target}s",
            metavar="DIR",
            help=f"their {target}s, named as the images; default: KEY.{target}.png in the shards",
        )


def _add_training(
    task: argparse.ArgumentParser, *, lr: float, weight_decay: float, iterations: int
) -> None:
    """Add what trains a head; without default, as it is refused where no head is trained."""
    of = "of linear: " if task.prog.endswith("segmentation") else ""
    add_number(task, "--iterations", f"{of}optimizer steps, default {iterations}")
    add_number(task, "--train-batch-size", f"{of}crops of a step, default 16")
    says = f"{of}highest learning rate of AdamW, default {lr:g}"
    add_number(task, "--lr", says, kind=float, metavar="RATE")
    says = f"{of}of AdamW, default {weight_decay:g}"
    add_number(task, "--weight-decay", says, kind=float, metavar="X")
    task.add_argument(
        "--out",
        metavar="FILE.safetensors",
        help=f"{of}also write the trained head; the same command resumes an interrupted training"
        " from FILE.safetensors.resume; --head judges other test sets by it",
    )
    task.add_argument(
        "--head",
        metavar="FILE.safetensors",
        help="train nothing: judge this head, which --out kept, by --test; its settings are those"
        " of its training",
    )


def _add_common(task: argparse.ArgumentParser) -> None:
    task.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="of the backbone's forward, default bf16 on a GPU, fp32 on a CPU",
    )
    add_number(task, "--seed", "of all random numbers, default 0")
    task.add_argument(
        "--pixels", action="store_true", help="also measure the pixels of each patch as features"
    )
    add_untrained(task)
    add_number(task, "--batch-size", "images or windows in one forward", default=8)
    add_num_workers(task)


def _evaluate_segmentation(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.segmentation.segmentation import evaluate_segmentation

    if options.head is not None:
        return _judge_segmentation(options)
    return evaluate_segmentation(
        options.weights,
        _layout(options),
        protocol=_protocol(options),
        pictures=options.pictures,
        options=_probe_options(options),
    )


def _judge_segmentation(options: argparse.Namespace) -> dict[str, Any]:
    """Judge a kept head by --test, or by the test part of --data."""
    from dinoscale.errors import ConfigError
    from dinoscale.evaluate.segmentation.kept import evaluate_segmentation_head
    from dinoscale.evaluate.segmentation.layouts import find_layout

    _refuse_settings(options)
    if options.data is None:
        test, rule = _test_part(options, options.test_masks), None
    elif options.test is None and options.test_masks is None:
        layout = find_layout(options.data)
        test, rule = layout.test, layout.rule
    else:
        raise ConfigError("--data: its val part is the test set. Leave --test and its masks out.")
    return evaluate_segmentation_head(
        *(options.weights, options.head, test),
        rule=rule,
        pictures=options.pictures,
        options=extraction_options(options, batch_size=options.batch_size),
    )


def _judge_depth(options: argparse.Namespace) -> dict[str, Any]:
    """Judge a kept head by --test."""
    from dinoscale.evaluate.depth.kept import evaluate_depth_head

    _refuse_settings(options)
    return evaluate_depth_head(
        *(options.weights, options.head, _test_part(options, options.test_depths)),
        options=extraction_options(options, batch_size=options.batch_size),
    )


def _refuse_settings(options: argparse.Namespace) -> None:
    """Refuse, by ConfigError, options that the file of the head decides."""
    from dinoscale.errors import ConfigError

    for name, value in vars(options).items():
        if value is not None and value is not False and name not in _WITH_HEAD:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}: --head has the settings of its training. Leave it out.")


def _test_part(options: argparse.Namespace, targets: str | None) -> Part:
    """The test set; ConfigError if none is named."""
    from dinoscale.errors import ConfigError
    from dinoscale.evaluate.dense_probes.target_files import Part

    if options.test is None:
        raise ConfigError("--head: name the set to judge it by, --test")
    return Part(options.test, targets)


def _evaluate_depth(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.errors import ConfigError
    from dinoscale.evaluate.dense_probes.target_files import Part
    from dinoscale.evaluate.depth.depth import evaluate_depth
    from dinoscale.evaluate.depth.depth_files import DepthRange
    from dinoscale.evaluate.depth.protocol import RECIPE, DepthProtocol

    if options.head is not None:
        return _judge_depth(options)
    if options.train is None or options.test is None:
        raise ConfigError("name both sets, --train and --test")
    depths = _given(options, {"min_depth": "low", "max_depth": "high"})
    named = {"depth_scale": "scale", "bins": "bins", "size": "size", "crop": "crop"}
    own = _given(options, named)
    if "crop" in own:
        own["crop"] = tuple(own["crop"])
    training = ("iterations", "train_batch_size", "lr", "weight_decay")
    return evaluate_depth(
        options.weights,
        Part(options.train, options.train_depths),
        Part(options.test, options.test_depths),
        protocol=DepthProtocol(
            **own,
            range=DepthRange(**depths),
            eigen_crop=options.eigen_crop,
            recipe=_recipe(RECIPE, _given(options, {name: name for name in training})),
        ),
        options=_probe_options(options),
    )


def _probe_options(options: argparse.Namespace) -> ProbeOptions:
    from dinoscale.evaluate.dense_probes.probe import ProbeOptions

    return ProbeOptions(
        **vars(extraction_options(options, batch_size=options.batch_size)),
        **_given(options, {"layers": "layers", "seed": "seed"}),
        precision=options.precision,
        untrained=options.untrained,
        pixels=options.pixels,
        out=options.out,
    )


def _given(options: argparse.Namespace, names: dict[str, str]) -> dict[str, Any]:
    """Values of the options that were given, under these names."""
    values = {name: getattr(options, option) for option, name in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def _layout(options: argparse.Namespace) -> Layout:
    """Both sets of a segmentation.

    Raises:
        ConfigError: neither --data nor both sets are named, or both ways.
        DataError: --data has none of the layouts.
    """
    from dinoscale.errors import ConfigError
    from dinoscale.evaluate.dense_probes.target_files import Part
    from dinoscale.evaluate.segmentation.index_masks import MaskRule
    from dinoscale.evaluate.segmentation.layouts import Layout, find_layout

    own = {
        f"--{name.replace('_', '-')}": getattr(options, name)
        for name in ("train", "train_masks", "test", "test_masks", "classes")
        if getattr(options, name) is not None
    } | {f"--{n}": True for n in ("ignore-zero", "binary") if getattr(options, n.replace("-", "_"))}
    if options.data is not None:
        if own:
            raise ConfigError(f"--data: the set says what {', '.join(own)} would. Leave them out.")
        return find_layout(options.data)
    if options.train is None or options.test is None:
        raise ConfigError("name both sets, --train and --test, or a benchmark with --data")
    if options.classes is not None and not 2 <= options.classes <= 255:
        raise ConfigError(f"classes: need 2 to 255, got {options.classes}")
    rule = MaskRule(
        binary=options.binary, ignore_zero=options.ignore_zero, num_classes=options.classes
    )
    parts = (Part(options.train, options.train_masks), Part(options.test, options.test_masks))
    return Layout(*parts, rule)


def _protocol(options: argparse.Namespace) -> Knn | Logistic | Linear:
    """The protocol, with the settings that were given.

    Raises:
        ConfigError: a setting is of another protocol, or out of range.
    """
    from dinoscale.errors import ConfigError
    from dinoscale.evaluate.segmentation.protocols import RECIPE, SIZE, Knn, Linear, Logistic

    chosen = options.protocol or "knn"
    given = _given(options, {name: name for name in _OF_PROTOCOLS})
    for name in given:
        if chosen not in _OF_PROTOCOLS[name]:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}: --protocol {chosen} has no such option")
    given["size"] = SIZE if options.size is None else options.size
    if chosen == "knn":
        return Knn(**given)
    if chosen == "logistic":
        if "c" in given:
            given["cs"] = tuple(given.pop("c"))
        return Logistic(**given)
    own = {name: given.pop(name) for name in ("crop", "stride", "ratio", "size") if name in given}
    own.setdefault("crop", min(own["size"], SIZE))
    own.setdefault("stride", max(1, own["crop"] * 2 // 3))
    if "ratio" in own:
        own["ratio"] = tuple(own["ratio"])
    return Linear(**own, recipe=_recipe(RECIPE, given))


def _recipe(published: Recipe, given: dict[str, Any]) -> Recipe:
    """A recipe with the settings that were given."""
    named = {"train_batch_size": "batch_size"}
    return replace(published, **{named.get(name, name): value for name, value in given.items()})
