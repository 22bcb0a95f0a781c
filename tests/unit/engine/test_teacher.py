"""What the teacher keeps of the micro-batches of a step."""

import torch

from dinoscale.engine.frozen.seen import Seen


def test_prototypes_are_copied_once_a_step_and_head() -> None:
    weight_v, patch_weight_v = torch.rand(7, 4), torch.rand(5, 4)
    x, y = torch.rand(3, 4), torch.rand(2, 4)
    first = Seen(copies=True)
    second = Seen(copies=True, earlier=first)
    for seen in (first, second):
        seen.of_prototypes(x, None, weight_v, None)
        seen.of_prototypes(None, y, patch_weight_v, None)
    assert first.patches is not None
    assert second.patches is not None
    for pair, source in (
        ((first.classes, second.classes), weight_v),
        ((first.patches, second.patches), patch_weight_v),
    ):
        assert pair[0].weight_v is pair[1].weight_v is not source
        assert torch.equal(pair[0].weight_v, source)
