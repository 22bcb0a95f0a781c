"""Pixels of other than three channels and more than 8 bit, also odd and hostile ones."""

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dinoscale.data.augmentation.multi_crop import MultiCrop, cut_crops, eval_transform
from dinoscale.data.decoding.decode import BadSampleError, Decoder
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.data.sources.folder import FolderSource
from dinoscale.data.sources.source import open_source
from dinoscale.errors import DataError
from tests.unit.data.conftest import jpeg, picture, write_tar
from tests.unit.data.many_channels import deep_png, npy, pixels, png, tiff

DTYPES = ("uint8", "uint16", "int16", "float32", "float64")


def _decoded(data: bytes, channels: int, white: float | None = None) -> np.ndarray:
    return Decoder(channels, white).open(data, "x").pixels()


def _reason(data: bytes, channels: int, white: float | None = None) -> str:
    begin = time.process_time()
    with pytest.raises(BadSampleError) as caught:
        _decoded(data, channels, white)
    assert time.process_time() - begin < 30  # a file of nonsense may ask for hours
    assert "\n" not in caught.value.reason
    return caught.value.reason


def _white(dtype: str) -> float:
    return 1.0 if dtype.startswith("float") else float(np.iinfo(dtype).max)


def _expected(array: np.ndarray, white: float) -> np.ndarray:
    return np.rint(array.astype(np.float64) * (255 / white)).astype(np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_one_channel_is_the_gray_that_pillow_makes(mode: str) -> None:
    image = picture(0).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    found = _decoded(buffer.getvalue(), 1)
    np.testing.assert_array_equal(found[..., 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_one_channel_of_a_jpeg_equals_pillows_gray(mode: str) -> None:
    buffer = io.BytesIO()
    picture(0).convert(mode).save(buffer, "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("L"))
    found = _decoded(buffer.getvalue(), 1)
    np.testing.assert_array_equal(found, expected[..., None])


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_gray_jpegs_are_shrunk_while_they_are_decoded(shrink: int) -> None:
    buffer = io.BytesIO()
    picture(0, width=203, height=101).convert("L").save(buffer, "JPEG")
    opened = Decoder(1).open(buffer.getvalue(), "x")
    assert (opened.width, opened.height) == (203, 101)
    assert opened.pixels(shrink=shrink).shape == (-(-101 // shrink), -(-203 // shrink), 1)
    box = np.array([(0, 0, 101, 203)])
    (crop,) = cut_crops(opened, box, [10 // shrink + 1])
    assert crop.shape == (10 // shrink + 1,) * 2 + (1,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("first", [False, True])
def test_npy_arrays_are_scaled_by_their_type(dtype: str, channels: int, first: bool) -> None:
    array = pixels(0, channels=channels, dtype=dtype)
    white = _white(dtype)
    stored = np.moveaxis(array, -1, 0) if first else array
    for data in (npy(stored), npy(stored.astype(array.dtype.newbyteorder(">")))):
        np.testing.assert_array_equal(_decoded(data, channels, white), _expected(array, white))


def test_flat_and_fortran_arrays_are_read() -> None:
    array = pixels(0, channels=4)
    np.testing.assert_array_equal(_decoded(npy(array[..., 0]), 1), array[..., :1])
    np.testing.assert_array_equal(_decoded(npy(np.asfortranarray(array)), 4), array)


def test_the_last_axis_holds_the_channels_where_both_ends_fit() -> None:
    array = pixels(0, channels=24)  # (24, 24, 24)
    np.testing.assert_array_equal(_decoded(npy(array), 24), array)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [4, 7])
def test_tiff_files_hold_channels_as_samples_planes_or_pages(dtype: str, channels: int) -> None:
    array = pixels(0, channels=channels, dtype=dtype)
    planes, white = np.moveaxis(array, -1, 0), _white(dtype)
    for data in (
        tiff(array),
        tiff(array, compression="zlib", tile=(16, 16)),
        tiff(array, bigtiff=True, byteorder=">"),
        tiff(array, planarconfig=None),  # as tifffile itself stores any array
        tiff(planes, planarconfig="separate", compression="zlib", rowsperstrip=5),
        tiff(planes, planarconfig=None),
        tiff(planes, planarconfig=None, metadata=None),
    ):
        np.testing.assert_array_equal(_decoded(data, channels, white), _expected(array, white))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_tiff_files_of_many_channels_are_turned_upright_as_pillow_does(orientation: int) -> None:
    array = pixels(0, channels=7)[:, :9]
    tag = (274, "H", 1, orientation, True)
    found = _decoded(tiff(array, extratags=[tag]), 7)
    one = tiff(array[..., :1], extratags=[tag])
    np.testing.assert_array_equal(found[..., :1], _decoded(one, 1))


def test_rgba_keeps_alpha_as_the_fourth_channel() -> None:
    array = pixels(0, channels=4)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "TIFF", compression="tiff_lzw")
    for data in (png(array), tiff(array, photometric="rgb"), buffer.getvalue()):
        np.testing.assert_array_equal(_decoded(data, 4), array)


def test_deep_colour_png_files_keep_their_upper_bits_and_refuse_another_white() -> None:
    array = pixels(0, channels=4, dtype="uint16")
    np.testing.assert_array_equal(_decoded(deep_png(array), 4), array >> 8)
    for channels in (1, 3, 4):
        assert "data.max_pixel_value" in _reason(deep_png(array), channels, 4095)


def test_deep_rgba_tiff_files_keep_all_bits() -> None:
    array = pixels(0, channels=4, dtype="uint16") >> 4  # 12 bit
    data = tiff(array, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(_decoded(data, 4), _expected(array, 4095))


@pytest.mark.parametrize("encode", [npy, tiff, png])
def test_white_gives_all_pictures_one_scale(encode: Callable[[np.ndarray], bytes]) -> None:
    dark = np.full((4, 5, 1), 900, dtype=np.uint16)
    bright = np.full((4, 5, 1), 3600, dtype=np.uint16)
    assert [_decoded(encode(x), 1)[0, 0, 0] for x in (dark, bright)] == [224, 224]  # 10, 12 bit
    assert [_decoded(encode(x), 1, 3600)[0, 0, 0] for x in (dark, bright)] == [64, 255]
    assert _decoded(encode(bright), 1, 1800)[0, 0, 0] == 255  # beyond white: clipped
    assert _decoded(encode(bright.astype(np.uint8)), 1, 3600)[0, 0, 0] == 3600 % 256


def test_white_scales_gray_files_of_rgb_runs_too() -> None:
    data = png(np.full((4, 5, 1), 900, dtype=np.uint16))
    assert _decoded(data, 3, 3600)[0, 0].tolist() == [64] * 3


@pytest.mark.parametrize(
    ("data", "channels", "says"),
    [
        (png(pixels(0, channels=3)), 4, "3 channels"),
        (png(pixels(0, channels=1)), 7, "1 channels"),
        (jpeg(0), 4, "3 channels"),
        (tiff(pixels(0, channels=7)), 4, "7 channels"),
        (tiff(pixels(0, channels=4)), 7, "4 channels"),
        (npy(pixels(0, channels=7)), 3, "7 channels"),
        (npy(pixels(0, channels=3)[..., 0]), 4, "1 channel"),
        (npy(np.zeros((2, 3, 4, 4), np.uint8)), 4, "(2, 3, 4, 4)"),
    ],
)
def test_another_number_of_channels_is_a_bad_sample(data: bytes, channels: int, says: str) -> None:
    reason = _reason(data, channels)
    assert says in reason
    assert f"need {channels}" in reason
    assert "data.channels" in reason


def _header(shape: tuple[int, ...], *, kind: str = "<u2", body: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    header = {"shape": shape, "fortran_order": False, "descr": kind}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + body


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (_header((10**9, 10**9, 7)), "there are 0"),
        (_header((-1, 2, 7), body=bytes(28)), "(-1, 2, 7)"),
        (_header((0, 2, 7)), "(0, 2, 7)"),
        (_header((1, 2, 7), kind="|O", body=bytes(112)), "object"),
        (_header((1, 2, 7), kind="<i8", body=bytes(112)), "int64"),
        (_header((1, 2, 7), kind="<f4", body=b"\0\0\xc0\x7f" * 14), "NaN"),
        (npy(pixels(0, channels=7))[:-1], "there are"),
        (npy(pixels(0, channels=7)) + b"\0", "there are"),
        (b"\x93NUMPY", "magic"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, "large"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"(" * 100, "header"),
        (b"\x93NUMPY\x09\x00" + bytes(200), "version"),
    ],
)
def test_hostile_npy_files_are_bad_samples(data: bytes, says: str) -> None:
    assert says in _reason(data, 7)


def _edited(array: np.ndarray, changes: dict[int, int], **options: object) -> bytes:
    """A TIFF file with other numbers in its tags, each as a single 32-bit value."""
    data = bytearray(tiff(array, **options))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = {code: file.pages[0].tags[code] for code in changes}
    for code, value in changes.items():
        struct.pack_into("<HII", data, tags[code].offset + 2, 4, 1, value)
    return bytes(data)


def test_tiff_files_that_claim_to_be_huge_are_refused_at_once() -> None:
    small, side = pixels(0, channels=7), 2**31 - 1
    assert "bomb" in _reason(_edited(small, {256: side, 257: side, 278: side}), 7)
    tiles = {"tile": (16, 16), "compression": "zlib"}
    assert "bomb" in _reason(_edited(small, {322: 2**30, 323: 2**30}, **tiles), 7)


def test_deflate_bombs_in_tiff_files_are_refused_before_they_fill_memory() -> None:
    bomb = zlib.compress(bytes(2**28), 9)
    small = pixels(0, channels=7)
    size = len(tiff(small, compression="zlib"))
    data = _edited(small, {273: size, 279: len(bomb)}, compression="zlib") + bomb
    assert "bomb" in _reason(data, 7)


@pytest.mark.parametrize(("pages", "back_to"), [(7, 0), (150, 120)])
def test_loops_of_tiff_pages_are_refused(pages: int, back_to: int) -> None:
    data = bytearray(tiff(np.zeros((pages, 4, 4), np.uint8), planarconfig=None, metadata=None))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        starts = [page.offset for page in file.pages]
    (num_tags,) = struct.unpack_from("<H", data, starts[-1])
    struct.pack_into("<I", data, starts[-1] + 2 + 12 * num_tags, starts[back_to])
    assert "a loop of pages" in _reason(bytes(data), 7)


def test_compressions_that_cannot_be_read_are_named() -> None:
    data = _edited(pixels(0, channels=7), {259: 5})
    assert "compression LZW" in _reason(data, 7)
    assert "has 7 channels, need 6" in _reason(data, 6)  # another compression would not help


@given(cut=st.integers(0, 2000), at=st.integers(0, 400), byte=st.integers(0, 255))
def test_damaged_tiff_files_decode_or_are_bad_samples(cut: int, at: int, byte: int) -> None:
    data = bytearray(tiff(pixels(0, channels=7, side=8), compression="zlib"))
    data[at % len(data)] = byte
    try:
        found = _decoded(bytes(data[: len(data) - cut % 100]), 7)
    except BadSampleError:
        return
    assert found.shape[-1] == 7


def test_folders_of_arrays_alone_are_images_and_beside_pictures_they_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    array = pixels(0, channels=3)
    for name in ("a/1.npy", "b/2.NPY"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(npy(array))
    source = open_source(str(tmp_path))
    assert len(source) == 2
    assert source.class_names == ["a", "b"]
    np.testing.assert_array_equal(source.picture(1).pixels(), array)
    (tmp_path / "a" / "0.png").write_bytes(png(array))
    source = FolderSource(str(tmp_path))
    assert [Path(source.path(i)).name for i in range(len(source))] == ["0.png"]
    assert "left out 2 .npy files" in caplog.text


def test_folders_of_shards_with_an_array_beside_them_stay_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(0)})
    (tmp_path / "index.npy").write_bytes(npy(pixels(0, channels=3)))
    assert isinstance(open_source(str(tmp_path)), TarSource)


def test_arrays_in_shards_count_after_all_pictures(tmp_path: Path) -> None:
    members = {"0.npy": npy(pixels(0, channels=4)), "1.npy": b"a feature", "1.png": b"a picture"}
    source = TarSource([str(write_tar(tmp_path / "a.tar", members))], Decoder(4))
    assert [source.path(i).partition("::")[2] for i in range(2)] == ["0.npy", "1.png"]
    assert source.picture(0).pixels().shape == (24, 24, 4)


def test_synthetic_pictures_are_refused_for_other_channels() -> None:
    with pytest.raises(DataError, match=r"3 channels, need 1 \(data\.channels\)"):
        open_source("synthetic:shapes", Decoder(1))


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_evaluation_treats_each_channel_as_a_picture_of_its_own(channels: int) -> None:
    array = pixels(0, channels=channels)[:20]
    for crop in (15, 40):  # inside, and with black margins
        seen = eval_transform(array, resize=18, crop=crop)
        assert seen.shape == (channels, crop, crop)
        for i in range(channels):
            as_rgb = np.repeat(array[..., i : i + 1], 3, axis=-1)
            np.testing.assert_array_equal(seen[i], eval_transform(as_rgb, resize=18, crop=crop)[0])


@pytest.mark.parametrize("plain", [False, True])
def test_gray_crops_have_one_channel(plain: bool) -> None:
    crops = MultiCrop(global_size=16, local_size=8, num_local=2, channels=1, plain=plain)
    arrays = crops.arrays(count=1)
    opened = Decoder(1).open(jpeg(0), "x")
    crops(opened, arrays, 0, seed=0, epoch=0, sample=0)
    assert arrays.global_crops.shape == (2, 1, 16, 16, 1)
    assert arrays.global_crops.std() > 5
