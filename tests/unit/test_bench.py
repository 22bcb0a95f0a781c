"""`bench data` measures every part of a run's input and names the one that limits."""

import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinoscale import cli
from dinoscale.config import load_config
from dinoscale.errors import ConfigError, DataError
from dinoscale.planning.bench.busy import busy
from dinoscale.planning.bench.data import Rates, as_text, bench_data, limit
from dinoscale.runtime.cores import available_cores, parse_quota

_SET = "data.train=synthetic:shapes?images=40&size=32"


def test_the_command_measures_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(
        [
            "bench",
            "data",
            "quickstart",
            _SET,
            "data.num_workers=1",
            "--seconds",
            "0.05",
            "--gpu-images-per-s",
            "1e6",
        ]
    )
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    rates = result["images_per_s"]
    assert rates.pop("transfer") is None
    assert set(rates) == {"read_decode", "crops", "worker", "device", "loader"}
    assert all(rate > 0 for rate in rates.values())
    needed = 1e6 / rates["worker"]
    assert needed * 0.99 <= result["workers_for_one_gpu"] <= needed * 1.01 + 1
    assert result["micro_batch_size"] == 16  # of 64, on a CPU
    assert printed.err.startswith("measuring batches of 16 images: about ")
    assert "crops: " in printed.err
    assert "limit: " in printed.err
    assert "a GPU that trains 1e+06 images/s needs" in printed.err


def _rates(**changes: float) -> Rates:
    rates = {"read_decode": 300.0, "crops": 150.0, "worker": 100.0, "device": 1000.0}
    return Rates(**{**rates, "transfer": 5000.0, "loader": 390.0, **changes})


def test_the_slowest_part_is_the_limit_and_cores_bound_the_workers() -> None:
    assert limit(_rates(), num_workers=4, cores=16) == "workers"
    assert limit(_rates(), num_workers=16, cores=16) == "device"
    assert limit(_rates(), num_workers=16, cores=8) == "workers"
    assert limit(_rates(), num_workers=0, cores=8) == "workers"
    assert limit(_rates(transfer=50.0), num_workers=4, cores=16) == "transfer"


def _said(rates: Rates, *, num_workers: int) -> str:
    facts = {
        "cores": 16,
        "num_workers": num_workers,
        "device": "cuda",
        "limit": limit(rates, num_workers=num_workers, cores=16),
        "gpu_images_per_s": 2000.0,
        "workers_for_one_gpu": 20,
    }
    return as_text(rates, facts)


def test_other_cores_are_busy_while_one_is_measured(tmp_path: Path) -> None:
    def work(seed: int) -> Iterator[None]:
        while True:
            (tmp_path / str(seed)).open("a").write(".")
            yield

    with busy(work, others=3):
        assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3"}  # all have begun
        sizes = [path.stat().st_size for path in tmp_path.iterdir()]
        deadline = time.monotonic() + 60
        while min(path.stat().st_size for path in tmp_path.iterdir()) <= max(sizes):
            assert time.monotonic() < deadline
    assert multiprocessing.active_children() == []


def test_rates_of_workers_are_those_of_busy_cores(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("quickstart", [_SET, "data.num_workers=0"])
    rates = []
    most = 3 * available_cores()  # more than there are: each gets a share of one
    for cores in (1, most):
        monkeypatch.setattr(
            "dinoscale.planning.bench.data.available_cores", lambda cores=cores: cores
        )
        result = bench_data(config, gpu_images_per_s=1.0, seconds=0.3)
        rates.append(result["images_per_s"]["worker"])
    assert f"with all {most} available cores busy" in capsys.readouterr().err
    assert rates[1] < 0.8 * rates[0]


def test_words_name_the_remedy() -> None:
    text = _said(_rates(), num_workers=4)
    assert "raise data.num_workers" in text
    assert "67% of a worker's time is cutting crops" in text
    assert "16 available cores can feed 1600 images/s, 0.8 such GPUs" in text
    assert "transfer and device part take 240.0% of the time of such a GPU" in text
    assert "wait for the disk" not in text
    assert "wait for the disk" in _said(_rates(loader=200.0), num_workers=4)
    assert "shards instead of single files" in _said(_rates(crops=900.0), num_workers=4)
    assert "more data workers would not help" in _said(_rates(), num_workers=16)


@pytest.mark.parametrize(
    ("rate", "seconds"), [(0.0, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (1.0, 0.0)]
)
def test_numbers_out_of_range_are_refused(rate: float, seconds: float) -> None:
    with pytest.raises(ConfigError, match="--gpu-images-per-s"):
        bench_data(load_config("quickstart", [_SET]), gpu_images_per_s=rate, seconds=seconds)


def test_unreadable_images_end_the_measurement(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    config = load_config("quickstart", [f"data.train={tmp_path}"])
    with pytest.raises(DataError, match="can be read"):
        bench_data(config, gpu_images_per_s=1.0, seconds=0.1)


def test_quota_of_a_container_is_read() -> None:
    assert parse_quota("max 100000\n") is None
    assert parse_quota("150000 100000\n") == 1.5
