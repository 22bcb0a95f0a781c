"""configs/README.md: every setting, as the schema has it today."""

import re
import runpy
from pathlib import Path

import pytest

from dinoscale.config import load_config, phases_of
from dinoscale.config.mistakes import sections
from dinoscale.config.reference import reference
from dinoscale.config.schema import RunConfig

README = Path(__file__).resolve().parents[3] / "configs" / "README.md"
COMMAND = "python -m dinoscale.config.reference > configs/README.md"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_reference_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("dinoscale.config.reference", run_name="__main__")
    written = README.read_text(encoding="utf-8")
    assert capsys.readouterr().out == written, f"run: {COMMAND}"
    assert COMMAND in written


def test_every_setting_has_a_row() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| .+ \|$", reference(), re.MULTILINE)
    parts = sections()
    leaves = [f"{name}.{key}" for name, part in parts.items() for key in part.model_fields]
    assert set(rows) >= {*leaves, *(RunConfig.model_fields.keys() - parts.keys())}


@pytest.mark.parametrize(
    "row",
    [
        "| `crops.local_scale` | list of 2 numbers | `[0.05, 0.4]` | Area of a local crop.",
        "| `model.drop_path_rate` | number in [0, 1) | `0.1` |",
        "| `dino.momentum` | number in (0, 1] | `0.996` |",
        "| `data.std` | list of numbers > 0 | `[0.229, 0.224, 0.225]` |",
        "| `data.train` | text or list of mappings of source and weight or `null` | `null` |",
        "| `engine.compile` | `auto`, `true`, `false` | `auto` |",
        "| `train.micro_batch_size` | integer >= 1 or `auto` | `64` |",
    ],
)
def test_values_are_told_in_words(row: str) -> None:
    assert f"\n{row}" in reference()


def test_the_files_in_the_head_are_some(tmp_path: Path) -> None:
    found = re.findall(r"```yaml\n(.*?)```", reference(), re.DOTALL)
    inherited, phases, mixed, distilled, followed = found
    path = tmp_path / "run.yaml"
    path.write_text(inherited)
    config = load_config(str(path), ["optim.lr=1e-3", "eval.train=null"])
    assert (config.train.epochs, config.data.train) == (300, "/data/images")
    path.write_text(phases)
    config = load_config(str(path), ["phases.high_resolution.train.epochs=4"])
    assert [run.crops.global_size for run in phases_of(config)] == [224, 416]
    path.write_text(mixed)
    runs = load_config(str(path)).of_sizes
    assert [(run.crops.global_size, run.gram.crop_size) for run in runs] == [
        (512, 768),
        (768, 1152),
    ]
    path.write_text(distilled)
    config = load_config(str(path))
    assert config.of_teacher.model == load_config("dinov2_vitl14").model.model_copy(
        update={
            key: getattr(config.of_teacher.model, key)
            for key in ("drop_path_rate", "drop_path_uniform", "drop_path_mode")  # not read
        }
    )
    heads = [config.of_teacher.head, config.of_teacher.patch_head]
    assert heads == [load_config("dinov2_vitl14").head, load_config("dinov2_vitl14").patch_head]
    assert (config.ibot.masked_share, config.model.drop_path_rate) == (1, 0)
    assert (config.dino.teacher_temp, config.dino.warmup_teacher_temp_epochs) == (0.07, 0)
    path.write_text(followed)
    config = load_config(str(path))
    assert (config.has_heads, config.of_teacher.model.width) == (False, 1024)
