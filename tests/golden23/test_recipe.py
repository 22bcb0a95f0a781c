"""Optimizer groups, learning rates and schedules of DINOv2 against the reference's own."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from dinoscale.config import parse_config, resolve
from dinoscale.engine.build import schedules_of, shapes_only
from dinoscale.engine.param_groups import NO_DECAY, PROTOTYPES, param_groups, rate_factors
from dinoscale.engine.schedules import cosine

Json = Callable[[str], dict[str, Any]]
Tensors = Callable[[str], dict[str, Tensor]]

BACKBONES: dict[str, dict[str, Any]] = {  # case of the record -> what makes ours like it
    "dinov2 backbone, block_chunks 0": {},
    "dinov2 backbone, block_chunks 4": {"ffn": "swiglu", "registers": 4},
}
DINOV2 = [  # of the record -> ours
    (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"),  # a chunk's number, then the block's
    (r"^register_tokens$", "reg_token"),
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


@pytest.mark.parametrize("case", BACKBONES)
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


def test_cosine_schedules(golden23_json: Json, golden23_tensors: Tensors) -> None:
    tensors, checked = golden23_tensors("schedules"), 0
    for index, case in enumerate(golden23_json("schedules")["cases"]):
        if case["kind"] != "cosine" or "trunc_extra" in case:
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
            )
            for step in range(case["total_iters"])
        ]
        recorded = tensors[f"cosine{index}"][: len(ours)].tolist()
        assert ours == pytest.approx(recorded, rel=1e-12, abs=1e-15)
    assert checked == 3


@pytest.mark.parametrize("name", ["vitl16_short", "vitl14", "vitg14", "vitl_im1k_lin834"])
def test_released_recipes(golden23_json: Json, golden23_tensors: Tensors, name: str) -> None:
    (case,) = (c for c in golden23_json("recipe_schedules")["cases"] if c["name"] == name)
    optim, teacher = case["optim"], case["teacher"]
    batch_size = case["ranks"] * case["batch_size_per_gpu"]
    # The third recipe records the rate after scaling only.
    lr = optim.get("base_lr", optim["lr"] / (batch_size / 1024) ** 0.5)
    config = parse_config(
        {
            "optim": {
                "lr": lr,
                "lr_scaling": "sqrt",
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
            "train": {
                "epochs": optim["epochs"],
                "steps_per_epoch": case["epoch_length"],
                "batch_size": batch_size,
                "micro_batch_size": case["batch_size_per_gpu"],
            },
        }
    )
    plan = resolve(config, world_size=case["ranks"], num_images=14_197_122)
    assert plan.total_steps == case["iterations"]
    assert plan.peak_lr == pytest.approx(optim["lr"], rel=1e-14)
    schedules, tensors = schedules_of(config, plan), golden23_tensors("recipe_schedules")
    ours = [schedules.at(step) for step in tensors[f"{name}.iterations"].tolist()]
    for field, recorded in (
        ("lr", "lr"),
        ("weight_decay", "weight_decay"),
        ("momentum", "teacher_momentum"),
        ("teacher_temp", "teacher_temp"),
    ):
        values = [getattr(now, field) for now in ours]
        assert values == pytest.approx(tensors[f"{name}.{recorded}"].tolist(), rel=1e-12, abs=1e-15)
    of_prototypes = [0.0 if now.prototypes_frozen else now.lr for now in ours]
    recorded_rates = tensors[f"{name}.last_layer_lr"].tolist()
    assert of_prototypes == pytest.approx(recorded_rates, rel=1e-12, abs=1e-15)
    assert {now.prototypes_frozen for now in ours} == {True, False}
