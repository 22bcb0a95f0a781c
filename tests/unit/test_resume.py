"""What a checkpoint and the settings of its next start must agree on."""

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dinoscale.config import RunConfig, parse_config, resolve
from dinoscale.config.sections.lora import LoraConfig
from dinoscale.engine.build import InitialWeights
from dinoscale.errors import ConfigError
from dinoscale.training.resume import (
    batch_norm_caution,
    keep_micro_batch,
    koleo_caution,
    open_other_run,
    require_same_run,
    require_same_set,
)
from dinoscale.training.trainer import _begin_gram
from tests.unit.checkpoint.stored import store

A, B = {"source": "/a"}, {"source": "/b"}
URL = "https://host/{0..9}.tar"


def _config(data: dict[str, Any], **train: int) -> RunConfig:
    return parse_config({"data": data, "train": {"batch_size": 8, **train}})


def _resume(
    then: RunConfig, now: RunConfig, *, sizes: list[int], sizes_now: list[int], ranks: int = 1
) -> None:
    """Save a run and go on with it."""
    saved = SimpleNamespace(
        path=Path("step_00000004"),
        state={
            "config": then.model_dump(mode="json"),
            "plan": asdict(resolve(then, world_size=1, num_images=sizes))
            | {"source_sizes": sizes, "quotas": _quotas(then, sizes)},  # lists, as from JSON
        },
    )
    plan = resolve(now, world_size=ranks, num_images=sizes_now)
    require_same_run(saved, now, plan)  # type: ignore[arg-type] # the parts of it that are read


def _quotas(config: RunConfig, sizes: list[int]) -> list[int]:
    return list(resolve(config, world_size=1, num_images=sizes).quotas)


@pytest.mark.parametrize(
    ("then", "now", "sizes_now", "says"),
    [
        ({"train": [A, B]}, {"train": [{**A, "weight": 2}, B]}, [40, 60], "drawn from each source"),
        ({"train": [A, B]}, {"train": [A, B]}, [41, 59], "images of each source"),
        ({"train": [A, B]}, {"train": "/ab"}, [100], "images of each source"),
        ({"train": [A, B]}, {"train": [A, B], "images_per_epoch": 40}, [40, 60], "drawn from each"),
    ],
)
def test_another_mixture_is_refused(
    then: dict[str, Any], now: dict[str, Any], sizes_now: list[int], says: str
) -> None:
    _resume(_config(then), _config(then), sizes=[40, 60], sizes_now=[40, 60])
    with pytest.raises(ConfigError, match=says):
        _resume(_config(then), _config(now), sizes=[40, 60], sizes_now=sizes_now)


def test_another_mixture_of_sizes_is_refused() -> None:
    def config(*weights: float) -> RunConfig:
        sizes = [{"weight": w, "global_size": 224, "local_size": 96} for w in weights]
        train = {"train": {"batch_size": 8}, "data": {"train": "/a"}}
        return parse_config({**train, "crops": {"mixture": sizes}})

    _resume(config(0.5, 0.5), config(0.5, 0.5), sizes=[40], sizes_now=[40])
    for then, now in (([0.5, 0.5], [0.4, 0.6]), ([], [1.0]), ([1.0], [])):
        with pytest.raises(ConfigError, match=r"crops\.mixture was"):
            _resume(config(*then), config(*now), sizes=[40], sizes_now=[40])


@pytest.mark.parametrize(
    ("then", "now", "size_now", "says"),
    [
        (50, 51, 100, "images trained on was 50 .* is 51 now"),
        (50, None, 100, "images trained on was 50 .* is 100 now"),
        (50, 50, 101, "images of each source"),  # as many, but others of them
    ],
)
def test_other_distinct_images_are_refused(
    then: int, now: int | None, size_now: int, says: str
) -> None:
    first = _config({"train": "/a", "subset_size": then, "images_per_epoch": 40})
    other = _config({"train": "/a", "subset_size": now, "images_per_epoch": 40})
    _resume(first, first, sizes=[100], sizes_now=[100])
    with pytest.raises(ConfigError, match=says):
        _resume(first, other, sizes=[100], sizes_now=[size_now])


@pytest.mark.parametrize(
    ("data", "train", "says"),
    [
        ({"stream_readers": 4}, {}, "data.stream_readers was 8 .* is 4 now"),
        ({"shuffle_buffer": 64}, {}, "data.shuffle_buffer was 512"),
        ({}, {"micro_batch_size": 4}, "the size of a micro-batch was 8"),
        ({"train": "/copied"}, {}, "the size of a micro-batch was 8 .* is None now"),
    ],
)
def test_a_stream_goes_on_only_in_its_order(
    data: dict[str, Any], train: dict[str, int], says: str
) -> None:
    then = _config({"train": URL})
    sizes = {"sizes": [100], "sizes_now": [100]}
    _resume(then, _config({"train": URL, "num_workers": 3}), **sizes)
    with pytest.raises(ConfigError, match=says):
        _resume(then, _config({"train": URL, **data}, **train), **sizes)
    if data.get("train") is None:  # all of it is free where images are read in any order
        _resume(_config({"train": "/a"}), _config({"train": "/a", **data}, **train), **sizes)


def test_ranks_that_make_micro_batches_smaller_change_a_stream() -> None:
    config = _config({"train": URL})
    with pytest.raises(ConfigError, match=r"the size of a micro-batch was 8 .* is 4 now"):
        _resume(config, config, sizes=[100], sizes_now=[100], ranks=2)


def _saved(config: RunConfig, *, ranks: int) -> Any:
    plan = {"world_size": ranks, "micro_batch_size": config.train.micro_batch_size}
    state = {"config": config.model_dump(mode="json"), "plan": plan}
    return SimpleNamespace(path=Path("step_00000004"), state=state)


@pytest.mark.parametrize(
    ("then", "ranks", "kept"),
    [(4, 1, 4), (4, 2, 4), (4, 4, "auto"), (2, 4, 2)],  # of 8 images a step
)
@pytest.mark.parametrize("source", ["/a", URL])
def test_auto_keeps_the_micro_batch_of_the_checkpoint_where_it_divides(
    source: str, then: int, ranks: int, kept: int | str
) -> None:
    saved = _saved(_config({"train": source}, micro_batch_size=then), ranks=1)
    auto = parse_config(
        {"data": {"train": source}, "train": {"batch_size": 8, "micro_batch_size": "auto"}}
    )
    if source == URL and kept == "auto":
        with pytest.raises(ConfigError, match=r"4 when .* does not divide the 2 .* with 1 ranks"):
            keep_micro_batch(saved, auto, world_size=ranks)
    else:
        config = keep_micro_batch(saved, auto, world_size=ranks)
        assert config.train.micro_batch_size == kept


def test_a_given_micro_batch_wins_over_the_checkpoint() -> None:
    saved, given = _saved(_config({}), ranks=1), _config({}, micro_batch_size=2)
    assert keep_micro_batch(saved, given, world_size=1) == given


def test_other_images_of_the_same_number_are_refused() -> None:
    saved: Any = SimpleNamespace(path=Path("step_00000004"), state={"images": "a1"})
    require_same_set(saved, "a1")
    with pytest.raises(ConfigError, match=r"data\.train: .*step_00000004.*Restore the former set"):
        require_same_set(saved, "b2")
    saved.state = {}  # of a version that did not note them
    require_same_set(saved, "b2")


@pytest.mark.parametrize(
    ("micro_batch", "then", "says"),
    [
        (4, None, "over the 4 images of a micro-batch .* not over the 8 of a whole step"),
        (8, None, None),
        (4, (8, 1), "over the 4 images .* not over the 8 before this start"),
        (4, (2, 2), None),  # other ranks, and the same statistics
        (8, (4, 1), "over the 8 images"),
    ],
)
@pytest.mark.parametrize(
    "changes", [{"head": {"batch_norm": True}}, {"model": {"backbone": "resnet50"}}]
)
def test_batch_norm_over_other_images_is_said(
    micro_batch: int, then: tuple[int, int] | None, says: str | None, changes: dict[str, Any]
) -> None:
    sizes = {"train": {"batch_size": 8, "micro_batch_size": micro_batch}}
    plan_then = then and {"micro_batch_size": then[0], "world_size": then[1]}
    config = parse_config({"data": {"train": "/a"}, **sizes, **changes})
    plan = resolve(config, world_size=1, num_images=100)
    said = batch_norm_caution(config, plan, plan_then)
    assert (said is None) == (says is None)
    assert says is None or re.search(says, said or "")
    plain = parse_config({"data": {"train": "/a"}, **sizes})
    assert batch_norm_caution(plain, plan, plan_then) is None


@pytest.mark.parametrize(
    ("scope", "micro_batch", "then", "says"),
    [
        ("rank", 2, None, None),
        ("rank", 4, (4, 2), None),
        (
            "rank",
            4,
            (2, 2),
            r"among the 4 images of a micro-batch, not 2 .*train.micro_batch_size$",
        ),
        ("all", 4, (2, 2), None),
        ("all", 4, (4, 2), r"among the 4 images of a micro-batch, not 8 .* x ranks$"),
    ],
)
def test_a_resume_warns_where_koleo_has_other_images(
    scope: str, micro_batch: int, then: tuple[int, int] | None, says: str | None
) -> None:
    plan_then = then and {"micro_batch_size": then[0], "world_size": then[1]}
    sections = {
        "data": {"train": "/a"},
        "train": {"batch_size": 8, "micro_batch_size": micro_batch},
    }
    config = parse_config({**sections, "koleo": {"loss_weight": 0.1, "scope": scope}})
    plan = resolve(config, world_size=1, num_images=100)
    said = koleo_caution(config, plan, plan_then)
    assert (said is None) == (says is None)
    assert says is None or re.search(says, said or "")
    assert koleo_caution(parse_config(sections), plan, plan_then) is None


def test_an_anchor_that_was_not_there_is_refused() -> None:
    anchor = {"anchor": {"class_weight": 1.0}, "train": {"batch_size": 8, "init_from": "w.pth"}}
    now = parse_config(anchor)
    plan = resolve(now, world_size=1, num_images=40)
    state = {"config": now.model_dump(mode="json"), "plan": asdict(plan)}
    saved: Any = SimpleNamespace(path=Path("step_00000004"), state=state, has_anchor=False)
    for key in ("source_sizes", "quotas"):
        state["plan"][key] = list(state["plan"][key])  # as JSON has it
    with pytest.raises(ConfigError, match=r"^anchor.class_weight: step_00000004 has no anchor"):
        require_same_run(saved, now, plan)
    saved.has_anchor = True
    require_same_run(saved, now, plan)


def test_trained_adapters_keep_their_scale(tmp_path: Path) -> None:
    def adapted(**changes: float | str) -> RunConfig:
        source = {"continue_from": str(tmp_path)}
        lora: Any = {"rank": 4, "alpha": 8.0, **changes}
        return parse_config({"train": {"batch_size": 8, **source}, "lora": lora})

    then = adapted()
    path = store(tmp_path, 4, ranks=1, config=then.model_dump(mode="json"))
    _resume(then, then, sizes=[40], sizes_now=[40])
    sentence = r"^lora.alpha: .* with 8.0, and 16.0 would multiply .* by 2; set lora.alpha=8.0, or"
    with pytest.raises(ConfigError, match=sentence):
        _resume(then, adapted(alpha=16.0), sizes=[40], sizes_now=[40])
    with pytest.raises(ConfigError, match=f"^lora.alpha: .*train.init_from={path}$"):
        open_other_run(adapted(alpha=16.0))
    for other in (then, adapted(rank=8, alpha=16.0)):  # the stored tensors are of neither
        with pytest.raises(ConfigError, match=r"^train.continue_from: .* is of another network"):
            open_other_run(other)
    plain = parse_config({"train": {"batch_size": 8}})
    unused = plain.model_copy(update={"lora": LoraConfig(alpha=8.0)})
    _resume(plain, unused, sizes=[40], sizes_now=[40])


class _Gram:
    """A Gram network without weights, or with those of another run."""

    def __init__(self, refreshes: int | None) -> None:
        self.refreshes, self.loaded = refreshes, list[Any]()

    def load(self, weights: Any) -> None:
        self.loaded.append(weights)


def test_a_gram_network_begins_as_given_else_as_that_of_another_run_else_with_a_refresh() -> None:
    weights: Any = InitialWeights({"cls_token": torch.zeros(1)})
    plan: Any = SimpleNamespace(steps_per_epoch=1)
    for refreshes in (None, 3):
        gram: Any = _Gram(refreshes)
        _begin_gram(gram, parse_config({"gram": {"teacher": "w.pth"}}), plan, weights)
        assert gram.loaded == [weights.backbone]
    of_another: Any = _Gram(3)
    _begin_gram(of_another, parse_config({}), plan, None)
    assert (of_another.refreshes, of_another.loaded) == (0, [])  # its refreshes do not count here
    none: Any = _Gram(None)
    refreshed = {"loss_weight": 1.0, "refresh_every_steps": 5}
    _begin_gram(none, parse_config({"gram": refreshed}), plan, None)
    assert (none.refreshes, none.loaded) == (None, [])
    with pytest.raises(ConfigError, match=r"^gram.teacher: runs/first has no Gram network to go"):
        _begin_gram(none, parse_config({"train": {"continue_from": "runs/first"}}), plan, None)
    late = parse_config(
        {
            "train": {"continue_from": "runs/first"},
            "gram": {"loss_weight": 1.0, "refresh_every_steps": 100},
        }
    )
    with pytest.raises(ConfigError, match=r"^gram.loss_weight: the run ends after 100 steps"):
        _begin_gram(none, late, plan, None)
    _begin_gram(of_another, late, plan, None)
