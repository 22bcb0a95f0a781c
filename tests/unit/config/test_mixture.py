"""Training images as a mixture: how it is written, what an epoch draws, and its mistakes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoscale.config import RunConfig, dump_config, load_config, parse_config, resolve
from dinoscale.data.order.sampler import StepSampler
from dinoscale.errors import ConfigError


@pytest.fixture
def empty(tmp_path: Path) -> str:
    (tmp_path / "empty.yaml").write_text("")
    return str(tmp_path / "empty.yaml")


def _mixture(*weights: float, **data: object) -> RunConfig:
    train = [{"source": f"/s{i}", "weight": weight} for i, weight in enumerate(weights)]
    return parse_config({"data": {"train": train, **data}, "train": {"batch_size": 10}})


def _quotas(config: RunConfig, *sizes: int) -> tuple[int, ...]:
    return resolve(config, world_size=1, num_images=sizes).quotas


def test_a_list_on_the_command_line_is_a_mixture(empty: str, tmp_path: Path) -> None:
    written = "data.train=[{source: 'synthetic:shapes?size=8', weight: 2}, {source: /b}]"
    config = load_config(empty, [written])
    assert [(part.source, part.weight) for part in config.data.sources] == [
        ("synthetic:shapes?size=8", 2.0),
        ("/b", 1.0),
    ]
    assert config.data.sources_text == "2 x synthetic:shapes?size=8 + 1 x /b"
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "dumped.yaml")) == config


def test_plain_text_is_one_source_and_null_is_none(empty: str) -> None:
    config = load_config(empty, ["data.train=/a"])
    assert [(part.source, part.weight) for part in config.data.sources] == [("/a", 1.0)]
    assert config.data.sources_text == "/a"
    assert load_config(empty).data.sources == ()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[{source: 5}]", "source needs text (put it in quotes), got 5"),
        ("''", "data.train: needs text that is not empty"),
        ("[]", "data.train: a mixture of nothing; name a source, or null for none"),
        ("[a]", "item 1 of the list: needs a mapping of source and weight, got 'a' (text)"),
        ("[{source: a, weight: 0}]", "item 1 of the list: weight needs a value above 0, got 0"),
        ("[{source: a, weight: -1.5}]", "weight needs a value above 0, got -1.5"),
        ("[{source: a, weight: .inf}]", "weight needs a finite number, got inf"),
        ("[{source: a, weight: true}]", "weight needs a number, got true"),
        ("[{source: a}, {weight: 2}]", "data.train: item 2 of the list: source is missing"),
        ("[{source: ''}]", "source needs text that is not empty"),
        ("[{source: a, wieght: 2}]", "unknown key 'wieght'; known are source, weight"),
    ],
)
def test_mistakes_in_a_mixture_are_one_sentence(empty: str, written: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(empty, [f"data.train={written}"])
    assert message in str(caught.value)
    assert str(caught.value).endswith("(command line)")
    assert len(str(caught.value).splitlines()) == 1


def test_images_are_not_chosen_from_a_mixture() -> None:
    with pytest.raises(ConfigError, match=r"data\.subset_size: 9 images cannot be chosen from"):
        _mixture(1.0, 1.0, subset_size=9)


def test_an_epoch_of_one_source_is_all_of_it_unless_a_number_is_given() -> None:
    one = parse_config({"data": {"train": "/a"}, "train": {"batch_size": 10}})
    assert _quotas(one, 105) == (105,)
    assert _quotas(_mixture(3.0), 105) == (105,)
    for wanted, steps in ((47, 4), (1000, 100)):
        config = _mixture(3.0, images_per_epoch=wanted)
        plan = resolve(config, world_size=1, num_images=[105])
        assert (plan.quotas, plan.steps_per_epoch) == ((steps * 10,), steps)
        assert (plan.num_images, plan.source_sizes) == (105, (105,))


def test_an_epoch_of_chosen_images_is_all_of_them_unless_a_number_is_given() -> None:
    for wanted, steps in ((None, 4), (100, 10)):
        config = _mixture(3.0, images_per_epoch=wanted, subset_size=40)
        plan = resolve(config, world_size=1, num_images=[105])
        assert (plan.quotas, plan.steps_per_epoch) == ((steps * 10,), steps)
        assert (plan.num_images, plan.source_sizes) == (40, (105,))


@pytest.mark.parametrize("images", [10, 25, 1000])
def test_an_epoch_of_a_number_of_steps_passes_over_few_images_often(images: int) -> None:
    train = {"batch_size": 10, "steps_per_epoch": 7, "epochs": 20}
    config = parse_config({"data": {"train": "/a"}, "train": train})
    plan = resolve(config, world_size=1, num_images=images)
    assert (plan.quotas, plan.num_images) == ((70,), images)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (7, 140, 70)
    assert plan.freeze_last_layer_steps == 7
    sampler = StepSampler(
        sizes=plan.source_sizes,
        quotas=plan.quotas,
        batch_size=10,
        micro_batch_size=10,
        world_size=1,
        seed=0,
    )
    drawn = [sampler.step(step).ids.tolist() for step in range(100)]
    if images == 10:
        assert all(sorted(ids) == [*range(10)] for ids in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=images)
    assert counts.max() - counts.min() <= 1  # no image is left out at the end of an epoch
    with pytest.raises(ConfigError, match="9 images do not fill one batch of 10"):
        resolve(config, world_size=1, num_images=9)


def test_a_mixture_shares_out_the_steps_of_an_epoch() -> None:
    train = {"batch_size": 10, "steps_per_epoch": 6}
    config = _mixture(2.0, 1.0)
    config = config.model_copy(update={"train": parse_config({"train": train}).train})
    assert _quotas(config, 500, 109) == (40, 20)
    with pytest.raises(ConfigError, match=r"raise its weight or train\.steps_per_epoch$"):
        _quotas(config.model_copy(update={"data": _mixture(1.0, 1e-6).data}), 500, 109)


def test_an_epoch_of_a_mixture_is_split_by_weight_not_by_size() -> None:
    assert _quotas(_mixture(2.0, 1.0), 500, 109) == (400, 200)
    assert _quotas(_mixture(1.0, 1.0, 1.0, images_per_epoch=109), 500, 1, 1) == (34, 33, 33)
    assert _quotas(_mixture(1.0, 1e-3, images_per_epoch=1000), 5, 5) == (999, 1)


@given(
    weights=st.lists(st.floats(0.5, 100.0), min_size=2, max_size=6), steps=st.integers(200, 10**6)
)
def test_quotas_are_whole_steps_within_one_of_the_exact_share(
    weights: list[float], steps: int
) -> None:
    images = 10 * steps
    quotas = _quotas(_mixture(*weights, images_per_epoch=images + 9), *[7] * len(weights))
    assert sum(quotas) == images
    for quota, weight in zip(quotas, weights, strict=True):
        assert abs(quota - images * weight / sum(weights)) < 1 + 1e-6


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (_mixture(1.0, 1e-6), (50, 50), r"of 100 images an epoch, none would come from /s1"),
        (_mixture(1.0, 1.0), (50, 0), r"data\.train: /s1 has no images"),
        (_mixture(1.0, images_per_epoch=9), (50,), r"data\.images_per_epoch: 9 images do not fill"),
        (_mixture(1.0, subset_size=9), (50,), r"data\.subset_size: 9 images do not fill"),
        (_mixture(1.0, subset_size=51), (50,), r"subset_size: 51 images are more than the 50 in"),
        (_mixture(1.0, 1.0), (4, 5), r"data\.train: 9 images do not fill one batch of 10"),
    ],
)
def test_an_epoch_that_cannot_be_is_refused(
    config: RunConfig, sizes: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _quotas(config, *sizes)
