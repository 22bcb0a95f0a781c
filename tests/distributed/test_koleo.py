"""KoLeo over ranks is KoLeo of one process with all their images."""

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


def loss_of_share(images: int, group: int | None, count: int) -> tuple[float, Tensor]:
    """Loss and gradient of this rank's images, neighbours in groups on all ranks."""
    from dinoscale.engine.micro_batch import LossWeights, MicroBatchLoss, Targets
    from dinoscale.runtime import distributed

    share = _tokens(images).chunk(RANKS, dim=1)[distributed.rank()].flatten(0, 1).requires_grad_()
    targets = Targets(torch.zeros(VIEWS, images // RANKS, 1))
    weights = LossWeights(
        student_temp=0.1,
        koleo=1.0,
        koleo_over_ranks=True,
        koleo_group=group,
        koleo_neighbours=count,
    )
    loss = MicroBatchLoss(targets, weights).of_class_tokens(share)
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    assert share.grad is not None
    return float(loss), share.grad.unflatten(0, (VIEWS, -1))


@pytest.mark.parametrize(
    ("images", "group", "count"),
    [
        (6, None, 1),
        (2, None, 1),  # a rank has one, whose neighbour is elsewhere
        (18, 6, 2),  # the second of three groups lies on both ranks
        (12, 3, 1),  # every group lies on one rank
    ],
)
def test_ranks_together_are_one_process(images: int, group: int | None, count: int) -> None:
    from dinoscale.losses.koleo import koleo_loss

    whole = _tokens(images).requires_grad_()
    if group is None:
        loss, _ = koleo_loss(whole, num_neighbours=count)
    else:
        of_groups = [koleo_loss(x, num_neighbours=count)[0] for x in whole.split(group, dim=1)]
        loss = torch.stack(of_groups).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    losses, gradients = zip(
        *run_distributed(
            "tests.distributed.test_koleo:loss_of_share",
            world_size=RANKS,
            timeout_s=90,
            images=images,
            group=group,
            count=count,
        ),
        strict=True,
    )
    assert sum(losses) / RANKS == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat(gradients, dim=1) / RANKS, whole.grad)
    if group is None and images > RANKS:
        alone, _ = koleo_loss(_tokens(images).chunk(RANKS, dim=1)[0])
        assert alone.item() != pytest.approx(losses[0], rel=1e-3)  # some are on the other rank
