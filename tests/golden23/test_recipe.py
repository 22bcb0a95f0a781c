"""Optimizer groups, learning rates and schedules of DINOv2 and DINOv3 against the references'."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinoscale.config import RunConfig, RunPlan, load_config, parse_config, resolve
from dinoscale.engine.build import schedules_of, shapes_only
from dinoscale.engine.param_groups import NO_DECAY, PROTOTYPES, param_groups, rate_factors
from dinoscale.engine.schedules import Curve, StepValues, cosine

Json = Callable[[str], dict[str, Any]]
Tensors = Callable[[str], dict[str, Tensor]]

BACKBONES: dict[str, dict[str, Any]] = {  # case of the record -> what makes ours like it
    "dinov2 backbone, block_chunks 0": {},
    "dinov2 backbone, block_chunks 4": {"ffn": "swiglu", "registers": 4},
}
DINOV2 = [  # of the record -> ours
    (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"),  # a chunk's number, then the block's
    (r"^(register|storage)_tokens$", "reg_token"),
    (r"\.w12\.", ".fc1."),
    (r"\.w3\.", ".fc2."),
]


def _our_name(name: str) -> str:
    for theirs, ours in DINOV2:
        name = re.sub(theirs, ours, name)
    return name


def _network(depth: int, model: dict[str, Any]) -> nn.Module:
    """Ours with two heads, on the meta device."""
    sizes = {"embed_dim": 48, "depth": depth, "num_heads": 3, "layer_scale": 1e-5}
    head = {"num_prototypes": 9, "hidden_dim": 8, "bottleneck_dim": 4, "norm_last_layer": False}
    return shapes_only(
        parse_config(
            {
                "model": sizes | model,
                "head": head,
                "patch_head": head,
                "ibot": {"loss_weight": 1.0},  # so that there is a mask token
            }
        )
    )


def _recorded(golden23_json: Json, case: str) -> dict[str, dict[str, Any]]:
    """Our name -> what the reference has for the tensor, of a backbone and two heads."""
    groups = golden23_json("param_groups")
    params = {f"backbone.{_our_name(k)}": v for k, v in groups[case]["params"].items()}
    for head in ("head", "patch_head"):
        params |= {f"{head}.{k}": v for k, v in groups["dinov2 head"]["params"].items()}
    return params


@pytest.mark.parametrize("case", [*BACKBONES, "dinov3 backbone"])
def test_learning_rate_of_every_tensor(golden23_json: Json, case: str) -> None:
    of_case, params = golden23_json("param_groups")[case], _recorded(golden23_json, case)
    factors = rate_factors(
        params,
        layer_decay=of_case["layerwise_decay"],
        patch_embed_lr=of_case["patch_embed_lr_mult"],
    )
    assert len({*factors.values()}) == of_case["depth"] + 3  # blocks, patches, tokens, the rest
    assert factors == pytest.approx({k: v["lr_multiplier"] for k, v in params.items()}, rel=1e-14)


@pytest.mark.parametrize("case", BACKBONES)
def test_weight_decay_of_every_tensor(golden23_json: Json, case: str) -> None:
    network = _network(golden23_json("param_groups")[case]["depth"], BACKBONES[case])
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    ours = {
        names[id(parameter)]: group["name"]
        for group in param_groups(network)
        for parameter in group["params"]
    }
    params = _recorded(golden23_json, case)
    assert ours.keys() == params.keys()
    for name, group in ours.items():
        assert params[name]["wd_multiplier"] == (0.0 if group == NO_DECAY else 1.0), name
        assert params[name]["is_last_layer"] == (group == PROTOTYPES), name


class _Named(nn.Module):
    """Parameters by any names, on the meta device."""

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        super().__init__()
        self._named = {
            name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes.items()
        }

    def named_parameters(self, *_args: Any, **_kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._named.items())


def test_groups_and_rates_of_a_run_of_dinov3(
    golden23_json: Json, golden23_tensors: Tensors
) -> None:
    """Every tensor of its network and heads, names as the reference's except those of heads."""
    run, tensors = golden23_json("dinov3_B_ranks2"), golden23_tensors("dinov3_B_initial")
    recorded = {_our_name_of_run(k): v for k, v in run["param_multipliers"].items()}
    shapes = {
        _our_name_of_run(k.removeprefix("student.")): v.shape
        for k, v in tensors.items()
        if _our_name_of_run(k.removeprefix("student.")) in recorded
    }
    assert shapes.keys() == recorded.keys()
    network = _Named(shapes)
    groups = {
        id(parameter): group["name"]
        for group in param_groups(network)
        for parameter in group["params"]
    }
    factors = rate_factors(
        shapes,
        layer_decay=run["config"]["optim"]["layerwise_decay"],
        patch_embed_lr=run["config"]["optim"]["patch_embed_lr_mult"],
    )
    for name, parameter in network.named_parameters():
        group, wanted = groups[id(parameter)], recorded[name]
        assert wanted["wd_multiplier"] == (0.0 if group == NO_DECAY else 1.0), name
        assert wanted["is_last_layer"] == (group == PROTOTYPES), name
        assert factors[name] == pytest.approx(wanted["lr_multiplier"], rel=1e-14), name
    decayed = {name for name in recorded if recorded[name]["wd_multiplier"]}
    assert {f"backbone.{t}_token" for t in ("cls", "mask", "reg")} <= decayed
    assert "backbone.local_cls_norm.weight" in recorded.keys() - decayed


def _our_name_of_run(name: str) -> str:
    name = name.replace("dino_head", "head").replace("ibot_head", "patch_head")
    return name.replace("storage_tokens", "reg_token")


def test_cosine_schedules(golden23_json: Json, golden23_tensors: Tensors) -> None:
    tensors, checked = golden23_tensors("schedules"), 0
    for index, case in enumerate(golden23_json("schedules")["cases"]):
        if case["kind"] != "cosine":
            continue
        checked += 1
        ours = [
            cosine(
                step,
                base=case["base_value"],
                final=case["final_value"],
                total_steps=case["total_iters"],
                warmup_steps=case.get("warmup_iters", 0),
                start=case.get("start_warmup_value", 0.0),
                extra=case.get("trunc_extra", 0.0),
            )
            for step in range(case["total_iters"])
        ]
        recorded = tensors[f"cosine{index}"][: len(ours)].tolist()
        assert ours == pytest.approx(recorded, rel=1e-12, abs=1e-15)
    assert checked == 4


def test_curves(golden23_json: Json, golden23_tensors: Tensors) -> None:
    tensors = golden23_tensors("schedules")
    cases = [c for c in golden23_json("schedules")["cases"] if c["kind"] != "cosine"]
    assert len(cases) == 4
    for index, case in enumerate(cases):
        warmup, total = case["warmup_iterations"], case["total_iterations"]
        curve = Curve(
            start=case["start"],
            peak=case["peak"],
            end=case["end"],
            warmup_steps=warmup,
            cosine_steps=case.get("cosine_iterations", total - warmup),
        )
        recorded = tensors[f"warmup_cosine_constant{index}"].tolist()
        ours = [curve.at(step) for step in range(total)]
        assert ours == pytest.approx(recorded, rel=1e-12, abs=1e-15)


def _case(golden23_json: Json, name: str) -> dict[str, Any]:
    (case,) = (c for c in golden23_json("recipe_schedules")["cases"] if c["name"] == name)
    return case


def _planned(case: dict[str, Any], sections: dict[str, Any]) -> tuple[RunConfig, RunPlan]:
    optim, batch_size = case["optim"], case["ranks"] * case["batch_size_per_gpu"]
    length = {"epochs": optim["epochs"], "steps_per_epoch": case["epoch_length"]}
    config = parse_config({"train": {**length, "batch_size": batch_size}, **sections})
    plan = resolve(config, world_size=case["ranks"], num_images=14_197_122)
    assert plan.total_steps == case["iterations"]
    return config, plan


def _require(
    ours: list[StepValues], case: dict[str, Any], tensors: dict[str, Tensor], weights: list[str]
) -> None:
    """All recorded values, one of ours per recorded step."""
    fields = {
        "lr": "lr",
        "weight_decay": "weight_decay",
        "teacher_momentum": "momentum",
        "teacher_temp": "teacher_temp",
        **{f"{kind}_loss_weight": f"{kind}_weight" for kind in weights},
    }
    for recorded, field in fields.items():
        values = [getattr(now, field) for now in ours]
        wanted = tensors[f"{case['name']}.{recorded}"].tolist()
        assert values == pytest.approx(wanted, rel=1e-12, abs=1e-15), recorded
    of_prototypes = [0.0 if now.prototypes_frozen else now.lr for now in ours]
    wanted = tensors[f"{case['name']}.last_layer_lr"].tolist()
    assert of_prototypes == pytest.approx(wanted, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", ["vitl16_short", "vitl14", "vitg14", "vitl_im1k_lin834"])
def test_released_recipes(golden23_json: Json, golden23_tensors: Tensors, name: str) -> None:
    case, tensors = _case(golden23_json, name), golden23_tensors("recipe_schedules")
    optim, teacher = case["optim"], case["teacher"]
    # DINOv3's recipe records the rate after scaling only, as 4 sqrt(batch / 1024).
    batch_size = case["ranks"] * case["batch_size_per_gpu"]
    scaling, lr = "sqrt_64", optim["lr"] / (4 * (batch_size / 1024) ** 0.5)
    if case["generation"] == 2:
        scaling, lr = "sqrt", optim["base_lr"]
    sections = {
        "optim": {
            "lr": lr,
            "lr_scaling": scaling,
            **{k: optim[k] for k in ("min_lr", "warmup_epochs", "weight_decay")},
            "weight_decay_end": optim["weight_decay_end"],
        },
        "dino": {
            "momentum": teacher["momentum_teacher"],
            "momentum_end": float(teacher["final_momentum_teacher"]),
            **{k: teacher[k] for k in ("warmup_teacher_temp", "teacher_temp")},
            "warmup_teacher_temp_epochs": teacher["warmup_teacher_temp_epochs"],
            "teacher_temp_changes": "per_step",
            "freeze_last_layer_epochs": optim["freeze_last_layer_epochs"],
            "freeze_last_layer_by": "zero_rate",
        },
    }
    config, plan = _planned(case, sections)
    assert plan.peak_lr == pytest.approx(optim["lr"], rel=1e-14)
    schedules = schedules_of(config, plan)
    ours = [schedules.at(step) for step in tensors[f"{name}.iterations"].tolist()]
    _require(ours, case, tensors, [])
    assert {now.prototypes_frozen for now in ours} == {True, False}


DINOV3 = ["vit7b16_pretrain", "vit7b16_gram_anchor", "vit7b16_high_res_adapt"]
DINOV3 += ["vitl16_lvd1689m_distilled"]


@pytest.mark.parametrize("short", DINOV3)
def test_released_recipes_with_curves(
    golden23_json: Json, golden23_tensors: Tensors, short: str
) -> None:
    name = f"dinov3_{short}"
    case, tensors = _case(golden23_json, name), golden23_tensors("recipe_schedules")
    given = {key: dict(curve) for key, curve in case["schedules"].items()}
    freeze = given["lr"].pop("freeze_last_layer_epochs")
    weights = {
        kind: case[f"{kind}_loss_weight_schedule"]
        for kind in ("local", "gram")
        if case[f"{kind}_loss_weight_schedule"]
    }
    curves = {key: _floats(curve) for key, curve in given.items()}
    curves |= {f"{kind}_weight": _floats(curve) for kind, curve in weights.items()}
    sections = {
        "optim": {"lr_scaling": "sqrt_64"},
        "dino": {"freeze_last_layer_epochs": freeze},
        "schedules": curves,
        "gram": {"loss_weight": float("gram" in weights), "teacher": "weights.pth"},
    }
    config, plan = _planned(case, sections)
    schedules = schedules_of(config, plan)
    ours = [schedules.at(step) for step in tensors[f"{name}.iterations"].tolist()]
    _require(ours, case, tensors, list(weights))
    assert max(now.lr for now in ours) == pytest.approx(plan.peak_lr, rel=1e-14)
    assert ours[-1].lr == pytest.approx(plan.min_lr, rel=1e-14)


def _floats(curve: dict[str, Any]) -> dict[str, Any]:
    return {k: float(v) if k in ("start", "peak", "end") else v for k, v in curve.items()}


# Name of the record -> our preset, its phase, and the phase after whose end its steps count.
PRESETS: dict[str, tuple[str, str | None, str | None]] = {
    "vitl16_short": ("dinov2_vitl16", None, None),
    "vitl14": ("dinov2_vitl14", None, None),
    "vitg14": ("dinov2_vitg14", None, None),
    "vitl_im1k_lin834": ("dinov3_vitl16_in1k", None, None),
    "dinov3_vit7b16_pretrain": ("dinov3_vit7b16", "pretrain", None),
    "dinov3_vit7b16_gram_anchor": ("dinov3_vit7b16", "gram", "pretrain"),
    "dinov3_vit7b16_high_res_adapt": ("dinov3_vit7b16", "high_resolution", None),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_schedules_of_the_released_recipes(
    golden23_json: Json, golden23_tensors: Tensors, name: str
) -> None:
    """Every recorded number, as far as our phase goes; its weights beside those of the losses."""
    case, tensors = _case(golden23_json, name), golden23_tensors("recipe_schedules")
    preset, phase, before = PRESETS[name]
    config, plan = _of_preset(preset, phase, case)
    first = 0 if before is None else _of_preset(preset, before, case)[1].total_steps
    steps = tensors[f"{name}.iterations"].tolist()
    rows = [row for row, step in enumerate(steps) if 0 <= step - first < plan.total_steps]
    assert len(rows) > 5
    assert {0, plan.total_steps - 1} <= {steps[row] - first for row in rows}
    if phase != "high_resolution":  # a third of the record, as in the paper
        assert plan.total_steps == case["iterations"] - first
    of_steps = {key: tensors[key][rows] for key in tensors if key.startswith(f"{name}.")}
    schedules = schedules_of(config, plan)
    ours = [
        replace(
            now,
            local_weight=now.local_weight * config.dino.loss_weight,
            gram_weight=now.gram_weight * config.gram.loss_weight,
        )
        for now in (schedules.at(steps[row] - first) for row in rows)
    ]
    weights = [kind for kind in ("local", "gram") if case[f"{kind}_loss_weight_schedule"]]
    _require(ours, case, of_steps, weights)
    for kind, without in (("local", 1.0), ("gram", 0.0)):
        if kind not in weights:
            assert {getattr(now, f"{kind}_weight") for now in ours} == {without}


def _of_preset(name: str, phase: str | None, case: dict[str, Any]) -> tuple[RunConfig, RunPlan]:
    """A preset, or a phase of it, on the recorded ranks with the recorded images a step."""
    batch_size = f"train.batch_size={case['ranks'] * case['batch_size_per_gpu']}"
    chosen = [batch_size] if phase is None else [f"phases.{phase}.{batch_size}", f"phase={phase}"]
    config = load_config(name, chosen)
    assert config.train.steps_per_epoch == case["epoch_length"]
    return config, resolve(config, world_size=case["ranks"], num_images=14_197_122)
