"""Settings of a frozen teacher, from which a smaller student learns.

Source: Oquab et al. 2023 (arXiv:2304.07193), section 5; Simeoni et al. 2025 (arXiv:2508.10104),
section 5.2; [D] ours.
"""

from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator

from dinoscale.config.sections.backbones import RESNET50, ModelConfig
from dinoscale.config.sections.crops import not_whole_patches
from dinoscale.config.sections.fields import PathText, Section
from dinoscale.config.sections.heads import HeadConfig


class DistillConfig(Section):
    """Distillation: a frozen teacher, usually larger, gives the targets in place of the average.

    The student learns them by the terms of `dino` and `ibot`, KoLeo beside them. It sees its whole
    crops; the patch loss is taken at the patches that `ibot` draws. The average of the student is
    updated as ever, and is what a run is for.
    """

    teacher: PathText | None = Field(
        default=None,
        description="Weights of the frozen teacher with its heads: a run, one of its checkpoints, "
        "or a training checkpoint of the authors' code; null: none. They are read at every start, "
        "stay out of the checkpoints, and have to be the same when a run resumes.",
    )
    model: ModelConfig | None = Field(
        default=None,
        description="Its backbone; null: as the student's. What acts in training only, such as "
        "stochastic depth, is not read.",
    )
    head: HeadConfig | None = Field(
        default=None,
        description="Its head, with as many prototypes as the student's; null: heads as the "
        "student's.",
    )
    patch_head: HeadConfig | None = Field(
        default=None,
        description="With a head: that of its patch tokens, with as many prototypes as the "
        "student's; null: they share the class tokens' head.",
    )

    @model_validator(mode="after")
    def _patch_head_is_beside_a_head(self) -> "DistillConfig":
        if self.patch_head is not None and self.head is None:
            raise ValueError("patch_head: is beside a head of distill; give distill.head too")
        return self

    @property
    def by_heads(self) -> bool:
        """Whether the outputs of a frozen teacher's heads are the targets."""
        return self.teacher is not None

    def heads_beside(
        self, head: HeadConfig, patch_head: HeadConfig | None
    ) -> tuple[HeadConfig, HeadConfig | None]:
        """The teacher's heads, given those of the student."""
        return (head, patch_head) if self.head is None else (self.head, self.patch_head)

    def mistakes(
        self, *, heads: Mapping[str, HeadConfig], sizes: Sequence[int], others: Sequence[str]
    ) -> list[str]:
        """What does not go together.

        Args:
            heads: of the student that a loss trains, by key: `head`, and with a patch loss
                `patch_head`, which may be the same.
            sizes: of the global crops in pixels.
            others: settings that are not 0, of other networks beside the student.
        """
        if self.teacher is None:
            return [
                f"distill.{key}: is of a frozen teacher; give distill.teacher, or leave it out"
                for key in ("model", "head", "patch_head")
                if getattr(self, key) is not None
            ]
        return [
            *self._teacher_mistakes(sizes, teaches_patches="patch_head" in heads),
            *self._head_mistakes(heads),
            *(
                f"{key}: its network is an earlier one of this run, and with distill.teacher the "
                "student learns from another; need 0.0"
                for key in others
            ),
        ]

    def _teacher_mistakes(self, sizes: Sequence[int], *, teaches_patches: bool) -> list[str]:
        if self.model is None:
            return []
        patch = self.model.effective_patch_size
        if patch is None:
            of_patches = f"distill.model.backbone: {RESNET50} has no patches to teach; need a ViT"
            return [f"{of_patches}, or ibot.loss_weight=0.0"] if teaches_patches else []
        return [
            f"{text} (of distill.model)"
            for size in sizes
            for text in not_whole_patches({"crops.global_size": size}, patch)
        ]

    def _head_mistakes(self, heads: Mapping[str, HeadConfig]) -> list[str]:
        head, patch_head = self.heads_beside(heads["head"], heads.get("patch_head"))
        of_teacher = {"head": head, "patch_head": patch_head or head}
        mistakes = []
        for key, own in heads.items():
            named = "head" if key == "patch_head" and patch_head is None else key
            if of_teacher[key].num_prototypes != own.num_prototypes:
                mistakes.append(
                    f"distill.{named}.num_prototypes: {of_teacher[key].num_prototypes} prototypes "
                    f"give targets to the student's {own.num_prototypes} ({key}.num_prototypes); "
                    "need as many"
                )
        return list(dict.fromkeys(mistakes))  # one head may have both kinds of tokens
