"""`dinoscale evaluate {discover,correspond} WEIGHTS ...`: parse, call one function."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import (
    IMAGES_HELP,
    add_number,
    add_size,
    add_untrained,
    add_weights,
    whole_images_options,
)

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands

_FEATURES = ("keys", "patches")
_FEATURES_HELP = "keys of the last block, or its output patches"


def add_patch_tasks(tasks: SubCommands) -> None:
    """Add the tasks that compare patches without training."""
    _add_discover(tasks)
    _add_correspond(tasks)


def _add_discover(tasks: SubCommands) -> None:
    discover = tasks.add_parser(
        "discover",
        help="find objects without labels: CorLoc and Jaccard index (TokenCut, LOST)",
        description="Find one object in every image by the similarity of its patches, without"
        " labels and training: TokenCut (a normalised cut of the graph of patches) or, cheaper,"
        " LOST. CorLoc is the share of images whose box overlaps a true box by at least half (IoU);"
        " with masks also the Jaccard index with the object that is covered best. The truth are"
        " masks, as of `segment`, or --boxes. Under torchrun, deepspeed or srun the ranks share the"
        " images. The floor is a centered box.",
        epilog="example: dinoscale evaluate discover weights.safetensors VOC2007/JPEGImages"
        " --boxes VOC2007/Annotations --untrained",
    )
    add_weights(discover)
    discover.add_argument("images", metavar="IMAGES", help=IMAGES_HELP)
    discover.add_argument(
        "--masks", metavar="DIR", help="masks named as the images; default: KEY.mask.png in IMAGES"
    )
    discover.add_argument(
        "--boxes",
        metavar="BOXES",
        help="folder of PASCAL VOC's NAME.xml, or a JSON file: COCO's, or {NAME: [[left, top,"
        " right, bottom], ...]} in pixels",
    )
    discover.add_argument(
        "--indexed", action="store_true", help="gray masks of 8 bits hold object numbers"
    )
    discover.add_argument(
        "--method",
        choices=("tokencut", "lost"),
        default="tokencut",
        help="how objects are found, default tokencut",
    )
    discover.add_argument(
        "--features",
        choices=_FEATURES,
        default="keys",
        help=f"{_FEATURES_HELP}; default keys, as published",
    )
    says = "of tokencut: cosine that joins two patches, default 0.2"
    add_number(discover, "--tau", says, kind=float, metavar="COSINE")
    says = "of lost: patches of lowest degree that may be seeds, default 100"
    add_number(discover, "--expansion", says)
    add_size(discover)
    discover.add_argument(
        "--out", metavar="DIR", help="write NAME/mask.png, boxes.json and a sheet of some images"
    )
    add_untrained(discover)
    discover.set_defaults(run=_evaluate_discover)


def _add_correspond(tasks: SubCommands) -> None:
    correspond = tasks.add_parser(
        "correspond",
        help="find places of one image in another: percentage of correct key points (PCK)",
        description="Match places of image pairs by the nearest patch features, without training."
        " PCK is the share of key points that are found within 0.1 (or 0.05) of the longer side of"
        " the object's box or of the image. With --pairs: SPair-71k, or a JSON list of {source,"
        " target, source_points: [[x, y], ...], target_points} and, if known, target_box and"
        " category, with names below --images. With --warp, no labels: each of --images is turned,"
        " zoomed and shifted, and the centers of its patches are the key points. Under torchrun,"
        " deepspeed or srun the ranks share the pairs. Baselines: the same position, and pixels as"
        " features.",
        epilog="example: dinoscale evaluate correspond weights.safetensors --pairs SPair-71k"
        " --untrained",
    )
    add_weights(correspond)
    correspond.add_argument(
        "--pairs", metavar="PAIRS", help="folder of SPair-71k, or a JSON file, see above"
    )
    correspond.add_argument(
        "--images", metavar="IMAGES", help=f"folder of the JSON's images; to warp: {IMAGES_HELP}"
    )
    correspond.add_argument("--warp", action="store_true", help="match images with their warps")
    correspond.add_argument("--split", metavar="NAME", help="of SPair-71k, default test")
    correspond.add_argument(
        "--length-of",
        choices=("box", "image"),
        help="what PCK is a fraction of, default the object's box where all pairs have one",
    )
    add_number(correspond, "--seed", "of --warp, default 0")
    add_number(correspond, "--limit", "the first N pairs or images only, default all")
    correspond.add_argument(
        "--features",
        choices=_FEATURES,
        default="patches",
        help=f"{_FEATURES_HELP}; default patches",
    )
    add_size(correspond)
    correspond.add_argument("--out", metavar="DIR", help="write a sheet of some pairs")
    add_untrained(correspond)
    correspond.set_defaults(run=_evaluate_correspond)


def _evaluate_discover(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.discovery.discover import Settings, evaluate_discover
    from dinoscale.evaluate.discovery.truth import Annotations

    return evaluate_discover(
        options.weights,
        options.images,
        annotations=Annotations(options.masks, options.boxes, options.indexed),
        settings=Settings(options.method, options.features, options.tau, options.expansion),
        out=options.out,
        untrained=options.untrained,
        fingerprint=options.fingerprint,
        **whole_images_options(options),
    )


def _evaluate_correspond(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.evaluate.correspondence.correspond import Given, evaluate_correspond

    return evaluate_correspond(
        options.weights,
        Given(
            pairs=options.pairs,
            images=options.images,
            warp=options.warp,
            split=options.split,
            length_of=options.length_of,
            seed=options.seed,
            limit=options.limit,
        ),
        features=options.features,
        out=options.out,
        untrained=options.untrained,
        fingerprint=options.fingerprint,
        **whole_images_options(options),
    )
