"""Blocks share their compiled graphs; without a compiler they run eagerly."""

import copy
import pickle
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
from torch import Tensor

from dinoscale.models import block, compiling
from dinoscale.models.compiling import Compiled
from dinoscale.models.stochastic_depth import stochastic_depth_keep
from dinoscale.models.vit import VisionTransformer
from dinoscale.models.zoo import build_backbone

DEPTH = 9  # more blocks than graphs that the compiler would make for them
CROPS = [(6, 32), (8, 16)]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Count graphs from zero; a compiler that failed in one test is tried again in the next."""
    for name in ("_compiled", "_compiled_subsets"):
        known = getattr(block, name)
        fresh = Compiled(known._function, name=known._name, dynamic=known._dynamic)
        monkeypatch.setattr(block, name, fresh)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile to graphs and no further, which takes seconds; test_compiled.py goes all the way."""
    monkeypatch.setattr(compiling, "_compile", "aot_eager")


def _vit() -> VisionTransformer:
    torch.manual_seed(0)
    model = build_backbone(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=DEPTH, num_heads=2
    )
    assert isinstance(model, VisionTransformer)
    return model.double()


def _crops(sizes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, side, side, generator=generator).double() for n, side in sizes]


def _gradients(model: VisionTransformer, keep: Tensor | None) -> list[Tensor]:
    output = model(_crops(CROPS), keep)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), list(model.parameters())))


def _graphs() -> int:
    counters: Any = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


def _assert_close(ours: list[Tensor], plain: list[Tensor]) -> None:
    for gradient, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(gradient, wanted)  # of float64


@pytest.mark.usefixtures("_traced")
def test_all_blocks_share_one_graph_and_evaluation_compiles_none() -> None:
    model = _vit()
    keep = stochastic_depth_keep(torch.rand(DEPTH, 2, 14), drop_path_rate=0.5)
    plain = _gradients(model, keep)
    model.compiled_for = frozenset({model.layout_of(CROPS)})
    for _ in range(2):
        _assert_close(_gradients(model, keep), plain)
    assert _graphs() == 1
    with torch.no_grad():
        for side in (24, 32, 40, 48):
            model.features(*_crops([(2, side)]))
            model(_crops([(3, side)]))
    assert _graphs() == 1
    names = [name for name, _ in model.named_parameters()]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [name for name, _ in twin.named_parameters()] == names
        _assert_close(_gradients(twin, keep), plain)
    assert _graphs() == 1


def test_every_size_of_a_mixture_has_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_compile", "eager")  # counts graphs, whatever is in them
    model = _vit()
    sizes = [[(2, side), (3, 16)] for side in range(24, 24 + 8 * 9, 8)]  # more than torch's limit
    model.compiled_for = frozenset(model.layout_of(of_size) for of_size in sizes)
    model.blocks = model.blocks[:1]
    model.depth = 1
    for of_size in sizes:
        model(_crops(of_size))
    assert _graphs() == len(sizes)


@pytest.mark.usefixtures("_traced")
def test_an_older_torch_also_keeps_more_graphs_than_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_ = torch.compile

    def without_limit(function: Any, *, dynamic: bool, backend: Any) -> Any:
        return compile_(function, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", without_limit)
    doubled: Compiled[[Tensor], Tensor] = Compiled(lambda x: 2 * x, name="sums", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=8):  # its own, and again afterwards
        for length in range(2, 2 + 9):
            doubled(torch.ones(length))
    assert _graphs() == 9


@pytest.mark.usefixtures("_traced")
def test_subsets_of_all_sizes_share_a_few_graphs() -> None:
    model = _vit()
    model.subset_rate = 0.5
    uniforms = torch.rand(DEPTH, 2, 14, generator=torch.Generator().manual_seed(0))
    plain = _gradients(model, uniforms)
    model.compiled_for = frozenset({model.layout_of(CROPS)})
    for _ in range(2):
        _assert_close(_gradients(model, uniforms), plain)
    assert _graphs() <= 4  # nothing dropped, the first sizes, all later ones


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("recompute", ["pointwise", "all_but_attention", "block"])
def test_compiled_blocks_recompute_as_configured(recompute: Any) -> None:
    model = _vit()
    plain = _gradients(model, None)
    model.checkpoint_every, model.recompute = 2, recompute
    model.compiled_for = frozenset({model.layout_of(CROPS)})
    _assert_close(_gradients(model, None), plain)
    assert _graphs() == 2


@pytest.fixture
def _no_caches() -> Iterator[None]:
    """Disable caches, which could replace the missing compiler."""
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        yield


def _assert_runs_eagerly(caplog: pytest.LogCaptureFixture, *, because: str) -> None:
    model = _vit()
    plain = _gradients(model, None)
    model.compiled_for = frozenset({model.layout_of(CROPS)})
    for _ in range(2):
        pairs = zip(_gradients(model, None), plain, strict=True)
        assert all(torch.equal(gradient, wanted) for gradient, wanted in pairs)
    (warning,) = [record for record in caplog.records if record.name == compiling.__name__]
    assert because in warning.message
    assert "\n" not in warning.message


@pytest.mark.usefixtures("_no_caches")
def test_without_a_compiler_blocks_run_eagerly_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        _assert_runs_eagerly(caplog, because="/no/such/compiler")


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.usefixtures("_no_caches")
def test_a_backward_pass_that_cannot_be_compiled_is_noticed_before_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lowering = torch._inductor.graph.GraphLowering
    compile_to_module = lowering.compile_to_module

    def fails(graph: Any, *args: Any) -> Any:
        if graph.is_backward:
            raise RuntimeError("no backward today")
        return compile_to_module(graph, *args)

    monkeypatch.setattr(lowering, "compile_to_module", fails)
    _assert_runs_eagerly(caplog, because="no backward today")
