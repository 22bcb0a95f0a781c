"""Phases of a run: their settings, and what a phase cannot say."""

from pathlib import Path

import pytest

from dinoscale.config import dump_config, load_config, phases_of
from dinoscale.errors import ConfigError

_CHAIN = """\
defaults: [quickstart]
run_dir: runs/chain
seed: 4294967295
train: {init_from: weights.pth}
phases:
- name: small
- name: large
  change:
    crops: {global_size: 32}
    train: {epochs: 3}
- name: last
  start: teacher
  change: {optim: {lr: 0.001}}
"""


@pytest.fixture
def chain(tmp_path: Path) -> str:
    path = tmp_path / "chain.yaml"
    path.write_text(_CHAIN)
    return str(path)


def test_a_phase_is_the_file_with_its_changes_and_begins_where_the_last_one_ended(
    chain: str,
) -> None:
    small, large, last = phases_of(load_config(chain, ["optim.lr=0.5"]))
    assert [run.run_dir for run in (small, large, last)] == [
        "runs/chain/phases/01_small",
        "runs/chain/phases/02_large",
        "runs/chain/phases/03_last",
    ]
    assert [run.seed for run in (small, large, last)] == [2**32 - 1, 0, 1]
    assert [run.crops.global_size for run in (small, large, last)] == [24, 32, 24]
    assert (small.train.epochs, large.train.epochs, last.train.epochs) == (25, 3, 25)
    assert (small.optim.lr, large.optim.lr, last.optim.lr) == (0.5, 0.5, 0.001)
    assert (small.train.init_from, small.train.continue_from) == ("weights.pth", None)
    assert (large.train.init_from, large.train.continue_from) == (None, small.run_dir)
    assert (last.train.init_from, last.train.init_head) == (large.run_dir, True)
    assert last.train.continue_from is None
    assert not any(run.phases for run in (small, large, last))


def test_a_run_without_phases_is_one_run() -> None:
    config = load_config("quickstart")
    assert phases_of(config) == (config,)


def test_the_command_line_changes_and_chooses_phases(chain: str, tmp_path: Path) -> None:
    config = load_config(chain, ["phases.last.train.epochs=2", "phases.small.crops.num_local=3"])
    assert [run.train.epochs for run in phases_of(config)] == [25, 3, 2]
    assert [run.crops.num_local for run in phases_of(config)] == [3, 2, 2]
    assert load_config(chain, ["phase=large"]) == phases_of(load_config(chain))[1]
    written = tmp_path / "written.yaml"
    written.write_text(dump_config(config))
    assert load_config(str(written)) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("phase=lage", "phase: 'lage' is not one; phases are small, large, last"),
        ("phases.lage.train.epochs=2", "needs phases.NAME.section.key=value with the name of one"),
        ("phases.large=2", "needs phases.NAME.section.key=value"),
        ("phases.large.trian.epochs=2", "phases.large.trian: unknown key, did you mean 'train'?"),
        ("phases.large.train.epochs=0", "phases.large.train.epochs: needs a value of at least 1"),
        ("phases.large.crops.global_size=33", "phases.large.crops.global_size: 33 px is not a mul"),
        ("phases.large.head.num_prototypes=9", "phases.large.head.num_prototypes: 9 here and 128"),
        ("phases.last.model.depth=2", "phases.last.model.depth: 2 here and 3 in the phase before"),
        ("phases.large.ibot.loss_weight=1", "phases.large.ibot.loss_weight: a patch loss here and"),
        (
            "phases.last.model.rope.base=10.0",
            "phases.last.model.rope: rotary positions here and learned",
        ),
        ("phases.last.optim.name=sgd", "phases.last.optim.name: sgd here and adamw in the phase"),
        ("phases.large.gram.loss_weight=1", "phases.large.gram.teacher: the phase before has no"),
        ("phases.large.lora.rank=2", "phases.large.lora.rank: 2 here and 0 in the phase before"),
        (
            "phases.large.optim.trained_blocks=2",
            "phases.large.optim.trained_blocks: 2 here and None in the phase before",
        ),
        ("phases.large.run_dir=x", "phases.large.run_dir: a phase has its own; leave it out"),
        ("phases.large.train.init_from=x", "phases.large.train.init_from: a phase begins where"),
        ("train.continue_from=x", "train.continue_from: a run begins with the whole state of anot"),
    ],
)
def test_mistakes_are_told_before_the_first_phase(chain: str, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(chain, [override])
    assert sentence in str(refused.value)


def test_two_phases_may_begin_at_the_end_of_the_same_one(chain: str) -> None:
    path = Path(chain)
    path.write_text(_CHAIN.replace("start: teacher", "after: small"))
    small, large, last = phases_of(load_config(chain))
    assert large.train.continue_from == last.train.continue_from == small.run_dir
    assert large.seed == last.seed == 0  # the same images
    for name in ("last", "none"):  # neither itself nor an unknown one
        path.write_text(_CHAIN.replace("start: teacher", f"after: {name}"))
        known = f"phases.last.after: no earlier phase '{name}'; earlier ones are small, large"
        with pytest.raises(ConfigError, match=known):
            load_config(chain)


def test_names_of_phases_are_different_and_name_folders(chain: str) -> None:
    path = Path(chain)
    path.write_text(_CHAIN.replace("name: large", "name: small"))
    with pytest.raises(ConfigError, match="phases: 2 phases are named 'small'"):
        load_config(chain)
    path.write_text(_CHAIN.replace("name: large", "name: ../large"))
    with pytest.raises(ConfigError, match=r"phases.name: "):
        load_config(chain)


def test_the_gram_network_may_be_a_teacher_of_the_run_itself(chain: str) -> None:
    last = "phases.last.gram"
    teacher = "{run_dir}/phases/01_small/checkpoints/step_00000200"
    config = load_config(chain, [f"{last}.loss_weight=1.0", f"{last}.teacher={teacher}"])
    for run_dir in ("runs/chain", "elsewhere"):
        run = phases_of(config.model_copy(update={"run_dir": run_dir}))[-1]
        assert run.gram.teacher == f"{run_dir}/phases/01_small/checkpoints/step_00000200"
        assert run.train.init_from == f"{run_dir}/phases/02_large"


@pytest.mark.parametrize("folder", ["03_last", "02_lage", ""])
def test_a_gram_network_of_the_run_itself_is_of_an_earlier_phase(chain: str, folder: str) -> None:
    given = ["phases.last.gram.loss_weight=1.0", "run_dir=runs/x"]
    for path in ("{run_dir}/phases/", "./runs//x/phases/", f"{Path.cwd()}/runs/x/phases/"):
        teacher = path + folder
        with pytest.raises(ConfigError) as refused:
            load_config(chain, [*given, f"phases.last.gram.teacher={teacher}"])
        assert str(refused.value) == (
            f"phases.last.gram.teacher: {teacher.replace('{run_dir}', 'runs/x')} is not in the "
            "folder of an earlier phase of this run (01_small, 02_large); give one of these, or "
            "other weights"
        )


def test_the_first_phase_has_no_earlier_one_to_be_its_gram_network(chain: str) -> None:
    teacher = "phases.small.gram.teacher={run_dir}/phases/01_small"
    with pytest.raises(ConfigError, match=r"earlier phase of this run \(none\)"):
        load_config(chain, ["phases.small.gram.loss_weight=1.0", teacher])


def test_a_run_without_phases_has_none_to_choose() -> None:
    with pytest.raises(ConfigError, match="phase: 'large' is not one; the run has no phases"):
        load_config("quickstart", ["phase=large"])
