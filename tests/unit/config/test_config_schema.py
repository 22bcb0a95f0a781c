"""Each rule of the schema, with its message."""

import pytest
from pydantic import ValidationError

from dinoscale.config import RunConfig, parse_config
from dinoscale.config.mistakes import sections
from dinoscale.errors import ConfigError


def _config(**values: object) -> RunConfig:
    """Build from `section__key=value`."""
    nested: dict[str, object] = {}
    for path, value in values.items():
        section, _, key = path.partition("__")
        if not key:
            nested[section] = value
            continue
        part = nested.setdefault(section, {})
        assert isinstance(part, dict)
        part[key] = value
    return parse_config(nested)


def _messages(**values: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        _config(**values)
    return str(caught.value).splitlines()


def _bound(key: str, needs: str, *wrong: float) -> list[tuple[str, float, str]]:
    return [(key, value, f"{key}: needs a value {needs}, got {value}") for value in wrong]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *_bound("seed", "of at least 0", -1),
        *_bound("seed", "below 4294967296", 2**32),
        *_bound("model.patch_size", "of at least 1", 0),
        *_bound("model.embed_dim", "of at least 1", 0),
        *_bound("model.depth", "of at least 1", 0),
        *_bound("model.num_heads", "of at least 1", 0),
        *_bound("model.drop_path_rate", "of at least 0", -0.1),
        *_bound("model.drop_path_rate", "below 1", 1),
        *_bound("head.num_prototypes", "of at least 1", 0),
        *_bound("head.hidden_dim", "of at least 1", 0),
        *_bound("head.bottleneck_dim", "of at least 1", 0),
        *_bound("head.num_layers", "of at least 1", 0),
        *_bound("crops.global_size", "of at least 1", 0),
        *_bound("crops.local_size", "of at least 1", 0),
        *_bound("crops.num_local", "of at least 0", -1),
        *_bound("augment.flip_prob", "of at most 1", 1.5),
        *_bound("augment.jitter_prob", "of at least 0", -0.5),
        *_bound("augment.gray_prob", "of at most 1", 2),
        *_bound("augment.brightness", "of at least 0", -1),
        *_bound("augment.contrast", "of at least 0", -1),
        *_bound("augment.saturation", "of at least 0", -1),
        *_bound("augment.hue", "of at most 0.5", 0.6),
        *_bound("augment.solarize_threshold", "of at most 256", 257),
        *_bound("dino.student_temp", "above 0", 0, -1),
        *_bound("dino.teacher_temp", "above 0", 0),
        *_bound("dino.warmup_teacher_temp", "above 0", 0),
        *_bound("dino.center_momentum", "of at most 1", 1.1),
        *_bound("dino.momentum", "above 0", 0),
        *_bound("dino.momentum", "of at most 1", 1.01),
        *_bound("dino.momentum_end", "above 0", 0),
        *_bound("dino.momentum_end", "of at most 1", 1.01),
        *_bound("dino.warmup_teacher_temp_epochs", "of at least 0", -1),
        *_bound("dino.freeze_last_layer_epochs", "of at least 0", -1),
        *_bound("optim.lr", "above 0", 0, -1),
        *_bound("optim.min_lr", "of at least 0", -1),
        *_bound("optim.warmup_epochs", "of at least 0", -1),
        *_bound("optim.weight_decay", "of at least 0", -1),
        *_bound("optim.weight_decay_end", "of at least 0", -1),
        *_bound("optim.clip_grad", "of at least 0", -1),
        *_bound("train.epochs", "of at least 1", 0),
        *_bound("train.batch_size", "of at least 1", 0),
        *_bound("train.micro_batch_size", "of at least 1", 0),
        *_bound("train.stop_after_steps", "of at least 1", 0),
        *_bound("data.num_workers", "of at least 0", -1),
        *_bound("data.max_bad_fraction", "of at most 1", 1.1),
        *_bound("engine.zero_stage", "of at most 3", 4),
        *_bound("engine.checkpoint_every_k_blocks", "of at least 0", -1),
        *_bound("engine.reduce_bucket_size", "of at least 1", 0),
        *_bound("engine.stage3_max_live_parameters", "of at least 1", 0),
        *_bound("engine.zero_hpz_partition_size", "of at least 1", 0),
        *_bound("eval.every_epochs", "of at least 1", 0),
        *_bound("eval.k", "of at least 1", 0),
        *_bound("eval.batch_size", "of at least 1", 0),
        *_bound("log.every_steps", "of at least 1", 0),
        *_bound("checkpoint.every_epochs", "of at least 1", 0),
        *_bound("checkpoint.keep_last", "of at least 1", 0),
    ],
)
def test_number_out_of_range_names_its_bound(key: str, value: float, message: str) -> None:
    assert _messages(**{key.replace(".", "__"): value}) == [message]


@pytest.mark.parametrize("key", ["global_scale", "local_scale"])
@pytest.mark.parametrize("scale", [(0.0, 0.5), (0.5, 0.5), (0.6, 0.5), (0.5, 1.1), (-0.1, 0.5)])
def test_scales_are_ordered_fractions(key: str, scale: tuple[float, float]) -> None:
    low, high = scale
    message = f"crops.{key}: need 0 < low < high <= 1, got {low}, {high}"
    assert _messages(**{f"crops__{key}": [low, high]}) == [message]


def test_items_of_lists_are_checked() -> None:
    assert _messages(augment__blur_probs=[0.0, 1.5, 0.5]) == [
        "augment.blur_probs: item 2 of the list needs a value of at most 1, got 1.5"
    ]
    assert _messages(augment__solarize_probs=[-1, 0, 0]) == [
        "augment.solarize_probs: item 1 of the list needs a value of at least 0, got -1"
    ]
    assert _messages(data__std=[1, 1, 0]) == [
        "data.std: item 3 of the list needs a value above 0, got 0"
    ]
    assert _messages(augment__blur_radius=[2.0, 1.0]) == [
        "augment.blur_radius: need 0 <= low <= high, got 2.0, 1.0"
    ]


def test_mean_and_std_have_one_number_a_channel() -> None:
    wrong = "data.{}: needs one number for each of {} channels (data.channels), got {}; "
    remedy = "`dinoscale data dataset-stats` measures them"
    assert _messages(data__channels=1) == [wrong.format("mean", 1, 3) + remedy]
    assert _messages(data__channels=4, data__mean=[0.5] * 4, data__std=[0.5] * 2) == [
        wrong.format("std", 4, 2) + remedy
    ]
    assert _messages(data__mean=[0.5, 0.5, 0.5, 0.5, 2]) == [
        "data.mean: item 5 of the list needs a value of at most 1, got 2"
    ]
    assert _config(data__channels=1, data__mean=[0.5], data__std=[0.2]).data.mean == (0.5,)
    assert _messages(data__max_pixel_value=0) == [
        "data.max_pixel_value: needs a value above 0, got 0"
    ]


def test_colours_change_in_the_workers_for_one_or_three_channels_only() -> None:
    four = {"data__channels": 4, "data__mean": [0.5] * 4, "data__std": [0.5] * 4}
    assert _messages(data__color_ops_on="workers", **four) == [
        "data.color_ops_on: 'workers' needs data.channels 1 or 3, got 4; "
        "set data.color_ops_on=device"
    ]
    gray = {"data__channels": 1, "data__mean": [0.5], "data__std": [0.5]}
    assert _config(data__color_ops_on="workers", **gray).data.channels == 1


def test_crops_must_be_whole_patches() -> None:
    assert _messages(crops__global_size=220, crops__local_size=90, eval__crop=8) == [
        "crops.global_size: 220 px is not a multiple of the patch size 16 px; nearest: 208 or 224",
        "crops.local_size: 90 px is not a multiple of the patch size 16 px; nearest: 80 or 96",
        "eval.crop: 8 px is not a multiple of the patch size 16 px; nearest: 16",
    ]


def test_with_rotary_positions_local_crops_may_have_pixels_beyond_the_last_patch() -> None:
    assert _config(model__rope={}, crops__local_size=168).crops.local_size == 168
    assert _messages(model__rope={}, crops__global_size=264, crops__local_size=15) == [
        "crops.global_size: 264 px is not a multiple of the patch size 16 px; nearest: 256 or 272",
        "crops.local_size: 15 px is not a multiple of the patch size 16 px; nearest: 16",
    ]


def test_patch_size_comes_from_the_key_then_from_the_name() -> None:
    assert _config(model__backbone="vit_small_patch8_224").model.effective_patch_size == 8
    config = _config(model__patch_size=4, crops__local_size=36)
    assert config.model.effective_patch_size == 4
    assert (
        "multiple of the patch size 14 px"
        in _messages(model__backbone="vit_small_patch14_dinov2.lvd142m", crops__local_size=96)[0]
    )


def test_local_size_is_free_without_local_crops() -> None:
    assert _config(crops__local_size=90, crops__num_local=0).crops.num_local == 0


def test_backbone_without_a_patch_size_is_explained() -> None:
    (message,) = _messages(model__backbone="swin_tiny")
    assert message.startswith("model.backbone: no patch size in 'swin_tiny'; name a timm ViT")
    (message,) = _messages(model__backbone="resnet18")
    assert message.startswith("model.backbone: 'resnet18' can only be a frozen teacher whose feat")
    assert _config(model__backbone="vit_odd", model__patch_size=16).model.patch_size == 16


@pytest.mark.parametrize(
    ("values", "dim", "heads"),
    [
        ({"embed_dim": 100, "num_heads": 3}, 100, 3),
        ({"embed_dim": 100}, 100, 6),
        ({"num_heads": 5}, 384, 5),
        ({"backbone": "vit_odd_patch16", "embed_dim": 10, "num_heads": 4}, 10, 4),
    ],
)
def test_heads_divide_the_width(values: dict[str, object], dim: int, heads: int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": values})
    assert str(caught.value) == (
        f"model.embed_dim: {dim} cannot be divided by {heads} attention heads (model.num_heads)"
    )


def test_resnet_has_no_stochastic_depth_unless_asked_for_wrongly() -> None:
    config = _config(model__backbone="resnet50", crops__local_size=97, eval__crop=225)
    assert config.model.drop_path_rate == 0.0
    assert config.model.effective_patch_size is None
    assert RunConfig().model.drop_path_rate == 0.1
    assert _messages(model__backbone="resnet50", model__drop_path_rate=0.1) == [
        "model.drop_path_rate: resnet50 has no stochastic depth, need 0.0, got 0.1"
    ]


@pytest.mark.parametrize("key", ["patch_size", "embed_dim", "depth", "num_heads"])
def test_resnet_refuses_the_sizes_of_a_vit(key: str) -> None:
    messages = _messages(model__backbone="resnet50", **{f"model__{key}": 4})
    assert messages == [f"model.{key}: resnet50 has none, leave it out"]


def test_resnet_refuses_block_checkpointing() -> None:
    assert _messages(model__backbone="resnet50", engine__checkpoint_every_k_blocks=1) == [
        "engine.checkpoint_every_k_blocks: resnet50 has no transformer blocks, need 0, got 1"
    ]


def test_batch_norm_needs_a_hidden_layer() -> None:
    assert _messages(head__batch_norm=True, head__num_layers=1) == [
        "head.batch_norm: needs a hidden layer, so head.num_layers >= 2, got 1"
    ]
    assert _config(head__batch_norm=True).head.batch_norm


def test_offload_needs_zero() -> None:
    assert _messages(engine__offload_optimizer=True, engine__zero_stage=0) == [
        "engine.offload_optimizer: needs engine.zero_stage 1, 2 or 3, got 0"
    ]


@pytest.mark.parametrize(
    "key",
    ["optim.warmup_epochs", "dino.warmup_teacher_temp_epochs", "dino.freeze_last_layer_epochs"],
)
def test_phase_longer_than_the_run_is_refused(key: str) -> None:
    phase = {key.replace(".", "__"): 21}
    assert _messages(train__epochs=20, **phase) == [
        f"{key}: 21 epochs do not fit in a run of 20 (train.epochs)"
    ]
    assert _config(train__epochs=21, **phase).train.epochs == 21


def test_min_lr_is_not_above_the_peak() -> None:
    assert _messages(optim__lr=1e-3, optim__min_lr=1e-2, train__batch_size=512) == [
        "optim.min_lr: 0.01 is above the peak learning rate 0.002 "
        "(optim.lr x train.batch_size / 256)"
    ]
    assert _config(optim__lr=1e-3, optim__min_lr=2e-3, train__batch_size=512).peak_lr == 2e-3


def test_peak_lr_may_grow_with_the_square_root_of_the_batch() -> None:
    config = _config(optim__lr=1e-3, optim__lr_scaling="sqrt", train__batch_size=4096)
    assert config.peak_lr == 2e-3
    assert _messages(
        optim__lr=1e-3, optim__min_lr=1e-2, optim__lr_scaling="sqrt", train__batch_size=4096
    ) == [
        "optim.min_lr: 0.01 is above the peak learning rate 0.002 "
        "(optim.lr x sqrt(train.batch_size / 1024))"
    ]
    of_dinov3 = _config(optim__lr=1e-3, optim__lr_scaling="sqrt_64", train__batch_size=4096)
    assert of_dinov3.peak_lr == 8e-3


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [
        ("betas", (0.9, 0.95), (0.9, 0.999)),
        ("layer_decay", 0.9, 1.0),
        ("patch_embed_lr", 0.2, 1.0),
        ("backbone_lr", 0.0, 1.0),
    ],
)
def test_sgd_has_neither_betas_nor_rates_by_layer(key: str, value: object, default: object) -> None:
    changes = {f"optim__{key}": value}
    assert _messages(optim__name="sgd", **changes) == [
        f"optim.{key}: is of adamw, need {default} with optim.name=sgd, got {value}"
    ]
    assert getattr(_config(**changes).optim, key) == value


@pytest.mark.parametrize("key", ["layer_decay", "patch_embed_lr"])
def test_resnet_has_no_rates_by_layer(key: str) -> None:
    messages = _messages(model__backbone="resnet50", **{f"optim__{key}": 0.5})
    assert messages == [f"optim.{key}: resnet50 has no transformer blocks, need 1.0, got 0.5"]


def test_a_resnet_cannot_rest() -> None:
    (message,) = _messages(model__backbone="resnet50", optim__backbone_lr=0.0)
    assert message.startswith("optim.backbone_lr: 0 does not rest resnet50, whose batch norm")


def test_an_epoch_has_one_length() -> None:
    assert _messages(train__steps_per_epoch=7, data__images_per_epoch=900) == [
        "data.images_per_epoch: 900 images and 7 steps (train.steps_per_epoch) both say how long "
        "an epoch is; set one of them to null"
    ]


@pytest.mark.parametrize(("given", "other"), [("train", "test"), ("test", "train")])
def test_knn_needs_both_sets(given: str, other: str) -> None:
    assert _messages(**{f"eval__{given}": "images"}) == [
        f"eval.{other}: missing; eval.{given} is set, and k-NN needs both"
    ]


def test_crop_fits_in_the_resized_image() -> None:
    assert _messages(eval__resize=200) == [
        "eval.resize: 200 px is smaller than the 224 px cut from it (eval.crop)"
    ]


def test_configuration_cannot_be_edited() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc] # the point of the test
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc] # the point of the test


def test_whole_numbers_become_floats_and_lists_tuples() -> None:
    config = _config(optim__clip_grad=0, crops__global_scale=[0.5, 1])
    assert type(config.optim.clip_grad) is float
    assert config.crops.global_scale == (0.5, 1.0)
    assert type(config.crops.global_scale[1]) is float


def test_every_field_is_described() -> None:
    for name, section in {"": RunConfig, **sections()}.items():
        for key, field in section.model_fields.items():
            if name or key not in sections():
                assert field.description, f"{name}.{key}"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("overlap_comm", "results have been compared on CPUs only"),
        ("mics_shard_size", "DeepSpeed has removed MiCS; engine.zero_hpz_partition_size keeps"),
        ("zero_quantized_weights", "weights rounded to 8 bit give other numbers"),
        ("zero_quantized_gradients", "gradients rounded to 4 bit give other numbers"),
    ],
)
def test_what_deepspeed_offers_and_a_run_must_not_use_is_refused_with_the_reason(
    key: str, reason: str
) -> None:
    (message,) = _messages(**{f"engine__{key}": 8})
    assert message.startswith(f"engine.{key}: ")
    assert reason in message


def test_hpz_is_of_stage_3() -> None:
    assert _messages(engine__zero_hpz_partition_size=8) == [
        "engine.zero_hpz_partition_size: needs engine.zero_stage 3, got 2; at lower stages every"
        " rank has all weights"
    ]
    assert (
        _config(
            engine__zero_hpz_partition_size=8, engine__zero_stage=3
        ).engine.zero_hpz_partition_size
        == 8
    )


@pytest.mark.parametrize(
    ("ibot", "message"),
    [
        (
            {"mask_prob": 0.06},
            "ibot.mask_prob: 0.06 of the 16 global crops of 8 images (ibot.mask_group) is not one "
            "crop; need at least 0.0625",
        ),
        (
            {"mask_prob": 0.1, "mask_group": 3},
            "ibot.mask_prob: 0.1 of the 6 global crops of 3 images (ibot.mask_group) is not one "
            "crop; need at least 0.167",
        ),
        (
            {"mask_ratio": (0.0, 0.03)},
            "ibot.mask_ratio: 0.00375 of 196 patches, in the least masked global crop, is not one "
            "patch; raise the lower end to at least 0.00511",
        ),
        (
            {"mask_ratio": (0.0, 0.005), "mask_rule": "dinov2"},
            "ibot.mask_ratio: 0.005 of 196 patches, in the most masked global crop, is not one "
            "patch; raise the upper end to at least 0.00511",
        ),
        ({"mask_ratio": (0.5, 0.5)}, "ibot.mask_ratio: need 0 <= low < high <= 1, got 0.5, 0.5"),
    ],
)
def test_masks_that_mask_nothing_are_refused(ibot: dict[str, object], message: str) -> None:
    assert _messages(ibot={"loss_weight": 1.0, **ibot}) == [message]


@pytest.mark.parametrize(
    "ibot",
    [
        {"mask_prob": 0.0625},
        {"mask_prob": 0.167, "mask_group": 3},
        {"mask_ratio": (0.00511, 0.03)},
        {"mask_ratio": (0.0, 0.00511), "mask_rule": "dinov2"},
    ],
)
def test_masks_that_the_messages_suggest_are_accepted(ibot: dict[str, object]) -> None:
    assert _config(ibot={"loss_weight": 1.0, **ibot}).ibot.masked_crops >= 1


def test_share_of_masked_crops_is_that_of_whole_crops() -> None:
    ibot = _config(ibot={"loss_weight": 1.0, "mask_prob": 0.3, "mask_group": 4}).ibot
    assert ibot.masked_crops == 2
    assert ibot.masked_share == 0.25


def test_crops_too_small_to_mask_are_refused() -> None:
    sizes: dict[str, object] = {"crops__global_size": 48, "crops__local_size": 32}
    assert _messages(ibot__loss_weight=1.0, **sizes) == [
        "crops.global_size: 48 px are 3 x 3 patches of 16 px, which are too few to mask; "
        "need at least 64 px, or ibot.loss_weight=0.0"
    ]
    assert _config(**sizes).mask_group == 1
    assert _config(ibot__loss_weight=1.0, **sizes | {"crops__global_size": 64}).mask_group == 8


CURVE = {"start": 0.0, "peak": 0.1, "end": 0.2, "warmup_epochs": 2}


def test_a_curve_and_what_it_replaces_are_not_both_given() -> None:
    config = _config(schedules__lr=CURVE, optim__lr_scaling="sqrt_64", train__batch_size=256)
    assert (config.peak_lr, config.final_lr, config.warmup_epochs) == (0.4, 0.4, 2)
    for key, value, name, default in (
        ("optim__lr", 1e-3, "lr", 0.0005),
        ("optim__min_lr", 0.0, "lr", 1e-06),
        ("optim__warmup_epochs", 1, "lr", 10),
        ("optim__weight_decay", 0.1, "weight_decay", 0.04),
        ("optim__weight_decay_end", 0.1, "weight_decay", 0.4),
    ):
        assert _messages(**{key: value, f"schedules__{name}": CURVE}) == [
            f"{key.replace('__', '.')}: {value} is not read with schedules.{name}; leave it out or "
            f"at its default {default}, or set schedules.{name} to null"
        ]
    above_0 = {**CURVE, "start": 0.04}
    for key, other in (("momentum", 0.9), ("teacher_temp", 0.07), ("teacher_temp_changes", None)):
        name = "momentum" if key == "momentum" else "teacher_temp"
        (message,) = _messages(
            **{f"dino__{key}": other or "per_step", f"schedules__{name}": above_0}
        )
        assert message.startswith(f"dino.{key}: {other or 'per_step'} is not read with schedules.")


def test_the_length_of_what_a_curve_replaces_does_not_matter() -> None:
    assert _config(schedules__lr=CURVE, train__epochs=2).warmup_epochs == 2  # the default is 10
    assert _messages(schedules__lr=CURVE | {"cosine_epochs": 7}, train__epochs=8) == [
        "schedules.lr: 9 epochs do not fit in a run of 8 (train.epochs)"
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": {**CURVE, "peak": -1.0}}, "lr.peak: needs a value of at least 0, got -1.0"),
        ({"lr": {"start": 0.0, "end": 0.0}}, "lr.peak: is missing"),
        ({"lr": {**CURVE, "top": 1.0}}, "lr.top: unknown key"),
        ({"lr": {**CURVE, "peak": 0.0, "end": 0.0}}, "lr: is 0 in all steps, so nothing would"),
        (
            {"momentum": {**CURVE, "start": 0.9, "end": 1.5}},
            "momentum: needs start, peak and end of at most 1, got 0.9, 0.1, 1.5",
        ),
        ({"teacher_temp": CURVE}, "teacher_temp: needs start, peak and end above 0, got 0.0, 0.1,"),
        (
            {
                **dict.fromkeys(("lr", "weight_decay"), CURVE),
                "momentum": {**CURVE, "start": 0.9},
                "cosine_extra": 0.25,
            },
            "cosine_extra: 0.25 has no cosine to act on",
        ),
    ],
)
def test_curves_without_sense_are_refused(values: dict[str, object], message: str) -> None:
    (said,) = _messages(schedules=values)
    assert said.startswith(f"schedules.{message}")


def test_koleo_has_a_group_size_with_groups_only() -> None:
    assert _messages(koleo__group_size=16) == [
        "koleo.group_size: 16 is of koleo.scope=group, got 'rank'"
    ]
    assert _messages(koleo__scope="group") == [
        "koleo.group_size: is missing, with koleo.scope=group; 16 in DINOv3"
    ]
    assert _messages(koleo__scope="group", koleo__group_size=2, koleo__num_neighbours=2) == [
        "koleo.group_size: 2 images have too few neighbours, need at least 3 for "
        "koleo.num_neighbours=2"
    ]


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (
            {},
            "gram.teacher: there is nothing to compare with; give weights, or let the EMA teacher "
            "be taken over with gram.refresh_every_steps",
        ),
        (
            {"teacher": "w.pth", "first_refresh_step": 9},
            "gram.first_refresh_step: 9 without gram.refresh_every_steps; set that, or leave "
            "first_refresh_step out",
        ),
        (
            {"teacher": "w.pth", "max_refreshes": 3},
            "gram.max_refreshes: 3 without gram.refresh_every_steps; set that, or leave "
            "max_refreshes out",
        ),
        (
            {"teacher": "w.pth", "crop_size": 450},
            "gram.crop_size: 450 px is not a multiple of the patch size 16 px; nearest: 448 or 464",
        ),
        (
            {"teacher": "w.pth", "crop_size": 208},
            "gram.crop_size: 208 px show the Gram network less than the student sees in global "
            "crops of 224 px; give at least as many, or leave it out",
        ),
        (
            {"teacher": "w.pth", "tokens": "masked", "compare": "across_crops"},
            "gram.tokens: 'masked' needs masks, and ibot.loss_weight is 0; set it to 'all'",
        ),
    ],
)
def test_gram_settings_that_do_not_fit_are_refused(gram: dict[str, object], message: str) -> None:
    assert _messages(gram={"loss_weight": 1.0, **gram}) == [message]
    assert _config(gram={"loss_weight": 0.0, **gram}).gram.loss_weight == 0  # nothing is built


def test_chosen_patches_are_not_compared_within_crops() -> None:
    settings = {"loss_weight": 1.0, "teacher": "w.pth", "tokens": "unmasked"}
    assert _messages(ibot__loss_weight=1.0, gram=settings) == [
        "gram.tokens: 'unmasked' patches are compared across crops only, as some crops have none; "
        "set gram.compare=across_crops, or gram.tokens=all"
    ]
    _config(ibot__loss_weight=1.0, gram=settings | {"compare": "across_crops"})


def test_a_curve_of_a_gram_loss_without_weight_is_refused() -> None:
    curve = {"start": 0.0, "peak": 0.0, "end": 2.0}
    assert _messages(schedules__gram_weight=curve) == [
        "schedules.gram_weight: multiplies gram.loss_weight, which is 0; set that too, or leave "
        "the curve out"
    ]


def test_the_state_of_another_run_may_hold_the_gram_network() -> None:
    gram = {"loss_weight": 1.0}
    assert _config(gram=gram, train__continue_from="runs/first").gram.steps_without is None


@pytest.mark.parametrize("part", [{"lora": {"rank": 4}}, {"optim": {"trained_blocks": 2}}])
def test_a_part_of_the_weights_trains_only_where_the_rest_is_worth_keeping(
    part: dict[str, dict[str, int]],
) -> None:
    ((section, values),) = part.items()
    ((name, value),) = values.items()
    key, given = f"{section}.{name}", {"init_from": "w.pth"}
    _config(**part, train=given)
    off = "0" if section == "lora" else "null"
    assert _messages(**part) == [
        f"{key}: the run begins with random weights, most of which would stay random; give "
        f"train.init_from or train.continue_from, or set {key}={off}"
    ]
    assert _messages(**part, train=given, engine={"zero_stage": 3}) == [
        "engine.zero_stage: at stage 3 weights that do not train stay gathered once the backward "
        f"has recomputed with them (DeepSpeed #8148); with {key}={value} need 0, 1 or 2, got 3"
    ]
    assert _messages(**part, train=given, gram={"loss_weight": 1.0, "teacher": "w.pth"}) == [
        "gram.loss_weight: a Gram network has all weights of its own, and with "
        f"{key}={value} most are shared; need 0.0. anchor.* keeps features near the start's"
    ]
    assert f"{key}: the backbone has no transformer blocks, need {off}" in _messages(
        **part, train=given, model={"backbone": "resnet50"}
    )


def test_adapters_and_last_blocks_exclude_each_other_and_more_needs_adapters() -> None:
    given = {"init_from": "w.pth"}
    assert _messages(lora={"rank": 4}, optim={"trained_blocks": 2}, train=given) == [
        "optim.trained_blocks: blocks do not train with lora.rank=4, their adapters do; set one of "
        "them"
    ]
    for name in ("norms", "patch_embed"):
        assert _messages(lora={name: True}) == [
            f"lora.{name}: is of adapters, need false with lora.rank=0, got true"
        ]
    assert _config(lora={"rank": 4, "alpha": 8.0}, train=given).lora.scale == 2


ANCHOR = {"class_weight": 1.0}


def test_an_anchor_needs_weights_to_stay_near() -> None:
    assert _messages(anchor={**ANCHOR, "patch_weight": 0.5}) == [
        f"anchor.{key}: the run begins with random weights, near which nothing should stay; give "
        "train.init_from or train.continue_from, or set it to 0.0"
        for key in ("class_weight", "patch_weight")
    ]
    for key in ("init_from", "continue_from"):
        assert _config(anchor=ANCHOR, train={key: "runs/first"}).anchor.counts


def test_an_anchor_needs_crops_that_are_not_masked() -> None:
    values = {"anchor": ANCHOR, "train": {"init_from": "w.pth"}, "ibot": {"loss_weight": 1.0}}
    _config(**values)
    values["ibot"] |= {"mask_prob": 1.0}
    assert _messages(**values) == [
        "anchor.class_weight: the anchor looks at global crops that are not masked, and "
        "ibot.mask_prob masks all of them; lower that, or set it to 0.0"
    ]


@pytest.mark.parametrize("rope", [None, {}])
def test_an_anchor_needs_subsets_of_the_global_crops_alone(rope: dict[str, float] | None) -> None:
    values = {
        "anchor": ANCHOR,
        "train": {"init_from": "w.pth"},
        "model": {"drop_path_rate": 0.1, "drop_path_mode": "subset", "rope": rope},
        "crops": {"global_size": 96, "local_size": 96},
    }
    (message,) = _messages(**values)
    assert message.startswith("crops.local_size: 96 px are also the side of the global crops")
    values["crops"] |= {"num_local": 0}
    _config(**values)
    values["crops"] |= {"num_local": 8}
    values["model"] |= {"drop_path_mode": "per_image"}
    _config(**values)


def test_resnet50_has_no_tokens_to_anchor() -> None:
    assert "anchor.class_weight: resnet50 has no tokens, need 0.0" in _messages(
        model={"backbone": "resnet50"}, anchor=ANCHOR
    )


def test_resnet50_has_no_patches_to_compare() -> None:
    gram = {"loss_weight": 1.0, "teacher": "w.pth"}
    assert "gram.loss_weight: resnet50 has no tokens, need 0.0" in _messages(
        model={"backbone": "resnet50"}, gram=gram
    )


def test_there_is_a_gram_network_from_the_first_refresh_on() -> None:
    for first, without in ((0, 4), (4, 4), (5, 8), (8, 8)):
        settings = {"refresh_every_steps": 4, "first_refresh_step": first}
        assert _config(gram=settings).gram.steps_without == without
    assert _config(gram={"teacher": "w.pth", "refresh_every_steps": 4}).gram.steps_without == 0
