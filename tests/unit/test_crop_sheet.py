"""The contact sheet shows the crops of training, and says what was drawn for each."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinoscale.config import load_config
from dinoscale.data.augmentation.crop_params import NOT_SOLARIZED, NOTHING, PARAMS
from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.data.loader import train_batches
from dinoscale.data.sources.source import open_source
from dinoscale.errors import ConfigError
from dinoscale.reports.crop_sheet import (
    Row,
    _figure,
    _row,
    _rows,
    _visible,
    augmentations,
    darkened,
    show_crops,
)
from dinoscale.training.feed import finish_batch, masks_of, multi_crop_of

_SET = "synthetic:shapes?images=8&size=40"


def test_views_are_what_the_network_gets_in_training() -> None:
    config = load_config("quickstart", [f"data.train={_SET}", "seed=5"])
    source, crops = open_source(_SET), multi_crop_of(config)
    (batch,) = train_batches(
        source, crops, batch_size=8, micro_batch_size=8, seed=5, rank=0, world_size=1,
        start_step=1, stop_step=2, num_workers=0,
    )  # fmt: skip
    place = batch.sample_ids.tolist().index(3)
    finished = finish_batch(batch, config.data, torch.device("cpu"))
    expected = [view for kind in finished for view in kind[:, place]]
    shown = _row(config, source, crops, sample=3, epoch=1).views
    assert len(shown) == len(expected) == 4
    for one, other in zip(shown, expected, strict=True):
        again = torch.from_numpy(one).permute(2, 0, 1)
        again = normalize_images(again, mean=config.data.mean, std=config.data.std)
        torch.testing.assert_close(again, other, rtol=0, atol=1e-5)


def test_a_sheet_is_written_and_plain_is_nearly_the_same(tmp_path: Path) -> None:
    sheets = []
    for colors in ("device", "workers"):
        config = load_config("quickstart", [f"data.train={_SET}", f"data.color_ops_on={colors}"])
        out = tmp_path / "new" / f"{colors}.png"
        told = show_crops(config, num_images=2, epoch=0, out=out)
        assert told["images"] == [
            "synthetic:shapes/train/000000",
            "synthetic:shapes/train/000004",
        ]
        with Image.open(out) as opened:
            sheets.append(np.asarray(opened.convert("L"), dtype=float))
    # A dozen roundings to a level, 1/12 each in squares, make one level, where crops are drawn.
    assert np.square(sheets[0] - sheets[1]).mean() < 1
    assert sheets[0].std() > 20


def test_augmentations_of_a_crop_are_named() -> None:
    params = np.zeros((), dtype=PARAMS)
    params["box"] = (1, 2, 10, 5)
    params["order"], params["solarize_from"] = [NOTHING] * 4, NOT_SOLARIZED
    assert augmentations(params, picture_size=(20, 10)) == "25%"
    params["flip"], params["gray"], params["blur_radius"] = True, True, 1.26
    params["order"], params["solarize_from"] = (3, 0, 2, 1), 128
    text = augmentations(params, picture_size=(20, 10))
    assert text == "25%, flip, jitter HBSC, gray, blur 1.3, solarized"


@pytest.mark.parametrize(("channels", "shape"), [(1, (6, 7)), (2, (6, 7)), (5, (6, 7, 3))])
def test_other_channels_than_three_are_drawn(channels: int, shape: tuple[int, ...]) -> None:
    pixels = _visible(np.full((6, 7, channels), 9, dtype=np.uint8))
    assert pixels.shape == shape
    params = np.zeros(2, dtype=PARAMS)
    _figure([Row("one", pixels, [pixels, pixels], params)]).canvas.draw()


def test_masked_patches_are_darkened_and_counted() -> None:
    ibot = ["ibot.loss_weight=1", "ibot.mask_prob=1", "ibot.mask_group=2"]
    config = load_config("quickstart", [f"data.train={_SET}", *ibot])
    rows = list(_rows(config, open_source(_SET), num_images=3, epoch=4))
    drawn = masks_of(config, step=4, first_image=0, images=4)
    assert drawn is not None
    masks = drawn.masks.reshape(2, 4, -1).numpy()
    texts = [text.get_text() for axes in _figure(rows).axes for text in axes.texts]
    for place, row in enumerate(rows):
        assert row.masks is not None
        assert np.array_equal(row.masks, masks[:, place])
        for mask in row.masks:
            assert any(f"{mask.mean():.0%} masked" in text for text in texts)
    view = np.full((8, 8, 3), 200, dtype=np.uint8)
    mask = np.zeros(16, dtype=bool)
    mask[6] = True  # second row, third column of 2 x 2 pixels
    dark = darkened(view, mask)
    assert (dark[2:4, 4:6] == 50).all()
    assert dark.sum() == view.sum() - 4 * 3 * 150
    unmasked = load_config("quickstart", [f"data.train={_SET}"])
    assert next(iter(_rows(unmasked, open_source(_SET), num_images=1, epoch=0))).masks is None


@pytest.mark.parametrize(("num_images", "epoch"), [(0, 0), (1, -1), (1, 2**32)])
def test_numbers_out_of_range_are_refused(tmp_path: Path, num_images: int, epoch: int) -> None:
    config = load_config("quickstart", [f"data.train={_SET}"])
    with pytest.raises(ConfigError, match="--images"):
        show_crops(config, num_images=num_images, epoch=epoch, out=tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
