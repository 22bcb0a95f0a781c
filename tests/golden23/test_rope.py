"""Rotary positions against the reference: tables, rotation, and a training forward with changes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.models.rope import Rope, coordinate_changes, rotate, rotation, sine_and_cosine
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone
from tests.golden23.reference_names import our_tensors

Tensors = Callable[[str], dict[str, Tensor]]
Numbers = Callable[[str], dict[str, Any]]

CPU = torch.device("cpu")
exact = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
PLACES = {"shift": slice(0, 2), "jitter": slice(2, 4), "rescale": slice(4, 5)}


def _assert_tables(found: tuple[Tensor, Tensor], tensors: dict[str, Tensor], case: str) -> None:
    """Compare one half with the recorded tables, which hold both, rounded to their type."""
    for values, name in zip(found, ("sin", "cos"), strict=True):
        expected = tensors[f"{case}.{name}"]
        bound = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 0.02}[expected.dtype]
        both = torch.cat((values, values), dim=-1)
        assert (both - expected.to(both.dtype)).abs().max() <= bound


def test_tables_follow_the_recorded_changes_of_coordinates(
    golden23_json: Numbers, golden23_tensors: Tensors
) -> None:
    facts, tensors = golden23_json("rope"), golden23_tensors("rope")
    for index, settings in enumerate(facts["cases"]):
        changes = torch.tensor([0, 0, 1, 1, 1], dtype=torch.float64)
        for draw, key in enumerate(settings["order"]):
            changes[PLACES[key.removesuffix("_coords")]] = tensors[f"case{index}.draw{draw}"]
        rope = Rope(facts["base"], coordinates=settings.get("normalize_coords", "separate"))
        found = sine_and_cosine(
            rope,
            (facts["H"], facts["W"]),
            head_dim=facts["head_dim"],
            changes=changes if settings["order"] else None,
            dtype=torch.float64,
            device=CPU,
        )
        _assert_tables(found, tensors, f"case{index}")


def test_tables_and_periods_match_in_every_type(
    golden23_json: Numbers, golden23_tensors: Tensors
) -> None:
    tensors = golden23_tensors("rope_tables")
    for index, case in enumerate(golden23_json("rope_tables")["cases"]):
        ends = case.get("min_period"), case.get("max_period")
        rope = Rope(case["base"], *ends, case.get("normalize_coords", "separate"))
        recorded = getattr(torch, case["dtype"])
        dtype = torch.promote_types(recorded, torch.float32)
        found = sine_and_cosine(
            rope, (case["H"], case["W"]), head_dim=case["head_dim"], dtype=dtype, device=CPU
        )
        _assert_tables(found, tensors, f"case{index}")
        periods = rope.periods(case["head_dim"], dtype=dtype, device=CPU)
        assert torch.equal(periods.to(recorded), tensors[f"case{index}.periods"])


@pytest.mark.parametrize("name", ["q", "k"])
def test_patches_rotate_and_other_tokens_stay(
    golden23_json: Numbers, golden23_tensors: Tensors, name: str
) -> None:
    case, tensors = golden23_json("rope_tables")["cases"][1], golden23_tensors("rope_tables")
    given, expected = tensors[f"apply.{name}"], tensors[f"apply.float32.{name}"]
    num_special = given.shape[2] - case["H"] * case["W"]
    table = rotation(
        Rope(case["base"]),
        (case["H"], case["W"]),
        num_special=num_special,
        head_dim=case["head_dim"],
        dtype=torch.float32,
        device=CPU,
    )
    turned = rotate(given, table)
    torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(turned[:, :, :num_special], given[:, :, :num_special])
    # Rounded only at the end: half of an ulp, where tables in bfloat16 are off by many.
    low = rotate(given.bfloat16(), table)
    wide = rotate(given.bfloat16().float(), table)
    assert low.dtype is torch.bfloat16
    assert torch.equal(low, wide.bfloat16())


def test_changes_cover_their_ranges() -> None:
    ends = torch.tensor([[0.0] * 5, [0.5] * 5, [1.0] * 5], dtype=torch.float64)
    changes = coordinate_changes(ends, shift=0.25, jitter=1.5, rescale=2.0)
    expected = [[-0.25] * 2 + [1 / 1.5] * 2 + [0.5], [0, 0, 1, 1, 1], [0.25] * 2 + [1.5] * 2 + [2]]
    exact(changes, torch.tensor(expected, dtype=torch.float64))


@pytest.fixture(scope="module")
def trained(golden23_json: Numbers, golden23_tensors: Tensors) -> VisionTransformer:
    facts = golden23_json("rope_training")
    model = build_backbone(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=facts["patch_size"],
        embed_dim=facts["embed_dim"],
        depth=facts["depth"],
        num_heads=facts["num_heads"],
        norm_eps=facts["norm_eps"],
        layer_scale=1.0,
        ffn=facts["ffn"],
        ffn_ratio=1.5 * facts["ffn_hidden"] / facts["embed_dim"],
        registers=facts["n_storage_tokens"],
        rope=Rope(facts["rope_base"]),
        mask_key_bias=True,
        local_norm=True,
        mask_token=True,
    )
    assert isinstance(model, VisionTransformer)
    state = our_tensors(golden23_tensors("rope_training"), "state.")
    model.double().load_state_dict({name: value.double() for name, value in state.items()})
    return model


def test_training_matches_with_changed_coordinates(
    trained: VisionTransformer, golden23_json: Numbers, golden23_tensors: Tensors
) -> None:
    facts, tensors = golden23_json("rope_training"), golden23_tensors("rope_training")
    changes = torch.empty(2, trained.depth, 5, dtype=torch.float64)
    for draw in facts["draws"]:
        of_block = changes[("global", "local").index(draw["crops"]), draw["block"]]
        for key in draw["order"]:
            of_block[PLACES[key]] = tensors[f"draw{draw['index']}.{key}"]
    masks = tensors["masks"].bool()
    classes, patches = trained(
        [tensors["global"].double(), tensors["local"].double()],
        masks=masks,
        patch_rows=torch.arange(masks.numel()),
        coordinates=changes,
    )
    of_global, of_local = classes.split([len(masks), len(tensors["local"])])
    exact(of_global, tensors["global_cls"])
    exact(of_local, tensors["local_cls"])
    exact(patches, tensors["global_patches"].flatten(0, 1))
    weights = torch.linspace(-1, 1, patches.shape[-1], dtype=torch.float64)
    loss = (patches * weights).mean() + of_local.pow(3).mean()
    exact(loss[None], tensors["loss"])
    trained.zero_grad()
    loss.backward()
    expected = our_tensors(tensors, "grad.")
    found = {name: weight.grad for name, weight in trained.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.float(), expected[name], rtol=1e-5, atol=1e-8)
    for name in (name for name in found if name.endswith("qkv.bias")):
        assert not found[name].chunk(3)[1].any(), name  # the keys' third does not act
