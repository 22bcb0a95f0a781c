"""The presets against the published tables, typed here a second time."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from dinoscale import cli
from dinoscale.config import RunConfig, list_presets, load_config, phases_of, resolve
from dinoscale.config.sections.backbones import RopeConfig
from dinoscale.config.sections.monitoring import EvalConfig

CONFIGS = Path(__file__).parents[3] / "configs"
LARGE, SMALL = ((0.25, 1.0), (0.05, 0.25)), ((0.4, 1.0), (0.05, 0.4))

# Released models: epochs, micro, GPUs, batch, lr, peak, min_lr, clip, frozen epochs, unit
# prototypes, first teacher temperature, its warm-up epochs, (global, local) scales
RELEASED = {
    "vit_s16": (800, 64, 16, 1024, 5e-4, 2.0e-3, 1e-5, 0.0, 1, False, 0.04, 30, LARGE),
    "vit_s8": (800, 16, 64, 1024, 5e-4, 2.0e-3, 1e-6, 3.0, 1, False, 0.04, 30, SMALL),
    "vit_b16": (400, 32, 32, 1024, 7.5e-4, 3.0e-3, 2e-6, 0.3, 3, True, 0.04, 50, LARGE),
    "vit_b8": (300, 6, 176, 1056, 5e-4, 2.0625e-3, 2e-6, 3.0, 3, True, 0.03, 50, LARGE),
}
BACKBONES = {
    "vit_s16": "vit_small_patch16_224",
    "vit_s8": "vit_small_patch8_224",
    "vit_b16": "vit_base_patch16_224",
    "vit_b8": "vit_base_patch8_224",
    "vit_l16": "vit_large_patch16_224",
    "vit_t16": "vit_tiny_patch16_224",
    "vit_s16_vanilla100": "vit_small_patch16_224",
    "vit_s16_boosted300": "vit_small_patch16_224",
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_preset_equals_the_published_table(name: str) -> None:
    epochs, micro, gpus, batch, lr, peak, min_lr, clip, frozen, unit, temp, warm, scales = RELEASED[
        name
    ]
    config = load_config(name)
    train, optim, dino = config.train, config.optim, config.dino
    assert (train.epochs, train.micro_batch_size, train.batch_size) == (epochs, micro, batch)
    assert (optim.name, optim.lr, optim.min_lr, optim.clip_grad) == ("adamw", lr, min_lr, clip)
    assert (optim.warmup_epochs, optim.weight_decay, optim.weight_decay_end) == (10, 0.04, 0.4)
    assert dino.freeze_last_layer_epochs == frozen
    assert (dino.warmup_teacher_temp, dino.teacher_temp) == (temp, 0.07)
    assert dino.warmup_teacher_temp_epochs == warm
    assert config.head.norm_last_layer is unit
    assert config.head.num_prototypes == 65536
    assert config.crops.num_local == 10
    assert (config.crops.global_scale, config.crops.local_scale) == scales
    assert config.model.drop_path_rate == 0.1
    plan = resolve(config, world_size=gpus, num_images=1_281_167)
    assert plan.peak_lr == pytest.approx(peak, rel=1e-12)
    assert plan.accumulation_steps == 1


@pytest.mark.parametrize("name", BACKBONES)
def test_constants_of_every_dino_preset(name: str) -> None:
    config = load_config(name)
    dino, head, augment = config.dino, config.head, config.augment
    assert (dino.student_temp, dino.center_momentum) == (0.1, 0.9)
    assert (dino.momentum, dino.momentum_end) == (0.996, 1.0)
    assert (head.hidden_dim, head.bottleneck_dim, head.num_layers) == (2048, 256, 3)
    assert head.batch_norm is False
    assert (config.crops.global_size, config.crops.local_size) == (224, 96)
    assert config.optim.clip_mode == "per_tensor"
    assert augment == RunConfig().augment
    assert config.seed == 0
    assert config.engine.precision == "bf16"
    assert config.model.backbone == BACKBONES[name]
    assert config.run_dir == f"runs/{name}"  # no two presets share a folder
    assert config.data.train is None


def test_augmentation_defaults_are_the_published_pipeline() -> None:
    augment = RunConfig().augment
    assert (augment.flip_prob, augment.jitter_prob, augment.gray_prob) == (0.5, 0.8, 0.2)
    assert (augment.brightness, augment.contrast) == (0.4, 0.4)
    assert (augment.saturation, augment.hue) == (0.2, 0.1)
    assert augment.blur_probs == (1.0, 0.1, 0.5)
    assert augment.blur_radius == (0.1, 2.0)
    assert augment.solarize_probs == (0.0, 0.2, 0.0)
    assert augment.solarize_threshold == 128


def test_vanilla_preset_is_the_defaults() -> None:
    vanilla = load_config("vit_s16_vanilla100")
    assert vanilla == RunConfig(
        run_dir="runs/vit_s16_vanilla100",
        eval=EvalConfig(rank_images=512),  # no part of the recipe
    )
    assert (vanilla.train.epochs, vanilla.train.batch_size) == (100, 512)
    assert (vanilla.crops.num_local, vanilla.dino.teacher_temp) == (8, 0.04)
    assert vanilla.dino.warmup_teacher_temp_epochs == 0


def test_boosted_preset_changes_what_the_table_says() -> None:
    changed = load_config(
        "vit_s16_vanilla100",
        [
            "train.epochs=300",
            "train.batch_size=1024",
            "dino.teacher_temp=0.07",
            "dino.warmup_teacher_temp_epochs=30",
            "head.norm_last_layer=false",
            "run_dir=runs/vit_s16_boosted300",
        ],
    )
    assert load_config("vit_s16_boosted300") == changed


# Derived preset: the one that it is derived from, and all that differs.
DERIVED: dict[str, tuple[str, dict[str, object]]] = {
    "vit_t16": ("vit_s16", {"model.backbone": "vit_tiny_patch16_224"}),
    "vit_l16": (
        "vit_b16",
        {
            "model.backbone": "vit_large_patch16_224",
            "model.drop_path_rate": 0.2,
            "optim.lr": 5e-4,
            "train.epochs": 250,
            "train.micro_batch_size": 16,
        },
    ),
    "dinov2_vits16": (
        "dinov2_vitl16",
        {
            "model.backbone": "vit_small_patch16_224",
            "model.drop_path_rate": 0.1,
            "train.batch_size": 1024,
            "train.micro_batch_size": 128,
        },
    ),
    "dinov2_vitb16": (
        "dinov2_vitl16",
        {
            "model.backbone": "vit_base_patch16_224",
            "model.drop_path_rate": 0.2,
            "train.batch_size": 1024,
        },
    ),
    "dinov3_vits16": (
        "dinov3_vitb16",
        {"model.backbone": "vit_small_patch16_dinov3_qkvb", "model.drop_path_rate": 0.1},
    ),
    "dinov3_vitl16": (
        "dinov3_vitb16",
        {"model.backbone": "vit_large_patch16_dinov3_qkvb", "model.drop_path_rate": 0.3},
    ),
}


def _changes(before: RunConfig, after: RunConfig) -> dict[str, object]:
    """Settings by dotted key whose values differ, with those of `after`; without the folder."""
    old, new = (_flat(config.model_dump()) for config in (before, after))
    assert old.keys() == new.keys()
    return {key: new[key] for key in new if new[key] != old[key] and key != "run_dir"}


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        found |= {f"{prefix}{key}": value} if inner is None else inner
    return found


@pytest.mark.parametrize("name", DERIVED)
def test_derived_presets_change_what_they_say_and_nothing_else(name: str) -> None:
    parent, changes = DERIVED[name]
    ours = load_config(name)
    assert _changes(load_config(parent), ours) == changes
    assert ours.run_dir == f"runs/{name}"


def test_the_resolution_phase_of_dinov2_changes_what_it_says() -> None:
    pretrain, large = phases_of(load_config("dinov2_vitl14_518"))
    assert _changes(load_config("dinov2_vitl14"), pretrain) == {}
    assert _changes(pretrain, large) == {
        "seed": 1,
        "crops.global_size": 518,
        "dino.warmup_teacher_temp_epochs": 1,
        "dino.freeze_last_layer_epochs": 0,
        "optim.lr": 2e-4 / 5,
        "optim.warmup_epochs": 1,
        "train.continue_from": pretrain.run_dir,
        "train.epochs": 8,  # 10,000 steps
        "train.micro_batch_size": 8,
    }


def test_the_phases_of_the_7b_are_the_published_ones() -> None:
    pretrain, gram, large = phases_of(load_config("dinov3_vit7b16"))
    for config, images, steps in (
        (pretrain, 4096, 10**6),
        (gram, 4096, 200_000),
        (large, 2048, 10**4),
    ):
        plan = resolve(config, world_size=256, num_images=1_689_000_000)
        assert (plan.batch_size, plan.total_steps, plan.accumulation_steps) == (images, steps, 1)
        layers, optim = config.model.layers, config.optim
        assert layers is not None
        assert (layers.embed_dim, layers.depth, layers.num_heads) == (4096, 40, 32)
        assert (layers.registers, layers.ffn, layers.qkv_bias) == (4, "swiglu", False)
        assert (config.model.drop_path_rate, config.model.norm_eps) == (0.4, 1e-5)
        assert (optim.betas, optim.layer_decay, optim.clip_grad) == ((0.9, 0.99), 0.98, 30.0)
        heads = (config.head, config.patch_head)
        assert [(h.num_prototypes, h.hidden_dim, h.bottleneck_dim) for h in heads if h] == [
            (262144, 8192, 512),
            (98304, 4096, 384),
        ]
    assert [run.sizes_text for run in gram.of_sizes] == ["global 256, local 112, Gram 512 px"]
    assert [(w, r.sizes_text) for w, r in zip(large.size_weights, large.of_sizes, strict=True)] == [
        (0.3, "global 512, local 112, Gram 768 px"),
        (0.3, "global 768, local 112, Gram 1152 px"),
        (0.3, "global 768, local 168, Gram 1152 px"),
        (0.05, "global 768, local 224, Gram 1152 px"),
        (0.05, "global 768, local 336, Gram 1152 px"),
    ]
    refreshed = (gram.gram.first_refresh_step, gram.gram.refresh_every_steps)
    assert (refreshed, gram.gram.max_refreshes) == ((10_000, 10_000), 3)
    assert large.gram.refresh_every_steps is None


def test_vit_b_of_dinov3_takes_from_other_presets_what_it_says() -> None:
    """All that differs from the 7B, phase by phase."""
    seven, ours = phases_of(load_config("dinov3_vit7b16")), phases_of(load_config("dinov3_vitb16"))
    recipe, of_heads = load_config("dinov3_vitl16_in1k"), ("num_prototypes", "hidden_dim")
    everywhere: dict[str, object] = {
        "model.backbone": "vit_base_patch16_dinov3_qkvb",
        "model.drop_path_rate": load_config("dinov2_vitb16").model.drop_path_rate,
        **{
            f"{head}.{key}": getattr(recipe.head, key)
            for head in ("head", "patch_head")
            for key in (*of_heads, "bottleneck_dim")
        },
        "augment.flip_prob": recipe.augment.flip_prob,
        **{
            f"optim.{key}": getattr(recipe.optim, key)
            for key in ("betas", "layer_decay", "clip_grad")
        },
        "train.steps_per_epoch": recipe.train.steps_per_epoch,
        "eval.rank_images": recipe.eval.rank_images,
    }
    of_phases: list[dict[str, object]] = [
        {
            "dino.freeze_last_layer_epochs": recipe.dino.freeze_last_layer_epochs,
            **{f"schedules.lr.{key}": 5e-4 for key in ("peak", "end")},
            "schedules.lr.warmup_epochs": recipe.optim.warmup_epochs,
            "schedules.teacher_temp.warmup_epochs": recipe.dino.warmup_teacher_temp_epochs,
            "train.epochs": recipe.train.epochs,
            "train.batch_size": 1024,
            "train.micro_batch_size": 32,
        },
        {
            "schedules.lr.start": 5e-4,
            "schedules.lr.peak": 5e-4,
            "schedules.lr.end": 1e-6,
            "gram.teacher": f"{ours[0].run_dir}",
            "gram.first_refresh_step": 0,
            "gram.refresh_every_steps": 1250,
            "train.epochs": 25,
            "train.batch_size": 1024,
            "train.micro_batch_size": 32,
            "train.continue_from": ours[0].run_dir,
        },
        {
            "crops.mixture": (),
            "crops.local_size": 112,
            "crops.global_size": 512,
            "gram.crop_size": 768,
            "gram.teacher": ours[1].run_dir,
            "schedules.lr.end": 5e-5,
            "schedules.lr.cosine_epochs": 4,
            "train.epochs": 4,
            "train.batch_size": 512,
            "train.micro_batch_size": 16,
            "train.init_from": ours[1].run_dir,
        },
    ]
    for before, after, changes in zip(seven, ours, of_phases, strict=True):
        found = _changes(before, after)
        of_size = ("engine.", "checkpoint.keep_")  # of the machines, not of the recipe
        assert {k: v for k, v in found.items() if not k.startswith(of_size)} == everywhere | changes
    assert seven[2].of_sizes[0].crops == ours[2].crops
    same_images = recipe.model_copy(update={"train": ours[0].train})
    assert ours[0].peak_lr == pytest.approx(same_images.peak_lr / 2)
    assert ours[0].peak_lr == pytest.approx(2e-3)


def test_the_imagenet_recipe_of_dinov3_changes_what_it_says() -> None:
    config = load_config("dinov3_vitl16_in1k")
    values, changed = load_config("dinov2_vitl16").model_dump(), config.model_dump()
    values["run_dir"] = "runs/dinov3_vitl16_in1k"
    values["model"]["rope"] = RopeConfig(base=100.0).model_dump()
    values["head"] |= {"weight_norm": False, "norm_last_layer": False}
    values["patch_head"] = values["head"]  # of the same sizes
    values["dino"]["targets"] = "sinkhorn_knopp"
    values["ibot"]["mask_rule"] = "dinov3"
    assert changed == values
    plan = resolve(config, world_size=32, num_images=1_281_167)
    assert (plan.total_steps, plan.peak_lr) == (125_000, pytest.approx(1e-3 * 4 * 2**0.5))


@pytest.mark.parametrize("name", BACKBONES)
def test_preset_file_starts_with_its_source(name: str) -> None:
    text = (CONFIGS / "pretrain" / f"{name}.yaml").read_text()
    comment = text[: text.index("defaults:")]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert "Source:" in comment or "DERIVED, never published" in comment
    assert "k-NN" in comment
    assert "Differs: bf16" in comment


PARTS = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if path.parent.name != "sweep"]


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_part_loads_alone(path: Path) -> None:
    assert load_config(str(path)).head.num_prototypes > 0


def test_each_preset_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["presets"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_presets()
    for line in lines:
        assert re.fullmatch(r"\w+ +.{25,}\.", line), line
    small = next(line for line in lines if line.startswith("vit_s16 "))
    assert small.endswith(
        "Released DINO ViT-S/16. Published on ImageNet-1k: k-NN 74.5 %, linear 77.0 %."
    )
