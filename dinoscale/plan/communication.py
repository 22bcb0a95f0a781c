"""Bytes that a rank sends in a step, collective by collective.

Letters: W ranks, P scalars of weights, s bytes of a weight in the forward, c bytes of a summed
number. Ring algorithms: an all-gather or a reduce-scatter of n bytes sends (W - 1) / W n of each
rank, an all-reduce twice that.
"""

from dataclasses import dataclass

from dinoscale.dims import Dims
from dinoscale.plan.setup import Setup


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step.

    Attributes:
        what: in words.
        collective: "all-reduce", "all-gather" or "reduce-scatter".
        times: how often everything is sent in a step.
        sent_bytes: of one rank in a step.
        beside_compute: whether the engine lets it run while it computes.
    """

    what: str
    collective: str
    times: int
    sent_bytes: float
    beside_compute: bool


def transfers(dims: Dims, setup: Setup, *, overlap: bool) -> list[Transfer]:
    """All that is sent in a step, save some kilobytes; nothing on one rank.

    Args:
        dims: of the network.
        setup: of the run.
        overlap: whether gradients are summed while the backward goes on (overlap_comm).
    """
    if setup.world_size == 1:
        return []
    part = (setup.world_size - 1) / setup.world_size * dims.parameters
    passes, s, c = setup.accumulation_steps, setup.weight_bytes, setup.communication_bytes
    if setup.zero_stage == 3:
        gathers = 3 * passes
        return [
            # Fetched ahead, block by block.
            Transfer("weights", "all-gather", gathers, gathers * part * s, True),
            Transfer("gradients", "reduce-scatter", passes, passes * part * c, overlap),
        ]
    # A bucket goes to all ranks at stages 1 and 2 too, where each keeps only its part.
    sums = passes if setup.zero_stage == 2 else 1
    found = [Transfer("gradients", "all-reduce", sums, sums * 2 * part * c, overlap)]
    if setup.zero_stage:
        found.append(Transfer("student's weights", "all-gather", 1, part * s, False))
    return [*found, Transfer("teacher's weights", "all-gather", 1, part * s, False)]


def waited_s(found: list[Transfer], *, bandwidth: float, compute_s: float) -> float:
    """Seconds that a step waits for transfers: all but what runs beside compute and fits in it.

    Args:
        found: of a step.
        bandwidth: bytes/s that a rank sends.
        compute_s: seconds of compute in a step.
    """
    beside = sum(t.sent_bytes for t in found if t.beside_compute) / bandwidth
    alone = sum(t.sent_bytes for t in found if not t.beside_compute) / bandwidth
    return alone + max(0.0, beside - compute_s)
