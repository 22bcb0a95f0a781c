"""Vision Transformer whose forward packs crops of all resolutions into one token sequence.

Each layer runs once per forward, on all tokens of all crops: linear layers and norms on the packed
(T, D) tokens, attention per resolution, no padding. Under ZeRO-3 every weight is gathered once.
Sub-modules and parameter names are those of the authors' code and of timm (`blocks.0.attn.qkv`).

Shape letters: N images, C channels, H, W pixels, p patch size, P patches and L tokens per image,
R registers, T tokens of all images together, M chosen patches, D width.
Source: Dosovitskiy et al. 2021 (arXiv:2010.11929); Caron et al. 2021 (arXiv:2104.14294); Oquab et
al. 2023 (arXiv:2304.07193) and Zhou et al. 2021 (arXiv:2111.07832) for masked patches.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dinoscale.models.activation_checkpointing import Recompute
from dinoscale.models.block import Block, Keep, Layout, Rotations, mask_key_bias
from dinoscale.models.cpu_bf16 import linear, upcast_linear
from dinoscale.models.rope import Rope, Rotation, rotation
from dinoscale.models.stochastic_depth import kept_subsets, per_token

PositionResize = Literal["by_factor", "by_size"]  # see `resize_pos_embed`


class PatchProjection(nn.Conv2d):
    """The p x p, stride p convolution of a ViT, as one matrix product over packed patches.

    Parameters have the names, shapes and initial values of `nn.Conv2d`.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """Project patches (T, C*p*p), from `patchify`, to (T, D)."""
        return linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Holds the projection, so that its name is `patch_embed.proj`."""

    def __init__(self, source: nn.Conv2d) -> None:
        super().__init__()
        self.proj = PatchProjection(
            source.in_channels,
            source.out_channels,
            kernel_size=(source.kernel_size[0], source.kernel_size[1]),
            stride=(source.kernel_size[0], source.kernel_size[1]),
            bias=source.bias is not None,
            device=source.weight.device,
            dtype=source.weight.dtype,
        )
        self.proj.load_state_dict(source.state_dict())

    def forward(self, patches: Tensor) -> Tensor:
        """Project patches (T, C*p*p) to (T, D)."""
        return self.proj(patches)  # type: ignore[no-any-return]  # nn.Module calls are untyped


def patchify(images: Tensor, *, patch_size: int) -> Tensor:
    """Cut images (N, C, H, W) into patches (N*P, C*p*p), row by row, channels outermost.

    Pixels at the right and lower edge that do not fill a patch are dropped, as by a convolution.
    """
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    whole = images[:, :, : rows * patch_size, : columns * patch_size]
    pattern = "n c (rows p) (columns q) -> (n rows columns) (c p q)"
    return rearrange(whole, pattern, p=patch_size, q=patch_size)


def position_rule(chosen: PositionResize | None, *, registers: bool) -> PositionResize:
    """The rule of `resize_pos_embed` by which the authors train a model, unless one is chosen."""
    return chosen or ("by_size" if registers else "by_factor")


def resize_pos_embed(
    pos_embed: Tensor,
    *,
    image_size: tuple[int, int],
    patch_size: int,
    num_prefix: int = 1,
    rule: PositionResize = "by_factor",
) -> Tensor:
    """Bicubic resize of a square grid of position embeddings to the grid of an image.

    by_factor: sampling positions follow the scale factor ((rows + 0.1) / side, (columns + 0.1) /
    side), not the output size: published weights were trained with the 0.1 (the authors' guard
    against rounding), and another rule moves features by some percent. No antialiasing. by_size:
    to the output size, antialiased, as DINOv2's models with registers and timm. Both leave a
    square image with as many patches as are stored unchanged.

    Args:
        pos_embed: (1, num_prefix + side**2, D); computed in float32, or float64 if it is.
        image_size: (H, W) in pixels.
        patch_size: p in pixels.
        num_prefix: leading slots that belong to the class token and registers; not resized.
        rule: by_factor or by_size.

    Returns:
        (1, num_prefix + rows*columns, D), dtype of `pos_embed`, differentiable.

    Raises:
        ValueError: the stored grid is not square, or the image is smaller than a patch.
    """
    height, width = image_size
    rows, columns = height // patch_size, width // patch_size
    num_stored = pos_embed.shape[1] - num_prefix
    if rows * columns == num_stored and height == width:
        return pos_embed
    side = math.isqrt(num_stored)
    if side**2 != num_stored or rows * columns == 0:
        raise ValueError(f"cannot resize {num_stored} positions to {rows} x {columns}")
    maps = pos_embed[:, num_prefix:].transpose(1, 2).reshape(1, -1, side, side)
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if rule == "by_size":
        resized = F.interpolate(
            maps, size=(rows, columns), mode="bicubic", align_corners=False, antialias=True
        )
    else:
        factors = (rows + 0.1) / side, (columns + 0.1) / side
        resized = F.interpolate(maps, scale_factor=factors, mode="bicubic", align_corners=False)
    if resized.shape[2:] != (rows, columns):
        raise ValueError(f"resize gave {[*resized.shape[2:]]} instead of {rows} x {columns}")
    patches = resized.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # (1, P, D)
    return torch.cat((pos_embed[:, :num_prefix], patches), dim=1)


class VisionTransformer(nn.Module):
    """ViT over crops of several resolutions, one forward for all of them.

    Attributes:
        embed_dim: D.
        depth: number of blocks.
        patch_size: p in pixels.
        checkpoint_every: recompute every k-th block in the backward pass instead of storing its
            activations; 0 stores all.
        recompute: which activations of such a block are recomputed.
        position_resize: rule of `resize_pos_embed`.
        rope: how queries and keys rotate, in place of a position embedding; None for none.
        subset_rate: rate of stochastic depth at which dropped branches are not computed; 0 computes
            all branches and multiplies them by `keep`.
        subset_uniform: whether it is the rate of all blocks, or rises linearly to the last.
        compiled_for: layouts whose forward runs compiled blocks; others run eagerly, so that
            evaluation at many sizes compiles nothing.
    """

    def __init__(
        self,
        source: Any,
        *,
        mask_token: bool = False,
        position_resize: PositionResize | None = None,
        rope: Rope | None = None,
        key_bias_masked: bool = False,
        local_norm: bool = False,
    ) -> None:
        """Adopt the layers of `source`, a timm ViT accepted by `zoo.adopt`.

        Args:
            source: do not use it afterwards. Its `pos_embed` may have slots for all special tokens,
                for the class token alone or for none; it is None with `rope`.
            mask_token: add a trained embedding for masked patches, which starts at zero.
            position_resize: rule of `resize_pos_embed`; None for `position_rule`'s.
            rope: rotate queries and keys of patches.
            key_bias_masked: the keys' third of `attn.qkv.bias` does not act.
            local_norm: add a final norm for the class tokens of local crops, see `forward`.
        """
        super().__init__()
        self.embed_dim: int = source.embed_dim
        self.depth = len(source.blocks)
        self.patch_size: int = source.patch_embed.proj.kernel_size[0]
        self.checkpoint_every = 0
        self.recompute: Recompute = "block"
        self.subset_rate = 0.0
        self.subset_uniform = False
        self.compiled_for: frozenset[Layout] = frozenset()
        self.cls_token = source.cls_token
        self.reg_token = source.reg_token
        self.pos_embed = source.pos_embed
        self.mask_token = nn.Parameter(torch.zeros(1, self.embed_dim)) if mask_token else None
        self.patch_embed = PatchEmbed(source.patch_embed.proj)
        self.norm_pre = source.norm_pre
        self.blocks = nn.ModuleList(Block(block) for block in source.blocks)
        self.norm = source.norm
        self.local_norm = (
            type(source.norm)(self.embed_dim, eps=source.norm.eps) if local_norm else None
        )
        upcast_linear(self.blocks)
        if key_bias_masked:
            mask_key_bias(self.blocks)
        self.rope = rope
        num_registers = 0 if self.reg_token is None else self.reg_token.shape[1]
        self.position_resize = position_rule(position_resize, registers=num_registers > 0)
        self._num_prefix = 1 + num_registers
        # Slots of pos_embed before the patches: of all special tokens, of the class token alone
        # (DINOv2's registers have none), or of none (in timm, where the token includes it).
        self._prefix_slots: int = 0
        if self.pos_embed is not None:
            self._prefix_slots = self.pos_embed.shape[1] - source.patch_embed.num_patches

    def forward(
        self,
        crops: Sequence[Tensor],
        keep: Tensor | None = None,
        *,
        masks: Tensor | None = None,
        patch_rows: Tensor | None = None,
        coordinates: Tensor | None = None,
        all_patches: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the normalised class token of every image, and patch tokens if they are wanted.

        The first tensor holds the global crops, others local ones, whose class tokens have a final
        norm of their own in a model with `local_norm`.

        Args:
            crops: tensors (N_i, C, H_i, W_i), normalised pixels.
            keep: stochastic depth multipliers (depth, 2, sum N_i) from `stochastic_depth_keep`,
                images in the order of `crops`; with a `subset_rate`, the uniform numbers from which
                these are computed; None for no stochastic depth.
            masks: bool (N, P) over the images of the first tensor, or of all of the first
                resolution: the embeddings of these patches become the mask token, before positions
                are added; None masks nothing, and then the mask token has no gradient.
            patch_rows: int64 (M,), indices into the N*P patches of the first resolution.
            coordinates: changes of the coordinates of `rope` (resolutions, depth, 5), see
                `rope.coordinate_changes`; there may be more resolutions. None for none.
            all_patches: return those of all images of the first tensor, whatever `patch_rows` is.

        Returns:
            Class tokens (sum N_i, D), rows in the order of `crops`; with `patch_rows`, these and
            the chosen patch tokens (M, D), with `all_patches` (N_0, P, D).

        Raises:
            ValueError: there are no crops, `keep` or `masks` has another shape, or there are masks
                and no mask token.
        """
        tokens, layout, grids = self._embed(crops, masks)
        rotations = self._rotations(grids, tokens, coordinates)
        tokens = self._run(tokens, layout, keep, rotations, range(self.depth))
        groups = torch.split(tokens, [n * length for n, length in layout])
        rows = [torch.unflatten(x, 0, at)[:, 0] for x, at in zip(groups, layout, strict=True)]
        local = None
        if self.local_norm is not None and len(crops) > 1:
            images = torch.cat(rows)
            local = self.local_norm(images[len(crops[0]) :])
            rows = [images[: len(crops[0])]]
        patches = None
        if all_patches:
            patches = torch.unflatten(groups[0], 0, layout[0])[: len(crops[0]), self._num_prefix :]
        elif patch_rows is not None:
            patches = groups[0].index_select(0, self._tokens_of_patches(patch_rows, layout))
        if patches is not None:
            rows.append(patches.reshape(-1, self.embed_dim))
        normalised: Tensor = self.norm(torch.cat(rows))
        if patches is not None:
            of_patches = normalised[len(normalised) - len(rows[-1]) :].view(patches.shape)
            normalised = normalised[: len(normalised) - len(rows[-1])]
        if local is not None:
            normalised = torch.cat((normalised, local))
        return normalised if patches is None else (normalised, of_patches)

    def _tokens_of_patches(self, patch_rows: Tensor, layout: Layout) -> Tensor:
        """Rows among the packed tokens of patches of the first resolution."""
        num_patches = layout[0][1] - self._num_prefix
        return patch_rows + self._num_prefix * (patch_rows // num_patches + 1)

    def features(self, images: Tensor) -> Tensor:
        """Return all normalised tokens of images (N, C, H, W): (N, 1+R+P, D), class token first."""
        return self.intermediate(images, 1)[0]

    def intermediate(self, images: Tensor, n: int) -> list[Tensor]:
        """Return the last n blocks' tokens, each through the final norm.

        Args:
            images: (N, C, H, W), one resolution.
            n: number of blocks, 1 <= n <= depth.

        Returns:
            n tensors (N, 1+R+P, D), the last block last.

        Raises:
            ValueError: n is outside its range.
        """
        if not 1 <= n <= self.depth:
            raise ValueError(f"need 1 <= n <= {self.depth}, got {n}")
        tokens, layout, grids = self._embed([images])
        rotations = self._rotations(grids, tokens)
        outputs = []
        for index in range(self.depth):
            tokens = self._run(tokens, layout, None, rotations, range(index, index + 1))
            if index >= self.depth - n:
                outputs.append(torch.unflatten(self.norm(tokens), 0, layout[0]))
        return outputs

    def patch_maps(self, images: Tensor, n: int) -> list[Tensor]:
        """Return the last n blocks' patch tokens by place, each through the final norm.

        Arguments and errors as of `intermediate`.

        Returns:
            n tensors (N, H / patch size, W / patch size, D), the last block last.
        """
        grid = [side // self.patch_size for side in images.shape[2:]]
        blocks = self.intermediate(images, n)
        return [torch.unflatten(tokens[:, self._num_prefix :], 1, grid) for tokens in blocks]

    def last_attention(self, images: Tensor, *, queries: int | None = None) -> Tensor:
        """Return the attention of the last block over images (N, C, H, W): (N, heads, L, L).

        Rows sum to 1; L = 1+R+P, class token first. float32, or float64 for a float64 model. With
        `queries`, only the rows of the first `queries` tokens, (N, heads, queries, L): for the
        class token alone, memory does not grow with L squared.
        """
        tokens, layout, rotations = self._before_last(images)
        last: Any = self.blocks[-1]
        return last.attn.weights(last.norm1(tokens), layout, rotations[-1], queries=queries)  # type: ignore[no-any-return]

    def last_keys(self, images: Tensor) -> Tensor:
        """Return the keys of the last block over images (N, C, H, W): (N, 1+R+P, D).

        Those of all heads side by side, class token first, as the layer gives them: before any norm
        of keys, and before they rotate with their positions.
        """
        tokens, layout, _ = self._before_last(images)
        last: Any = self.blocks[-1]
        _, keys, _ = last.attn.qkv(last.norm1(tokens)).chunk(3, dim=-1)
        return torch.unflatten(keys, 0, layout[0])

    def _before_last(self, images: Tensor) -> tuple[Tensor, Layout, list[Rotations]]:
        """Packed tokens (T, D) of images that enter the last block; their layout and rotations."""
        tokens, layout, grids = self._embed([images])
        rotations = self._rotations(grids, tokens)
        tokens = self._run(tokens, layout, None, rotations, range(self.depth - 1))
        return tokens, layout, rotations

    def positions(self, *, height: int, width: int, of: Tensor | None = None) -> Tensor:
        """The position embedding for images of this size in pixels, from `resize_pos_embed`.

        `of` is another one to be resized, with the same slots of special tokens.

        Raises:
            ValueError: the model has none.
        """
        if self.pos_embed is None:
            raise ValueError("a model with rotary positions has no position embedding")
        return resize_pos_embed(
            self.pos_embed if of is None else of,
            image_size=(height, width),
            patch_size=self.patch_size,
            num_prefix=self._prefix_slots,
            rule=self.position_resize,
        )

    def layout_of(self, crops: Sequence[tuple[int, int]]) -> Layout:
        """Layout of square crops, given as (images, side in pixels) in the order of a forward."""
        meta = [torch.empty(n, 0, side, side, device="meta") for n, side in crops]
        return tuple(
            (len(images), self._num_prefix + (images.shape[-1] // self.patch_size) ** 2)
            for images in group_by_resolution(meta)
        )

    def _embed(
        self, crops: Sequence[Tensor], masks: Tensor | None = None
    ) -> tuple[Tensor, Layout, list[tuple[int, int]]]:
        """Packed tokens (T, D) of all crops with positions, their layout, and grids of patches."""
        groups = group_by_resolution(crops)
        patches = [patchify(images, patch_size=self.patch_size) for images in groups]
        projected = self.patch_embed(torch.cat(patches)).split([len(x) for x in patches])
        tokens, layout, grids = [], list[tuple[int, int]](), list[tuple[int, int]]()
        for images, x in zip(groups, projected, strict=True):
            n = len(images)
            height, width = images.shape[2:]
            x = torch.unflatten(x, 0, (n, -1))  # (N, P, D)
            if masks is not None and not layout:
                x = self._masked(x, masks, num_first=len(crops[0]))
            special, x = self._with_positions(x, height=height, width=width)
            x = torch.cat((special.expand(n, -1, -1), x), dim=1)  # (N, L, D)
            layout.append((n, x.shape[1]))
            grids.append((height // self.patch_size, width // self.patch_size))
            tokens.append(x.flatten(0, 1))
        return self.norm_pre(torch.cat(tokens)), tuple(layout), grids

    def _with_positions(self, patches: Tensor, *, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Special tokens (1, 1+R, D) and patch embeddings (N, P, D) with learned positions."""
        slots = self._prefix_slots
        if self.pos_embed is None:
            return self._special_tokens(self.cls_token[:, :0]), patches
        positions = self.positions(height=height, width=width)
        return self._special_tokens(positions[:, :slots]), patches + positions[:, slots:]

    def _special_tokens(self, positions: Tensor) -> Tensor:
        """Class token and registers (1, 1+R, D), with the positions (1, slots, D) they have."""
        tokens = self.cls_token
        if self._prefix_slots == 1:
            tokens = tokens + positions
        if self.reg_token is not None:
            tokens = torch.cat((tokens, self.reg_token), dim=1)
        return tokens + positions if self._prefix_slots > 1 else tokens  # type: ignore[no-any-return]  # of timm, untyped

    def _masked(self, patches: Tensor, masks: Tensor, *, num_first: int) -> Tensor:
        """Patch embeddings (N, P, D) with the mask token at the masked patches.

        The first tensor of crops has `num_first` of the N images; others may be as large as these.
        """
        if self.mask_token is None:
            raise ValueError("masks: the model was built without a mask token")
        if len(masks) == num_first < len(patches):
            unmasked = masks.new_zeros(len(patches) - num_first, *masks.shape[1:])
            masks = torch.cat((masks, unmasked))
        if masks.shape != patches.shape[:2]:
            raise ValueError(
                f"masks: need shape {[*patches.shape[:2]]} (images and patches of the first "
                f"resolution), got {[*masks.shape]}"
            )
        return torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)

    def _rotations(
        self,
        grids: Sequence[tuple[int, int]],
        like: Tensor,
        coordinates: Tensor | None = None,
    ) -> list[Rotations]:
        """The rotations of each block, for each of the resolutions with these grids of patches."""
        if self.rope is None:
            return [None] * self.depth
        attention: Any = self.blocks[0].attn
        tables = []
        for index, grid in enumerate(grids):
            of_blocks = rotation(
                self.rope,
                grid,
                num_special=self._num_prefix,
                head_dim=attention.head_dim,
                changes=None if coordinates is None else coordinates[index],
                dtype=torch.promote_types(like.dtype, torch.float32),
                device=like.device,
            )
            shape = (self.depth, *of_blocks.cos.shape[-2:])
            tables.append(Rotation(*(table.expand(shape) for table in of_blocks)))
        return [
            tuple(Rotation(table.cos[block], table.sin[block]) for table in tables)
            for block in range(self.depth)
        ]

    def _run(
        self,
        tokens: Tensor,
        layout: Layout,
        keep: Tensor | None,
        rotations: Sequence[Rotations],
        which: range,
    ) -> Tensor:
        """Packed tokens (T, D) after the blocks of `which`."""
        keeps = self._keep_per_block(keep, layout)
        compiled = layout in self.compiled_for
        for index in which:
            tokens = self.blocks[index](
                tokens,
                layout,
                keeps[index],
                rotations[index],
                recompute=self.recompute if self._checkpoints(index) else None,
                compiled=compiled,
            )
        return tokens

    def _keep_per_block(self, keep: Tensor | None, layout: Layout) -> Sequence[Keep]:
        """The `keep` argument of each block."""
        if keep is None:
            return [None] * self.depth
        wanted = (self.depth, 2, sum(n for n, _ in layout))
        if keep.shape != wanted:
            raise ValueError(f"keep: need shape {[*wanted]}, got {[*keep.shape]}")
        if self.subset_rate:
            return kept_subsets(
                keep, layout, drop_path_rate=self.subset_rate, uniform=self.subset_uniform
            )
        return per_token(keep, layout).unbind()

    def _checkpoints(self, index: int) -> bool:
        return self.checkpoint_every > 0 and index % self.checkpoint_every == 0


def group_by_resolution(crops: Sequence[Tensor]) -> list[Tensor]:
    """Join neighbours of one resolution: fewer, larger attention calls."""
    if not crops:
        raise ValueError("need at least one tensor of crops")
    runs: list[list[Tensor]] = []
    for images in crops:
        if runs and runs[-1][0].shape[1:] == images.shape[1:]:
            runs[-1].append(images)
        else:
            runs.append([images])
    return [run[0] if len(run) == 1 else torch.cat(run) for run in runs]
