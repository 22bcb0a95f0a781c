"""`dinoscale evaluate video`, `retrieve` and `copies`: parse, call one function."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import add_weights

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands

_UNTRAINED = "also measure the same architecture with fresh weights"


def add_video(tasks: SubCommands) -> None:
    """`evaluate video`."""
    video = tasks.add_parser(
        "video",
        help="follow the objects of a first frame through a video (J and F of DAVIS)",
        description="Video object segmentation without training: the masks of the first frame are"
        " carried to the later frames by the similarity of patch features (DAVIS 2017 protocol of"
        " the DINO paper). Reports region similarity J, boundary measure F and their mean, beside"
        " the floor: the first mask copied to every frame. DATA is the folder of DAVIS (JPEGImages,"
        " Annotations; its validation sequences are taken), or tars or a folder with"
        " SEQUENCE/00000.jpg and SEQUENCE/00000.mask.png; only first frames need masks if nothing"
        " is to be scored.",
        epilog="example: dinoscale evaluate video weights.safetensors DAVIS --out masks/",
    )
    add_weights(video)
    video.add_argument("data", metavar="DATA", help="folder of DAVIS, folder of sequences, or tars")
    video.add_argument(
        "--out", metavar="DIR", help="write SEQUENCE/00000.png, scores.json and SEQUENCE.gif there"
    )
    video.add_argument(
        "--sequences", metavar="FILE", help="text file with the names to take, one a line"
    )
    video.add_argument(
        "--size", type=int, default=480, metavar="PIXELS", help="short side of a frame (480)"
    )
    video.add_argument(
        "--context", type=int, default=7, metavar="N", help="recent frames looked at (7)"
    )
    video.add_argument(
        "--radius", type=int, default=12, metavar="N", help="of the neighbourhood, patches (12)"
    )
    video.add_argument("--top", type=int, default=5, metavar="N", help="patches that vote (5)")
    video.add_argument("--temp", type=float, default=0.1, help="of the votes (0.1)")
    video.add_argument("--untrained", action="store_true", help=_UNTRAINED)
    video.set_defaults(run=_evaluate_video)


def _evaluate_video(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.data.videos import read_names
    from dinoscale.evaluate.propagation import Settings
    from dinoscale.evaluate.video import evaluate_video

    return evaluate_video(
        options.weights,
        options.data,
        out=options.out,
        names=None if options.sequences is None else read_names(options.sequences),
        settings=Settings(
            size=options.size,
            context=options.context,
            radius=options.radius,
            top=options.top,
            temp=options.temp,
        ),
        untrained=options.untrained,
        num_heads=options.num_heads,
    )
