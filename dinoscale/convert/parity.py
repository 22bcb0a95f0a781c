"""Proof that a written target equals its source: numbers, features, logits and preprocessing.

Shape letters: N images, P patches, D width, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoscale.convert.card import BackboneCard, Preprocessing
from dinoscale.convert.coverage import Coverage, coverage_of, listed
from dinoscale.convert.formats.convnets import BATCH_COUNT
from dinoscale.convert.weights import Adapted, Weights
from dinoscale.convert.weights_file import build, build_head
from dinoscale.errors import ConversionError
from dinoscale.models.block import add_adapters
from dinoscale.models.convnet import ConvNet
from dinoscale.models.heads import DinoHead
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone

# Largest difference over largest feature, between two programs that compute the same in float32.
MAX_DIFFERENCE = 1e-5
MIN_COSINE = 0.9999
# The same after merging adapters, computed in float64: merged numbers are rounded to float32 once,
# by 2**-24 of them at most, in other directions in each of a network's matrices.
MAX_MERGED_DIFFERENCE = 1e-6
# Cosine of every token with that of the float32 source, after rounding the weights to 16 bit.
MIN_COSINE_ROUNDED = 0.99

LOCAL_CROP = 96 / 224  # ratio of the second size to the first: that of local to global crops
_SEED = 0

# "cls" (N, D); of a ViT "patches" (N, P, D); with a projection head "logits" (N, K), and with one
# of the patch tokens "patch_logits" (N P, K)
Outputs = Mapping[str, Tensor]
Forward = Callable[[Tensor], Outputs]


@dataclass(frozen=True, eq=False)
class Reopened:
    """A target, opened by a program that is given nothing else.

    Attributes:
        forward: images (N, C, H, W) to outputs, float32.
        state: tensors under our names, those of heads after `head.` and `patch_head.`, and no
            others.
        descriptions: what each program that reads it learns about it: our card, or the part of it
            that another library can store.
        coverage: of the library's model by the files; None if `state` is all of it.
        on_meta: the forward on the meta device, which has shapes and no numbers; None if the files
            run nothing by themselves, or on a device that their runtime chooses. Call it last: it
            may empty the module that `forward` runs.
    """

    forward: Forward
    state: Mapping[str, Tensor]
    descriptions: tuple[BackboneCard | Preprocessing, ...]
    coverage: Coverage | None = None
    on_meta: Callable[[], Forward] | None = None


@dataclass(frozen=True)
class Agreement:
    """Agreement of two forwards on the same images.

    Attributes:
        size: height and width of the images in pixels.
        max_difference: largest difference of a feature, over the largest feature.
        cosine: smallest cosine similarity of a token.
    """

    size: tuple[int, int]
    max_difference: float
    cosine: float

    @property
    def equal(self) -> bool:
        """Whether the difference is within rounding; False for non-finite numbers."""
        return self.max_difference <= MAX_DIFFERENCE and self.cosine >= MIN_COSINE


def our_forward(
    backbone: VisionTransformer | ConvNet,
    head: DinoHead | None = None,
    patch_head: DinoHead | None = None,
) -> Forward:
    """The forward of one of our backbones, with its projection heads if there are any."""

    def forward(images: Tensor) -> Outputs:
        if isinstance(backbone, ConvNet):
            outputs: dict[str, Tensor] = {"cls": backbone([images])}
        else:
            tokens = backbone.features(images)
            p = backbone.patch_size
            num_patches = (images.shape[2] // p) * (images.shape[3] // p)
            outputs = {"cls": tokens[:, 0], "patches": tokens[:, -num_patches:]}
        if head is not None:
            outputs["logits"] = head(outputs["cls"])
        if patch_head is not None:
            outputs["patch_logits"] = patch_head(outputs["patches"].flatten(0, 1))
        return outputs

    return forward


def forward_of(weights: Weights) -> Forward:
    """The forward of weights, with their projection heads if they have any.

    Raises:
        CheckpointError: they do not fit their architecture.
    """
    backbone, _ = build(weights)
    heads = (
        None if state is None else build_head(state) for state in (weights.head, weights.patch_head)
    )
    return our_forward(backbone, *heads)


def require_merged(weights: Weights) -> Agreement | None:
    """Compare the features of merged adapters with those of the network that was trained.

    In float64, as the sums of a deep network in float32 would differ by more than the merging.
    Memory: 8 bytes per weight, of one of the networks at a time.

    Returns:
        Their agreement; None for weights without adapters.

    Raises:
        ConversionError: the features differ.
    """
    adapted, shape = weights.adapted, weights.card.backbone
    if adapted is None:
        return None

    def merged(images: Tensor) -> Outputs:
        return our_forward(build(weights)[0].double())(images.double())

    def apart(images: Tensor) -> Outputs:
        return our_forward(_with_adapters(adapted, weights).double())(images.double())

    found = compare(apart, merged, in_chans=shape.in_chans, size=shape.img_size)
    if not found.max_difference <= MAX_MERGED_DIFFERENCE:
        raise ConversionError(
            f"{weights.card.source}: with its adapters merged, features differ by"
            f" {found.max_difference:.2g} of the largest from those it was trained with (at most"
            f" {MAX_MERGED_DIFFERENCE:.0e}); nothing was written"
        )
    return found


def _with_adapters(adapted: Adapted, weights: Weights) -> VisionTransformer:
    with torch.device("meta"):  # skips the random initialisation
        backbone = build_backbone(**vars(weights.card.backbone))
        assert isinstance(backbone, VisionTransformer)
        add_adapters(backbone.blocks, rank=adapted.rank, alpha=adapted.alpha)
    backbone.load_state_dict(adapted.state, assign=True)
    return backbone.eval()


def to_meta(module: nn.Module, forward: Forward) -> Callable[[], Forward]:
    """`Reopened.on_meta` for a forward that runs `module`."""

    def moved() -> Forward:
        module.to("meta")
        return forward

    return moved


def second_size(img_size: int, *, patch_size: int) -> int:
    """Another image size for the comparison, in pixels: a multiple of the patch, not `img_size`."""
    patches = max(1, round(img_size * LOCAL_CROP / patch_size))
    return (patches if patches * patch_size != img_size else patches + 1) * patch_size


def compare(
    ours: Forward,
    theirs: Forward,
    *,
    in_chans: int,
    size: int | tuple[int, int],
    num_images: int = 2,
) -> Agreement:
    """Run both on the same seeded images.

    An output that `theirs` lacks, or gives in another shape, differs by infinity.

    Args:
        ours: a forward.
        theirs: another one.
        in_chans: channels of the images.
        size: height and width in pixels, or the side of a square.
        num_images: N.
    """
    generator = torch.Generator().manual_seed(_SEED)
    height, width = size if isinstance(size, tuple) else (size, size)
    images = torch.randn(num_images, in_chans, height, width, generator=generator)
    with torch.inference_mode():
        expected, found = ours(images), theirs(images)
    differences, cosines = [], []
    for name, ours_ in expected.items():
        theirs_ = found.get(name)
        if theirs_ is None or ours_.shape != theirs_.shape:
            return Agreement((height, width), float("inf"), float("nan"))
        differences.append(float((ours_ - theirs_).abs().max() / ours_.abs().max()))
        cosines.append(float(F.cosine_similarity(ours_, theirs_, dim=-1).min()))
    worst = torch.tensor([differences, cosines])  # max and min of tensors keep a NaN
    return Agreement((height, width), float(worst[0].max()), float(worst[1].min()))


def require_complete(reopened: Reopened, weights: Weights) -> Coverage:
    """Compare the tensors of a target, by name and shape, with the weights to write.

    Returns:
        The coverage, which is complete.

    Raises:
        ConversionError: some are missing, left over or of another shape.
    """
    expected = _expected(reopened, weights)
    found = {name: reopened.state[name] for name in expected if name in reopened.state}
    coverage = reopened.coverage or coverage_of(found, expected)
    for each in (coverage, coverage_of(found, expected)):
        if not each.complete:
            raise ConversionError(f"opened again, {each}; nothing was written")
    return coverage


def require_same(reopened: Reopened, weights: Weights) -> None:
    """Compare a complete target, number by number, and its descriptions with the weights to write.

    Raises:
        ConversionError: tensors hold other numbers, or the preprocessing differs.
    """
    expected = _expected(reopened, weights)
    changed = [name for name, x in expected.items() if not _equal(x, reopened.state[name])]
    if changed:
        raise ConversionError(
            f"opened again, {len(changed)} of {len(expected)} tensors hold other numbers:"
            f" {listed(changed)}; nothing was written"
        )
    for found in reopened.descriptions:
        is_card = isinstance(found, BackboneCard)
        wanted = weights.card if is_card else weights.card.preprocessing
        if found != wanted:
            raise ConversionError(
                f"opened again, it says {found}, and the source {wanted}; nothing was written"
            )


def _expected(reopened: Reopened, weights: Weights) -> dict[str, Tensor]:
    """Tensors that a target must hold, under the names of `Reopened.state`."""
    return {
        name: tensor
        for name, tensor in under_our_names(weights).items()
        if name in reopened.state or not name.endswith(BATCH_COUNT)  # graphs lack it
    }


def under_our_names(weights: Weights) -> dict[str, Tensor]:
    """All tensors as in `Reopened.state`: those of a head after its name."""
    parts = weights.parts()
    backbone = parts.pop("backbone")
    return backbone | {f"{p}.{name}": x for p, state in parts.items() for name, x in state.items()}


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether the numbers are equal, whatever their dtype."""
    return bool((one.double() == other.double()).all())


def require_any_device(reopened: Reopened, *, in_chans: int, size: int) -> None:
    """Run a target on the meta device, to prove that it is not tied to the CPU it was made on.

    Raises:
        ConversionError: some of its tensors stay on the CPU.
    """
    if reopened.on_meta is None:
        return
    images = torch.zeros(2, in_chans, size, size, device="meta")
    try:
        with torch.inference_mode():
            found = reopened.on_meta()(images)
        stayed = [name for name, output in found.items() if not output.is_meta]
    except (RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ConversionError(f"opened again, it runs on the CPU only: {reason}") from error
    if stayed:
        raise ConversionError(f"opened again, it runs on the CPU only: {', '.join(stayed)}")
