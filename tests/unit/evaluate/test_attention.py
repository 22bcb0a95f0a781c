"""Attention: maps against the backbone, masks by hand, and the figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.data.sources.synthetic import ShapesSource
from dinoscale.errors import ConfigError, DataError, NonFiniteError
from dinoscale.evaluate.dense import attention_figure as figure
from dinoscale.evaluate.dense.attention import draw_attention, evaluate_attention, score_attention
from dinoscale.evaluate.dense.attention_maps import (
    attention_maps,
    center_box,
    head_jaccard,
    keep_mass,
)
from dinoscale.models.zoo import build_backbone

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SIZES = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    torch.manual_seed(1)
    return build_backbone("vit_tiny_patch16_224", img_size=32, **SIZES).eval()


class Spotlight(nn.Module):
    """A fake ViT with patches of 4: head 0 attends to bright patches, head 1 to all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size = 4
        self.weight = nn.Parameter(torch.zeros(1))
        self.modes: list[bool] = []

    def last_attention(self, images: Tensor, *, queries: int) -> Tensor:
        self.modes.append(self.training)
        bright = nn.functional.avg_pool2d(images.mean(1), 4).flatten(1)  # (N, P)
        heads = torch.stack([(30 * bright).softmax(1), torch.ones_like(bright).softmax(1)], 1)
        registers = torch.full((*heads.shape[:2], 3), 0.25)  # class token and two registers
        row = torch.cat([registers, heads * 0.25], dim=2)
        return row[:, :, None].expand(-1, -1, queries, -1)


def _bright_square() -> tuple[Image.Image, Image.Image]:
    """16 x 16 pixels; the object is a column two patches high on the right."""
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 12:] = 255
    return Image.fromarray(np.repeat(mask[..., None] // 2, 3, axis=2)), Image.fromarray(mask)


def test_maps_are_the_class_tokens_row_without_the_class_token(backbone: nn.Module) -> None:
    images = torch.rand(3, 3, 24, 32)
    full = backbone.last_attention(images)  # type: ignore[operator]  # of the ViT
    torch.testing.assert_close(full.sum(-1), torch.ones(full.shape[:-1]))
    maps = attention_maps(backbone, images)
    assert maps.shape == (3, 3, 3, 4)
    torch.testing.assert_close(maps.flatten(2), full[:, :, 0, 1:])
    torch.testing.assert_close(maps.sum((2, 3)) + full[:, :, 0, 0], torch.ones(3, 3))


def test_non_finite_maps_are_refused(backbone: nn.Module) -> None:
    with pytest.raises(NonFiniteError, match="have diverged"):
        attention_maps(backbone, torch.full((1, 3, 16, 16), torch.nan))


def test_registers_are_not_patches() -> None:
    image, _ = _bright_square()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    maps = attention_maps(Spotlight(), pixels)
    assert maps.shape == (1, 2, 4, 4)
    assert maps[0, 0].flatten().topk(2).indices.sort().values.tolist() == [7, 11]


def test_splitting_many_images_into_batches_changes_nothing(
    backbone: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(5, 3, 32, 32)
    whole = attention_maps(backbone, images)
    monkeypatch.setattr("dinoscale.evaluate.dense.attention_maps.TOKENS_AT_ONCE", 2 * 16)
    torch.testing.assert_close(attention_maps(backbone, images), whole)


def test_labels_of_numbered_masks_are_not_brightness(backbone: nn.Module) -> None:
    picture, mask = _bright_square()
    dark = Image.fromarray(np.array(mask) // 255)
    dark.putpalette([0] * 768)
    wide = Image.fromarray(np.array(mask).astype(np.uint16) // 255)
    scores = [
        score_attention(backbone, [picture], [m], mean=(0.5,) * 3, std=(0.5,) * 3, size=16)
        for m in (mask, dark, wide)
    ]
    assert scores[0] == scores[1] == scores[2]


def test_kept_patches_are_the_fewest_that_hold_the_mass() -> None:
    maps = torch.tensor([[[4.0, 1.0], [2.0, 3.0]], [[1.0, 1.0], [1.0, 97.0]]])
    assert keep_mass(maps, mass=0.6).tolist() == [[[1, 0], [0, 1]], [[0, 0], [0, 1]]]
    assert keep_mass(maps, mass=0.75)[0].tolist() == [[1, 0], [1, 1]]
    assert keep_mass(maps, mass=1.0).all()
    assert torch.equal(keep_mass(maps / 7, mass=0.6), keep_mass(maps, mass=0.6))
    with pytest.raises(ValueError, match="mass"):
        keep_mass(maps, mass=0.0)


def test_jaccard_counts_pixels_of_patches() -> None:
    kept = torch.tensor([[[[True, False], [False, False]], [[True, True], [True, True]]]])
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, :2, :2] = True  # 4 of the 6 pixels of the first patch
    torch.testing.assert_close(head_jaccard(kept, mask), torch.tensor([[4 / 6, 4 / 24]]))


def test_the_center_box_has_half_the_height_and_width() -> None:
    box = center_box(8, 16)
    assert box.shape == (1, 8, 16)
    assert box.sum() == 4 * 8
    assert box[0, 2:6, 4:12].all()


def test_the_best_head_is_scored_and_the_center_box_is_the_baseline(tmp_path: Path) -> None:
    backbone = Spotlight().train()
    image, mask = _bright_square()
    score = draw_attention(
        backbone, [image], tmp_path / "a.png", masks=[mask], mean=MEAN, std=STD, size=16
    )
    assert score is not None
    assert (score.images, score.jaccard) == (1, 100.0)
    assert score.center_box == 0  # the object lies beside the box
    assert backbone.modes == [False]
    assert backbone.training
    same = score_attention(backbone, [image], [mask], mean=MEAN, std=STD, size=16)
    assert same == score


def _picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_picture_has_a_panel_for_every_view(tmp_path: Path, backbone: nn.Module) -> None:
    source = ShapesSource(images=4, size=20)
    images = [Image.fromarray(source.picture(i).pixels()) for i in range(4)]
    masks = [source.mask(i) for i in range(4)]
    path, settings = tmp_path / "new" / "attention.png", {"mean": MEAN, "std": STD, "size": 32}
    assert draw_attention(backbone, images, path, rows=2, **settings) is None  # type: ignore[arg-type]  # several types
    plain = _picture(path)
    assert draw_attention(backbone, images, path, rows=3, masks=masks, **settings)  # type: ignore[arg-type]  # several types
    masked = _picture(path)
    panel = (figure.PANEL + figure.GAP) * figure.DPI
    views = 3 + 3  # image, mean, overlay; three heads; and the object where it is known
    assert plain.shape[1] == pytest.approx(views * panel, abs=panel / 4)
    assert masked.shape[1] - plain.shape[1] == pytest.approx(panel, abs=2)
    assert masked.shape[0] - plain.shape[0] == pytest.approx(
        panel + figure.LINE * figure.DPI, abs=2
    )
    blank = (plain[plain.shape[0] * 3 // 4] == 255).all(axis=1)  # through the last row
    assert blank.mean() < 0.1
    assert len(np.unique(plain.reshape(-1, 3), axis=0)) > 500


def test_pictures_differ_where_the_images_differ(tmp_path: Path, backbone: nn.Module) -> None:
    found = []
    for color in (60, 200):
        image = np.full((3, 40, 30), color, np.uint8)
        draw_attention(
            backbone,
            [torch.from_numpy(image), image.transpose(1, 2, 0)],
            tmp_path / "a.png",
            mean=MEAN,
            std=STD,
            size=33,
        )
        found.append(_picture(tmp_path / "a.png"))
    assert found[0].shape == found[1].shape
    height, width = found[0].shape[:2]
    middle = [x[height // 3, width // 14].tolist() for x in found]  # of the first image's panel
    assert middle == [[60] * 3, [200] * 3]


def test_bad_masks_and_sizes_are_named(tmp_path: Path, backbone: nn.Module) -> None:
    image, mask = _bright_square()

    def draw(size: int = 32, masks: list[np.ndarray] | None = None, of: object = backbone) -> None:
        path = tmp_path / "a.png"
        draw_attention(of, [image], path, masks=masks, mean=MEAN, std=STD, size=size)  # type: ignore[arg-type]  # stand-ins

    with pytest.raises(DataError, match="mask of image 0 is empty"):
        draw(masks=[np.zeros((16, 16), np.uint8)])
    with pytest.raises(DataError, match=r"another size .*\[16, 8\] for \[16, 16\]"):
        draw(masks=[np.asarray(mask)[:, :8]])
    with pytest.raises(ValueError, match="1 images and 2 masks"):
        draw(masks=[np.asarray(mask)] * 2)
    with pytest.raises(ConfigError, match="at least one patch of 8 pixels, got 7"):
        draw(size=7)
    with pytest.raises(ConfigError, match="need a ViT, this is a Linear"):
        draw(of=nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DataError, match=r"cannot write to .*a\.png: Is a directory"):
        draw()


def test_a_weights_file_is_scored_with_an_untrained_baseline(
    tmp_path: Path, backbone: nn.Module
) -> None:
    shape = BackboneShape("vit_tiny_patch16_224", img_size=32, **SIZES)
    card = BackboneCard(shape, mean=MEAN, std=STD, resize=32, crop=32, source="untrained")
    save_backbone(tmp_path / "w.safetensors", backbone.state_dict(), card)
    spec, path = "synthetic:shapes?images=50&size=32", tmp_path / "a.png"
    report = evaluate_attention(tmp_path / "w.safetensors", spec, path, images=20, rows=1)
    assert json.loads(json.dumps(report)) == report
    assert report["images"] == 20
    score, untrained = report["score"], report["untrained_score"]
    assert 0 < score["jaccard"] < 100  # type: ignore[index]  # nested report
    assert score["center_box"] == untrained["center_box"] > 0  # type: ignore[index]  # nested report
    assert score["jaccard"] != untrained["jaccard"]  # type: ignore[index]  # nested report
    assert path.stat().st_size > 2000
    assert report == evaluate_attention(tmp_path / "w.safetensors", spec, path, images=20, rows=1)
    alone = evaluate_attention(tmp_path / "w.safetensors", spec, path, images=2, scored=False)
    assert (alone["score"], alone["untrained_score"], alone["size"]) == (None, None, 24 * 8)
    with pytest.raises(ConfigError, match="images > 0"):
        evaluate_attention(tmp_path / "w.safetensors", spec, path, images=0)


def test_attention_is_drawn_over_gray_pictures_and_refused_over_others(tmp_path: Path) -> None:
    gray, mask = (image.convert("L") for image in _bright_square())
    score = draw_attention(
        Spotlight(), [np.asarray(gray)[..., None]], tmp_path / "a.png",
        mean=[0.0], std=[1.0], size=16, masks=[mask],
    )  # fmt: skip
    assert score is not None
    assert score.jaccard > 90
    with pytest.raises(ConfigError, match="1 or 3 channels, not 4"):
        draw_attention(
            Spotlight(), [gray], tmp_path / "b.png", mean=[0.0] * 4, std=[1.0] * 4, size=16
        )


def test_a_title_with_dollars_is_not_a_formula(backbone: nn.Module, tmp_path: Path) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    path = tmp_path / "out.png"
    draw_attention(backbone, [image], path, mean=MEAN, std=STD, size=32, title="a$b_{$")
    assert path.exists()
