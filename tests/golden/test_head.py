"""Projection head, outputs and gradients, against the reference with its own weights."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from dinoscale.models.heads import DinoHead
from dinoscale.models.weight_names import from_reference, to_reference

assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def _head(state: dict[str, Tensor], *, norm_last_layer: bool) -> DinoHead:
    """A head of the sizes of `state`, with its weights."""
    linears = [w for name, w in state.items() if name.startswith("mlp.") and w.ndim == 2]
    prototypes = state["last_layer.weight_v"]
    first = state["mlp.weight" if "mlp.weight" in state else "mlp.0.weight"]
    head = DinoHead(
        first.shape[1],
        num_prototypes=len(prototypes),
        hidden_dim=len(first),
        bottleneck_dim=prototypes.shape[1],
        num_layers=len(linears),
        norm_last_layer=norm_last_layer,
        batch_norm=any("running_mean" in name for name in state),
    ).double()
    head.load_state_dict(from_reference(state, norm_last_layer=norm_last_layer))
    return head


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_head_output_and_gradients_match(
    golden_tensors: Callable[[str], dict[str, Tensor]], norm_last_layer: bool
) -> None:
    prefix = f"norm_last_layer_{str(norm_last_layer).lower()}."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in golden_tensors("dino_head").items()
        if name.startswith(prefix)
    }
    state = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
    head = _head(state, norm_last_layer=norm_last_layer)
    x = tensors["input"].requires_grad_()
    output = head(x)
    (output * torch.linspace(-1, 1, output.shape[1], dtype=output.dtype)).sum().backward()
    assert_close(output.detach(), tensors["output"])
    assert_close(x.grad, tensors["input_grad"])
    gradients = {f"grad.{name}": p.grad for name, p in head.named_parameters()}
    assert gradients.keys() == {name for name in tensors if name.startswith("grad.")}
    for name, gradient in gradients.items():
        assert_close(gradient, tensors[name])
    back = to_reference(head.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
