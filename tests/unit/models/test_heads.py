import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dinoscale.models.heads import DinoHead, PrototypeLayer


def _head(**changes: object) -> DinoHead:
    torch.manual_seed(0)
    sizes = {
        "num_prototypes": 40,
        "hidden_dim": 24,
        "bottleneck_dim": 16,
        "num_layers": 3,
        "norm_last_layer": True,
        "batch_norm": False,
    }
    return DinoHead(12, **(sizes | changes))  # type: ignore[arg-type]  # a test's shorthand


@pytest.mark.parametrize("trainable", [True, False])
def test_prototypes_equal_weight_norm_of_torch(trainable: bool) -> None:
    torch.manual_seed(0)
    ours = PrototypeLayer(6, 9, trainable_norm=trainable).double()
    theirs = weight_norm(nn.Linear(6, 9, bias=False).double())
    parts = theirs.parametrizations.weight
    parts.original1.data.copy_(ours.weight_v.data)
    parts.original0.data.fill_(1)
    if trainable:
        parts.original0.data.uniform_(0.5, 2)
        ours.weight_g.data.copy_(parts.original0.data)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-14)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight_v.grad, parts.original1.grad, rtol=1e-10, atol=1e-12)
    if trainable:
        torch.testing.assert_close(ours.weight_g.grad, parts.original0.grad, rtol=1e-10, atol=0)


def test_head_is_an_mlp_onto_the_sphere_and_cosines() -> None:
    head, x = _head().double(), torch.randn(5, 12, dtype=torch.float64)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    w = head.state_dict()
    hidden = x
    for i in (0, 2):
        z = hidden @ w[f"mlp.{i}.weight"].T + w[f"mlp.{i}.bias"]
        hidden = z * (1 + torch.erf(z / 2**0.5)) / 2  # GELU in its exact form
    z = hidden @ w["mlp.4.weight"].T + w["mlp.4.bias"]
    v = w["last_layer.weight_v"]
    cosines = (z / z.norm(dim=1, keepdim=True)) @ (v / v.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(head(x), cosines, rtol=1e-10, atol=1e-12)


def test_plain_prototypes_start_small_and_have_one_name() -> None:
    head = _head(weight_norm=False, num_prototypes=4096)
    assert [n for n, _ in head.named_parameters()][-1] == "last_layer.weight"
    assert head.last_layer.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_parameter_names_are_the_references() -> None:
    linear = ["mlp.0", "mlp.2", "mlp.4"]
    expected = [f"{name}.{kind}" for name in linear for kind in ("weight", "bias")]
    assert [n for n, _ in _head().named_parameters()] == [*expected, "last_layer.weight_v"]
    trainable = [n for n, _ in _head(norm_last_layer=False).named_parameters()]
    assert trainable[-2:] == ["last_layer.weight_g", "last_layer.weight_v"]
    assert {n.rsplit(".", 1)[0] for n, _ in _head(num_layers=1).named_parameters()} == {
        "mlp",
        "last_layer",
    }
    with_norm = _head(batch_norm=True)
    kinds = [type(layer).__name__ for layer in with_norm.mlp.children()]
    assert kinds == ["Linear", "BatchNorm1d", "GELU"] * 2 + ["Linear"]


@pytest.mark.parametrize(
    ("width", "params"), [(192, 21958912), (384, 22352128), (768, 23138560), (1024, 23662848)]
)
def test_published_parameter_counts(width: int, params: int) -> None:
    sizes = {"num_prototypes": 65536, "hidden_dim": 2048, "bottleneck_dim": 256, "num_layers": 3}
    with torch.device("meta"):
        head = DinoHead(width, **sizes, norm_last_layer=False, batch_norm=False)
        frozen = DinoHead(width, **sizes, norm_last_layer=True, batch_norm=False)
    assert sum(p.numel() for p in head.parameters()) == params
    assert sum(p.numel() for p in frozen.parameters()) == params - 65536


def test_prototypes_start_uniform_and_linears_normal() -> None:
    head = _head(hidden_dim=256, bottleneck_dim=256, num_prototypes=512)
    prototypes = head.last_layer.weight_v
    assert prototypes.abs().max().item() == pytest.approx(1 / 16, rel=1e-2)
    assert prototypes.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=1e-2)
    linear = head.get_submodule("mlp.2")
    assert isinstance(linear, nn.Linear)
    assert linear.weight.std().item() == pytest.approx(0.02, rel=2e-2)
    assert linear.weight.abs().max() > 0.06  # not cut at two standard deviations
    assert not linear.bias.any()


def test_logits_are_float32_cosines_in_any_precision() -> None:
    x = torch.randn(5, 12)
    head = _head()
    exact = head(x)
    assert exact.abs().max() <= 1 + 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        autocast = head(x)
    low = head.bfloat16()(x.bfloat16())
    assert exact.dtype == autocast.dtype == low.dtype == torch.float32
    # A dozen tensors are rounded on the way, as errors add up: in squares; a logit is at most 1.
    torch.testing.assert_close(low, exact, rtol=0, atol=12**0.5 * torch.finfo(torch.bfloat16).eps)
    assert low.bfloat16().float().ne(low).any()  # not rounded to bfloat16 at the end
    assert autocast.bfloat16().float().ne(autocast).any()
    assert _head().double()(x.double()).dtype == torch.float64


def test_a_head_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="need num_layers >= 1, got 0"):
        _head(num_layers=0)
