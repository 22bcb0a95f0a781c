"""Every change of a file since it was written is detected and named."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dinoscale.checkpoint.checksums import flushed_sum, read_sums, sha256, verify, write_sums
from dinoscale.checkpoint.layout import SUMS_FILE
from dinoscale.errors import CheckpointError

FILES = ("shard_00000.safetensors", "shared.safetensors", "state.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files and their checksums."""
    for number, name in enumerate(FILES):
        (tmp_path / name).write_bytes(bytes([number]) * 3_000_000)
    write_sums(tmp_path, {name: sha256(tmp_path / name) for name in FILES})
    return tmp_path


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "bit flipped": _flip_bit,
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


def test_untouched_files_pass_and_are_counted(folder: Path) -> None:
    assert verify(folder) == 9_000_000
    assert sum(verify(folder, share=share, num_shares=2) for share in (0, 1)) == 9_000_000


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_named(folder: Path, name: str, damage: str) -> None:
    DAMAGES[damage](folder / name)
    with pytest.raises(CheckpointError, match=f"is damaged: {name}"):
        verify(folder)


def test_list_cut_between_two_lines_is_damaged(folder: Path) -> None:
    lines = (folder / SUMS_FILE).read_text().splitlines(keepends=True)
    (folder / SUMS_FILE).write_text("".join(lines[:-1]))
    with pytest.raises(CheckpointError, match="its end is missing"):
        verify(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_list_is_named(folder: Path, damage: str) -> None:
    DAMAGES[damage](folder / SUMS_FILE)
    with pytest.raises(CheckpointError, match=r"damaged|not a complete"):
        verify(folder)


def test_each_share_finds_its_own_damage_only(folder: Path) -> None:
    (folder / FILES[1]).write_bytes(b"")
    verify(folder, share=0, num_shares=2)
    with pytest.raises(CheckpointError, match=FILES[1]):
        verify(folder, share=1, num_shares=2)


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "a/b", ""])
def test_list_cannot_point_outside(folder: Path, name: str) -> None:
    (folder / SUMS_FILE).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_sums(folder)


def test_sha256sum_agrees(folder: Path) -> None:
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", SUMS_FILE], cwd=folder, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_comparing_and_flushing_a_large_file_signal_activity(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[str] = []
    verify(folder, heartbeat=lambda: signs.append("read"))
    assert len(signs) == 9  # of three files, three each
    monkeypatch.setattr("dinoscale.checkpoint.checksums._FLUSHED_BYTES", 1 << 20)
    path = folder / FILES[0]
    assert flushed_sum(path, lambda: signs.append("flushed")) == sha256(path)
    assert signs.count("flushed") == 3 + 3
