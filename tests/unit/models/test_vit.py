from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.profiler import ProfilerActivity, profile

from dinoscale.models.block import Block, Subset, _add
from dinoscale.models.stochastic_depth import stochastic_depth_keep
from dinoscale.models.vit import (
    PatchProjection,
    VisionTransformer,
    patchify,
    resize_pos_embed,
)
from dinoscale.models.zoo import build_backbone

DEPTH = 3


def _vit(name: str = "vit_tiny_patch16_224", **changes: Any) -> VisionTransformer:
    """A small model with large random weights, so that every layer matters; in float64."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": DEPTH, "num_heads": 3}
    model = build_backbone(name, **(sizes | changes))
    assert isinstance(model, VisionTransformer)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def _crops(*shapes: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random crops of (images, height, width)."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, h, w, generator=generator).to(dtype) for n, h, w in shapes]


MIXED = ((2, 32, 32), (1, 32, 32), (3, 16, 16), (2, 24, 40), (1, 24, 16))


def _keep(num_images: int, rate: float = 0.7) -> Tensor:
    uniforms = torch.rand(DEPTH, 2, num_images, generator=torch.Generator().manual_seed(2))
    return stochastic_depth_keep(uniforms, drop_path_rate=rate)


def _gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((output * weights).sum(), parameters), strict=True))


@pytest.mark.parametrize("with_keep", [False, True])
def test_packed_forward_equals_one_forward_per_image(with_keep: bool) -> None:
    model, crops = _vit(), _crops(*MIXED)
    keep = _keep(9) if with_keep else None
    images = [image[None] for group in crops for image in group]
    separate = [
        model([image], None if keep is None else keep[:, :, i : i + 1])
        for i, image in enumerate(images)
    ]
    packed = model(crops, keep)
    torch.testing.assert_close(packed, torch.cat(separate))
    ours, theirs = _gradients(model, packed), _gradients(model, torch.cat(separate))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)


def test_rows_keep_the_order_of_the_crops() -> None:
    model, crops = _vit(), _crops(*MIXED)
    backwards = model(crops[::-1])
    parts = torch.split(backwards, [len(group) for group in crops[::-1]])
    torch.testing.assert_close(model(crops), torch.cat(parts[::-1]))


def test_every_layer_runs_once_for_all_resolutions() -> None:
    model = _vit()
    calls: Counter[nn.Module] = Counter()
    for module in model.modules():
        module.register_forward_hook(lambda layer, *_: calls.update([layer]))
    model(_crops(*MIXED))
    owners = [m for m in model.modules() if [*m.parameters(recurse=False)]]
    assert {calls[module] for module in owners} == {1}


def test_patch_projection_is_the_convolution() -> None:
    torch.manual_seed(0)
    projection = PatchProjection(3, 5, kernel_size=(4, 4), stride=(4, 4))
    images = torch.randn(2, 3, 8, 14)  # the last two columns do not fill a patch
    convolved = F.conv2d(images, projection.weight, projection.bias, stride=4)
    ours = projection(patchify(images, patch_size=4))
    torch.testing.assert_close(ours, convolved.flatten(2).transpose(1, 2).flatten(0, 1))


def _grid(side: int) -> Tensor:
    """Random position embedding (1, 1 + side**2, 2)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 1 + side**2, 2, generator=generator, dtype=torch.float64)


def _sampling(side: int, count: int) -> Tensor:
    """Matrix (count, side) of cubic convolution with A = -0.75 at the reference's positions."""
    matrix = torch.zeros(count, side, dtype=torch.float64)
    for i in range(count):
        position = (i + 0.5) / ((count + 0.1) / side) - 0.5
        for j in range(int(position + 2) - 3, int(position + 2) + 1):
            x = abs(position - j)
            near = 1.25 * x**3 - 2.25 * x**2 + 1
            far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, min(max(j, 0), side - 1)] += near if x <= 1 else far
    return matrix


@pytest.mark.parametrize(("height", "width"), [(96, 96), (96, 448), (112, 80), (480, 224)])
def test_pos_embed_is_sampled_where_the_reference_samples_it(height: int, width: int) -> None:
    pos_embed = _grid(14)
    resized = resize_pos_embed(pos_embed, image_size=(height, width), patch_size=16)
    rows, columns = _sampling(14, height // 16), _sampling(14, width // 16)
    grid = pos_embed[0, 1:].view(14, 14, 2)
    expected = torch.einsum("ri,cj,ijd->rcd", rows, columns, grid).flatten(0, 1)
    torch.testing.assert_close(resized[0, 1:], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(resized[:, 0], pos_embed[:, 0])


def test_pos_embed_resize_differs_from_a_resize_by_size() -> None:
    torch.manual_seed(0)
    pos_embed = torch.randn(1, 197, 8)
    ours = resize_pos_embed(pos_embed, image_size=(96, 96), patch_size=16)[:, 1:]
    maps = pos_embed[:, 1:].transpose(1, 2).reshape(1, 8, 14, 14)
    by_size = F.interpolate(maps, size=(6, 6), mode="bicubic").flatten(2).transpose(1, 2)
    assert (ours - by_size).norm() > 0.1 * by_size.norm()


def test_positions_follow_the_rule_of_the_model() -> None:
    plain, registers = _vit(), _vit(registers=2)
    chosen = _vit(position_resize="by_size"), _vit(registers=2, position_resize="by_factor")
    for model, by_size in zip((plain, registers, *chosen), (False, True, True, False), strict=True):
        maps = model.pos_embed[:, 1:].transpose(1, 2).reshape(1, 24, 4, 4)
        expected = F.interpolate(maps, size=(2, 3), mode="bicubic", antialias=True)
        ours = model.positions(height=16, width=24)
        assert torch.equal(ours[:, :1], model.pos_embed[:, :1])
        same = torch.allclose(ours[:, 1:], expected.flatten(2).transpose(1, 2))
        assert same == by_size
        assert torch.equal(model.positions(height=32, width=32), model.pos_embed)


def test_registers_have_no_positions() -> None:
    model, (images,) = _vit(registers=2), _crops((2, 16, 24))
    tokens, layout, _ = model._embed([images])
    special = tokens.unflatten(0, layout[0])[:, :3]
    expected = torch.cat((model.cls_token + model.pos_embed[:, :1], model.reg_token), dim=1)
    assert torch.equal(special, expected.expand(2, -1, -1))


def test_pos_embed_stays_only_for_a_square_of_as_many_patches() -> None:
    pos_embed = _grid(4)
    assert resize_pos_embed(pos_embed, image_size=(32, 32), patch_size=8) is pos_embed
    for size in ((64, 16), (36, 32)):  # 8 x 2 patches; 4 x 4 patches of an image not square
        resized = resize_pos_embed(pos_embed, image_size=size, patch_size=8)
        assert resized.shape == pos_embed.shape
        assert not torch.equal(resized, pos_embed)


def test_pos_embed_of_low_precision_is_resized_in_float32() -> None:
    torch.manual_seed(0)
    pos_embed = torch.randn(1, 17, 4).bfloat16()
    low = resize_pos_embed(pos_embed, image_size=(48, 48), patch_size=8)
    exact = resize_pos_embed(pos_embed.float(), image_size=(48, 48), patch_size=8)
    assert torch.equal(low, exact.bfloat16())


def test_gradients_reach_every_parameter_from_small_crops_alone() -> None:
    model = _vit()
    gradients = _gradients(model, model(_crops((2, 16, 16))))
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(("every", "recomputed"), [(1, [2, 2, 2]), (2, [2, 1, 2]), (3, [2, 1, 1])])
def test_checkpointing_changes_no_number_and_recomputes(every: int, recomputed: list[int]) -> None:
    model, crops, keep = _vit(), _crops(*MIXED), _keep(9)
    plain = model(crops, keep)
    expected = _gradients(model, plain)
    runs = [0] * DEPTH

    def count(index: int) -> None:
        runs[index] += 1

    for index, block in enumerate(model.blocks):
        norm = block.get_submodule("norm1")
        norm.register_forward_pre_hook(lambda *_, index=index: count(index))
    model.checkpoint_every = every
    output = model(crops, keep)
    assert torch.equal(output, plain)
    gradients = _gradients(model, output)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert runs == recomputed
    with torch.no_grad():
        assert torch.equal(model(crops, keep), plain)


def test_keep_statistics_follow_the_linear_rule() -> None:
    uniforms = torch.rand(4, 2, 20000, generator=torch.Generator().manual_seed(0))
    keep = stochastic_depth_keep(uniforms, drop_path_rate=0.3)
    assert torch.equal(keep[0], torch.ones(2, 20000))
    for index, rate in enumerate((0, 0.1, 0.2, 0.3)):
        for branch in keep[index]:
            assert branch.eq(0).float().mean().item() == pytest.approx(rate, abs=0.01)
            assert branch.max().item() == pytest.approx(1 / (1 - rate))
            assert branch.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(stochastic_depth_keep(uniforms, drop_path_rate=0.0), torch.ones(4, 2, 20000))
    uniform = stochastic_depth_keep(uniforms, drop_path_rate=0.3, uniform=True)
    assert torch.equal(uniform, (uniforms >= 0.3) / (1 - torch.tensor(0.3)))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_drop_path_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="need 0 <= drop_path_rate < 1"):
        stochastic_depth_keep(torch.rand(2, 2, 2), drop_path_rate=rate)


def test_dropped_branches_leave_the_tokens_as_they_are() -> None:
    model, crops = _vit(), _crops((2, 32, 32))
    keep = torch.zeros(DEPTH, 2, 2)
    keep[:, :, 1] = 1  # the second image keeps everything
    output = model(crops, keep)
    first = model.norm(model.cls_token + model.pos_embed[:, :1])[0]
    torch.testing.assert_close(output[:1], first)
    torch.testing.assert_close(output[1:], model(crops)[1:])


@pytest.mark.parametrize("as_subset", [False, True])
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
def test_multipliers_of_a_bf16_network_are_exact_on_average(rate: float, as_subset: bool) -> None:
    count, factor = 2**16, torch.full((2**16, 1), 1 / (1 - rate))  # 1.1111 would be 1.1094 in bf16
    branch = torch.rand(count, 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    layout = ((count, 1),)
    keep = Subset(torch.arange(count), factor, layout) if as_subset else factor
    added = _add(torch.zeros_like(branch), layout, keep, lambda *_: branch)
    assert added.dtype == torch.bfloat16
    mean = float(added.double().mean() / branch.double().mean())
    assert mean * (1 - rate) == pytest.approx(1, abs=1e-4)


def test_attention_and_mlp_branches_have_their_own_multipliers() -> None:
    block, tokens = _vit().blocks[0], torch.randn(5, 24, dtype=torch.float64)
    assert isinstance(block, Block)
    keep = torch.stack((torch.full((5, 1), 2.0), torch.full((5, 1), 0.5)))
    middle = tokens + 2 * block.attn(block.norm1(tokens), ((1, 5),))
    expected = middle + 0.5 * block.mlp(block.norm2(middle))
    torch.testing.assert_close(block(tokens, ((1, 5),), keep), expected)


def test_wrong_inputs_are_refused() -> None:
    model = _vit()
    with pytest.raises(ValueError, match="at least one tensor of crops"):
        model([])
    with pytest.raises(ValueError, match=r"keep: need shape \[3, 2, 2\], got \[3, 2, 3\]"):
        model(_crops((2, 32, 32)), _keep(3))
    with pytest.raises(ValueError, match="need 1 <= n <= 3, got 4"):
        model.intermediate(_crops((2, 32, 32))[0], 4)


@pytest.mark.parametrize("depth", [1, 3])
def test_features_and_attention_belong_to_the_forward(depth: int) -> None:
    model, (images,) = _vit(depth=depth), _crops((2, 24, 40))
    features = model.features(images)
    torch.testing.assert_close(features[:, 0], model([images]))
    assert features.shape == (2, 16, 24)
    intermediate = model.intermediate(images, depth)
    assert len(intermediate) == depth
    assert torch.equal(intermediate[-1], features)
    attention = model.last_attention(images)
    assert attention.shape == (2, 3, 16, 16)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 16).double())


def test_last_attention_is_the_one_the_last_block_uses() -> None:
    model, (images,) = _vit(), _crops((2, 32, 32))
    seen: dict[str, Any] = {}
    attention = model.blocks[-1].get_submodule("attn")
    attention.register_forward_pre_hook(lambda _, args: seen.update(tokens=args[0]))
    attention.get_submodule("proj").register_forward_pre_hook(
        lambda _, args: seen.update(mixed=args[0])
    )
    model([images])
    values = attention.get_submodule("qkv")(seen["tokens"])[:, 48:].view(2, 17, 3, 8)
    mixed = model.last_attention(images) @ values.transpose(1, 2)  # (N, heads, L, head_dim)
    torch.testing.assert_close(mixed.transpose(1, 2).reshape(34, 24), seen["mixed"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_give_the_same_features(dtype: torch.dtype) -> None:
    model, crops = build_backbone("test_vit", img_size=32, patch_size=8), _crops(*MIXED[:4])
    exact = model.double()(crops)
    keep = torch.ones(model.depth, 2, 8)
    output = model.to(dtype)([group.to(dtype) for group in crops], keep)
    assert output.dtype == dtype
    # In each branch of each block a handful of tensors is rounded, as errors add up: in squares.
    roundings = 5 * 2 * model.depth
    error = (output.double() - exact).norm() / exact.norm()
    assert error < roundings**0.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.1, "ffn": "swiglu"}], ids=str)
def test_what_a_block_makes_again_has_the_same_gradients(options: dict[str, Any]) -> None:
    block, layout = _vit(**options).blocks[0], ((2, 17), (3, 5))
    assert isinstance(block, Block)
    flat = parameters_to_vector(block.parameters())
    vector_to_parameters(flat.detach(), block.parameters())  # as in ZeRO: views of one tensor
    tokens = torch.linspace(-1, 2, 49 * 24, dtype=torch.float64).view(49, 24).requires_grad_()
    everything_kept = block.add_branches(tokens, layout, None, None)
    expected = _gradients(block, everything_kept)
    output = block(tokens, layout)
    assert torch.equal(output, everything_kept)
    gradients = _gradients(block, output)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_a_block_keeps_10_tensors_of_its_width() -> None:
    block = _vit(embed_dim=64, num_heads=1, layer_scale=0.1).float().blocks[0]
    tokens, layout = torch.randn(512, 64, requires_grad=True), ((2, 200), (7, 16))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = block(tokens, layout)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    # The output is new, the input is not; and the statistics of two norms and of the attention.
    assert 10 <= kept / output.nbytes < 10.2


def test_layer_scale_of_the_weights_is_that_of_the_outputs() -> None:
    block = _vit(layer_scale=0.1).blocks[0].eval()
    layer, gamma = block.get_submodule("attn.proj"), block.get_parameter("ls1.gamma")
    assert isinstance(layer, nn.Linear)
    inputs = torch.linspace(-1, 2, 5 * 24, dtype=torch.float64).view(5, 24).requires_grad_()
    leaves = inputs, layer.weight, layer.bias, gamma
    weights = torch.linspace(1, 2, 5 * 24, dtype=torch.float64).view(5, 24)
    results = layer(inputs), gamma * F.linear(inputs, layer.weight, layer.bias)
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad((result * weights).sum(), leaves) for result in results]
    torch.testing.assert_close(*gradients)


def test_autocast_runs_forward_and_backward() -> None:
    model = _vit().float()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(_crops(*MIXED, dtype=torch.float32), _keep(9))
    assert all(g.isfinite().all() for g in _gradients(model, output.float()).values())


def test_a_block_compiles_to_one_graph() -> None:
    explained = torch._dynamo.explain(_vit().float().blocks[0])(
        torch.randn(17, 24), ((1, 17),), torch.ones(2, 17, 1)
    )
    assert explained.graph_break_count == 0


def _masks(images: int, patches: int) -> Tensor:
    return torch.rand(images, patches, generator=torch.Generator().manual_seed(3)) < 0.4


def test_masked_patches_do_not_reach_the_output_and_the_others_do() -> None:
    model, crops, masks = _vit(mask_token=True), _crops(*MIXED), _masks(3, 16)
    other = [group.clone() for group in crops]
    pixels = masks.view(3, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    for group, which in zip(other[:2], pixels.split([2, 1]), strict=True):
        group[which[:, None].expand_as(group)] = 7.0
    output = model(crops, masks=masks)
    assert torch.equal(model(other, masks=masks), output)
    assert not torch.allclose(model(other), model(crops))
    assert not torch.allclose(model(crops), output)


def test_the_mask_token_stands_in_for_the_embedding_before_the_position() -> None:
    model, masks = _vit(mask_token=True, depth=1), _masks(2, 16)
    (images,) = _crops((2, 32, 32))
    tokens, layout, _ = model._embed([images], masks)
    plain, _, _ = model._embed([images])
    tokens, plain = (x.unflatten(0, layout[0])[:, 1:] for x in (tokens, plain))
    assert torch.equal(tokens[~masks], plain[~masks])
    assert model.mask_token is not None
    expected = (model.mask_token + model.pos_embed[0, 1:]).expand(2, -1, -1)
    torch.testing.assert_close(tokens[masks], expected[masks])


@pytest.mark.parametrize("registers", [0, 4])
def test_chosen_patches_are_those_of_features_and_class_tokens_stay(registers: int) -> None:
    model, crops = _vit(registers=registers, mask_token=True), _crops(*MIXED)
    rows = torch.tensor([0, 47, 16, 15, 15, 31])
    tokens, patches = model(crops, patch_rows=rows)
    torch.testing.assert_close(tokens, model(crops))
    features = torch.cat([model.features(group) for group in crops[:2]])
    torch.testing.assert_close(patches, features[:, 1 + registers :].flatten(0, 1)[rows])
    tokens, patches = model(crops, patch_rows=rows[:0])
    torch.testing.assert_close(tokens, model(crops))
    assert patches.shape == (0, 24)


@pytest.mark.parametrize("registers", [0, 4])
def test_all_patches_are_those_of_features_masked_ones_included(registers: int) -> None:
    model, crops = _vit(registers=registers, mask_token=True), _crops((2, 32, 32), *MIXED[2:])
    tokens, patches = model(crops, all_patches=True)
    torch.testing.assert_close(tokens, model(crops))
    torch.testing.assert_close(patches, model.features(crops[0])[:, 1 + registers :])
    masks, rows = _masks(2, 16), torch.tensor([3, 31, 7])
    tokens, patches = model([*crops, crops[0]], masks=masks, patch_rows=rows, all_patches=True)
    chosen = model([*crops, crops[0]], masks=masks, patch_rows=rows)
    assert patches.shape == (2, 16, 24)  # not those of a later tensor of the same size
    torch.testing.assert_close(patches.flatten(0, 1)[rows], chosen[1])
    torch.testing.assert_close(tokens, chosen[0])
    assert not torch.equal(patches, model(crops, all_patches=True)[1])


def test_unmasked_crops_may_be_as_large_as_masked_ones() -> None:
    model, masks, rows = _vit(mask_token=True), _masks(2, 16), torch.tensor([3, 31])
    masked, others = _crops((2, 32, 32), (3, 32, 32))
    tokens, patches = model([masked, others], masks=masks, patch_rows=rows)
    alone = model([masked], masks=masks, patch_rows=rows)
    torch.testing.assert_close(tokens, torch.cat((alone[0], model([others]))))
    torch.testing.assert_close(patches, alone[1])


def test_a_mask_token_without_a_masked_patch_has_a_gradient_of_zero() -> None:
    model, crops = _vit(mask_token=True), _crops(*MIXED)
    empty = torch.zeros(3, 16, dtype=torch.bool)
    output = model(crops, masks=empty)
    assert torch.equal(output, model(crops))
    gradient = _gradients(model, output)["mask_token"]
    assert torch.equal(gradient, torch.zeros(1, 24).double())
    assert _gradients(model, model(crops, masks=~empty))["mask_token"].abs().min() > 0


def test_masks_that_do_not_fit_are_refused() -> None:
    crops, masks = _crops(*MIXED), _masks(3, 16)
    with pytest.raises(ValueError, match="masks: the model was built without a mask token"):
        _vit()(crops, masks=masks)
    with pytest.raises(ValueError, match=r"masks: need shape \[3, 16\] .* got \[1, 16\]"):
        _vit(mask_token=True)(crops, masks=masks[:1])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3_qkvb"])
def test_last_keys_are_those_of_the_layer_before_they_rotate(name: str) -> None:
    model, (images,) = _vit(name), _crops((2, 24, 32))
    seen: list[Tensor] = []
    layer = model.blocks[-1].get_submodule("attn.qkv")
    with layer.register_forward_hook(lambda _, __, output: seen.append(output.clone())):
        tokens = model.features(images)
    keys = model.last_keys(images)
    assert keys.shape == tokens.shape
    torch.testing.assert_close(keys.flatten(0, 1), seen[0][:, 24:48], rtol=0, atol=0)
