"""Projection heads against the reference: weight-normalised prototypes and plain ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dinoscale.models.heads import DinoHead


@pytest.mark.parametrize("generation", ["v2", "v3"])
def test_logits_and_gradients_match(
    golden23_tensors: Callable[[str], dict[str, Tensor]], generation: str
) -> None:
    prefix = f"{generation}."
    recorded = {
        name.removeprefix(prefix): value
        for name, value in golden23_tensors("heads").items()
        if name.startswith(prefix)
    }
    head = _head(recorded, weight_norm=generation == "v2")
    x = recorded["input"].requires_grad_()
    logits = head(x)
    torch.testing.assert_close(logits, recorded["output"], rtol=1e-9, atol=1e-12)
    (logits * torch.linspace(-1, 1, logits.shape[1], dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(x.grad, recorded["input_grad"], rtol=1e-9, atol=1e-12)
    for name, weight in head.named_parameters():
        torch.testing.assert_close(weight.grad, recorded[f"grad.{name}"], rtol=1e-9, atol=1e-12)


def _head(recorded: dict[str, Tensor], *, weight_norm: bool) -> DinoHead:
    state = {
        name.removeprefix("state."): value
        for name, value in recorded.items()
        if name.startswith("state.")
    }
    prototypes = state["last_layer.weight_v" if weight_norm else "last_layer.weight"]
    head = DinoHead(
        recorded["input"].shape[1],
        num_prototypes=prototypes.shape[0],
        hidden_dim=state["mlp.0.weight"].shape[0],
        bottleneck_dim=prototypes.shape[1],
        num_layers=sum(name.startswith("mlp") for name in state) // 2,
        norm_last_layer=False,
        batch_norm=False,
        weight_norm=weight_norm,
    ).double()
    head.load_state_dict(state)
    return head
