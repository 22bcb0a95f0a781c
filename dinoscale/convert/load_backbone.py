"""A trained backbone as a plain PyTorch module: `dinoscale.load_backbone`.

Shape letters: N images, C channels, H, W pixels, p patch size, R, S rows and columns of patches
(H / p, W / p), P = R S patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from dinoscale.convert.card import BackboneCard
from dinoscale.convert.weights import Network
from dinoscale.convert.weights_file import load_backbone as load_network
from dinoscale.data.augmentation.multi_crop import eval_transform
from dinoscale.data.augmentation.normalize import normalize_images
from dinoscale.data.decoding.decode import Decoder
from dinoscale.models.convnet import ConvNet
from dinoscale.models.vit import VisionTransformer


class Features(NamedTuple):
    """Output tokens of images, after the last norm.

    Attributes:
        cls: (N, D), the class token.
        patches: (N, P, D), row by row.
        registers: (N, number of registers, D); most networks have none.
    """

    cls: Tensor
    patches: Tensor
    registers: Tensor


class Backbone(nn.Module):
    """A trained ViT, ResNet or ConvNeXt over images (N, C, H, W) of one size.

    Images may have any height and width that are multiples of the patch size; the position
    embedding is resized for them by the reference's rule (`models.vit.resize_pos_embed`).

    Attributes:
        network: the backbone; its parameters have the names of the authors' code and of timm.
        card: its architecture, preprocessing and source.
        embed_dim: D.
        patch_size: p in pixels; 1 for others than a ViT.
    """

    def __init__(self, network: VisionTransformer | ConvNet, card: BackboneCard) -> None:
        super().__init__()
        self.network = network
        self.card = card
        self.embed_dim = network.embed_dim
        self.patch_size = network.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised class token of images (N, C, H, W), or pooled features: (N, D).

        Raises:
            ValueError: height or width is not a multiple of the patch size.
        """
        self._require_whole_patches(images)
        features: Tensor = self.network([images])
        return features

    def forward_features(self, images: Tensor) -> Features:
        """Return all normalised tokens of images (N, C, H, W).

        Raises:
            ValueError: as `forward`, or the network has no tokens.
        """
        return self.intermediate(images, 1)[0]

    def intermediate(self, images: Tensor, n: int) -> list[Features]:
        """Return all tokens of images (N, C, H, W) after each of the last n blocks.

        All pass the final norm, as DINOv2's `get_intermediate_layers` has it; the last block comes
        last.

        Raises:
            ValueError: as `forward_features`, or there are no n blocks.
        """
        self._require_whole_patches(images)
        network = self._vit()
        first = 1 + (0 if network.reg_token is None else network.reg_token.shape[1])
        return [
            Features(tokens[:, 0], tokens[:, first:], tokens[:, 1:first])
            for tokens in network.intermediate(images, n)  # each (N, 1 + registers + P, D)
        ]

    def intermediate_maps(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Return the patch tokens of images (N, C, H, W) after each of the last n blocks, as maps.

        All pass the final norm; the last block comes last. A dense head takes one of them, or all
        joined by `torch.cat(maps, dim=1)`.

        Returns:
            n tensors (N, D, R, S).

        Raises:
            ValueError: as `intermediate`.
        """
        self._require_whole_patches(images)
        maps = self._vit().patch_maps(images, n)  # each (N, R, S, D)
        return [of_block.permute(0, 3, 1, 2) for of_block in maps]

    def attention_maps(self, images: Tensor) -> Tensor:
        """Return the class token's attention to the patches in the last block: (N, heads, R, S).

        A map sums to 1 less the attention to the class token and registers.

        Raises:
            ValueError: as `forward_features`.
        """
        self._require_whole_patches(images)
        rows, columns = (side // self.patch_size for side in images.shape[2:])
        attention = self._vit().last_attention(images, queries=1)  # (N, heads, 1, L)
        return torch.unflatten(attention[:, :, 0, -rows * columns :], -1, (rows, columns))

    def _vit(self) -> VisionTransformer:
        if not isinstance(self.network, VisionTransformer):
            raise ValueError(
                f"a {self.network.name} has neither patch tokens nor attention; call it instead"
            )
        return self.network

    def _require_whole_patches(self, images: Tensor) -> None:
        if images.ndim != 4 or any(side % self.patch_size for side in images.shape[2:]):
            raise ValueError(
                f"need images (N, C, H, W) with H and W multiples of the patch size "
                f"{self.patch_size}, got {[*images.shape]}"
            )


@dataclass(frozen=True)
class Transform:
    """The evaluation preprocessing of a card: resize, center crop, normalise."""

    card: BackboneCard

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn a Pillow picture of any mode into an input (C, crop, crop), float32.

        Raises:
            ValueError: its channels differ from the backbone's and cannot be converted.
        """
        card = self.card
        decoder = Decoder(card.backbone.in_chans, card.max_pixel_value)
        pixels = decoder.upright_pixels(image)
        middle = torch.from_numpy(eval_transform(pixels, resize=card.resize, crop=card.crop).copy())
        return normalize_images(middle[None], mean=card.mean, std=card.std)[0]


def load_backbone(
    path: str | Path, *, network: Network = "teacher", num_heads: int | None = None
) -> tuple[Backbone, Transform]:
    """Load a backbone and its preprocessing from any source of weights.

    ```
    model, transform = dinoscale.load_backbone("weights.safetensors")
    features = model(transform(Image.open("cat.jpg"))[None])  # (1, D)
    ```

    Args:
        path: a run or checkpoint, a weights file of ours, the reference's, timm's or Hugging
            Face's, or a folder of theirs.
        network: which network of a run or full checkpoint to take.
        num_heads: for files that do not store it and whose heads are not 64 channels wide.

    Returns:
        The module on the CPU, float32, in eval mode, without gradients; and a function from Pillow
        pictures to its input.

    Raises:
        CheckpointError: the file is missing, damaged, unknown, or does not fit its architecture.
    """
    backbone, card = load_network(path, network=network, num_heads=num_heads)
    return Backbone(backbone, card).eval(), Transform(card)
