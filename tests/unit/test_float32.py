"""Float32 products keep their bits, except those of a bf16 network on a GPU."""

from collections.abc import Callable, Iterator

import pytest
import torch

from dinoscale.evaluate.features import find_device
from dinoscale.runtime.float32 import exact_float32, tensor_cores

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
    exact_float32()


def _new(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


def _new_for_all() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]  # torch has no types here


def _legacy() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def _rounded() -> set[str]:
    """Which products may be rounded, by every way to ask; torch raises if they contradict."""
    backends = torch.backends
    answers = {
        "cublas": backends.cuda.matmul.allow_tf32,
        "matmul": torch.get_float32_matmul_precision() != "highest",
        "cudnn": backends.cudnn.allow_tf32,
    }
    if hasattr(backends.cudnn, "conv"):
        answers["new"] = backends.cuda.matmul.fp32_precision == "tf32"
        answers["conv"] = backends.cudnn.conv.fp32_precision == "tf32"
    return {name for name, rounded in answers.items() if rounded}


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has one way only")
@pytest.mark.parametrize(
    "before", [lambda: None, _legacy, lambda: _new("tf32"), lambda: _new("ieee"), _new_for_all]
)
def test_only_a_bf16_network_on_a_gpu_uses_tf32_whatever_was_set_before(
    before: Callable[[], None],
) -> None:
    before()
    exact_float32()
    assert _rounded() == set()
    for dtype, device in ((torch.float32, GPU), (torch.bfloat16, CPU)):
        with tensor_cores(dtype, device):
            assert _rounded() == set()
    with tensor_cores(torch.bfloat16, GPU):
        assert _rounded() == {"cublas", "matmul", "new"}
    assert _rounded() == set()


def test_finding_a_device_for_a_measurement_turns_tf32_off() -> None:
    torch.set_float32_matmul_precision("high")
    find_device("cpu")
    assert _rounded() == set()
