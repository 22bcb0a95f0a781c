"""Settings of a frozen teacher, from which a smaller student learns.

With its heads, by the terms of a run; without, as backbones are released, its features.
Source: Oquab et al. 2023 (arXiv:2304.07193), section 5; Simeoni et al. 2025 (arXiv:2508.10104),
section 5.2; [D] ours.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator

from dinoscale.config.sections.backbones import RESNET50, ModelConfig
from dinoscale.config.sections.convnets import STRIDE
from dinoscale.config.sections.crops import not_whole_patches
from dinoscale.config.sections.fields import PathText, PositiveOrZero, Section
from dinoscale.config.sections.heads import HeadConfig


class DistillConfig(Section):
    """Distillation: a frozen teacher, usually larger, gives the targets in place of the average.

    The student learns them by the terms of `dino` and `ibot`, KoLeo beside them. It sees its whole
    crops; the patch loss is taken at the patches that `ibot` draws. The average of the student is
    updated as ever, and is what a run is for.

    With a weight of features above 0 the teacher needs no heads: the student's features of the
    global crops, after the final norm and a linear map to the teacher's width, follow the teacher's
    features of the same crops. Each term is a mean over the global crops that `ibot` does not
    choose to mask. The terms of `dino` and `ibot` are then those of a run without a frozen teacher.
    With both of these at weight 0 there are no heads, and features alone are learned. [D].
    """

    teacher: PathText | None = Field(
        default=None,
        description="Weights of the frozen teacher with its heads: a run, one of its checkpoints, "
        "or a training checkpoint of the authors' code; for its features alone, any that "
        "`evaluate` reads; null: none. They are read at every start, "
        "stay out of the checkpoints, and have to be the same when a run resumes.",
    )
    targets: PathText | None = Field(
        default=None,
        description="In place of teacher: the folder of `dinoscale embed --targets`, which holds "
        "its outputs for every step of a run with the same seed, images, crops and batch size; "
        "the teacher is not read, and takes no memory. [D].",
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
    class_feature_weight: PositiveOrZero = Field(
        default=0.0,
        description="Weight of the distances of class features: class tokens, or what a ResNet or "
        "ConvNeXt pools, after its norm; 0: none. [D].",
    )
    patch_feature_weight: PositiveOrZero = Field(
        default=0.0,
        description="Weight of the distances of patch tokens, a mean over patches; 0: none. "
        "Another grid of the teacher's is resized bilinearly to the student's; that of a ResNet or "
        "ConvNeXt is its last map, of 32 pixels a place. [D].",
    )
    feature_loss: Literal["cosine", "smooth_l1"] = Field(
        default="cosine",
        description="The distance. cosine: 1 - cosine. smooth_l1: half the square of differences "
        "below 1, beyond linear, from the teacher's features scaled to mean 0 and variance 1 over "
        "their channels. [D].",
    )

    @property
    def is_given(self) -> bool:
        """Whether a frozen teacher, itself or by its stored outputs, gives anything to learn."""
        return self.teacher is not None or self.targets is not None

    @property
    def by_features(self) -> bool:
        """Whether features of a frozen teacher are learned."""
        return bool(self.feature_weights)

    @property
    def feature_weights(self) -> list[str]:
        """Keys of those that are not 0."""
        keys = ("class_feature_weight", "patch_feature_weight")
        return [f"distill.{key}" for key in keys if getattr(self, key)]

    @model_validator(mode="after")
    def _teacher_or_targets(self) -> "DistillConfig":
        if self.teacher is not None and self.targets is not None:
            raise ValueError(
                f"targets: {self.targets} stands in place of distill.teacher={self.teacher}; set "
                "one of them to null"
            )
        return self

    @model_validator(mode="after")
    def _patch_head_is_beside_a_head(self) -> "DistillConfig":
        if self.patch_head is not None and self.head is None:
            raise ValueError("patch_head: is beside a head of distill; give distill.head too")
        return self

    @property
    def by_heads(self) -> bool:
        """Whether the outputs of a frozen teacher's heads are the targets."""
        return self.is_given and not self.by_features

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
        if not self.is_given:
            return [
                f"distill.{key}: is of a frozen teacher; give distill.teacher, or leave it out"
                for key in ("model", "head", "patch_head")
                if getattr(self, key) is not None
            ]
        return [
            *self._teacher_mistakes(sizes, teaches_patches="patch_head" in heads),
            *self._head_mistakes(heads),
            *(
                f"{key}: its network is an earlier one of this run, and with distill.teacher or "
                "distill.targets the student learns from another; need 0.0"
                for key in others
            ),
        ]

    def feature_mistakes(
        self,
        *,
        model: ModelConfig,
        sizes: Sequence[int],
        masked_share: float,
        alone_with_local: int,
    ) -> list[str]:
        """What does not go together where features are learned.

        Args:
            model: of the student.
            sizes: of the global crops in pixels.
            masked_share: share of the global crops that are masked.
            alone_with_local: local crops of a run whose other terms have no use for them.
        """
        keys, teacher = self.feature_weights, self.model or model
        if not self.is_given:
            text = "there is nothing to follow; give distill.teacher, or set it to 0.0"
            return [f"{key}: {text}" for key in keys]
        mistakes = [
            f"distill.{key}: features are learned without the teacher's heads; leave it out"
            for key in ("head", "patch_head")
            if getattr(self, key) is not None
        ]
        if masked_share == 1:
            mistakes.append(
                f"{keys[0]}: the teacher looks at global crops that are not masked, and "
                "ibot.mask_prob masks all of them; lower that, or set it to 0.0"
            )
        if alone_with_local:
            mistakes.append(
                f"crops.num_local: {alone_with_local} local crops serve the loss of dino alone, "
                "and dino.loss_weight is 0; need 0"
            )
        if teacher.width is None:
            mistakes.append(
                f"distill.model.embed_dim: the width of {teacher.backbone!r} is not known by its "
                "name; give it"
            )
        if self.patch_feature_weight and model.convnet is not None:
            text = f"{model.backbone} has no tokens, need 0.0"
            mistakes.append(f"distill.patch_feature_weight: {text}")
        patch = teacher.effective_patch_size
        if patch is None and (self.patch_feature_weight or not _pads(teacher)):
            patch = STRIDE
        if patch is not None and not mistakes:
            for size in sizes:
                of_size = not_whole_patches({"crops.global_size": size}, patch)
                mistakes += [f"{text} (of the frozen teacher)" for text in of_size]
        return mistakes

    def stored_mistakes(self, *, gram: bool, micro_batch: int | str, rollbacks: int) -> list[str]:
        """What does not go with targets that are stored.

        Args:
            gram: whether there is a Gram loss.
            micro_batch: `train.micro_batch_size`.
            rollbacks: `train.max_rollbacks`.
        """
        if self.targets is None:
            return []
        mistakes = []
        if gram:  # for its crops a picture may be decoded larger, which changes the others
            mistakes.append(
                "gram.loss_weight: distill.targets are of crops that are cut without those of a "
                "Gram network; need 0.0, or distill.teacher"
            )
        if micro_batch == "auto":
            mistakes.append(
                "train.micro_batch_size: auto tries sizes on images that distill.targets do not "
                "hold; give a number"
            )
        if rollbacks:
            mistakes.append(
                f"train.max_rollbacks: {rollbacks} would skip images, and distill.targets hold "
                "those of each step; need 0"
            )
        return mistakes

    def _teacher_mistakes(self, sizes: Sequence[int], *, teaches_patches: bool) -> list[str]:
        if self.model is None:
            return []
        patch = self.model.effective_patch_size
        if self.model.convnet is not None and self.model.backbone != RESNET50:
            return [
                f"distill.model.backbone: {self.model.backbone!r} teaches by its features alone; "
                "give distill.class_feature_weight or distill.patch_feature_weight"
            ]
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


def _pads(teacher: ModelConfig) -> bool:
    """Whether a convolutional network takes images that are not whole places of its last map."""
    return teacher.backbone.startswith("resnet")
