"""The tables of `launchers/README.md` for 1,000 GPUs are what `dinoscale plan` says."""

from pathlib import Path
from typing import Any

import pytest

from dinoscale.config import load_config
from dinoscale.planning.plan.report import make_plan

README = Path(__file__).resolve().parents[3] / "launchers" / "README.md"
COMMON = ["train.batch_size=16000", "engine.checkpoint_every_k_blocks=1"]
SIZES = {
    "ViT-L": [],
    "ViT-g": ["model.backbone=vit_giant_patch14_dinov2", "crops.local_size=98"],
    "7B": ["model.embed_dim=4096", "model.depth=33", "model.num_heads=32"],
}
LIVE = {"ViT-L": 50_000_000, "ViT-g": 60_000_000, "7B": 450_000_000}  # two blocks and some
STAGES = {
    "1": ["engine.zero_stage=1"],
    "2": ["engine.zero_stage=2"],
    "3": ["engine.zero_stage=3"],
    "3, hpZ": ["engine.zero_stage=3", "engine.zero_hpz_partition_size=8"],
}


def _plan(size: str, stage: str) -> dict[str, Any]:
    overrides = [
        *COMMON,
        *SIZES[size],
        f"engine.stage3_max_live_parameters={LIVE[size]}",
        *STAGES[stage],
    ]
    return make_plan(
        load_config("vit_l16", overrides),
        gpus=1000,
        gpu="h100",
        gpu_memory=None,
        utilization=0.4,
        network=None,
        node_gpus=8,
        storage=10.0,
    )


def _of_step(size: str, stage: str, plan: dict[str, Any]) -> str:
    option = plan["configured"]
    sent = option["communication"]
    between, all_bytes = sent["between_bytes"] / 1e9, sent["sent_bytes"] / 1e9
    return (
        f"| {size} | {stage} | {option['needed_bytes'] / 1e9:.0f}"
        f" | {all_bytes - between:.1f} | {between:.2f}"
        f" | {option['step_s'] - sent['waited_s']:.2f} | {sent['waited_s']:.3f} |"
    )


def _of_run(size: str, plan: dict[str, Any]) -> str:
    found = plan["durability"]
    steps = round(found["interval_s"] / plan["configured"]["step_s"])
    return (
        f"| {size} | {plan['parameters']['total'] / 1e6:,.0f} | {found['build_s']:.0f}"
        f" | {found['host_bytes'] / 1e9:.1f} | {found['checkpoint_bytes'] / 1e9:.0f}"
        f" | {found['write_s']:.1f} | {found['failures_per_day']:.2f}"
        f" | {found['interval_s'] / 60:.0f} | {steps:,} | {found['lost_share']:.1%}"
        f" | {found['most_lost_share']:.1%} |"
    )


@pytest.mark.parametrize("size", SIZES)
def test_tables_for_a_thousand_gpus_are_what_plan_says(size: str) -> None:
    plans = {stage: _plan(size, stage) for stage in STAGES}
    rows = [_of_step(size, stage, plan) for stage, plan in plans.items()]
    rows.append(_of_run(size, plans["2" if size != "7B" else "3, hpZ"]))
    missing = [row for row in rows if row not in README.read_text()]
    assert missing == [], "\n".join(rows)


def test_commands_for_a_thousand_gpus_are_those_of_the_tables() -> None:
    text = README.read_text()
    for overrides in (COMMON, *SIZES.values(), *STAGES.values()):
        assert all(override in text for override in overrides), overrides
    assert all(f"engine.stage3_max_live_parameters={live}" in text for live in LIVE.values())
