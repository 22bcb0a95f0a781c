"""`dinoscale.load_backbone`: a plain module, its preprocessing, and nothing of a training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinoscale
from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.data.augmentation.multi_crop import eval_transform
from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.models.zoo import build_backbone
from dinoscale.planning.bench.tensor_memory import with_peak_bytes

SIZES = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def _weights(folder: Path, *, name: str = "vit_tiny_patch16_224", channels: int = 3) -> Path:
    sizes = {} if name == "resnet50" else SIZES
    shape = BackboneShape(name, img_size=32, in_chans=channels, **sizes)
    mean, std = (0.1, 0.2, 0.3)[:channels], (0.4, 0.5, 0.6)[:channels]
    model = build_backbone(name, img_size=32, in_chans=channels, **sizes)
    card = BackboneCard(shape, mean, std, resize=36, crop=32, source="a test")
    save_backbone(folder / "w.safetensors", model.state_dict(), card)
    return folder / "w.safetensors"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_features_agree_with_each_other_at_any_size(tmp_path: Path, name: str) -> None:
    model, _ = dinoscale.load_backbone(_weights(tmp_path, name=name))
    images = torch.rand(2, 3, 40, 56)
    features = model.forward_features(images)
    registers = 4 if "reg4" in name else 0
    assert features.cls.shape == (2, 48)
    assert features.patches.shape == (2, 5 * 7, 48)
    assert features.registers.shape == (2, registers, 48)
    torch.testing.assert_close(model(images), features.cls)
    maps = model.attention_maps(images)
    assert maps.shape == (2, 3, 5, 7)
    row = model.network.last_attention(images)[:, :, 0]
    torch.testing.assert_close(maps.sum((-2, -1)) + row[..., : 1 + registers].sum(-1), row.sum(-1))
    torch.testing.assert_close(maps[0, 0, 1, 0], row[0, 0, 1 + registers + 7])


def test_the_last_blocks_are_maps_of_their_patches(tmp_path: Path) -> None:
    model, _ = dinoscale.load_backbone(_weights(tmp_path, name="vit_small_patch14_reg4_dinov2"))
    images = torch.rand(2, 3, 40, 56)
    maps, tokens = model.intermediate_maps(images, 2), model.intermediate(images, 2)
    assert [of_block.shape for of_block in maps] == [(2, 48, 5, 7)] * 2
    for of_block, features in zip(maps, tokens, strict=True):
        assert torch.equal(of_block[:, :, 3, 2], features.patches[:, 3 * 7 + 2])
    for images, n in ((torch.rand(1, 3, 40, 55), 1), (torch.rand(1, 3, 40, 56), 3)):
        with pytest.raises(ValueError, match=r"multiples of the patch size|1 <= n <= 2"):
            model.intermediate_maps(images, n)


def test_attention_maps_do_not_hold_all_pairs_of_tokens(tmp_path: Path) -> None:
    model, _ = dinoscale.load_backbone(_weights(tmp_path))
    images = torch.zeros(1, 3, 256, 256)  # 1025 tokens, 3 heads: 12.6 MB of pairs
    _, forward = with_peak_bytes(lambda: model(images))
    _, peak = with_peak_bytes(lambda: model.attention_maps(images))
    assert peak < 1.5 * forward


def test_image_sizes_that_are_not_multiples_of_the_patch_are_refused(tmp_path: Path) -> None:
    model, _ = dinoscale.load_backbone(_weights(tmp_path))
    for shape in ((1, 3, 36, 32), (3, 32, 32)):
        for use in (model, model.forward_features, model.attention_maps):
            with pytest.raises(ValueError, match="multiples of the patch size 8"):
                use(torch.zeros(shape))


def test_the_transform_is_that_of_the_evaluation(tmp_path: Path) -> None:
    model, transform = dinoscale.load_backbone(_weights(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    middle = torch.from_numpy(eval_transform(pixels, resize=36, crop=32).copy())[None]
    expected = normalize_images(middle, mean=model.card.mean, std=model.card.std)[0]
    assert torch.equal(transform(Image.fromarray(pixels)), expected)
    gray = transform(Image.fromarray(pixels).convert("L"))
    rgba = transform(Image.fromarray(pixels).convert("RGBA"))
    assert gray.shape == (3, 32, 32)
    assert torch.equal(rgba, expected)


def test_the_transform_gives_the_channels_of_the_backbone(tmp_path: Path) -> None:
    model, transform = dinoscale.load_backbone(_weights(tmp_path, channels=1))
    image = transform(Image.new("RGB", (50, 40), "white"))
    assert image.shape == (1, 32, 32)
    assert model(image[None]).shape == (1, 48)


def test_a_resnet_has_features_and_no_tokens(tmp_path: Path) -> None:
    model, _ = dinoscale.load_backbone(_weights(tmp_path, name="resnet50"))
    assert model(torch.rand(1, 3, 33, 47)).shape == (1, 2048)
    with pytest.raises(ValueError, match="resnet50 has neither"):
        model.attention_maps(torch.rand(1, 3, 32, 32))


def test_another_name_of_the_package_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        dinoscale.load  # noqa: B018
