"""The table of `launchers/README.md` for DINOv3's 7B is what `dinoscale plan` says."""

from pathlib import Path
from typing import Any

import pytest

from dinoscale.config import load_config
from dinoscale.planning.plan.report import make_plan

README = Path(__file__).resolve().parents[3] / "launchers" / "README.md"
PHASES = ("pretrain", "gram", "high_resolution")
GPUS = 256


def _row(phase: str, which: str, option: dict[str, Any]) -> str:
    sent = option["communication"]
    recomputed = "nothing" if option["recompute"] == "none" else f"`{option['recompute']}`"
    return (
        f"| {phase} | {which} | {recomputed} | {option['micro_batch_size']}"
        f" | {option['needed_bytes'] / 1e9:.0f} | {option['step_s'] - sent['waited_s']:.2f}"
        f" | {sent['waited_s']:.2f} | {option['images_per_s'] / GPUS:.1f}"
        f" | {option['hours']:,.0f} |"
    )


@pytest.mark.parametrize("phase", PHASES)
def test_the_table_of_the_7b_is_what_plan_says(phase: str) -> None:
    plans = [
        make_plan(
            load_config(
                "dinov3_vit7b16", [f"engine.zero_hpz_partition_size={of_node}", f"phase={phase}"]
            ),
            gpus=GPUS,
            gpu="h100",
            gpu_memory=None,
            utilization=0.4,
            network=None,
            node_gpus=8,
            storage=10.0,
        )
        for of_node in (1, 8)
    ]
    own, with_hpz = plans
    rows = [
        _row(phase, "preset", own["configured"]),
        _row(phase, "preset, hpZ", with_hpz["configured"]),
        _row(phase, "`plan`'s choice", own["recommended"]),
    ]
    missing = [row for row in rows if row not in README.read_text()]
    assert missing == [], "\n".join(rows)
