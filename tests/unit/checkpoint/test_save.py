"""How a save ends where the writing fails."""

from pathlib import Path

import torch

from dinoscale.checkpoint.retention import Keep
from dinoscale.checkpoint.save import Saver, _Snapshot


def test_error_of_any_kind_is_reported_since_others_wait_for_the_report(tmp_path: Path) -> None:
    no_dense_tensor = torch.zeros(2).to_sparse()  # an error that is neither a file's nor a disk's
    files = {"shard_00000.safetensors": {"weight": no_dense_tensor}}
    saver = Saver(tmp_path, Keep(last=1))
    result = saver._write(_Snapshot(1, 0, files, {}, {}), stall_s=0.0)
    assert result.error is not None
    assert result.error.startswith("rank 0 cannot write")
    assert not list((tmp_path / "checkpoints").iterdir())
