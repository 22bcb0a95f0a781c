"""Mixtures of sizes of crops: what they stand for, and what they cannot be."""

from pathlib import Path
from typing import Any

import pytest

from dinoscale.config import RunConfig, dump_config, load_config, phases_of
from dinoscale.errors import ConfigError

SMALL = {"weight": 0.3, "global_size": 32, "local_size": 16, "gram_crop_size": 64}
LARGE = {"weight": 0.7, "global_size": 48, "local_size": 12}
GRAM = ("gram.loss_weight=1", "gram.refresh_every_steps=2", "ibot.loss_weight=1")
_PHASES = """\
defaults: [quickstart]
gram: {loss_weight: 1, refresh_every_steps: 2, crop_size: 40}
phases:
- name: one_size
- name: mixed
  change:
    crops:
      mixture:
      - {weight: 0.5, global_size: 32, local_size: 16, gram_crop_size: 64}
      - {weight: 0.5, global_size: 48, local_size: 12}
"""


def _override(*entries: dict[str, Any]) -> str:
    items = (", ".join(f"{key}: {value}" for key, value in entry.items()) for entry in entries)
    return f"crops.mixture=[{', '.join(f'{{{item}}}' for item in items)}]"


def _sizes(config: RunConfig) -> list[tuple[int, int, int | None]]:
    runs = config.of_sizes
    return [(r.crops.global_size, r.crops.local_size, r.gram.crop_size) for r in runs]


def test_a_mixture_stands_for_runs_of_one_size_and_its_largest_one() -> None:
    config = load_config("quickstart", [_override(SMALL, LARGE), *GRAM])
    assert _sizes(config) == [(32, 16, 64), (48, 12, None)]
    assert config.size_weights == (0.3, 0.7)
    assert [run.crops.mixture for run in config.of_sizes] == [(), ()]
    assert (config.crops.global_size, config.crops.local_size) == (48, 16)
    # 2 x 32^2 + 2 x 16^2 + 2 x 64^2 pixels against 2 x 48^2 + 2 x 12^2 + 2 x 48^2
    assert config.of_largest_size == config.of_sizes[0]
    one = load_config("quickstart")
    assert (one.of_sizes, one.size_weights, one.of_largest_size) == ((one,), (1.0,), one)


def test_a_mixture_replaces_one_size_in_a_later_phase_and_is_written_and_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(_PHASES)
    config = load_config(str(path))
    one, mixed = phases_of(config)
    assert _sizes(one) == [(24, 12, 40)]
    assert _sizes(mixed) == [(32, 16, 64), (48, 12, None)]
    for run in (config, one, mixed):
        path.write_text(dump_config(run))
        assert load_config(str(path)) == run


def test_a_mixture_that_is_taken_back_needs_sizes_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "chain.yaml"
    path.write_text(_PHASES)
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text(
        f"defaults: [{path}]\ncrops: {{mixture: [{{weight: 1, global_size: 64, local_size: 8}}]}}\n"
    )
    ends = " takes back a mixture, which has replaced the sizes of crops before it; give "
    given = ["crops.mixture=[]"]
    for more in ("crops.global_size=36", "crops.local_size=20", "gram.crop_size=null"):
        with pytest.raises(ConfigError, match=f"^crops.mixture: the empty list{ends}") as refused:
            load_config(str(mixed), given)
        assert more.partition("=")[0] in str(refused.value)
        given.append(more)
    assert _sizes(load_config(str(mixed), given)) == [(36, 20, None)]
    assert _sizes(load_config(str(mixed))) == [(64, 8, None)]

    change = "{crops: {mixture: [], global_size: 48}}"
    last = tmp_path / "last.yaml"
    last.write_text(f"defaults: [{mixed}]\nphases: [{{name: last, change: {change}}}]\n")
    with pytest.raises(ConfigError) as refused:
        load_config(str(last))
    assert str(refused.value).startswith("phases.last.crops.mixture: the empty list")
    assert str(refused.value).endswith("give crops.local_size and gram.crop_size too")
    more = ["phases.last.crops.local_size=20", "phases.last.gram.crop_size=96"]
    (run,) = phases_of(load_config(str(last), more))
    assert _sizes(run) == [(48, 20, 96)]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([_override(SMALL, LARGE | {"weight": 0.6})], "mixture: the weights sum to 0.9, need 1"),
        ([_override(LARGE | {"weight": 1.000002})], "mixture: the weights sum to 1.000002, need"),
        (
            [_override(SMALL, LARGE | {"global_size": 46})],
            "mixture: item 2 of the list: global_size: 46 px is not a multiple of the patch size 4"
            " px; nearest: 44 or 48",
        ),
        ([_override(SMALL, LARGE | {"local_size": 9})], "item 2 of the list: local_size: 9 px is"),
        (
            [_override(SMALL | {"gram_crop_size": 50}, LARGE)],
            "item 1 of the list: gram_crop_size: 50 px is not a multiple of the patch size 4 px",
        ),
        (
            [_override(SMALL | {"gram_crop_size": 28}, LARGE)],
            "item 1 of the list: gram_crop_size: 28 px show the Gram network less than the student",
        ),
        (
            [_override(SMALL | {"global_size": 12}, LARGE)],
            "item 1 of the list: global_size: 12 px are 3 x 3 patches of 4 px, which are too few",
        ),
        (
            [_override(SMALL, LARGE), "crops.global_size=32"],
            "global_size: 32 px is not the largest",
        ),
        ([_override(SMALL, LARGE), "crops.local_size=8"], "local_size: 8 px is not the largest"),
        (
            [_override(SMALL, LARGE), "gram.crop_size=64"],
            "gram.crop_size: 64 px is not read with crops.mixture",
        ),
        (
            [_override(SMALL, LARGE), "gram.loss_weight=0"],
            "mixture: a gram_crop_size of 64 px is of a Gram loss, and gram.loss_weight is 0",
        ),
        ([_override(SMALL | {"weight": 0}, LARGE)], "mixture.weight: item 1 of the list needs a v"),
        ([_override({"weight": 1})], "crops.mixture.global_size: is missing"),
        (["crops.mixture=[32]"], "crops.mixture: item 1 of the list needs a mapping of keys"),
    ],
)
def test_impossible_mixtures_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("quickstart", [*GRAM, *overrides])
    assert sentence in str(refused.value)
