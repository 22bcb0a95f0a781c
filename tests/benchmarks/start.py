"""Memory of one rank of a large job while it starts, on one CPU.

    python -m tests.benchmarks.start dinov3_vit7b16 phase=gram --ranks 256 --rank 255

builds a rank's part of a run, the Gram network included, and prints one line of JSON. The process
stands for one of the ranks: torch's fake backend communicates with nobody, and a rank takes the
same memory. Counted are bytes of tensors, on a CPU for host and device together, without what rank
0 reads from train.init_from and gram.teacher. Rank 0 draws all weights, others none.
"""

import argparse
import json
import math
import os

from dinoscale.config import RunConfig, load_config, resolve

IMAGES = 10**9  # as many as any run draws in an epoch


def measure(config: RunConfig, *, rank: int, ranks: int) -> dict[str, int]:
    """Bytes at the peak of a start and at its end; scalars of the network and its largest tensor.

    Ends with a process group that has no good end: leave the process by `os._exit`.
    """
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dinoscale.engine.build import build_pair
    from dinoscale.planning.bench.tensor_memory import live_bytes, with_peak_bytes

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    plan = resolve(config, world_size=ranks, num_images=IMAGES)

    def start() -> tuple[list[int], object]:
        student, teacher = build_pair(config, plan)
        if teacher.gram is not None:
            zeros = {name: torch.zeros(()).expand(shape) for name, shape in student.shapes.items()}
            teacher.gram.load({name.removeprefix("backbone."): zeros[name] for name in zeros})
        return [math.prod(shape) for shape in student.shapes.values()], (student, teacher)

    before = live_bytes()
    (sizes, _networks), peak = with_peak_bytes(start)
    found = {"peak": peak - before, "held": live_bytes() - before}
    return found | {"weights": sum(sizes), "largest": max(sizes)}


def main() -> None:
    """Print what `measure` finds for a preset or file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_intermixed_args()
    own = {"RANK": options.rank, "WORLD_SIZE": options.ranks}  # what a launcher says
    own |= {"LOCAL_RANK": options.rank % 8, "LOCAL_WORLD_SIZE": min(options.ranks, 8)}
    os.environ.update({name: str(value) for name, value in own.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    config = load_config(options.config, options.overrides)
    print(json.dumps(measure(config, rank=options.rank, ranks=options.ranks)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
