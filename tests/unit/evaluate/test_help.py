"""`--help` of every task: a description, an example that parses, and the defaults."""

from __future__ import annotations

import argparse
import shlex

import pytest

from dinoscale import cli


def _tasks() -> dict[str, argparse.ArgumentParser]:
    found = cli.parser()
    for name in ("evaluate", None):
        (choices,) = [
            action.choices
            for action in found._actions
            if isinstance(action, argparse._SubParsersAction)
        ]
        if name is None:
            return dict(choices)
        found = choices[name]
    raise AssertionError


TASKS = _tasks()


def test_every_task_is_there() -> None:
    assert list(TASKS) == [
        *("knn", "linear", "logistic", "finetune", "probe", "attention", "segment", "pca"),
        *("video", "retrieve", "copies", "rank", "segmentation", "depth"),
        *("discover", "correspond", "transfer", "compare"),
    ]


@pytest.mark.parametrize("task", TASKS)
def test_help_explains_and_its_example_parses(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.run(["evaluate", task, "--help"])
    assert f"example: dinoscale evaluate {task} " in capsys.readouterr().out
    parser = TASKS[task]
    assert len(parser.description or "") > 100
    example = (parser.epilog or "").removeprefix("example: dinoscale ")
    assert cli.parser().parse_args(shlex.split(example)).task == task


@pytest.mark.parametrize("task", TASKS)
def test_every_option_has_help_with_its_default(task: str) -> None:
    for action in TASKS[task]._actions:
        assert action.help, (task, action.dest)
        if action.default not in (None, False, argparse.SUPPRESS, []):
            says = action.help + str(TASKS[task].description)
            value = f"{action.default:g}" if isinstance(action.default, float) else action.default
            known = ("network", "lr")  # of files that hold one; 5e-5
            assert str(value) in says or action.dest in known, (task, action.dest, action.default)


@pytest.mark.parametrize("option", ["--untrained", "--num-heads", "--train", "--test", "WEIGHTS"])
def test_equal_options_of_tasks_are_explained_alike(option: str) -> None:
    for of_pixels in (False, True):  # whose images have no labels
        said = {
            action.help
            for task, parser in TASKS.items()
            for action in parser._actions
            if option in (*action.option_strings, action.metavar)
            and (task in ("segmentation", "depth")) == of_pixels
        }
        assert len(said) == 1, said
