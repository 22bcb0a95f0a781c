"""A ResNet-50 of few layers."""

from typing import Any

import pytest

from dinoscale.models import zoo


@pytest.fixture
def shallow_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the name's widths outside of blocks, with a block in each layer, a sixteenth as wide."""

    def shallow(name: str, *, in_chans: int) -> Any:
        zoo.ensure_torchvision()
        from torchvision.models.resnet import Bottleneck, ResNet

        assert (name, in_chans) == ("resnet50", 3)
        return ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4)

    monkeypatch.setattr(zoo, "torchvision_resnet", shallow)
