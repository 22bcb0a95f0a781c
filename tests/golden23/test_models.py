"""ViTs of DINOv2 and DINOv3 against the reference with its weights, at every recorded size."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.block import Block
from dinoscale.models.rope import Rope
from dinoscale.models.stochastic_depth import kept_subsets
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone
from tests.golden23.reference_names import our_tensors

Tensors = Callable[[str], dict[str, Tensor]]
Numbers = Callable[[str], dict[str, Any]]

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)  # stored as float32


class Recorded(NamedTuple):
    """The recorded model in float64, the tensors, and the recorded sizes as HxW."""

    model: VisionTransformer
    tensors: dict[str, Tensor]
    sizes: list[str]


MODELS = ["dinov2_mlp", "dinov2_swiglu_reg", "dinov3_mlp", "dinov3_swiglu_reg"]


@pytest.fixture(scope="module", params=MODELS)
def recorded(
    request: pytest.FixtureRequest, golden23_json: Numbers, golden23_tensors: Tensors
) -> Recorded:
    geometry = golden23_json(request.param)
    tensors = {name: x.double() for name, x in golden23_tensors(request.param).items()}
    model = build_backbone(
        "vit_small_patch14_dinov2",
        img_size=geometry["img_size"],
        patch_size=geometry["patch_size"],
        embed_dim=geometry["embed_dim"],
        depth=geometry["depth"],
        num_heads=geometry["num_heads"],
        ffn="swiglu" if geometry["ffn_layer"].startswith("swiglu") else "mlp",
        mask_token=True,
        **(_dinov3(geometry) if "rope_base" in geometry else _dinov2(geometry)),
    )
    assert isinstance(model, VisionTransformer)
    if "rope_base" not in geometry:
        assert model.position_resize == ("by_size" if _by_size(geometry) else "by_factor")
    model.double().load_state_dict(our_tensors(tensors, "state."))
    sizes = [f"{height}x{width}" for height, width in geometry["sizes"]]
    return Recorded(model, tensors, sizes)


def _dinov2(geometry: dict[str, Any]) -> dict[str, Any]:
    assert geometry["interpolate_offset"] == (0.0 if _by_size(geometry) else 0.1)
    return {"registers": geometry["num_register_tokens"]}


def _by_size(geometry: dict[str, Any]) -> bool:
    return bool(geometry["interpolate_antialias"])


def _dinov3(geometry: dict[str, Any]) -> dict[str, Any]:
    return {
        "registers": geometry["n_storage_tokens"],
        "rope": Rope(geometry["rope_base"]),
        "ffn_ratio": geometry["ffn_ratio"],
        "ffn_multiple": int(geometry["ffn_layer"].removeprefix("swiglu").replace("mlp", "") or 1),
        "norm_eps": {"layernorm": 1e-6, "layernormbf16": 1e-5}[geometry["norm_layer"]],
        "mask_key_bias": geometry["mask_k_bias"],
        "local_norm": geometry["untie_global_and_local_cls_norm"],
    }


def test_all_tokens_match_at_every_size(recorded: Recorded) -> None:
    model, tensors, sizes = recorded
    for size in sizes:
        tokens = model.features(tensors[f"{size}.input"])
        _assert_tokens(tokens, tensors, size)


def _assert_tokens(tokens: Tensor, tensors: dict[str, Tensor], prefix: str) -> None:
    """Compare class token, patches and, where they are recorded, registers (N, 1+R+P, D)."""
    patches = tensors[f"{prefix}.patches"]
    assert_close(tokens[:, 0], tensors[f"{prefix}.cls"])
    assert_close(tokens[:, -patches.shape[1] :], patches)
    if f"{prefix}.registers" in tensors:  # not of the intermediate blocks
        assert_close(tokens[:, 1 : -patches.shape[1]], tensors[f"{prefix}.registers"])


def test_the_last_two_blocks_match_at_every_size(recorded: Recorded) -> None:
    model, tensors, sizes = recorded
    for size in sizes:
        outputs = model.intermediate(tensors[f"{size}.input"], 2)
        for index, output in enumerate(outputs):
            _assert_tokens(output, tensors, f"{size}.intermediate{index}")


def test_masked_crops_match_at_every_size(recorded: Recorded) -> None:
    model, tensors, sizes = recorded
    for size in sizes:
        masks = tensors[f"{size}.masks"].bool()
        assert 0 < masks.sum() < masks.numel()
        tokens, patches = model(
            [tensors[f"{size}.input"]], masks=masks, patch_rows=torch.arange(masks.numel())
        )
        assert_close(tokens, tensors[f"{size}.masked.cls"])
        assert_close(patches, tensors[f"{size}.masked.patches"].flatten(0, 1))


def test_masked_and_other_crops_match_in_one_forward(recorded: Recorded) -> None:
    model, tensors, sizes = recorded
    if model.local_norm is not None:
        pytest.skip("the other crops have a norm of their own, see the next test")
    first, *others = sizes
    masks = tensors[f"{first}.masks"].bool()
    rows = masks.flatten().nonzero()[:, 0]
    tokens, patches = model(
        [tensors[f"{size}.input"] for size in sizes], masks=masks, patch_rows=rows
    )
    expected = [tensors[f"{first}.masked.cls"], *(tensors[f"{size}.cls"] for size in others)]
    assert_close(tokens, torch.cat(expected))
    assert_close(patches, tensors[f"{first}.masked.patches"][masks])


def test_training_crops_match_in_one_forward(recorded: Recorded) -> None:
    model, tensors, _ = recorded
    if "train.global" not in tensors:
        pytest.skip("not recorded")
    masks = tensors["train.masks"].bool()
    crops = [tensors["train.global"], tensors["train.local"]]
    tokens, patches = model(crops, masks=masks, patch_rows=torch.arange(masks.numel()))
    expected = torch.cat([tensors["train.global_cls"], tensors["train.local_cls"]])
    assert_close(tokens, expected)
    assert_close(patches, tensors["train.global_patches"].flatten(0, 1))


class RecordedBlock(NamedTuple):
    """A block in float64, its recorded tensors of two groups of images, and the settings."""

    generation: str
    block: Block
    tensors: dict[str, Tensor]
    rate: float
    packed: Tensor
    layout: tuple[tuple[int, int], ...]


@pytest.fixture(scope="module", params=["v2", "v3"])
def recorded_block(
    request: pytest.FixtureRequest, golden23_json: Numbers, golden23_tensors: Tensors
) -> RecordedBlock:
    ensure_torchvision()
    from timm.models import vision_transformer

    settings, tensors = golden23_json("stochastic_depth"), golden23_tensors("stochastic_depth")
    width = settings["embed_dim"]
    norm_layer = partial(torch.nn.LayerNorm, eps=settings["norm_eps"])
    source = vision_transformer.Block(
        width, settings["num_heads"], qkv_bias=True, init_values=1.0, norm_layer=norm_layer
    )
    block = Block(source).double()
    prefix = f"{request.param}.state."
    state = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    block.load_state_dict(state)
    groups = [tensors["input0"], tensors["input1"]]
    layout = tuple((len(group), group.shape[1]) for group in groups)
    packed = torch.cat([group.flatten(0, 1) for group in groups])
    return RecordedBlock(request.param, block, tensors, settings["rate"], packed, layout)


def _uniforms(recorded: RecordedBlock, *, depth: int) -> Tensor:
    """Numbers (depth, 2, N) of which the largest are those of the recorded images."""
    branches = []
    for branch in ("attention", "ffn"):
        groups = []
        for index, (images, _) in enumerate(recorded.layout):
            kept = recorded.tensors[f"{recorded.generation}.kept.group{index}.{branch}"]
            numbers = torch.full((images,), 0.25, dtype=torch.float64)
            numbers[kept] = torch.linspace(0.9, 0.5, len(kept), dtype=torch.float64)
            groups.append(numbers)
        branches.append(torch.cat(groups))
    return torch.stack(branches).expand(depth, -1, -1)


@pytest.mark.parametrize("depth", [1, 3])  # the same rate in all blocks
def test_stochastic_depth_keeps_the_recorded_images(
    recorded_block: RecordedBlock, depth: int
) -> None:
    generation, block, tensors, rate, packed, layout = recorded_block
    subsets = kept_subsets(
        _uniforms(recorded_block, depth=depth), layout, drop_path_rate=rate, uniform=True
    )[0]
    assert subsets is not None
    inputs = packed.clone().requires_grad_()
    output = block(inputs, layout, subsets)
    expected = torch.cat([tensors[f"{generation}.output{i}"].flatten(0, 1) for i in range(2)])
    torch.testing.assert_close(output, expected)
    weights = torch.linspace(-1, 1, packed.shape[1], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((output * weights).sum(), [inputs])
    expected = torch.cat([tensors[f"{generation}.input_grad{i}"].flatten(0, 1) for i in range(2)])
    torch.testing.assert_close(gradient, expected)


def test_evaluation_drops_nothing(recorded_block: RecordedBlock) -> None:
    generation, block, tensors, _, packed, layout = recorded_block
    expected = torch.cat([tensors[f"{generation}.eval_output{i}"].flatten(0, 1) for i in range(2)])
    torch.testing.assert_close(block(packed, layout), expected)
