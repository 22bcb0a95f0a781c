"""`python -m tests.golden23.mutations`: the recorded runs notice single mistakes.

Each mistake replaces some words of a function while the ranks follow a run. One line each: what the
comparison says first. Exit code 1 if a mistake goes unnoticed, or the unchanged step differs. With
words as arguments, only the mistakes whose names contain one of them.
"""

import contextlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.golden23.compare import renamed, require
from tests.golden23.distillation import GENERATION
from tests.golden23.follow import Follower, Way, joined
from tests.golden23.recorded import RANKS
from tests.golden23.replay import expected_of
from tests.golden23.test_runs import BOUNDS
from tests.harness import run_distributed

STAGE = 2


class Mistake(NamedTuple):
    """What goes wrong, where (module, function), the words before and after, in which run."""

    name: str
    function: tuple[str, str]
    words: tuple[tuple[str, str], ...]
    case: str
    ranks: int
    generation: str = "dinov2"


_TEACHER, _GRAM = "dinoscale.engine.teacher", "dinoscale.engine.frozen.gram"
_DISTILLATION = "", 2, GENERATION
_HOOK = (
    "seen = []; hook = self.backbone.norm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))"
)
_BEFORE_NORM = "seen[0][-{0}.shape[:2].numel() :].view({0}.shape)"  # the last rows are patches
MISTAKES = (
    Mistake("none", (_TEACHER, "Teacher.begin"), (), "A", 1),
    Mistake("none", (_TEACHER, "Teacher.begin"), (), "B", 2),
    Mistake(
        "Sinkhorn-Knopp: a sample's sum over the ranks",
        ("dinoscale.losses.sinkhorn", "sinkhorn_center"),
        (
            (
                "total += z.softmax(-1).sum(0)",
                "sums = zeros.new_zeros(4096); sums[: len(z)] = z.exp().sum(-1); "
                "total += (z.exp() / sum_over_ranks(sums)[: len(z), None]).sum(0)",
            ),
        ),
        "B",
        2,
    ),
    Mistake(
        "Sinkhorn-Knopp: a prototype's sum over one rank",
        (_TEACHER, "_sinkhorn_center"),
        (("sum_over_ranks=distributed.all_reduce_sum", "sum_over_ranks=lambda sums: sums"),),
        "B",
        2,
    ),
    Mistake(
        "center of the masked patches of all ranks together",
        (_TEACHER, "Teacher._move_centers"),
        (
            ("patches.logits / max(patches.rows, 1)", "patches.logits"),
            ("mean / ranks.clamp(min=1)", "mean / patch_rows.clamp(min=1)"),
        ),
        "A",
        2,
    ),
    Mistake(
        "patch loss: a mean over the masked crops only",
        ("dinoscale.engine.micro_batch", "MicroBatchLoss._ibot"),
        (("loss / (views * images)", "loss / self._masks.weights.sum()"),),
        "A",
        1,
    ),
    Mistake(
        "KoLeo after the head",
        ("dinoscale.models.network", "DinoNetwork.forward"),
        (
            (
                "objective.of_class_tokens(tokens)",
                "objective.of_class_tokens(self.head.unit_vectors(tokens))",
            ),
        ),
        "B",
        1,
    ),
    Mistake(
        "mask token after the positions",
        ("dinoscale.models.vit", "VisionTransformer._embed"),
        (
            ("x = self._masked(x, masks, num_first=len(crops[0]))", "pass"),
            (
                "special, x = self._with_positions(x, height=height, width=width)",
                "special, x = self._with_positions(x, height=height, width=width); x = x if masks "
                "is None or layout else self._masked(x, masks, num_first=len(crops[0]))",
            ),
        ),
        "A",
        1,
    ),
    Mistake(
        "decay on LayerScale",
        ("dinoscale.engine.param_groups", "param_groups"),
        (("len(_shape(parameter)) == 1", '"norm" in name'),),
        "B",
        1,
    ),
    Mistake(
        "clipping of all sub-networks together",
        ("dinoscale.engine.gradients", "GradientRule.measure"),
        (("self.network_norms()[self._network_of]", "total.sqrt().expand(len(self.names))"),),
        "B",
        1,
    ),
    Mistake(
        "frozen prototypes without moments",
        ("dinoscale.engine.student", "Student.set_hyperparameters"),
        (("frozen and not self._frozen_by_rate", "frozen"),),
        "A",
        1,
    ),
    Mistake("none of DINOv3", (_TEACHER, "Teacher.begin"), (), "B", 1, "dinov3"),
    Mistake(
        "class token and registers rotate",
        ("dinoscale.models.rope", "rotation"),
        (
            ("before = (0, 0, num_special, 0)", "n, before = num_special, (0, 0, 0, 0)"),
            ("sin, cos = ", "cut = lambda x: torch.cat((x[..., :n, :], x), dim=-2); sin, cos = "),
            ("torch.cat((cos, cos), dim=-1)", "cut(torch.cat((cos, cos), dim=-1))"),
            ("torch.cat((-sin, sin), dim=-1)", "cut(torch.cat((-sin, sin), dim=-1))"),
        ),
        "B",
        1,
        "dinov3",
    ),
    Mistake(
        "rotation by tables in bfloat16",
        ("dinoscale.models.rope", "sine_and_cosine"),
        (
            (
                "return angles.sin(), angles.cos()",
                "return angles.sin().bfloat16().to(dtype), angles.cos().bfloat16().to(dtype)",
            ),
        ),
        "B",
        1,
        "dinov3",
    ),
    Mistake(
        "the norm of local crops on global ones",
        ("dinoscale.models.vit", "VisionTransformer.forward"),
        (("self.norm(torch.cat(rows))", "self.local_norm(torch.cat(rows))"),),
        "B",
        1,
        "dinov3",
    ),
    Mistake(
        "the keys' bias acts",
        ("dinoscale.models.block", "KeylessBias.forward"),
        (("torch.zeros_like(of_keys)", "of_keys"),),
        "B",
        1,
        "dinov3",
    ),
    Mistake(
        "plain prototypes of unit length",
        ("dinoscale.losses.prototypes", "prototypes"),
        (("if plain:", "if False:"),),
        "A",
        1,
        "dinov3",
    ),
    Mistake("none with a Gram network", (_TEACHER, "Teacher.begin"), (), "C", 1, "dinov3"),
    Mistake(
        "Gram of the student's patches before the final norm",
        ("dinoscale.models.network", "DinoNetwork.forward"),
        (
            ("tokens, every =", f"{_HOOK}; tokens, every ="),
            ("of_patches(every)", f"of_patches({_BEFORE_NORM.format('every')}); hook.remove()"),
        ),
        "C",
        1,
        "dinov3",
    ),
    Mistake(
        "Gram of the Gram network's patches before the final norm",
        ("dinoscale.models.network", "TokenNetwork.forward"),
        (
            ("tokens, patches =", f"{_HOOK}; tokens, patches ="),
            (
                "return tokens, patches",
                f"hook.remove(); return tokens, {_BEFORE_NORM.format('patches')}",
            ),
        ),
        "C",
        1,
        "dinov3",
    ),
    Mistake(
        "Gram crops with colors changed",
        (_GRAM, "GramNetwork.features"),
        (("tokens(batch.gram_crops", "tokens(1.2 * batch.gram_crops"),),  # in contrast
        "C",
        1,
        "dinov3",
    ),
    Mistake(  # as a gradient moves it, which two things keep away: no_grad, and the loss's backward
        "a Gram network that trains between refreshes",
        (_GRAM, "GramNetwork.update"),
        (
            (
                "if refreshes_after",
                "[x.lerp_(y, 0.01) for x, y in zip(self.backbone.own, ema) if x is not None]\n"
                "    if refreshes_after",
            ),
        ),
        "C",
        1,
        "dinov3",
    ),
    Mistake(
        "refresh of the Gram network a step early",
        (_GRAM, "refreshes_after"),
        (("(step + 1) % every == 0", "(step + 2) % every == 0"),),
        "C",
        1,
        "dinov3",
    ),
    Mistake(
        "distillation: targets of the average",
        (_TEACHER, "Teacher._look"),
        (("else self.frozen", "else self._weights"),),
        *_DISTILLATION,
    ),
    Mistake(
        "distillation: a student that is masked",
        ("dinoscale.data.augmentation.masks", "Masks.seen"),
        (("torch.zeros_like(self.masks)", "self.masks.clone()"),),
        *_DISTILLATION,
    ),
    Mistake(
        "distillation: an average that stays",
        (_TEACHER, "Teacher.update"),
        (("(1.0 - momentum)", "0.0"),),
        *_DISTILLATION,
    ),
)


def follow_mistakes(numbers: list[int]) -> list[dict[str, Any]]:
    """On every rank: follow a run with each of the mistakes."""
    found = []
    for mistake in (MISTAKES[number] for number in numbers):
        with _made(mistake):
            found.append(Follower(_way(mistake)).follow())
    return found


def _way(mistake: Mistake) -> Way:
    return Way(mistake.case, mistake.ranks, STAGE, generation=mistake.generation)


@contextlib.contextmanager
def _made(mistake: Mistake) -> Iterator[None]:
    """Exchange the function's code."""
    module, path = mistake.function
    owner: Any = importlib.import_module(module)
    for name in path.split("."):
        owner = getattr(owner, name)
    function = inspect.unwrap(owner)
    source = textwrap.dedent(inspect.getsource(function))
    for before, after in mistake.words:
        assert source.count(before) == 1, (mistake.name, before)
        source = source.replace(before, after)
    names: dict[str, Any] = {}
    exec(compile(source, mistake.name, "exec"), function.__globals__, names)
    correct = function.__code__
    function.__code__ = inspect.unwrap(names[function.__name__]).__code__
    yield
    function.__code__ = correct


def _first_difference(mistake: Mistake, of_ranks: list[dict[str, Any]]) -> str:
    """What the comparison says; empty if it finds nothing."""
    way = _way(mistake)
    record, bounds = joined(of_ranks, way), BOUNDS[way.run.generation]
    expected = way.run.record() if way.run.gram or way.run.frozen else expected_of(way.run)
    try:
        require(record, renamed(expected), bounds, label=way.run.name)
    except AssertionError as error:
        return str(error)
    return ""


def main(words: list[str]) -> int:
    """Make all mistakes, or those with some words; the exit code."""
    wrong = False
    for ranks in RANKS:
        numbers = [i for i, mistake in enumerate(MISTAKES) if mistake.ranks == ranks]
        numbers = [i for i in numbers if not words or any(w in MISTAKES[i].name for w in words)]
        if not numbers:
            continue
        per_rank = run_distributed(
            "tests.golden23.mutations:follow_mistakes",
            world_size=ranks,
            timeout_s=1800,
            numbers=numbers,
        )
        for index, mistake in enumerate(MISTAKES[number] for number in numbers):
            said = _first_difference(mistake, [rank[index] for rank in per_rank])
            wrong |= bool(said) == (not mistake.words)
            print(f"{mistake.name}: {said or 'no difference'}", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
