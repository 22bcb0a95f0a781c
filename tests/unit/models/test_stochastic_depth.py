"""Stochastic depth that does not compute dropped branches."""

import math

import pytest
import torch
from torch import Tensor

from dinoscale.models.stochastic_depth import kept_subsets
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone

DEPTH, RATE = 4, 0.5
LAYOUT = ((6, 5), (8, 2))


def _uniforms(seed: int = 0, images: int = 14) -> Tensor:
    return torch.rand(DEPTH, 2, images, generator=torch.Generator().manual_seed(seed))


def _vit() -> VisionTransformer:
    torch.manual_seed(0)
    model = build_backbone(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=DEPTH, num_heads=2
    )
    assert isinstance(model, VisionTransformer)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.double()


def _crops() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(n, 3, side, side, generator=generator).double()
        for n, side in ((6, 32), (8, 16))
    ]


def test_kept_images_have_the_count_of_the_rule_and_the_largest_numbers() -> None:
    uniforms = _uniforms()
    blocks = kept_subsets(uniforms, LAYOUT, drop_path_rate=RATE)
    assert blocks[0] is None  # the first block never drops
    for index in range(1, DEPTH):
        subsets = blocks[index]
        assert subsets is not None
        rate = RATE * index / (DEPTH - 1)
        counts = [n - math.floor(n * rate) for n, _ in LAYOUT]
        for branch, subset in enumerate(subsets):
            assert subset.layout == ((counts[0], 5), (counts[1], 2))
            tokens = set(subset.rows.tolist())
            assert len(tokens) == len(subset.rows) == 5 * counts[0] + 2 * counts[1]
            for first, start, n, length, count in (
                (0, 0, 6, 5, counts[0]),
                (6, 30, 8, 2, counts[1]),
            ):
                best = uniforms[index, branch, first : first + n].topk(count).indices.tolist()
                wanted = {start + image * length + t for image in best for t in range(length)}
                assert wanted == {t for t in tokens if start <= t < start + n * length}
                of_group = (subset.rows >= start) & (subset.rows < start + n * length)
                assert (subset.weights[of_group] == n / count).all()


def _weights(counts: tuple[int, int]) -> set[float]:
    return {float(torch.tensor(n / count)) for (n, _), count in zip(LAYOUT, counts, strict=True)}


@pytest.mark.parametrize(("rate", "counts"), [(0.3, (4, 5)), (0.5, (3, 4)), (0.99, (1, 1))])
def test_a_uniform_rate_keeps_as_many_images_in_all_blocks(
    rate: float, counts: tuple[int, int]
) -> None:
    uniforms = _uniforms()
    for subsets in kept_subsets(uniforms, LAYOUT, drop_path_rate=rate, uniform=True):
        assert subsets is not None
        for subset in subsets:
            assert subset.layout == ((counts[0], 5), (counts[1], 2))
            assert set(subset.weights.flatten().tolist()) == _weights(counts)
    model, seen = _vit(), list[int]()
    model.subset_rate, model.subset_uniform = rate, True
    for block in model.blocks:
        first = block.get_submodule("mlp.fc1")
        first.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    model(_crops(), uniforms)
    assert seen == [17 * counts[0] + 5 * counts[1]] * DEPTH


def test_one_image_is_always_kept() -> None:
    (_, *blocks) = kept_subsets(_uniforms(images=2), ((1, 3), (1, 2)), drop_path_rate=0.99)
    assert blocks == [None] * (DEPTH - 1)


def _multipliers(uniforms: Tensor) -> Tensor:
    """The same choice as multipliers of all images, (depth, 2, N)."""
    keep = torch.zeros_like(uniforms)
    for index in range(DEPTH):
        for first, n in ((0, 6), (6, 8)):
            count = n - math.floor(n * RATE * index / (DEPTH - 1))
            best = first + uniforms[index, :, first : first + n].topk(count).indices
            keep[index].scatter_(1, best, n / count)
    return keep


@pytest.mark.parametrize("every", [0, 1])
def test_dropped_branches_equal_branches_multiplied_by_zero(every: int) -> None:
    model, crops, uniforms = _vit(), _crops(), _uniforms()
    parameters = list(model.parameters())
    plain = model(crops, _multipliers(uniforms))
    weights = torch.linspace(-1, 1, plain.numel()).view_as(plain)
    expected = torch.autograd.grad((plain * weights).sum(), parameters)
    model.subset_rate, model.checkpoint_every = RATE, every
    output = model(crops, uniforms)
    torch.testing.assert_close(output, plain)
    gradients = torch.autograd.grad((output * weights).sum(), parameters)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)  # of float64


def test_work_is_done_for_kept_images_only() -> None:
    model, seen = _vit(), []
    for block in model.blocks:
        first = block.get_submodule("mlp.fc1")
        first.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    model.subset_rate = RATE
    model(_crops(), _uniforms())
    tokens = ((6, 17), (8, 5))
    assert seen == [
        sum((n - math.floor(n * RATE * index / (DEPTH - 1))) * length for n, length in tokens)
        for index in range(DEPTH)
    ]


def test_gradient_flows_through_kept_images_only() -> None:
    model, uniforms = _vit(), _uniforms()
    tokens = torch.randn(6 * 5 + 8 * 2, 24, dtype=torch.float64, requires_grad=True)
    subsets = kept_subsets(uniforms, LAYOUT, drop_path_rate=RATE)[-1]
    assert subsets is not None
    output = model.blocks[-1](tokens, LAYOUT, subsets)
    (gradient,) = torch.autograd.grad(output.sum(), [tokens])
    kept = torch.zeros(len(tokens), dtype=torch.bool)
    for subset in subsets:
        kept[subset.rows] = True
    assert 0 < kept.sum() < len(tokens)
    assert torch.equal(gradient[~kept], torch.ones_like(gradient[~kept]))  # the residual's alone
    assert (gradient[kept] != 1).any(dim=1).all()


def test_mean_over_draws_is_the_full_branch() -> None:
    model, draws = _vit(), 400
    block, tokens = model.blocks[-1], torch.randn(6 * 5 + 8 * 2, 24).double()
    with torch.no_grad():
        for parameter in block.get_submodule("mlp.fc2").parameters():
            parameter.zero_()  # one branch: of two, the second sees the first's choice
        full = block(tokens, LAYOUT) - tokens
        total = torch.zeros_like(tokens)
        for draw in range(draws):
            subsets = kept_subsets(_uniforms(draw), LAYOUT, drop_path_rate=RATE)[-1]
            total += block(tokens, LAYOUT, subsets) - tokens
    # Half of the images are kept, at weight 2: one draw deviates by the branch itself.
    error = (total / draws - full).norm() / full.norm()
    assert error < 3 / draws**0.5


def test_rate_zero_computes_everything() -> None:
    model, crops = _vit(), _crops()
    assert kept_subsets(_uniforms(), LAYOUT, drop_path_rate=0.0) == [None] * DEPTH
    assert torch.equal(model(crops, torch.ones(DEPTH, 2, 14)), model(crops))
