"""Bytes that a rank sends in a step, collective by collective, and over which links.

Letters: W ranks, P scalars of weights, s bytes of a weight in the forward, c bytes of a summed
number. Ring algorithms: an all-gather or a reduce-scatter of n bytes sends (W - 1) / W n of each
rank, an all-reduce twice that. A ring that visits node after node leaves a node once, and there are
as many rings as a node has GPUs, so of what a rank sends one part in a node's GPUs leaves the node.
"""

from dataclasses import dataclass

from dinoscale.engine.model_sizes import Dims
from dinoscale.planning.plan.partition import Setup


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step.

    Attributes:
        what: in words.
        collective: "all-reduce", "all-gather" or "reduce-scatter".
        group: ranks that take part; of one node where they are fewer than all.
        times: how often everything is sent in a step.
        sent_bytes: of one rank in a step.
        beside_compute: whether the engine lets it run while it computes.
    """

    what: str
    collective: str
    group: int
    times: int
    sent_bytes: float
    beside_compute: bool


@dataclass(frozen=True)
class Links:
    """What GPUs are connected by.

    Attributes:
        node: GPUs of a node.
        within: bytes/s that one GPU sends to the others of its node.
        between: bytes/s that one GPU sends to other nodes.
    """

    node: int
    within: float
    between: float

    def between_bytes(self, transfer: Transfer) -> float:
        """Of what a rank sends, the part that leaves its node."""
        return transfer.sent_bytes / self.node if transfer.group > self.node else 0.0

    def seconds(self, transfer: Transfer) -> float:
        """Of the slower kind of link; both are busy at the same time."""
        leaving = self.between_bytes(transfer)
        return max((transfer.sent_bytes - leaving) / self.within, leaving / self.between)


def transfers(dims: Dims, setup: Setup) -> list[Transfer]:
    """All that is sent in a step, save some kilobytes; nothing on one rank."""
    ranks, passes = setup.world_size, setup.accumulation_steps
    if ranks == 1:
        return []
    part = (ranks - 1) / ranks * dims.parameters
    s, c = setup.weight_bytes, setup.communication_bytes
    if setup.zero_stage == 3:
        sums = Transfer(
            "gradients", "reduce-scatter", ranks, passes, passes * part * c, beside_compute=False
        )
        return [*_gathers(dims, setup), sums]
    # A bucket goes to all ranks at stages 1 and 2 too, where each keeps only its part.
    sums_of = passes if setup.zero_stage == 2 else 1
    sent = sums_of * 2 * part * c
    found = [Transfer("gradients", "all-reduce", ranks, sums_of, sent, beside_compute=False)]
    of = ["student's weights", "teacher's weights"] if setup.zero_stage else ["teacher's weights"]
    return found + [Transfer(what, "all-gather", ranks, 1, part * s, False) for what in of]


def _gathers(dims: Dims, setup: Setup) -> list[Transfer]:
    """Stage 3: forward of the teacher, forward and backward of the student, in every pass."""
    ranks, of_node, gathers = (
        setup.world_size,
        setup.zero_hpz_partition_size,
        3 * setup.accumulation_steps,
    )
    of_all = gathers if of_node == 1 else 2  # what the first forwards gather stays in the node
    # A block is fetched while the one before it is used.
    ahead = setup.stage3_max_live_parameters >= 2 * dims.block
    found = []
    for what, group, times in (
        ("weights", ranks, of_all),
        ("weights in a node", of_node, gathers - of_all),
    ):
        sent = times * (group - 1) / group * dims.parameters * setup.weight_bytes
        if times:
            found.append(Transfer(what, "all-gather", group, times, sent, ahead))
    return found


def waited_s(found: list[Transfer], links: Links, *, compute_s: float) -> float:
    """Seconds that a step waits for transfers: all but what runs beside compute and fits in it.

    Args:
        found: of a step.
        links: they go over.
        compute_s: seconds of compute in a step.
    """
    beside = sum(links.seconds(t) for t in found if t.beside_compute)
    alone = sum(links.seconds(t) for t in found if not t.beside_compute)
    return alone + max(0.0, beside - compute_s)
