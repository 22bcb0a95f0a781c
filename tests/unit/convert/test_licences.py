"""What is known of the licence of weights stays with all that is derived from them."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dinoscale.convert.conversion import convert
from dinoscale.convert.formats.dinov3 import as_in_dinov3
from dinoscale.convert.formats.licences import joined_notes
from dinoscale.convert.initial_weights import read_frozen_teacher, read_initial_weights
from dinoscale.convert.source import read_source
from dinoscale.engine.build import build_networks
from dinoscale.models.rope import Rope
from dinoscale.models.vit import VisionTransformer
from tests.distributed.tiny_run import tiny_config

DINOV3 = {"num_heads": 1, "rope": asdict(Rope()), "qkv_bias": True, "layer_scale": 0.1}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "dino": ({}, "of DINO and of other networks: .* under Apache-2.0"),
    "dinov2": ({"layer_scale": 0.1}, "of DINOv2: .* under Apache-2.0"),
    "dinov3": (DINOV3, "of DINOv3: .* under the DINOv3 License, which also binds"),
}
BEGINNING = r"^These weights, or those that they were trained from, have the layout "


def _file(folder: Path, family: str) -> Path:
    """Tensors alone, as the authors of a family publish them."""
    model = tiny_config().model.model_dump(exclude_none=True) | FAMILIES[family][0]
    network = build_networks(tiny_config(model=model | {"num_heads": 1, "embed_dim": 64}))[0]
    assert isinstance(network.backbone, VisionTransformer)
    state = dict(network.backbone.state_dict())
    if family == "dinov3":
        state = as_in_dinov3(state, rope=Rope(), num_heads=1, key_bias_masked=False)
    torch.save(state, folder / "w.pth")
    return folder / "w.pth"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_tells_a_family_and_conversions_keep_the_note(
    tmp_path: Path, family: str
) -> None:
    path = _file(tmp_path, family)
    note = read_source(path).card.licence
    assert note is not None
    assert re.match(BEGINNING + FAMILIES[family][1], note)
    source = path
    for to, name in (("dino", "a.safetensors"), ("timm", "timm"), ("dino", "b.pth")):
        card = convert(source, tmp_path / name, to=to)
        source = tmp_path / name
        assert card["licence"] == read_source(source).card.licence == note
    written = json.loads((tmp_path / "timm" / "dinoscale.json").read_text())
    assert written["licence"] == note


@pytest.mark.parametrize(
    ("readme", "config", "says"),
    [
        ("---\nlicense: other\nlicense_name: dinov3-license\n---\n# A model", {}, "dinov3-license"),
        ("---\ntags: [x]\nlicense: apache-2.0\n---\n", {"license": "mit"}, "apache-2.0"),
        (None, {"pretrained_cfg": {"license": "dinov3-license"}}, "dinov3-license"),
        ("license: mit", {}, None),
        ("---\nlicense: <b>\n---\n", {"license": ["mit"]}, None),
    ],
)
def test_what_a_hubs_folder_says_is_told(
    tmp_path: Path, readme: str | None, config: dict[str, Any], says: str | None
) -> None:
    state = torch.load(_file(tmp_path, "dinov2"), weights_only=True)
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if readme is not None:
        (folder / "README.md").write_text(readme)
    note = read_source(folder).card.licence or ""
    assert note.startswith("These weights")
    file = "config.json" if readme is None else "README.md"
    assert ("Beside them" in note) == (says is not None)
    assert note.endswith(f" Beside them, {file} says license: {says}.") or says is None


def test_notes_are_joined_each_once() -> None:
    assert joined_notes([None, None]) is None
    assert joined_notes([None, "Of A."]) == "Of A."
    both = joined_notes(["Of A.", None, "Of B."])
    assert both == joined_notes([both, "Of B.", "Of A."]) == "Of A. Of B."


def test_a_run_takes_the_note_over(tmp_path: Path) -> None:
    path = _file(tmp_path, "dinov3")
    model = tiny_config().model.model_dump(exclude_none=True) | DINOV3 | {"embed_dim": 64}
    model |= {"norm_eps": 1e-5}
    start = read_initial_weights(tiny_config(model=model, train={"init_from": str(path)}))
    assert start is not None
    assert start.licence == read_source(path).card.licence


def test_a_teacher_of_features_says_its_licence_and_that_it_is_being_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = _file(tmp_path, "dinov2")
    model = tiny_config().model.model_dump(exclude_none=True) | FAMILIES["dinov2"][0]
    model |= {"num_heads": 1, "embed_dim": 64}
    distill = {"teacher": str(path), "model": model, "class_feature_weight": 1.0}
    digested: list[int] = []
    config = tiny_config(distill=distill)
    weights = read_frozen_teacher(config, lambda: digested.append(len(caplog.records)))
    assert weights is not None
    assert weights.licence is not None
    assert weights.licence in caplog.messages
    assert digested.count(len(caplog.records)) >= len(weights.backbone)  # after the last message


def test_a_head_that_a_run_without_heads_cannot_take_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = _file(tmp_path, "dino")
    model = tiny_config().model.model_dump(exclude_none=True) | {"num_heads": 1, "embed_dim": 64}
    config = tiny_config(
        model=model,
        dino={"loss_weight": 0.0},
        crops={"num_local": 0},
        distill={"teacher": str(path), "class_feature_weight": 1.0},
        train={"init_from": str(path), "init_head": True},
    )
    assert read_initial_weights(config) is not None
    assert "train.init_head takes no projection head" in caplog.text
