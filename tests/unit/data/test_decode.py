import csv
import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile

from dinoscale.data.decoding.decode import RGB, BadSampleError, Decoder
from tests.unit.data.conftest import jpeg, picture


def _encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _tiff(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric="minisblack", planarconfig="contig")
    return buffer.getvalue()


def _decoded(data: bytes) -> np.ndarray:
    return RGB.open(data, "x").pixels()


def test_rgb_pixels_are_pillows_own() -> None:
    data = jpeg(0)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(_decoded(data), expected)


def _damaged_jpegs() -> list[bytes]:
    """Files with a broken entropy stream: cut, overwritten, with bytes too many or a false marker.

    Baseline, progressive and with restart markers; beyond 64 KB Pillow reads in several pieces.
    """
    rng = random.Random(0)
    options = [{}, {"progressive": True}, {"restart_marker_rows": 1}]
    whole = [_encoded(picture(i), "JPEG", **option) for i, option in enumerate(options)]
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    whole.append(_encoded(Image.fromarray(noise), "JPEG", quality=100))
    files = []
    for data in whole:
        for _ in range(14):
            at = rng.randrange(data.index(b"\xff\xda") + 12, len(data) - 2)
            files += [
                data[:at],
                data[:at] + data[at + 20 :],
                data[:at] + rng.randbytes(9) + data[at:],
                data[:at] + bytes([0xFF, rng.randrange(256)]) + data[at + 2 :],
                data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
                data[:at] + bytes(len(data) - 2 - at) + data[-2:],
            ]
    return files


def _pillows(data: bytes, *, shrink: int, mode: str) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.draft(None, (max(1, opened.width // shrink), max(1, opened.height // shrink)))
            return np.asarray(opened.convert(mode)).reshape(*opened.size[::-1], -1)
    except Exception:  # refused in any way
        return None


@pytest.mark.parametrize(("shrink", "channels"), [(1, 3), (4, 3), (8, 3), (1, 1)])
def test_damaged_jpeg_is_bad_or_has_the_pixels_just_where_pillow_says_so(
    shrink: int, channels: int
) -> None:
    refused = 0
    for data in _damaged_jpegs():
        expected = _pillows(data, shrink=shrink, mode={1: "L", 3: "RGB"}[channels])
        try:
            found = Decoder(channels).open(data, "x").pixels(shrink=shrink)
        except BadSampleError:
            assert expected is None
            refused += 1
            continue
        np.testing.assert_array_equal(found, expected)
    assert refused > 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(orientation: int) -> None:
    upright = picture(0)
    stored = {  # how a camera held that way stores the upright picture
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](np.asarray(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(_decoded(data), np.asarray(upright))


def test_damaged_exif_leaves_the_picture_readable() -> None:
    clean = _encoded(picture(0), "JPEG", quality=95)
    damaged = _encoded(picture(0), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    np.testing.assert_array_equal(_decoded(damaged), _decoded(clean))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_rgb_as_pillow_converts_them(mode: str) -> None:
    image = picture(0).convert(mode)
    np.testing.assert_array_equal(
        _decoded(_encoded(image, "PNG")), np.asarray(image.convert("RGB"))
    )


def test_cmyk_becomes_rgb() -> None:
    """Nearer to the picture than a file of RGB, whose conversion to YCbCr rounds once more."""
    errors = []
    for mode in ("CMYK", "RGB"):
        data = _encoded(picture(0).convert(mode), "JPEG", quality=95, subsampling="4:4:4")
        errors.append(abs(_decoded(data).astype(int) - np.asarray(picture(0))).mean())
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_pixels_are_scaled_not_clipped(file_format: str) -> None:
    pixels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    decoded = _decoded(_encoded(Image.fromarray(pixels), file_format))
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize(("bits", "brightest"), [(8, 255), (10, 1023), (12, 4095), (14, 9000)])
def test_sensor_depths_within_sixteen_bits_are_not_black(bits: int, brightest: int) -> None:
    pixels = np.array([[0, brightest // 2, brightest]], dtype=np.uint16)
    expected = np.rint(pixels[0] * (255.0 / (2**bits - 1)))
    for file_format in ("PNG", "TIFF"):
        decoded = _decoded(_encoded(Image.fromarray(pixels), file_format))
        np.testing.assert_array_equal(decoded[0, :, 2], expected)


def test_depth_stated_by_the_file_counts() -> None:
    assert _decoded(b"P5 1 1 4095\n" + (2048).to_bytes(2, "big"))[0, 0, 0] == 128
    assert _decoded(b"P5 1 1 65535\n" + (600).to_bytes(2, "big"))[0, 0, 0] == 2


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 51.0, 255.0], [0, 51, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 1e6, float("inf")], [0, 255, 255]),
        ([0.5, float("nan"), 1.0], [128, 128, 255]),
        ([-3.0, -3.0, -3.0], [0, 0, 0]),
    ],
)
def test_float_pixels_are_scaled_by_their_range(pixels: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([pixels], dtype=np.float32))
    np.testing.assert_array_equal(_decoded(_encoded(image, "TIFF"))[0, :, 1], expected)


def test_all_nan_pixels_are_a_bad_sample() -> None:
    image = Image.fromarray(np.full((1, 2), np.nan, dtype=np.float32))
    with pytest.raises(BadSampleError, match="NaN"):
        _decoded(_encoded(image, "TIFF"))


def test_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert _decoded(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (jpeg(0)[:-300], "OSError: image file is truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"  <!DOCTYPE html><html>", "HTML"),
        (b"\x00\x05\x16\x07" + bytes(60), "AppleDouble"),
        (b"\x00\x00\x00\x18ftypheic" + bytes(60), "HEIF"),
        (b"\x00\x00\x00\x18ftypisom" + bytes(60), "video"),
        (b"\x00\x00\x00\x1cftypavif" + bytes(60), "an AVIF file"),
        (_encoded(picture(0), "PNG")[:40], "PNG file that is damaged"),
        (_encoded(picture(0), "TIFF")[:40], "TIFF file that is damaged"),
        (_tiff(np.zeros((4, 5, 6), dtype=np.uint8)), "an array (4, 5, 6) of uint8"),
        (bytes(100), "all its bytes are zero"),
        (b"no picture at all", "not an image"),
    ],
)
def test_reason_is_one_line_about_what_is_wrong(data: bytes, reason: str) -> None:
    with pytest.raises(BadSampleError) as caught:
        RGB.open(data, "a/b.jpg").pixels()
    assert caught.value.path == "a/b.jpg"
    assert reason in caught.value.reason
    assert "\n" not in caught.value.reason
    assert " object at 0x" not in caught.value.reason
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_large_pictures_decode_silently_and_bombs_do_not(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    data = _encoded(Image.new("L", (40, 30)), "PNG")  # 1200 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    assert _decoded(data).shape == (30, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(BadSampleError, match="DecompressionBombError"):
        _decoded(data)
    assert not recwarn.list


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadSampleError("a.jpg", "the file is empty")))
    assert (error.path, error.reason) == ("a.jpg", "the file is empty")
    assert str(error) == "a.jpg: the file is empty"


def test_odd_files_decode_exactly_where_the_manifest_says_so(image_sets: Path) -> None:
    folder = image_sets / "odd-images"
    with (folder / "manifest.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    wrong = []
    for row in rows:
        if row["size"] == "12000x9000":
            continue  # half a second and 400 MB
        try:
            RGB.open((folder / row["file"]).read_bytes(), row["file"]).pixels()
            decodes = True
        except BadSampleError:
            decodes = False
        if decodes != row["file"].startswith("loads/"):
            wrong.append(row["file"])
    assert len(rows) == 100
    assert wrong == []


def test_rotated_photographs_all_look_the_same(image_sets: Path) -> None:
    folder = image_sets / "odd-images" / "loads"
    upright = np.asarray(Image.open(folder / "hopper.ppm")).astype(int)
    turns = [np.rot90(side, k) for side in (upright, upright[:, ::-1]) for k in range(4)]
    for orientation in range(2, 9):
        data = (folder / f"hopper_orientation_{orientation}.jpg").read_bytes()
        errors = [abs(_decoded(data).astype(int) - turned).mean() for turned in turns]
        assert np.argmin(errors) == 0, orientation


@pytest.mark.parametrize(
    "name",
    ["16bit.cropped.jp2", "hopper_16bit.pgm", "10ct_32bit_128.tiff", "hopper.pfm", "i_trns.png"],
)
def test_deep_pictures_are_neither_black_nor_burnt_out(image_sets: Path, name: str) -> None:
    decoded = _decoded((image_sets / "odd-images" / "loads" / name).read_bytes())
    assert 30 < decoded.mean() < 225
    assert decoded.std() > 8
