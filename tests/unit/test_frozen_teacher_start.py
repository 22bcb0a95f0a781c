"""What the start of a run says of its frozen teacher without reading it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoscale.config import RunConfig, parse_config
from dinoscale.errors import ConfigError
from dinoscale.training.frozen_teacher import require_same_form

CLASS, PATCH = "class_feature_weight", "patch_feature_weight"


def _config(distill: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    return parse_config({"distill": {"teacher": "w.pth", **distill}, **sections})


@pytest.mark.parametrize(
    ("then", "now", "key"),
    [
        ({}, {CLASS: 1.0}, CLASS),
        ({CLASS: 1.0}, {}, CLASS),
        ({CLASS: 1.0, PATCH: 1.0}, {CLASS: 1.0}, PATCH),
        ({CLASS: 1.0}, {CLASS: 0.5}, None),  # the same maps
        ({}, {}, None),
        ({"teacher": None}, {CLASS: 1.0}, None),  # said of the teacher
        ({CLASS: 1.0}, {"teacher": None}, None),
    ],
)
def test_other_outputs_of_the_teacher_are_refused_before_it_is_read(
    then: dict[str, Any], now: dict[str, Any], key: str | None
) -> None:
    saved = _config(then).model_dump(mode="json")
    checkpoint: Any = SimpleNamespace(path=Path("step_04"), state={"config": saved})
    if key is None:
        require_same_form(checkpoint, _config(now))
        return
    said = rf"^distill\.{key}: was {then.get(key, 0.0)} when step_04 .* is {now.get(key, 0.0)} now"
    with pytest.raises(ConfigError, match=said):
        require_same_form(checkpoint, _config(now))
    for field in (CLASS, PATCH):  # of a version that had none
        if not saved["distill"][field]:
            del saved["distill"][field]
    with pytest.raises(ConfigError, match=said):
        require_same_form(checkpoint, _config(now))
