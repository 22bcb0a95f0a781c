"""Communication, time, and which way is taken."""

from dataclasses import replace

import pytest

from dinoscale.config import parse_config
from dinoscale.engine.model_sizes import Dims, dims_of, flops_of
from dinoscale.errors import ConfigError
from dinoscale.planning.plan.communication import Links, Transfer, transfers, waited_s
from dinoscale.planning.plan.dropped_branches import dropped_flops
from dinoscale.planning.plan.hardware import GPUS, find_gpu, parse_bytes
from dinoscale.planning.plan.partition import Setup
from dinoscale.planning.plan.report import make_plan
from dinoscale.planning.plan.strategies import (
    Machine,
    Option,
    best,
    option_of,
    options,
    recomputed_flops,
)
from dinoscale.planning.plan.table import as_text
from tests.unit.plan.tiny import DIMS, SETUP

WEIGHTS = 1844 + 700
PART = 3 / 4 * WEIGHTS  # of 4 ranks
LINKS = Links(node=8, within=1e9, between=1e9)
MACHINE = Machine(flops=1e12, utilization=0.5, memory_bytes=80e9, links=LINKS)


@pytest.mark.parametrize(
    ("stage", "passes", "sent"),
    [
        (0, 2, {"all-reduce": 8 * PART, "all-gather": 2 * PART}),
        (1, 2, {"all-reduce": 8 * PART, "all-gather": 4 * PART}),
        (2, 2, {"all-reduce": 2 * 8 * PART, "all-gather": 4 * PART}),
        (3, 2, {"reduce-scatter": 2 * 4 * PART, "all-gather": 2 * 3 * 2 * PART}),
    ],
)
def test_bytes_sent_by_hand(stage: int, passes: int, sent: dict[str, float]) -> None:
    setup = replace(SETUP, zero_stage=stage, accumulation_steps=passes)
    found: dict[str, float] = {}
    for transfer in transfers(DIMS, setup):
        found[transfer.collective] = found.get(transfer.collective, 0) + transfer.sent_bytes
    assert found == pytest.approx(sent)


def test_one_rank_sends_nothing() -> None:
    assert transfers(DIMS, replace(SETUP, world_size=1)) == []


def test_hpz_gathers_from_all_in_the_first_forwards_and_within_a_node_later() -> None:
    setup = replace(
        SETUP, zero_stage=3, world_size=8, accumulation_steps=2, zero_hpz_partition_size=4
    )
    found = {t.group: t for t in transfers(DIMS, setup) if t.collective == "all-gather"}
    assert {group: t.times for group, t in found.items()} == {8: 2, 4: 4}
    assert found[8].sent_bytes == 2 * 7 / 8 * 2 * WEIGHTS
    assert found[4].sent_bytes == 4 * 3 / 4 * 2 * WEIGHTS


def test_one_in_a_nodes_gpus_bytes_leaves_the_node_and_the_slower_link_counts() -> None:
    over_nodes = Transfer("weights", "all-gather", 16, 1, 80.0, False)
    inside = replace(over_nodes, group=8)
    slow_network = Links(node=8, within=10.0, between=1.0)
    assert (slow_network.between_bytes(over_nodes), slow_network.between_bytes(inside)) == (10, 0)
    assert slow_network.seconds(over_nodes) == 10
    assert replace(slow_network, between=5.0).seconds(over_nodes) == 7  # 70 bytes within
    assert slow_network.seconds(inside) == 8


def test_weights_are_prefetched_if_two_blocks_may_be_live() -> None:
    setup = replace(SETUP, zero_stage=3, stage3_max_live_parameters=2 * DIMS.block)
    for live, ahead in ((2 * DIMS.block, True), (2 * DIMS.block - 1, False)):
        found = transfers(DIMS, replace(setup, stage3_max_live_parameters=live))
        beside = {t.collective: t.beside_compute for t in found}
        assert beside == {"all-gather": ahead, "reduce-scatter": False}


def test_a_step_waits_for_what_compute_cannot_hide() -> None:
    setup = replace(SETUP, zero_stage=3, stage3_max_live_parameters=10_000)
    found = transfers(DIMS, setup)  # weights 6 PART beside, gradients 4 PART alone
    links = replace(LINKS, within=PART)
    slow = waited_s(found, links, compute_s=1.0)
    fast = waited_s(found, links, compute_s=100.0)
    assert (slow, fast) == (pytest.approx(4 + 5), pytest.approx(4))


def test_seconds_of_a_step_follow_from_its_flops() -> None:
    option = option_of(DIMS, replace(SETUP, world_size=1), MACHINE)
    assert option.compute_s == pytest.approx(3 * flops_of(DIMS).total / 0.5e12)
    assert option.images_per_s == pytest.approx(0.5e12 / flops_of(DIMS).total)


def test_a_mixture_takes_the_memory_of_its_largest_and_the_mean_time() -> None:
    large = replace(DIMS, global_size=32, gram_size=64)
    mixed = replace(large, mixture=((0.25, DIMS), (0.75, large)))
    found = [option_of(dims, SETUP, MACHINE) for dims in (DIMS, large, mixed)]
    assert found[0].peak.total < found[1].peak.total == found[2].peak.total
    for name in ("compute_s", "waited_s", "step_s"):
        small, most, both = (getattr(option, name) for option in found)
        assert both == pytest.approx(0.25 * small + 0.75 * most)
    small, most, both = (flops_of(dims).total for dims in (DIMS, large, mixed))
    assert both == pytest.approx(0.25 * small + 0.75 * most, abs=8)  # eight rounded terms


@pytest.mark.parametrize(("stage", "passes", "gradient"), [(1, 2, 2), (2, 2, 2 * 4), (3, 1, 4)])
def test_an_offloaded_optimizer_costs_copies_and_an_update_on_the_cpu(
    stage: int, passes: int, gradient: int
) -> None:
    here = replace(SETUP, zero_stage=stage, accumulation_steps=passes)
    there = replace(here, offload_optimizer=True)
    fast, slow = (option_of(DIMS, setup, MACHINE) for setup in (here, there))
    own = WEIGHTS / 4
    copied = own * (gradient + 2 + 2)  # gradients down, student and teacher up
    of_sum = 2 if stage == 1 else 4
    touched = own * (of_sum + 8 + 16 + 12 + 12)  # master, moments, average, two casts
    assert slow.step_s - fast.step_s == pytest.approx(copied / 25e9 + touched / 20e9)
    assert fast.offload_s == 0


def test_recomputed_blocks_cost_another_forward() -> None:
    flops = flops_of(DIMS)
    every = replace(SETUP, checkpoint_every=1)
    forward = flops.student_global + flops.student_local
    assert recomputed_flops(DIMS, every, flops) == forward
    assert recomputed_flops(DIMS, replace(every, checkpoint_every=2), flops) == forward / 2
    one_frozen = replace(DIMS, first_backward=1)  # the first of two blocks
    assert recomputed_flops(one_frozen, every, flops) == forward / 2
    assert recomputed_flops(one_frozen, replace(every, checkpoint_every=2), flops) == 0
    but_attention = recomputed_flops(DIMS, replace(every, recompute="all_but_attention"), flops)
    assert 0 < but_attention < forward
    assert recomputed_flops(DIMS, replace(every, recompute="pointwise"), flops) == 0


@pytest.mark.parametrize(("uniform", "kept"), [(True, 3 + 3), (False, 6 + 4)])
def test_branches_that_stochastic_depth_drops_take_no_time(uniform: bool, kept: int) -> None:
    """Of the 6 global and the 6 local crops of a micro-batch, in 2 blocks."""
    dims, setup = (
        replace(DIMS, subset_rate=0.4, subset_uniform=uniform),
        replace(SETUP, world_size=1),
    )
    of_block = sum(2 * (2 * tokens * 768 + 4 * tokens**2 * 8) for tokens in (17, 5))
    forward = (12 - kept) / 6 * of_block
    assert dropped_flops(dims, micro_batch_size=3) == pytest.approx(3 * forward)
    linear = (12 - kept) / 6 * sum(2 * 2 * tokens * 768 for tokens in (17, 5))
    for level, times in (("block", 4 * forward), ("all_but_attention", 3 * forward + linear)):
        every = replace(setup, checkpoint_every=1, recompute=level)
        all_of, some = (option_of(sizes, every, MACHINE) for sizes in (DIMS, dims))
        assert all_of.compute_s - some.compute_s == pytest.approx(3 * times / 0.5e12)
        assert all_of.peak == some.peak


def test_the_rate_of_dropped_branches_is_that_of_the_subset_mode() -> None:
    model = {"drop_path_rate": 0.4, "drop_path_uniform": True}
    dims = dims_of(parse_config({"model": model | {"drop_path_mode": "subset"}}))
    assert (dims.subset_rate, dims.subset_uniform) == (0.4, True)
    assert dims_of(parse_config({"model": model})).subset_rate == 0


def test_with_enough_memory_the_configured_stage_without_recomputation_is_chosen() -> None:
    found = options(DIMS, SETUP, MACHINE, [1, 2, 4, 8])
    assert len(found) == 4 * 3  # stages, levels
    for configured, taken in ((0, 0), (1, 1), (2, 2), (3, 2)):
        chosen = best(DIMS, found, stage=configured)
        assert chosen is not None
        assert (chosen.setup.zero_stage, chosen.level) == (taken, "none")
        assert (chosen.setup.micro_batch_size, chosen.setup.accumulation_steps) == (8, 1)


def test_what_does_not_fit_is_not_chosen() -> None:
    found = options(DIMS, SETUP, replace(MACHINE, memory_bytes=1e9), [1, 2])
    assert not any(option.fits for option in found)
    assert best(DIMS, found, stage=2) is None


def test_a_tight_gpu_recomputes_only_as_much_as_it_must() -> None:
    dims = replace(DIMS, global_size=4 * 64)  # 4,097 tokens a crop
    setup = replace(SETUP, world_size=1, compiled=True)
    needed = {o.level: o.needed_bytes for o in _at_stage_2(dims, setup, 80e9)}
    tight = (needed["none"] + needed["pointwise"]) / 2
    chosen = best(dims, _at_stage_2(dims, setup, tight), stage=2)
    assert chosen is not None
    assert (chosen.level, chosen.setup.micro_batch_size) == ("pointwise", 8)


@pytest.mark.parametrize(("width", "chosen"), [(8, "block"), (400_000, "none")])
def test_a_wide_network_keeps_a_gpu_busy_with_few_images(width: int, chosen: str) -> None:
    dims = replace(DIMS, embed_dim=width)  # 44 tokens an image
    few = replace(SETUP, world_size=1, micro_batch_size=1, accumulation_steps=64)
    many = replace(few, micro_batch_size=64, accumulation_steps=1, checkpoint_every=1)
    machine = replace(MACHINE, memory_bytes=1e18)
    found = best(dims, [option_of(dims, setup, machine) for setup in (few, many)], stage=2)
    assert found is not None
    assert found.level == chosen


def _at_stage_2(dims: Dims, setup: Setup, memory_bytes: float) -> list[Option]:
    found = options(dims, setup, replace(MACHINE, memory_bytes=memory_bytes), [8])
    return [option for option in found if option.setup.zero_stage == 2]


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("24GiB", 24 * 2**30), ("0.5 tb", 5e11), ("1000", 1000)]
)
def test_sizes_of_memory(text: str, size: float) -> None:
    assert parse_bytes(text, option="--gpu-memory") == size


@pytest.mark.parametrize("text", ["80XB", "", "GB", "-1GB", "0GB", "1e3GB", "nan"])
def test_invalid_memory_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory: need a size such as 80GB"):
        parse_bytes(text, option="--gpu-memory")


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    assert find_gpu("H100") is GPUS["h100"]
    with pytest.raises(ConfigError, match=r"unknown name 'h1000'; known: .*a100.*h200"):
        find_gpu("h1000")


def test_a_tiny_network_without_heads_has_a_plan() -> None:
    tiny = {"backbone": "vit_tiny_patch16_224", "embed_dim": 16, "depth": 2, "num_heads": 2}
    for weight in (0.0, 1.0):
        config = parse_config(
            {
                "model": tiny,
                "head": {"num_prototypes": 33, "hidden_dim": 22, "bottleneck_dim": 15},
                "dino": {"loss_weight": weight},
                "crops": {"global_size": 32, "num_local": 0},
                "train": {"batch_size": 4, "micro_batch_size": 4},
                "data": {"images_per_epoch": 16},
                "distill": {"teacher": "w.pth", "model": tiny, "class_feature_weight": 1.0},
            }
        )
        text = as_text(
            make_plan(
                config,
                gpus=2,
                gpu="h100",
                gpu_memory=None,
                utilization=0.4,
                network=None,
                node_gpus=8,
                storage=10.0,
            )
        )
        assert "recommended: " in text
        assert ("the prototypes are trained" in text) == bool(weight)
