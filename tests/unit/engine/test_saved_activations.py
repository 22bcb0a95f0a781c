"""What activation checkpointing saves, and that it changes no number."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import CheckpointPolicy

from dinoscale.models.activation_checkpointing import Recompute, _keep_products_too
from dinoscale.models.stochastic_depth import stochastic_depth_keep
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone
from dinoscale.planning.bench.tensor_memory import live_bytes, with_peak_bytes

DEPTH = 6


def _backward(every: int) -> tuple[int, list[Tensor]]:
    """Bytes that a packed forward leaves allocated for its backward, and the gradients."""
    torch.manual_seed(0)
    model = build_backbone(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=DEPTH, num_heads=2
    )
    assert isinstance(model, VisionTransformer)
    model.checkpoint_every = every
    crops = [torch.randn(8, 3, 32, 32), torch.randn(16, 3, 16, 16)]
    keep = stochastic_depth_keep(torch.rand(DEPTH, 2, 24), drop_path_rate=0.5)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(crops, keep)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    # Allocated and not freed by the end of the forward: the output, and what the backward needs.
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return kept, [gradient for gradient in gradients if gradient is not None]


def test_checkpointed_blocks_keep_only_their_input() -> None:
    bytes_kept = {every: _backward(every)[0] for every in (0, 1, 2, 3)}
    of_block = (bytes_kept[0] - bytes_kept[1]) / DEPTH  # more than its input, which stays
    assert bytes_kept[1] < 0.35 * bytes_kept[0]
    for every, recomputed in ((2, 3), (3, 2)):
        expected = bytes_kept[0] - recomputed * of_block
        assert bytes_kept[every] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("every", [1, 2, 4, DEPTH + 1])
def test_gradients_are_bitwise_those_without_recomputation(every: int) -> None:
    _, expected = _backward(0)
    _, actual = _backward(every)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def _peak(recompute: Recompute | None, dtype: torch.dtype) -> tuple[int, list[Tensor]]:
    """Bytes beyond the weights at the peak of forward and backward, and the gradients."""
    torch.manual_seed(0)
    model = build_backbone(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=24, depth=DEPTH, num_heads=2
    ).to(dtype)
    assert isinstance(model, VisionTransformer)
    if recompute is not None:
        model.checkpoint_every, model.recompute = 1, recompute
    crops = [torch.randn(8, 3, side, side).to(dtype) for side in (64, 32)]
    keep = stochastic_depth_keep(torch.rand(DEPTH, 2, 16), drop_path_rate=0.5)
    before = live_bytes()
    _, peak = with_peak_bytes(lambda: model(crops, keep).square().sum().backward())
    gradients = [parameter.grad for parameter in model.parameters()]
    return peak - before, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_kind_of_recomputation_takes_less_memory_and_changes_no_bit(
    dtype: torch.dtype,
) -> None:
    most, expected = _peak(None, dtype)
    # They keep 10, 2 and 1 of 10 activations; gradients and the block at hand come on top.
    kinds: list[tuple[Recompute, float]] = [
        ("pointwise", 1.001),
        ("all_but_attention", 0.6),
        ("block", 0.6),
    ]
    for kind, share in kinds:
        peak, gradients = _peak(kind, dtype)
        assert len(gradients) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
        assert peak < share * most


@pytest.mark.parametrize(
    ("into", "out", "kept"),
    [
        *((24, 72, True), (24, 24, True), (24, 96, True), (96, 24, False)),  # qkv, projection, MLP
        *((24, 4, False), (4, 72, False), (4, 24, False), (96, 4, False)),  # adapters of rank 4
    ],
)
def test_the_products_of_adapters_are_not_kept(into: int, out: int, kept: bool) -> None:
    tokens, weight, bias = (torch.empty(*shape) for shape in ((10, into), (into, out), (out,)))
    expected = CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
    aten = torch.ops.aten
    for operator, inputs in (
        (aten.mm.default, (tokens, weight)),
        (aten.addmm.default, (bias, tokens, weight)),
    ):
        assert _keep_products_too(None, operator, *inputs, width=24) == expected
