"""Peak memory is that of the tensors alive at one moment, those from before included."""

import torch

from dinoscale.planning.bench.tensor_memory import live_bytes, with_peak_bytes

MB = 1_000_000


def _work() -> torch.Tensor:
    first = torch.zeros(MB)  # 4 MB
    second = first.exp()  # 8
    del first  # 4
    return torch.cat((second, second))  # 12


def test_peak_counts_what_lives_at_once() -> None:
    before = live_bytes()
    result, peak = with_peak_bytes(_work)
    assert len(result) == 2 * MB
    assert abs(peak - before - 12 * MB) < 0.01 * MB


def test_peak_counts_tensors_from_before_and_what_autograd_keeps() -> None:
    weight = torch.zeros(MB, requires_grad=True)
    before = live_bytes()
    assert before >= 4 * MB

    def backward() -> None:
        (weight.exp().exp()).sum().backward()

    _, peak = with_peak_bytes(backward)
    assert 8 * MB <= peak - before <= 17 * MB  # two outputs are kept, then two gradients
