"""The time of each task of evaluation on images of 224 pixels, with an untrained ViT-S/16.

    python -m tests.benchmarks.tasks --data FOLDER --out DIR
    python -m tests.benchmarks.tasks --data FOLDER --out DIR --tasks knn depth --images 100

FOLDER holds `imagenette224/`, `ecssd-masks/` and `davis-video/` as tar shards. Each run has its own
process, an empty cache, two threads (OMP_NUM_THREADS=2), and two processes that decode, as is
the default. Measured are its seconds on the clock, those of all processors, and the most memory of
a process. DIR/times.json keeps each run as soon as it has ended; the same command goes on after
those that are there.

A task runs on as many images as `TASKS` says, at most --images. Its time for 1,000 is that of
starting (`embed` of one image), and the rest in proportion to the images. What trains, or takes
many views of an image, runs twice, with few steps and with more: the difference is the time of a
step, and the protocol's number of steps takes as many times that. JSON on stdout, a table on
stderr.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from dinoscale.planning.bench.budget import say
from tests.benchmarks.measured import Used, measured
from tests.benchmarks.task_sets import FRAMES, LEAST, MOST, SIDE, write_sets, write_weights

THREADS = 2
START = "start"


class Task(NamedTuple):
    """A command, and how much of it is run.

    Attributes:
        words: of the command.
        images: that it is measured on at most.
        steps: fewer, more, and those of the protocol; None for what has none.
        unit: of these.
        grows: whether the time of a step is in proportion to the images.
    """

    words: str
    images: int = 128
    steps: tuple[int, int, int] | None = None
    unit: str = ""
    grows: bool = False


_LABELLED = "{weights} --train {sets}/train --test {sets}/test"
_MASKED = (
    "{weights} --train {sets}/pairs/train/images --train-masks {sets}/pairs/train/masks"
    " --test {sets}/pairs/test/images --test-masks {sets}/pairs/test/masks --binary --size 224"
)
_DEPTHS = (
    "{weights} --train {sets}/pairs/train/images --train-depths {sets}/pairs/train/depths"
    " --test {sets}/pairs/test/images --test-depths {sets}/pairs/test/depths --crop 224 224"
)
_WITH_MASKS = "{weights} {sets}/pairs/all/images --masks {sets}/pairs/all/masks --size 224"
_PICTURES = "{weights} {sets}/pairs/all/images --size 224 --out {out}"

# What is not in proportion to the images (fits, and votes of all patches) runs on 1,000.
TASKS = {
    START: Task("embed {weights} {sets}/one {out}", images=1),
    "embed": Task("embed {weights} {sets}/all {out}"),
    "knn": Task(f"evaluate knn {_LABELLED}", images=MOST),
    "logistic": Task(f"evaluate logistic {_LABELLED}", images=MOST),
    "transfer": Task(
        "evaluate transfer {weights} --sets {sets}/halves/0 {sets}/halves/1", images=500
    ),
    "probe": Task("evaluate probe {weights} --probe {probe} --test {sets}/all"),
    "linear": Task(
        f"evaluate linear {_LABELLED} --iterations {{steps}}",
        images=100,
        steps=(1, 2, 12_500),
        unit="steps of 128 crops",
    ),
    "linear-whole-images": Task(
        f"evaluate linear {_LABELLED} --no-augmentation --iterations {{steps}}",
        images=60,
        steps=(100, 600, 12_500),
        unit="steps of 128 rows",
    ),
    "finetune": Task(
        f"evaluate finetune {_LABELLED} --batch-size 16 --epochs {{steps}}",
        images=60,
        steps=(1, 2, 30),
        unit="epochs",
        grows=True,
    ),
    "rank": Task("evaluate rank {weights} --data {sets}/all --views 0"),
    "rank-lidar": Task(
        "evaluate rank {weights} --data {sets}/all --views {steps}",
        images=LEAST,
        steps=(2, 8, 50),
        unit="views of each image",
        grows=True,
    ),
    "retrieve": Task("evaluate retrieve {weights} --data {sets}/all"),
    "copies": Task(
        "evaluate copies {weights} --data {sets}/all --make-copies --num-queries {queries}"
        " --size 224"
    ),
    "segmentation": Task(f"evaluate segmentation {_MASKED}", images=MOST),
    "segmentation-logistic": Task(
        f"evaluate segmentation {_MASKED} --protocol logistic", images=100
    ),
    "segmentation-linear": Task(
        f"evaluate segmentation {_MASKED} --protocol linear --iterations {{steps}}",
        images=50,
        steps=(2, 12, 40_000),
        unit="steps of 16 crops of 224",
    ),
    "depth": Task(
        f"evaluate depth {_DEPTHS} --iterations {{steps}}",
        images=50,
        steps=(2, 12, 38_400),
        unit="steps of 16 crops of 224",
    ),
    "segment": Task(f"evaluate segment {_WITH_MASKS}"),
    "discover": Task(f"evaluate discover {_WITH_MASKS}"),
    "discover-lost": Task(f"evaluate discover {_WITH_MASKS} --method lost"),
    "correspond": Task(
        "evaluate correspond {weights} --warp --images {sets}/pairs/all/images --size 224"
    ),
    "attention": Task(f"evaluate attention {_PICTURES}"),
    "pca": Task(f"evaluate pca {_PICTURES}"),
    "video": Task("evaluate video {weights} {sets}/videos --size 224", images=2 * FRAMES),
}


class Run(NamedTuple):
    """What a process took.

    Attributes:
        images: that it worked on.
        wall_s: seconds on the clock.
        cpu_s: of all processors, of the process and those that it started.
        peak_mb: of the largest of these, 10^6 bytes.
    """

    images: int
    wall_s: float
    cpu_s: float
    peak_mb: int


class Failed(Exception):  # noqa: N818  # a result, not an error of this program
    """A command that ended with an error; says its last line."""


class Measurement:
    """The runs in a folder."""

    def __init__(self, data: Path, out: Path, *, images: int) -> None:
        """Measure on at most `images`."""
        self._data, self._out, self._images = data, out, images
        self._file = out / "times.json"
        self._runs: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self._runs = json.loads(self._file.read_text())
        self._weights, self._probe = out / "weights.safetensors", out / "probe.safetensors"
        if not self._weights.exists():
            write_weights(self._weights)

    def runs(self, name: str) -> list[Run]:
        """Those of a task, which are there or made now.

        Raises:
            Failed: one ended with an error.
        """
        task = TASKS[name]
        if task.steps is None:
            return [self._run(name, task, 0)]
        return [self._run(f"{name}-{steps}", task, steps) for steps in task.steps[:2]]

    def _run(self, name: str, task: Task, steps: int) -> Run:
        images = min(task.images, self._images)
        if name in self._runs and self._runs[name]["images"] == images:
            return Run(**self._runs[name])
        if "{probe}" in task.words and not self._probe.exists():
            words = f"evaluate logistic {_LABELLED} --c 1 --out {{probe}}"
            self._command(words, images=LEAST, steps=0)
        say(f"{name}: {images} images")
        run = self._command(task.words, images=images, steps=steps)
        say(f"{name}: {run.wall_s:.1f} s, {run.cpu_s:.1f} s of processors, {run.peak_mb} MB")
        self._runs[name] = run._asdict()
        self._file.write_text(json.dumps(self._runs, indent=1) + "\n")
        return run

    def _command(self, words: str, *, images: int, steps: int) -> Run:
        number = max(images, LEAST)
        sets = self._out / f"sets-{number}"
        write_sets(self._data, sets, number)
        with tempfile.TemporaryDirectory(dir=self._out) as scratch:
            places = {"sets": sets, "weights": self._weights, "probe": self._probe}
            numbers = {"steps": steps, "queries": max(1, 157 * images // MOST)}
            given = {**places, **numbers, "out": Path(scratch, "out")}
            filled = [word.format(**given) for word in words.split()]
            return Run(images, *_timed(filled, Path(scratch)))


def _timed(words: list[str], scratch: Path) -> Used:
    """Run a command; what it and all processes that it waited for used."""
    own = {"OMP_NUM_THREADS": str(THREADS), "DINOSCALE_CACHE": str(scratch / "cache")}
    said = scratch / "said"
    with said.open("wb") as file:
        command = [sys.executable, "-m", "dinoscale", *words]
        try:
            return measured(command, stderr=file, env={**os.environ, **own})[1]
        except subprocess.CalledProcessError as error:
            lines = said.read_text(errors="replace").strip().splitlines() or [""]
            raise Failed(f"exit code {error.returncode}: {lines[-1]}") from None


def for_thousand(task: Task, runs: list[Run], start: Run) -> dict[str, float]:
    """Seconds that 1,000 images take, and those of all steps of the protocol, by clock and CPU."""
    factor = MOST / runs[0].images
    found = {}
    for kind in ("wall_s", "cpu_s"):
        first, begin = getattr(runs[0], kind), getattr(start, kind)
        step = 0.0
        if task.steps is not None:
            fewer, more, published = task.steps
            step = (getattr(runs[1], kind) - first) / (more - fewer)
            first -= fewer * step
            found[f"steps_{kind}"] = round(step * published * (factor if task.grows else 1), 1)
        found[kind] = round(begin + max(0.0, first - begin) * factor, 1)
    return found


def _table(results: dict[str, dict[str, Any]]) -> str:
    """All tasks as a table in Markdown."""
    lines = [
        "| task | measured on | s | CPU s | MB | 1,000 images | of all CPUs | and all steps |"
        " of all CPUs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        task, runs, found = TASKS[name], result["runs"], result["for_1000"]
        on = f"{runs[0]['images']} images"
        if task.steps is not None:
            on += f"; {task.steps[0]}, {task.steps[1]} {task.unit}"
        cells = [name, on]
        for key, form in (("wall_s", ".1f"), ("cpu_s", ".1f"), ("peak_mb", "d")):
            cells.append(", ".join(format(run[key], form) for run in runs))
        cells += [_in_words(found[kind]) for kind in ("wall_s", "cpu_s")]
        cells += [_in_words(found.get(f"steps_{kind}")) for kind in ("wall_s", "cpu_s")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_words(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> int:
    """Time the tasks that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for sets and times.json")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], metavar="TASK")
    parser.add_argument("--images", type=int, default=MOST, help="of a task, at most")
    options = parser.parse_args()
    if not LEAST <= options.images <= MOST:
        parser.error(f"--images: need {LEAST} to {MOST}, got {options.images}")
    options.out.mkdir(parents=True, exist_ok=True)
    measurement = Measurement(options.data.resolve(), options.out.resolve(), images=options.images)
    start = measurement.runs(START)[0]
    results, failed = {}, False
    for name in options.tasks:
        try:
            runs = measurement.runs(name)
        except Failed as error:
            say(f"{name}: {error}")
            failed = True
            continue
        results[name] = {
            "command": TASKS[name].words,
            "runs": [run._asdict() for run in runs],
            "for_1000": for_thousand(TASKS[name], runs, start),
        }
    say(_table(results))
    print(json.dumps({"threads": THREADS, "pixels": SIDE, "tasks": results}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
