"""`dinoscale evaluate {attention,segment,pca} WEIGHTS ...`: parse, call one function."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dinoscale.cli.arguments import add_weights

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands

_IMAGES_HELP = "an image, a folder, tar shards, or synthetic:..."
_SIZE_HELP = "short side of the images the network sees"
_SQUARE_HELP = "squeeze them to squares, as the reference's figures; else they keep their shape"


def add_dense(tasks: SubCommands) -> None:
    """Tasks that look at patches."""
    _add_attention(tasks)


def _add_attention(tasks: SubCommands) -> None:
    attention = tasks.add_parser(
        "attention",
        help="draw where the class token of a ViT looks, per head",
        description="Where the class token looks in the last block, of every head and their mean."
        " With --out: for every image a folder with overlays (attn-*.png the map in colors,"
        " mass-*.png the patches that hold --mass of it) and attention.npz with the numbers, and"
        " one sheet. With OUT.png: only a sheet of some images, squeezed to squares; for synthetic"
        " sets, whose masks are known, also how well attention covers the objects.",
        epilog="example: dinoscale evaluate attention weights.safetensors photos/ --out attention/",
    )
    add_weights(attention)
    attention.add_argument("images", metavar="IMAGES", help=_IMAGES_HELP)
    where = attention.add_mutually_exclusive_group(required=True)
    where.add_argument("sheet", nargs="?", metavar="OUT.png", help="write a sheet only")
    where.add_argument("--out", metavar="DIR", help="write files for every image")
    attention.add_argument(
        "--size", type=int, metavar="PIXELS", help=_SIZE_HELP + " (480; of OUT.png the crop)"
    )
    attention.add_argument("--square", action="store_true", help=_SQUARE_HELP)
    attention.add_argument("--mass", type=float, default=0.6, help="of the attention kept (0.6)")
    attention.add_argument("--limit", type=int, metavar="N", help="the first N images only")
    attention.set_defaults(run=_evaluate_attention)


def _evaluate_attention(options: argparse.Namespace) -> dict[str, Any]:
    if options.sheet:
        from dinoscale.evaluate.attention import evaluate_attention

        return evaluate_attention(
            options.weights,
            options.images,
            options.sheet,
            size=options.size,
            num_heads=options.num_heads,
        )
    from dinoscale.evaluate.attention_files import write_attention
    from dinoscale.evaluate.whole_images import SIZE

    return write_attention(
        options.weights,
        options.images,
        options.out,
        size=options.size or SIZE,
        square=options.square,
        mass=options.mass,
        limit=options.limit,
        num_heads=options.num_heads,
    )
