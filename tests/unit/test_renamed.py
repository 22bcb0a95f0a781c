"""Old names of settings and metrics: refused from a user, read in what earlier versions wrote.

The files in tests/golden/old_names hold the old names.
"""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dinoscale.checkpoint.load import Checkpoint
from dinoscale.config import RunConfig, load_config, parse_config, resolve
from dinoscale.config.renamed import AXES, CARD, METRICS, SETTINGS, with_first_names
from dinoscale.config.sweep.file import load_sweep
from dinoscale.config.yaml_io import read_yaml
from dinoscale.convert.card import card_text_of, parse_card
from dinoscale.convert.conversion import recipe_of
from dinoscale.convert.run_checkpoint import card_of
from dinoscale.errors import ConfigError
from dinoscale.reports.run.read import read_record
from dinoscale.runtime.versions import versions
from dinoscale.scaling.design.run_key import key_of
from dinoscale.scaling.sweep.table import read_table
from dinoscale.training.resume import require_same_run
from tests.unit.checkpoint.stored import store

OLD = Path(__file__).parents[1] / "golden" / "old_names"
VALUES = {
    "data.color_ops_on": "workers",
    "data.subset_size": 48,
    "data.stream_readers": 4,
    "data.max_pixel_value": 4095.0,
    "engine.reduce_bucket_size": 2000,
    "engine.zero_hpz_partition_size": 2,
    "engine.stage3_max_live_parameters": 1000,
}  # in those files; none is the default
STREAM = "https://host/{0..9}.tar"


def _old_settings() -> dict[str, Any]:
    settings = read_yaml((OLD / "config.yaml").read_text())
    assert isinstance(settings, dict)
    return settings


def _renamed_values(config: RunConfig) -> dict[str, Any]:
    sections = config.model_dump()
    return {key: sections[key.split(".")[0]][key.split(".")[1]] for key in VALUES}


def test_the_files_hold_every_old_name_and_the_settings_every_new_one() -> None:
    settings = _old_settings()
    for old, new in SETTINGS.items():
        section, name = old.split(".")
        assert name in settings[section]
        assert new in VALUES
        assert new.split(".")[0] == section
    for name in METRICS:
        assert f'"{name}"' in (OLD / "metrics.jsonl").read_text()
    assert CARD.keys() <= json.loads((OLD / "card.json").read_text()).keys()


@pytest.mark.parametrize(("old", "new"), SETTINGS.items())
def test_an_old_name_from_a_user_is_refused_with_the_new_one(
    tmp_path: Path, old: str, new: str
) -> None:
    section, name = old.split(".")
    with pytest.raises(ConfigError) as caught:
        load_config("vit_s16", [f"{old}=1"])
    assert str(caught.value) == f"{old}: renamed, write {new} (command line)"
    assert caught.value.exit_code == 2
    file = tmp_path / "mine.yaml"
    file.write_text(f"defaults: [vit_s16]\n{section}:\n  {name}: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    assert str(caught.value) == f"{old}: renamed, write {new} ({file})"


def test_old_names_in_the_file_of_a_sweep_are_refused_with_the_new_ones(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "base: quickstart\nout: runs/test\nmetrics: {loss: online}\n"
        "settings: {data.lanes: 4}\naxes: {distinct_images: [0.5], data.white: [255.0]}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_sweep(file)
    assert str(caught.value).split("\n") == [
        f"{file}: settings.data.lanes: renamed, write data.stream_readers",
        f"{file}: axes.distinct_images: renamed, write subset_size",
        f"{file}: axes.data.white: renamed, write data.max_pixel_value",
    ]


@pytest.mark.parametrize(
    ("name", "mark"), [("config.yaml", "versions.json"), ("settings.yaml", "job.json")]
)
def test_the_settings_in_a_run_directory_are_read(tmp_path: Path, name: str, mark: str) -> None:
    shutil.copy(OLD / "config.yaml", tmp_path / name)
    with pytest.raises(ConfigError, match=r"data\.lanes: renamed"):
        load_config(str(tmp_path / name))
    (tmp_path / mark).write_text("{}")
    config = load_config(str(tmp_path / name), ["seed=3"])
    assert _renamed_values(config) == VALUES
    heir = tmp_path / "elsewhere" / "heir.yaml"
    heir.parent.mkdir()
    heir.write_text(f"defaults: [../{name}]\nseed: 3\n")
    assert load_config(str(heir)) == config
    heir.write_text(f"defaults: [../{name}]\ndata:\n  lanes: 4\n")
    with pytest.raises(ConfigError, match=r"data\.lanes: renamed"):
        load_config(str(heir))


def test_a_new_name_wins_over_the_old_one_beside_it() -> None:
    settings = _old_settings()
    settings["data"]["stream_readers"] = 5
    assert parse_config(settings).data.stream_readers == 5


def _checkpoint(run_dir: Path, settings: dict[str, Any]) -> Checkpoint:
    plan = resolve(parse_config(settings), world_size=2, num_images=[64])
    state = {"config": settings, "plan": asdict(plan), "versions": versions()}
    return Checkpoint(store(run_dir, 4, ranks=1, **state))


def test_a_run_goes_on_from_a_checkpoint_with_old_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = _old_settings()
    settings["data"] |= {"train": STREAM, "distinct_images": None}  # lanes are part of its order
    checkpoint, config = _checkpoint(tmp_path, settings), parse_config(settings)
    assert parse_config(checkpoint.state["config"]) == config
    plan = resolve(config, world_size=2, num_images=[64])
    with caplog.at_level(logging.WARNING):
        require_same_run(checkpoint, config, plan)
    assert "changed since" not in caplog.text
    settings["data"]["lanes"] = 5
    with pytest.raises(ConfigError, match=r"data\.stream_readers was 4 when .* and is 5 now"):
        require_same_run(checkpoint, parse_config(settings), plan)


def test_a_checkpoint_with_old_names_is_converted(tmp_path: Path) -> None:
    settings = _checkpoint(tmp_path, _old_settings()).state["config"]
    config = parse_config(settings)
    assert card_of(config, source="x").max_pixel_value == 4095.0
    recipe = recipe_of(settings)
    assert recipe is not None
    assert (recipe["data"]["subset_size"], recipe["data"]["max_pixel_value"]) == (48, 4095.0)


def test_a_card_with_the_old_name_is_read() -> None:
    text = (OLD / "card.json").read_text()
    card = parse_card(text)
    assert card.max_pixel_value == 4095.0
    assert parse_card(card.to_json()) == card
    assert '"max_pixel_value": 4095.0' in card.to_json()
    beside = card_text_of(json.loads(text) | {"to": "hf"})  # as `convert` writes it
    assert beside is not None
    assert parse_card(beside) == card


def test_a_report_joins_the_lines_with_old_and_new_names(tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(OLD / name, tmp_path)
    record = read_record(tmp_path)
    assert record.config is not None
    assert _renamed_values(record.config) == VALUES
    points = {name: [*record.series[name].points()] for name in METRICS.values()}
    assert points == {
        "target_mutual_information": [(5, 0.25), (10, 0.5), (15, 0.75)],
        "max_prototype_prob": [(5, 0.125), (10, 0.0625), (15, 0.1875)],
    }
    assert not record.damaged


def test_a_table_of_a_sweep_with_old_names_is_read_and_its_runs_keep_their_keys() -> None:
    (row,) = read_table(OLD / "results.csv")
    config = parse_config(row.config)
    assert _renamed_values(config) == VALUES
    assert row.axes == {"subset_size": 48, "data.stream_readers": 4}
    assert row.axes.keys() <= set(AXES.values())
    assert key_of(config) == row.key == "a93823d0802b8ad1"
    first = with_first_names(config.model_dump(mode="json"))
    for section, values in (_old_settings() | {"run_dir": "runs/old"}).items():
        now = first[section]
        assert now == values if not isinstance(values, dict) else now | values == now
