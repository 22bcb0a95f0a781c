"""Settings of DINOv3's network: what is refused, in which words, and what a name implies."""

from typing import Any

import pytest

from dinoscale.config import RunConfig, parse_config
from dinoscale.errors import ConfigError

PERIODS = "model.rope: periods follow from base, or with base null from both min_period and "


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"rope": {"jitter": 0.5}}, "model.rope.jitter: needs a value of at least 1, got 0.5"),
        ({"rope": {"rescale": 0.0}}, "model.rope.rescale: needs a value of at least 1, got 0.0"),
        ({"rope": {"shift": -1.0}}, "model.rope.shift: needs a value of at least 0, got -1.0"),
        (
            {"rope": {"coordinates": "both"}},
            "model.rope.coordinates: needs one of 'separate', 'min', 'max', got 'both' (text)",
        ),
        ({"rope": {"bas": 1.0}}, "model.rope.bas: unknown key, did you mean 'base'?"),
        (
            {"rope": {"base": 9.0, "min_period": 1.0}},
            PERIODS + "max_period; got 9.0, 1.0 and None",
        ),
        ({"rope": {"base": None}}, PERIODS + "max_period; got None, None and None"),
        (
            {"rope": {"base": None, "min_period": 2.0, "max_period": 2.0}},
            "model.rope: need min_period below max_period=2.0, got 2.0",
        ),
        (
            {"rope": {}, "num_heads": 64},
            "model.rope: needs heads of a multiple of 4 channels, got 6 "
            "(model.embed_dim / model.num_heads)",
        ),
        (
            {"rope": {}, "position_resize": "by_size"},
            "model.position_resize: 'by_size' is of learned positions, and rotary ones "
            "(model.rope) need no resizing; leave it out",
        ),
        (
            {"qkv_bias": False, "mask_key_bias": True},
            "model.mask_key_bias: without a bias (model.qkv_bias=false) there is none to mask, "
            "need false, got true",
        ),
        (
            {"backbone": "vit_7b_patch16_dinov3", "mask_key_bias": True},
            "model.mask_key_bias: without a bias (model.qkv_bias=false) there is none to mask, "
            "need false, got true",
        ),
        (
            {"ffn_multiple": 64},
            "model.ffn_multiple: 64 is of swiglu, and model.ffn is mlp; leave it out",
        ),
        *(
            ({"backbone": "resnet50", key: value}, f"model.{key}: resnet50 has none, leave it out")
            for key, value in (
                ("rope", {}),
                ("local_norm", True),
                ("ffn_ratio", 4.0),
                ("ffn_multiple", 8),
                ("norm_eps", 1e-6),
                ("mask_key_bias", True),
                ("registers", 0),
            )
        ),
    ],
)
def test_mistakes_are_named(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": model})
    assert str(caught.value) == message


def test_a_norm_of_local_crops_needs_some() -> None:
    with pytest.raises(ConfigError, match=r"model\.local_norm: there are no local crops"):
        parse_config({"model": {"local_norm": True}, "crops": {"num_local": 0}})


def test_plain_prototypes_have_no_length() -> None:
    head = {"weight_norm": False}
    config = parse_config({"head": head})
    assert not config.head.norm_last_layer
    assert parse_config(config.model_dump()) == config
    with pytest.raises(ConfigError, match=r"head\.norm_last_layer: plain prototypes"):
        parse_config({"head": {**head, "norm_last_layer": True}})


def test_a_name_implies_its_layers() -> None:
    def layers(**model: Any) -> Any:
        return RunConfig.model_validate({"model": model}).model.layers

    assert not layers(backbone="vit_base_patch16_224").rope
    found = layers(backbone="vit_7b_patch16_dinov3.lvd1689m")
    assert (found.embed_dim, found.ffn_ratio, found.ffn_multiple) == (4096, 3.0, 64)
    assert found.rope
    assert not found.qkv_bias
    changed = layers(backbone="vit_large_patch16_dinov3", registers=0, qkv_bias=True)
    assert (changed.registers, changed.qkv_bias, changed.mask_key_bias) == (0, True, False)
