"""From a configuration to a plan, and what is printed of it."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dinoscale import cli
from dinoscale.config import (
    RunConfig,
    TrainConfig,
    comments_on,
    count_parameters,
    describe,
    dump_config,
    load_config,
    micro_batch_sizes,
    parse_config,
    require_groups_within_nodes,
    resolve,
    split_batch,
    without_auto,
)
from dinoscale.config.sections.objectives import KoleoConfig
from dinoscale.errors import ConfigError

IMAGENET = 1_281_167  # training images of ILSVRC 2012


def _run(batch_size: int, micro_batch_size: int) -> RunConfig:
    train = TrainConfig(batch_size=batch_size, micro_batch_size=micro_batch_size)
    return RunConfig(train=train)


def test_plan_of_the_vanilla_recipe_on_eight_ranks() -> None:
    plan = resolve(load_config("vit_s16_vanilla100"), world_size=8, num_images=IMAGENET)
    assert plan.steps_per_epoch == 2502
    assert plan.total_steps == plan.stop_step == 250_200
    assert plan.warmup_steps == 25_020
    assert plan.freeze_last_layer_steps == 2502
    assert plan.peak_lr == pytest.approx(1e-3, rel=1e-12)
    assert plan.min_lr == 1e-6
    assert (plan.images_per_rank, plan.micro_batch_size, plan.accumulation_steps) == (64, 64, 1)
    assert (plan.world_size, plan.batch_size, plan.num_images) == (8, 512, IMAGENET)


def test_fewer_ranks_accumulate_and_change_nothing_else() -> None:
    config = load_config("vit_s16")
    many = resolve(config, world_size=16, num_images=IMAGENET)
    one = resolve(config, world_size=1, num_images=IMAGENET)
    assert (many.accumulation_steps, one.accumulation_steps) == (1, 16)
    for name in ("steps_per_epoch", "total_steps", "warmup_steps", "peak_lr", "min_lr"):
        assert getattr(many, name) == getattr(one, name)


def test_stopping_early_leaves_the_schedules_alone() -> None:
    whole = parse_config({"train": {"batch_size": 10}})
    early = parse_config({"train": {"batch_size": 10, "stop_after_steps": 7}})
    late = parse_config({"train": {"batch_size": 10, "stop_after_steps": 10**9}})
    plans = [resolve(config, world_size=1, num_images=105) for config in (whole, early, late)]
    assert [plan.total_steps for plan in plans] == [1000] * 3
    assert [plan.stop_step for plan in plans] == [1000, 7, 1000]
    assert {plan.warmup_steps for plan in plans} == {100}


def test_micro_batch_is_at_most_the_share_of_a_rank() -> None:
    split = split_batch(_run(48, 64), world_size=4)
    assert (split.micro_batch_size, split.accumulation_steps) == (12, 1)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "nearest"), [(100, 16, "96 or 112"), (3, 8, "8")]
)
def test_batch_that_ranks_cannot_share_names_the_nearest(
    batch_size: int, world_size: int, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        split_batch(_run(batch_size, 1), world_size=world_size)
    assert str(caught.value) == (
        f"train.batch_size: {batch_size} images cannot be shared equally by {world_size} ranks; "
        f"nearest that can: {nearest}"
    )


def test_micro_batch_that_leaves_a_rest_names_the_nearest_divisors() -> None:
    with pytest.raises(ConfigError) as caught:
        split_batch(_run(512, 48), world_size=8)
    assert str(caught.value) == (
        "train.micro_batch_size: 48 does not divide the 64 images per rank "
        "(512 images / 8 ranks); nearest that do: 32 or 64"
    )


def _masked_run(batch_size: int, micro_batch_size: int | str, mask_group: int = 8) -> RunConfig:
    train = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    return parse_config(
        {"train": train, "ibot": {"loss_weight": 1.0, "mask_group": mask_group}},
    )


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "message"),
    [
        (192, 12, "train.micro_batch_size: 12 images are not whole groups of 8 (ibot.mask_group); "
                  "nearest that are: 8 or 16, or set ibot.mask_group=4"),
        (192, 60, "train.micro_batch_size: 60 does not divide the 96 images per rank "
                  "(192 images / 2 ranks); nearest that do: 48 or 96"),
        (200, "auto", "train.batch_size: the 100 images per rank (200 images / 2 ranks) are not "
                      "whole groups of 8 (ibot.mask_group); nearest that are: 192 or 208, or set "
                      "ibot.mask_group=4"),
        (97, 8, "train.batch_size: 97 images cannot be shared equally by 2 ranks; "
                "nearest that can: 96 or 112"),
    ],
)  # fmt: skip
def test_micro_batch_that_is_not_whole_groups_of_masks_names_the_nearest(
    batch_size: int, micro_batch_size: int | str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        split_batch(without_auto(_masked_run(batch_size, micro_batch_size)), world_size=2)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError):
        resolve(
            without_auto(_masked_run(batch_size, micro_batch_size)), world_size=2, num_images=1000
        )


def test_auto_takes_whole_groups_of_masks() -> None:
    config = _masked_run(192, "auto")
    assert micro_batch_sizes(config, world_size=2) == [8, 16, 24, 32, 48, 96]
    assert resolve(without_auto(config), world_size=2, num_images=1000).images_per_rank == 96
    for size in micro_batch_sizes(config, world_size=2):
        assert split_batch(_masked_run(192, size), world_size=2).micro_batch_size == size
    unmasked = parse_config({"train": {"batch_size": 20, "micro_batch_size": "auto"}})
    assert micro_batch_sizes(unmasked, world_size=2) == [1, 2, 5, 10]


@settings(deadline=None)
@given(
    batch_size=st.integers(1, 4096),
    micro_batch_size=st.integers(1, 256),
    world_size=st.integers(1, 64),
)
def test_every_image_of_the_batch_is_in_exactly_one_pass(
    batch_size: int, micro_batch_size: int, world_size: int
) -> None:
    try:
        split = split_batch(_run(batch_size, micro_batch_size), world_size=world_size)
    except ConfigError as error:
        suggested = [int(word) for word in str(error).split("nearest")[1].split() if word.isdigit()]
        assert suggested
        for size in suggested:  # what the message suggests does work
            fixed = (size, 1) if "batch_size: " in str(error)[:18] else (batch_size, size)
            split_batch(_run(*fixed), world_size=world_size)
        return
    assert split.micro_batch_size <= micro_batch_size
    assert split.images_per_rank == split.micro_batch_size * split.accumulation_steps
    assert split.images_per_rank * world_size == batch_size


@settings(deadline=None)
@given(num_images=st.integers(1, 10**7), batch_size=st.integers(1, 4096))
def test_an_epoch_never_needs_more_images_than_there_are(num_images: int, batch_size: int) -> None:
    assume(num_images >= batch_size)
    config = parse_config({"train": {"batch_size": batch_size, "micro_batch_size": 1}})
    plan = resolve(config, world_size=1, num_images=num_images)
    assert 0 <= num_images - plan.steps_per_epoch * batch_size < batch_size


@pytest.mark.parametrize(
    ("num_images", "world_size", "remedy"),
    [
        (100, 8, "100 images do not fill one batch of 512 (train.batch_size); "
                 "lower train.batch_size to 96 or less, or add images"),
        (3, 8, "3 images do not fill one batch of 512 (train.batch_size); "
               "use fewer ranks, or add images"),
        (0, 8, "has no images"),
    ],
)  # fmt: skip
def test_too_few_images_say_what_to_do(num_images: int, world_size: int, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RunConfig(), world_size=world_size, num_images=num_images)
    assert str(caught.value) == f"data.train: {remedy}"


def test_world_without_ranks_is_a_bad_call() -> None:
    with pytest.raises(ValueError, match="need world_size >= 1, got 0"):
        split_batch(_run(8, 8), world_size=0)


@pytest.mark.parametrize(
    ("name", "backbone", "head"),
    [
        ("vit_t16", 5_524_416, 21_958_912),
        ("vit_s16", 21_665_664, 22_352_128),
        ("vit_s8", 21_670_272, 22_352_128),
        ("vit_b16", 85_798_656, 23_138_560),
        ("vit_b8", 85_807_872, 23_138_560),
        ("vit_l16", 303_301_632, 23_662_848),
    ],
)
def test_parameter_counts_of_the_known_models(name: str, backbone: int, head: int) -> None:
    counts = count_parameters(load_config(name))
    assert (counts.backbone, counts.head) == (backbone, head)


def test_parameter_counts_of_small_heads() -> None:
    head = {"num_prototypes": 10, "hidden_dim": 8, "bottleneck_dim": 4}

    def count(**changes: object) -> int | None:
        model = {"backbone": "vit_odd_patch16", "embed_dim": 6}
        return count_parameters(parse_config({"model": model, "head": {**head, **changes}})).head

    prototypes = 10 * 4 + 10
    assert count(num_layers=1) == 6 * 4 + 4 + prototypes
    assert count(num_layers=2) == 6 * 8 + 8 + 8 * 4 + 4 + prototypes
    assert count(num_layers=2, batch_norm=True) == 6 * 8 + 8 + 8 * 4 + 4 + prototypes + 16
    assert count(num_layers=1, weight_norm=False) == 6 * 4 + 4 + prototypes - 10


def test_parameters_of_other_models_are_not_guessed() -> None:
    counts = count_parameters(parse_config({"model": {"backbone": "vit_base_patch16_clip_224"}}))
    assert (counts.backbone, counts.head) == (None, None)
    resnet = count_parameters(parse_config({"model": {"backbone": "resnet50"}}))
    assert resnet.backbone == 23_508_032


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "resnet50"])
@pytest.mark.parametrize("channels", [1, 7])
def test_parameters_are_those_of_the_network_for_any_channels(backbone: str, channels: int) -> None:
    from dinoscale.models.zoo import build_backbone

    data = {"channels": channels, "mean": [0.5] * channels, "std": [0.5] * channels}
    config = parse_config({"model": {"backbone": backbone}, "data": data})
    with torch.device("meta"):
        network = build_backbone(backbone, img_size=224, in_chans=channels)
    built = sum(parameter.numel() for parameter in network.parameters())
    assert count_parameters(config).backbone == built


@pytest.mark.parametrize("patch_loss", [0.0, 1.0])
@pytest.mark.parametrize(
    "model",
    [
        {"layer_scale": 1e-5},
        {"ffn": "swiglu", "embed_dim": 64, "num_heads": 4},
        {"registers": 3, "layer_scale": 1e-5, "ffn": "swiglu"},
        {"backbone": "vit_base_patch14_dinov2"},
        {"backbone": "vit_small_patch14_reg4_dinov2"},
        {"backbone": "vit_small_patch16_dinov3", "patch_size": 14, "local_norm": True},
        {"backbone": "vit_huge_plus_patch16_dinov3_qkvb", "patch_size": 14},
        {"backbone": "vit_7b_patch16_dinov3", "patch_size": 14, "depth": 2},
        {"rope": {}, "registers": 2, "ffn": "swiglu", "ffn_ratio": 3.0, "ffn_multiple": 64},
        {"qkv_bias": False, "ffn_ratio": 2.5, "norm_eps": 1e-5},
        {"backbone": "vit_small_patch14_reg4_dinov2.lvd142m", "registers": 0, "ffn": "swiglu"},
        {"backbone": "vit_small_patch14_reg4_dinov2", "registers": 4},
        {"backbone": "vit_giant_patch14_dinov2"},
        {"backbone": "vit_giant_patch14_reg4_dinov2", "ffn": "mlp", "depth": 2},
    ],
)
def test_parameters_of_dinov2s_layers_are_those_of_the_network(
    model: dict[str, object], patch_loss: float
) -> None:
    from dinoscale.engine.build import shapes_only

    config = parse_config(
        {
            "model": {"backbone": "vit_tiny_patch14_224", **model},
            "ibot": {"loss_weight": patch_loss},
            "crops": {"local_size": 98},
        }
    )
    built = sum(parameter.numel() for parameter in shapes_only(config).backbone.parameters())
    assert count_parameters(config).backbone == built


def test_patches_of_14_pixels_do_not_fit_into_crops_of_96() -> None:
    with pytest.raises(ConfigError, match=r"^crops.local_size: 96 px .* 14 px; nearest: 84 or 98"):
        parse_config({"model": {"backbone": "vit_small_patch14_dinov2"}})


def test_description_is_json_and_complete() -> None:
    config = load_config("vit_s16")
    plan = resolve(config, world_size=16, num_images=IMAGENET)
    read = json.loads(json.dumps(describe(config, plan)))
    assert parse_config(read["config"]) == config
    assert read["plan"]["total_steps"] == 1_000_800
    assert read["parameters"] == {"backbone": 21_665_664, "head": 22_352_128}
    assert describe(config, None)["plan"] is None


def test_text_is_a_configuration_followed_by_the_plan(tmp_path: Path) -> None:
    config = load_config("vit_s16")
    plan = resolve(config, world_size=16, num_images=IMAGENET)
    text = dump_config(config) + comments_on(config, plan)
    assert "# parameters.backbone: 21,665,664\n" in text
    assert "# plan.total_steps: 1000800\n" in text
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert load_config(str(path)) == config


def test_auto_is_shown_as_what_training_finds_and_is_no_number_before(tmp_path: Path) -> None:
    config = load_config("vit_s16", ["train.micro_batch_size=auto"])
    with pytest.raises(ConfigError, match=r"auto is decided when .* number here, at most 64"):
        resolve(config, world_size=16, num_images=IMAGENET)
    plan = resolve(without_auto(config), world_size=16, num_images=IMAGENET)
    text = dump_config(config) + comments_on(config, plan)
    assert "# plan.images_per_rank: 64\n# plan.micro_batch_size: auto\n" in text
    assert "# plan.accumulation_steps: auto\n" in text
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert load_config(str(path)) == config


@pytest.mark.parametrize("value", ["max", "8.5", "null", "'8'"])
def test_a_micro_batch_is_a_number_or_auto(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^train.micro_batch_size: needs a whole number or auto"):
        load_config("vit_s16", [f"train.micro_batch_size={value}"])


def test_text_without_a_plan_says_so() -> None:
    other = parse_config({"model": {"backbone": "vit_base_patch16_clip_224"}})
    text = comments_on(other, None)
    assert "# plan: none: data.train is not set, and the number of steps" in text
    assert "# parameters.backbone: not known before the model is built\n" in text


@pytest.mark.parametrize("form", ["text", "json"])
def test_settings_are_shown_although_the_batch_is_too_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    few = ["config", "vit_s16", "data.train=synthetic:shapes?images=9"]
    with pytest.raises(ConfigError, match="9 images do not fill one batch of 1024"):
        cli.run([*few, "--json"] if form == "json" else few)
    shown = capsys.readouterr().out
    if form == "json":
        assert json.loads(shown)["plan"] is None
        return
    assert "\n# plan: none: data.train: 9 images do not fill one batch of 1024" in shown
    (tmp_path / "run.yaml").write_text(shown)
    assert load_config(str(tmp_path / "run.yaml")) == load_config("vit_s16", few[2:])


def test_hpz_groups_are_whole_and_within_nodes() -> None:
    config = parse_config(
        {
            "engine": {"zero_stage": 3, "zero_hpz_partition_size": 4},
            "train": {"batch_size": 48},
            "optim": {"min_lr": 0},
        }
    )
    assert resolve(config, world_size=8, num_images=100).world_size == 8
    with pytest.raises(
        ConfigError, match=r"zero_hpz_partition_size: 6 ranks are not whole groups of 4"
    ):
        resolve(config, world_size=6, num_images=100)
    require_groups_within_nodes(config, ranks_of_node=8)
    with pytest.raises(ConfigError, match=r"4 does not divide the 6 ranks of a node"):
        require_groups_within_nodes(config, ranks_of_node=6)


def test_a_pass_is_whole_groups_of_koleo() -> None:
    def run(batch_size: int, micro_batch_size: int, **koleo: object) -> RunConfig:
        train = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
        return parse_config({"train": train, "koleo": {"loss_weight": 0.1, **koleo}})

    groups = {"scope": "group", "group_size": 12}
    # 3 ranks have 4 images of a group each; 8 ranks 3 images each of two groups.
    for world_size, batch_size, sizes in (
        (3, 48, [4, 8, 16]),
        (8, 96, [3, 6, 12]),
        (1, 24, [12, 24]),
    ):
        config = run(batch_size, sizes[1], **groups)
        assert micro_batch_sizes(config, world_size=world_size) == sizes
        assert split_batch(config, world_size=world_size).micro_batch_size == sizes[1]
    with pytest.raises(
        ConfigError,
        match=r"2 images of each of 3 ranks are not whole groups of 12 "
        r"\(koleo.group_size\); nearest that are: 4",
    ):
        split_batch(run(48, 2, **groups), world_size=3)
    with pytest.raises(
        ConfigError,
        match=r"train.batch_size: 42 images of 3 ranks are not whole "
        r"groups of 12 \(koleo.group_size\); nearest that are: 36 or 48",
    ):
        split_batch(run(42, 14, **groups), world_size=3)
    with pytest.raises(ConfigError, match=r"2 images in a pass have too few .* need at least 4"):
        split_batch(run(8, 2, num_neighbours=3), world_size=2)
    over_ranks = run(8, 2, num_neighbours=3, scope="all")
    assert split_batch(over_ranks, world_size=2).micro_batch_size == 2
    unweighted = parse_config({"train": {"batch_size": 6}, "koleo": groups})
    assert split_batch(unweighted, world_size=3).micro_batch_size == 2


def test_koleo_needs_neighbours_in_every_pass() -> None:
    def run(batch_size: int, micro_batch_size: int | str) -> RunConfig:
        train = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
        return parse_config({"train": train, "koleo": {"loss_weight": 0.1}})

    for config, text in (
        (run(8, 1), "train.micro_batch_size: 1 image in a pass has no neighbour"),
        (run(2, 4), "train.batch_size: 1 image of each of 2 ranks in a pass has no neighbour"),
    ):
        with pytest.raises(ConfigError, match=text) as caught:
            split_batch(config, world_size=2)
        assert caught.value.exit_code == 2
    assert micro_batch_sizes(run(12, "auto"), world_size=2) == [2, 3, 6]
    over_ranks = run(2, 1).model_copy(update={"koleo": KoleoConfig(loss_weight=0.1, scope="all")})
    assert split_batch(over_ranks, world_size=2).micro_batch_size == 1
    with pytest.raises(ConfigError, match="has no neighbour"):
        split_batch(over_ranks, world_size=1)
    assert split_batch(without_auto(run(6, "auto")), world_size=2).micro_batch_size == 3


_NO_GRAM = (
    "and there is no Gram network before {} steps are done (gram.first_refresh_step, "
    "gram.refresh_every_steps); refresh earlier, or give gram.teacher"
)


def _gram_run(first: int, **schedules: object) -> RunConfig:
    gram = {"loss_weight": 1.0, "refresh_every_steps": 5, "first_refresh_step": first}
    train = {"epochs": 10, "batch_size": 8, "micro_batch_size": 8}
    return parse_config({"train": train, "gram": gram, "schedules": schedules})


def test_a_run_that_ends_before_there_is_a_gram_network_is_refused() -> None:
    resolve(_gram_run(11), world_size=1, num_images=16)  # after 15 of 20 steps
    with pytest.raises(ConfigError) as caught:
        resolve(_gram_run(16), world_size=1, num_images=16)
    assert str(caught.value) == (
        f"gram.loss_weight: the run ends after 20 steps, {_NO_GRAM.format(20)}"
    )


@pytest.mark.parametrize(
    ("curve", "asked"),  # epochs of 2 steps, and a network once 10 are done
    [
        ({"start": 0.0, "peak": 0.0, "end": 2.0, "warmup_epochs": 5}, None),
        ({"start": 0.0, "peak": 0.0, "end": 2.0, "warmup_epochs": 4}, 9),
        ({"start": 0.0, "peak": 0.0, "end": 2.0, "warmup_epochs": 5, "cosine_epochs": 0}, None),
        ({"start": 0.0, "peak": 0.0, "end": 2.0, "warmup_epochs": 4, "cosine_epochs": 0}, 8),
        ({"start": 0.0, "peak": 1.0, "end": 2.0, "warmup_epochs": 5}, 1),
        ({"start": 0.5, "peak": 1.0, "end": 2.0, "warmup_epochs": 5}, 0),
        ({"start": 0.5, "peak": 1.0, "end": 2.0}, 0),
    ],
)
def test_a_curve_that_asks_for_the_gram_loss_too_early_is_refused(
    curve: dict[str, object], asked: int | None
) -> None:
    config = _gram_run(6, gram_weight=curve)
    if asked is None:
        resolve(config, world_size=1, num_images=16)
        return
    with pytest.raises(ConfigError) as caught:
        resolve(config, world_size=1, num_images=16)
    assert str(caught.value) == (
        f"schedules.gram_weight: is above 0 after {asked} steps, {_NO_GRAM.format(10)}"
    )
