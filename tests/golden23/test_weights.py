"""DINOv2 in the layouts of its authors, timm and transformers, as those libraries have it.

`checkpoint_keys.json` lists names and shapes of real files; `transformers_tiny` has small networks
with the outputs of the reference and of transformers.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dinoscale.convert.conversion import convert
from dinoscale.convert.coverage import coverage_of
from dinoscale.convert.formats.to_hf import reopen_hf
from dinoscale.convert.initial_weights import read_initial_weights
from dinoscale.convert.load_backbone import Backbone, load_backbone
from dinoscale.convert.parity import MAX_DIFFERENCE
from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import build_head, expected_tensors
from dinoscale.engine.build import build_networks
from dinoscale.errors import CheckpointError, ConversionError
from dinoscale.models._torchvision import ensure_torchvision
from tests.distributed.tiny_run import tiny_config
from tests.golden23.compare import our_name
from tests.golden23.recorded import recorded_run

Tensors = Callable[[str], dict[str, Tensor]]
Jsons = Callable[[str], dict[str, Any]]

CASES = ("v2_mlp", "v2_swiglu", "v2_registers", "v2_registers_swiglu")
CASES_OF_RUNS = ("A", "B")
HEADS = 2  # of attention in them, which a file does not tell

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _tensors(listed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of the listed shapes, which take no memory; block 0 stands for all."""
    state = {}
    for name, told in listed.get("keys", listed).items():
        shape = told[0] if told and isinstance(told[0], list) else told
        for index in range(listed.get("blocks", 1)):
            of_block = re.sub(r"(^|\.)(blocks|layer)\.0\.", rf"\1\2.{index}.", name)
            state[of_block if "blocks" in listed else name] = torch.zeros(()).expand(shape)
    return state


def _files(listed: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every listed file: its name and its content."""
    for name, keys in listed["released"].items():
        yield name, _tensors(keys)
    for name, keys in listed["training_teacher_checkpoint"].items():
        yield name, {"teacher": _tensors(keys)}
    for name, kinds in listed["transformers"]["models"].items():
        for kind, keys in kinds.items():
            yield f"{name}, {kind}", _tensors(keys)


def test_every_dinov2_file_is_read_whole(tmp_path: Path, golden23_json: Jsons) -> None:
    read = 0
    for name, content in _files(golden23_json("checkpoint_keys")):
        if "dinov2" not in name:
            continue
        torch.save(content, tmp_path / "w")
        state = content.get("teacher", content)
        width = next(x.shape[-1] for key, x in state.items() if key.endswith("cls_token"))
        told = None if width % 64 == 0 else HEADS
        weights = read_source(tmp_path / "w", num_heads=told)
        coverage = coverage_of(weights.backbone, expected_tensors(weights))
        assert coverage.complete, f"{name}: {coverage}"
        assert weights.left_out == ()
        shape = weights.card.backbone
        assert shape.num_heads == (told or width // 64)
        assert shape.registers == (4 if any("register" in key for key in state) else None)
        assert shape.mask_token
        for part, head in (("dino_head", weights.head), ("ibot_head", weights.patch_head)):
            assert (head is None) == (part not in str([*state])), f"{name}: {part}"
            if head is not None:
                build_head(head)
        read += 1
    assert read == 12


def test_dinov3_files_are_refused_by_name(tmp_path: Path, golden23_json: Jsons) -> None:
    for name, content in _files(golden23_json("checkpoint_keys")):
        if "dinov3" in name:
            torch.save(content, tmp_path / "w")
            with pytest.raises(CheckpointError, match="rotary position embeddings, as DINOv3"):
                read_source(tmp_path / "w", num_heads=HEADS)


# Small networks


@pytest.fixture(scope="module")
def golden(golden23_tensors: Tensors) -> dict[str, Tensor]:
    return golden23_tensors("transformers_tiny")


def _part(golden: Mapping[str, Tensor], case: str, part: str) -> dict[str, Tensor]:
    start = f"{case}.{part}."
    return {name.removeprefix(start): x for name, x in golden.items() if name.startswith(start)}


def _saved(path: Path, golden: Mapping[str, Tensor], case: str) -> Path:
    torch.save(_part(golden, case, "state"), path)
    return path


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], x) for name, x in expected.items()
    )


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    bound = MAX_DIFFERENCE * float(expected.abs().max())  # as `convert` has it
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def _tokens(backbone: Backbone, images: Tensor) -> Tensor:
    found = backbone.forward_features(images)
    return torch.cat((found.cls[:, None], found.registers, found.patches), dim=1)


@pytest.mark.parametrize("case", CASES)
def test_files_of_the_reference_give_its_features(
    tmp_path: Path, golden: dict[str, Tensor], golden23_json: Jsons, case: str
) -> None:
    backbone, _ = load_backbone(_saved(tmp_path / "w.pth", golden, case), num_heads=HEADS)
    for height, width in golden23_json("transformers_tiny")["sizes"]:
        at = f"{case}.{height}x{width}"
        images = golden[f"{at}.input"]
        _assert_equal(_tokens(backbone, images), golden[f"{at}.reference"])
        _assert_equal(backbone(images), golden[f"{at}.reference"][:, 0])
        before, last = backbone.intermediate(images, 2)
        _assert_equal(last.patches, golden[f"{at}.reference"][:, -last.patches.shape[1] :])
        assert before.patches.shape == last.patches.shape
        assert not torch.allclose(before.cls, last.cls)


@pytest.mark.parametrize("case", CASES)
def test_transformers_files_are_those_of_save_pretrained_and_come_back(
    tmp_path: Path, golden: dict[str, Tensor], golden23_json: Jsons, case: str
) -> None:
    source = _saved(tmp_path / "w.pth", golden, case)
    card = convert(source, tmp_path / "hf", to="hf", num_heads=HEADS)
    assert _same(load_file(tmp_path / "hf" / "model.safetensors"), _part(golden, case, "file"))
    told = next(x for x in golden23_json("transformers_tiny")["cases"] if x["case"] == case)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == [told["transformers_class"]]
    assert {key: config[key] for key in told["transformers_config"]} == told["transformers_config"]
    # Without registers, transformers resizes positions by another rule than the reference.
    assert card["position_embedding"]["sizes"] == ("any" if "registers" in case else [32])
    theirs = reopen_hf(tmp_path / "hf")
    for size in ("32x32", "48x40"):
        with torch.inference_mode():
            found = theirs.forward(golden[f"{case}.{size}.input"])
        expected = golden[f"{case}.{size}.transformers"]
        _assert_equal(found["cls"], golden[f"{case}.{size}.transformers_pooler"])
        _assert_equal(found["patches"], expected[:, -found["patches"].shape[1] :])

    convert(tmp_path / "hf", tmp_path / "back.pth", to="dino")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert _same(back, _part(golden, case, "state"))
    assert "left_out" not in card


@pytest.mark.parametrize("case", CASES)
def test_names_of_transformers_modules_are_read_too(
    tmp_path: Path, golden: dict[str, Tensor], golden23_json: Jsons, case: str
) -> None:
    ensure_torchvision()
    import transformers

    told = next(x for x in golden23_json("transformers_tiny")["cases"] if x["case"] == case)
    name = told["transformers_class"]
    config = getattr(transformers, name.replace("Model", "Config"))(**told["transformers_config"])
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    torch.save(model.state_dict(), tmp_path / "w.bin")
    assert any("q_proj" in key for key in model.state_dict())
    backbone, _ = load_backbone(tmp_path / "w.bin", num_heads=HEADS)
    images = golden[f"{case}.32x32.input"]
    with torch.inference_mode():
        expected = model(images).last_hidden_state
    _assert_equal(_tokens(backbone, images), expected)


@pytest.mark.parametrize("case", CASES)
def test_files_of_the_reference_come_back_bit_by_bit(
    tmp_path: Path, golden: dict[str, Tensor], case: str
) -> None:
    source = _saved(tmp_path / "w.pth", golden, case)
    convert(source, tmp_path / "ours.safetensors", to="dino", num_heads=HEADS)
    convert(tmp_path / "ours.safetensors", tmp_path / "back.pth", to="dino")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert _same(back, _part(golden, case, "state"))
    # What is needed to build it lies in the file.
    assert (
        read_source(tmp_path / "back.pth").card == read_source(tmp_path / "ours.safetensors").card
    )


@pytest.mark.parametrize("case", CASES)
def test_timm_gives_the_features_and_has_no_mask_token(
    tmp_path: Path, golden: dict[str, Tensor], case: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = _saved(tmp_path / "w.pth", golden, case)
    with caplog.at_level(logging.WARNING):
        card = convert(source, tmp_path / "timm", to="timm", num_heads=HEADS)
    assert "timm has no place for it" in card["left_out"]["mask_token"]
    assert "left out: mask_token (timm has no place for it" in caplog.text
    assert card["position_embedding"]["sizes"] == ("any" if "registers" in case else [32])
    model, _ = load_backbone(tmp_path / "timm")
    at = f"{case}.32x32"
    _assert_equal(_tokens(model, golden[f"{at}.input"]), golden[f"{at}.reference"])
    # As timm's users have it: without our card, and as names alone.
    state = load_file(tmp_path / "timm" / "model.safetensors")
    torch.save(state, tmp_path / "bare.pth")
    bare, _ = load_backbone(tmp_path / "bare.pth", num_heads=HEADS)
    at = f"{case}.48x40"
    _assert_equal(_tokens(bare, golden[f"{at}.input"]), golden[f"{at}.reference"])

    convert(tmp_path / "timm", tmp_path / "back.pth", to="dino")
    expected = _part(golden, case, "state")
    del expected["mask_token"]
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    if "registers" in case:  # the class token includes its position
        expected["cls_token"] = expected["cls_token"] + expected["pos_embed"][:, :1]
        positions = expected["pos_embed"]
        expected["pos_embed"] = torch.cat((torch.zeros(1, 1, 32), positions[:, 1:]), dim=1)
    assert _same(back, expected)


def test_graphs_give_the_features_at_any_size(tmp_path: Path, golden: dict[str, Tensor]) -> None:
    source = _saved(tmp_path / "w.pth", golden, "v2_registers_swiglu")
    card = convert(source, tmp_path / "w.pt", to="torchscript", num_heads=HEADS)
    assert [*card["left_out"]] == ["mask_token"]
    graph = torch.jit.load(tmp_path / "w.pt")
    for size in ("32x32", "48x40"):
        at = f"v2_registers_swiglu.{size}"
        with torch.inference_mode():
            cls, patches = graph(golden[f"{at}.input"])
        _assert_equal(cls, golden[f"{at}.reference"][:, 0])
        _assert_equal(patches, golden[f"{at}.reference"][:, 5:])


# Heads


@pytest.mark.parametrize("run", ["dinov2_A", "dinov2_B"])
def test_teacher_checkpoints_come_back_with_their_heads(
    tmp_path: Path, golden23_tensors: Tensors, golden23_json: Jsons, run: str
) -> None:
    state = golden23_tensors(f"{run}_ranks1_states")
    start = "step7.teacher."
    teacher = {key.removeprefix(start): x for key, x in state.items() if key.startswith(start)}
    torch.save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    num_heads = golden23_json(f"{run}_ranks1")["num_heads"]
    options: dict[str, Any] = {"to": "dino", "head": True}
    for name in ("ours.safetensors", "back.pth"):
        source = tmp_path / ("ours.safetensors" if name == "back.pth" else "teacher_checkpoint.pth")
        told = None if name == "back.pth" else num_heads
        convert(source, tmp_path / name, **options, num_heads=told)
    back = torch.load(tmp_path / "back.pth", weights_only=True)["teacher"]
    assert _same(back, teacher)
    ours = read_source(tmp_path / "ours.safetensors")
    assert (ours.patch_head is None) == (run == "dinov2_A")  # which shares one head
    with pytest.raises(ConversionError, match="no place for a projection head"):
        convert(tmp_path / "back.pth", tmp_path / "hf", to="hf", head=True)


def test_a_head_that_lacks_a_tensor_is_refused_by_name(
    tmp_path: Path, golden23_tensors: Tensors
) -> None:
    state = golden23_tensors("dinov2_B_ranks1_states")
    start = "step7.teacher."
    teacher = {key.removeprefix(start): x for key, x in state.items() if key.startswith(start)}
    del teacher["ibot_head.mlp.2.bias"]
    torch.save({"teacher": teacher}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"projection head has .*missing: mlp\.2\.bias"):
        convert(tmp_path / "w.pth", tmp_path / "out.pth", to="dino", head=True, num_heads=HEADS)


@pytest.mark.parametrize("case", CASES_OF_RUNS)
def test_a_run_starts_from_a_teacher_with_both_heads(tmp_path: Path, case: str) -> None:
    run = recorded_run(case, 1)
    torch.save({"teacher": run.initial}, tmp_path / "teacher_checkpoint.pth")
    source = tmp_path / "ours.safetensors"
    heads = run.facts["num_heads"]
    convert(tmp_path / "teacher_checkpoint.pth", source, to="dino", head=True, num_heads=heads)
    start = read_initial_weights(
        run.config(changes={"train": {"init_from": str(source), "init_head": True}})
    )
    assert start is not None
    assert _same(start.by_name(), {our_name(name): x for name, x in run.initial.items()})


def test_a_run_with_other_tokens_gets_the_same_features(
    tmp_path: Path, golden: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    case = "v2_registers"
    source = _saved(tmp_path / "w.pth", golden, case)
    convert(source, tmp_path / "timm", to="timm", num_heads=HEADS)  # has no mask token
    convert(source, tmp_path / "ours.safetensors", to="dino", num_heads=HEADS)
    images = golden[f"{case}.32x32.input"]
    model = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": HEADS}
    for name, registers in (
        ("vit_small_patch14_dinov2", 4),
        ("vit_small_patch14_reg4_dinov2", None),
    ):
        for file, masks in (("timm", 0.0), ("timm", 1.0), ("ours.safetensors", 0.0)):
            config = tiny_config(
                model={**model, "backbone": name, "registers": registers},
                crops={"global_size": 32, "local_size": 16, "num_local": 2},
                ibot={"loss_weight": masks},
                train={"init_from": str(tmp_path / file)},
            )
            start = read_initial_weights(config)
            assert start is not None
            assert ("mask_token" in start.backbone) == (masks > 0)
            backbone = build_networks(config, start)[0].backbone
            _assert_equal(backbone.features(images), golden[f"{case}.32x32.reference"])
    assert "the mask token of train.init_from is left out" in caplog.text
    assert "train.init_from has no mask token: it starts at zero" in caplog.text
