"""Memory of a process that reads images does not grow with their number."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from dinoscale.data.shards.tar_source import TarSource
from tests.unit.data.conftest import jpeg, write_tar

_ROW = struct.Struct("<QQQqI")  # where the name begins, offset, size, label, CRC-32
_HEADER = struct.Struct("<16s16sQQQI")
_READS = 2000

# In a process of its own: what else the tests have loaded would hide what is looked for.
_WORKER = """
import json, os, sys
from dinoscale.data.shards.tar_source import TarSource

def memory(pid):
    lines = (line.split() for line in open(f"/proc/{pid}/status"))
    return {line[0]: int(line[1]) for line in lines if line[0] in ("VmRSS:", "VmHWM:")}

source = TarSource([sys.argv[1]])
numbers = json.loads(sys.stdin.read())
opened = memory("self")
receive, send = os.pipe()
if os.fork() == 0:
    for number in numbers:
        assert source.picture(number).pixels().shape == (30, 40, 3)
    os.write(send, json.dumps(memory("self")).encode())
    os._exit(0)
worker = json.loads(os.read(receive, 4096))
print(json.dumps({"images": len(source), "opened": opened, "worker": worker}))
"""


def _grow_index(path: Path, *, num_rows: int, written: list[int]) -> None:
    """Make an index of one image an index of many, mostly a hole in the file.

    All rows are the one image; those between the written ones are never read.
    """
    data = path.read_bytes()
    magic, numbers, _, names_bytes, about_bytes, _ = _HEADER.unpack_from(data)
    row = data[_HEADER.size : _HEADER.size + _ROW.size]
    about = json.loads(data[-about_bytes:])
    about["shards"][0]["num_images"] = num_rows
    encoded = json.dumps(about).encode()
    header = _HEADER.pack(magic, numbers, num_rows, names_bytes, len(encoded), 0)[:-4]
    with path.open("wb") as file:
        file.write(header + struct.pack("<I", zlib.crc32(encoded, zlib.crc32(header))))
        for number in written:
            file.seek(_HEADER.size + number * _ROW.size)
            file.write(row + row)  # the second says where the name of the first ends
        file.seek(_HEADER.size + (num_rows + 1) * _ROW.size)
        file.write(data[len(data) - about_bytes - names_bytes : len(data) - about_bytes] + encoded)


def _memory(folder: Path, *, num_rows: int) -> dict[str, dict[str, int]]:
    """Memory of a forked worker in KiB after many random reads, now and at its peak."""
    folder.mkdir()
    shard = str(write_tar(folder / "a.tar", {"a.jpg": jpeg(0)}))
    environment = {**os.environ, "DINOSCALE_CACHE": str(folder / "cache")}
    os.environ["DINOSCALE_CACHE"] = environment["DINOSCALE_CACHE"]
    TarSource([shard])
    (index,) = (folder / "cache").glob("*.index")
    written = np.random.default_rng(0).integers(num_rows, size=_READS).tolist()
    _grow_index(index, num_rows=num_rows, written=written)
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, shard],
        input=json.dumps(written), env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    index.unlink()
    found = json.loads(done.stdout)
    assert found["images"] == num_rows
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fifty_million_images_need_the_memory_of_ten_thousand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOSCALE_CACHE", "")  # set back afterwards
    few = _memory(tmp_path / "few", num_rows=10_000)
    many = _memory(tmp_path / "many", num_rows=50_000_000)
    for process in ("opened", "worker"):
        for figure in ("VmRSS:", "VmHWM:"):
            assert many[process][figure] < 1.1 * few[process][figure], (process, figure)
