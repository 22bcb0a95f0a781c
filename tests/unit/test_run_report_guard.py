"""The report of a guarded run: before and after, the margin, and falls."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import tostring

import pytest

from dinoscale.checkpoint.manage import as_table, list_checkpoints
from dinoscale.checkpoint.progress import Guarded, write_measured
from dinoscale.config import dump_config
from dinoscale.reports.run.guard import before_and_after, check_guard, exported_of, margin
from dinoscale.reports.run.phases import write_report
from dinoscale.reports.run.read import Record, read_record
from dinoscale.reports.run.write import write_run_report
from dinoscale.runtime.outputs import BEST_WEIGHTS
from tests.distributed.tiny_run import tiny_config

START, BEST, LAST = (
    {"rankme": r, "lidar": r / 2, "agreement": a} for r, a in ((8.0, 1.0), (10.0, 0.9), (7.0, 0.4))
)
FALL = {"time": "then", "step": 20, "event": "fall", "text": "step 20: the teacher has fallen"}


def _run(folder: Path, *, fall: str, events: list[dict[str, Any]]) -> Path:
    config = tiny_config(guard={"every_steps": 10, "images": "held_out", "min_agreement": 0.3})
    checkpoint = folder / "checkpoints" / "step_00000020"
    checkpoint.mkdir(parents=True)
    known = Guarded("9 of 9 images of held_out", "rankme", 20, LAST, 0, START, 10, BEST, fall)
    state = {
        **{"step": 20, "saved_at": "then", "plan": {"world_size": 1}},
        **{
            "progress": {"knn_top1": None, "guarded": None},
            "config": {"engine": {"zero_stage": 0}},
        },
    }
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_measured(checkpoint, None, known)
    lines = [
        {"step": step, **{f"guard_{name}": value for name, value in values.items()}}
        for step, values in ((0, START), (10, BEST), (20, LAST))
    ]
    for name, found in (("metrics", lines), ("events", events)):
        text = "".join(json.dumps(line) + "\n" for line in found)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def _verdicts(record: Record) -> list[tuple[str, str]]:
    return [(check.verdict, check.text) for check in check_guard(record)]


def test_the_page_shows_the_teacher_before_and_after(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", fall="it fell", events=[FALL])
    told = write_run_report(run, tmp_path / "out", attention=False)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "start (step 0)" in page
    assert "best (step 10)" in page
    assert "last (step 20)" in page
    assert "9 of 9 images of held_out" in page
    assert "rankme 7 fallen" in page  # beside its checkpoint
    (listed,) = list_checkpoints(run)["checkpoints"]
    assert listed["guard"] == "rankme 7 fallen"
    assert as_table([listed]).splitlines()[0].endswith("k-NN top-1  guard")
    assert as_table([listed]).endswith("-           rankme 7 fallen")
    names = {Path(path).name for path in told["plots"]}
    assert names == {"guard_rankme.png", "guard_lidar.png", "guard_agreement.png"}
    assert re.search(r"LiDAR, directions</th>\s*<td>4</td>\s*<td>5</td>\s*<td>3.5</td>", page)
    assert told["problems"] == ["step 20: the teacher has fallen"]


def test_the_margin_is_below_the_best(tmp_path: Path) -> None:
    record = read_record(_run(tmp_path, fall="", events=[]))
    assert margin(record, "guard_rankme") == ((pytest.approx(9.0), "best - 10%"),)
    assert margin(record, "guard_agreement") == ((0.3, "0.3: guard.min_agreement"),)
    assert margin(record, "guard_lidar") == margin(record, "knn_top1") == ()
    assert _verdicts(record) == [("ok", "no fall; best at step 10, by RankMe, directions")]


def test_what_a_phase_was_given_by_the_one_before_is_no_measurement_of_its_own(
    tmp_path: Path,
) -> None:
    run = _run(tmp_path, fall="", events=[])
    known = Guarded("9 images", "rankme", -1, LAST, 0, START, 10, BEST, start_in="01_heads")
    write_measured(run / "checkpoints" / "step_00000020", None, known)
    page = "".join(tostring(one, "unicode") for one in before_and_after(read_record(run), None))
    assert "start (step 0 of 01_heads)" in page
    assert "last" not in page
    assert "step -1" not in page


def test_the_page_of_all_phases_shows_before_and_after_over_all(tmp_path: Path) -> None:
    for name in ("01_heads", "02_adapt"):
        _run(tmp_path / "run" / "phases" / name, fall="", events=[])
    known = Guarded("9 images", "rankme", 20, LAST, 0, START, 10, BEST, start_in="01_heads")
    write_measured(tmp_path / "run/phases/02_adapt/checkpoints/step_00000020", None, known)
    card = {"checkpoint": "01_heads/checkpoints/step_00000020"}
    (tmp_path / "run" / f"{BEST_WEIGHTS}.json").write_text(json.dumps(card))
    write_report(tmp_path / "run", tmp_path / "out", attention=False)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "start (step 0 of 01_heads)" in page
    assert "best (step 10)" in page
    assert "exported (step 20 of 01_heads)" in page
    assert page.count("<img") == 3  # RankMe, LiDAR and agreement, over the steps of both


def test_lidar_of_other_views_is_no_part_of_the_column_of_what_was_exported(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", fall="", events=[])
    last, earlier = (run / "checkpoints" / f"step_000000{step}" for step in (20, 10))
    earlier.mkdir()
    state = json.loads((last / "state.json").read_text())
    (earlier / "state.json").write_text(json.dumps({**state, "step": 10}))
    for step, views in ((10, 2.0), (20, 3.0)):
        values = {"rankme": 7.0, "lidar": 40.0 + views, "lidar_views": views}
        known = Guarded("9 images", "rankme", step, values, 0, START, 5, {"rankme": 8.0})
        write_measured(run / "checkpoints" / f"step_{step:08d}", None, known)
    card = {"checkpoint": f"{run.name}/checkpoints/step_00000010"}
    (run / f"{BEST_WEIGHTS}.json").write_text(json.dumps(card))
    record = read_record(run)
    exported = exported_of(run, [record])
    page = "".join(tostring(one, "unicode") for one in before_and_after(record, exported))
    assert "exported (step 10)" in page
    assert "43" in page
    assert "42" not in page


def test_a_fall_that_has_ended_is_a_warning(tmp_path: Path) -> None:
    record = read_record(_run(tmp_path, fall="", events=[{**FALL, "step": 10}]))
    assert _verdicts(record)[0][0] == "warning"


def test_a_run_without_a_guard_says_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config()))
    record = read_record(tmp_path)
    assert _verdicts(record) == []
    assert margin(record, "guard_rankme") == ()


@pytest.mark.parametrize(
    "guarded", [{"step": 1}, [], asdict(Guarded("", "x", 1, {}, 1, {}, 1, {}))]
)
def test_a_checkpoint_of_anyones_making_harms_no_report(tmp_path: Path, guarded: object) -> None:
    run = _run(tmp_path / "run", fall="", events=[])
    (run / "checkpoints" / "step_00000020" / "measured.json").write_text(
        json.dumps({"guarded": guarded})
    )
    write_run_report(run, tmp_path / "out", attention=False)
