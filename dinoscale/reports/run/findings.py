"""What went well in a run, what did not, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

from dinoscale.cluster.doctor.report import Check, Verdict, count_text, ok, problem, warning
from dinoscale.reports.run.read import BAD_IMAGES, Record
from dinoscale.reports.run.state import State, median
from dinoscale.training.hooks.data_wait import ALLOWED

_ORDER: tuple[Verdict, ...] = ("problem", "warning", "ok")
_ENOUGH_LINES = 20  # log lines from which a drop of the throughput is told from noise
_DROP = 0.7  # of the usual throughput, below which the last tenth of a run is slow
_KNN_LOSS = 2.0  # points below the best that are more than noise of a thousand images


def judge(record: Record, state: State) -> list[Check]:
    """The findings, problems first; of the same weight first what spoils a run, then what slows."""
    checks = [
        _ending(state),
        _collapse(record),
        _finite_loss(record),
        *_knn(record),
        *_interruptions(record),
        _saves(record),
        _bad_images(record),
        *_data_wait(record),
        *_throughput(record),
        *_files(record),
    ]
    return sorted(checks, key=lambda check: _ORDER.index(check.verdict))


def _ending(state: State) -> Check:
    name = "end"
    if state.how == "failed":
        return problem(name, f"the run ended with an error: {state.reason}")
    if state.how == "silent":
        return warning(
            name, "the run stopped writing before its last step: start the same command again"
        )
    return ok(
        name,
        {
            "finished": "the run has taken all its steps",
            "training": "the run still trains",
            "asked to stop": "the run was asked to stop and saved; the same command goes on",
            "not begun": "no step is logged yet",
        }[state.how],
    )


def _collapse(record: Record) -> Check:
    name, count = "collapse", record.events.counts["collapse"]
    if not count:
        watched = record.series["target_mutual_information"].count > 0
        return ok(name, "none seen" if watched else "none seen; the log has no monitors of it")
    first = record.events.first["collapse"]
    times = "" if count == 1 else f", the first of {count}"
    return problem(name, f"at step {first.step:,}{times}: {first.told('text')}")


def _finite_loss(record: Record) -> Check:
    name, count = "loss", record.not_finite
    if not count:
        return ok(name, "finite in every line of the log")
    return warning(
        name,
        f"not finite in {count_text(count, 'line')} of the log: lower optim.lr or optim.clip_grad,"
        " or take engine.precision=fp32",
    )


def _knn(record: Record) -> Iterator[Check]:
    name, knn = "k-NN", record.series["knn_top1"]
    first = knn.points()[0] if knn.count else None
    if first is None or knn.last is None or knn.highest is None:
        if record.series["loss"].count:
            yield warning(
                name,
                "not measured, and the loss does not tell whether features get better: set"
                " eval.train and eval.test",
            )
        return
    last, best = knn.last, knn.highest
    if best.value - last.value > _KNN_LOSS:
        yield warning(
            name,
            f"{last.value:.1f} % at step {last.step:,}, {best.value - last.value:.1f} points below"
            f" step {best.step:,}: take that checkpoint (checkpoint.keep_best keeps it) and look"
            " at the monitors of a collapse",
        )
    elif first.step == 0 and knn.count > 1 and last.value <= first.value:
        yield warning(
            name,
            f"{last.value:.1f} %, no better than before the first step ({first.value:.1f} %): train"
            " longer, or look at the monitors of a collapse and at optim.lr",
        )
    else:
        before = f", {first.value:.1f} % before training" if first.step == 0 else ""
        yield ok(name, f"{last.value:.1f} % at step {last.step:,}{before}")


def _interruptions(record: Record) -> Iterator[Check]:
    events = record.events
    last = record.series["skipped_steps"].last
    skipped = max(events.counts["skipped"], int(last.value) if last else 0)
    if skipped:
        newest = events.last.get("skipped")
        reason = newest.told("reason") if newest else ""
        yield warning(
            "skipped steps",
            f"{count_text(skipped, 'step')}{f', the last because of: {reason}' if reason else ''};"
            " their images are in bad_steps/. If it is more than a few, lower optim.lr",
        )
    else:
        yield ok("skipped steps", "none")
    count = events.counts["rolled back"]
    if count:
        yield warning(
            "rollbacks",
            f"{count_text(count, 'return')} to a checkpoint, the last from step"
            f" {events.last['rolled back'].step:,}: a lower optim.lr or a smaller optim.clip_grad"
            " avoids them",
        )
    count = events.counts["resumed"]
    if count:
        yield ok(
            "resumes",
            f"{count_text(count, 'time')}, the last at step {events.last['resumed'].step:,}",
        )


def _saves(record: Record) -> Check:
    name, count = "saves", record.events.counts["save failed"]
    if not count:
        return ok(name, "none failed")
    failed, saved = record.events.last["save failed"], record.series["saved_step"].last
    text = f"{count_text(count, 'save')} failed, the last at step {failed.step:,}"
    text += f" ({failed.told('reason')}); is there room in {record.run_dir}?"
    if saved is None or saved.value <= failed.step:
        return problem(name, f"{text} None has worked since")
    return warning(name, f"{text} Later ones worked")


def _bad_images(record: Record) -> Check:
    name = "images"
    if not record.bad_images:
        return ok(name, "all could be read")
    return warning(
        name,
        f"{count_text(record.bad_images, 'file')} cannot be read, the first is {record.bad_image}."
        f" All are in {BAD_IMAGES}: repair or remove them",
    )


def _data_wait(record: Record) -> Iterator[Check]:
    """The log's own warning, of the whole run; the first line waits for workers to start."""
    name = "data wait"
    shares = [point.value for point in record.series["data_wait"].means()]
    if not shares:
        return
    share = median(shares[1:] or shares)
    workers = None if record.config is None else record.config.data.num_workers
    if share <= ALLOWED:
        yield ok(name, f"{share:.0%} of the time")
        return
    if workers == 0:  # no wait but work on a CPU, as the log sees it, too
        yield ok(
            name,
            f"{share:.0%} of the time, in which the training process itself reads images; on a GPU"
            " raise data.num_workers from 0",
        )
        return
    more = "data.num_workers" if workers is None else f"data.num_workers (now {workers})"
    yield warning(
        name,
        f"no data for {share:.0%} of the time: raise {more} as far as there are cores, or make the"
        " images cheaper to read (shards instead of loose files, shorter sides); `dinoscale bench"
        " data` shows what limits",
    )


def _throughput(record: Record) -> Iterator[Check]:
    name = "throughput"
    speeds = [point.value for point in record.series["images_per_s"].means()]
    if not speeds:
        return
    usual = median(speeds)
    late = median(speeds[-max(1, len(speeds) // 10) :])
    if len(speeds) < _ENOUGH_LINES or late >= _DROP * usual:
        yield ok(name, f"{usual:.4g} images/s")
        return
    yield warning(
        name,
        f"fell from {usual:.4g} to {late:.4g} images/s in the last tenth of the run: see whether"
        " others use the machine, its disks or its network, or whether it runs hot",
    )


def _files(record: Record) -> Iterator[Check]:
    """What of the run directory could not be used."""
    for file, lines in sorted(record.damaged.items()):
        yield warning(file, f"{count_text(lines, 'line')} of it cannot be read and left out here")
    normal = {"events.jsonl", BAD_IMAGES}  # written when there is something to write
    for file, reason in sorted(record.missing.items()):
        if file not in normal or reason != "is not there":
            yield warning(file, f"{reason}; what it would tell is missing here")
