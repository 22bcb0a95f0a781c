"""A small student of a larger frozen teacher, by its heads or features, and from scratch.

    python -m tests.benchmarks.distill --imagenette imagenette224/ --out runs/distill

The teacher is a run of ours on photographs of Imagenette without labels. The students see the same
images in the same order and as many of them: one learns by DINO, one the outputs of the teacher's
heads in the same crops, and of the backbone alone, as of released weights, one the class and patch
features, and one these by DINO as well. The average of each is measured at equal distances by k-NN
and by logistic regression; so are the last teacher, both networks untrained, and the pixels. Prints
a line of JSON for each run, last one of all, and draws curves.png. What is finished is not
repeated, and an interrupted run goes on; --teacher names another run with the same crops in place
of the first, --students which of the students are trained.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from dinoscale.evaluate.classification.logistic import fit_and_score
from tests.benchmarks.adapt import samples
from tests.benchmarks.curation import dinoscale, require_same_arguments

Scores: TypeAlias = dict[str, float]  # task -> accuracy in percent
Curve: TypeAlias = dict[int, Scores]  # by images seen

EPOCH, BATCH = 25, 64  # steps; images of a step
POINTS = 4  # measurements of a run
TEACHER = {
    "backbone": "vit_tiny_patch16_224",
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 2,
    "drop_path_rate": 0.0,
}
STUDENT = TEACHER | {"embed_dim": 64, "depth": 2}
SETTINGS = [
    "crops.global_size=48",
    "crops.local_size=24",
    "crops.local_scale=[0.1, 0.4]",
    "head.num_prototypes=1024",
    "optim.lr=6e-3",
    "optim.min_lr=1e-5",
    "eval.resize=48",
    "eval.crop=48",
]
_FEATURES = ["distill.class_feature_weight=1.0", "distill.patch_feature_weight=1.0"]
# Name of a student -> sections of the teacher that it learns from, and its own settings.
STUDENTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "from_scratch": ((), []),
    "heads": (("model", "head"), []),
    "features": (("model",), [*_FEATURES, "dino.loss_weight=0.0", "crops.num_local=0"]),
    "features_and_dino": (("model",), _FEATURES),
}
TASKS = ("knn", "logistic")
CS = ("10", "100", "1000")  # of the logistic regression, to choose from
_SIDE = 16  # of the pictures whose pixels are features


def train(
    run_dir: Path,
    images: str,
    *,
    model: Mapping[str, object],
    steps: int,
    settings: Sequence[str],
    distill: Mapping[str, object] | None = None,
) -> list[Path]:
    """Train a run from the quickstart, go on with it, or leave it if it is finished.

    Args:
        run_dir: of the run; its settings are written beside it.
        images: to learn from.
        model: section of its config.
        steps: a multiple of `POINTS` epochs.
        settings: words of the command.
        distill: section of its config, with a teacher.

    Returns:
        Its checkpoints, `POINTS` of them.
    """
    checkpoints = [run_dir / f"checkpoints/step_{step:08d}" for step in _steps(steps)]
    if not checkpoints[-1].exists():
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        config, epochs = run_dir.with_suffix(".yaml"), steps // EPOCH
        sections = {"model": dict(model), "distill": dict(distill or {})}
        config.write_text(yaml.safe_dump({"defaults": ["quickstart"], **sections}))
        words = [f"run_dir={run_dir}", f"data.train={images}", f"train.epochs={epochs}"]
        words += [f"train.steps_per_epoch={EPOCH}", f"train.batch_size={BATCH}"]
        words += [f"checkpoint.every_epochs={epochs // POINTS}", f"checkpoint.keep_last={POINTS}"]
        words += ["eval.train=null", "eval.test=null", "engine.precision=fp32"]
        dinoscale("train", config, *words, *settings)
    return checkpoints


def _steps(steps: int) -> list[int]:
    return [steps * point // POINTS for point in range(1, POINTS + 1)]


def accuracies(
    weights: Sequence[Path], out: Path, *, bank: str, test: str, baselines: bool = False
) -> dict[str, list[Scores]]:
    """Accuracy of k-NN (k = 20) and of logistic regression on frozen features.

    Args:
        weights: to measure.
        out: folder of the reports; what is there is not measured again.
        bank: labelled images to learn from.
        test: labelled images to classify.
        baselines: also measure the network untrained, and pixels by k-NN.

    Returns:
        `weights` in their order; of the baselines `untrained` and `floor`.
    """
    untrained, pixels = (" --untrained", " --pixels") if baselines else ("", "")
    data = f"--train {bank} --test {test} --num-workers 0{untrained}"
    lines = [f"knn {data} --k 20{pixels}", f"logistic {data} --c {' '.join(CS)}"]
    tasks = [word for line in lines for word in ("--task", line)]
    found = dinoscale("evaluate", "compare", *weights, "--out", out, *tasks)
    columns = [column["task"] for column in found["columns"]]
    scores: dict[str, list[Scores]] = {"weights": [], "untrained": [], "floor": []}
    for row in found["rows"]:
        cells = zip(columns, row["cells"], strict=True)
        scores[row["kind"]].append({task: _headline(cell) for task, cell in cells if cell})
    return scores


def _headline(cell: Mapping[str, Any]) -> float:
    score = cell["score"] if "score" in cell else cell["scores"][0]
    return round(next(iter(score.values())), 1)


def pixel_logistic(bank: Sequence[Path], test: Sequence[Path]) -> float:
    """The same regression on pixels, percent; the best penalty by the test set, so a high floor."""
    (rows, labels), (others, truth) = _pixels(bank), _pixels(test)
    mean = rows.mean(0)
    rows, others = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows - mean, others - mean)
    )
    tried = [fit_and_score(rows, labels, others, c=float(c), max_iter=300)[0] for c in CS]
    return round(max(100 * float((scores.argmax(1) == truth).mean()) for scores in tried), 1)


def _pixels(shards: Sequence[Path]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Pixels (N, 768) and classes (N,)."""
    pictures, labels = [], []
    for _, jpeg, label in samples(shards):
        picture = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((_SIDE, _SIDE))
        pictures.append(np.asarray(picture, dtype=np.float64).ravel() / 255)
        labels.append(label)
    return np.stack(pictures), np.array(labels)


def draw(
    curves: Mapping[str, Sequence[Curve]], beside: Mapping[str, Scores], *, path: Path
) -> None:
    """Draw each task: a line for each run, and a level for each of what stands beside them."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for number, (name, of_seeds) in enumerate(curves.items()):
            for seed, curve in enumerate(of_seeds):
                points = [scores[task] for scores in curve.values()]
                label = None if seed else name.replace("_", " ")
                axes.plot([*curve], points, "o-", color=f"C{number}", label=label, markersize=4)
        for style, (name, scores) in zip(("-", "--", "-.", ":"), beside.items(), strict=True):
            axes.axhline(scores[task], color="0.5", linestyle=style, label=name.replace("_", " "))
        axes.set(xlabel="images seen by the student", ylabel=f"{task}, % of test images")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str]) -> None:
    """Train teacher and students, measure and draw them."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.distill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--imagenette", type=Path, required=True, help="folder of its tar shards")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--teacher", type=Path, help="a run that is the teacher")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=[*STUDENTS])
    parser.add_argument("--steps", type=int, default=200, help="of a student (default 200)")
    parser.add_argument("--teacher-steps", type=int, default=1400, help="default 1400")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default 0")
    options = parser.parse_args(arguments)
    for steps in (options.teacher_steps, options.steps):
        if steps % (POINTS * EPOCH):
            parser.error(f"{steps} steps: need a multiple of {POINTS * EPOCH}")
    require_same_arguments(parser, options, but=["seeds", "students"])
    _measure_all(options)


def _measure_all(options: argparse.Namespace) -> None:
    images = f"{options.imagenette}/train-*.tar"
    sets = {"bank": images, "test": f"{options.imagenette}/val-*.tar"}
    teacher = options.teacher or options.out / "teacher"
    if options.teacher is None:
        train(teacher, images, model=TEACHER, steps=options.teacher_steps, settings=SETTINGS)
    of_teacher = yaml.safe_load((teacher / "config.yaml").read_text())
    curves: dict[str, list[Curve]] = {name: [] for name in options.students}
    for seed in options.seeds:
        for name in options.students:
            taken, own = STUDENTS[name]
            distill = {"teacher": str(teacher)} | {key: of_teacher[key] for key in taken}
            run_dir, began = options.out / f"{name}_{seed}", time.monotonic()
            checkpoints = train(
                run_dir,
                images,
                model=STUDENT,
                steps=options.steps,
                settings=[*SETTINGS, *own, f"seed={seed}"],
                distill=distill if taken else None,
            )
            minutes = round((time.monotonic() - began) / 60, 1)
            scores = accuracies(checkpoints, run_dir / "accuracies", **sets)["weights"]
            curve = dict(zip((BATCH * step for step in _steps(options.steps)), scores, strict=True))
            curves[name].append(curve)
            print(json.dumps({"run": run_dir.name, "minutes": minutes, "curve": curve}), flush=True)
    student = options.out / f"{options.students[0]}_{options.seeds[0]}"
    beside = _beside(options, {"teacher": teacher, "student": student}, sets)
    draw(curves, beside, path=options.out / "curves.png")
    print(json.dumps({"curves": curves, "beside": beside}))


def _beside(
    options: argparse.Namespace, runs: Mapping[str, Path], sets: Mapping[str, str]
) -> dict[str, Scores]:
    """The last teacher, both networks untrained, and the pixels."""
    found = {
        name: accuracies([run], options.out / f"beside_{name}", **sets, baselines=True)
        for name, run in runs.items()
    }
    shards = [sorted(options.imagenette.glob(f"{part}-*.tar")) for part in ("train", "val")]
    untrained = {f"{name}_untrained": of["untrained"][0] for name, of in found.items()}
    pixels = {"knn": found["teacher"]["floor"][0]["knn"], "logistic": pixel_logistic(*shards)}
    return {"teacher": found["teacher"]["weights"][0], **untrained, "pixels": pixels}


if __name__ == "__main__":
    main(sys.argv[1:])
