"""The input pipeline of the reference, written literally with torchvision and Pillow.

The yardstick of `tests.benchmarks.input`; slow on purpose. Source: Caron et al. 2021
(arXiv:2104.14294), section 3.2 and the authors' code: one picture at a time, each crop on its own,
decisions from Python's and torch's global generators.
"""

import io
import random

from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from dinoscale.models._torchvision import ensure_torchvision

ensure_torchvision()

from torchvision import transforms  # noqa: E402  (needs the line above)

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, in [0, 1]


class GaussianBlur:
    """Pillow's blur with a random standard deviation in pixels."""

    def __init__(self, *, prob: float, low: float = 0.1, high: float = 2.0) -> None:
        self.prob, self.low, self.high = prob, low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.prob:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


class Solarization:
    """Invert the values from 128 on."""

    def __init__(self, *, prob: float) -> None:
        self.prob = prob

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.prob else image


class ReferenceCrops:
    """Two global and `num_local` local crops of a picture, each (3, size, size), normalised."""

    def __init__(
        self,
        *,
        num_local: int = 8,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        global_size: int = 224,
        local_size: int = 96,
    ) -> None:
        self.global_1 = _crop(global_size, global_scale, blur=1.0, solarize=0.0)
        self.global_2 = _crop(global_size, global_scale, blur=0.1, solarize=0.2)
        self.local = _crop(local_size, local_scale, blur=0.5, solarize=0.0)
        self.num_local = num_local

    def __call__(self, image: Image.Image) -> list[Tensor]:
        crops = [self.global_1(image), self.global_2(image)]
        return crops + [self.local(image) for _ in range(self.num_local)]


def _crop(
    size: int, scale: tuple[float, float], *, blur: float, solarize: float
) -> transforms.Compose:
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    steps = [
        transforms.RandomResizedCrop(
            size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC
        ),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.RandomApply([jitter], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        GaussianBlur(prob=blur),
    ]
    if solarize:
        steps.append(Solarization(prob=solarize))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)])


def load(data: bytes) -> Image.Image:
    """A picture as torchvision's ImageFolder loads it."""
    with Image.open(io.BytesIO(data)) as opened:
        return opened.convert("RGB")
