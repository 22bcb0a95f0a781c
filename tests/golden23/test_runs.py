"""Recorded runs followed by the step of this package, at every ZeRO stage, in float32.

The bounds are those of the recording's notes. DINOv2: the reference's own float32 is within 2e-6 of
the losses and 1.1e-5 of the final tensors, and a single mistake, such as decay on biases, moves
tensors by more than 6e-4. DINOv3: within 2.3e-7 of the tensors, and mistakes move them by more than
3e-5. `python -m tests.golden23.mutations` makes such mistakes.
"""

import functools
from pathlib import Path

import pytest

from tests.golden23.compare import PER_STEP, Bounds, Record, renamed, require
from tests.golden23.distillation import GENERATION as DISTILLATION
from tests.golden23.distillation import distillation_run
from tests.golden23.follow import WITHOUT_KOLEO, Way, follow, plan_of
from tests.golden23.recorded import CASES, DATA, GENERATIONS, OWN, RANKS, recorded_run
from tests.golden23.replay import expected_of, replay

STAGES = (0, 1, 2, 3)
WITH_GRAM = "C"  # of DINOv3: B, with a Gram network on crops twice as large, refreshed twice
# Ranks and stages of the student of a frozen teacher: all that are recorded in another folder.
DISTILLED = [(2, 0), (2, 3)] if DATA == OWN else [(r, stage) for r in RANKS for stage in STAGES]
PASSES = (1, 2)  # micro-batches of a step and rank
FLOAT32 = Bounds(losses=1e-5, norms=1e-4, tensors=1e-4)
BOUNDS = {"dinov2": FLOAT32, "dinov3": Bounds(losses=1e-5, norms=1e-5, tensors=1e-5)}
# Ranks, which share the batch in two micro-batches; case -> stage, and which part of the steps. The
# center of the patches of A depends on the ranks, so their number stays.
MOVES: list[tuple[int, dict[str, tuple[int, float, float]]]] = [
    (2, {"A": (3, 0, 1 / 2), "B": (2, 0, 1 / 3)}),
    (1, {"B": (3, 1 / 3, 2 / 3)}),
    (2, {"A": (0, 1 / 2, 1), "B": (0, 2 / 3, 1)}),
]
FLOAT64 = Bounds(losses=1e-9, norms=1e-9, tensors=1e-9)


Followed = tuple[int, dict[Way, Record]]


@pytest.fixture(scope="module", params=RANKS)
def followed(request: pytest.FixtureRequest) -> Followed:
    """A number of ranks, and all that they follow after one start."""
    ranks: int = request.param
    ways = [
        Way(case, ranks, stage, generation=generation)
        for generation in GENERATIONS
        for case in CASES
        for stage in STAGES
    ]
    if ranks == 1:  # as it was recorded
        ways += [Way(WITH_GRAM, ranks, stage, generation="dinov3") for stage in STAGES]
    ways += [
        Way("", ranks, stage, generation=DISTILLATION)
        for of_ranks, stage in DISTILLED
        if of_ranks == ranks
    ]
    ways += [
        _without_koleo(case, passes)
        for case in CASES
        for passes in PASSES
        if _divides(ranks, passes)
    ]
    return ranks, follow(ways, world_size=ranks)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_schedules_are_the_recorded_ones(generation: str, case: str, ranks: int) -> None:
    from dinoscale.engine.build import schedules_of

    run = recorded_run(case, ranks, generation)
    config = run.config()
    schedules = schedules_of(config, plan_of(run, config, ranks))
    for step, recorded in enumerate(run.steps):
        now = schedules.at(step)
        found = {
            "lr": now.lr,
            "last_layer_lr": 0.0 if now.prototypes_frozen else now.lr,
            "weight_decay": now.weight_decay,
            "teacher_momentum": now.momentum,
            "teacher_temp": now.teacher_temp,
        }
        assert found == pytest.approx({key: recorded[key] for key in found}, rel=1e-12)
        assert now.local_weight == pytest.approx(run.values(step).local_weight, rel=1e-12)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_stage_follows_the_recorded_run(
    followed: Followed, generation: str, case: str, stage: int
) -> None:
    ranks, records = followed
    way = Way(case, ranks, stage, generation=generation)
    expected, label = renamed(expected_of(way.run)), f"{way.run.name} at stage {stage}"
    require(records[way], expected, BOUNDS[generation], label=label)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_follows_the_recorded_run_with_a_gram_network(
    followed: Followed, stage: int
) -> None:
    ranks, records = followed
    if ranks != 1:
        pytest.skip("recorded on one rank")
    way = Way(WITH_GRAM, ranks, stage, generation="dinov3")
    expected, label = renamed(way.run.record()), f"{way.run.name} at stage {stage}"
    require(records[way], expected, BOUNDS["dinov3"], label=label)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_students_of_a_frozen_teacher_follow_the_recorded_one(followed: Followed) -> None:
    ranks, records = followed
    ways = [way for way in records if way.generation == DISTILLATION]
    assert [(ranks, way.stage) for way in ways] == [pair for pair in DISTILLED if pair[0] == ranks]
    for way in ways:
        expected, label = renamed(way.run.record()), f"{way.run.name} at stage {way.stage}"
        assert expected["last"].keys() == {"student", "teacher"}
        require(records[way], expected, BOUNDS["dinov3"], label=label)


@pytest.mark.parametrize("ranks", sorted({ranks for ranks, _ in DISTILLED}))
def test_schedules_of_the_distillation_are_the_recorded_ones(ranks: int) -> None:
    from dinoscale.engine.build import schedules_of

    run = distillation_run(ranks)
    schedules = schedules_of(run.config(), plan_of(run, run.config(), ranks))
    for step in range(len(run.steps)):
        now, recorded = schedules.at(step), run.values(step)
        for name in ("lr", "weight_decay", "momentum", "teacher_temp"):
            assert getattr(now, name) == pytest.approx(getattr(recorded, name), rel=1e-12), name
        assert now.prototypes_frozen == (recorded.prototypes_frozen or recorded.lr == 0)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_change_nothing_without_koleo(
    followed: Followed, case: str, passes: int
) -> None:
    ranks, records = followed
    if not _divides(ranks, passes):
        pytest.skip("the recorded batch does not divide")
    found = records[_without_koleo(case, passes)]
    label = f"{case} without KoLeo, {ranks} ranks x {passes} micro-batches"
    require(found, renamed(replay_without_koleo(case, ranks)), FLOAT32, label=label)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_that_change_ranks_and_stages_midway_follow_the_recorded_ones(tmp_path: Path) -> None:
    parts: dict[str, list[Record]] = {case: [] for case in CASES}
    for ranks, cases in MOVES:
        ways = {}
        for case, (stage, begin, end) in cases.items():
            count, run_dir = len(recorded_run(case, 2).steps), str(tmp_path / case)
            steps = round(begin * count), round(end * count)
            ways[case] = Way(case, 2, stage, 2 // ranks, steps=steps, run_dir=run_dir)
        found = follow(list(ways.values()), world_size=ranks)
        for case, way in ways.items():
            parts[case].append(found[way])
    for case, of_case in parts.items():
        whole: Record = {kind: [x for part in of_case for x in part[kind]] for kind in PER_STEP}
        run, whole["last"] = recorded_run(case, 2), of_case[-1]["last"]
        require(
            whole, renamed(expected_of(run)), FLOAT32, label=f"{run.name} in {len(of_case)} parts"
        )


def test_ranks_change_nothing_with_sinkhorn_knopp_and_without_koleo() -> None:
    one, two = (replay_without_koleo("B", ranks) for ranks in RANKS)
    require(two, one, FLOAT64, label="B without KoLeo on 2 ranks")


def test_without_koleo_ranks_change_only_the_center_of_patches() -> None:
    one, two = (replay_without_koleo("A", ranks) for ranks in RANKS)
    for kind in ("losses", "parts", "grad"):  # the centers that the first step uses are zero
        assert two[kind][0] == pytest.approx(one[kind][0], rel=1e-9)
    first = [record["centers"][0] for record in (one, two)]
    assert first[1]["dino"] == pytest.approx(first[0]["dino"], rel=1e-9)
    ratios = {"center of patches after the first step": first[1]["ibot"] / first[0]["ibot"]}
    for name in ("dino_local_crops_loss", "ibot_loss"):
        ratios[f"{name} in the last step"] = two["losses"][-1][name] / one["losses"][-1][name]
    print("A on 2 ranks:", {name: f"{ratio - 1:+.1e}" for name, ratio in ratios.items()})
    assert all(ratio != 1 for ratio in ratios.values())  # mean of the ranks' means, not of all


@functools.cache
def replay_without_koleo(case: str, ranks: int) -> Record:
    """The run that was recorded on one rank, on so many and without KoLeo, in float64."""
    return replay(recorded_run(case, 1), ranks=ranks, changes=WITHOUT_KOLEO)


def _without_koleo(case: str, passes: int) -> Way:
    return Way(case, recorded_ranks=1, stage=2, accumulation=passes, koleo=False)


def _divides(ranks: int, passes: int) -> bool:
    return all(recorded_run(c, 1).facts["batch_size"] % (ranks * passes) == 0 for c in CASES)
