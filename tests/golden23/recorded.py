"""A recorded run of the reference's training class: its settings as ours, input and numbers.

README.md describes the files. Every number comes from them, so that DINOSCALE_GOLDEN23 may point at
another folder of the same format, with other sizes, seeds and settings.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dinoscale.config import RunConfig, parse_config
from dinoscale.engine.schedules import StepValues
from tests.golden23.compare import Record
from tests.golden23.reference_names import FIXED

OWN = Path(__file__).parent / "data"
DATA = Path(os.environ.get("DINOSCALE_GOLDEN23", OWN))
CENTERS = ("dino", "ibot")  # of class tokens and of patches
GENERATIONS = ("dinov2", "dinov3")
CASES = ("A", "B")
RANKS = (1, 2)


class RecordedRun:
    """One of the runs.

    Attributes:
        facts: NAME.json.
        steps: its steps.
        trace: trace_NAME.json, norms of tensors: "grad", "student", "teacher" -> name -> per step.
        initial: weights of student and teacher at the start, names and float32 of the reference.
        gram: those of the Gram network; empty without one.
        frozen: those of a frozen teacher; empty without one.
    """

    frozen: Mapping[str, Tensor] = {}

    def __init__(self, case: str, ranks: int, generation: str = "dinov2") -> None:
        name = f"{generation}_{case}_ranks{ranks}"
        self.generation = generation
        self.name, self.ranks = name, ranks
        self.facts: dict[str, Any] = facts_of(name)
        self.trace: dict[str, Any] = facts_of(f"trace_{name}")
        self.steps: list[dict[str, Any]] = self.facts["steps"]
        initial = tensors_of(f"{generation}_{case}_initial")
        self.gram = trained(below("gram_teacher.", initial))
        if not below("student.", initial):  # C begins as B, with a Gram network
            initial = tensors_of(f"{generation}_B_initial")
        self.initial = trained(below("student.", initial))
        self._masks = tensors_of(f"{name}_masks")
        assert self.facts["ranks"] == ranks

    def config(
        self,
        *,
        stage: int = 0,
        world_size: int | None = None,
        accumulation: int = 1,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> RunConfig:
        """The run as a configuration of ours, on some ranks and with changed settings."""
        parts = (world_size or self.ranks) * accumulation
        sections = self.sections(parts=parts)
        sections["engine"]["zero_stage"] = stage
        for section, fields in (changes or {}).items():
            sections[section] |= fields
        return parse_config(sections)

    def sections(self, *, parts: int) -> dict[str, Any]:
        """The settings as sections of ours, for a step of so many micro-batches over all ranks."""
        of_generation = {"dinov2": our_sections, "dinov3": our_sections_of_dinov3}
        return of_generation[self.generation](self.facts, parts=parts)

    def crops(self, step: int) -> tuple[Tensor, Tensor]:
        """Global and local crops of the whole batch, (2, B, 3, S, S) and (n, B, 3, s, s)."""
        crops = self.facts["config"]["crops"]
        sizes = {"global": crops["global_crops_size"], "local": crops["local_crops_size"]}
        return cast(
            tuple[Tensor, Tensor],
            tuple(
                _pictures(self.generation, f"batch{self.steps[step]['batch']}.{kind}", size)
                for kind, size in sizes.items()
            ),
        )

    def gram_crops(self, step: int) -> Tensor | None:
        """What the Gram network sees of the whole batch, (2, B, 3, G, G); None without one."""
        if not self.gram:
            return None
        size = self.facts["config"]["crops"]["gram_teacher_crops_size"]
        return _pictures(self.generation, f"batch{self.steps[step]['batch']}.global", size)

    def masks(self, step: int) -> Tensor:
        """Masked patches of the whole batch, (2, B, P) bool."""
        return self._masks[f"step{step}.masks"]

    def record(self) -> Record:
        """What was recorded, with the reference's names."""
        steps = range(len(self.steps))
        record: Record = {
            kind: [
                {name: norms[step] for name, norms in self.trace[kind].items()} for step in steps
            ]
            for kind in ("grad", "student", "teacher")
        }
        kinds = () if self.facts["config"]["train"]["centering"] == "sinkhorn_knopp" else CENTERS
        record["losses"] = self.losses()
        for step, losses in zip(self.steps, record["losses"], strict=True):
            if step["losses"].get("gram_loss_weight") == 0:
                losses["gram_loss"] = 0.0  # the authors compute it; we do not, it moves nothing
        record["parts"] = [step["grad_norms"] for step in self.steps]
        record["centers"] = [{k: step[f"{k}_center_norm"] for k in kinds} for step in self.steps]
        record["last"] = {}
        if self.has_states:
            state = below(f"step{steps[-1]}.", tensors_of(f"{self.name}_states"))
            networks = {k: trained(below(f"{k}.", state)) for k in ("student", "teacher")}
            record["last"] = {which: tensors for which, tensors in networks.items() if tensors}
            record["last"]["centers"] = {kind: state[f"{kind}_center"] for kind in kinds}
        return record

    def losses(self) -> list[dict[str, float]]:
        """Those of every step, by the reference's names."""
        not_losses = ("dino_local_loss_weight", "gram_loss_weight", "total_loss")
        return [
            {name: loss for name, loss in step["losses"].items() if name not in not_losses}
            for step in self.steps
        ]

    @property
    def has_states(self) -> bool:
        """Whether the weights at the end are here; they are large."""
        return (DATA / f"{self.name}_states.safetensors").exists()

    def values(self, step: int) -> StepValues:
        """The scheduled numbers that were in force."""
        recorded, per_epoch = self.steps[step], self.facts["config"]["train"]
        return StepValues(
            step=step,
            epoch=step // per_epoch["OFFICIAL_EPOCH_LENGTH"],
            lr=recorded["lr"],
            weight_decay=recorded["weight_decay"],
            momentum=recorded["teacher_momentum"],
            teacher_temp=recorded["teacher_temp"],
            prototypes_frozen=recorded["last_layer_lr"] != recorded["lr"],
            local_weight=recorded["losses"].get("dino_local_loss_weight", 1.0),
            gram_weight=recorded["losses"].get("gram_loss_weight", 1.0),
        )


@functools.cache
def recorded_run(case: str, ranks: int, generation: str = "dinov2") -> RecordedRun:
    """The run, read once."""
    return RecordedRun(case, ranks, generation)


def our_sections(facts: dict[str, Any], *, parts: int) -> dict[str, Any]:
    """The settings of NAME.json as the sections of our configuration.

    Args:
        facts: the file.
        parts: micro-batches of a step, over all ranks.
    """
    config = facts["config"]
    student, optim, teacher = config["student"], config["optim"], config["teacher"]
    crops, dino, ibot = config["crops"], config["dino"], config["ibot"]
    assert not student["block_chunks"]
    assert student["proj_bias"]
    assert student["ffn_bias"]
    side = crops["global_crops_size"]
    return {
        "model": {
            "backbone": "vit_tiny_patch16_224",
            "patch_size": student["patch_size"],
            "embed_dim": facts["embed_dim"],
            "depth": facts["depth"],
            "num_heads": facts["num_heads"],
            "layer_scale": student["layerscale"],
            "ffn": {"mlp": "mlp", "swiglufused": "swiglu"}[student["ffn_layer"]],
            "registers": student["num_register_tokens"],
            "position_resize": {(False, 0.1): "by_factor", (True, 0.0): "by_size"}[
                student["interpolate_antialias"], student["interpolate_offset"]
            ],
            "drop_path_rate": student["drop_path_rate"],
            "drop_path_uniform": student["drop_path_uniform"],
        },
        "head": _head(dino),
        "patch_head": _head(ibot) if ibot["separate_head"] else None,
        "crops": {
            "global_size": side,
            "global_scale": crops["global_crops_scale"],
            "local_size": crops["local_crops_size"],
            "local_scale": crops["local_crops_scale"],
            "num_local": crops["local_crops_number"],
        },
        "dino": {
            "loss_weight": dino["loss_weight"],
            "targets": config["train"]["centering"],
            "warmup_teacher_temp": teacher["warmup_teacher_temp"],
            "teacher_temp": teacher["teacher_temp"],
            "warmup_teacher_temp_epochs": teacher["warmup_teacher_temp_epochs"],
            "teacher_temp_changes": "per_step",
            "momentum": teacher["momentum_teacher"],
            "momentum_end": teacher["final_momentum_teacher"],
            "freeze_last_layer_epochs": optim["freeze_last_layer_epochs"],
            "freeze_last_layer_by": "zero_rate",
        },
        "ibot": {
            "loss_weight": ibot["loss_weight"],
            "mask_prob": ibot["mask_sample_probability"],
            "mask_ratio": ibot["mask_ratio_min_max"],
            "mask_rule": "dinov2",
            "mask_group": 1,  # masks are recorded, not drawn
        },
        "koleo": {"loss_weight": dino["koleo_loss_weight"]},
        "optim": {
            "betas": [optim["adamw_beta1"], optim["adamw_beta2"]],
            "lr": optim["base_lr"],
            "lr_scaling": {"sqrt_wrt_1024": "sqrt"}[optim["scaling_rule"]],
            "layer_decay": optim["layerwise_decay"],
            "patch_embed_lr": optim["patch_embed_lr_mult"],
            "min_lr": optim["min_lr"],
            "warmup_epochs": optim["warmup_epochs"],
            "weight_decay": optim["weight_decay"],
            "weight_decay_end": optim["weight_decay_end"],
            "clip_grad": optim["clip_grad"],
            "clip_mode": "per_network",
        },
        "train": {
            "epochs": optim["epochs"],
            "steps_per_epoch": config["train"]["OFFICIAL_EPOCH_LENGTH"],
            "batch_size": facts["batch_size"],
            "micro_batch_size": facts["batch_size"] // parts,
        },
        "eval": {"crop": side, "resize": side},
        "engine": {"precision": "fp32"},
    }


def our_sections_of_dinov3(facts: dict[str, Any], *, parts: int) -> dict[str, Any]:
    """The same of a run of DINOv3."""
    config = facts["config"]
    student, optim, dino = config["student"], config["optim"], config["dino"]
    as_dinov2 = {
        **config,
        "student": student
        | {
            "ffn_layer": {"mlp": "mlp", "swiglu64": "swiglufused"}[student["ffn_layer"]],
            "block_chunks": 0,
            "num_register_tokens": student["n_storage_tokens"],
            "interpolate_antialias": False,
            "interpolate_offset": 0.1,
            "drop_path_uniform": True,
        },
        # After scaling with 4 sqrt(batch / 1024); with curves, before it and not read.
        "optim": optim | {"base_lr": optim["lr"] / (facts["batch_size"] / 64) ** 0.5},
    }
    sections = our_sections(facts | {"config": as_dinov2}, parts=parts)
    del sections["model"]["position_resize"]
    assert not student["untie_cls_and_patch_norms"]
    assert student["pos_embed_type"] == "rope"
    rope = {
        key: student[f"pos_embed_rope_{theirs}"]
        for key, theirs in (
            *((key, key) for key in ("base", "min_period", "max_period")),
            ("coordinates", "normalize_coords"),
            *((key, f"{key}_coords") for key in ("shift", "jitter", "rescale")),
        )
    }
    neutral = {"shift": 0.0, "jitter": 1.0, "rescale": 1.0}
    sections["model"] |= {
        "rope": {k: neutral[k] if v is None and k in neutral else v for k, v in rope.items()},
        "norm_eps": {"layernorm": 1e-6, "layernormbf16": 1e-5}[student["norm_layer"]],
        "local_norm": student["untie_global_and_local_cls_norm"],
        "mask_key_bias": student["mask_k_bias"],
        "ffn_ratio": student["ffn_ratio"],
        "qkv_bias": student["qkv_bias"],
    }
    if student["ffn_layer"] == "swiglu64":
        sections["model"]["ffn_multiple"] = 64
    for head in ("head", "patch_head"):
        sections[head] |= {"weight_norm": False, "norm_last_layer": False}
    sections["ibot"]["mask_rule"] = "dinov3"
    sections["koleo"]["scope"] = "all" if dino["koleo_loss_distributed"] else "rank"
    sections["optim"]["lr_scaling"] = {"sqrt_wrt_1024": "sqrt_64"}[optim["scaling_rule"]]
    curves = {key: dict(curve) for key, curve in config.get("schedules", {}).items()}
    if dino["reweight_dino_local_loss"]:
        curves["local_weight"] = dict(dino["local_loss_weight_schedule"])
    if config["gram"]["use_loss"]:
        sections["gram"] = _gram(
            config["gram"], crop_size=config["crops"]["gram_teacher_crops_size"]
        )
        curves["gram_weight"] = dict(config["gram"]["loss_weight_schedule"])
    if "lr" in curves:
        sections["dino"]["freeze_last_layer_epochs"] = curves["lr"].pop("freeze_last_layer_epochs")
    for curve in curves:
        for section, key in _REPLACED.get(curve, ()):
            del sections[section][key]
    sections["schedules"] = curves
    return sections


def _gram(gram: dict[str, Any], *, crop_size: int) -> dict[str, Any]:
    assert gram["normalized"]
    assert not gram["global_teacher_resize_antialias"]
    negatives = {(False, False): "kept", (True, False): "removed"}
    return {
        "loss_weight": gram["loss_weight"],
        "teacher": gram["ckpt"],
        "refresh_every_steps": gram["update_frequency"] if gram["rep_update"] else None,
        "first_refresh_step": gram["it_first_update"],
        "max_refreshes": gram["max_updates"],
        "crop_size": crop_size,
        "tokens": gram["tokens_used"],
        "compare": "within_crops" if gram["img_level"] else "across_crops",
        "negatives": negatives[gram["remove_neg"], gram["remove_only_teacher_neg"]],
    }


_REPLACED = {  # by a curve: settings that it leaves at their defaults
    "lr": (("optim", "lr"), ("optim", "min_lr"), ("optim", "warmup_epochs")),
    "weight_decay": (("optim", "weight_decay"), ("optim", "weight_decay_end")),
    "momentum": (("dino", "momentum"), ("dino", "momentum_end")),
    "teacher_temp": (
        *(("dino", key) for key in ("warmup_teacher_temp", "teacher_temp")),
        *(("dino", key) for key in ("warmup_teacher_temp_epochs", "teacher_temp_changes")),
    ),
}


def _head(section: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_prototypes": section["head_n_prototypes"],
        "hidden_dim": section["head_hidden_dim"],
        "bottleneck_dim": section["head_bottleneck_dim"],
        "num_layers": section["head_nlayers"],
        "norm_last_layer": False,
    }


@functools.cache
def _pictures(generation: str, name: str, size: int) -> Tensor:
    """Latents (views, B, 3, 6, 6) to pictures (views, B, 3, size, size), float32."""
    latents = tensors_of(f"{generation}_latents")[name]
    return torch.stack(
        [
            F.interpolate(view, size=(size, size), mode="bicubic", align_corners=False)
            for view in latents
        ]
    )


@functools.cache
def tensors_of(stem: str) -> dict[str, Tensor]:
    """The tensors of a file."""
    return load_file(DATA / f"{stem}.safetensors")


@functools.cache
def facts_of(stem: str) -> Any:
    """The content of a JSON file."""
    return json.loads((DATA / f"{stem}.json").read_text())


def trained(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without buffers."""
    return {name: value for name, value in state.items() if not name.endswith(FIXED)}


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
