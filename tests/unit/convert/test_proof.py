"""Targets are opened by programs that know nothing else, and must equal the source."""

import json
import shutil
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dinoscale.checkpoint.checksums import sha256
from dinoscale.convert import conversion
from dinoscale.convert.card import (
    METADATA_KEY,
    BackboneCard,
    BackboneShape,
    parse_card,
)
from dinoscale.convert.conversion import TARGETS, convert
from dinoscale.convert.formats.to_dino import write_dino
from dinoscale.convert.formats.to_graphs import write_torchscript
from dinoscale.convert.formats.to_hf import write_hf
from dinoscale.convert.formats.to_timm import reopen_timm
from dinoscale.convert.load_backbone import load_backbone
from dinoscale.convert.parity import Forward, Reopened, require_any_device
from dinoscale.convert.source import read_source
from dinoscale.convert.weights import Weights
from dinoscale.convert.weights_file import save_backbone
from dinoscale.errors import ConversionError
from dinoscale.models.heads import DinoHead
from dinoscale.models.zoo import build_backbone

# 32 channels a head, where every file of the reference has 64.
SHAPE = BackboneShape(
    "vit_small_patch16_224", img_size=40, patch_size=8, embed_dim=384, depth=1, num_heads=12
)
IMAGES = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(3))


def _save(path: Path, *, norm_eps: float | None) -> Path:
    shape = replace(SHAPE, norm_eps=norm_eps)
    card = BackboneCard(
        shape, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), resize=57, crop=40, source="a test"
    )
    torch.manual_seed(0)
    state = build_backbone(**asdict(shape)).state_dict()
    state = {name: x + 0.1 * torch.randn_like(x) for name, x in state.items()}
    save_backbone(path, state, card)
    return path


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("source") / "w.safetensors", norm_eps=3e-3)


def _read(path: Path) -> tuple[Tensor, BackboneCard]:
    """Class tokens and card by dinoscale, which is given the path and nothing else."""
    model, _ = load_backbone(path)
    return model(IMAGES), model.card


def _from_torchscript(path: Path) -> tuple[Tensor, BackboneCard]:
    extra: dict[str, Any] = {METADATA_KEY: ""}
    cls, _ = torch.jit.load(path, _extra_files=extra)(IMAGES)
    return cls, parse_card(extra[METADATA_KEY].decode())


def _from_onnx(path: Path) -> tuple[Tensor, BackboneCard]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    found = session.run(["cls"], {"images": IMAGES.numpy()})[0]
    card = session.get_modelmeta().custom_metadata_map[METADATA_KEY]
    return torch.from_numpy(found), parse_card(card)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "to", "read"),
    [
        ("w.safetensors", "dino", _read),
        ("w.pth", "dino", _read),
        ("folder", "hf", _read),
        ("w.pt", "torchscript", _from_torchscript),
        ("w.onnx", "onnx", _from_onnx),
    ],
)
def test_a_target_without_its_card_describes_an_unusual_network(
    unusual: Path, tmp_path: Path, name: str, to: str, read: Any
) -> None:
    convert(unusual, tmp_path / name, to=to)
    alone = tmp_path / "alone" / name
    alone.parent.mkdir()
    shutil.move(tmp_path / name, alone)  # away from the card beside it
    with suppress(FileNotFoundError, NotADirectoryError):
        (alone / "dinoscale.json").unlink()
    with torch.inference_mode():
        cls, card = read(alone)
        expected, source = _read(unusual)
    torch.testing.assert_close(cls, expected, rtol=0, atol=1e-5)
    assert card.preprocessing == source.preprocessing
    assert replace(card.backbone, name=source.backbone.name) == source.backbone


def test_a_timm_folder_without_its_card_describes_all_but_the_epsilon_of_norms(
    unusual: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=r"epsilon 0\.003, and timm.*no place"):
        convert(unusual, tmp_path / "folder", to="timm")
    source = _save(tmp_path / "w", norm_eps=None)
    convert(source, tmp_path / "folder", to="timm")
    with torch.inference_mode():
        opened = reopen_timm(tmp_path / "folder")
        cls, (told, _) = opened.forward(IMAGES)["cls"], opened.descriptions
        expected, card = _read(source)
    assert told == card.preprocessing
    torch.testing.assert_close(cls, expected, rtol=0, atol=1e-5)


def test_an_older_pth_is_read_with_the_card_beside_it(unusual: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    convert(unusual, path, to="dino")
    torch.save({**torch.load(path)}, path)  # as it was written without a card of its own
    card = path.with_name("w.pth.json")
    said = json.loads(card.read_text())
    card.write_text(json.dumps({**said, "files": {path.name: sha256(path)}}))
    with torch.inference_mode():
        cls, found = _read(path)
        expected, source = _read(unusual)
    assert found.preprocessing == source.preprocessing
    assert torch.equal(cls, expected)


# Heads


def _with_head(path: Path, unusual: Path, *, norms: float | None) -> Path:
    torch.manual_seed(1)
    head = DinoHead(
        384,
        num_prototypes=24,
        hidden_dim=32,
        bottleneck_dim=16,
        num_layers=3,
        norm_last_layer=norms is None,
        batch_norm=False,
    )
    if head.last_layer.weight_g is not None:
        nn.init.uniform_(head.last_layer.weight_g, 1 - norms, 1 + norms)
    backbone = {f"backbone.{name}": x for name, x in load_file(unusual).items()}
    tensors = backbone | {f"head.{name}": x for name, x in head.state_dict().items()}
    save_backbone(path, tensors, read_source(unusual).card)
    return path


def _noise(path: Path, weights: Weights) -> None:
    assert weights.head is not None
    head = {name: torch.randn_like(x) for name, x in weights.head.items()}
    write_dino(path, replace(weights, head=head))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_head_of_other_numbers_is_refused(
    unusual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = _with_head(tmp_path / "source", unusual, norms=None)
    monkeypatch.setitem(conversion.TARGETS, "dino", replace(TARGETS["dino"], write=_noise))
    with pytest.raises(ConversionError, match="differ by"):
        convert(source, tmp_path / name, to="dino", head=True)
    assert not (tmp_path / name).exists()


def test_numbers_that_change_no_feature_are_compared_too(
    unusual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, weights: Weights) -> None:
        changed = {**weights.backbone, "cls_token": weights.backbone["cls_token"] * (1 + 1e-7)}
        write_dino(path, replace(weights, backbone=changed))

    monkeypatch.setitem(conversion.TARGETS, "wrong", replace(TARGETS["dino"], write=write))
    with pytest.raises(ConversionError, match="1 of 18 tensors hold other numbers: cls_token"):
        convert(unusual, tmp_path / "out", to="wrong")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_norms_that_round_to_one_are_accepted(unusual: Path, tmp_path: Path, name: str) -> None:
    source = _with_head(tmp_path / "source", unusual, norms=1e-3)
    convert(source, tmp_path / name, to="dino", head=True, dtype="bfloat16")
    found = read_source(tmp_path / name).head
    assert found is not None
    assert found["last_layer.weight_v"].dtype == torch.bfloat16


def test_another_preprocessing_is_refused(
    unusual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, weights: Weights) -> None:
        write_hf(path, replace(weights, card=replace(weights.card, resize=58)))

    monkeypatch.setitem(conversion.TARGETS, "hf", replace(TARGETS["hf"], write=write))
    with pytest.raises(ConversionError, match=r"says resize 58, .*and the source resize 57"):
        convert(unusual, tmp_path / "out", to="hf")


# Devices


class _Adds(nn.Module):
    """Adds positions that are made on the CPU, or where the images are."""

    def __init__(self, *, fixed: bool) -> None:
        super().__init__()
        self.fixed = fixed

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens and patches, of a kind."""
        positions = torch.arange(images.shape[3])
        if not self.fixed:
            positions = torch.arange(images.shape[3], device=images.device)
        return images.mean((1, 2)) + positions, images


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fixed", [True, False])
def test_a_graph_that_stays_on_the_cpu_is_refused(tmp_path: Path, *, fixed: bool) -> None:
    torch.jit.save(torch.jit.script(_Adds(fixed=fixed)), tmp_path / "w.pt")
    moved = _script_on_meta(tmp_path / "w.pt")
    reopened = Reopened(moved, {}, (), on_meta=lambda: moved)
    with pytest.raises(ConversionError, match="runs on the CPU only") if fixed else nullcontext():
        require_any_device(reopened, in_chans=3, size=8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("size", [40, 24])
def test_positions_are_computed_on_the_device_of_the_images(
    unusual: Path, tmp_path: Path, size: int
) -> None:
    write_torchscript(tmp_path / "w.pt", read_source(unusual))
    found = _script_on_meta(tmp_path / "w.pt")(torch.zeros(2, 3, size, 40, device="meta"))
    assert found["cls"].is_meta
    assert found["patches"].shape == (2, size // 8 * 5, 384)


def _script_on_meta(path: Path) -> Forward:
    module = torch.jit.load(path, map_location="meta")
    return lambda images: dict(zip(("cls", "patches"), module(images), strict=True))
