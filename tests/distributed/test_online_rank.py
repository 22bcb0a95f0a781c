"""RankMe of a run that is measured no other way: when, of which images, and on how many ranks.

`evaluate rank` measures the checkpoints of a run on 2 ranks on one.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dinoscale.checkpoint.layout import directory
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.evaluate.label_free.rank import Samples, evaluate_rank
from tests.distributed.tiny_run import tiny_config
from tests.harness import run_distributed

pytestmark = pytest.mark.distributed

MEASURED, OTHERS = (f"synthetic:shapes?images={n}&size=16" for n in (48, 8))
IMAGES, EVERY, STEPS = 40, 2, 8  # of 48 images; epochs of two steps


def train_on_ranks(run_dir: str) -> list[dict[str, Any]]:
    """On every rank: the lines of a run that have the rank."""
    from dinoscale.runtime import distributed
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.trainer import train

    sizes = {"batch_size": 7, "crop": 16, "resize": 16}
    config = tiny_config(
        run_dir,
        data={
            "train": [{"source": MEASURED}, {"source": OTHERS}],
            "images_per_epoch": 8,
            "num_workers": 0,
        },
        train={"epochs": 4, "batch_size": 4, "micro_batch_size": 2},
        eval={"rank_images": IMAGES, "every_epochs": EVERY, **sizes},
        checkpoint={"every_epochs": EVERY},
        engine={"precision": "fp32", "zero_stage": 0},
    )
    train(config, read_process(os.environ))
    distributed.gather_objects(None)
    lines = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "rankme" in line]


def test_a_run_without_labels_writes_what_evaluate_rank_gives(tmp_path: Path) -> None:
    function = "tests.distributed.test_online_rank:train_on_ranks"
    whole, _ = run_distributed(function, world_size=2, timeout_s=200, run_dir=str(tmp_path / "run"))
    assert [line["step"] for line in whole] == [0, 4, STEPS]
    options = ExtractionOptions(num_workers=0, progress=False, cache=False, batch_size=7)
    samples = Samples(images=IMAGES, views=0)
    for line in whole[1:]:
        weights = directory(tmp_path / "run", line["step"])
        report = evaluate_rank(weights, MEASURED, samples=samples, options=options)
        assert {"rankme": line["rankme"]} == report["score"]
        assert line["alpha_req"] == report["alpha_req"]
    assert len({line["rankme"] for line in whole}) == 3
