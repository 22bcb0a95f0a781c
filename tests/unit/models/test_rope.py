"""Rotary positions in a ViT: what they depend on, and that no way of computing changes them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dinoscale.models import block, compiling, rope
from dinoscale.models.activation_checkpointing import Recompute
from dinoscale.models.block import KeylessBias
from dinoscale.models.compiling import Compiled
from dinoscale.models.rope import Rope, coordinate_changes, rotate, turn
from dinoscale.models.stochastic_depth import kept_subsets
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone

DEPTH = 3
CROPS = [(2, 32), (3, 16)]  # images, side in pixels
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": DEPTH, "num_heads": 2}


def _vit(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = build_backbone(
        "vit_tiny_patch16_224", **{**SIZES, "rope": Rope(), "registers": 2, **changes}
    )
    assert isinstance(model, VisionTransformer)
    for block_ in model.blocks:
        torch.nn.init.normal_(block_.get_submodule("attn.qkv").weight, std=0.5)
    return model.double()


def _crops() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(n, 3, side, side) for n, side in CROPS]
    return [torch.randn(size, generator=generator).double() for size in sizes]


def _changes() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    uniforms = torch.rand(2, DEPTH, 5, generator=generator, dtype=torch.float64)
    return coordinate_changes(uniforms, shift=0.25, jitter=1.5, rescale=2.0)


def test_it_has_no_learned_positions_and_sees_where_a_patch_is() -> None:
    model, (images, _) = _vit(), _crops()
    assert not any("pos" in name for name in model.state_dict())
    moved = images.roll(8, dims=-1)  # by a patch
    assert not torch.allclose(model(list([images])), model([moved]))
    assert model.features(torch.randn(1, 3, 24, 56).double()).shape == (1, 3 + 21, 24)
    assert model.layout_of([(2, 32)]) == ((2, 3 + 16),)


def test_pixels_beyond_the_last_whole_patch_are_left_out() -> None:
    model, (images, crops), changes = _vit(), _crops(), _changes()
    beyond = F.pad(crops, (0, 4, 0, 7), value=9.0)  # right and below, less than a patch
    whole = model([images, crops], coordinates=changes)
    assert torch.equal(model([images, beyond], coordinates=changes), whole)
    assert model.layout_of([(3, 16 + 7)]) == model.layout_of([(3, 16)])


def test_each_resolution_and_block_has_its_own_changes() -> None:
    model, crops, changes = _vit(), _crops(), _changes()
    together = model(crops, coordinates=changes).split([n for n, _ in CROPS])
    for index, images in enumerate(crops):
        alone = model([images], coordinates=changes[index : index + 1])
        torch.testing.assert_close(together[index], alone)
        for other in range(DEPTH):
            less = changes.clone()
            less[index, other] = torch.tensor([0, 0, 1, 1, 1])
            assert not torch.allclose(model(crops, coordinates=less), torch.cat(together))


def test_the_forward_without_changes_is_that_of_neutral_ones() -> None:
    model, crops = _vit(), _crops()
    neutral = torch.tensor([0, 0, 1, 1, 1.0]).expand(2, DEPTH, 5)
    assert torch.equal(model(crops), model(crops, coordinates=neutral))


def test_kept_images_of_a_subset_rotate_like_all() -> None:
    model, (images, _) = _vit(), _crops()
    rotations = model._rotations([(4, 4)], images)[0]
    layout = ((2, 19),)
    tokens = torch.randn(38, 24, dtype=torch.float64)
    uniforms = torch.tensor([0.1, 0.9], dtype=torch.float64).expand(1, 2, 2)  # drop the first
    subsets = kept_subsets(uniforms, layout, drop_path_rate=0.5, uniform=True)[0]
    output = model.blocks[0](tokens, layout, subsets, rotations)
    alone = model.blocks[0](tokens[19:], ((1, 19),), _doubled(), rotations)
    torch.testing.assert_close(output[:19], tokens[:19])
    torch.testing.assert_close(output[19:], alone)


def _doubled() -> Tensor:
    return torch.full((2, 19, 1), 2.0, dtype=torch.float64)


def test_low_precision_rotates_by_tables_in_float32() -> None:
    model, (images, _) = _vit(), _crops()
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        (rotations,) = model._rotations([(4, 4)], images.to(dtype))[0]
        assert rotations.cos.dtype is rotations.sin.dtype is expected
    assert model.bfloat16()([images.bfloat16()]).dtype is torch.bfloat16


@pytest.mark.parametrize("chunk", [1, 2**17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_turning_in_place_is_rotating_and_back_undoes_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(rope, "CHUNK", chunk)
    images = torch.zeros(1, dtype=dtype)
    (by,) = _vit()._rotations([(4, 4)], images)[0]
    x = torch.randn(3, 19, 2, 2, 12, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = rotate(x.movedim(1, 3), by).movedim(3, 1)
    turned = x.clone()
    turn(turned, by, into=turned)
    assert torch.equal(turned, expected)
    assert not torch.equal(turned, x)
    turn(turned, by, into=turned, back=True)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(turned, x, rtol=0, atol=4 * ulp * float(x.abs().max()))


def _kept(rotates: bool) -> int:
    """Bytes that the forward of a block leaves allocated."""
    model, tokens = _vit(embed_dim=64).float(), torch.randn(531, 64, requires_grad=True)
    rotations = model._rotations([(14, 14), (4, 4)], tokens)[0] if rotates else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model.blocks[0](tokens, ((2, 199), (7, 19)), None, rotations)
    assert output.requires_grad
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def test_rotated_queries_and_keys_take_the_place_of_the_others() -> None:
    assert _kept(rotates=True) == _kept(rotates=False)


@pytest.mark.parametrize("recompute", ["all_but_attention", "block"])
def test_recomputation_changes_no_bit(recompute: Recompute) -> None:
    model, crops, changes = _vit(), _crops(), _changes()

    def gradients() -> tuple[Tensor, ...]:
        loss = model(crops, coordinates=changes).square().sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    expected = gradients()
    model.checkpoint_every, model.recompute = 1, recompute
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


def test_compiled_blocks_share_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_compile", "aot_eager")  # to graphs and no further
    fresh = Compiled(block._run, name="blocks", dynamic=False)
    monkeypatch.setattr(block, "_compiled", fresh)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, crops, changes = _vit(), _crops(), _changes()
    plain = model(crops, coordinates=changes)
    model.compiled_for = frozenset({model.layout_of([(n, side) for n, side in CROPS])})
    torch.testing.assert_close(model(crops, coordinates=changes), plain)
    counters: Any = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_local_crops_alone_have_their_own_norm() -> None:
    model, crops = _vit(local_norm=True), _crops()
    rows = torch.arange(4)
    before = model(crops, patch_rows=rows)
    with torch.no_grad():
        model.local_norm.bias.add_(1)
    after = model(crops, patch_rows=rows)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0][:2], before[0][:2])
    torch.testing.assert_close(after[0][2:], before[0][2:] + 1)
    assert torch.equal(model([crops[1]]), _vit(local_norm=True)([crops[1]]))  # evaluation
    same_size = [crops[0], crops[0]]  # one resolution, and still global and local crops
    of_global, of_local = model(same_size).chunk(2)
    torch.testing.assert_close(of_local, of_global + 1)


def test_a_masked_key_bias_does_not_act_and_others_do() -> None:
    model, crops = _vit(mask_key_bias=True), _crops()
    bias = model.blocks[0].get_parameter("attn.qkv.bias")
    assert type(model.blocks[0].get_submodule("attn.qkv")) is KeylessBias
    before = model(crops)
    with torch.no_grad():
        bias[24:48].fill_(3)
        assert torch.equal(model(crops), before)
        for part in (slice(0, 24), slice(48, 72)):
            bias[part] += torch.linspace(-3, 3, 24)
            changed = model(crops)
            assert not torch.allclose(changed, before)
            before = changed


def test_initial_weights_are_the_references() -> None:
    sizes = {"embed_dim": 256, "num_heads": 4, "layer_scale": 1e-5, "registers": 64}
    state = _vit(**sizes, mask_key_bias=True, mask_token=True, local_norm=True).state_dict()
    for name in ("cls_token", "reg_token", "blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.2), name
    assert not state["mask_token"].any()
    assert not state["blocks.0.attn.qkv.bias"].any()
    assert state["blocks.0.ls1.gamma"].float().eq(1e-5).all()
    assert state["local_norm.weight"].eq(1).all()


def test_heads_of_odd_width_are_refused() -> None:
    from dinoscale.errors import ConfigError

    with pytest.raises(ConfigError, match="multiple of 4 channels"):
        _vit(num_heads=12)
