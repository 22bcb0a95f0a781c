"""Bytes that a rank sends in a step, by collective, and the links they use.

Letters: W ranks, P weights, s bytes of a weight in the forward, c bytes of a reduced number. Ring
algorithms: for an all-gather or a reduce-scatter of n bytes each rank sends (W - 1) / W n, for an
all-reduce twice that. A ring that visits the nodes one by one leaves each node once, and a node
with G GPUs has G rings, so 1 in G bytes that a rank sends leaves its node.
"""

from dataclasses import dataclass

from dinoscale.engine.model_sizes import Dims
from dinoscale.planning.plan.partition import Setup


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step.

    Attributes:
        what: what is sent, in words.
        collective: "all-reduce", "all-gather" or "reduce-scatter".
        group: number of participating ranks; if not all, they are on one node.
        times: how often everything is sent in a step.
        sent_bytes: bytes that one rank sends in a step.
        beside_compute: whether the engine overlaps it with compute.
    """

    what: str
    collective: str
    group: int
    times: int
    sent_bytes: float
    beside_compute: bool


@dataclass(frozen=True)
class Links:
    """The links between GPUs.

    Attributes:
        node: GPUs per node.
        within: bytes/s that one GPU sends to the others of its node.
        between: bytes/s that one GPU sends to other nodes.
    """

    node: int
    within: float
    between: float

    def between_bytes(self, transfer: Transfer) -> float:
        """Bytes that leave the node of the rank that sends them."""
        return transfer.sent_bytes / self.node if transfer.group > self.node else 0.0

    def seconds(self, transfer: Transfer) -> float:
        """Seconds of the transfer: both kinds of link work at once, the slower one counts."""
        leaving = self.between_bytes(transfer)
        return max((transfer.sent_bytes - leaving) / self.within, leaving / self.between)


def transfers(dims: Dims, setup: Setup) -> list[Transfer]:
    """All transfers of a step except some kilobytes; none on one rank."""
    ranks, passes = setup.world_size, setup.accumulation_steps
    if ranks == 1:
        return []
    part = (ranks - 1) / ranks * dims.trained  # with stage 3, everything does
    s, c = setup.weight_bytes, setup.communication_bytes
    if setup.zero_stage == 3:
        sums = Transfer(
            "gradients", "reduce-scatter", ranks, passes, passes * part * c, beside_compute=False
        )
        return [*_gathers(dims, setup), sums]
    # Stages 1 and 2 all-reduce a bucket too, though each rank keeps only its part.
    sums_of = passes if setup.zero_stage == 2 else 1
    sent = sums_of * 2 * part * c
    found = [Transfer("gradients", "all-reduce", ranks, sums_of, sent, beside_compute=False)]
    of = ["student's weights", "teacher's weights"] if setup.zero_stage else ["teacher's weights"]
    return found + [Transfer(what, "all-gather", ranks, 1, part * s, False) for what in of]


def _gathers(dims: Dims, setup: Setup) -> list[Transfer]:
    """Weights at stage 3: teacher forward, student forward and backward, in every pass."""
    ranks, of_node = setup.world_size, setup.zero_hpz_partition_size
    # Of networks of these sizes that move.
    teaches = dims.prototypes and dims.frozen_teacher is None and not dims.stored_targets
    forwards = 2 if teaches or dims.average_follows else 1
    gathers = (forwards + 1) * setup.accumulation_steps
    of_all = gathers if of_node == 1 else forwards  # the node keeps what these gathered first
    # A block is prefetched while the one before it computes.
    prefetches = setup.stage3_max_live_parameters >= 2 * dims.block
    found = []
    for what, group, times in (
        ("weights", ranks, of_all),
        ("weights in a node", of_node, gathers - of_all),
    ):
        sent = times * (group - 1) / group * dims.parameters * setup.weight_bytes
        if times:
            found.append(Transfer(what, "all-gather", group, times, sent, prefetches))
    # Gathered in each pass; frozen, so with groups the node's copy stays.
    teacher = dims.frozen_teacher
    followed = 0 if dims.followed is None else dims.followed.parameters
    for what, is_there, weights in (
        ("Gram network's", dims.gram_size, dims.backbone),
        ("anchor's", dims.anchor, dims.backbone),
        ("frozen teacher's", teacher is not None, dims.of_targets.parameters),
        ("frozen teacher's", followed, followed),
    ):
        group = ranks if of_node == 1 else of_node
        times = setup.accumulation_steps
        sent = times * (group - 1) / group * weights * setup.weight_bytes
        if is_there:
            found.append(Transfer(f"{what} weights", "all-gather", group, times, sent, prefetches))
    return found


def waited_s(found: list[Transfer], links: Links, *, compute_s: float) -> float:
    """Seconds that a step waits for transfers: those that compute does not hide.

    Args:
        found: transfers of a step.
        links: that they use.
        compute_s: seconds of compute in a step.
    """
    overlapped = sum(links.seconds(t) for t in found if t.beside_compute)
    exposed = sum(links.seconds(t) for t in found if not t.beside_compute)
    return exposed + max(0.0, overlapped - compute_s)
