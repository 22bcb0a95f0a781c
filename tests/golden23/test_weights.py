"""DINOv2 and DINOv3 in the layouts of their authors, timm and transformers, as these have it.

`checkpoint_keys.json` lists names and shapes of real files; `transformers_tiny` has small networks
with the outputs of the reference and of transformers.
"""

import argparse
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dinoscale.config import ModelConfig, load_config
from dinoscale.convert.conversion import convert
from dinoscale.convert.coverage import coverage_of
from dinoscale.convert.formats.to_hf import reopen_hf
from dinoscale.convert.formats.to_timm import reopen_timm
from dinoscale.convert.initial_weights import read_initial_weights
from dinoscale.convert.load_backbone import Backbone, load_backbone
from dinoscale.convert.parity import MAX_DIFFERENCE
from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import build_head, expected_tensors
from dinoscale.engine.build import build_networks, shapes_only
from dinoscale.errors import CheckpointError, ConversionError
from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.block import KeylessBias
from dinoscale.models.rope import Rope
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone
from tests.distributed.tiny_run import tiny_config
from tests.golden23.recorded import RecordedRun, recorded_run
from tests.golden23.reference_names import our_name

Tensors = Callable[[str], dict[str, Tensor]]
Jsons = Callable[[str], dict[str, Any]]

CASES = ("v2_mlp", "v2_swiglu", "v2_registers", "v2_registers_swiglu")
DINOV3 = ("v3_mlp", "v3_swiglu")
RUNS = ("A", "B")

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
    read = []
    for name, content in _files(golden23_json("checkpoint_keys")):
        if "dinov2" not in name:
            continue
        torch.save(content, tmp_path / "w")
        state = content.get("teacher", content)
        width = next(x.shape[-1] for key, x in state.items() if key.endswith("cls_token"))
        told = None if width % 64 == 0 else 1
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
        read.append(name)
    assert read


def test_every_dinov3_file_is_read_whole(tmp_path: Path, golden23_json: Jsons) -> None:
    read = []
    for name, content in _files(golden23_json("checkpoint_keys")):
        if "dinov3" not in name:
            continue
        torch.save(_with_buffers(content), tmp_path / "w")
        weights = read_source(tmp_path / "w")
        coverage = coverage_of(weights.backbone, expected_tensors(weights))
        assert coverage.complete, f"{name}: {coverage}"
        assert weights.left_out == ()
        assert weights.card.backbone.mask_token
        read.append(name)
    assert len(read) == 11


def _with_buffers(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of DINOv3 with the numbers of its buffers, which show something."""
    state = content.get("teacher", content)
    for key, value in state.items():
        if key.endswith("bias_mask"):
            of_queries, of_keys, of_values = torch.ones(value.shape).chunk(3)
            state[key] = torch.cat((of_queries, 0 * of_keys, of_values))
        if key.endswith("rope_embed.periods"):
            dtype, head_dim = torch.float32, 4 * len(value)
            state[key] = Rope(100.0).periods(head_dim, dtype=dtype, device=value.device)
    return content


# Small networks


@dataclass(frozen=True)
class Case:
    """A small network in all layouts.

    Attributes:
        name: of the case.
        told: its entry in transformers_tiny.json.
        tensors: its tensors, without the name.
        sizes: of the images, as the names of tensors have them.
    """

    name: str
    told: dict[str, Any]
    tensors: dict[str, Tensor]
    sizes: list[str]

    @property
    def num_heads(self) -> int:
        """Of attention, which no file tells."""
        return int(self.told["reference"]["num_heads"])

    @property
    def native(self) -> str:
        """The size of image that positions are stored for."""
        side = self.told["reference"]["img_size"]
        return f"{side}x{side}"

    @property
    def has_registers(self) -> bool:
        return bool(self.told["reference"]["num_register_tokens"])

    def part(self, part: str) -> dict[str, Tensor]:
        """The weights: `state` as the reference names them, `file` as transformers writes them."""
        return _below(f"{part}.", self.tensors)

    def saved(self, folder: Path) -> Path:
        """A file of the reference."""
        torch.save(self.part("state"), folder / "reference.pth")
        return folder / "reference.pth"


def _below(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, golden23_tensors: Tensors, golden23_json: Jsons) -> Case:
    facts = golden23_json("transformers_tiny")
    told = next(each for each in facts["cases"] if each["case"] == request.param)
    tensors = _below(f"{request.param}.", golden23_tensors("transformers_tiny"))
    return Case(request.param, told, tensors, [f"{h}x{w}" for h, w in facts["sizes"]])


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


def _assert_features(backbone: Backbone, case: Case, sizes: list[str]) -> None:
    for size in sizes:
        images, expected = case.tensors[f"{size}.input"], case.tensors[f"{size}.reference"]
        _assert_equal(_tokens(backbone, images), expected)


@pytest.mark.parametrize("case", CASES + DINOV3, indirect=True)
def test_files_of_the_reference_give_its_features(tmp_path: Path, case: Case) -> None:
    backbone, _ = load_backbone(case.saved(tmp_path), num_heads=case.num_heads)
    _assert_features(backbone, case, case.sizes)
    for size in case.sizes:
        images, expected = case.tensors[f"{size}.input"], case.tensors[f"{size}.reference"]
        _assert_equal(backbone(images), expected[:, 0])
        before, last = backbone.intermediate(images, 2)
        _assert_equal(last.patches, expected[:, -last.patches.shape[1] :])
        assert before.patches.shape == last.patches.shape
        assert not torch.allclose(before.cls, last.cls)


def test_transformers_files_are_those_of_save_pretrained_and_come_back(
    tmp_path: Path, case: Case
) -> None:
    card = convert(case.saved(tmp_path), tmp_path / "hf", to="hf", num_heads=case.num_heads)
    assert _same(load_file(tmp_path / "hf" / "model.safetensors"), case.part("file"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == [case.told["transformers_class"]]
    wanted = case.told["transformers_config"]
    assert {key: config[key] for key in wanted} == wanted
    # Without registers, transformers resizes positions by another rule than the reference.
    exact = "any" if case.has_registers else [case.told["reference"]["img_size"]]
    assert card["position_embedding"]["sizes"] == exact
    theirs = reopen_hf(tmp_path / "hf")
    for size in case.sizes:
        with torch.inference_mode():
            found = theirs.forward(case.tensors[f"{size}.input"])
        expected = case.tensors[f"{size}.transformers"]
        _assert_equal(found["cls"], case.tensors[f"{size}.transformers_pooler"])
        _assert_equal(found["patches"], expected[:, -found["patches"].shape[1] :])

    convert(tmp_path / "hf", tmp_path / "back.pth", to="dino")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert _same(back, case.part("state"))
    assert "left_out" not in card


@pytest.mark.parametrize("case", DINOV3, indirect=True)
def test_dinov3_in_transformers_and_timm_comes_back_without_the_masked_bias(
    tmp_path: Path, case: Case
) -> None:
    source = case.saved(tmp_path)
    cards = {to: convert(source, tmp_path / to, to=to) for to in ("hf", "timm")}
    assert _same(load_file(tmp_path / "hf" / "model.safetensors"), case.part("file"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    wanted = {**case.told["transformers_config"], "image_size": 256}  # which no file tells
    assert {key: config[key] for key in wanted} == wanted
    theirs = {"hf": reopen_hf(tmp_path / "hf"), "timm": reopen_timm(tmp_path / "timm")}
    for to, card in cards.items():
        assert card["position_embedding"]["sizes"] == "any"
        assert len({tuple(proof["size"]) for proof in card["parity"]["proofs"]}) == 3
        for size in case.sizes:
            with torch.inference_mode():
                found = theirs[to].forward(case.tensors[f"{size}.input"])
            for kind in ("reference", "transformers"):
                expected = case.tensors[f"{size}.{kind}"]
                _assert_equal(found["cls"], expected[:, 0])
                _assert_equal(found["patches"], expected[:, -found["patches"].shape[1] :])
        _assert_features(load_backbone(tmp_path / to)[0], case, case.sizes)

        convert(tmp_path / to, tmp_path / "back.pth", to="dino", overwrite=True)
        back, expected = torch.load(tmp_path / "back.pth", weights_only=True), case.part("state")
        biases = [name for name in expected if name.endswith("qkv.bias")]
        for name in biases:
            expected[name] = expected[name] * expected[f"{name}_mask"]
        in_training = ["mask_token"] if to == "timm" else []
        for name in in_training:
            del expected[name]
        assert _same(back, expected)
        assert [*card["left_out"]] == [*in_training, *biases]


@pytest.mark.parametrize("case", DINOV3, indirect=True)
def test_bare_tensors_of_dinov3_in_timm_are_recognised(tmp_path: Path, case: Case) -> None:
    convert(case.saved(tmp_path), tmp_path / "timm", to="timm")
    state = load_file(tmp_path / "timm" / "model.safetensors")
    torch.save({**state, "head.weight": torch.zeros(2, 2)}, tmp_path / "bare.pth")
    weights = read_source(tmp_path / "bare.pth", num_heads=case.num_heads)
    assert (weights.kind, weights.left_out) == ("timm", ("head.weight",))
    backbone, _ = load_backbone(tmp_path / "bare.pth", num_heads=case.num_heads)
    _assert_features(backbone, case, case.sizes)


@pytest.mark.parametrize("case", CASES + DINOV3, indirect=True)
def test_names_of_transformers_modules_are_read_too(tmp_path: Path, case: Case) -> None:
    ensure_torchvision()
    import transformers

    name = case.told["transformers_class"]
    config = getattr(transformers, name.replace("Model", "Config"))
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(**case.told["transformers_config"])).eval()
    torch.save(model.state_dict(), tmp_path / "w.bin")
    assert any("q_proj" in key for key in model.state_dict())
    backbone, _ = load_backbone(tmp_path / "w.bin", num_heads=case.num_heads)
    images = case.tensors[f"{case.native}.input"]
    with torch.inference_mode():
        expected = model(images).last_hidden_state
    _assert_equal(_tokens(backbone, images), expected)


def test_files_of_the_reference_come_back_bit_by_bit(tmp_path: Path, case: Case) -> None:
    ours = tmp_path / "ours.safetensors"
    convert(case.saved(tmp_path), ours, to="dino", num_heads=case.num_heads)
    convert(ours, tmp_path / "back.pth", to="dino")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert _same(back, case.part("state"))
    # What is needed to build it lies in the file.
    assert read_source(tmp_path / "back.pth").card == read_source(ours).card


def test_timm_gives_the_features_and_has_no_mask_token(
    tmp_path: Path, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        card = convert(case.saved(tmp_path), tmp_path / "timm", to="timm", num_heads=case.num_heads)
    assert "timm has no place for it" in card["left_out"]["mask_token"]
    assert "left out: mask_token (timm has no place for it" in caplog.text
    exact = "any" if case.has_registers else [case.told["reference"]["img_size"]]
    assert card["position_embedding"]["sizes"] == exact
    backbone, _ = load_backbone(tmp_path / "timm")
    _assert_features(backbone, case, case.sizes)
    # Without our card, by the names of the tensors alone.
    torch.save(load_file(tmp_path / "timm" / "model.safetensors"), tmp_path / "bare.pth")
    bare, _ = load_backbone(tmp_path / "bare.pth", num_heads=case.num_heads)
    _assert_features(bare, case, case.sizes)

    convert(tmp_path / "timm", tmp_path / "back.pth", to="dino")
    expected = case.part("state")
    del expected["mask_token"]
    if case.has_registers:  # the class token includes its position
        positions = expected["pos_embed"]
        expected["cls_token"] = expected["cls_token"] + positions[:, :1]
        zero = torch.zeros_like(positions[:, :1])
        expected["pos_embed"] = torch.cat((zero, positions[:, 1:]), dim=1)
    assert _same(torch.load(tmp_path / "back.pth", weights_only=True), expected)


@pytest.mark.parametrize("case", ["v2_mlp", "v2_registers_swiglu", "v3_swiglu"], indirect=True)
def test_graphs_give_the_features_at_any_size(tmp_path: Path, case: Case) -> None:
    source, path = case.saved(tmp_path), tmp_path / "w.pt"
    card = convert(source, path, to="torchscript", num_heads=case.num_heads)
    assert [*card["left_out"]] == ["mask_token"]
    graph = torch.jit.load(path)
    for size in case.sizes:
        with torch.inference_mode():
            cls, patches = graph(case.tensors[f"{size}.input"])
        expected = case.tensors[f"{size}.reference"]
        _assert_equal(cls, expected[:, 0])
        _assert_equal(patches, expected[:, -patches.shape[1] :])


# Heads, and what a run starts from


def _teacher(folder: Path, run: RecordedRun) -> Path:
    """A `teacher_checkpoint.pth` with the weights that a recorded run starts from."""
    torch.save({"teacher": run.initial}, folder / "teacher_checkpoint.pth")
    return folder / "teacher_checkpoint.pth"


@pytest.mark.parametrize("letter", RUNS)
def test_teacher_checkpoints_come_back_with_their_heads(tmp_path: Path, letter: str) -> None:
    run = recorded_run(letter, 1)
    ours, heads = tmp_path / "ours.safetensors", run.facts["num_heads"]
    convert(_teacher(tmp_path, run), ours, to="dino", head=True, num_heads=heads)
    convert(ours, tmp_path / "back.pth", to="dino", head=True)
    assert _same(torch.load(tmp_path / "back.pth", weights_only=True)["teacher"], run.initial)
    separate = any(name.startswith("ibot_head.") for name in run.initial)
    assert (read_source(ours).patch_head is not None) == separate
    with pytest.raises(ConversionError, match="no place for a projection head"):
        convert(ours, tmp_path / "hf", to="hf", head=True)


def test_a_head_that_lacks_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    run = recorded_run("B", 1)
    teacher = dict(run.initial)
    del teacher["ibot_head.mlp.2.bias"]
    torch.save({"teacher": teacher}, tmp_path / "w.pth")
    heads = run.facts["num_heads"]
    with pytest.raises(CheckpointError, match=r"projection head has .*missing: mlp\.2\.bias"):
        convert(tmp_path / "w.pth", tmp_path / "out.pth", to="dino", head=True, num_heads=heads)


@pytest.mark.parametrize("letter", RUNS)
def test_a_run_starts_from_a_teacher_with_its_heads(tmp_path: Path, letter: str) -> None:
    run = recorded_run(letter, 1)
    source, heads = tmp_path / "ours.safetensors", run.facts["num_heads"]
    convert(_teacher(tmp_path, run), source, to="dino", head=True, num_heads=heads)
    start = read_initial_weights(
        run.config(changes={"train": {"init_from": str(source), "init_head": True}})
    )
    assert start is not None
    assert _same(start.by_name(), {our_name(name): x for name, x in run.initial.items()})


@pytest.mark.parametrize("case", ["v2_registers"], indirect=True)
def test_a_run_with_other_tokens_gets_the_same_features(
    tmp_path: Path, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source, reference = case.saved(tmp_path), case.told["reference"]
    convert(source, tmp_path / "timm", to="timm", num_heads=case.num_heads)  # has no mask token
    convert(source, tmp_path / "ours.safetensors", to="dino", num_heads=case.num_heads)
    sizes = {key: reference[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    side = reference["img_size"]
    slots = {
        "vit_small_patch14_dinov2": reference["num_register_tokens"],
        "vit_small_patch14_reg4_dinov2": None,
    }
    for name, registers in slots.items():  # with a position of the class token, and without
        for file, masks in (("timm", 0.0), ("timm", 1.0), ("ours.safetensors", 0.0)):
            config = tiny_config(
                model={**sizes, "backbone": name, "registers": registers},
                crops={"global_size": side, "local_size": side, "num_local": 2},
                ibot={"loss_weight": masks},
                train={"init_from": str(tmp_path / file)},
            )
            start = read_initial_weights(config)
            assert start is not None
            assert ("mask_token" in start.backbone) == (masks > 0)
            backbone = build_networks(config, start)[0].backbone
            assert isinstance(backbone, VisionTransformer)
            images = case.tensors[f"{case.native}.input"]
            _assert_equal(backbone.features(images), case.tensors[f"{case.native}.reference"])
    assert "the mask token of train.init_from is left out" in caplog.text
    assert "train.init_from has no mask token: it starts at zero" in caplog.text


def _model_of(path: Path) -> dict[str, Any]:
    """The section `model` of a run with the architecture of a file."""
    shape = vars(read_source(path).card.backbone)
    wanted = {key: shape[key] for key in ModelConfig.model_fields if shape.get(key) is not None}
    rope = wanted.pop("rope", None)
    return {"backbone": shape["name"], **wanted, **({"rope": asdict(rope)} if rope else {})}


def _layouts(case: Case, folder: Path) -> dict[str, Path]:
    """The weights of a case as its authors, transformers, timm and we write them."""
    theirs = folder / "transformers"
    theirs.mkdir()
    save_file(case.part("file"), theirs / "model.safetensors")
    kind = {"Dinov2Model": "dinov2", "Dinov2WithRegistersModel": "dinov2_with_registers"}
    name = kind.get(case.told["transformers_class"], "dinov3_vit")
    config = {"model_type": name, **case.told["transformers_config"]}
    (theirs / "config.json").write_text(json.dumps(config))
    full = {"teacher": case.part("state"), "args": argparse.Namespace(num_heads=case.num_heads)}
    torch.save(full, folder / "authors.pth")
    written = {"authors": folder / "authors.pth", "transformers": theirs}
    for to, place in (("timm", "timm"), ("dino", "ours.safetensors")):
        convert(written["authors"], folder / place, to=to)
        written[to] = folder / place
    return written


@pytest.mark.parametrize("case", CASES + DINOV3, indirect=True)
def test_a_run_computes_at_step_0_what_the_reference_does_in_every_layout(
    tmp_path: Path, case: Case
) -> None:
    side = case.told["reference"]["img_size"]
    for layout, path in _layouts(case, tmp_path).items():
        config = tiny_config(
            model=_model_of(path),
            crops={"global_size": side, "local_size": side, "num_local": 2},
            ibot={"loss_weight": 1.0},
            train={"init_from": str(path)},
        )
        start = read_initial_weights(config)
        assert start is not None
        assert start.step_zero is not None
        assert start.step_zero.difference <= start.step_zero.bound / 8, layout
        for network in build_networks(config, start):
            assert isinstance(network.backbone, VisionTransformer)
            found = network.backbone.features(case.tensors[f"{case.native}.input"])
            _assert_equal(found, case.tensors[f"{case.native}.reference"])


PRESETS = {
    "adapt_dinov2_vits14": "dinov2_vits14_pretrain.pth",
    "adapt_dinov2_vitb14": "dinov2_vitb14_pretrain.pth",
    "adapt_dinov3_vitb16": "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
    "adapt_dinov3_vitl16": "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_that_go_on_have_the_architecture_of_the_released_file(
    preset: str, tmp_path: Path, golden23_json: Jsons
) -> None:
    listed = dict(_files(golden23_json("checkpoint_keys")))[PRESETS[preset]]
    torch.save(_with_buffers(listed), tmp_path / "w")
    with torch.device("meta"):
        theirs = build_backbone(**vars(read_source(tmp_path / "w").card.backbone))
    ours = shapes_only(load_config(preset)).backbone
    assert isinstance(ours, VisionTransformer)
    assert isinstance(theirs, VisionTransformer)
    of_grid = ("pos_embed",)  # is resized
    shapes = [
        {name: x.shape for name, x in each.state_dict().items() if name not in of_grid}
        for each in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    for setting in (_norm_eps, _key_bias_is_masked, lambda network: network.rope):
        assert setting(ours) == setting(theirs)


def _norm_eps(network: nn.Module) -> set[float]:
    return {module.eps for module in network.modules() if isinstance(module, nn.LayerNorm)}


def _key_bias_is_masked(network: nn.Module) -> bool:
    return any(isinstance(module, KeylessBias) for module in network.modules())
