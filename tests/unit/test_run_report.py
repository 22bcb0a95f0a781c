"""The report of a run: correct for healthy and failing runs, robust to damaged files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dinoscale.config import (
    HeadConfig,
    RunConfig,
    dump_config,
    load_config,
    parse_config,
    phases_of,
)
from dinoscale.config.sections.objectives import IbotConfig
from dinoscale.engine.schedules import cosine
from dinoscale.errors import ConfigError, DataError
from dinoscale.reports.html import drawing, finish_plot
from dinoscale.reports.run.chain import beginnings, draw_chain
from dinoscale.reports.run.findings import check_run
from dinoscale.reports.run.page import changed_settings
from dinoscale.reports.run.phases import write_report
from dinoscale.reports.run.plots import HEIGHT, WIDTH, _plot_specs
from dinoscale.reports.run.read import EVENTS_KEPT, NUMBERS, Record, read_record
from dinoscale.reports.run.series import Point, Series
from dinoscale.reports.run.state import State, describe_run, duration_text, find_state
from dinoscale.reports.run.write import write_run_report

EPOCHS, PER_EPOCH, BATCH = 4, 50, 32
STEPS = EPOCHS * PER_EPOCH
NOW = 1_800_000_000.0


def config(**changed: dict[str, Any]) -> RunConfig:
    """The defaults, with settings by section."""
    settings: dict[str, dict[str, Any]] = {
        "train": {"epochs": EPOCHS, "batch_size": BATCH},
        "optim": {"warmup_epochs": 1},
        "data": {"train": "/nowhere/images", "num_workers": 4},
        "dino": {"momentum": 0.99},
    }
    return parse_config({name: {**settings[name], **changed.get(name, {})} for name in settings})


def log_line(step: int, **changed: Any) -> dict[str, Any]:
    """What training logs after `step` steps."""
    momentum = cosine(step - 1, base=0.99, final=1.0, total_steps=STEPS)
    return {
        "step": step,
        "epoch": (step - 1) // PER_EPOCH,
        "loss": 5 - step / STEPS,
        "target_mutual_information": 1.0,
        "momentum": momentum,
        "images_per_s": 64.0,
        "data_wait": 0.02,
        "skipped_steps": 0,
        **changed,
    }


def log_lines(end: int = STEPS, **changed: Any) -> list[dict[str, Any]]:
    """A log to `end`, every five steps, with k-NN and saves at the ends of epochs."""
    lines: list[dict[str, Any]] = [{"step": 0, "knn_top1": 10.0, "rankme": 3.0}]
    for step in range(5, end + 1, 5):
        lines.append(log_line(step, **changed))
        if step % PER_EPOCH == 0:
            lines.append({"step": step, "knn_top1": 10 + step / 10, "rankme": 3 + step / 50})
            lines.append({"step": step, "saved_step": step, "save_stall_s": 0.5})
    return lines


def event(step: int, name: str, **details: Any) -> dict[str, Any]:
    return {"time": "2026-01-02T03:04:05+00:00", "step": step, "event": name, **details}


def as_lines(objects: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in objects).encode()


def make_run(
    folder: Path,
    lines: Sequence[dict[str, Any]],
    *,
    events: Sequence[dict[str, Any]] = (),
    age_s: float = 0.0,
    **changed: dict[str, Any],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config(**changed)))
    (folder / "deepspeed.json").write_text(
        json.dumps(
            {
                "student": {
                    "train_batch_size": BATCH,
                    "train_micro_batch_size_per_gpu": 4,
                    "gradient_accumulation_steps": 2,
                },
                "teacher": None,
            }
        )
    )
    (folder / "versions.json").write_text('{"torch": "2.9"}')
    (folder / "metrics.jsonl").write_bytes(as_lines(lines))
    os.utime(folder / "metrics.jsonl", (NOW - age_s, NOW - age_s))
    if events:
        (folder / "events.jsonl").write_bytes(as_lines(events))
    return folder


def state_of(run_dir: Path) -> State:
    return find_state(read_record(run_dir), now=NOW)


def verdicts_of(run_dir: Path) -> dict[str, str]:
    """Finding -> verdict."""
    record = read_record(run_dir)
    return {check.name: check.verdict for check in check_run(record, find_state(record, now=NOW))}


# reading


def test_a_folder_without_a_run_is_refused_and_what_is_missing_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.yaml nor metrics\.jsonl"):
        read_record(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        read_record(tmp_path / "absent")


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"\xff\xfe\x00",
        b'{"step": 12, "loss": 3.',
        b"[1, 2]",
        b'{"loss": 3.0}',
        b'{"step": true, "loss": 3.0}',
        b'{"step": -1, "loss": 3.0}',
        b'{"step": 1e300, "loss": 3.0}',
        b'{"step": 1' + b"0" * 5000 + b', "loss": 3.0}',
        b"[" * 100_000,
        b"x" * (3 * 2**20),
    ],
    ids=lambda line: line[:12].decode(errors="replace"),
)
def test_a_damaged_line_is_counted_and_the_others_are_read(tmp_path: Path, line: bytes) -> None:
    run_dir = make_run(tmp_path, [])
    good = as_lines(log_lines())
    half = good.index(b"\n", len(good) // 2) + 1
    (run_dir / "metrics.jsonl").write_bytes(good[:half] + line + b"\n" + good[half:])
    record = read_record(run_dir)
    assert record.damaged == {"metrics.jsonl": 1}
    assert record.series["loss"].count == STEPS // 5
    assert verdicts_of(run_dir)["metrics.jsonl"] == "warning"


@pytest.mark.parametrize(
    "value", ["null", "NaN", "Infinity", '"text"', "1" + "0" * 200, "1" + "0" * 400, "1e200"]
)
def test_a_loss_that_is_no_number_is_counted_and_not_drawn(tmp_path: Path, value: str) -> None:
    run_dir = make_run(tmp_path, log_lines(50))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 55, "loss": {value}, "lr": 0.1}}\n')
    record = read_record(run_dir)
    assert record.not_finite == 1
    assert record.series["loss"].last == Point(50, 5 - 50 / STEPS)
    assert record.series["lr"].last == Point(55, 0.1)
    assert verdicts_of(run_dir)["loss"] == "warning"


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, [])
    for name in ("metrics.jsonl", "versions.json"):
        (run_dir / name).unlink()
        os.mkfifo(run_dir / name)
    os.mkfifo(run_dir / "events.jsonl")
    (run_dir / "checkpoints" / "step_00000005").mkdir(parents=True)
    os.mkfifo(run_dir / "checkpoints" / "step_00000005" / "state.json")
    assert state_of(run_dir).how == "not begun"


def test_a_configuration_that_cannot_be_read_costs_its_part_only(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, log_lines())
    (run_dir / "config.yaml").write_text("defaults: [/etc/passwd]\n")
    record = read_record(run_dir)
    assert record.config is None
    assert "defaults" in record.missing["config.yaml"]
    assert record.series["loss"].count == STEPS // 5
    assert find_state(record, now=NOW).stop_step is None


def test_passwords_that_an_earlier_version_wrote_are_hidden(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, log_lines())
    file = run_dir / "config.yaml"
    file.write_text(file.read_text() + "# http://bob:PASSW0RD@host/a.tar?sig=PASSW0RD\n")
    assert "http://***@host/a.tar?sig=***" in read_record(run_dir).config_text


def test_only_the_newest_events_are_held_and_all_are_counted(tmp_path: Path) -> None:
    many = [event(step, "skipped", reason="x" * 5000) for step in range(EVENTS_KEPT + 10)]
    record = read_record(make_run(tmp_path, [], events=many))
    assert len(record.events.newest) == EVENTS_KEPT
    assert record.events.counts["skipped"] == EVENTS_KEPT + 10
    assert record.events.first["skipped"].step == 0
    assert len(record.events.last["skipped"].detail("reason")) < 1000


_WRONG_TYPES = {
    "saved_at": 3,
    "progress": {"knn_top1": "x"},
    "plan": {"world_size": 1},
    "config": {"engine": {"zero_stage": 2}},
}


@pytest.mark.parametrize("state", ["[" * 100_000, "{}", "not json", json.dumps(_WRONG_TYPES)])
def test_a_checkpoint_that_cannot_be_read_is_listed_without_numbers(
    tmp_path: Path, state: str
) -> None:
    run_dir = make_run(tmp_path, [])
    folder = run_dir / "checkpoints" / "step_00000005"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(state)
    (found,) = read_record(run_dir).checkpoints
    assert (found.step, found.saved_at, found.knn_top1) == (5, None, None)


# state


@given(
    per_epoch=st.integers(1, 5000),
    epochs=st.integers(1, 300),
    share=st.floats(0.01, 1.0),
    start=st.sampled_from([0.9, 0.996]),
)
def test_the_length_of_an_epoch_follows_from_the_momentum(
    per_epoch: int, epochs: int, share: float, start: float
) -> None:
    total = per_epoch * epochs
    step = round(share * total)
    assume(step >= 2)
    record = Record(
        Path(),
        config=config(train={"epochs": epochs}, dino={"momentum": start}),
        series={name: Series() for name in NUMBERS},
        last_epoch=(step - 1) // per_epoch,
    )
    momentum = cosine(step - 1, base=start, final=1.0, total_steps=total)
    record.series["momentum"].add(step, momentum)
    found = find_state(record, now=NOW)
    assert (found.steps_per_epoch, found.stop_step) == (per_epoch, total)


def test_a_run_with_all_its_steps_is_finished(tmp_path: Path) -> None:
    found = state_of(make_run(tmp_path, log_lines(), age_s=1e6))
    assert (found.how, found.step, found.stop_step) == ("finished", STEPS, STEPS)


def test_a_run_with_stop_after_steps_is_finished_there(tmp_path: Path) -> None:
    stop = {"stop_after_steps": 100}
    found = state_of(make_run(tmp_path, log_lines(100), age_s=1e6, train=stop))
    assert (found.how, found.stop_step) == ("finished", 100)


def test_a_run_whose_last_steps_are_not_saved_is_not_finished(tmp_path: Path) -> None:
    lines = [line for line in log_lines() if line.get("saved_step") != STEPS]
    assert state_of(make_run(tmp_path, lines, age_s=10)).how == "training"


@pytest.mark.parametrize(("age_s", "how"), [(60, "training"), (3600, "silent")])
def test_the_age_of_its_log_decides_whether_a_run_is_training(
    tmp_path: Path, age_s: float, how: str
) -> None:
    assert state_of(make_run(tmp_path, log_lines(100), age_s=age_s)).how == how


def test_a_run_with_rare_log_lines_is_given_more_time(tmp_path: Path) -> None:
    slow = log_lines(100, images_per_s=BATCH * 5 / 1000)  # 1000 s between two lines
    assert state_of(make_run(tmp_path, slow, age_s=3600)).how == "training"


def test_an_end_by_a_signal_or_an_error_is_reported_until_the_run_resumes(tmp_path: Path) -> None:
    ended = [event(100, "preempted", reason="SIGTERM")]
    run_dir = make_run(tmp_path, log_lines(100), events=ended, age_s=10)
    assert state_of(run_dir).how == "asked to stop"
    make_run(tmp_path, log_lines(100), events=[*ended, event(100, "resumed", ranks=2)], age_s=10)
    assert state_of(run_dir).how == "training"
    (run_dir / "logs").mkdir()
    start, end = "- 2026-01-02 03:04:05,678 rank 0 of 1", "- 2026-01-02 03:05:05,678 error: boom"
    (run_dir / "logs" / "rank_00000.log").write_text(f"{start}\nI 2026 step\n{end}\nmore\n")
    found = state_of(run_dir)
    assert (found.how, found.reason) == ("failed", "boom\nmore")
    (run_dir / "logs" / "rank_00000.log").write_text(f"{start}\n{end}\n{start}\nI 2026 error: no\n")
    assert state_of(run_dir).how == "training"


def test_the_summary_says_what_how_far_how_fast_and_how_well(tmp_path: Path) -> None:
    record = read_record(make_run(tmp_path, log_lines(100), age_s=30))
    text = " ".join(describe_run(record, find_state(record, now=NOW)))
    assert "vit_small_patch16_224 (21.7 M parameters" in text
    assert "on 4 ranks" in text
    assert "Still training: 100 of 200 steps, 2 epochs, 3,200 images" in text
    assert "Trained for 50 s at 64 images/s (median). Time left at this speed: 50 s." in text
    assert "20.0 % at step 100" in text


def test_the_summary_calls_maps_without_heads_by_their_name(tmp_path: Path) -> None:
    record = read_record(make_run(tmp_path, log_lines(100), age_s=30))
    config = parse_config(
        {
            "dino": {"loss_weight": 0.0},
            "crops": {"num_local": 0},
            "distill": {"teacher": "w.pth", "class_feature_weight": 1.0},
        }
    )
    text = describe_run(replace(record, config=config), find_state(record, now=NOW))[0]
    assert "(21.7 M parameters and maps to the teacher's features of 0.148 M)" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (80, "80 s"), (600, "10.0 min"), (1e4, "2.8 h"), (1e6, "11.6 days")],
)
def test_durations_have_a_fitting_unit(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


# checks


def test_a_healthy_run_has_no_warning(tmp_path: Path) -> None:
    assert set(verdicts_of(make_run(tmp_path, log_lines(), age_s=1e6)).values()) == {"ok"}


_COLLAPSE = event(60, "collapse", kind="uniform", text="lower dino.teacher_temp")
_FAILED = event(150, "save failed", reason="disk full")


@pytest.mark.parametrize(
    ("name", "verdict", "changed", "events"),
    [
        ("collapse", "problem", {}, [_COLLAPSE]),
        ("skipped steps", "warning", {}, [event(60, "skipped", reason="loss is nan")]),
        ("skipped steps", "warning", {"skipped_steps": 2}, []),
        ("rollbacks", "warning", {}, [event(60, "rolled back", to_step=50)]),
        ("resumes", "ok", {}, [event(60, "resumed", ranks=1)]),
        ("saves", "warning", {}, [_FAILED]),
        ("saves", "problem", {}, [{**_FAILED, "step": 200}]),
        ("data wait", "warning", {"data_wait": 0.3}, []),
        ("events.jsonl", "warning", {}, [{"step": 1}]),
    ],
)
def test_problems_are_reported(
    tmp_path: Path, name: str, verdict: str, changed: dict[str, Any], events: list[dict[str, Any]]
) -> None:
    found = verdicts_of(make_run(tmp_path, log_lines(**changed), events=events, age_s=1e6))
    assert found.pop(name) == verdict
    assert set(found.values()) == {"ok"}


def test_a_process_that_reads_its_own_images_is_not_warned_of_waiting(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, log_lines(data_wait=0.3), data={"num_workers": 0})
    assert verdicts_of(run_dir)["data wait"] == "ok"


def test_unreadable_images_are_reported_with_an_example(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, log_lines())
    (run_dir / "bad_samples.jsonl").write_bytes(
        as_lines([{"path": "/a/b.jpg", "error": "cut off"}])
    )
    record = read_record(run_dir)
    (found,) = (c for c in check_run(record, find_state(record, now=NOW)) if c.name == "images")
    assert found.verdict == "warning"
    assert "/a/b.jpg: cut off" in found.text


def test_a_drop_of_the_throughput_at_the_end_is_reported(tmp_path: Path) -> None:
    lines = log_lines()
    for line in lines[-12:]:
        if "images_per_s" in line:
            line["images_per_s"] = 20.0
    assert verdicts_of(make_run(tmp_path, lines))["throughput"] == "warning"


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [([10, 30, 40], "ok"), ([10, 40, 39], "ok"), ([10, 40, 30], "warning"), ([10, 9], "warning")],
)
def test_knn_that_falls_or_never_rises_is_reported(
    tmp_path: Path, accuracies: list[float], verdict: str
) -> None:
    knn = [{"step": 50 * i, "knn_top1": float(top1)} for i, top1 in enumerate(accuracies)]
    assert verdicts_of(make_run(tmp_path, [log_line(5), *knn]))["k-NN"] == verdict


# the page


class Elements(HTMLParser):
    """Tags and their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


_EVIL = "<script>alert(1)</script> $x_{$"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A run with hostile names, its report, and what `write_run_report` returned."""
    run_dir = tmp_path_factory.mktemp("runs") / _EVIL.replace("/", "")
    events = [event(step, _EVIL, reason=_EVIL) for step in range(150)]
    kept = ("step", "epoch", "loss", "momentum", "knn_top1", "rankme")
    lines = [{key: line[key] for key in kept if key in line} for line in log_lines()]
    make_run(run_dir, [*lines, {"step": STEPS, "grad_norm": 1e-90}], events=[*events, _COLLAPSE])
    (run_dir / "versions.json").write_text(json.dumps({_EVIL: _EVIL}))
    (run_dir / "bad_samples.jsonl").write_bytes(as_lines([{"path": _EVIL, "error": _EVIL}]))
    out = tmp_path_factory.mktemp("out")
    return run_dir, out, write_run_report(run_dir, out, attention=True)


def test_the_page_needs_no_network_and_runs_nothing(
    report: tuple[Path, Path, dict[str, Any]],
) -> None:
    page = Elements((report[1] / "report.html").read_text())
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"}
    sources = [found["src"] or "" for _, found in page.tags if "src" in found]
    assert len(sources) == 5
    assert all(source.startswith("data:image/") for source in sources)
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert _EVIL in page.text


def test_the_page_shows_what_happened(report: tuple[Path, Path, dict[str, Any]]) -> None:
    page = Elements((report[1] / "report.html").read_text())
    assert "Finished: 200 of 200 steps" in page.text
    assert "lower dino.teacher_temp" in page.text
    assert "The newest 100 of 151" in page.text
    assert page.text.count("2026-01-02T03:04:05") == 100
    assert "Not drawn: there is no checkpoint." in page.text
    assert "data.train" in page.text
    assert re.search(r"problem\s+collapse", page.text)


def test_no_caption_is_wider_than_its_plot(tmp_path: Path) -> None:
    line = log_line(5, rankme=30.0, rank_images=25000)
    captions = [spec.caption for spec in _plot_specs(read_record(make_run(tmp_path, [line])))]
    assert "RankMe of the teacher, directions (at most 25000)" in captions
    with drawing():
        for caption in captions:
            figure = Figure(figsize=(WIDTH, HEIGHT))
            canvas = FigureCanvasAgg(figure)
            title = figure.add_axes((0.1, 0.1, 0.9, 0.8)).set_title("", loc="left")
            finish_plot(figure, caption)
            canvas.draw()
            assert title.get_text() == caption
            assert title.get_window_extent().x1 <= figure.bbox.x1, caption


def test_plots_are_drawn_of_what_has_data(report: tuple[Path, Path, dict[str, Any]]) -> None:
    names = {path.name for path in (report[1] / "plots").glob("*.png")}
    assert names == {"loss.png", "knn_top1.png", "rankme.png", "momentum.png", "grad_norm.png"}
    assert {Path(path).name for path in report[2]["plots"]} == names


def test_the_numbers_are_kept_as_json(report: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, returned = report
    numbers = json.loads((out / "report.json").read_text())
    assert numbers["highest"]["knn_top1"] == {"step": 200, "value": 30.0}
    assert numbers["last"] == json.loads(json.dumps(returned["last"]))
    assert numbers["events"] == {_EVIL[:40]: 150, "collapse": 1}
    assert numbers["attention"]["picture"] is None
    assert returned["problems"]


def test_a_run_before_its_first_step_has_a_report(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", [])
    (run_dir / "metrics.jsonl").unlink()
    before = sorted(run_dir.rglob("*"))
    result = write_run_report(run_dir, tmp_path / "out", attention=True)
    assert result["state"]["how"] == "not begun"
    assert result["plots"] == []
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.parametrize("kind", ["stopped", "rolled back"])
def test_a_fall_at_the_last_step_is_no_finish_until_a_later_start(
    tmp_path: Path, kind: str
) -> None:
    events = [event(STEPS, "fall", text="it fell"), event(STEPS, kind, reason="it fell")]
    found = state_of(make_run(tmp_path / "fallen", log_lines(), events=events))
    assert (found.how, found.reason) == ("failed", "it fell")
    events.append(event(STEPS, "resumed", ranks=1))
    assert state_of(make_run(tmp_path / "later", log_lines(), events=events)).how == "finished"


def test_a_run_of_phases_has_a_page_that_leads_to_the_report_of_each(tmp_path: Path) -> None:
    kept = ("step", "epoch", "loss", "momentum", "knn_top1")
    lines = [{key: line[key] for key in kept if key in line} for line in log_lines()]
    make_run(tmp_path / "run" / "phases" / "01_first", lines)
    make_run(tmp_path / "run" / "phases" / "02_second", lines[: len(lines) // 2])
    result = write_report(tmp_path / "run", tmp_path / "out", attention=False)
    page = Elements(Path(result["report"]).read_text())
    links = [found["href"] or "" for tag, found in page.tags if tag == "a"]
    assert links == [f"phases/{name}/report.html" for name in ("01_first", "02_second")]
    assert all("Finished" in (tmp_path / "out" / link).read_text() for link in links[:1])
    assert f"{STEPS} of {STEPS}" in page.text
    assert f"{STEPS // 2} of {STEPS}" in page.text
    assert result["phases"]["02_second"]["state"]["step"] == STEPS // 2
    assert [tag for tag, _ in page.tags].count("img") == 1  # k-NN, and no patches


def test_phases_that_began_at_the_same_place_lie_side_by_side(tmp_path: Path) -> None:
    config = load_config("quickstart_dinov3", [f"run_dir={tmp_path}"])
    for number, run in enumerate(phases_of(config)):
        lines = [{"step": step, "loss": 1.0, "patch_knn_top1": 50.0 + number} for step in (0, 9)]
        make_run(Path(run.run_dir), lines[: 1 + (number < 2)])
        (Path(run.run_dir) / "config.yaml").write_text(dump_config(run))
    result = write_report(tmp_path, tmp_path / "out", attention=False)
    page = Elements(Path(result["report"]).read_text())
    assert page.text.count("01_pretrain") == 3  # its own row, and before the other two
    assert "patch_knn_top1" in page.text
    records = {path.name: read_record(path) for path in sorted((tmp_path / "phases").iterdir())}
    begun = beginnings(records)
    assert [found.steps for found in begun.values()] == [0, 9, 9]
    (plot,) = draw_chain(records, begun)
    assert plot.caption == "k-NN top-1 of the teacher's patches, %"


def test_a_report_without_a_configuration_has_no_epochs(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_bytes(as_lines([{"step": 5, "loss": 3.0}]))
    result = write_run_report(run_dir, tmp_path / "out", attention=True)
    assert result["state"]["steps_per_epoch"] is None
    assert result["last"]["loss"] == {"step": 5, "value": 3.0}
    assert result["state"]["how"] == "training"


def test_a_report_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", [])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_run_report(run_dir, tmp_path / "file", attention=False)


def test_settings_at_their_default_are_not_shown() -> None:
    found = changed_settings(config())
    assert found["train.epochs"] == (EPOCHS, RunConfig().train.epochs)
    assert "head.num_prototypes" not in found
    found = changed_settings(RunConfig(ibot=IbotConfig(loss_weight=1.0), patch_head=HeadConfig()))
    assert found["patch_head.num_prototypes"] == (HeadConfig().num_prototypes, None)
