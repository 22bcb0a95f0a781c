"""A sweep file expands into the runs that it describes."""

import dataclasses
from pathlib import Path

import pytest

from dinoscale.config import RunConfig, load_config, parse_config
from dinoscale.engine.flops import step_flops
from dinoscale.engine.model_sizes import dims_of
from dinoscale.errors import ConfigError
from dinoscale.scaling.design.expand import expand_sweep, plan_runs
from dinoscale.scaling.design.planned_run import PlannedRun
from dinoscale.scaling.design.resolved_run import dims_of_run
from dinoscale.scaling.design.run_key import key_of
from tests.unit.sweep.files import HEAD, MODELS, NO_SUCH_SET, sweep_of


def _runs(folder: Path, text: str, *, head: str = HEAD) -> list[PlannedRun]:
    return plan_runs(sweep_of(folder, text, head=head))


def _lines(folder: Path, text: str, *, head: str = HEAD) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        _runs(folder, text, head=head)
    return str(caught.value).splitlines()


def _changed(**settings: object) -> RunConfig:
    values = load_config("quickstart").model_dump()
    for dotted, value in settings.items():
        section, _, name = dotted.partition("__")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    return parse_config(values)


def test_a_grid_is_the_product_of_its_axes_cheapest_first(tmp_path: Path) -> None:
    runs = _runs(tmp_path, f"axes: {{model: {MODELS}, images: [3200, 6400], seed: [0, 1]}}")
    assert len(runs) == 8
    assert [run.flops for run in runs] == sorted(run.flops for run in runs)
    assert runs[0].axes == {"model": "32x2", "images": 3200, "seed": 0}
    assert runs[0].name == f"32x2-img3200-s0-{runs[0].key[:8]}"
    assert len({run.name for run in runs}) == 8


def test_a_run_is_resolved(tmp_path: Path) -> None:
    (run,) = _runs(tmp_path, "axes: {images: [9000]}")
    config = run.config
    assert config.train.epochs == 25  # of the base, so that its phases keep their shares
    assert config.data.images_per_epoch == 320  # 360 in whole steps of 64
    assert (run.images, run.steps, run.distinct_images) == (25 * 320, 25 * 5, 1600)
    assert run.parameters == 64 * (48 + 1) + 38 * 64 + 3 * (12 * 64**2 + 13 * 64) + 2 * 64
    expected = step_flops(
        global_size=24,
        local_size=12,
        num_local=2,
        patch_size=4,
        embed_dim=64,
        depth=3,
        hidden_dim=256,
        bottleneck_dim=64,
        num_layers=3,
        num_prototypes=128,
    )
    assert run.flops_per_image == expected.total
    assert run.flops == 8000 * expected.total


def test_a_list_has_its_runs_and_no_others(tmp_path: Path) -> None:
    runs = "runs: [{seed: 1, images: 3200}, {head.num_prototypes: 64, images: 1600}]"
    found = _runs(tmp_path, f"design: list\n{runs}")
    assert [dict(run.axes) for run in found] == [
        {"head.num_prototypes": 64, "images": 1600},
        {"images": 3200, "seed": 1},
    ]
    assert found[0].config.head.num_prototypes == 64
    assert found[0].name.startswith("img1600-num_prototypes64-")


def test_every_axis_reaches_the_configuration(tmp_path: Path) -> None:
    axes = "model: [tiny], subset_size: [0.5], batch_size: [32], lr: [0.001], seed: [7]"
    (run,) = _runs(tmp_path, f"axes: {{{axes}}}")
    config = run.config
    model = config.model
    assert (model.embed_dim, model.depth, model.num_heads, model.patch_size) == (192, 12, 3, 4)
    assert (config.data.subset_size, run.distinct_images) == (800, 800)
    assert (config.train.batch_size, config.optim.lr, config.seed) == (32, 0.001, 7)
    assert run.images == 25 * 800


def test_rules_reach_the_configuration(tmp_path: Path) -> None:
    rules = "rules: {lr: {batch_size: 0.5}, momentum: {batch_size: 1}, warmup: {fraction: 0.2}}"
    text = f"axes: {{batch_size: [256], lr_factor: [1.0, 2.0]}}\n{rules}"
    first, second = _runs(tmp_path, text)
    base = load_config("quickstart")
    assert first.config.peak_lr == pytest.approx(base.peak_lr * 2)
    assert second.config.peak_lr == pytest.approx(base.peak_lr * 4)
    assert first.config.dino.momentum == pytest.approx(0.98**4)
    assert first.config.optim.warmup_epochs == 5


def test_a_warm_up_longer_than_the_run_does_not_matter_under_its_rule(tmp_path: Path) -> None:
    data = "synthetic:shapes?images=1600&size=30&seed=1&split=train"
    settings = f"train.epochs: 5, dino.warmup_teacher_temp_epochs: 5, data.train: '{data}'"
    text = f"settings: {{{settings}}}\naxes: {{seed: [1]}}\nrules: {{warmup: {{fraction: 0.2}}}}"
    (run,) = _runs(tmp_path, text, head=HEAD.replace("quickstart", "vit_t16"))
    assert (run.config.train.epochs, run.config.optim.warmup_epochs) == (5, 1)


def test_budgets_are_met_within_a_step_an_epoch(tmp_path: Path) -> None:
    text = f"design: isoflop\naxes: {{model: {MODELS}, flops: [2e11, 1e12], seed: [0, 1]}}"
    runs = _runs(tmp_path, text)
    assert len(runs) == 8
    for run in runs:
        budget, step = run.axes["flops"], 64 * run.flops_per_image
        assert isinstance(budget, float)
        assert 0 <= budget - run.flops < 25 * step


def test_budgets_that_whole_steps_miss_are_noted(tmp_path: Path) -> None:
    text = f"design: isoflop\naxes: {{model: {MODELS}, flops: [2.2e11, 1e12]}}"
    design = expand_sweep(sweep_of(tmp_path, text))
    missed = [run for run in design.runs if run.flops * 1.05 < run.axes["flops"]]
    assert missed
    (note,) = [note for note in design.notes if "2.2e+11 FLOPs reach as little as" in note]
    assert all(run.name in note for run in missed if run.axes["flops"] == 2.2e11)
    epochs = int(note.partition("at most ")[2].partition(",")[0])
    fixed = f"settings: {{train.epochs: {epochs}, dino.warmup_teacher_temp_epochs: 0,"
    fixed += f" optim.warmup_epochs: 0, dino.freeze_last_layer_epochs: 0}}\n{text}"
    assert not [
        note for note in expand_sweep(sweep_of(tmp_path, fixed)).notes if "as little as" in note
    ]


def test_models_beyond_the_limits_are_left_out_by_name(tmp_path: Path) -> None:
    text = f"design: isoflop\naxes: {{model: {MODELS}, flops: [2e11, 1e12]}}\n"
    design = expand_sweep(
        sweep_of(tmp_path, text + "isoflop: {min_images: 5000, max_images: 30_000}")
    )
    left = {out.name: out.why for out in design.left_out}
    assert left == {
        "64x2-c2e11": "fewer than min_images, 5,000",
        "32x2-c1e12": "more than max_images, 30,000",
    }
    assert len(design.runs) == 2
    assert design.notes[0].startswith("2e+11 FLOPs: only 1 of the 3 models that a minimum needs")
    lines = _lines(tmp_path, text + "isoflop: {min_images: 1e9}")
    assert lines == [
        "isoflop: the limits exclude every run; widen min_images and max_images, or change"
        " axes.flops"
    ]


@pytest.mark.parametrize(
    "same",
    [
        {"run_dir": "elsewhere"},
        {"resume": False},
        {"data__num_workers": 3},
        {"train__hang_timeout_s": 5.0},
        {"log__every_steps": 7},
        {"checkpoint__keep_last": 9},
        {"eval__every_epochs": 1},
        {"eval__batch_size": 3},
        {"eval__rank_images": 3},
        {"engine__reduce_bucket_size": 2**20},
        {"engine__zero_stage": 3},
        {"engine__checkpoint_every_k_blocks": 1},
        {"head__batch_norm": False, "train__micro_batch_size": 16},
    ],
)
def test_a_key_does_not_depend_on_what_cannot_change_a_result(same: dict[str, object]) -> None:
    batch_norm = {key: value for key, value in same.items() if key == "head__batch_norm"}
    assert key_of(_changed(**same)) == key_of(_changed(**batch_norm))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"data__images_per_epoch": 64},
        {"data__subset_size": 64},
        {"engine__precision": "fp32"},
        {"train__stop_after_steps": 3},
        {"train__micro_batch_size": 16},
        {"optim__lr": 8.0001e-3},
        {"eval__k": 5},
    ],
)
def test_a_key_depends_on_what_can(other: dict[str, object]) -> None:
    assert key_of(_changed(**other)) != key_of(_changed())


def test_keys_are_those_of_earlier_versions() -> None:
    """If this fails, every sweep would run again; see `run_key.py`."""
    assert key_of(RunConfig()) == "44136fa355b3678a"
    assert key_of(RunConfig(seed=3)) == "4d687b6437462c4d"


def test_a_set_that_is_not_here_is_noted(tmp_path: Path) -> None:
    design = expand_sweep(sweep_of(tmp_path, NO_SUCH_SET + "axes: {images: [3200]}"))
    (note,) = design.notes
    assert note.startswith("data.train cannot be opened here (/nowhere/at/all does not exist")
    assert (design.runs[0].images, design.runs[0].distinct_images) == (3200, 3200)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "axes: {images: [1000]}",
            [
                "run img1000: 1,000 images are fewer than one step of 64 images in each of 25"
                " epochs, 1,600; set fewer train.epochs in settings, or a smaller batch"
            ],
        ),
        (
            "axes: {model: [tiny], optim.min_lr: [1.0]}",
            [
                "run 192x12-min_lr1: optim.min_lr: 1.0 is above the peak learning rate 0.002"
                " (optim.lr x train.batch_size / 256)"
            ],
        ),
        (
            "axes: {head.num_prototypes: [0, x]}",
            [
                "run num_prototypes0: head.num_prototypes: needs a value of at least 1, got 0",
                "run num_prototypesx: head.num_prototypes: needs a whole number, got 'x' (text)",
            ],
        ),
        (
            f"axes: {{seed: [{', '.join(map(str, range(12)))}], train.epochs: [0]}}",
            [
                *(
                    f"run s{seed}-epochs0: train.epochs: needs a value of at least 1, got 0"
                    for seed in range(8)
                ),
                "and 4 more",
            ],
        ),
        (
            "settings: {optim.lr: hot}\naxes: {seed: [1]}",
            ["optim.lr: needs a number, got 'hot' (text) (settings of the sweep)"],
        ),
        (
            "axes: {batch_size: [60]}\nexecutor: {processes: 8}",
            [
                "run bs60: train.batch_size: 60 images cannot be shared equally by 8 ranks;"
                " nearest that can: 56 or 64"
            ],
        ),
        (
            "axes: {subset_size: [2000]}",
            [
                "run distinct2000: data.subset_size: 2000 images are more than the 1600 in"
                " data.train"
            ],
        ),
        (
            NO_SUCH_SET + "axes: {subset_size: [0.5]}",
            [
                "run distinct0.5: distinct_images: a fraction, 0.5, needs the size of data.train,"
                " which cannot be opened here; give a number of images"
            ],
        ),
        (
            NO_SUCH_SET + "axes: {seed: [1]}",
            [
                "run s1: the number of images is unknown, as data.train cannot be opened here;"
                " add the axis images, or set data.images_per_epoch in settings"
            ],
        ),
        (
            "settings: {data.train: null}\naxes: {seed: [1]}",
            ["data.train: not set; name the images, in settings or in the base"],
        ),
        (
            "settings: {model.backbone: resnet50, model.patch_size: null, model.embed_dim: null,"
            " model.depth: null, model.num_heads: null}\naxes: {seed: [1]}",
            ["model.backbone: plan supports only ViTs, not 'resnet50'"],
        ),
        (
            "axes: {seed: [1]}\nrules: {warmup: {fraction: 0.01}}",
            [
                "run s1: rules.warmup: a fraction of 0.01 is 0.25 of the run's 25 epochs, which"
                " rounds to 0; raise train.epochs in settings (the run keeps its images), or"
                " choose a longer warm-up"
            ],
        ),
        (
            "settings: {eval.train: null, eval.test: null}\naxes: {seed: [1]}",
            [
                "run s1: metrics.knn: 'online' needs labelled images; set eval.train and eval.test"
                " in settings"
            ],
        ),
    ],
)
def test_impossible_runs_are_named(tmp_path: Path, text: str, lines: list[str]) -> None:
    head = HEAD.replace("loss: online", "loss: online, knn: online")
    assert _lines(tmp_path, text, head=head) == lines


def test_an_unknown_base_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (line,) = _lines(tmp_path, "axes: {seed: [1]}", head=HEAD.replace("quickstart", "quikstart"))
    assert line.startswith("quikstart: unknown preset, did you mean 'quickstart'?")


def test_a_base_with_phases_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("defaults: [quickstart]\nphases: [{name: first}, {name: second}]\n")
    (line,) = _lines(tmp_path, "axes: {seed: [1]}", head=HEAD.replace("quickstart", str(base)))
    assert line.startswith(f"base: {base} has phases")


@pytest.mark.parametrize(
    "text",
    [
        "settings: {model.backbone: vit_small_patch16_224}\naxes: {seed: [1]}",
        "axes: {model.backbone: [vit_small_patch16_224]}",
    ],
)
def test_another_backbone_has_its_own_sizes(tmp_path: Path, text: str) -> None:
    (run,) = _runs(tmp_path, text)
    assert run.config.model.embed_dim is None
    assert run.parameters > 20e6


def test_sizes_of_crops_are_a_mixture_in_place_of_one(tmp_path: Path) -> None:
    sizes = "{weight: 0.5, global_size: 32, local_size: 16}"
    more = "{weight: 0.5, global_size: 48, local_size: 12}"
    one = sizes.replace("0.5", "1.0")
    runs = _runs(tmp_path, f"axes: {{crops.mixture: [[{one}], [{sizes}, {more}]]}}")
    crops = [run.config.crops for run in runs]
    assert [(c.global_size, c.local_size, len(c.mixture)) for c in crops] == [
        (32, 16, 1),
        (48, 16, 2),
    ]
    settings = f"settings: {{crops.mixture: [{sizes}, {more}]}}\n"
    (line,) = _lines(tmp_path, settings + "axes: {crops.global_size: [32]}")
    assert line.endswith(
        "global_size: 32 px is not the largest of crops.mixture, 48 px; leave it out, or set"
        " crops.mixture=[] for one size"
    )


def test_all_that_a_network_and_its_loss_consist_of_is_counted() -> None:
    mixture = [
        {"weight": 0.5, "global_size": 32, "local_size": 16, "gram_crop_size": 64},
        {"weight": 0.5, "global_size": 48, "local_size": 12},
    ]
    values = {
        "ibot": {"loss_weight": 1.0},
        "patch_head": {"num_prototypes": 99, "hidden_dim": 18, "bottleneck_dim": 13},
        "gram": {"loss_weight": 1.0, "teacher": "given"},
        "crops": {"mixture": mixture},
        "model": {"patch_size": 4, "drop_path_mode": "subset"},
        "data": {"channels": 1, "mean": [0.5], "std": [0.5]},
    }
    config = parse_config(values)
    assert dims_of_run(config) == dims_of(config)


def test_two_equal_runs_are_refused_by_name(tmp_path: Path) -> None:
    (line,) = _lines(tmp_path, "axes: {images: [3200, 3300]}")
    key = _runs(tmp_path, "axes: {images: [3200]}")[0].key[:8]
    assert line.startswith(
        f"runs img3200-{key} and img3300-{key} are the same: they differ in nothing"
    )
    (line,) = _lines(tmp_path, "axes: {log.every_steps: [1, 2]}")
    assert "every_steps1-" in line
    assert "every_steps2-" in line


def test_planning_twice_gives_equal_runs(tmp_path: Path) -> None:
    text = f"axes: {{model: {MODELS}, images: [3200]}}"
    assert [dataclasses.astuple(run) for run in _runs(tmp_path, text)] == [
        dataclasses.astuple(run) for run in _runs(tmp_path, text)
    ]
