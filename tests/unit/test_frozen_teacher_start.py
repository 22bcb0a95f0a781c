"""What the start of a run says of its frozen teacher without reading it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinoscale.config import RunConfig, parse_config
from dinoscale.errors import ConfigError
from dinoscale.training.frozen_teacher import recipe_caution, require_same_form

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
    checkpoint = _checkpoint(saved)
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


def _checkpoint(saved: dict[str, Any], *, skipped: int = 0) -> Any:
    progress = SimpleNamespace(data_offset=skipped)
    return SimpleNamespace(path=Path("step_04"), state={"config": saved}, progress=progress)


def test_a_run_that_skipped_images_cannot_go_on_with_stored_targets() -> None:
    live = _config({})
    stored = _config({"teacher": None, "targets": "t"})
    saved = live.model_dump(mode="json")
    require_same_form(_checkpoint(saved, skipped=3), live)
    require_same_form(_checkpoint(saved), stored)
    said = r"^distill.targets: the run of step_04 has rolled back and skipped the images of 3 steps"
    with pytest.raises(ConfigError, match=said):
        require_same_form(_checkpoint(saved, skipped=3), stored)


WHOLE = {"drop_path_rate": 0.0}
WARMS_UP = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3}
CURVE = {"start": 0.04, "peak": 0.07, "end": 0.07, "warmup_epochs": 3}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({}, []),
        ({"model": {"drop_path_rate": 0.1}}, ["model.drop_path_rate=0.1"]),
        ({"dino": WARMS_UP}, ["dino.warmup_teacher_temp_epochs=0"]),
        ({"dino": {**WARMS_UP, "warmup_teacher_temp_epochs": 0}}, []),
        ({"schedules": {"teacher_temp": CURVE}}, ["schedules.teacher_temp"]),
        ({"schedules": {"teacher_temp": {**CURVE, "start": 0.07}}}, []),
        ({"model": {"drop_path_rate": 0.1}, "dino": WARMS_UP}, ["drop_path", "temp_epochs=0"]),
    ],
)
def test_a_student_trained_as_without_a_frozen_teacher_is_warned_of(
    sections: dict[str, dict[str, Any]], says: list[str]
) -> None:
    given = {"model": WHOLE, **sections}
    said = recipe_caution(_config({}, **given))
    assert (said is None) == (not says)
    assert all(text in (said or "") for text in says)
    for distill in ({CLASS: 1.0}, {"teacher": None}):  # its heads give no targets
        assert recipe_caution(_config(distill, **given)) is None
