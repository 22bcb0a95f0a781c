"""A recorded run of the reference's training class with a frozen teacher, see `recorded.py`."""

import functools
from typing import Any

from tests.golden23 import recorded
from tests.golden23.compare import Record
from tests.golden23.recorded import RecordedRun, below, our_sections_of_dinov3, trained

GENERATION = "distillation"


class DistillationRun(RecordedRun):
    """One of them; its student begins as `initial`, and so does the average.

    Attributes:
        frozen: weights of the teacher, with the reference's names.
    """

    def __init__(self, ranks: int) -> None:
        self.generation, self.name, self.ranks = "dinov3", f"{GENERATION}_ranks{ranks}", ranks
        self.facts = recorded.facts_of(self.name)
        self.steps, self.gram = self.facts["steps"], {}
        initial = recorded.tensors_of(f"{GENERATION}_initial")
        self.initial = trained(below("student.", initial))
        self.frozen = trained(below("teacher.", initial))
        self._masks = recorded.tensors_of(f"{self.name}_masks")
        assert self.facts["ranks"] == ranks

    def sections(self, *, parts: int) -> dict[str, Any]:
        """Those of the student, and beside them the teacher's networks."""
        sections = our_sections_of_dinov3(self._facts_of("student"), parts=parts)
        teacher = our_sections_of_dinov3(self._facts_of("teacher"), parts=parts)
        networks = {key: teacher[key] for key in ("model", "head", "patch_head")}
        return sections | {"distill": {"teacher": self.name, **networks}}

    def _facts_of(self, role: str) -> dict[str, Any]:
        """The file as that of a run of one of the networks."""
        sizes, config = self.facts[role], self.facts["config"]
        if role == "teacher":
            config = config | self.facts["teacher_config"]
        student = config["student"] | {"ffn_ratio": sizes["ffn_ratio"]}
        student["mask_k_bias"] &= student["qkv_bias"]  # without a bias there is none to mask
        return (
            self.facts
            | sizes
            | {"config": config | {"student": student, "gram": {"use_loss": False}}}
        )

    def record(self) -> Record:
        """What was recorded: losses, norms of gradients, and the weights at the end, if here."""
        record: Record = {
            "losses": self.losses(),
            "parts": [step["grad_norms"] for step in self.steps],
            "last": {},
        }
        if self.has_states:
            state = below(f"step{len(self.steps) - 1}.", recorded.tensors_of(f"{self.name}_states"))
            for which, theirs in (("student", "student"), ("teacher", "ema")):
                record["last"][which] = trained(below(f"{theirs}.", state))
        return record


@functools.cache
def distillation_run(ranks: int) -> DistillationRun:
    """The run, read once."""
    return DistillationRun(ranks)
