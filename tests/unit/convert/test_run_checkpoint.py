"""A run's checkpoint of several ranks becomes whole weights, in little more than their memory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinoscale.checkpoint.checksums import sha256, write_sums
from dinoscale.checkpoint.load import open_run
from dinoscale.config import RunConfig, parse_config, phases_of
from dinoscale.convert.conversion import convert
from dinoscale.convert.initial_weights import read_frozen_teacher, read_initial_weights
from dinoscale.convert.parity import require_merged
from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import build_head, load_backbone
from dinoscale.engine.build import build_networks
from dinoscale.errors import ConfigError, ConversionError
from dinoscale.models.rope import Rope
from dinoscale.planning.bench.tensor_memory import with_peak_bytes
from tests.distributed.tiny_run import tiny_config

RANKS = 4
PROTOTYPES = 40_009  # odd, so that fragments end inside rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run whose checkpoint lies in the files of four ranks, and its teacher's weights."""
    head = {"num_prototypes": PROTOTYPES, "hidden_dim": 22, "bottleneck_dim": 15}
    folder = tmp_path_factory.mktemp("run")
    return folder, _write_run(folder, tiny_config(head=head))


def _write_run(folder: Path, config: RunConfig) -> dict[str, Tensor]:
    """Write a checkpoint of four ranks; returns the teacher's weights."""
    teacher = dict(build_networks(config)[1].state_dict())
    for name in teacher:
        if name.endswith((".lora_b", ".bias", "mask_token")):  # begin as zeros
            teacher[name] = 0.1 * torch.randn_like(teacher[name])
    kinds = {"ema": 0.0, "master": 1.0, "exp_avg": 2.0, "exp_avg_sq": 3.0}
    step = folder / "checkpoints" / "step_00000007"
    step.mkdir(parents=True)
    for rank in range(RANKS):
        pieces: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        for name, tensor in teacher.items():
            share = -(-tensor.numel() // RANKS)
            piece = tensor.flatten()[rank * share : (rank + 1) * share]
            if len(piece):
                starts[name] = rank * share
                pieces |= {f"{kind}/{name}": piece + shift for kind, shift in kinds.items()}
        metadata = {"starts": json.dumps(starts)}
        save_file(pieces, step / f"shard_{rank:05d}.safetensors", metadata=metadata)
    save_file({"center": torch.zeros(2)}, step / "shared.safetensors")
    state: dict[str, Any] = {
        **{"format": 2, "step": 7, "plan": {}, "optimizer_steps": {}},
        "progress": {"knn_top1": 12.5, "of_a_later_version": 1},
        "config": config.model_dump(mode="json"),
        "shapes": {name: list(tensor.shape) for name, tensor in teacher.items()},
    }
    state["config"]["data"]["train"] = "http://bob:PASSW0RD@host/a.tar"  # as once was allowed
    (step / "state.json").write_text(json.dumps(state))
    write_sums(step, {file.name: sha256(file) for file in sorted(step.iterdir())})
    return teacher


MODELS: dict[str, dict[str, Any]] = {
    "plain": {"backbone": "vit_tiny_patch16_224", "patch_size": 8},
    "scaled": {"backbone": "vit_small_patch14_dinov2"},
    "registers": {"backbone": "vit_small_patch14_reg4_dinov2"},
    "rotary": {"backbone": "vit_small_patch16_dinov3", "qkv_bias": True, "mask_key_bias": True},
}


@pytest.mark.parametrize("model", MODELS)
def test_a_teacher_of_features_is_the_same_in_every_format(tmp_path: Path, model: str) -> None:
    size = MODELS[model].get("patch_size") or int(MODELS[model]["backbone"].split("patch")[1][:2])
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    crops = {"global_size": 4 * size, "local_size": 2 * size, "num_local": 0}
    sections: dict[str, Any] = {
        **{"model": {**MODELS[model], **sizes}, "crops": crops, "ibot": {"loss_weight": 1.0}},
        "eval": {"crop": 4 * size, "resize": 4 * size},
    }
    run = tmp_path / "run"
    _write_run(run, tiny_config(**sections))
    files = {"a.pth": "dino", "a.safetensors": "dino", "timm": "timm", "hf": "hf"}
    for name, to in files.items():
        convert(run, tmp_path / name, to=to)

    def identity(name: str) -> str | None:
        distill = {"teacher": str(tmp_path / name), "class_feature_weight": 1.0}
        weights = read_frozen_teacher(tiny_config(**sections | {"distill": distill}))
        assert weights is not None
        return weights.identity

    assert len({identity(name) for name in ("run", *files)}) == 1
    _write_run(tmp_path / "other", tiny_config(**sections).model_copy(update={"seed": 1}))
    assert identity("other") != identity("run")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"train": {"init_from": "/home/me/w.pth"}}, "Not recorded (the run began with w.pth)."),
        (
            {"train": {"continue_from": "runs/a/"}, "gram": {"loss_weight": 1.0, "teacher": "g"}},
            "Not recorded (the run began with a and g).",
        ),
        (
            {"distill": {"targets": "/home/me/targets/", "class_feature_weight": 1.0}},
            "Not recorded (the run began with targets).",
        ),
    ],
)
def test_a_checkpoint_of_an_earlier_version_has_no_note_on_a_licence_and_says_so(
    tmp_path: Path, changes: dict[str, Any], says: str | None
) -> None:
    _write_run(tmp_path, tiny_config(**changes))
    assert open_run(tmp_path).licence == read_source(tmp_path).card.licence == says


def test_either_network_is_merged_bit_for_bit(run: tuple[Path, dict[str, Tensor]]) -> None:
    folder, teacher = run
    for path in (folder, folder / "checkpoints" / "step_00000007"):
        for network, shift in (("teacher", 0.0), ("student", 1.0)):
            signs: list[None] = []
            weights = read_source(
                path,
                network=network,  # type: ignore[arg-type]  # both are
                heartbeat=lambda signs=signs: signs.append(None),  # type: ignore[misc]
            )
            assert len(signs) > RANKS + 2  # files are compared, and then read
            assert weights.kind == "run"
            assert weights.head is not None
            found = {f"backbone.{name}": tensor for name, tensor in weights.backbone.items()}
            found |= {f"head.{name}": tensor for name, tensor in weights.head.items()}
            assert found.keys() == teacher.keys()
            assert all(torch.equal(found[name], teacher[name] + shift) for name in found)
    assert weights.card.source.endswith("step_00000007 student")
    assert (weights.run or {})["knn_top1"] == 12.5


def test_a_run_is_loaded_like_any_weights(run: tuple[Path, dict[str, Tensor]]) -> None:
    folder, teacher = run
    backbone, card = load_backbone(folder)
    assert (card.crop, card.backbone.num_heads) == (16, 2)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, teacher[f"backbone.{name}"])


def test_a_run_of_dinov2_is_written_as_its_authors_write_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = {"num_prototypes": 33, "hidden_dim": 22, "bottleneck_dim": 15}
    model = {**tiny_config().model.model_dump(), "layer_scale": 1e-5, "registers": 2}
    config = tiny_config(
        model={**model, "ffn": "swiglu"},
        head={**head, "norm_last_layer": False},
        patch_head={**head, "num_prototypes": 35, "norm_last_layer": False},
        crops={"global_size": 32, "local_size": 16, "num_local": 2},
        ibot={"loss_weight": 1.0},
        koleo={"loss_weight": 0.1},
    )
    teacher = _write_run(tmp_path / "run", config)
    card = convert(tmp_path / "run", tmp_path / "w.pth", to="dino", head=True)
    assert card["recipe"]["patch_head"]["num_prototypes"] == 35
    assert card["recipe"]["koleo"]["loss_weight"] == 0.1
    found = torch.load(tmp_path / "w.pth", weights_only=True)["teacher"]
    renames = {
        "patch_head.": "ibot_head.",
        "reg_token": "register_tokens",
        ".mlp.fc1.": ".mlp.w12.",
        ".mlp.fc2.": ".mlp.w3.",
    }
    expected = {}
    for name, tensor in teacher.items():
        theirs = "dino_" + name if name.startswith("head.") else name
        for ours, other in renames.items():
            theirs = theirs.replace(ours, other)
        expected[theirs] = tensor
    assert {"backbone.mask_token", "backbone.blocks.1.ls2.gamma"} < expected.keys()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    back = read_source(tmp_path / "w.pth")
    assert back.card == read_source(tmp_path / "run").card
    with pytest.raises(ConversionError, match=r"4 registers or none, .* 2 regist"):
        convert(tmp_path / "run", tmp_path / "timm", to="timm")


def test_a_run_of_dinov3_is_written_as_its_authors_write_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = {"num_prototypes": 33, "hidden_dim": 22, "bottleneck_dim": 15, "weight_norm": False}
    layers = {"layer_scale": 1e-5, "registers": 2, "num_heads": 1, "rope": {"base": 50.0}}
    layers |= {"ffn": "swiglu", "ffn_ratio": 3.0, "ffn_multiple": 4, "norm_eps": 1e-5}
    layers |= {"mask_key_bias": True, "local_norm": True}
    config = tiny_config(
        model={**tiny_config().model.model_dump(), **layers},
        head=head,
        patch_head={**head, "num_prototypes": 35},
        crops={"global_size": 32, "local_size": 16, "num_local": 2},
        ibot={"loss_weight": 1.0},
    )
    teacher = _write_run(tmp_path / "run", config)
    backbone, card = load_backbone(tmp_path / "run")
    shape = card.backbone
    assert (shape.rope, shape.ffn_multiple, shape.norm_eps) == (Rope(50.0), 4, 1e-5)
    images = torch.rand(2, 3, 24, 40)
    convert(tmp_path / "run", tmp_path / "w.pth", to="dino", head=True)
    found = torch.load(tmp_path / "w.pth", weights_only=True)["teacher"]
    names = {name.removeprefix("backbone.") for name in found}
    assert {"rope_embed.periods", "blocks.0.attn.qkv.bias_mask", "local_cls_norm.bias"} < names
    assert {"blocks.1.mlp.w2.weight", "storage_tokens", "dino_head.last_layer.weight"} < names
    weight = teacher["patch_head.last_layer.weight"]
    assert torch.equal(found["ibot_head.last_layer.weight"], weight)
    convert(tmp_path / "run", tmp_path / "w.safetensors", to="dino", head=True)
    for file in ("w.pth", "w.safetensors"):
        back = read_source(tmp_path / file)
        assert back.card == read_source(tmp_path / "run").card
        again, _ = load_backbone(tmp_path / file)
        assert torch.equal(again([images]), backbone([images]))
        assert back.patch_head is not None
        assert torch.equal(back.patch_head["last_layer.weight"], weight)
        build_head(back.patch_head)


def test_merged_adapters_give_the_features_that_were_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config(lora={"rank": 2, "alpha": 6.0}, train={"init_from": "w.pth"})
    _write_run(tmp_path / "run", config)
    card = convert(tmp_path / "run", tmp_path / "w.safetensors", to="dino")
    assert card["merged_adapters"]["max_difference"] <= 1e-6
    assert json.loads((tmp_path / "w.safetensors.json").read_text())["merged_adapters"]
    weights = read_source(tmp_path / "run")
    adapted = weights.adapted
    assert adapted is not None
    base = {name: tensor for name, tensor in adapted.state.items() if "lora_" not in name}
    for wrong in (
        replace(weights, backbone=base),
        replace(weights, adapted=replace(adapted, alpha=6.1)),
    ):
        with pytest.raises(ConversionError, match=r"with its adapters merged, features differ by"):
            require_merged(wrong)
    assert require_merged(replace(weights, adapted=None)) is None


@pytest.mark.parametrize("with_heads", [False, True])
def test_maps_to_features_are_taken_with_the_heads_and_else_named(
    tmp_path: Path, with_heads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    torch.manual_seed(0)
    phases = [{"name": "first"}, {"name": "later", "start": "teacher"}]
    values = _following(with_heads=with_heads).model_dump(mode="json", exclude_unset=True)
    whole = parse_config({**values, "run_dir": str(tmp_path), "phases": phases})
    first, later = phases_of(whole)
    teacher = _write_run(Path(first.run_dir), first)
    weights = read_initial_weights(later)
    assert weights is not None
    found = weights.by_name()
    assert {"class_map.bias", "patch_map.weight"} < found.keys() == teacher.keys()
    for network in build_networks(later, weights):
        state = network.state_dict()
        assert all(torch.equal(state[name], teacher[name]) for name in teacher)
    assert "maps to features" not in caplog.text
    anew = read_initial_weights(_following(with_heads=with_heads, init_from=first.run_dir))
    assert anew is not None
    assert not anew.maps
    assert "start as random ones: class_map.bias, class_map.weight, patch_map.b" in caplog.text
    assert "train.init_head=true takes those it has" in caplog.text
    wider = _following(with_heads=with_heads, width=26, init_from=first.run_dir, init_head=True)
    with pytest.raises(
        ConfigError, match=r"^train.init_head: the maps .*class_map.weight \[24, 20"
    ):
        read_initial_weights(wider)


def _following(*, with_heads: bool, width: int = 24, **train: Any) -> RunConfig:
    """A run that follows features of both kinds, alone or beside its own heads."""
    distill = {"teacher": "w.pth", "class_feature_weight": 1.0, "patch_feature_weight": 1.0}
    model = tiny_config().model.model_dump() | {"embed_dim": width}
    own = {} if with_heads else {"dino": {"loss_weight": 0.0}, "crops": {"num_local": 0}}
    return tiny_config(distill={**distill, "model": model}, train=train, **own)


def test_a_published_card_has_the_recipe_and_no_paths(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, _ = run
    convert(folder, tmp_path / "w.safetensors", to="dino")
    text = (tmp_path / "w.safetensors.json").read_text()
    recipe = json.loads(text)["recipe"]
    sections = {"seed", "model", "head", "crops", "augment", "dino", "ibot", "koleo", "gram"}
    sections |= {"anchor", "distill", "lora", "optim", "schedules", "data", "train", "engine"}
    assert recipe.keys() == sections  # it has no patch_head
    assert recipe["train"].keys() == {"epochs", "batch_size", "micro_batch_size"}
    assert recipe["optim"] == tiny_config().optim.model_dump(mode="json")
    assert b"PASSW0RD" not in (tmp_path / "w.safetensors").read_bytes() + text.encode()
    assert str(folder.parent) not in text + str(read_source(tmp_path / "w.safetensors").card)


def test_merging_needs_the_result_and_at_most_one_shard(
    run: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, teacher = run
    result = sum(tensor.numel() * 4 for tensor in teacher.values())
    largest = max(file.stat().st_size for file in folder.rglob("shard_*"))
    assert largest < 1.2 * result  # four kinds of a quarter each
    _, mapped = with_peak_bytes(lambda: open_run(folder))  # the allocator counts mapped files
    _, peak = with_peak_bytes(lambda: read_source(folder))
    assert result <= peak - mapped <= result + largest
