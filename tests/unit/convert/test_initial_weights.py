"""`train.init_from`: weights of a file fitted to a run, or refused in a sentence."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config import RunConfig, parse_config
from dinoscale.convert.initial_weights import (
    adapted_channels,
    initial_weights_caution,
    read_gram_weights,
    read_initial_weights,
)
from dinoscale.convert.run_checkpoint import card_of
from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import save_backbone
from dinoscale.engine.build import InitialWeights, build_networks
from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.models.network import DinoNetwork
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.weight_names import to_reference
from tests.distributed.tiny_run import tiny_config

HEAD: dict[str, Any] = {"num_prototypes": 33, "hidden_dim": 22, "bottleneck_dim": 15}


def _config(path: Path, *, head: bool = False, **changes: dict[str, Any]) -> RunConfig:
    changes["train"] = {"init_from": str(path), "init_head": head, **changes.get("train", {})}
    return tiny_config(**changes)


def _reference(folder: Path, **changes: dict[str, Any]) -> tuple[Path, DinoNetwork]:
    """A full checkpoint as the reference writes it, and the teacher in it."""
    torch.manual_seed(7)
    _, teacher = build_networks(tiny_config(**changes))
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(torch.randn(weight.shape), alpha=0.1)
    state = to_reference(teacher.state_dict())
    student = {f"module.{name}": tensor + 1 for name, tensor in state.items()}
    args = argparse.Namespace(num_heads=2)
    torch.save({"student": student, "teacher": state, "args": args}, folder / "full.pth")
    return folder / "full.pth", teacher


def _start(config: RunConfig) -> InitialWeights:
    start = read_initial_weights(config)
    assert start is not None
    return start


def _equal(found: Any, expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def test_without_a_file_a_run_starts_from_random_weights() -> None:
    assert read_initial_weights(tiny_config()) is None


def test_student_and_teacher_start_from_the_teacher_of_the_file(tmp_path: Path) -> None:
    path, teacher = _reference(tmp_path)
    config = _config(path)
    fresh, _ = build_networks(config)
    for network in build_networks(config, _start(config)):
        assert _equal(network.backbone.state_dict(), teacher.backbone.state_dict())
        weight = network.head.state_dict()["last_layer.weight_v"]
        assert not torch.equal(weight, teacher.head.state_dict()["last_layer.weight_v"])
    assert not _equal(fresh.backbone.state_dict(), teacher.backbone.state_dict())


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_the_head_is_taken_if_init_head_is_set(
    tmp_path: Path, batch_norm: bool, norm_last_layer: bool
) -> None:
    of_head = {**HEAD, "batch_norm": batch_norm, "norm_last_layer": norm_last_layer}
    path, teacher = _reference(tmp_path, head=of_head)
    config = tiny_config(head=of_head, train={"init_from": str(path), "init_head": True})
    for network in build_networks(config, _start(config)):
        assert _equal(network.state_dict(), teacher.state_dict())


@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_prototype_norms_are_kept_unless_all_are_one(tmp_path: Path, norm_last_layer: bool) -> None:
    path, _ = _reference(tmp_path, head={**HEAD, "norm_last_layer": norm_last_layer})
    head = read_source(path).head
    assert head is not None
    assert ("last_layer.weight_g" in head) != norm_last_layer


def test_a_head_with_trained_norms_starts_from_norms_of_one(tmp_path: Path) -> None:
    path, _ = _reference(tmp_path)
    head = {**HEAD, "norm_last_layer": False}
    config = tiny_config(head=head, train={"init_from": str(path), "init_head": True})
    _, teacher = build_networks(config, _start(config))
    assert torch.equal(teacher.head.state_dict()["last_layer.weight_g"], torch.ones(33, 1))


@pytest.mark.parametrize("newer", [False, True])
def test_trained_norms_are_refused_by_a_head_without_them(tmp_path: Path, newer: bool) -> None:
    path, _ = _reference(tmp_path, head={**HEAD, "norm_last_layer": False})
    if newer:
        found = torch.load(path, weights_only=False)
        names = {"weight_g": "parametrizations.weight.original0"}
        names |= {"weight_v": "parametrizations.weight.original1"}
        found["teacher"] = {
            ".".join(names.get(part, part) for part in name.split(".")): tensor
            for name, tensor in found["teacher"].items()
        }
        torch.save(found, path)
    config = tiny_config(train={"init_from": str(path), "init_head": True})
    with pytest.raises(CheckpointError, match=r"set head\.norm_last_layer=false"):
        read_initial_weights(config)


def test_missing_and_mismatched_heads_are_refused(tmp_path: Path) -> None:
    path, _ = _reference(tmp_path)
    head = {**HEAD, "num_prototypes": 34}
    config = tiny_config(head=head, train={"init_from": str(path), "init_head": True})
    with pytest.raises(ConfigError, match=r"weight_v \[33, 15\] for \[34, 15\].*init_head=false"):
        read_initial_weights(config)
    wider = {"model": {"embed_dim": 64, "num_heads": 1}}
    _, network = build_networks(tiny_config(**wider))
    torch.save(network.backbone.state_dict(), tmp_path / "bare.pth")
    config = _config(tmp_path / "bare.pth", head=True, **wider)
    with pytest.raises(ConfigError, match="has no projection head"):
        read_initial_weights(config)


def test_at_another_size_features_are_those_of_the_file_at_that_size(tmp_path: Path) -> None:
    path, teacher = _reference(tmp_path)
    config = _config(path, crops={"global_size": 32, "local_size": 8, "num_local": 2})
    _, started = build_networks(config, _start(config))
    images = torch.rand(2, 3, 32, 32)
    assert isinstance(started.backbone, VisionTransformer)
    assert started.backbone.pos_embed.shape == (1, 17, 20)
    torch.testing.assert_close(started.backbone([images]), teacher.backbone([images]))
    assert not torch.allclose(teacher.backbone([images]), teacher.backbone([images[..., :16, :16]]))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_gray_image_has_the_same_features_in_any_number_of_channels(
    tmp_path: Path, channels: int
) -> None:
    path, teacher = _reference(tmp_path)
    data = {"channels": channels, "mean": [0.5] * channels, "std": [0.5] * channels}
    config = _config(path, data={"num_workers": 0, **data})
    _, started = build_networks(config, _start(config))
    gray = torch.rand(2, 1, 16, 16)
    ours = started.backbone([gray.expand(-1, channels, -1, -1)])
    torch.testing.assert_close(ours, teacher.backbone([gray.expand(-1, 3, -1, -1)]))


def test_the_first_layer_with_equal_channels_is_unchanged() -> None:
    weight = torch.rand(4, 3, 2, 2)
    assert adapted_channels(weight, 3) is weight


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ({"depth": 3}, "depth 2, .*depth 3"),
        ({"num_heads": 4}, "num_heads 2, .*num_heads 4"),
        ({"embed_dim": 24}, "embed_dim 20, .*embed_dim 24"),
        ({"patch_size": 4}, "patch_size 8, .*patch_size 4"),
        ({"backbone": "vit_small_patch14_reg4_dinov2"}, "registers 0.*registers 4.*missing: reg_t"),
    ],
)
def test_another_architecture_is_refused_and_both_are_named(
    tmp_path: Path, model: dict[str, Any], found: str
) -> None:
    path, _ = _reference(tmp_path)
    base = tiny_config().model.model_dump()
    with pytest.raises(ConfigError, match=found):
        read_initial_weights(_config(path, model={**base, **model}))


def test_a_resnet_is_refused_by_a_vit(tmp_path: Path) -> None:
    path, _ = _reference(tmp_path)
    model = dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads"))
    with pytest.raises(ConfigError, match=r"holds a ViT .* is a resnet50"):
        read_initial_weights(_config(path, model={"backbone": "resnet50", **model}))


def test_a_different_normalisation_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = _reference(tmp_path)
    read_initial_weights(_config(path))
    assert "expect pixels" not in caplog.text
    read_initial_weights(
        _config(path, data={"num_workers": 0, "mean": [0.5] * 3, "std": [0.5] * 3})
    )
    assert "expect pixels of mean [0.485, 0.456, 0.406]" in caplog.text


@pytest.mark.parametrize(
    ("there", "here", "warns"),
    [
        ([0.5, 0.5, 0.5], [0.4], True),
        ([0.4, 0.4, 0.4], [0.4, 0.4], False),
        ([0.4, 0.5, 0.4], [0.4, 0.5], True),
    ],
)
def test_a_different_normalisation_of_other_channels_gives_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    there: list[float],
    here: list[float],
    warns: bool,
) -> None:
    data = {"num_workers": 0, "channels": len(here), "mean": here, "std": [0.2] * len(here)}
    of_source = {"num_workers": 0, "mean": there, "std": [0.2] * 3}
    network, _ = build_networks(tiny_config())
    card = card_of(tiny_config(data=of_source), source="a run")
    save_backbone(tmp_path / "w.safetensors", network.backbone.state_dict(), card)
    read_initial_weights(_config(tmp_path / "w.safetensors", data=data))
    assert ("expect pixels" in caplog.text) == warns


def test_init_head_needs_init_from() -> None:
    with pytest.raises(ConfigError, match=r"init_head: takes the head of train\.init_from"):
        parse_config({"train": {"init_head": True}})


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: cannot be read"):
        read_initial_weights(_config(tmp_path / "nowhere.pth"))


def test_weights_of_the_gram_network_are_fitted_alike_and_refused_by_name(tmp_path: Path) -> None:
    path, teacher = _reference(tmp_path)
    gram = {"loss_weight": 1.0, "teacher": str(path)}
    found = read_gram_weights(tiny_config(gram=gram))
    assert found is not None
    assert _equal(found.backbone, teacher.backbone.state_dict())
    assert found.licence == read_source(path).card.licence is not None
    masked = tiny_config(gram=gram, crops={"global_size": 32}, ibot={"loss_weight": 1.0})
    found = read_gram_weights(masked)
    assert found is not None
    assert not found.backbone["mask_token"].any()
    assert found.backbone["pos_embed"].shape == (1, 17, 20)
    assert read_gram_weights(tiny_config()) is None
    with pytest.raises(ConfigError, match=f"^gram.teacher: {path} holds a ViT .*depth 2"):
        read_gram_weights(tiny_config(gram=gram, model={"depth": 3}))


def test_other_initial_weights_of_a_run_that_goes_on_are_named() -> None:
    began = tiny_config(train={"init_from": "wrong.pth"})
    then = began.model_dump(mode="json")
    assert initial_weights_caution(began, then) is None
    said = initial_weights_caution(tiny_config(train={"init_from": "right.pth"}), then)
    assert said is not None
    assert "train.init_from=right.pth with init_head=False is not read: the run began with" in said
    assert "wrong.pth" in said
    moved = tiny_config(train={"init_from": "moved/run/phases/01_first", "init_head": True})
    assert initial_weights_caution(moved, then) is None
    assert initial_weights_caution(tiny_config(), {}) is None  # as of an older version


def test_adapters_begin_anew_beside_the_weights_of_the_source(tmp_path: Path) -> None:
    path, teacher = _reference(tmp_path)
    config = _config(path, head=True, lora={"rank": 2})
    start = _start(config)
    assert _equal(start.backbone, teacher.backbone.state_dict())
    assert start.head is not None
    network, _ = build_networks(config, start)
    adapters = {n for n, _ in network.named_parameters() if "lora_" in n}
    assert network.state_dict().keys() - start.by_name().keys() == adapters
    images = torch.rand(2, 3, 16, 16)
    features = [each.backbone([images]) for each in (network, teacher)]
    assert torch.equal(*features)
