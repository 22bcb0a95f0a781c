"""The file of a sweep: what it says, and one sentence for each mistake."""

from pathlib import Path

import pytest

from dinoscale.config.sweep.axes import LadderConfig, ModelSize
from dinoscale.config.sweep.file import SweepConfig, load_sweep
from dinoscale.errors import ConfigError

HEAD = "base: quickstart\nout: runs/test\nmetrics: {loss: online}\n"
SWEEPS = sorted((Path(__file__).parents[3] / "configs" / "sweep").glob("*.yaml"))


def _load(folder: Path, text: str) -> SweepConfig:
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return load_sweep(path)


def _lines(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        _load(folder, text)
    return [line.removeprefix(f"{folder / 'sweep.yaml'}") for line in str(caught.value).split("\n")]


def test_values_are_read_as_written(tmp_path: Path) -> None:
    axes = "model: [tiny, {embed_dim: 48, depth: 2, head_dim: 16}]\n  images: [1e5, 200_000]\n"
    axes += "  subset_size: [0.5, 1000, 1.0]\n  seed: [0, 1]\n  head.num_prototypes: [64, 128]"
    sweep = _load(tmp_path, f"{HEAD}axes:\n  {axes}\n")
    assert sweep.design == "grid"
    assert sweep.axes.by_name() == {
        "model": ("tiny", ModelSize(embed_dim=48, depth=2, head_dim=16)),
        "images": (100_000, 200_000),
        "subset_size": (0.5, 1000, 1.0),
        "seed": (0, 1),
        "head.num_prototypes": (64, 128),
    }
    assert sweep.axes.num_points == 2 * 2 * 3 * 2 * 2


def test_a_ladder_is_a_whole_axis(tmp_path: Path) -> None:
    sweep = _load(tmp_path, HEAD + "axes: {model: {ladder: {from: tiny, to: small, steps: 3}}}")
    assert isinstance(sweep.axes.model, LadderConfig)
    assert (sweep.axes.model.ladder.head_dim, sweep.axes.num_points) == (64, 3)


def test_a_run_of_a_list_is_a_point(tmp_path: Path) -> None:
    runs = "runs: [{model: tiny, images: 1e6}, {seed: 3}]"
    sweep = _load(tmp_path, f"{HEAD}design: list\n{runs}")
    assert [axes.by_name() for _, axes in sweep.all_axes] == [
        {"model": ("tiny",), "images": (1_000_000,)},
        {"seed": (3,)},
    ]


def test_base_is_looked_for_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1")
    text = "out: o\nmetrics: {loss: online}\naxes: {seed: [1]}\n"
    assert _load(tmp_path, f"base: mine.yaml\n{text}").base == str(tmp_path / "mine.yaml")
    assert _load(tmp_path, f"base: quickstart\n{text}").base == "quickstart"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweep_loads(path: Path) -> None:
    assert load_sweep(path).metrics["knn"] == "online"


GRID = HEAD + "axes: {%s}\n"
LIST = HEAD + "design: list\nruns: [%s]\n"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("{}", [": base: is missing", ": out: is missing", ": metrics: is missing"]),
        ("[]", [": needs a mapping of keys to values, got []"]),
        (HEAD + "out: x", [", line 4: duplicate key 'out', first given on line 2"]),
        (HEAD + "axis: {}", [": axis: unknown key, did you mean 'axes'?"]),
        (
            HEAD + "design: gird",
            [": design: needs one of 'grid', 'list', 'isoflop', got 'gird' (text)"],
        ),
        (HEAD, [": axes: is empty; name what to vary, as `model: [tiny, small]`"]),
        (GRID % "seed: []", [": axes.seed: is empty; give it values, or leave it out"]),
        (GRID % "seed: [1, 2, 1]", [": axes.seed: 1 is there twice"]),
        (GRID % "images: 5", [": axes.images: needs a list, got 5"]),
        (
            GRID % "images: [1.5]",
            [": axes.images: item 1 of the list needs a whole number, got 1.5"],
        ),
        (GRID % "lr: [-1]", [": axes.lr: item 1 of the list needs a value above 0, got -1"]),
        (
            GRID % "subset_size: [0.5, 1]",
            [
                ": axes.subset_size: item 2 of the list: needs a whole number of at least 2, or"
                " a fraction of the set above 0 and at most 1.0, got 1"
            ],
        ),
        (
            GRID % "model: [tiyn]",
            [
                ": axes.model: item 1 of the list needs one of 'tiny', 'small', 'base', 'large',"
                " got 'tiyn' (text)"
            ],
        ),
        (
            GRID % "model: [{embed_dim: 63, depth: 2}]",
            [
                ": axes.model: item 1 of the list: embed_dim 63 is not whole heads of 64; change"
                " it, or set head_dim beside it"
            ],
        ),
        (
            GRID % "model: [{ladder: {}}]",
            [
                ": axes.model: item 1 of the list: a ladder is no item of a list; write model:"
                " {ladder: ...}"
            ],
        ),
        (
            GRID % "model: {ladder: {fro: tiny, to: base, steps: 1}}",
            [
                ": axes.model.ladder.from: is missing",
                ": axes.model.ladder.steps: needs a value of at least 2, got 1",
                ": axes.model.ladder.fro: unknown key, did you mean 'from'?",
            ],
        ),
        (
            GRID % "batchsize: [1]",
            [
                ": axes.batchsize: unknown axis, did you mean 'batch_size'; known are model, flops,"
                " images, subset_size, batch_size, lr, lr_factor, seed, and settings such as"
                " head.num_prototypes"
            ],
        ),
        (
            GRID % "head.num_prototype: [1]",
            [": axes.head.num_prototype: unknown key, did you mean 'num_prototypes'?"],
        ),
        (
            GRID % "hed.num_prototypes: [1], head: [1]",
            [
                ": axes.hed.num_prototypes: unknown section 'hed', did you mean 'head'; known are"
                " model, head, crops, augment, dino, ibot, koleo, gram, anchor, distill, lora,"
                " optim, schedules, train, data, engine, eval, guard, log,"
                " checkpoint",
                ": axes.head: is a section; name one of its settings, as head.num_prototypes",
            ],
        ),
        (
            GRID % "flops: [1e36], lr: [1e7], images: [1e16]",
            [
                ": axes.flops: item 1 of the list needs a value of at most 1e+35, got 1e+36",
                ": axes.images: item 1 of the list needs a value of at most 1e+15, got 1e+16",
                ": axes.lr: item 1 of the list needs a value of at most 1000000, got 10000000.0",
            ],
        ),
        (GRID % "run_dir: [a]", [": axes.run_dir: is set by the sweep itself, under `out`"]),
        (
            GRID % f"seed: [{', '.join(map(str, range(101)))}], images: "
            f"[{', '.join(map(str, range(1, 101)))}]",
            [": axes: make 10,100 runs, more than 10,000; leave out values"],
        ),
        (
            GRID % "images: [5], flops: [3]",
            [
                f": axes.images: decides {key}, and so does axes.flops; leave out one"
                for key in (
                    "data.images_per_epoch",
                    "train.steps_per_epoch",
                    "train.stop_after_steps",
                )
            ],
        ),
        (
            GRID % "batch_size: [3], train.batch_size: [2]",
            [
                ": axes.train.batch_size: decides train.batch_size, and so does axes.batch_size;"
                " leave out one"
            ],
        ),
        (
            GRID % "batch_size: [3]" + "settings: {train.batch_size: 2}",
            [
                ": axes.batch_size: decides train.batch_size, and so does"
                " settings.train.batch_size; leave out one"
            ],
        ),
        (
            GRID % "lr: [1], lr_factor: [2]",
            [
                ": axes.lr_factor: multiplies what the rules give, but axes.lr sets the learning"
                " rate; leave out one"
            ],
        ),
        (
            GRID % "lr: [1]" + "rules: {lr: {batch_size: 0.5}}",
            [": axes.lr: rules.lr decides it too; leave out one, or vary lr_factor instead"],
        ),
        (
            GRID % "dino.momentum: [0.9]" + "rules: {momentum: {batch_size: 1}}",
            [": axes.dino.momentum: rules.momentum decides it too; leave out one"],
        ),
        (
            GRID % "optim.weight_decay_end: [0.9]" + "rules: {weight_decay: {width: 1}}",
            [": axes.optim.weight_decay_end: rules.weight_decay decides it too; leave out one"],
        ),
        (
            GRID % "optim.warmup_epochs: [1]" + "rules: {warmup: {fraction: 0.1}}",
            [": axes.optim.warmup_epochs: rules.warmup decides it too; leave out one"],
        ),
        (
            GRID % "seed: [1]"
            + "rules: {warmup: {fraction: 0.1}}\nsettings: {optim.warmup_epochs: 3}",
            [": settings.optim.warmup_epochs: rules.warmup decides it too; leave out one"],
        ),
        (
            GRID % "seed: [1]" + "rules: {warmup: {fraction: 0.1, images: 3}}",
            [": rules.warmup: needs either fraction or images"],
        ),
        (
            GRID % "seed: [1]" + "rules: {lr: {widht: 1, depth: 9}}",
            [
                ": rules.lr.depth: needs a value of at most 4, got 9",
                ": rules.lr.widht: unknown key, did you mean 'width'?",
            ],
        ),
        (
            GRID % "seed: [1]" + "settings: {train: {epochs: 3}, sed: 4, train.epoch: 3}",
            [
                ": settings.train: is a section; write dotted keys, as train.epochs: 10",
                ": settings.sed: unknown key, did you mean 'seed'?",
                ": settings.train.epoch: unknown key, did you mean 'epochs'?",
            ],
        ),
        (
            HEAD + "design: isoflop\naxes: {images: [5]}",
            [
                ": axes.model: is missing; the design 'isoflop' needs it",
                ": axes.flops: is missing; the design 'isoflop' needs it",
            ],
        ),
        (
            GRID % "seed: [1]" + "isoflop: {min_images: 5}",
            [": isoflop: only for the design 'isoflop', not 'grid'"],
        ),
        (
            GRID % "seed: [1]" + "isoflop: {min_images: 5, max_images: 3}",
            [": isoflop.max_images: 3 is below min_images, 5"],
        ),
        (
            LIST % "" + "axes: {seed: [1]}",
            [
                ": axes: the design 'list' has none; write their values into `runs`",
                ": runs: is empty; the design 'list' needs at least one run",
            ],
        ),
        (
            LIST % "{seed: 1}, {}, {sed: 2}",
            [
                ": runs, item 2: is empty; name at least one axis",
                ": runs, item 3: sed: unknown axis, did you mean 'seed'; known are model, flops,"
                " images, subset_size, batch_size, lr, lr_factor, seed, and settings such as"
                " head.num_prototypes",
            ],
        ),
        (
            LIST % "{seed: 1}, {seed: x}, 3",
            [
                ": runs.seed: item 2 of the list needs a whole number, got 'x' (text)",
                ": runs: item 3 of the list needs a mapping of keys to values, got 3",
            ],
        ),
        (
            GRID % "seed: [1]" + "runs: [{seed: 1}]",
            [": runs: only for the design 'list', not 'grid'"],
        ),
        (
            GRID % "seed: [1]" + "cost: {gpu: h100, flops_per_s: 3}",
            [": cost.gpu: is given, and flops_per_s too; leave out one"],
        ),
        (
            GRID % "seed: [1]" + "cost: {gpu_memory: 3GB}",
            [": cost.gpu_memory: of which GPU? set cost.gpu too"],
        ),
        (
            GRID % "seed: [1]" + "executor: {slurm: {hous: 3}}",
            [": executor.slurm.hous: unknown key, did you mean 'hours'?"],
        ),
        (
            'base: a\nout: b\naxes: {seed: [1]}\nmetrics: {jaccard: online, 1b: x, q: "a \'"}',
            [
                ": metrics.jaccard: only knn and loss are measured online; write a line of"
                ' `dinoscale evaluate`, as "knn --train DIR --test DIR"',
                ": metrics: '1b' cannot be a name; use letters, digits and '_'",
                ": metrics.q: is no command line (No closing quotation)",
            ],
        ),
        (
            "base: a\nout: b\naxes: {seed: [1]}\nmetrics: {}",
            [": metrics: is empty; name what to measure, as `knn: online`"],
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence_each(
    tmp_path: Path, text: str, lines: list[str]
) -> None:
    assert _lines(tmp_path, text) == lines
