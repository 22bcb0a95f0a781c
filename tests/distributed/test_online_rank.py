"""RankMe of a run that is measured no other way: when, of which images, and on how many ranks.

A run on 2 ranks goes from start to start; `evaluate rank` measures its checkpoints on one.
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
IMAGES, EVERY, STEPS = 40, 2, 4  # of 48 images; epochs of two steps


def _ranks(run_dir: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "rankme" in line]


def train_in_parts(run_dir: str) -> list[list[dict[str, Any]]]:
    """On every rank: what is measured after each start; the last one finds its own number lost."""
    from dinoscale.runtime import distributed
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.trainer import train

    sources = [{"source": MEASURED}, {"source": OTHERS}]
    found, metrics = [], Path(run_dir) / "metrics.jsonl"
    for start, steps in enumerate((4, 8, 8)):
        if start == 2 and distributed.rank() == 0:
            lines = metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line) != found[-1][-1]]
            metrics.write_text("".join(kept))
        distributed.gather_objects(None)
        config = tiny_config(
            run_dir,
            data={"train": sources, "images_per_epoch": 8, "num_workers": 0},
            train={"epochs": 4, "batch_size": 4, "micro_batch_size": 2, "stop_after_steps": steps},
            eval={"rank_images": IMAGES, "every_epochs": EVERY, "batch_size": 7}
            | {"crop": 16, "resize": 16},
            checkpoint={"keep_last": 9},
            engine={"precision": "fp32", "zero_stage": 3},
        )
        train(config, read_process(os.environ))
        found.append(_ranks(run_dir))
        distributed.gather_objects(None)
    return found


def test_a_run_without_labels_writes_what_evaluate_rank_gives(tmp_path: Path) -> None:
    function = "tests.distributed.test_online_rank:train_in_parts"
    first, second = run_distributed(
        function, world_size=2, timeout_s=200, run_dir=str(tmp_path / "run")
    )
    assert first == second
    after_4, whole, again = first
    assert [line["step"] for line in after_4] == [0, 4]
    assert [line["step"] for line in whole] == [0, 4, 8]
    assert again == whole, "one that was lost is measured again, no other one is"
    options = ExtractionOptions(num_workers=0, progress=False, cache=False, batch_size=7)
    samples = Samples(images=IMAGES, views=0)
    for line in whole[1:]:
        weights = directory(tmp_path / "run", line["step"])
        report = evaluate_rank(weights, MEASURED, samples=samples, options=options)
        assert {"rankme": line["rankme"]} == report["score"]
        assert line["alpha_req"] == report["alpha_req"]
    assert len({line["rankme"] for line in whole}) == 3
