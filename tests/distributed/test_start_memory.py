"""A rank of a large job never holds much more of the network than the shards it trains."""

import json
import os

import pytest

from tests.forked import Forked
from tests.harness import environment_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

RANKS = 64


def build_and_measure(rank: int, stage: int, of_dinov3: bool) -> None:
    """Print the memory of a start, at its peak and at its end."""
    from tests.benchmarks.start import measure
    from tests.distributed.tiny_run import tiny_config

    changes = {
        "model": {"embed_dim": 192, "depth": 12, "num_heads": 3},
        "train": {"batch_size": RANKS, "micro_batch_size": 1},
        "engine": {
            "zero_stage": stage,
            "precision": "bf16",
            "compile": False,
            "reduce_bucket_size": 1000,  # DeepSpeed's buffers are no weights
            "stage3_max_live_parameters": 1000,
        },
    }
    if of_dinov3:
        changes |= {
            "crops": {"global_size": 32, "local_size": 16},
            "ibot": {"loss_weight": 1.0, "mask_group": 1},
            "patch_head": {"num_prototypes": 29, "hidden_dim": 18, "bottleneck_dim": 13},
            "gram": {"loss_weight": 1.0, "teacher": "given"},
        }
        changes["model"] |= {"rope": {"rescale": 2.0}, "ffn": "swiglu", "registers": 4, "depth": 14}
        changes["model"] |= {"layer_scale": 1e-5, "local_norm": True}
    print(json.dumps(measure(tiny_config(**changes), rank=rank, ranks=RANKS)), flush=True)
    os._exit(0)  # the backend has no good end


@pytest.mark.parametrize(
    ("stage", "rank", "of_dinov3"), [(3, 0, True), (3, RANKS - 1, False), (2, 0, False)]
)
def test_a_start_needs_at_most_two_shards_and_a_layer(
    stage: int, rank: int, of_dinov3: bool
) -> None:
    environment = environment_of(0, world_size=RANKS, port=1)
    process = Forked(build_and_measure, rank, stage, of_dinov3, environment=environment)
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    found = json.loads(out.splitlines()[-1])
    # Below stage 3 every step needs the bf16 weights of both networks, whole on every rank.
    whole = 2 * 2 * found["weights"] if stage < 3 else 0
    assert found["peak"] - whole <= 2 * (found["held"] - whole) + 4 * found["largest"]
    if stage == 3:  # both networks, master weights, average, summed gradients; the Gram network
        of_weight = 2 * 2 + 3 * 4 + (2 if of_dinov3 else 0)
        assert found["held"] < 1.05 * of_weight * found["weights"] / RANKS  # shards are padded
    assert found["weights"] > 30 * found["largest"]  # else a layer were the network
