"""KoLeo over all ranks is KoLeo of one process with all their images."""

import pytest
import torch
from torch import Tensor

from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

VIEWS, WIDTH, RANKS = 2, 8, 2


def _tokens(images: int) -> Tensor:
    """Of all ranks, (V, B, D) float64."""
    return torch.randn(
        VIEWS, images, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )


def loss_of_share(images: int) -> tuple[float, Tensor]:
    """Loss and gradient of this rank's images."""
    from dinoscale.engine.micro_batch import LossWeights, MicroBatchLoss, Targets
    from dinoscale.runtime import distributed

    share = _tokens(images).chunk(RANKS, dim=1)[distributed.rank()].flatten(0, 1).requires_grad_()
    targets = Targets(torch.zeros(VIEWS, images // RANKS, 1))
    weights = LossWeights(student_temp=0.1, koleo=1.0, koleo_over_ranks=True)
    loss = MicroBatchLoss(targets, weights).of_class_tokens(share)
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    assert share.grad is not None
    return float(loss), share.grad.unflatten(0, (VIEWS, -1))


@pytest.mark.parametrize("images", [6, 2])  # 2: a rank has one, whose neighbour is elsewhere
def test_ranks_together_are_one_process(images: int) -> None:
    from dinoscale.losses.koleo import koleo_loss

    whole = _tokens(images).requires_grad_()
    loss, _ = koleo_loss(whole)
    loss.backward()  # type: ignore[no-untyped-call]
    losses, gradients = zip(
        *run_distributed(
            "tests.distributed.test_koleo:loss_of_share",
            world_size=RANKS,
            timeout_s=90,
            images=images,
        ),
        strict=True,
    )
    assert sum(losses) / RANKS == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat(gradients, dim=1) / RANKS, whole.grad)
    if images > RANKS:
        alone, _ = koleo_loss(_tokens(images).chunk(RANKS, dim=1)[0])
        assert alone.item() != pytest.approx(losses[0], rel=1e-3)  # some are on the other rank
