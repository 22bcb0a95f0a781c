"""From pictures to shards to a web server to a training that reads them over HTTP, and goes on."""

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.hostile import dinoscale, settings


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Of three shards of 32 pictures, with the manifest beside them."""
    built = dinoscale(
        "data", "synthetic", tmp_path / "shards", "--images", 32, "--size", 16,
        "--shard-bytes", "40KiB",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    last = len(list((tmp_path / "shards").glob("*.tar"))) - 1
    assert last >= 2
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "shards")
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pattern = f"{{000000..{last:06d}}}"
        yield f"http://127.0.0.1:{server.server_port}/train-{pattern}.tar"
        server.shutdown()


def _losses(run_dir: Path) -> dict[int, float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_streamed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, url: str) -> None:
    def train(run_dir: Path, *, workers: int, **more: object) -> None:
        run = settings(
            data__train=url, run_dir=run_dir, data__num_workers=workers, log__every_steps=1,
            train__epochs=2, **more,
        )  # fmt: skip
        done = dinoscale("train", "vit_t16", *run)
        assert done.returncode == 0, done.stderr
        assert "RankMe is not measured, as the training images are streamed" in done.stderr

    train(tmp_path / "whole", workers=2)
    train(tmp_path / "parts", workers=0, train__stop_after_steps=3)
    train(tmp_path / "parts", workers=4)
    whole, parts = _losses(tmp_path / "whole"), _losses(tmp_path / "parts")
    assert list(whole) == list(range(1, 9))  # two epochs of four steps of eight
    assert parts == whole
