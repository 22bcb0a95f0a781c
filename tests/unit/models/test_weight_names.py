import pytest
import torch
from torch import Tensor

from dinoscale.errors import CheckpointError
from dinoscale.models.weight_names import from_reference, to_reference


def _ours(*, trainable: bool) -> dict[str, Tensor]:
    state = {
        "backbone.cls_token": torch.randn(1, 1, 4),
        "head.mlp.0.weight": torch.randn(5, 4),
    }
    if trainable:
        state["head.last_layer.weight_g"] = torch.rand(7, 1)
    return state | {"head.last_layer.weight_v": torch.randn(7, 3)}


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return [*left] == [*right] and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("trainable", [True, False])
def test_round_trip_through_reference_names_is_exact(trainable: bool) -> None:
    ours = _ours(trainable=trainable)
    reference = to_reference(ours)
    assert [*reference][-2:] == ["head.last_layer.weight_g", "head.last_layer.weight_v"]
    assert _same(from_reference(reference, norm_last_layer=not trainable), ours)


def test_frozen_norm_is_exported_as_ones() -> None:
    norm = to_reference(_ours(trainable=False))["head.last_layer.weight_g"]
    assert torch.equal(norm, torch.ones(7, 1))


def test_new_weight_norm_names_and_ddp_prefix_are_understood() -> None:
    ours = _ours(trainable=True)
    new = {
        "weight_g": "parametrizations.weight.original0",
        "weight_v": "parametrizations.weight.original1",
    }
    theirs = {}
    for name, tensor in ours.items():
        *path, last = name.split(".")
        theirs[".".join(["module", *path, new.get(last, last)])] = tensor
    assert _same(from_reference(theirs, norm_last_layer=False), ours)


def test_head_alone_is_understood() -> None:
    state = to_reference({"last_layer.weight_v": torch.randn(7, 3)})
    assert [*state] == ["last_layer.weight_g", "last_layer.weight_v"]
    assert [*from_reference(state, norm_last_layer=True)] == ["last_layer.weight_v"]


def test_trained_norms_do_not_vanish_silently() -> None:
    reference = to_reference(_ours(trainable=True))
    with pytest.raises(CheckpointError, match=r"head\.last_layer\.weight_g: prototype norms"):
        from_reference(reference, norm_last_layer=True)
