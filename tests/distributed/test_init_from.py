"""`train.init_from` on two ranks: step-0 features are the file's; read once; refused by all."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoscale.checkpoint.load import open_run
from dinoscale.config import load_config
from dinoscale.convert.run_checkpoint import card_of
from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import load_backbone, save_backbone
from dinoscale.engine.build import build_networks
from dinoscale.errors import ConfigError
from tests.distributed.plain_run import NUMBERS
from tests.distributed.tiny_run import tiny_config, tiny_plan
from tests.e2e.hostile import SYNTHETIC, settings
from tests.forked import start_module
from tests.harness import environment_of, run_distributed
from tests.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUNS = [(0, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]  # stage and precision
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def teacher_features(configs: list[dict[str, Any]]) -> list[Any]:
    """On every rank: the teacher's features of IMAGES at step 0, and further checks.

    The same for each of `configs`: whether the student agrees, whether this rank read the file,
    whether it drew a number, whether a trial, whose values do not matter, holds zeros, and what is
    said of a teacher with other weights.
    """
    from dinoscale.convert.initial_weights import read_initial_weights
    from dinoscale.engine.build import build_pair
    from dinoscale.runtime import distributed
    from dinoscale.training.step_zero import compare_features

    found = []
    for changes in configs:
        config = tiny_config(**changes)
        start = distributed.together(lambda c=config: read_initial_weights(c))  # type: ignore[misc]
        torch.rand(1)  # the build before left the state that this one would leave
        state = torch.get_rng_state()
        student, teacher = build_pair(config, tiny_plan(config), start)
        drew = not torch.equal(state, torch.get_rng_state())
        with torch.no_grad():
            features = teacher.plain_backbone()([IMAGES])
        same = all(torch.equal(a, b) for a, b in zip(student.master, teacher.ema, strict=True))
        trial, _ = build_pair(config, tiny_plan(config), values=False)
        zeros = not any(part.any() for part in trial.master)
        step_zero = None if start is None else start.step_zero
        compare_features(config, teacher, step_zero)
        teacher.restore(lambda _name, _start, numel: torch.full((numel,), 0.01))
        said = ""
        try:
            compare_features(config, teacher, step_zero)
        except ConfigError as error:
            said = str(error)
        found.append([features, same, start is not None, drew, zeros, said])
    return found


def test_step_0_features_are_those_of_the_file_at_any_stage(tmp_path: Path) -> None:
    torch.manual_seed(5)
    _, network = build_networks(tiny_config(model={"embed_dim": 64, "num_heads": 1}))
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape), alpha=0.1)
    path = tmp_path / "teacher.pth"
    torch.save(network.backbone.state_dict(), path)
    backbone, *_ = load_backbone(path)
    features = backbone([IMAGES]).double()
    exact = backbone.double()([IMAGES.double()])
    of_rounding = (features - exact).abs().max()
    configs = [
        {
            "model": {"embed_dim": 64, "num_heads": 1},
            "head": {"num_prototypes": 33, "hidden_dim": 22, "batch_norm": True},
            "train": {"init_from": str(path)},
            "engine": {"zero_stage": stage, "precision": precision, "compile": False},
            "run_dir": str(tmp_path),
        }
        for stage, precision in RUNS
    ]
    per_rank = run_distributed(
        "tests.distributed.test_init_from:teacher_features",
        world_size=2,
        timeout_s=280,
        configs=configs,
    )
    for rank, runs in enumerate(per_rank):
        for (stage, precision), (features, same, read, drew, zeros, said) in zip(
            RUNS, runs, strict=True
        ):
            assert same
            assert (read, drew, zeros) == (rank == 0, rank == 0, True)
            if precision == "fp32":
                assert (features.double() - exact).abs().max() <= NUMBERS * of_rounding
            assert f"the teacher of ZeRO stage {stage} does not compute the features of" in said
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    for (_, precision), event, of_others in zip(RUNS, events[::2], events[1::2], strict=True):
        assert (event["event"], event["difference"]) == ("features compared", 0)
        least = {"fp32": 0.0, "bf16": 2.0**-12}[precision]
        assert least <= event["sharded_difference"] < event["sharded_bound"] / 2
        assert (event["outcome"], of_others["outcome"]) == ("within rounding", "refused")


def _train(*more: str, run_dir: Path) -> list[tuple[int, str]]:
    """Exit code and stderr of `dinoscale train` on each of two ranks."""
    overrides = settings(data__train=SYNTHETIC, run_dir=run_dir, train__micro_batch_size=4)
    port = free_port()
    ranks = [
        start_module(
            *("dinoscale", "train", "vit_t16", *overrides, *more),
            environment=environment_of(rank, world_size=2, port=port),
        )
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=140)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(process.returncode, end) for process, end in zip(ranks, ends, strict=True)]


def _compared(run_dir: Path) -> dict[str, Any]:
    """The event that compares the features at step 0, of which there is one."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    (found,) = [event for event in events if event["event"] == "features compared"]
    assert found["difference"] <= found["bound"]
    assert found["outcome"] == "within rounding"
    return found


def test_a_run_starts_from_another_and_resumes_without_it(tmp_path: Path) -> None:
    first, bare = tmp_path / "first", tmp_path / "bare.pth"
    network, _ = build_networks(load_config("vit_t16", settings(run_dir=first)))
    state = {"teacher": network.backbone.state_dict(), "args": argparse.Namespace(num_heads=1)}
    torch.save(state, bare)
    gram = tmp_path / "gram.safetensors"
    card = card_of(load_config("vit_t16", settings(run_dir=first)), source="another")
    save_backbone(gram, network.backbone.state_dict(), replace(card, licence="Of another."))
    note = f"{read_source(bare).card.licence} Of another."
    from_file = (f"train.init_from={bare}", "engine.zero_stage=3")
    from_file += ("gram.loss_weight=1.0", f"gram.teacher={gram}")
    for code, text in _train(*from_file, "train.stop_after_steps=1", run_dir=first):
        assert code == 0, text
    assert _compared(first)["source"] == str(bare)
    more = (f"train.init_from={first}", "train.init_head=true", "train.epochs=2")
    more += ("lora.rank=2", "anchor.class_weight=1.0")  # the rest is in the checkpoint then, too
    once = ("train.stop_after_steps=1", "engine.precision=bf16")
    started = _train(*more, *once, run_dir=tmp_path / "second")
    assert [code for code, _ in started] == [0, 0], started
    assert f"starting from {first}" in started[0][1]
    assert open_run(tmp_path / "second").state["config"]["train"]["init_from"] == str(first)
    assert _compared(tmp_path / "second")["source"] == str(first)
    first.rename(tmp_path / "moved")
    resumed = _train(*more, run_dir=tmp_path / "second")
    assert [code for code, _ in resumed] == [0, 0], resumed
    assert "the anchor stays rounded to bf16" in resumed[0][1]
    checkpoint = open_run(tmp_path / "second")
    assert (checkpoint.step, checkpoint.has_anchor) == (2, True)
    assert "backbone.cls_token" in checkpoint.frozen
    load_backbone(tmp_path / "second")
    assert checkpoint.state["licence"] == note
    longer = (
        f"train.continue_from={tmp_path / 'second'}",
        "train.stop_after_steps=1",
        "lora.rank=2",
    )
    for code, text in _train(*longer, run_dir=tmp_path / "fourth"):
        assert code == 0, text
    assert read_source(tmp_path / "fourth").card.licence == note
    for code, text in _train(*more, run_dir=tmp_path / "third"):
        assert code == 2, text
        assert f"{first}: cannot be read (No such file or directory)" in text
        assert "Traceback" not in text
