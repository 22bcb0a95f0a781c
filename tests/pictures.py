"""Make the pictures of the README: `python -m tests.pictures RUN`, RUN a run of the quickstart."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "launchers" / "pictures"
_TEACHER, _STUDENT, _DATA = "#1f5fa8", "#b3541e", "#444444"
_RANKS = 4


def main(run: Path) -> None:
    """Draw the step, and shrink what the quickstart and `dinoscale report` drew of the run."""
    FOLDER.mkdir(exist_ok=True)
    _step().savefig(FOLDER / "step.png", dpi=110)
    _shrink(run / "attention.png", FOLDER / "attention.png", shown=0.517)  # four images of eight
    _shrink(run / "report" / "plots" / "knn_top1.png", FOLDER / "knn.png")


def _shrink(source: Path, target: Path, *, shown: float = 1.0, width: int = 700) -> None:
    """A small picture of the upper part of another."""
    picture = Image.open(source).convert("RGB")
    picture = picture.crop((0, 0, picture.width, round(shown * picture.height)))
    picture.thumbnail((width, 10 * width), Image.Resampling.LANCZOS)
    picture.quantize(128).save(target, optimize=True)


def _step() -> Figure:
    """Crops, student, teacher and loss; how both networks are cut over the GPUs."""
    figure = Figure(figsize=(8.8, 3.4))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 88), ylim=(0, 34), frame_on=False)
    axes.set_axis_off()
    _box(axes, (2, 13, 10, 7), _DATA, "your images", "no labels")
    _box(axes, (17, 20, 13, 6), _DATA, "2 global crops", "large parts")
    _box(axes, (17, 7, 13, 6), _DATA, "local crops", "small parts")
    _network(axes, (37, 18, 25, 11), _TEACHER, "teacher", "float32 average of the student")
    _network(axes, (37, 4, 25, 11), _STUDENT, "student", "all crops in one forward, ZeRO 0 to 3")
    _box(axes, (69, 13.5, 17, 6), _DATA, "cross-entropy", "same image, other crop")
    for start, end in (
        ((12, 17.5), (17, 22)),
        ((12, 15.5), (17, 11)),
        ((30, 24), (37, 24)),
        ((30, 10), (37, 10)),
        ((30, 21.5), (37, 12.5)),
    ):
        _arrow(axes, start, end, _DATA)
    _arrow(axes, (62, 24), (71, 19.5), _TEACHER)
    axes.text(67.5, 23, "targets", color=_TEACHER, fontsize=8.5)
    _arrow(axes, (62, 12.5), (69, 15), _STUDENT)
    axes.text(63.3, 10.6, "predictions", color=_STUDENT, fontsize=8.5)
    _arrow(axes, (77, 13.5), (62, 6.5), _STUDENT, bend=-0.35)
    axes.text(70, 4.6, "gradient, one optimizer step", color=_STUDENT, fontsize=8.5)
    for rank in range(_RANKS):
        _arrow(axes, (40.7 + 5.9 * rank, 15), (40.7 + 5.9 * rank, 18), _TEACHER)
    axes.text(49.5, 16.1, "average", color=_TEACHER, fontsize=8.5, ha="center")
    title = "One step of DINO: from any crop, the student predicts what the teacher sees in another"
    axes.text(44, 32, title, ha="center", va="center", fontsize=11)
    return figure


def _box(
    axes: Axes, box: tuple[float, float, float, float], color: str, name: str, what: str
) -> None:
    x, y, width, height = box
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0", ec=color, fc="#f4f4f4")
    )
    axes.text(x + width / 2, y + 0.64 * height, name, ha="center", va="center", fontsize=10)
    axes.text(x + width / 2, y + 0.28 * height, what, ha="center", va="center", fontsize=8.5)


def _network(
    axes: Axes, box: tuple[float, float, float, float], color: str, name: str, what: str
) -> None:
    x, y, width, height = box
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0", ec=color, fc="w"))
    axes.text(x + width / 2, y + 9.4, name, ha="center", va="center", fontsize=10, weight="bold")
    axes.text(x + width / 2, y + 6.9, what, ha="center", va="center", fontsize=8.5)
    for rank in range(_RANKS):
        left = x + 1 + 5.9 * rank
        axes.add_patch(
            FancyBboxPatch(
                (left, y + 1.2), 5.3, 3.6, boxstyle="square,pad=0", ec=color, fc="#eef2f8"
            )
        )
        axes.text(left + 2.65, y + 3, f"GPU {rank}", ha="center", va="center", fontsize=8)


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str,
    *,
    bend: float = 0.0,
) -> None:
    style = {"arrowstyle": "-|>", "color": color, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
