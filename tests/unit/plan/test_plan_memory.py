"""Bytes of a step: some by hand, and what must hold for all sizes."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoscale.config import count_parameters, parse_config
from dinoscale.engine.model_sizes import dims_of
from dinoscale.planning.plan.activations import saved_by_block, saved_by_blocks
from dinoscale.planning.plan.memory_model import peak, persistent
from dinoscale.planning.plan.partition import Setup
from tests.benchmarks import plan as benchmark
from tests.unit.plan.tiny import DIMS, SETUP

WEIGHTS = 1844 + 700
PIXELS = 3 * (2 * 16**2 + 2 * 8**2)  # numbers in the crops of an image

SETUPS = st.builds(
    Setup,
    zero_stage=st.integers(0, 3),
    world_size=st.integers(1, 64),
    micro_batch_size=st.integers(1, 64),
    accumulation_steps=st.integers(1, 4),
    bf16=st.booleans(),
    communication_bytes=st.sampled_from([2, 4]),
    checkpoint_every=st.integers(0, 2),
    recompute=st.sampled_from(["pointwise", "all_but_attention", "block"]),
    moments=st.just(2),
    offload_optimizer=st.just(False),
    reduce_bucket_size=st.integers(500, 5000),
    stage3_max_live_parameters=st.just(50_000_000),
    zero_hpz_partition_size=st.just(1),
    on_gpu=st.booleans(),
)


def test_dims_count_what_the_configuration_counts() -> None:
    config = parse_config({})
    dims, counts = dims_of(config), count_parameters(config)
    assert dims.backbone == counts.backbone
    assert sum(scalars for scalars, _ in dims.groups) == dims.parameters
    assert (dims.block, dims.block_matrices) == (12 * 384**2 + 13 * 384, 12 * 384**2)
    assert dims.tokens == 2 * 197 + 8 * 37
    assert dims.mlp_kept == 4 * 384


def test_what_does_not_train_is_there_once_at_stage_2() -> None:
    found = persistent(replace(DIMS, frozen=1000), SETUP)
    assert found["parameters"] == 2 * WEIGHTS
    assert found["optimizer"] == 12 * (WEIGHTS - 1000) / 4
    assert found["teacher"] == 4 * (WEIGHTS - 1000) / 4 + 2 * (WEIGHTS - 1000) + 16 * 100


def test_persistent_memory_at_stage_2_by_hand() -> None:
    assert persistent(DIMS, SETUP) == {
        "parameters": 2 * WEIGHTS,
        "gradients": 0,
        "optimizer": 12 * WEIGHTS / 4,
        "teacher": 4 * WEIGHTS / 4 + 2 * WEIGHTS + 16 * 100,
        "activations": 4 * 3 * PIXELS,
        "buffers": 0,
    }


def test_persistent_memory_at_stage_0_in_float32_by_hand() -> None:
    terms = persistent(DIMS, replace(SETUP, zero_stage=0, bf16=False))
    assert terms["parameters"] == 4 * WEIGHTS
    assert terms["optimizer"] == 8 * WEIGHTS  # no second copy of the weights


def test_persistent_memory_at_stage_3_by_hand() -> None:
    terms = persistent(DIMS, replace(SETUP, zero_stage=3))
    assert terms["parameters"] == 2 * WEIGHTS / 4
    assert terms["gradients"] == 4 * WEIGHTS / 4
    assert terms["teacher"] == 6 * WEIGHTS / 4 + 16 * 100
    assert terms["buffers"] == 4 * 1000


def test_hpz_copies_of_both_networks_count_from_the_first_forwards_to_the_step() -> None:
    one = replace(SETUP, zero_stage=3, world_size=8)
    two = replace(one, zero_hpz_partition_size=4)
    assert persistent(DIMS, two) == persistent(DIMS, one)
    copies = 2 * 2 * WEIGHTS / 4
    assert peak(DIMS, two).terms["buffers"] == peak(DIMS, one).terms["buffers"] + copies


@pytest.mark.parametrize(
    ("compiled", "level", "units", "statistics"),
    [
        (False, None, 10, 6 * 4),
        (False, "pointwise", 10, 6 * 4),
        (True, None, 17, 6 * 4),
        (True, "pointwise", 10, 2 * 4),
        (False, "all_but_attention", 2, 2 * 4),
        (False, "block", 1, 0),
    ],
)
def test_activations_that_a_block_saves_in_units_of_its_width(
    compiled: bool, level: str | None, units: int, statistics: int
) -> None:
    setup = replace(SETUP, compiled=compiled)
    if level is not None:
        setup = replace(setup, checkpoint_every=1, recompute=level)
    assert saved_by_block(DIMS, setup, index=1) == 2 * units * 8 + statistics


def test_blocks_that_are_not_recomputed_save_all_activations() -> None:
    setup = replace(SETUP, checkpoint_every=2)
    assert saved_by_block(DIMS, setup, index=0) < saved_by_block(DIMS, setup, index=1)


def test_blocks_without_a_backward_save_nothing() -> None:
    frozen = replace(DIMS, first_backward=1)
    of_first = SETUP.micro_batch_size * DIMS.tokens * saved_by_block(DIMS, SETUP, index=0)
    for blocks in (1, 2):
        saved, all_saved = (saved_by_blocks(d, SETUP, blocks=blocks) for d in (frozen, DIMS))
        assert saved == all_saved - of_first
    assert peak(frozen, SETUP).total < peak(DIMS, SETUP).total


def test_an_offloaded_optimizer_takes_no_device_memory() -> None:
    terms = persistent(DIMS, replace(SETUP, offload_optimizer=True))
    assert terms["optimizer"] == 0
    assert terms["teacher"] == 2 * WEIGHTS + 16 * 100


@given(setup=SETUPS, more=st.integers(1, 64))
def test_more_ranks_never_need_more_memory_of_one_at_stage_3(setup: Setup, more: int) -> None:
    few = replace(setup, zero_stage=3, world_size=max(2, setup.world_size))  # one gathers nothing
    many = replace(few, world_size=few.world_size + more)
    assert peak(DIMS, many).total <= peak(DIMS, few).total


@given(setup=SETUPS, more=st.integers(1, 64))
def test_a_larger_micro_batch_needs_more_memory(setup: Setup, more: int) -> None:
    larger = replace(setup, micro_batch_size=setup.micro_batch_size + more)
    assert peak(DIMS, larger).total > peak(DIMS, setup).total


@given(setup=SETUPS)
def test_recomputation_never_saves_more_activations(setup: Setup) -> None:
    levels = ("block", "all_but_attention", "pointwise")
    every = [replace(setup, checkpoint_every=1, recompute=level) for level in levels]
    kept = [saved_by_block(DIMS, s, index=0) for s in (*every, replace(setup, checkpoint_every=0))]
    assert kept == sorted(kept)


@given(setup=SETUPS)
def test_the_peak_is_at_least_the_persistent_memory(setup: Setup) -> None:
    assert peak(DIMS, setup).total >= sum(persistent(DIMS, setup).values())


def test_the_benchmark_says_which_cases_it_had_no_time_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "measured", lambda cases: dict.fromkeys(cases, 1e9))
    monkeypatch.setattr(benchmark, "in_turns", lambda count, limit_s: range(count - 2))  # noqa: ARG005
    benchmark.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(told["cases"]) == len(benchmark.CASES) - 2
    assert told["left_out"] == [case._asdict() for case in benchmark.CASES[-2:]]
