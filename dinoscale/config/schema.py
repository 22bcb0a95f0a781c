"""Every setting of a run: frozen pydantic models whose defaults are DINO v1's own.

Sources: [C] code of Caron et al. 2021 (arXiv:2104.14294), its command-line defaults;
[P] the paper; [D] ours, with the reason. A fraction is between 0 and 1. A rule about one section
is checked in that section, a rule joining two in `RunConfig`, a rule that needs the number of
ranks or images in `resolve`.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dinoscale.config.sections.backbones import RESNET50, ModelConfig
from dinoscale.config.sections.crops import (
    AugmentConfig,
    CropsConfig,
    CropSizes,
    not_whole_patches,
)
from dinoscale.config.sections.data import DataConfig
from dinoscale.config.sections.distill import DistillConfig
from dinoscale.config.sections.engine import EngineConfig
from dinoscale.config.sections.fields import (
    CountOrZero,
    Fraction,
    Momentum,
    PathText,
    Positive,
    PositiveOrZero,
    Section,
)
from dinoscale.config.sections.guard import GuardConfig
from dinoscale.config.sections.heads import HeadConfig
from dinoscale.config.sections.lora import LoraConfig
from dinoscale.config.sections.monitoring import CheckpointConfig, EvalConfig, LogConfig
from dinoscale.config.sections.objectives import (
    AnchorConfig,
    GramConfig,
    IbotConfig,
    KoleoConfig,
)
from dinoscale.config.sections.training import (
    REPLACED,
    CurveConfig,
    OptimConfig,
    PhaseConfig,
    SchedulesConfig,
    TrainConfig,
)


class DinoConfig(Section):
    """The class tokens' objective, the targets and the teacher.

    Temperatures are dimensionless, warm-ups in epochs.
    """

    loss_weight: PositiveOrZero = Field(
        default=1.0, description="Weight of the class tokens' loss. Source: [C]."
    )
    targets: Literal["centering", "sinkhorn_knopp"] = Field(
        default="centering",
        description="How the teacher's outputs become targets, those of patches too. centering: "
        "softmax after subtracting a moving average. Source: [C]. sinkhorn_knopp: prototypes are "
        "used equally within each step, in 3 iterations over all ranks and micro-batches, as in "
        "DINOv2's larger models.",
    )
    same_view_pairs: bool = Field(
        default=False,
        description="Also compare a global crop with itself, seen by student and teacher "
        "(global_ignore_diagonal: false in DINOv3's code); the loss is a mean over pairs in any "
        "case.",
    )
    student_temp: Positive = Field(default=0.1, description="Softmax temperature. Source: [C].")
    center_momentum: Fraction = Field(
        default=0.9, description="Share of the old center kept per step. Source: [C]."
    )
    warmup_teacher_temp: Positive = Field(
        default=0.04, description="Teacher temperature in epoch 0. Source: [C]."
    )
    teacher_temp: Positive = Field(
        default=0.04, description="Teacher temperature after the warm-up. Source: [C]."
    )
    warmup_teacher_temp_epochs: CountOrZero = Field(
        default=0, description="Epochs from the first temperature to the second. Source: [C]."
    )
    teacher_temp_changes: Literal["per_epoch", "per_step"] = Field(
        default="per_epoch",
        description="Whether the warm-up of the temperature moves once an epoch ([C]) or with "
        "every step (DINOv2).",
    )
    momentum: Momentum = Field(
        default=0.996,
        description="Momentum of the teacher's EMA at the start: the share of the old weights that "
        "a step keeps. Source: [C].",
    )
    momentum_end: Momentum = Field(default=1.0, description="The same at the end. Source: [C].")
    freeze_last_layer_epochs: CountOrZero = Field(
        default=1, description="Epochs in which the prototypes do not move. Source: [C]."
    )
    freeze_last_layer_by: Literal["skipping", "zero_rate"] = Field(
        default="skipping",
        description="What a frozen prototype is spared. skipping: the whole update, so that its "
        "moments start afterwards. Source: [C]. zero_rate: its rate is 0 and the moments move, as "
        "in DINOv2.",
    )


class RunConfig(Section):
    """A whole run, as `load_config` reads it from YAML."""

    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Seed of weights, order and augmentation. Source: [C].",
    )
    run_dir: PathText = Field(default="runs/dino", description="Folder of everything written.")
    resume: bool = Field(
        default=True, description="Resume from the newest checkpoint in run_dir, if there is one."
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    head: HeadConfig = Field(default_factory=HeadConfig)
    patch_head: HeadConfig | None = Field(
        default=None,
        description="Head of the patch tokens; null: they share the class tokens' head.",
    )
    crops: CropsConfig = Field(default_factory=CropsConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    dino: DinoConfig = Field(default_factory=DinoConfig)
    ibot: IbotConfig = Field(default_factory=IbotConfig)
    koleo: KoleoConfig = Field(default_factory=KoleoConfig)
    gram: GramConfig = Field(default_factory=GramConfig)
    anchor: AnchorConfig = Field(default_factory=AnchorConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedules: SchedulesConfig = Field(default_factory=SchedulesConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    phases: Annotated[tuple[PhaseConfig, ...], Field(strict=False)] = Field(
        default=(),
        description="Parts of the run, trained one after the other, each in a folder of its own; "
        "empty: the run has one part.",
    )
    phase: str | None = Field(
        default=None,
        description="Name of the only phase that a command is about; null: `train` trains all of "
        "them, other commands read the settings outside of `phases`.",
    )

    @field_validator("phases")
    @classmethod
    def _phases_have_names_of_their_own(
        cls, phases: tuple[PhaseConfig, ...]
    ) -> tuple[PhaseConfig, ...]:
        names = [phase.name for phase in phases]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{names.count(name)} phases are named {name!r}")
        return phases

    def scaled_lr(self, lr: float) -> float:
        """A learning rate, scaled with the batch ([P] section 3.2) by `optim.lr_scaling`."""
        batch_size = self.train.batch_size
        if self.optim.lr_scaling == "linear":
            return lr * batch_size / 256
        return lr * math.sqrt(batch_size / {"sqrt": 1024, "sqrt_64": 64}[self.optim.lr_scaling])

    @property
    def lr_curve(self) -> CurveConfig | None:
        """`schedules.lr`, peak and end scaled with the batch, the start as it is, as in DINOv3."""
        curve = self.schedules.lr
        if curve is None:
            return None
        scaled = {key: self.scaled_lr(getattr(curve, key)) for key in ("peak", "end")}
        return curve.model_copy(update=scaled)

    @property
    def peak_lr(self) -> float:
        """Highest learning rate, scaled with the batch."""
        curve = self.lr_curve
        return self.scaled_lr(self.optim.lr) if curve is None else max(curve.reached)

    @property
    def final_lr(self) -> float:
        """Learning rate at the end of the run; `optim.min_lr` is not scaled, that of a curve is."""
        curve = self.lr_curve
        return self.optim.min_lr if curve is None else curve.end

    @property
    def warmup_epochs(self) -> int:
        """Epochs of linear warm-up of the learning rate."""
        curve = self.schedules.lr
        return self.optim.warmup_epochs if curve is None else curve.warmup_epochs

    @property
    def weight_decay_ends(self) -> tuple[float, float]:
        """Weight decay of the first step and at the end."""
        curve = self.schedules.weight_decay
        if curve is None:
            return self.optim.weight_decay, self.optim.weight_decay_end
        return curve.reached[0], curve.end

    @property
    def initial_momentum(self) -> float:
        """Momentum of the teacher in the first step."""
        curve = self.schedules.momentum
        return self.dino.momentum if curve is None else curve.reached[0]

    @property
    def guarded_images(self) -> str | None:
        """What the guard measures; None if nothing is named, not even images to train on."""
        of_training = self.data.sources[0].source if self.data.sources else None
        return self.guard.images or self.eval.train or of_training

    @property
    def of_sizes(self) -> tuple["RunConfig", ...]:
        """The run with each of the sizes of `crops.mixture` alone; itself if there is one size."""
        return tuple(self._with_sizes(sizes) for sizes in self.crops.mixture) or (self,)

    @property
    def size_weights(self) -> tuple[float, ...]:
        """The share of the steps that each of `of_sizes` has."""
        return tuple(sizes.weight for sizes in self.crops.mixture) or (1.0,)

    @property
    def of_largest_size(self) -> "RunConfig":
        """That of `of_sizes` with the most pixels, which needs the most memory."""
        return max(self.of_sizes, key=lambda run: run.pixels_per_image)

    @property
    def pixels_per_image(self) -> int:
        """Pixels of all crops of an image, those of the Gram network too, for one size."""
        crops, gram = self.crops, self.gram
        pixels = 2 * crops.global_size**2 + crops.num_local * crops.local_size**2
        if gram.loss_weight:
            pixels += 2 * (gram.crop_size or crops.global_size) ** 2
        return pixels

    @property
    def sizes_text(self) -> str:
        """Sides of the crops of a run of one size, in words: global 512, local 112, Gram 768 px."""
        sides = [f"global {self.crops.global_size}"]
        if self.crops.num_local:
            sides.append(f"local {self.crops.local_size}")
        if self.gram.loss_weight:
            sides.append(f"Gram {self.gram.crop_size or self.crops.global_size}")
        return f"{', '.join(sides)} px"

    def _with_sizes(self, sizes: CropSizes) -> "RunConfig":
        crops = {"global_size": sizes.global_size, "local_size": sizes.local_size, "mixture": ()}
        gram = {"crop_size": sizes.gram_crop_size}
        return self.model_copy(
            update={
                "crops": self.crops.model_copy(update=crops),
                "gram": self.gram.model_copy(update=gram),
            }
        )

    @property
    def of_teacher(self) -> "RunConfig":
        """A run whose networks are the frozen teacher of `distill`, all its weights its own."""
        head, patch_head = self.distill.heads_beside(self.head, self.patch_head)
        return self.model_copy(
            update={
                "model": self.distill.model or self.model,
                "head": head,
                "patch_head": patch_head,
                "lora": LoraConfig(),
                "optim": self.optim.model_copy(update={"trained_blocks": None}),
            }
        )

    @property
    def has_heads(self) -> bool:
        """Whether anything is learned through projection heads."""
        return self.dino.loss_weight > 0 or self.ibot.loss_weight > 0

    @property
    def mask_group(self) -> int:
        """Images whose masks are drawn together; a micro-batch is a multiple. 1 without masks."""
        return self.ibot.mask_group if self.ibot.loss_weight else 1

    @property
    def koleo_group(self) -> int:
        """Images of a pass over all ranks are a multiple of it; 1 without groups in KoLeo."""
        return (self.koleo.group_size or 1) if self.koleo.loss_weight else 1

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        mistakes = [
            *self._size_mistakes(),
            *self._length_mistakes(),
            *self._objective_mistakes(),
            *self.lora.mistakes(
                trained_blocks=self.optim.trained_blocks,
                begins_random=self._begins_random,
                has_blocks=self.model.backbone != RESNET50,
                has_gram=self.gram.loss_weight > 0,
                zero_stage=self.engine.zero_stage,
            ),
            *self._replaced_settings(),
            *self.distill.stored_mistakes(
                gram=self.gram.loss_weight > 0,
                micro_batch=self.train.micro_batch_size,
                rollbacks=self.train.max_rollbacks,
            ),
            *self.guard.mistakes(
                images=self.guarded_images,
                labelled=self.eval.train is not None,
                keeps_best=self.checkpoint.keep_best,
            ),
        ]
        # 1e-9: equal up to rounding is equal
        if self.schedules.lr is None and self.optim.min_lr > self.peak_lr * (1 + 1e-9):
            mistakes.append(
                f"optim.min_lr: {self.optim.min_lr} is above the peak learning rate "
                f"{self.peak_lr:.4g} ({_SCALED_LR[self.optim.lr_scaling]})"
            )
        mistakes += self._student_mistakes()
        if self.model.backbone == RESNET50 and self.engine.checkpoint_every_k_blocks:
            mistakes.append(
                f"engine.checkpoint_every_k_blocks: {RESNET50} has no transformer blocks, "
                f"need 0, got {self.engine.checkpoint_every_k_blocks}"
            )
        if self.train.steps_per_epoch is not None and self.data.images_per_epoch is not None:
            mistakes.append(
                f"data.images_per_epoch: {self.data.images_per_epoch} images and "
                f"{self.train.steps_per_epoch} steps (train.steps_per_epoch) both say how long an "
                "epoch is; set one of them to null"
            )
        if self.model.backbone == RESNET50:
            mistakes += [
                f"optim.{key}: {RESNET50} has no transformer blocks, need 1.0, "
                f"got {getattr(self.optim, key)}"
                for key in ("layer_decay", "patch_embed_lr")
                if getattr(self.optim, key) != 1
            ]
            if self.optim.backbone_lr == 0:
                mistakes.append(
                    f"optim.backbone_lr: 0 does not rest {RESNET50}, whose batch norm statistics "
                    "follow the images all the same; need above 0"
                )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _student_mistakes(self) -> list[str]:
        """A backbone that can be a frozen teacher alone."""
        name = self.model.backbone
        if self.model.convnet is None or name == RESNET50:
            return []
        return [
            f"model.backbone: {name!r} can only be a frozen teacher whose features are learned "
            f"(distill.model); name a timm ViT such as 'vit_small_patch16_224', or '{RESNET50}'"
        ]

    @property
    def _begins_random(self) -> bool:
        return self.train.init_from is None and self.train.continue_from is None

    def _size_mistakes(self) -> list[str]:
        """Sizes in pixels that are not whole patches, or too small, of each of a mixture."""
        patch = self.model.effective_patch_size
        if patch is None:
            return self._mixture_mistakes()
        mistakes = not_whole_patches({"eval.crop": self.eval.crop}, patch)
        if not self.crops.mixture:
            return self._crop_mistakes(patch) + mistakes
        for number, run in enumerate(self.of_sizes, 1):
            for text in run._crop_mistakes(patch):
                key = text.replace("gram.crop_size", "gram_crop_size").removeprefix("crops.")
                mistakes.append(f"crops.mixture: item {number} of the list: {key}")
        return self._mixture_mistakes() + mistakes

    def _crop_mistakes(self, patch: int) -> list[str]:
        """The same of a run of one size."""
        crops = self.crops
        sizes = {"crops.global_size": crops.global_size}
        # With rotary positions pixels beyond the last whole patch may be left out, as in DINOv3.
        if crops.num_local and (not self.model.rotates or crops.local_size < patch):
            sizes["crops.local_size"] = crops.local_size
        if self.gram.loss_weight and self.gram.crop_size is not None:
            sizes["gram.crop_size"] = self.gram.crop_size
        mistakes = not_whole_patches(sizes, patch)
        of_gram = sizes.get("gram.crop_size", crops.global_size)
        if of_gram < crops.global_size:
            mistakes.append(
                f"gram.crop_size: {of_gram} px show the Gram network less than the student sees in "
                f"global crops of {crops.global_size} px; give at least as many, or leave it out"
            )
        if self.ibot.loss_weight:
            mistakes += self.ibot.mistakes(size=crops.global_size, patch_size=patch)
        subsets = self.model.drop_path_mode == "subset" and self.model.drop_path_rate > 0
        both = crops.num_local > 0 and crops.local_size == crops.global_size
        if self.anchor.counts and subsets and both:
            mistakes.append(
                f"crops.local_size: {crops.local_size} px are also the side of the global crops, "
                "and subsets (model.drop_path_mode) are drawn from both, which the anchor does not "
                "see; give another size, or set model.drop_path_mode=per_image"
            )
        return mistakes

    def _mixture_mistakes(self) -> list[str]:
        """Sizes of Gram crops that contradict the loss, or each other."""
        given = [sizes.gram_crop_size for sizes in self.crops.mixture if sizes.gram_crop_size]
        if not self.gram.loss_weight:
            return [
                f"crops.mixture: a gram_crop_size of {size} px is of a Gram loss, and "
                "gram.loss_weight is 0; leave it out"
                for size in given[:1]
            ]
        if self.crops.mixture and self.gram.crop_size is not None:
            return [
                f"gram.crop_size: {self.gram.crop_size} px is not read with crops.mixture, whose "
                "sizes have a gram_crop_size each; leave crop_size out"
            ]
        return []

    def _objective_mistakes(self) -> list[str]:
        """Terms of the loss that the network or the crops cannot serve."""
        mistakes = []
        if self.model.local_norm and not self.crops.num_local:
            mistakes.append(
                "model.local_norm: there are no local crops (crops.num_local=0), need false"
            )
        if not self.has_heads and not self.distill.by_features:
            mistakes.append("dino.loss_weight: nothing to learn, ibot.loss_weight is 0, too")
        if self.model.backbone == RESNET50:
            return (
                mistakes
                + [
                    f"{key}.loss_weight: {RESNET50} has no tokens, need 0.0"
                    for key in ("ibot", "koleo", "gram")
                    if getattr(self, key).loss_weight
                ]
                + [
                    *(f"{key}: {RESNET50} has no tokens, need 0.0" for key in self.anchor.weights),
                    *self._distill_mistakes(),
                ]
            )
        if self.patch_head is not None and not self.ibot.loss_weight:
            mistakes.append("patch_head: is not trained while ibot.loss_weight is 0; leave it out")
        if self.schedules.gram_weight is not None and not self.gram.loss_weight:
            mistakes.append(
                "schedules.gram_weight: multiplies gram.loss_weight, which is 0; set that too, or "
                "leave the curve out"
            )
        if self.gram.loss_weight:
            mistakes += self.gram.mistakes(
                masks=self.ibot.loss_weight > 0,
                continues=self.train.continue_from is not None,
            )
        mistakes += self.anchor.mistakes(
            begins_random=self._begins_random,
            masked_share=self.ibot.masked_share if self.ibot.loss_weight else 0.0,
        )
        mistakes += self._distill_mistakes()
        return mistakes

    def _distill_mistakes(self) -> list[str]:
        """What a frozen teacher of its own does not go with."""
        sizes = [run.crops.global_size for run in self.of_sizes]
        if self.distill.by_features:
            return self.distill.feature_mistakes(
                model=self.model,
                sizes=sizes,
                masked_share=self.ibot.masked_share if self.ibot.loss_weight else 0.0,
                alone_with_local=0 if self.has_heads else self.crops.num_local,
            )
        heads = [("head", self.head)]
        if self.ibot.loss_weight:
            heads.append(("patch_head", self.patch_head or self.head))
        return self.distill.mistakes(
            heads=dict(heads),
            sizes=sizes,
            others=[
                *(["gram.loss_weight"] if self.gram.loss_weight else []),
                *self.anchor.weights,
            ],
        )

    def _length_mistakes(self) -> list[str]:
        """Phases that last longer than the run."""
        phases = {"dino.freeze_last_layer_epochs": self.dino.freeze_last_layer_epochs}
        if self.schedules.lr is None:
            phases["optim.warmup_epochs"] = self.optim.warmup_epochs
        if self.schedules.teacher_temp is None:
            phases["dino.warmup_teacher_temp_epochs"] = self.dino.warmup_teacher_temp_epochs
        phases |= {f"schedules.{key}": c.least_epochs for key, c in self.schedules.curves.items()}
        return [
            f"{key}: {epochs} epochs do not fit in a run of {self.train.epochs} (train.epochs)"
            for key, epochs in phases.items()
            if epochs > self.train.epochs
        ]

    def _replaced_settings(self) -> list[str]:
        """Settings in whose place a curve stands, and that say something else all the same."""
        mistakes = []
        for name in self.schedules.curves.keys() & REPLACED.keys():
            for dotted in REPLACED[name]:
                section, _, key = dotted.partition(".")
                part = getattr(self, section)
                value, default = getattr(part, key), type(part).model_fields[key].default
                if value != default:
                    mistakes.append(
                        f"{dotted}: {value} is not read with schedules.{name}; leave it out or at "
                        f"its default {default}, or set schedules.{name} to null"
                    )
        return sorted(mistakes)


_SCALED_LR = {
    "linear": "optim.lr x train.batch_size / 256",
    "sqrt": "optim.lr x sqrt(train.batch_size / 1024)",
    "sqrt_64": "optim.lr x sqrt(train.batch_size / 64)",
}
