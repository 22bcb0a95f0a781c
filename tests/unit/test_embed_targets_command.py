"""What `dinoscale embed --targets` takes for a setting, and what for the folder."""

import argparse
from typing import Any

import pytest

from dinoscale.cli import embed, run


@pytest.mark.parametrize("setting", ["data.train=https://me:secret@host", "seed=3", "phase=large"])
def test_a_setting_is_not_the_folder(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["embed", "--targets", "vit_s16", setting, "train.epochs=2"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    key = setting.partition("=")[0]
    assert f"needs CONFIG OUT before settings, and in place of OUT is the setting {key}=..." in said
    assert "secret" not in said


@pytest.mark.parametrize("out", ["targets/", "./seed=3", "/data/seed=3", "targets-1"])
def test_a_folder_may_have_any_name(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[argparse.Namespace] = []

    def stop(named: argparse.Namespace, _: Any) -> Any:
        taken.append(named)
        raise KeyError

    monkeypatch.setattr(embed, "load_and_import", stop)
    with pytest.raises(KeyError):
        run(["embed", "--targets", "vit_s16", out, "seed=3"])
    assert taken[0].overrides == ["seed=3"]
