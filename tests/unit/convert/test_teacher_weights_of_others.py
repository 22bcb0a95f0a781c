"""`distill.teacher`: weights of a file with heads, fitted to the settings, and their identity."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config import RunConfig
from dinoscale.convert.initial_weights import identity_of, read_frozen_teacher
from dinoscale.convert.run_checkpoint import card_of
from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import save_backbone
from dinoscale.engine.build import InitialWeights, build_networks
from dinoscale.errors import ConfigError
from dinoscale.models.weight_names import to_reference
from dinoscale.training.frozen_teacher import read_same_teacher, teaches_on
from tests.distributed.tiny_run import dinov2, tiny_config

MODEL = {
    "backbone": "vit_tiny_patch16_224",
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 3,
    "num_heads": 2,  # of 64 channels, as files without a card are read
    "registers": 1,
}
HEADS = {
    "head": {"num_prototypes": 33, "hidden_dim": 26, "bottleneck_dim": 17},
    "patch_head": {"num_prototypes": 29, "hidden_dim": 14, "bottleneck_dim": 11},
}

OF_32 = {"global_size": 32, "mixture": ()}


def _config(path: Path, **distill: Any) -> RunConfig:
    distill = {"teacher": str(path), "model": MODEL, **HEADS, **distill}
    return tiny_config(**dinov2("centering", patch_head=True, distill=distill))


def _written(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A training checkpoint of DINOv2 with such a teacher, and its tensors under our names."""
    torch.manual_seed(3)
    network = build_networks(_config(folder).of_teacher)[1]
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape), alpha=0.1)
    state = network.state_dict()
    theirs = {
        name.replace("patch_head", "ibot_head").replace("reg_token", "register_tokens"): value
        for name, value in to_reference(state).items()
    }
    theirs = {"dino_" + k if k.startswith("head") else k: v for k, v in theirs.items()}
    torch.save({"teacher": theirs}, folder / "teacher_checkpoint.pth")
    return folder / "teacher_checkpoint.pth", state


def _read(config: RunConfig) -> InitialWeights:
    weights = read_frozen_teacher(config)
    assert weights is not None
    return weights


def test_every_tensor_of_backbone_and_heads_is_read(tmp_path: Path) -> None:
    path, state = _written(tmp_path)
    found = _read(_config(path)).by_name()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert read_frozen_teacher(tiny_config()) is None


@pytest.mark.parametrize(
    ("distill", "says"),
    [
        ({"model": {**MODEL, "depth": 2}}, r"depth 3.*the run's distill.model.backbone .* depth 2"),
        ({"model": {**MODEL, "norm_eps": 1e-3}}, r"set distill.model.norm_eps=1e-06"),
        (
            {"head": {**HEADS["head"], "hidden_dim": 25}},
            r"is not that of distill.head\.\* .* change distill.head\.\*, or give weights that",
        ),
        (
            {"head": {**HEADS["head"], "num_prototypes": 33}, "patch_head": None},
            r"has a head of its own for patch tokens, and distill\.\* has none; give distill.head",
        ),
    ],
)
def test_other_networks_than_the_file_holds_are_refused(
    tmp_path: Path, distill: dict[str, Any], says: str
) -> None:
    path, _ = _written(tmp_path)
    config = _config(path)
    section = config.distill.model_copy(
        update={key: _section(config, key, value) for key, value in distill.items()}
    )
    with pytest.raises(ConfigError, match=f"^distill.teacher: .*{says}"):
        read_frozen_teacher(config.model_copy(update={"distill": section}))


def _section(config: RunConfig, key: str, values: dict[str, Any] | None) -> Any:
    """A section inside `distill`; without what joins it to the student's."""
    return None if values is None else type(getattr(config.distill, key))(**values)


def test_weights_without_heads_are_refused(tmp_path: Path) -> None:
    path, _ = _written(tmp_path)
    weights = read_source(path)
    save_backbone(tmp_path / "bare.safetensors", weights.backbone, weights.card)
    with pytest.raises(ConfigError, match=r"^distill.teacher: .*bare.* has no projection head; gi"):
        read_frozen_teacher(_config(tmp_path / "bare.safetensors"))


def test_the_identity_is_that_of_the_values(tmp_path: Path) -> None:
    path, _ = _written(tmp_path)
    found = _read(_config(path)).identity
    parts = read_source(path).parts()
    assert found == identity_of(parts)
    assert found == identity_of({k: dict(reversed([*v.items()])) for k, v in parts.items()})
    assert found == identity_of(
        {k: {n: x.double() for n, x in v.items()} for k, v in parts.items()}
    )
    value = parts["head"]["mlp.0.bias"]
    value[0] = torch.nextafter(value[0], torch.tensor(9.0))
    assert found != identity_of(parts)
    larger = {"crops": {"global_size": 48, "local_size": 16}}  # positions are resized
    config = _config(path)
    crops = config.crops.model_copy(update=larger["crops"])
    assert _read(config.model_copy(update={"crops": crops})).identity == found


def test_a_run_goes_on_with_the_teacher_that_it_has_learnt_from(tmp_path: Path) -> None:
    path, _ = _written(tmp_path)
    config, plain = _config(path), tiny_config()
    weights = _read(config)

    def saved(identity: str | None, then: RunConfig) -> Any:
        state = {"config": then.model_dump(mode="json")}
        return SimpleNamespace(path=Path("step_04"), state=state, frozen_teacher=identity)

    same = read_same_teacher(config, saved(weights.identity, config))
    assert same is not None
    assert same.identity == weights.identity
    assert read_same_teacher(plain, saved(None, plain)) is None
    sentence = r"^distill.teacher: the run of step_04 has learnt from "
    with pytest.raises(ConfigError, match=sentence + r".*\(identity 0000.*weights are others; na"):
        read_same_teacher(config, saved(12 * "0", config))
    with pytest.raises(ConfigError, match=sentence + r".*; got null$"):
        read_same_teacher(plain, saved(weights.identity, config))
    with pytest.raises(ConfigError, match=sentence + r"its own average, .*; set it to null, or"):
        read_same_teacher(config, saved(None, plain))


def test_features_of_a_mixtures_smaller_crops_are_compared_with_the_weights_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _follow_mixture(tmp_path, 32, 16)  # of the weights, and resized once
    assert "resized" not in caplog.text
    _follow_mixture(tmp_path, 48, 16)
    (said,) = [line for line in caplog.messages if "its positions are resized" in line]
    assert said.startswith("distill.teacher: in crops of 16 pixels its features differ by 0.")
    assert said.endswith("largest crops have the 32 pixels of the weights keeps them")


def _follow_mixture(folder: Path, *sizes: int) -> None:
    """Read weights of 32 pixels with learned positions as a teacher of crops of `sizes`."""
    each = [{"global_size": size, "local_size": 8, "weight": 1 / len(sizes)} for size in sizes]
    config = tiny_config(
        model={"rope": {}, "num_heads": 1},
        crops={"mixture": each, "num_local": 0, "global_size": max(sizes)},
        dino={"loss_weight": 0.0},
        distill={"teacher": str(folder / "w.safetensors"), "model": MODEL}
        | {"class_feature_weight": 1.0},
    )
    theirs = config.of_teacher.model_copy(update={"crops": config.crops.model_copy(update=OF_32)})
    torch.manual_seed(3)
    state = {name: torch.randn_like(v) / 4 for name, v in _backbone_of(theirs).items()}
    save_backbone(folder / "w.safetensors", state, card_of(theirs, source="drawn"))
    _read(config)


def _backbone_of(config: RunConfig) -> dict[str, Tensor]:
    return build_networks(config)[0].backbone.state_dict()


@pytest.mark.parametrize("features", [False, True])
def test_centers_go_on_only_with_the_heads_that_gave_the_targets(
    features: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    weights = InitialWeights({}, identity="that")
    given = {"class_feature_weight": 1.0} if features else HEADS
    section = {"teacher": "w.pth", "model": MODEL, **given}
    config = tiny_config(**dinov2("centering", patch_head=True, distill=section))
    plain = tiny_config()

    def saved(identity: str | None, then: RunConfig) -> Any:
        state = {"config": then.model_dump(mode="json")}
        return SimpleNamespace(path=Path("step_04"), state=state, frozen_teacher=identity)

    assert teaches_on(config, saved("that", config), weights)
    assert teaches_on(plain, saved(None, plain), None)
    # Beside features the average gives the targets, whoever gives those.
    assert teaches_on(config, saved("other", config), weights) == features
    assert teaches_on(config, saved(None, plain), weights) == features
    assert teaches_on(plain, saved("that", config), None) == features
    said = "the centers of step_04 are of another teacher's outputs: they begin anew"
    assert caplog.messages == ([] if features else 3 * [said])
    caplog.clear()
    shared_out = tiny_config(**dinov2("sinkhorn_knopp", patch_head=True, distill=section))
    assert teaches_on(shared_out, saved("other", shared_out), weights) == features
    assert not caplog.messages  # of Sinkhorn-Knopp, which has none
