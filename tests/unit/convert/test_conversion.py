"""Conversions: each target opens without dinoscale, gives our features, and round-trips exactly."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dinoscale import cli
from dinoscale.checkpoint.checksums import sha256
from dinoscale.convert import conversion
from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.convert.conversion import TARGETS, Target, convert
from dinoscale.convert.formats.to_graphs import reopen_onnx, reopen_torchscript
from dinoscale.convert.formats.to_hf import reopen_hf
from dinoscale.convert.formats.to_timm import reopen_timm
from dinoscale.convert.parity import MAX_DIFFERENCE, Reopened, compare, our_forward
from dinoscale.convert.source import read_source
from dinoscale.convert.weights import Network, Weights
from dinoscale.convert.weights_file import load_backbone, save_backbone
from dinoscale.errors import CheckpointError, ConversionError, OutputError
from dinoscale.models.zoo import build_backbone

GOLDEN = Path(os.environ.get("DINOSCALE_GOLDEN", Path(__file__).parents[2] / "golden"))
REFERENCE = GOLDEN / "reference_checkpoint.pth"
NAMES = {
    "timm": "timm folder",
    "hf": "hf folder",
    "torchscript": "graph.pt",
    "onnx": "graph.onnx",
    "dino": "ours.safetensors",
}


def _golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(GOLDEN / "vit.safetensors"), json.loads((GOLDEN / "vit.json").read_text())


def _card(shape: BackboneShape) -> BackboneCard:
    mean, std = (0.4,) * shape.in_chans, (0.3,) * shape.in_chans
    return BackboneCard(shape, mean, std, shape.img_size * 9 // 8, shape.img_size, "a test")


def _save(path: Path, name: str, **sizes: int) -> Path:
    """A weights file of a backbone; of a ViT all tensors are random, norms and scales too."""
    torch.manual_seed(0)
    shape = BackboneShape(name, **sizes)
    state = build_backbone(**asdict(shape)).state_dict()
    if name != "resnet50":  # tens of layers without a norm over the tokens would overflow
        state = {name: x + 0.02 * torch.randn_like(x) for name, x in state.items()}
    save_backbone(path, state, _card(shape))
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden ViT as a weights file of ours."""
    tensors, told = _golden()
    sizes = {key: told[key] for key in ("img_size", "patch_size", "embed_dim", "depth")}
    shape = BackboneShape("vit_small_patch8_224", num_heads=told["num_heads"], **sizes)
    path = tmp_path_factory.mktemp("source") / "vit.safetensors"
    state = {
        name.removeprefix("state."): tensor
        for name, tensor in tensors.items()
        if name.startswith("state.")
    }
    save_backbone(path, state, _card(shape))
    return path


@pytest.fixture(scope="module")
def targets(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden ViT in every format."""
    folder = tmp_path_factory.mktemp("targets")
    for to, name in NAMES.items():
        convert(vit, folder / name, to=to)
    convert(vit, folder / "bare.pth", to="dino")
    return {path.name: path for path in folder.iterdir()}


def _said(path: Path) -> dict[str, Any]:
    """The card of a target."""
    file = path / "dinoscale.json" if path.is_dir() else path.with_name(f"{path.name}.json")
    card: dict[str, Any] = json.loads(file.read_text())
    return card


def _bound(expected: Tensor) -> float:
    """How far another program may be off: the part of the largest feature that `convert` allows."""
    return MAX_DIFFERENCE * float(expected.abs().max())


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=_bound(expected))


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in expected.items()
    )


@pytest.mark.parametrize("name", ["timm folder", "hf folder", "ours.safetensors", "bare.pth"])
def test_weights_round_trip_bit_for_bit(vit: Path, targets: dict[str, Path], name: str) -> None:
    back = read_source(targets[name], num_heads=4)
    assert _same(back.backbone, read_source(vit).backbone)
    assert back.card.backbone.num_heads == 4
    if name != "bare.pth":  # which tells no preprocessing
        assert back.card.mean == (0.4,) * 3


@pytest.mark.parametrize("name", ["timm folder", "hf folder", "ours.safetensors", "bare.pth"])
def test_an_export_that_was_changed_is_not_read(
    targets: dict[str, Path], tmp_path: Path, name: str
) -> None:
    target, card = targets[name], targets[name].with_name(f"{name}.json")
    path = tmp_path / name
    if target.is_dir():
        shutil.copytree(target, path)
        file, card = path / "model.safetensors", path / "dinoscale.json"
    else:
        file = path.with_name(f"another {name}")  # with its card under another name
        shutil.copy(target, file)
        card = Path(shutil.copy(card, path.with_name(f"{file.name}.json")))
    signs: list[bool] = []
    read_source(file, num_heads=4, heartbeat=lambda: signs.append(True))
    assert signs  # a large one takes long to compare
    changed = bytearray(file.read_bytes())
    changed[-1000] ^= 0x40
    file.write_bytes(changed)
    for source in (file, file.parent):
        with pytest.raises(CheckpointError, match=r"is not what was exported: .*remove the card"):
            read_source(source, num_heads=4)
    card.unlink()
    with suppress(CheckpointError):  # of a zip archive the checksum is wrong too
        read_source(file, num_heads=4)


def test_a_new_file_under_an_old_name_removes_the_old_card(
    vit: Path, targets: dict[str, Path], tmp_path: Path
) -> None:
    weights, file = read_source(vit), tmp_path / "ours.safetensors"
    shutil.copy(targets["ours.safetensors"].with_name("ours.safetensors.json"), tmp_path)
    save_backbone(file, weights.backbone, weights.card)
    read_source(file)
    (tmp_path / "ours.safetensors.json").write_text('{"files": "of somebody else"}')
    read_source(file)
    folder = Path(shutil.copytree(targets["hf folder"], tmp_path / "folder"))
    save_backbone(folder / "other.safetensors", weights.backbone, weights.card)
    assert (folder / "dinoscale.json").exists()
    save_backbone(folder / "model.safetensors", weights.backbone, weights.card)
    assert _same(read_source(folder / "model.safetensors").backbone, weights.backbone)
    shutil.copy(targets["hf folder"] / "dinoscale.json", folder)
    convert(vit, folder / "model.safetensors", to="dino", overwrite=True)
    read_source(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["a/b", "", "..", "/a", "a\0b", "\ud800", "a" * 300])
def test_a_card_names_files_beside_it_only(vit: Path, tmp_path: Path, name: str) -> None:
    file = Path(shutil.copy(vit, tmp_path))
    files = {name: "0" * 64, file.name: sha256(file)}
    (tmp_path / "dinoscale.json").write_text(json.dumps({"dinoscale": "1", "files": files}))
    with pytest.raises(CheckpointError, match=r"no file beside it|lacks '"):
        read_source(file)


def test_graphs_hold_the_weights_bit_for_bit(vit: Path, targets: dict[str, Path]) -> None:
    import onnx

    expected = read_source(vit).backbone
    assert _same(torch.jit.load(targets["graph.pt"]).state_dict(), expected)
    stored = {x.name: x for x in onnx.load(targets["graph.onnx"]).graph.initializer}
    found = {n: torch.from_numpy(onnx.numpy_helper.to_array(stored[n]).copy()) for n in expected}
    assert _same(found, expected)


@pytest.mark.parametrize("size", ["16x16", "24x40", "32x32", "48x48", "64x32"])
@pytest.mark.parametrize("to", ["torchscript", "onnx", "timm", "hf"])
def test_features_equal_the_recorded_ones_of_the_reference(
    targets: dict[str, Path], to: str, size: str
) -> None:
    tensors, _ = _golden()
    if to in ("timm", "hf") and size != "32x32":
        pytest.skip("exact at one size")
    path = targets[NAMES[to]]
    reopened = {
        "torchscript": lambda: reopen_torchscript(path),
        "onnx": lambda: reopen_onnx(path),
        "timm": lambda: reopen_timm(path),
        "hf": lambda: reopen_hf(path),
    }[to]()
    with torch.inference_mode():
        found = reopened.forward(tensors[f"{size}.input"])
    _assert_equal(found["cls"], tensors[f"{size}.cls"])
    patches = tensors[f"{size}.intermediate_1"][:, 1:]
    _assert_equal(found["patches"], patches)


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_folders_of_another_size_are_exact_at_that_size(vit: Path, tmp_path: Path, to: str) -> None:
    convert(vit, tmp_path / "small", to=to, size=16)
    tensors, _ = _golden()
    reopened = (reopen_timm if to == "timm" else reopen_hf)(tmp_path / "small")
    with torch.inference_mode():
        found = reopened.forward(tensors["16x16.input"])["cls"]
    _assert_equal(found, tensors["16x16.cls"])
    card = _said(tmp_path / "small")
    assert (card["backbone"]["img_size"], card["crop"], card["resize"]) == (16, 16, 18)


def test_cards_say_what_was_proved(vit: Path, targets: dict[str, Path]) -> None:
    for to, name in NAMES.items():
        card = _said(targets[name])
        assert (card["to"], card["dtype"], card["network"]) == (to, "float32", "teacher")
        assert card["backbone"] == asdict(read_source(vit).card.backbone)
        assert card["coverage"]["missing"] == card["coverage"]["unexpected"] == []
        assert card["coverage"]["text"] == (
            "56 of 56 tensors" if to == "hf" else "42 of 42 tensors"
        )
        assert [proof["size"] for proof in card["parity"]["proofs"]] == [[32, 32], [16, 16]]
        assert all(proof["max_difference"] <= MAX_DIFFERENCE for proof in card["parity"]["proofs"])
        place = targets[name]
        for file, digest in card["files"].items():
            assert sha256(place / file if place.is_dir() else place) == digest
        resized = card["position_embedding"]
        if to in ("timm", "hf"):
            assert resized["sizes"] == [32]
            assert resized["own_rule"]["max_difference"] > 1e-4  # else --size would be of no use
        else:
            assert resized["sizes"] == "any"


_ELSEWHERE = """
import sys
sys.modules["dinoscale"] = None  # an import of it fails
import torch
try:
    import torchvision
except RuntimeError:  # its operators are of another build: their schemas are enough
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor d, Tensor s, float t) -> Tensor")
import onnxruntime
import timm
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
folder, bound = sys.argv[1], float(sys.argv[2])
given = torch.load(f"{folder}/given.pth")
images = given["images"]
torch.set_grad_enabled(False)

model = timm.create_model(f"local-dir:{folder}/timm folder", pretrained=True).eval()
found = {"timm": model(images)}
config = timm.data.resolve_model_data_config(model)
steps = timm.data.create_transform(**config).transforms
assert (steps[0].size, tuple(steps[1].size)) == (36, (32, 32)), steps
assert list(config["mean"]) == [0.4, 0.4, 0.4], config
assert timm.create_model("vit_small_patch8_224", img_size=32, embed_dim=64, depth=3,
    num_heads=4, num_classes=0).load_state_dict(torch.load(f"{folder}/bare.pth"))

out = AutoModel.from_pretrained(f"{folder}/hf folder")(images)
found["hf"] = out.last_hidden_state[:, 0]
assert torch.equal(found["hf"], out.pooler_output)
processor = AutoImageProcessor.from_pretrained(f"{folder}/hf folder")
white = processor(Image.new("RGB", (80, 50), "white"), return_tensors="pt").pixel_values
assert white.shape == (1, 3, 32, 32)
torch.testing.assert_close(white, torch.full((1, 3, 32, 32), 2.0))

found["torchscript"], _ = torch.jit.load(f"{folder}/graph.pt")(images)
session = onnxruntime.InferenceSession(f"{folder}/graph.onnx")
found["onnx"] = torch.from_numpy(session.run(["cls"], {"images": images.numpy()})[0])
print(*(kind for kind, cls in found.items() if abs(cls - given["cls"]).max() <= bound))
"""


def test_targets_open_without_dinoscale(targets: dict[str, Path]) -> None:
    tensors, _ = _golden()
    folder = targets["bare.pth"].parent
    given = {"images": tensors["32x32.input"], "cls": tensors["32x32.cls"]}
    torch.save(given, folder / "given.pth")
    words = [str(folder), str(_bound(given["cls"]))]
    command = [sys.executable, "-W", "ignore", "-c", _ELSEWHERE, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder)
    assert done.stdout == "timm hf torchscript onnx\n", done.stderr


def test_reference_checkpoint_round_trips_with_its_head(tmp_path: Path) -> None:
    source = torch.load(REFERENCE, weights_only=False)
    path = tmp_path / "full.pth"
    convert(REFERENCE, path, to="dino", head=True, num_heads=4)
    assert _same(torch.load(path)["teacher"], source["teacher"])
    convert(REFERENCE, path, to="dino", head=True, num_heads=4, network="student", overwrite=True)
    student = {n.removeprefix("module."): tensor for n, tensor in source["student"].items()}
    assert _same(torch.load(path)["student"], student)
    one = convert(REFERENCE, tmp_path / "full.safetensors", to="dino", head=True, num_heads=4)
    assert one["coverage"]["text"] == "37 of 37 tensors"  # of the 38, the frozen norms are ones
    back = read_source(tmp_path / "full.safetensors")
    assert back.head is not None
    assert _same(back.head, read_source(REFERENCE, num_heads=4).head or {})


def test_bare_pth_has_the_names_of_the_reference(targets: dict[str, Path]) -> None:
    tensors, _ = _golden()
    found = torch.load(targets["bare.pth"], weights_only=True)
    assert {f"state.{name}" for name in found} == {n for n in tensors if n.startswith("state.")}


def test_registers_and_layer_scale_have_an_exact_form_in_transformers(tmp_path: Path) -> None:
    sizes = {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3}
    for name in ("vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2"):
        source = _save(tmp_path / f"{name}.safetensors", name, **sizes)
        card = convert(source, tmp_path / name, to="hf")
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config.get("num_register_tokens", 0) == (4 if "reg4" in name else 0)
        assert card["coverage"]["text"].startswith("44 of 44" if "reg4" in name else "43 of 43")
        assert "rounds the corner of the center crop down" in card["image_processor"]
        back, read = read_source(tmp_path / name), read_source(source)
        assert torch.equal(back.backbone.pop("mask_token"), torch.zeros(1, 48))
        positions = back.backbone["pos_embed"]
        if "reg4" in name:  # there the class token has a position, which is zero
            assert not positions[:, 0].any()
            back.backbone["pos_embed"] = positions[:, 1:]
        assert _same(back.backbone, read.backbone)
        assert back.card.backbone.name == "vit_small_patch14_dinov2"
    backbone, _ = load_backbone(tmp_path / "vit_small_patch14_reg4_dinov2.safetensors")
    script = tmp_path / "registers.pt"
    convert(tmp_path / "vit_small_patch14_reg4_dinov2.safetensors", script, to="torchscript")
    images = torch.randn(1, 3, 42, 70)
    with torch.inference_mode():
        tokens = backbone.features(images)
        cls, patches = torch.jit.load(script)(images)
    _assert_equal(cls, tokens[:, 0])
    _assert_equal(patches, tokens[:, 5:])


def test_a_standard_model_has_the_names_that_timm_and_transformers_expect(tmp_path: Path) -> None:
    source = _save(tmp_path / "t.safetensors", "vit_tiny_patch16_224", img_size=224)
    card = convert(source, tmp_path / "t timm", to="timm")
    assert card["coverage"]["text"] == "150 of 150 tensors"
    config = json.loads((tmp_path / "t timm" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert (config["num_features"], config["num_classes"]) == (192, 0)


@pytest.mark.parametrize("to", ["timm", "torchscript"])
def test_images_of_four_channels_are_kept(tmp_path: Path, to: str) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    source = _save(tmp_path / "w", "vit_tiny_patch16_224", in_chans=4, **sizes)
    assert convert(source, tmp_path / "out", to=to)["backbone"]["in_chans"] == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("to", ["dino", "timm", "hf"])
def test_16_bit_weights_are_rounded_once(vit: Path, tmp_path: Path, to: str, dtype: str) -> None:
    card = convert(vit, tmp_path / "out", to=to, dtype=dtype)
    back = read_source(tmp_path / "out").backbone
    kind = getattr(torch, dtype)
    assert _same(back, {name: x.to(kind) for name, x in read_source(vit).backbone.items()})
    assert 1e-5 < card["parity"]["rounding"]["max_difference"] < 0.05
    assert all(proof["max_difference"] <= 1e-5 for proof in card["parity"]["proofs"])


def test_weights_that_16_bit_cannot_hold_are_refused(vit: Path, tmp_path: Path) -> None:
    weights = read_source(vit)
    state = {**weights.backbone, "cls_token": torch.full_like(weights.backbone["cls_token"], 1e6)}
    save_backbone(tmp_path / "w", state, weights.card)
    with pytest.raises(ConversionError, match="cls_token"):
        convert(tmp_path / "w", tmp_path / "out", to="timm", dtype="float16")
    assert sorted(os.listdir(tmp_path)) == ["w"]


def _scaled(name: str, factor: float) -> Any:
    """A writer of `dino` that changes one tensor."""

    def write(path: Path, weights: Weights) -> None:
        changed = weights.backbone[name] * factor
        TARGETS["dino"].write(path, replace(weights, backbone={**weights.backbone, name: changed}))

    return write


@pytest.mark.parametrize("name", ["norm.weight", "pos_embed"])
def test_a_target_with_other_features_is_refused_and_removed(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wrong = replace(TARGETS["dino"], write=_scaled(name, 1.01))
    monkeypatch.setitem(conversion.TARGETS, "wrong", wrong)
    with pytest.raises(ConversionError, match=r"at 32 x 32 pixels differ by .*nothing was written"):
        convert(vit, tmp_path / "out", to="wrong")
    assert os.listdir(tmp_path) == []


def test_a_target_that_is_wrong_at_the_second_size_only_is_refused(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_rule = Target(
        TARGETS["timm"].write, lambda path, _: reopen_timm(path, own_resize=True), is_folder=True
    )
    monkeypatch.setitem(conversion.TARGETS, "timm", own_rule)
    with pytest.raises(ConversionError, match=r"at 16 x 16 pixels differ by .*nothing was written"):
        convert(vit, tmp_path / "out", to="timm")
    assert os.listdir(tmp_path) == []


def test_a_target_that_lacks_a_tensor_is_refused(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reopen(path: Path, network: Network) -> Reopened:
        whole = TARGETS["dino"].reopen(path, network)
        return replace(whole, state={n: x for n, x in whole.state.items() if n != "norm.bias"})

    monkeypatch.setitem(conversion.TARGETS, "wrong", replace(TARGETS["dino"], reopen=reopen))
    with pytest.raises(ConversionError, match=r"41 of 42 tensors fit; missing: norm\.bias"):
        convert(vit, tmp_path / "out", to="wrong")
    assert os.listdir(tmp_path) == []


def test_non_finite_numbers_are_never_equal(vit: Path) -> None:
    ours = our_forward(load_backbone(vit)[0])
    nan = compare(ours, lambda x: {"cls": ours(x)["cls"] * float("nan")}, in_chans=3, size=32)
    assert not nan.equal
    assert compare(ours, ours, in_chans=3, size=32).equal


def test_nothing_is_overwritten_silently(vit: Path, tmp_path: Path) -> None:
    for name, to in (("w.pth", "dino"), ("folder", "timm")):
        convert(vit, tmp_path / name, to=to)
        with pytest.raises(OutputError, match=r"exists.*--overwrite"):
            convert(vit, tmp_path / name, to=to)
        convert(vit, tmp_path / name, to=to, overwrite=True, size=48)
        assert _said(tmp_path / name)["backbone"]["img_size"] == 48
    assert sorted(os.listdir(tmp_path)) == ["folder", "w.pth", "w.pth.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    for to in ("timm", "dino"):
        with pytest.raises(OutputError, match="did not write"):
            convert(vit, tmp_path / "mine", to=to, overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        convert(vit, tmp_path / "w.pth", to="timm", overwrite=True)
    assert (tmp_path / "mine" / "precious").exists()


@pytest.mark.parametrize("name", ["thesis.pth", "w.pth.json", "w.pth, changed", "link"])
def test_overwrite_replaces_only_an_unchanged_conversion(
    vit: Path, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "w.pth"
    foreign = target if name != "w.pth.json" else tmp_path / name
    if name.endswith("changed"):
        convert(vit, target, to="dino")
        target.write_bytes(target.read_bytes() + b"mine")
    elif name == "link":
        (tmp_path / "mine").write_text("years of work")
        target.symlink_to("mine")
    else:
        foreign.write_text('{"years": "of work"}')
    before = foreign.read_bytes()
    with pytest.raises(OutputError, match="remove it"):
        convert(vit, target, to="dino", overwrite=True)
    assert foreign.read_bytes() == before


def test_overwrite_keeps_a_folder_with_foreign_files(vit: Path, tmp_path: Path) -> None:
    convert(vit, tmp_path / "out", to="timm")
    notes = tmp_path / "out" / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(OutputError, match=r"that has changed .notes\.txt.: remove it"):
        convert(vit, tmp_path / "out", to="timm", overwrite=True)
    assert notes.read_text() == "mine"


def test_a_source_is_never_its_own_target(vit: Path, tmp_path: Path) -> None:
    full, folder = tmp_path / "full.pth", tmp_path / "folder"
    convert(REFERENCE, full, to="dino", head=True, num_heads=4)
    (tmp_path / "link.pth").symlink_to("full.pth")
    convert(vit, folder, to="timm")
    before = full.read_bytes()
    for source, target, to in (
        (full, full, "dino"),
        (tmp_path / "link.pth", full, "dino"),
        (full, tmp_path / "link.pth", "dino"),
        (folder, folder, "timm"),
        (folder / "model.safetensors", folder, "timm"),
        (folder, folder / "model.safetensors", "dino"),
    ):
        with pytest.raises(OutputError, match="overlaps the source"):
            convert(source, target, to=to, dtype="bfloat16", overwrite=True)
    assert full.read_bytes() == before


@pytest.mark.parametrize(("name", "to"), [("w.safetensors", "dino"), ("folder", "timm")])
def test_a_failed_rename_keeps_the_previous_export(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, to: str
) -> None:
    convert(vit, tmp_path / name, to=to)
    before, rename = read_source(tmp_path / name).card, os.replace

    def fails(source: Path, target: Path) -> None:
        if (Path(source).name, Path(target)) == (name, tmp_path / name):
            raise OSError("the disk is gone")
        rename(source, target)

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(ConversionError, match="the disk is gone"):
        convert(vit, tmp_path / name, to=to, overwrite=True, size=48)
    assert read_source(tmp_path / name).card == before
    assert len(os.listdir(tmp_path)) == (1 if to == "timm" else 2)


def test_a_missing_library_is_named_with_its_remedy(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for to, extra in (("hf", "hf"), ("onnx", "onnx")):
        with pytest.raises(ConversionError, match=rf"pip install 'dinoscale\[{extra}\]'"):
            convert(vit, tmp_path / "out", to=to)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "timm", "head": True}, "--to timm has no place for a projection head"),
        ({"to": "dino", "head": True}, "holds no projection head"),
        ({"to": "onnx", "dtype": "float16"}, "leave --dtype out"),
        ({"to": "timm", "size": 30}, "30 is not a multiple of the patch size 8"),
        ({"to": "hf", "size": 0}, "0 is not a multiple"),
    ],
)
def test_what_a_target_cannot_do_is_refused(
    vit: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConversionError, CheckpointError), match=message):
        convert(vit, tmp_path / "out", **options)
    assert os.listdir(tmp_path) == []


def test_models_without_an_equivalent_in_transformers_are_refused(tmp_path: Path) -> None:
    sizes = {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3}
    other = _save(tmp_path / "w", "vit_base_patch16_clip_224", **{**sizes, "patch_size": 14})
    with pytest.raises(
        ConversionError, match="no exact form in transformers: it normalises before"
    ):
        convert(other, tmp_path / "out", to="hf")
    assert sorted(os.listdir(tmp_path)) == ["w"]


def test_resnet_goes_to_timm_and_is_refused_by_transformers(tmp_path: Path) -> None:
    source = _save(tmp_path / "w", "resnet50", img_size=32)
    assert convert(source, tmp_path / "timm", to="timm")["position_embedding"]["sizes"] == "any"
    with pytest.raises(ConversionError, match="it is no ViT"):
        convert(source, tmp_path / "hf", to="hf")


def test_the_command_prints_the_card(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run(["convert", str(vit), str(tmp_path / "w.pth"), "--to", "dino", "--dtype", "bfloat16"])
    card = json.loads(capsys.readouterr().out)
    assert card == {"target": str(tmp_path / "w.pth"), **_said(tmp_path / "w.pth")}
