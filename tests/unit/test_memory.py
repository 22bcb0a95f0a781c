"""Memory: available, read from the files of a fake kernel, and used."""

import subprocess
import sys
from pathlib import Path

import pytest

from dinoscale.runtime.memory import available_memory, peak_resident_bytes

MIB = 2**20


def _kernel(folder: Path, groups: str, **files: str) -> tuple[Path, Path]:
    """/proc and /sys/fs/cgroup of a machine with 1000 MiB available."""
    contents = {
        "proc/meminfo": f"MemTotal: 9999999 kB\nMemAvailable: {1000 * 1024} kB\nBuffers: 1 kB\n",
        "proc/self/cgroup": groups,
        **{f"cgroup/{name.replace('__', '/')}": text for name, text in files.items()},
    }
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "proc", folder / "cgroup"


def _group(path: str, *, limit: str, usage: int, cached: int, old: bool = False) -> dict[str, str]:
    names = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
    return {
        f"{path}memory.{names[0]}": limit,
        f"{path}memory.{names[1]}": f"{usage}\n",
        f"{path}memory.stat": f"anon 5\ninactive_file {cached}\nactive_file 7\n",
    }


@pytest.mark.parametrize(
    ("groups", "files", "mib"),
    [
        ("", {}, 1000),
        ("0::/\n", _group("", limit=f"{300 * MIB}\n", usage=100 * MIB, cached=50 * MIB), 250),
        ("0::/\n", _group("", limit="max\n", usage=100 * MIB, cached=0), 1000),
        ("0::/\n", _group("", limit=f"{100 * MIB}\n", usage=120 * MIB, cached=0), 0),
        ("0::/\n", _group("", limit=f"{5000 * MIB}\n", usage=0, cached=0), 1000),
        (
            "0::/job/step\n",  # the step has no limit, the job around it has
            _group("job/step/", limit="max\n", usage=1, cached=0)
            | _group("job/", limit=f"{70 * MIB}\n", usage=0, cached=0),
            70,
        ),
        (
            "4:memory:/job\n3:cpu:/job\n0::/\n",
            _group("memory/job/", limit=f"{90 * MIB}\n", usage=0, cached=0, old=True),
            90,
        ),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, groups: str, files: dict[str, str], mib: int
) -> None:
    assert available_memory(*_kernel(tmp_path, groups, **files)) == mib * MIB


def test_a_system_without_proc_is_not_known(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) is None


def test_this_machine_has_memory() -> None:
    assert (available_memory() or 0) > 10 * MIB


def test_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    held = b"1" * (300 * MIB)
    assert peak_resident_bytes() >= len(held)
    code = (
        "from dinoscale.runtime.memory import peak_resident_bytes as peak;"
        "before = peak(); held = b'1' * 2**26; print(before, peak())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split())
    assert before < 200 * MIB
    assert abs(after - before - 2**26) < 2**23


def test_peak_is_measured_where_there_is_no_procfs(tmp_path: Path) -> None:
    assert 0.9 < peak_resident_bytes(tmp_path) / peak_resident_bytes() < 100
