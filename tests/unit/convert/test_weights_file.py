"""Weights files: they round-trip, and nothing is partly loaded."""

import argparse
import errno
import io
import json
import os
import pickle
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dinoscale.convert.card import parse_card
from dinoscale.convert.formats.reference import guess_shape
from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import (
    BackboneCard,
    BackboneShape,
    load_backbone,
    save_backbone,
)
from dinoscale.errors import CheckpointError
from dinoscale.models.rope import Rope
from dinoscale.models.zoo import build_backbone

SHAPE = BackboneShape(
    "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3
)
CARD = BackboneCard(
    SHAPE, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resize=36, crop=32, source="a test"
)
GOLDEN = Path(os.environ.get("DINOSCALE_GOLDEN", Path(__file__).parents[2] / "golden"))


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return build_backbone("vit_tiny_patch16_224", img_size=32, **sizes).eval()


@pytest.fixture
def state(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}


def test_a_saved_backbone_loads_unchanged(tmp_path: Path, backbone: nn.Module) -> None:
    path = tmp_path / "new folder" / "teacher.safetensors"
    save_backbone(path, backbone.state_dict(), CARD)
    loaded, card = load_backbone(path)
    assert card == CARD
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded([images]), backbone([images]))


def test_transposed_and_shared_tensors_are_saved_with_their_values(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    save_backbone(tmp_path / "w", {"a": shared.T, "b": shared, "c": shared[:1]}, CARD)
    found = load_file(tmp_path / "w")
    assert torch.equal(found["a"], shared.T)
    assert torch.equal(found["b"], shared)
    assert torch.equal(found["c"], shared[:1])


def test_a_failed_save_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    path = tmp_path / "teacher.safetensors"
    save_backbone(path, state, CARD)
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        save_backbone(path, {**state, "bad": None}, CARD)  # type: ignore[dict-item]  # on purpose
    with pytest.raises(TypeError):
        save_backbone(path, state, replace(CARD, source=object()))  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_num_heads_must_agree_with_the_card(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_backbone(tmp_path / "w", state, CARD)
    assert load_backbone(tmp_path / "w", num_heads=3)[1] == CARD
    with pytest.raises(CheckpointError, match="w: has num_heads=3, not 6"):
        load_backbone(tmp_path / "w", num_heads=6)


def test_a_missing_tensor_is_named_and_counted(tmp_path: Path, state: dict[str, Tensor]) -> None:
    del state["blocks.1.norm1.weight"], state["norm.bias"]
    save_backbone(tmp_path / "w", state, CARD)
    with pytest.raises(CheckpointError) as caught:
        load_backbone(tmp_path / "w")
    assert "28 of 30 tensors" in str(caught.value)
    assert "missing: blocks.1.norm1.weight, norm.bias" in str(caught.value)


def test_an_unexpected_tensor_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_backbone(tmp_path / "w", {**state, "reg_token": torch.zeros(1, 4, 48)}, CARD)
    with pytest.raises(CheckpointError, match="30 of 30 tensors fit; unexpected: reg_token"):
        load_backbone(tmp_path / "w")


def test_a_tensor_of_another_shape_is_named_with_both(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    state["pos_embed"] = torch.zeros(1, 197, 48)
    save_backbone(tmp_path / "w", state, CARD)
    with pytest.raises(CheckpointError, match=r"29 of 30 .*pos_embed \[1, 197, 48\] for \[1, 17"):
        load_backbone(tmp_path / "w")


def test_non_finite_weights_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["norm.weight"][3] = float("nan")
    save_backbone(tmp_path / "w", state, CARD)
    with pytest.raises(CheckpointError, match=r"not finite: norm\.weight"):
        load_backbone(tmp_path / "w")


def test_an_unknown_architecture_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    card = replace(CARD, backbone=replace(SHAPE, name="vit_smal_patch16"))
    save_backbone(tmp_path / "w", state, card)
    with pytest.raises(CheckpointError, match=r"cannot be built.*vit_smal_patch16"):
        load_backbone(tmp_path / "w")


def _archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "LFS"),
        (b"hello, world, this is a text", "neither"),
        (b"PK\x03\x04 a zip that ends early", "damaged"),
        (b"\x80\x02 a pickle of others", "a pickle that torch.save did not write"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19. that ends early", "damaged"),
        (_archive("x.npy"), r"a zip archive that torch.save did not write .it holds x\.npy"),
        (_archive("graph/data.pkl", "graph/constants.pkl"), "is a TorchScript program"),
        (_archive("w/data.pkl"), "damaged"),
    ],
)
def test_files_without_weights_get_one_sentence(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_backbone(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (OSError(errno.EIO, "Input/output error"), r"cannot be read \(Input/output error\)"),
        (MemoryError(), "does not fit into memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "does not fit into memory"),
    ],
)
def test_a_failing_disk_and_a_lack_of_memory_are_not_called_damage(
    tmp_path: Path,
    state: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    says: str,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise failure

    torch.save(state, tmp_path / "w.pth")
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(CheckpointError, match=f"w.pth: {says}"):
        load_backbone(tmp_path / "w.pth")


def test_shards_of_torch_files_are_refused_as_such(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"in several torch files .*save them as safetensors"):
        load_backbone(tmp_path)


def test_missing_files_and_folders_get_different_messages(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        load_backbone(tmp_path / "nowhere.safetensors")
    with pytest.raises(CheckpointError, match="folder"):
        load_backbone(tmp_path)


def test_of_several_files_in_a_folder_only_one_with_a_hub_name_is_taken(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    save_backbone(tmp_path / "a.safetensors", state, CARD)
    assert load_backbone(tmp_path)[1] == CARD
    torch.save({}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match=r"2 weights files \(a\.safetensors, b\.pth\)"):
        load_backbone(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    save_backbone(tmp_path / "model.safetensors", state, replace(CARD, source="preferred"))
    assert load_backbone(tmp_path)[1].source == "preferred"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: is a folder without weights"):
        load_backbone(tmp_path / "empty")


def test_a_card_of_another_patch_size_is_refused_by_name(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    save_backbone(tmp_path / "w", state, replace(CARD, backbone=replace(SHAPE, patch_size=16)))
    with pytest.raises(CheckpointError, match=r"28 of 30 .*pos_embed .*patch_embed\.proj\.weight"):
        load_backbone(tmp_path / "w")


def test_heads_of_our_files_are_kept_and_classifiers_refused(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    head = {"head.mlp.0.weight": torch.ones(4, 48), "head.last_layer.weight_v": torch.ones(2, 3)}
    save_backbone(tmp_path / "w", state | head, CARD)
    weights = read_source(tmp_path / "w")
    assert weights.kind == "dinoscale"
    assert weights.head is not None
    assert weights.head.keys() == {"mlp.0.weight", "last_layer.weight_v"}
    assert weights.backbone.keys() == state.keys()
    load_backbone(tmp_path / "w")
    save_backbone(tmp_path / "w", {**state, "head.weight": torch.ones(4, 48)}, CARD)
    with pytest.raises(CheckpointError, match=r"unexpected: head\.weight"):
        load_backbone(tmp_path / "w")


def test_the_epsilon_of_the_norms_is_built(tmp_path: Path, state: dict[str, Tensor]) -> None:
    card = replace(CARD, backbone=replace(SHAPE, norm_eps=0.25))
    save_backbone(tmp_path / "w", state, card)
    loaded, found = load_backbone(tmp_path / "w")
    assert found == card
    norms = [module for module in loaded.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5
    assert all(norm.eps == 0.25 for norm in norms)


def test_cards_of_the_previous_format_are_still_read() -> None:
    card = json.loads(CARD.to_json())
    assert card.pop("licence") is None
    assert parse_card(json.dumps({**card, "format": 6})) == CARD
    for key in ("ffn_ratio", "ffn_multiple", "rope", "qkv_bias", "mask_key_bias", "local_norm"):
        del card["backbone"][key]
    assert parse_card(json.dumps({**card, "format": 5})) == CARD
    with pytest.raises(CheckpointError, match="rope"):
        parse_card(json.dumps({**card, "format": 6}))
    for key in ("layer_scale", "ffn", "registers", "position_resize", "mask_token"):
        del card["backbone"][key]
    assert parse_card(json.dumps({**card, "format": 4})) == CARD
    card["white"] = card.pop("max_pixel_value")
    assert parse_card(json.dumps({**card, "format": 3})) == CARD
    del card["backbone"]["norm_eps"]
    assert parse_card(json.dumps({**card, "format": 2})) == CARD
    for number, unknown in ((3, "norm_eps"), (4, "white"), (5, "white")):
        with pytest.raises(CheckpointError, match=unknown):
            parse_card(json.dumps({**card, "format": number}))


def test_giants_are_recognised_by_their_width() -> None:
    width = 1536
    state = {
        "pos_embed": torch.zeros(1, 1 + 4, width),
        "patch_embed.proj.weight": torch.zeros(width, 3, 14, 14),
        "blocks.0.ls2.gamma": torch.zeros(width),
        "blocks.0.mlp.fc1.weight": torch.zeros(()).expand(8192, width),
        "blocks.0.mlp.fc2.weight": torch.zeros(()).expand(width, 4096),
    }
    assert guess_shape(state) == BackboneShape("vit_giant_patch14_dinov2", 28, 14, width, 1, 24)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    tmp_path: Path, state: dict[str, Tensor], fraction: float
) -> None:
    path = tmp_path / "w.safetensors"
    save_backbone(path, state, CARD)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_backbone(path)


def test_a_card_is_read_strictly() -> None:
    good = json.loads(CARD.to_json())
    assert parse_card(json.dumps(good)) == CARD
    gray = replace(
        CARD, backbone=replace(SHAPE, in_chans=1), mean=(0.5,), std=(0.2,), max_pixel_value=4095.0
    )
    assert parse_card(gray.to_json()) == gray
    rope = Rope(base=None, min_period=0.5, max_period=90.0, coordinates="max")
    rotary = replace(CARD, backbone=replace(SHAPE, rope=rope, qkv_bias=False, local_norm=True))
    assert parse_card(rotary.to_json()) == rotary
    turned = json.loads(rotary.to_json())["backbone"]
    bad_cards = [
        {**good, "format": 1},
        {**good, "extra": 1},
        {key: value for key, value in good.items() if key != "mean"},
        {**good, "mean": [0.5]},
        {**good, "std": ["0.5"] * 3},
        {**good, "max_pixel_value": 0},
        {**good, "max_pixel_value": float("inf")},
        {**good, "backbone": {**good["backbone"], "in_chans": 4}},
        {**good, "crop": 0},
        {**good, "licence": ["DINOv3"]},
        {**good, "resize": "256"},
        {**good, "backbone": "vit_small_patch16_224"},
        {**good, "backbone": {**good["backbone"], "depth": 1.5}},
        {**good, "backbone": {**good["backbone"], "classes": 4}},
        {**good, "backbone": {**good["backbone"], "registers": -1}},
        {**good, "backbone": {**good["backbone"], "ffn": "glu"}},
        {**good, "backbone": {**good["backbone"], "mask_token": 1}},
        {**good, "backbone": {**good["backbone"], "qkv_bias": 1}},
        {**good, "backbone": {**good["backbone"], "rope": 100.0}},
        *(
            {**good, "backbone": {**turned, "rope": {**turned["rope"], **wrong}}}
            for wrong in ({"min_period": None}, {"coordinates": "both"}, {"base": -1}, {"x": 1})
        ),
    ]
    for bad in [json.dumps(card) for card in bad_cards] + ["[]", "{"]:
        with pytest.raises(CheckpointError, match="card"):
            parse_card(bad)


def test_heads_that_a_bare_file_does_not_store_are_guessed_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = {
        "pos_embed": torch.zeros(1, 1 + 4, 384),
        "patch_embed.proj.weight": torch.zeros(384, 3, 8, 8),
        "blocks.0.norm1.weight": torch.zeros(384),
    }
    guess_shape(state, num_heads=12)
    guess_shape(state, args=argparse.Namespace(arch="vit_small"))
    assert not caplog.text
    assert guess_shape(state).num_heads == 6
    assert "assuming num_heads=6" in caplog.text


@pytest.mark.parametrize(
    ("raw", "averaged"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")],
)
def test_of_raw_and_averaged_weights_the_average_is_the_teacher(
    tmp_path: Path,
    state: dict[str, Tensor],
    caplog: pytest.LogCaptureFixture,
    raw: str,
    averaged: str,
) -> None:
    average = {f"module.{name}": x + 1 for name, x in state.items()}
    torch.save({"epoch": 3, raw: state, averaged: average}, tmp_path / "w.pth")
    with caplog.at_level("INFO"):
        teacher = read_source(tmp_path / "w.pth", num_heads=3).backbone
    assert torch.equal(teacher["cls_token"], state["cls_token"] + 1)
    assert f"taking '{averaged}' (an average over steps); '{raw}' is the student" in caplog.text
    student = read_source(tmp_path / "w.pth", network="student", num_heads=3).backbone
    assert torch.equal(student["cls_token"], state["cls_token"])
    torch.save({averaged: average}, tmp_path / "w.pth")
    read_source(tmp_path / "w.pth", num_heads=3)
    with pytest.raises(CheckpointError, match=f"no 'student', only an average .*'{averaged}'"):
        read_source(tmp_path / "w.pth", network="student", num_heads=3)


# The reference's own files


def test_the_reference_checkpoint_loads_completely() -> None:
    checkpoint = GOLDEN / "reference_checkpoint.pth"
    run = json.loads((GOLDEN / "trajectory.json").read_text())["config"]
    keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    geometry = {key: run[key] for key in keys}
    backbone, card = load_backbone(checkpoint, num_heads=run["num_heads"])
    assert card.backbone == BackboneShape(name=card.backbone.name, **geometry)
    assert card.source == checkpoint.name
    images = torch.rand(2, 3, run["img_size"], run["img_size"])
    assert backbone([images]).shape == (2, run["embed_dim"])
    teacher = backbone.state_dict()
    student = read_source(checkpoint, network="student", num_heads=run["num_heads"]).backbone
    assert teacher.keys() == student.keys()
    assert not torch.equal(teacher["pos_embed"], student["pos_embed"])


def test_the_reference_checkpoint_agrees_with_its_recorded_states() -> None:
    path = GOLDEN / "trajectory_states.safetensors"
    if not path.exists():
        pytest.skip("no recorded states in this folder")
    recorded = load_file(path)
    last = max(name.split(".")[0] for name in recorded)
    state = read_source(GOLDEN / "reference_checkpoint.pth", num_heads=1).backbone
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, recorded[f"{last}.teacher.backbone.{name}"])


def _reference_file(path: Path, state: dict[str, Tensor], **args: object) -> Path:
    """A full checkpoint as the reference writes it, with wrapped student and heads."""
    head = {"head.mlp.0.weight": torch.zeros(4, 48)}
    torch.save(
        {
            "student": {f"module.backbone.{k}": v + 1 for k, v in state.items()}
            | {f"module.{k}": v for k, v in head.items()},
            "teacher": {f"backbone.{k}": v for k, v in state.items()} | head,
            "epoch": 1,
            "args": argparse.Namespace(arch="vit_tiny", **args),
        },
        path,
    )
    return path


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_either_network_of_a_full_checkpoint_loads(
    tmp_path: Path, state: dict[str, Tensor], network: str
) -> None:
    path = _reference_file(tmp_path / "c.pth", state, num_heads=3)
    loaded, card = load_backbone(path, network=network)  # type: ignore[arg-type]
    assert card.backbone.num_heads == 3
    shift = 1 if network == "student" else 0
    assert torch.equal(loaded.state_dict()["norm.weight"], state["norm.weight"] + shift)


def test_heads_that_cannot_be_guessed_must_be_given(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    path = _reference_file(tmp_path / "c.pth", state)
    with pytest.raises(CheckpointError, match="give num_heads"):
        load_backbone(path)
    assert load_backbone(path, num_heads=3)[1].backbone.num_heads == 3


def test_a_bare_state_dict_loads_from_either_format(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    torch.save(state, tmp_path / "bare.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "bare.safetensors")
    for name in ("bare.pth", "old.pth", "bare.safetensors"):
        loaded, _ = load_backbone(tmp_path / name, num_heads=3)
        assert torch.equal(loaded.state_dict()["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_mappings_of_training_scripts_around_tensors_are_unwrapped(
    tmp_path: Path, state: dict[str, Tensor], wrapper: str
) -> None:
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "w.pth")
    loaded, _ = load_backbone(tmp_path / "w.pth", num_heads=3)
    assert torch.equal(loaded.state_dict()["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize(
    "prefix",
    [
        *("_orig_mod.", "module._orig_mod.backbone.", "_orig_mod.module.backbone."),
        *("module.backbone._orig_mod.", "_fsdp_wrapped_module.backbone."),
    ],
)
def test_prefixes_of_wrappers_are_removed(
    tmp_path: Path, state: dict[str, Tensor], prefix: str
) -> None:
    inner = {name.replace("blocks.0.", "blocks.0._orig_mod."): x for name, x in state.items()}
    torch.save({"teacher": {prefix + name: x for name, x in inner.items()}}, tmp_path / "w.pth")
    loaded, _ = load_backbone(tmp_path / "w.pth", num_heads=3)
    assert torch.equal(loaded.state_dict()["pos_embed"], state["pos_embed"])
    torch.save({**state, "_orig_mod.pos_embed": state["pos_embed"]}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds 'pos_embed' twice"):
        load_backbone(tmp_path / "w.pth", num_heads=3)


def test_sparse_quantized_and_meta_tensors_are_refused(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    bias = state["norm.bias"]
    for other, says in (
        (bias.to(torch.int8), r"another shape or type: norm\.bias \[48\] int8 for \[48\]"),
        (bias.to("meta"), "holds 'norm.bias' without its numbers"),
        (bias.to_sparse(), "holds 'norm.bias' without its numbers, quantized or sparse"),
    ):
        torch.save({**state, "norm.bias": other}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=says):
            load_backbone(tmp_path / "w.pth", num_heads=3)


def test_published_sizes_are_recognised(tmp_path: Path) -> None:
    def blank(*, width: int, patch: int, depth: int) -> dict[str, Tensor]:
        patches = (224 // patch) ** 2
        return {
            "pos_embed": torch.zeros(1, 1 + patches, width),
            "patch_embed.proj.weight": torch.zeros(width, 3, patch, patch),
            f"blocks.{depth - 1}.norm1.weight": torch.zeros(width),
        }

    for name, width, patch, heads in (("small", 384, 8, 6), ("base", 768, 16, 12)):
        torch.save(blank(width=width, patch=patch, depth=12), tmp_path / "w.pth")
        card = read_source(tmp_path / "w.pth").card
        expected = BackboneShape(f"vit_{name}_patch{patch}_224", 224, patch, width, 12, heads)
        assert card.backbone == expected
        assert (card.resize, card.crop) == (256, 224)


def test_a_published_resnet_loads(tmp_path: Path) -> None:
    state = build_backbone("resnet50", img_size=224).state_dict()
    torch.save(state, tmp_path / "resnet.pth")
    loaded, card = load_backbone(tmp_path / "resnet.pth")
    assert card.backbone == BackboneShape("resnet50", img_size=224)
    assert torch.equal(loaded.state_dict()["conv1.weight"], state["conv1.weight"])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet50"])
def test_channels_of_foreign_files_are_inferred_from_their_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    model = build_backbone(name, img_size=32, in_chans=4).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded, card = load_backbone(tmp_path / "w.pth")
    assert (card.backbone.in_chans, card.mean, card.std) == (4, (0.0,) * 4, (1.0,) * 4)
    assert "mean and std of their 4 channels" in caplog.text
    images = torch.rand(1, 4, 32, 32)
    assert torch.equal(loaded([images]), model([images]))


def test_foreign_files_with_too_many_channels_are_refused(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    countless = torch.zeros(1).expand(48, 10**11, 8, 8)
    torch.save({**state, "patch_embed.proj.weight": countless}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"need \(D, C, p, p\) with 1 <= C"):
        load_backbone(tmp_path / "w.pth", num_heads=3)


def test_mismatches_of_foreign_files_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    torch.save({**state, "blocks.0.ls1.gamma": torch.zeros(48)}, path)
    with pytest.raises(CheckpointError, match=r"unexpected: blocks\.0\.ls1\.gamma"):
        load_backbone(path, num_heads=3)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items() if "fc2" not in k}}, path)
    with pytest.raises(CheckpointError, match=r"26 of 30 .*missing: blocks\.0\.mlp\.fc2\.weight"):
        load_backbone(path, num_heads=3)
    torch.save({"embeddings.cls_token": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"no ViT, ResNet or ConvNeXt.*cls_token"):
        load_backbone(path)
    torch.save({"student": state}, path)
    with pytest.raises(CheckpointError, match="no 'teacher', only 'student'"):
        load_backbone(path)


class _Dangerous:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("code-from-a-checkpoint-was-run",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": _Dangerous()}, "w.pth")
    with pytest.raises(CheckpointError, match=r"holds posix\.mkdir"):
        load_backbone("w.pth")
    Path("p.pth").write_bytes(pickle.dumps(_Dangerous()))
    with pytest.raises(CheckpointError):
        load_backbone("p.pth")
    assert sorted(os.listdir(tmp_path)) == ["p.pth", "w.pth"]


def test_the_card_is_where_other_programs_look_for_it(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    save_backbone(tmp_path / "w", state, CARD)
    with safe_open(tmp_path / "w", framework="pt") as file:
        card = json.loads(file.metadata()["dinoscale"])
    assert card["format"] == 7
    assert card["backbone"] == asdict(SHAPE)
    assert (card["mean"], card["crop"]) == ([0.1, 0.2, 0.3], 32)
