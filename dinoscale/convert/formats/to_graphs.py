"""Targets `torchscript` and `onnx`: one file that runs without any of our code.

Both map images (N, C, H, W) to `cls` (N, D) and `patches` (N, P, D), with N, H and W free; they
include the interpolation of the position embedding, and compute in float32. Both contain the card
under `METADATA_KEY`: TorchScript as an extra file, ONNX in its metadata.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinoscale.convert.card import METADATA_KEY, parse_card
from dinoscale.convert.parity import Forward, Outputs, Reopened
from dinoscale.convert.weights import Weights
from dinoscale.errors import ConversionError
from dinoscale.models.export import build_plain

ONNX_LIMIT_BYTES = 2**31 - 2**20  # one protobuf message, less the graph itself
INPUT, OUTPUTS = "images", ("cls", "patches")


def write_torchscript(path: Path, weights: Weights) -> None:
    """Write a scripted module: every image size takes the same branches as in Python."""
    with _exporting(weights, "TorchScript"):
        extra = {METADATA_KEY: weights.card.to_json()}
        torch.jit.save(torch.jit.script(_plain(weights)), path, _extra_files=extra)


def reopen_torchscript(path: Path) -> Reopened:
    """Open the file as `torch.jit.load` does."""
    extra: dict[str, Any] = {METADATA_KEY: ""}
    module = _loaded(path, "cpu", extra)

    def forward_of(module: Any) -> Forward:
        return lambda images: dict(zip(OUTPUTS, module(images), strict=True))

    return Reopened(
        forward_of(module),
        module.state_dict(),
        (parse_card(extra[METADATA_KEY].decode()),),
        on_meta=lambda: forward_of(_loaded(path, "meta")),
    )


def _loaded(path: Path, device: str, extra: dict[str, Any] | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path, map_location=device, _extra_files=extra).eval()


def write_onnx(path: Path, weights: Weights) -> None:
    """Export with dynamic batch, height and width.

    Raises:
        ConversionError: the weights are too large for one ONNX file.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.backbone.values())
    if size > ONNX_LIMIT_BYTES:
        raise ConversionError(
            f"an ONNX file holds at most {ONNX_LIMIT_BYTES} bytes of weights, these have {size}:"
            " use --to torchscript"
        )
    shape = weights.card.backbone
    # Sides that differ from each other and from the stored one, so that none looks constant.
    step = shape.patch_size or _plain_patch(weights)
    images = torch.zeros(2, shape.in_chans, shape.img_size + step, shape.img_size + 2 * step)
    free = torch.export.Dim.DYNAMIC
    with _exporting(weights, "ONNX"):
        program: Any = torch.onnx.export(
            _plain(weights),
            (images,),
            dynamo=True,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes=({0: free, 2: free, 3: free},),
            optimize=False,  # keeps the weights as they are; every runtime optimizes by itself
            verbose=False,
        )
        program.model.metadata_props[METADATA_KEY] = weights.card.to_json()
        program.save(path, external_data=False)


def _plain_patch(weights: Weights) -> int:
    """Patch size of a ViT whose card leaves it to its name; for a ResNet its total stride."""
    projection = weights.backbone.get("patch_embed.proj.weight")
    return 32 if projection is None else projection.shape[-1]


def reopen_onnx(path: Path) -> Reopened:
    """Open the file with onnxruntime on the CPU."""
    import onnx
    import onnxruntime

    stored = {
        each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy())
        for each in onnx.load(path).graph.initializer
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    card = session.get_modelmeta().custom_metadata_map[METADATA_KEY]

    def forward(images: Tensor) -> Outputs:
        found = session.run(list(OUTPUTS), {INPUT: images.numpy()})
        return {name: torch.from_numpy(x) for name, x in zip(OUTPUTS, found, strict=True)}

    return Reopened(forward, stored, (parse_card(card),))


def _plain(weights: Weights) -> nn.Module:
    model = build_plain(**vars(weights.card.backbone))
    model.load_state_dict(weights.backbone)
    return model.eval().requires_grad_(False)


@contextmanager
def _exporting(weights: Weights, what: str) -> Iterator[None]:
    """Turn an exporter's failure into one sentence, and silence the warnings of both exporters."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name = weights.card.backbone.name
        raise ConversionError(f"torch cannot write {name} as {what}: {reason}") from error
