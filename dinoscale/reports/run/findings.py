"""Check a run for problems, and name a remedy for each."""

from __future__ import annotations

from collections.abc import Iterator

from dinoscale.cluster.doctor.report import Check, Verdict, count_text, ok, problem, warning
from dinoscale.reports.run.guard import check_guard
from dinoscale.reports.run.read import BAD_IMAGES, Record
from dinoscale.reports.run.state import State, median
from dinoscale.training.hooks.data_wait import ALLOWED

_ORDER: tuple[Verdict, ...] = ("problem", "warning", "ok")
_MIN_LINES = 20  # log lines needed to tell a drop of the throughput from noise
_DROP = 0.7  # fraction of the median throughput below which the last tenth of a run is slow
_KNN_DROP = 2.0  # points below the best, beyond the noise of a thousand test images


def check_run(record: Record, state: State) -> list[Check]:
    """All checks, problems first; of equal verdict, training quality before speed."""
    checks = [
        _ending(state),
        _collapse(record),
        _finite_loss(record),
        *_knn(record),
        *check_guard(record),
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
            name, "the run stopped writing before its last step: run the same command again"
        )
    return ok(
        name,
        {
            "finished": "the run has completed all steps",
            "training": "the run is still training",
            "asked to stop": "the run was asked to stop and has saved; the same command resumes it",
            "not begun": "no step has been logged yet",
        }[state.how],
    )


def _collapse(record: Record) -> Check:
    name, count = "collapse", record.events.counts["collapse"]
    if not count:
        watched = record.series["target_mutual_information"].count > 0
        return ok(
            name, "none detected" if watched else "none detected, but the log has no monitors"
        )
    first = record.events.first["collapse"]
    times = "" if count == 1 else f", the first of {count}"
    return problem(name, f"at step {first.step:,}{times}: {first.detail('text')}")


def _finite_loss(record: Record) -> Check:
    name, count = "loss", record.not_finite
    if not count:
        return ok(name, "finite in every log line")
    return warning(
        name,
        f"not finite in {count_text(count, 'log line')}: lower optim.lr or optim.clip_grad, or set"
        " engine.precision=fp32",
    )


def _knn(record: Record) -> Iterator[Check]:
    name, knn = "k-NN", record.series["knn_top1"]
    first = knn.points()[0] if knn.count else None
    if first is None or knn.last is None or knn.highest is None:
        if record.series["loss"].count:
            yield warning(
                name,
                "not measured, and the loss does not show whether the features improve: set"
                " eval.train and eval.test",
            )
        return
    last, best = knn.last, knn.highest
    if best.value - last.value > _KNN_DROP:
        yield warning(
            name,
            f"{last.value:.1f} % at step {last.step:,}, {best.value - last.value:.1f} points below"
            f" step {best.step:,}: use that checkpoint (checkpoint.keep_best keeps it), and check"
            " the collapse monitors",
        )
    elif first.step == 0 and knn.count > 1 and last.value <= first.value:
        yield warning(
            name,
            f"{last.value:.1f} %, no better than before training ({first.value:.1f} %): train"
            " longer, or check the collapse monitors and optim.lr",
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
        reason = newest.detail("reason") if newest else ""
        yield warning(
            "skipped steps",
            f"{count_text(skipped, 'step')}{f', the last because of: {reason}' if reason else ''};"
            " their images are in bad_steps/. If there are more than a few, lower optim.lr",
        )
    else:
        yield ok("skipped steps", "none")
    count = events.counts["rolled back"]
    if count:
        yield warning(
            "rollbacks",
            f"{count_text(count, 'rollback')} to a checkpoint, the last from step"
            f" {events.last['rolled back'].step:,}: lower optim.lr or optim.clip_grad",
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
    text += f" ({failed.detail('reason')})"
    remedy = f"check the free space in {record.run_dir}"
    if saved is None or saved.value <= failed.step:
        return problem(name, f"{text}, and none has succeeded since: {remedy}")
    return warning(name, f"{text}; later saves succeeded: {remedy}")


def _bad_images(record: Record) -> Check:
    name = "images"
    if not record.bad_images:
        return ok(name, "all readable")
    return warning(
        name,
        f"{count_text(record.bad_images, 'unreadable file')}, the first: {record.bad_image}."
        f" {BAD_IMAGES} lists all: repair or remove them",
    )


def _data_wait(record: Record) -> Iterator[Check]:
    """As the log warns, over the whole run; the first line includes the start of the workers."""
    name = "data wait"
    shares = [point.value for point in record.series["data_wait"].means()]
    if not shares:
        return
    share = median(shares[1:] or shares)
    workers = None if record.config is None else record.config.data.num_workers
    if share <= ALLOWED:
        yield ok(name, f"{share:.0%} of the time")
        return
    if workers == 0:  # on a CPU this is work, not waiting, as for the warning of the log
        yield ok(
            name,
            f"{share:.0%} of the time, in which the training process itself reads images; on a GPU,"
            " raise data.num_workers from 0",
        )
        return
    more = "data.num_workers" if workers is None else f"data.num_workers (now {workers})"
    yield warning(
        name,
        f"no data for {share:.0%} of the time: raise {more} up to the number of cores, or make the"
        " images cheaper to read (shards instead of loose files, smaller images); `dinoscale bench"
        " data` shows the bottleneck",
    )


def _throughput(record: Record) -> Iterator[Check]:
    name = "throughput"
    speeds = [point.value for point in record.series["images_per_s"].means()]
    if not speeds:
        return
    typical = median(speeds)
    late = median(speeds[-max(1, len(speeds) // 10) :])
    if len(speeds) < _MIN_LINES or late >= _DROP * typical:
        yield ok(name, f"{typical:.4g} images/s")
        return
    yield warning(
        name,
        f"fell from {typical:.4g} to {late:.4g} images/s in the last tenth of the run: check"
        " whether others use the machine, its disks or its network, and whether it throttles",
    )


def _files(record: Record) -> Iterator[Check]:
    """Files of the run directory that could not be used."""
    for file, lines in sorted(record.damaged.items()):
        yield warning(file, f"{count_text(lines, 'unreadable line')} skipped")
    normal = {"events.jsonl", BAD_IMAGES}  # written when there is something to write
    for file, reason in sorted(record.missing.items()):
        if file not in normal or reason != "is not there":
            yield warning(file, f"{reason}; its information is missing from this report")
