"""The rules scale settings as calculated by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoscale.config import RunConfig, load_config
from dinoscale.config.sweep.rules import RulesConfig
from dinoscale.errors import ConfigError
from dinoscale.scaling.design.apply_rules import Sizes, apply_rules

BASE = Sizes(batch_size=64, width=64, depth=3, images=40_000, parameters=1000)
RUN = Sizes(batch_size=256, width=128, depth=6, images=10_000, parameters=8000)
CONFIG = load_config("quickstart")  # 25 epochs, lr 8e-3, momentum 0.98, decay 0.04


def _settings(
    rules: dict[str, object], *, run: Sizes = RUN, lr_factor: float = 1.0
) -> dict[str, object]:
    return apply_rules(
        RulesConfig.model_validate(rules), CONFIG, sizes=run, base=BASE, lr_factor=lr_factor
    )


def _peak(rules: dict[str, object], *, lr_factor: float = 1.0) -> float:
    lr = _settings(rules, lr_factor=lr_factor).get("optim.lr", CONFIG.optim.lr)
    assert isinstance(lr, float)
    return lr * RUN.batch_size / 256


BASE_PEAK = 8e-3 * 64 / 256


@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        ({}, 4),  # as the recipes: linear in the batch
        ({"batch_size": 1}, 4),
        ({"batch_size": 0.5}, 2),
        ({"batch_size": 0}, 1),
        ({"width": -1}, 4 / 2),
        ({"batch_size": 0, "depth": -0.5, "images": -1, "parameters": 0.5}, 0.5**0.5 * 4 * 8**0.5),
    ],
)
def test_exponents_are_of_the_peak_learning_rate(rule: dict[str, float], factor: float) -> None:
    assert _peak({"lr": rule}) == pytest.approx(BASE_PEAK * factor, rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "factor"), [({}, 2), ({"batch_size": 1}, 4), ({"batch_size": 0.5}, 2)]
)
def test_exponents_are_of_the_peak_of_a_base_that_grows_with_the_square_root(
    rule: dict[str, float], factor: float
) -> None:
    optim = CONFIG.optim.model_copy(update={"lr_scaling": "sqrt"})
    run = CONFIG.model_copy(update={"optim": optim})
    rules = RulesConfig.model_validate({"lr": rule})
    found = apply_rules(rules, run, sizes=RUN, base=BASE, lr_factor=1.0)
    lr = found.get("optim.lr", optim.lr)
    assert isinstance(lr, float)
    growth = (RUN.batch_size / BASE.batch_size) ** 0.5  # by the configuration itself
    assert lr / optim.lr * growth == pytest.approx(factor, rel=1e-12)


def test_no_rule_leaves_the_recipe_alone() -> None:
    assert _settings({}) == {}
    assert _settings({"lr": {"width": -1}, "momentum": {"batch_size": 1}}, run=BASE) == {}


def test_lr_factor_multiplies_what_the_rules_give() -> None:
    assert _peak({}, lr_factor=3.0) == pytest.approx(BASE_PEAK * 4 * 3)
    assert _peak({"lr": {"batch_size": 0.5}}, lr_factor=3.0) == pytest.approx(BASE_PEAK * 2 * 3)


def test_momentum_keeps_its_average_over_images() -> None:
    found = _settings({"momentum": {"batch_size": 1}})
    assert found == {
        "dino.momentum": pytest.approx(0.98**4),
        "dino.momentum_end": 1.0,
    }
    assert _settings({"momentum": {"batch_size": 0.5}})["dino.momentum"] == pytest.approx(0.98**2)


@given(st.floats(0.01, 1e4), st.floats(-4, 4))
def test_momentum_stays_between_0_and_1(ratio: float, exponent: float) -> None:
    run = Sizes(max(1, round(64 * ratio)), 64, 3, 40_000, 1000)
    settings = _settings({"momentum": {"batch_size": exponent}}, run=run)
    assert 0 <= settings.get("dino.momentum", 0.98) <= 1  # type: ignore[operator] # a number


def test_weight_decay_scales_at_both_ends() -> None:
    assert _settings({"weight_decay": {"width": 1}}) == {
        "optim.weight_decay": pytest.approx(0.08),
        "optim.weight_decay_end": pytest.approx(0.08),
    }


@pytest.mark.parametrize(
    ("rule", "epochs"),
    [
        ({"fraction": 0.1}, 3),  # of 25, a half goes up
        ({"fraction": 0.02}, 1),
        ({"fraction": 1.0}, 25),
        ({"images": 4000}, 10),  # of 10,000
        ({"images": 200}, 1),
    ],
)
def test_warm_up_is_whole_epochs(rule: dict[str, float], epochs: int) -> None:
    assert _settings({"warmup": rule}) == {"optim.warmup_epochs": epochs}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"warmup": {"fraction": 0.01}}, "a fraction of 0.01 is 0.25 of the run's 25 epochs"),
        ({"warmup": {"images": 100}}, "100 images is 0.25 of the run's 25 epochs"),
    ],
)
def test_warm_up_that_rounds_to_nothing_is_refused(rules: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _settings(rules)


def test_images_that_nobody_knows_cannot_scale_anything() -> None:
    unknown = Sizes(64, 64, 3, None, 1000)
    rules = RulesConfig.model_validate({"lr": {"images": -0.5}})
    with pytest.raises(ConfigError, match=r"rules.lr.images: .*set data.images_per_epoch"):
        apply_rules(rules, RunConfig(), sizes=RUN, base=unknown, lr_factor=1.0)
    warmup = {"warmup": {"images": 100}}
    with pytest.raises(ConfigError, match=r"rules.warmup.images: .*axis\s+images"):
        _settings(warmup, run=unknown)
