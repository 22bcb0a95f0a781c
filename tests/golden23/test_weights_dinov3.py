"""Files in the layout of DINOv3's authors: read to the recorded features, and written again."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.convert.conversion import convert
from dinoscale.convert.formats.dinov3 import dinov3_shape, from_dinov3, is_dinov3
from dinoscale.convert.load_backbone import load_backbone
from dinoscale.convert.source import read_source
from dinoscale.errors import CheckpointError
from dinoscale.models.rope import Rope
from dinoscale.models.zoo import build_backbone

Tensors = Callable[[str], dict[str, Tensor]]
Numbers = Callable[[str], dict[str, Any]]
MODEL = "dinov3_swiglu_reg"


@pytest.fixture
def published(tmp_path: Path, golden23_tensors: Tensors) -> Path:
    """The recorded model as its authors save it."""
    prefix = "state."
    state = {
        name.removeprefix(prefix): value
        for name, value in golden23_tensors(MODEL).items()
        if name.startswith(prefix)
    }
    torch.save(state, tmp_path / "dinov3.pth")
    return tmp_path / "dinov3.pth"


def test_features_are_the_recorded_ones(
    published: Path, golden23_json: Numbers, golden23_tensors: Tensors
) -> None:
    facts, tensors = golden23_json(MODEL), golden23_tensors(MODEL)
    backbone, _ = load_backbone(published)
    shape = backbone.card.backbone
    assert (shape.num_heads, shape.depth) == (facts["num_heads"], facts["depth"])
    assert shape.rope == Rope(facts["rope_base"])
    for height, width in facts["sizes"]:
        size = f"{height}x{width}"
        tokens = backbone.network.features(tensors[f"{size}.input"])
        names = ("cls", "registers", "patches")
        expected = [tensors[f"{size}.{name}"] for name in names]
        expected[0] = expected[0][:, None]
        torch.testing.assert_close(tokens, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


def test_what_is_written_again_is_the_same_file(published: Path, tmp_path: Path) -> None:
    convert(published, tmp_path / "again.pth", to="dino")
    theirs = torch.load(published, weights_only=True)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], value) for name, value in theirs.items())
    assert read_source(tmp_path / "again.pth").card == read_source(published).card


def test_names_of_published_files_are_those_of_the_network(golden23_dir: Path) -> None:
    released = json.loads((golden23_dir / "checkpoint_keys.json").read_text())["released"]
    of_dinov3 = {name: file for name, file in released.items() if name.startswith("dinov3")}
    assert len(of_dinov3) == 4
    for name, file in of_dinov3.items():
        keys = file["keys"]
        with torch.device("meta"):
            state = {key: torch.empty(size) for key, (size, _) in keys.items()}
        for key in [key for key in state if key.endswith(("periods", "bias_mask"))]:
            state[key] = _buffer(key, len(state[key]))
        assert is_dinov3(state)
        found = from_dinov3(state)
        shape = dinov3_shape(state, found)
        with torch.device("meta"):
            expected = build_backbone(**vars(shape)).state_dict()
        assert {key: x.shape for key, x in found.items()} == {
            key: x.shape for key, x in expected.items()
        }, name
        width = keys["cls_token"][0][2]
        assert (shape.embed_dim, shape.num_heads) == (width, width // 64)


def _buffer(name: str, length: int) -> Tensor:
    if name.endswith("periods"):
        return Rope().periods(4 * length, dtype=torch.float32, device=torch.device("cpu"))
    return torch.ones(3, length // 3).index_fill(0, torch.tensor([1]), 0).flatten()


def test_damaged_files_are_refused(published: Path) -> None:
    state = torch.load(published, weights_only=True)
    width = state["cls_token"].shape[-1]
    periods = _buffer("periods", width // 4 - 1)
    for change, message in (
        ({"blocks.0.mlp.w2.weight": None}, "lacks the other factor"),
        ({"blocks.0.attn.qkv.bias_mask": torch.ones(192)}, "masks another part"),
        ({"patch_embed.proj.weight": None}, "no ViT of DINOv3"),
        ({"rope_embed.periods": periods}, f"no multiple of the {width - 4} channels of a head"),
    ):
        damaged = {**state, **change}
        torch.save({k: v for k, v in damaged.items() if v is not None}, published)
        with pytest.raises(CheckpointError, match=message):
            read_source(published)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rope",
    [Rope(), Rope(10_000.0), Rope(50.5), Rope(None, 1.0, 100.0), Rope(None, 0.5, 20.0)],
    ids=str,
)
def test_the_rule_found_gives_the_periods_of_the_file(
    published: Path, rope: Rope, dtype: torch.dtype
) -> None:
    state = torch.load(published, weights_only=True)
    head_dim, cpu = 4 * len(state["rope_embed.periods"]), torch.device("cpu")
    periods = rope.periods(head_dim, dtype=torch.float32, device=cpu)
    state["rope_embed.periods"] = periods.to(dtype)
    found = dinov3_shape(state, from_dinov3(state)).rope
    assert found is not None
    again = found.periods(head_dim, dtype=torch.float32, device=cpu)
    rtol = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(again, periods, rtol=rtol, atol=0)


@pytest.mark.parametrize("damage", [(1, 2.0), (-1, math.nan), (-1, -9.0), (-1, math.inf)])
def test_periods_of_no_rule_are_refused(published: Path, damage: tuple[int, float]) -> None:
    state = torch.load(published, weights_only=True)
    position, value = damage
    state["rope_embed.periods"][position] = value
    with pytest.raises(CheckpointError, match="neither a base nor two ends"):
        dinov3_shape(state, from_dinov3(state))
