"""A phase begins where the one before ended: weights, average, moments, centers, positions."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoscale.checkpoint.layout import directory
from dinoscale.checkpoint.load import Checkpoint
from dinoscale.config import RunConfig
from dinoscale.models.vit import resize_pos_embed
from tests.distributed.tiny_run import dinov2, take_step, tiny_config, tiny_plan
from tests.harness import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

POSITIONS = "backbone.pos_embed"
STAGES = [(0, 3), (3, 2), (2, 1)]  # of the phase before and of this one
SIDE = 48  # pixels of this phase's global crops; 32 before


def _config(stage: int, **changes: dict[str, Any]) -> RunConfig:
    engine = {"zero_stage": stage, "precision": "fp32"}
    gram = {"loss_weight": 1.0, "refresh_every_steps": 1}
    return tiny_config(**dinov2("centering", patch_head=True, engine=engine, gram=gram, **changes))


def begin_phases(folder: str) -> list[bool]:
    """On every rank: take steps, save, begin the next phase, save; whether features are equal."""
    from dinoscale.engine.build import build_pair
    from dinoscale.runtime import distributed
    from dinoscale.training.resume import open_other_run, restore

    equal = []
    for before, after in STAGES:
        root = Path(folder) / f"{before}_{after}"
        config = _config(before)
        plan = tiny_plan(config)
        pair = build_pair(config, plan)
        for step in range(2):
            take_step(*pair, config, plan, step)
        _save(root / "before", config, *pair)
        crops = {"global_size": SIDE, "local_size": 16}
        train = {"continue_from": str(root / "before")}
        config = _config(after, crops=crops, train=train)
        new = build_pair(config, tiny_plan(config), values=False)
        restore(open_other_run(config), *new, image_size=SIDE)
        _save(root / "after", config, *new)
        images = torch.linspace(-1, 1, 2 * 3 * SIDE**2).view(2, 3, SIDE, SIDE)
        features = [teacher.plain_backbone()([images]) for _, teacher in (pair, new)]
        equal.append(torch.equal(*features))
        distributed.gather_objects(None)
    return equal


def _save(run_dir: Path, config: RunConfig, student: Any, teacher: Any) -> None:
    from dinoscale.checkpoint.retention import Keep
    from dinoscale.checkpoint.save import Saver

    saver = Saver(run_dir, Keep(last=1))
    about: dict[str, Any] = {"saved_at": "then", "progress": {"knn_top1": None}}
    about |= {"config": config.model_dump(mode="json"), "plan": {"world_size": 2}}
    assert saver.begin(1, student, teacher, about) is None
    result = saver.wait()
    assert result is None or result.error is None


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phases")
    arguments = {"folder": str(folder)}
    for of_rank in run_distributed(
        "tests.distributed.test_phases:begin_phases", world_size=2, timeout_s=120, **arguments
    ):
        assert of_rank == [True] * len(STAGES), "the teacher sees other features"
    return folder


@pytest.mark.parametrize("stages", STAGES)
def test_phase_begins_with_the_whole_state_of_the_one_before(
    begun: Path, stages: tuple[int, int]
) -> None:
    root = begun / f"{stages[0]}_{stages[1]}"
    before, after = (Checkpoint(directory(root / name, 1)) for name in ("before", "after"))
    kinds = {kind: names for kind, names in before.kinds().items() if POSITIONS in names}
    assert kinds.keys() == {"master", "ema", "exp_avg", "exp_avg_sq", "gram"}
    assert after.gram_refreshes == before.gram_refreshes == 2
    for kind, name in ((kind, name) for kind, names in kinds.items() for name in names):
        then, now = (
            checkpoint.read(kind, name, 0, math.prod(checkpoint.shapes[name])).view(
                checkpoint.shapes[name]
            )
            for checkpoint in (before, after)
        )
        if name == POSITIONS:
            assert now.shape[1] == 1 + (SIDE // 8) ** 2
            then = resize_pos_embed(then, image_size=(SIDE, SIDE), patch_size=8)
            if kind == "exp_avg_sq":
                then = then.clamp(min=0)
        assert torch.equal(now, then), (kind, name)
    assert before.shared.keys() == after.shared.keys()
    assert {"center", "patch_center"} <= before.shared.keys()
    assert all(torch.equal(after.shared[name], value) for name, value in before.shared.items())
    assert before.state["optimizer_steps"] == after.state["optimizer_steps"]
