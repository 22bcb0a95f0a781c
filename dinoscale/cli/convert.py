"""`dinoscale convert`, and its short form `dinoscale export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinoscale.cli.arguments import SubCommands

_FORMATS = ("dino", "timm", "hf", "torchscript", "onnx")  # keys of convert.conversion.TARGETS
_DESCRIPTION = """Write weights in the format of another library, which then needs no dinoscale.

--to dino         safetensors, or the reference's own format if TARGET ends in .pth
--to timm         a folder: timm.create_model("local-dir:TARGET", pretrained=True)
--to hf           a folder: transformers.AutoModel.from_pretrained("TARGET")
--to torchscript  a file: torch.jit.load("TARGET"); images -> class token, patch tokens
--to onnx         a file for onnxruntime; images -> cls, patches; batch, height and width are free

The library of the format then loads TARGET, and its features are compared with SOURCE's on fixed
images of two sizes. If they differ, TARGET is removed and the exit code is 2. A card
(dinoscale.json in a folder, TARGET.json beside a file) records the difference, the architecture and
the preprocessing of images.

timm and transformers resize position embeddings by a rule that is not DINO's, so a folder is exact
at one image size, which --size sets; of networks with registers at every size, as graphs and dino
files are. timm and the graphs leave out DINOv2's mask token, which only training uses."""
_EXAMPLE = "example: dinoscale convert runs/first vit_s16_hf --to hf"


def add_convert(commands: SubCommands) -> None:
    """Add `convert` and `export`."""
    convert = commands.add_parser(
        "convert",
        help="write weights for timm, transformers, TorchScript, ONNX or the reference's scripts",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument(
        "source",
        metavar="SOURCE",
        help="run directory, one step_* folder in its checkpoints/, or a weights file or folder in"
        " any of the formats",
    )
    convert.add_argument("target", metavar="TARGET", help="file or folder to write")
    convert.add_argument("--to", choices=_FORMATS, required=True, help="format to write")
    convert.add_argument(
        *("--network", "--weights"),  # as evaluate calls it, and as this once did
        choices=("teacher", "student"),
        default="teacher",
        help="network of a run or full checkpoint (default teacher)",
    )
    convert.add_argument(
        "--head", action="store_true", help="include the projection heads (dino only)"
    )
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of the stored weights (dino, timm, hf; default float32)",
    )
    convert.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="store the position embedding for images of this side (default: as trained)",
    )
    convert.add_argument(
        "--num-heads",
        type=int,
        metavar="N",
        help="attention heads, for files that do not record them",
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace the result of an earlier conversion"
    )
    convert.set_defaults(run=_convert)
    add_export(
        commands.add_parser("export", help="short for `dinoscale convert RUN OUT --to dino`")
    )


def add_export(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    command.description = "Write the backbone as safetensors, with the tensor names of the original"
    command.description += " DINO. Reads checkpoints of any ZeRO stage and number of ranks, in one"
    command.description += " process without a GPU."
    command.add_argument(
        "checkpoint",
        metavar="RUN",
        help="run directory, or one step_* folder in its checkpoints/",
    )
    command.add_argument("out", metavar="OUT.safetensors", help="file to write")
    command.add_argument(
        "--network",
        choices=("teacher", "student"),
        default="teacher",
        help="which network to write (default teacher)",
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace the result of an earlier export"
    )
    command.set_defaults(run=_export)


def _convert(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.convert.conversion import convert

    return convert(
        Path(options.source),
        Path(options.target),
        to=options.to,
        network=options.network,
        head=options.head,
        dtype=options.dtype,
        size=options.size,
        num_heads=options.num_heads,
        overwrite=options.overwrite,
    )


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from dinoscale.convert.conversion import convert

    return convert(
        Path(options.checkpoint),
        Path(options.out),
        to="dino",
        network=options.network,
        overwrite=options.overwrite,
    )
