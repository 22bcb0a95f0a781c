"""A rank of a large job never holds much more of the network than the shards it trains.

One process stands for one of 64 ranks: torch's fake backend communicates with nobody, and a rank
takes the same memory. Counted are bytes of tensors, on a CPU for host and device together.
"""

import json
import math
import os

import pytest

from tests.forked import Forked
from tests.harness import environment_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

RANKS = 64


def build_and_measure(rank: int, stage: int) -> None:
    """Print the memory of a start, at its peak and at its end."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dinoscale.engine.build import build_pair
    from dinoscale.planning.bench.tensor_memory import live_bytes, with_peak_bytes
    from tests.distributed.tiny_run import tiny_config, tiny_plan

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    config = tiny_config(
        model={"embed_dim": 192, "depth": 12, "num_heads": 3},
        train={"batch_size": RANKS, "micro_batch_size": 1},
        engine={
            "zero_stage": stage,
            "precision": "bf16",
            "compile": False,
            "reduce_bucket_size": 1000,  # DeepSpeed's buffers are no weights
            "stage3_max_live_parameters": 1000,
        },
    )
    before = live_bytes()
    (student, _), peak = with_peak_bytes(lambda: build_pair(config, tiny_plan(config)))
    sizes = [math.prod(shape) for shape in student.shapes.values()]
    found = {"peak": peak - before, "held": live_bytes() - before}
    print(json.dumps(found | {"weights": sum(sizes), "largest": max(sizes)}), flush=True)
    os._exit(0)  # the backend has no good end


@pytest.mark.parametrize(("stage", "rank"), [(3, 0), (3, RANKS - 1), (2, 0)])
def test_a_start_needs_at_most_two_shards_and_a_layer(stage: int, rank: int) -> None:
    process = Forked(
        build_and_measure, rank, stage, environment=environment_of(0, world_size=RANKS, port=1)
    )
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    found = json.loads(out.splitlines()[-1])
    # Below stage 3 every step needs the bf16 weights of both networks, whole on every rank.
    whole = 2 * 2 * found["weights"] if stage < 3 else 0
    assert found["peak"] - whole <= 2 * (found["held"] - whole) + 4 * found["largest"]
    assert found["weights"] > 30 * found["largest"]  # else a layer were the network
