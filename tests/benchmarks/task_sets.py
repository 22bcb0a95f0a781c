"""Weights and image sets to time tasks of evaluation on: pictures of 224 pixels, masks, depths.

Photographs of Imagenette, ten classes in turn, four fifths of them to learn from. Pairs of an image
and its mask are cut out of ECSSD's 120 photographs: two thirds of both sides, at nine places, so
that there are 1,000 with an object. Depths of these are made up: they fall from 4 m at the top to
1 m at the bottom, and the object is half a metre nearer. Frames are DAVIS's, at their own size.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from itertools import chain, islice, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinoscale.convert.card import BackboneCard, BackboneShape
from dinoscale.convert.weights_file import save_backbone
from dinoscale.models.zoo import build_backbone

SIDE = 224  # pixels
MOST, LEAST = 1000, 20  # images of a set
CLASSES = 10
FRAMES = 40  # of each of the two sequences
_TESTED = 5  # one of so many images
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_weights(path: Path) -> None:
    """Write an untrained ViT-S/16 of seed 0."""
    torch.manual_seed(0)
    shape = BackboneShape(
        "vit_small_patch16_224",
        img_size=SIDE,
        **{"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    )
    card = BackboneCard(shape, _MEAN, _STD, resize=256, crop=SIDE, source="untrained")
    save_backbone(path, build_backbone(**vars(shape)).state_dict(), card)


def write_sets(data: Path, folder: Path, images: int) -> None:
    """Write all sets of a number of images, from 20 to 1000, unless they are there.

    Args:
        data: folder of `imagenette224/`, `ecssd-masks/` and `davis-video/`.
        folder: of the sets: `all`, `train`, `test`, `one`, and `halves/0` and `1` with `train` and
            `test` hold class folders; `pairs/all`, `train` and `test` hold `images`, `masks` and
            `depths`; `videos` holds sequences.
        images: photographs, and pairs.
    """
    done = folder / "done"
    if done.exists():
        return
    _write_photographs(data / "imagenette224", folder, images)
    _write_pairs(data / "ecssd-masks" / "all-000.tar", folder / "pairs", images)
    for sequence in ("car-shadow", "motocross-jump"):
        _write_frames(data / "davis-video" / f"{sequence}.tar", folder / "videos", images // 2)
    done.touch()


def _write_photographs(shards: Path, folder: Path, images: int) -> None:
    tested = images // _TESTED
    for part, pattern, number in (
        ("train", "train-*.tar", images - tested),
        ("test", "val-*.tar", tested),
    ):
        for i, picture in enumerate(_by_turns(sorted(shards.glob(pattern)), number)):
            label = i % CLASSES
            name = f"class-{label}/{part}-{i:04d}.jpg"
            first = folder / part / name
            first.parent.mkdir(parents=True, exist_ok=True)
            first.write_bytes(picture)
            half = folder / "halves" / str(label % 2) / part  # five of the classes
            places = [folder / "all", half]
            places += [folder / "one"] * (part == "train" and i == 0)
            for place in places:
                _link(first, place / name)


def _link(file: Path, other: Path) -> None:
    other.parent.mkdir(parents=True, exist_ok=True)
    other.unlink(missing_ok=True)
    os.link(file, other)


def _by_turns(shards: list[Path], number: int) -> list[bytes]:
    """Files of pictures, of the first class, of the second and so on, in turn."""
    found: list[list[bytes]] = [[] for _ in range(CLASSES)]
    needed = -(-number // CLASSES)
    for sample in chain.from_iterable(map(_samples, shards)):
        found[int(sample["cls"])].append(sample["jpg"])
        if min(map(len, found)) == needed:
            break
    return [found[i % CLASSES][i // CLASSES] for i in range(number)]


def _samples(shard: Path) -> Iterator[dict[str, bytes]]:
    """Files of each sample by their extension, with its key under the empty one."""
    sample: dict[str, bytes] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            if sample and sample[""] != key.encode():
                yield sample
                sample = {}
            sample |= {"": key.encode(), extension: file.read()}
    yield sample


def _write_pairs(shard: Path, folder: Path, images: int) -> None:
    pairs = list(islice(_cuts(shard), images))
    if len(pairs) < images:
        raise SystemExit(f"{shard} gives {len(pairs)} pairs, {images} are wanted")
    for i, (image, mask) in enumerate(pairs):
        part = "test" if i % _TESTED == _TESTED - 1 else "train"
        below = np.linspace(4000, 1000, SIDE)[:, None]  # millimetres
        depth = (below - 500 * (np.asarray(mask) > 127)).astype(np.uint16)
        files = {"images": image, "masks": mask, "depths": Image.fromarray(depth)}
        for kind, picture in files.items():
            name = Path(kind, f"{i:04d}.{'jpg' if kind == 'images' else 'png'}")
            first = folder / part / name
            first.parent.mkdir(parents=True, exist_ok=True)
            picture.save(first, quality=95)
            _link(first, folder / "all" / name)


def _cuts(shard: Path) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Parts of all photographs with their masks, place by place; those without an object not."""
    opened = [
        tuple(Image.open(io.BytesIO(sample[kind])) for kind in ("jpg", "mask.png"))
        for sample in _samples(shard)
    ]
    for across, down in product((1, 0, 2), repeat=2):  # sixths of the width and height
        for image, mask in opened:
            width, height = image.size
            left, top = across * width // 6, down * height // 6
            box = (left, top, left + 2 * width // 3, top + 2 * height // 3)
            cut = mask.convert("L").resize((SIDE, SIDE), Image.Resampling.NEAREST, box)
            if cut.getbbox() is not None:
                photograph = image.convert("RGB")
                yield photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box), cut


def _write_frames(shard: Path, folder: Path, frames: int) -> None:
    for sample in islice(_samples(shard), min(frames, FRAMES)):
        for extension in ("jpg", "mask.png"):
            file = folder / f"{sample[''].decode()}.{extension}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(sample[extension])
