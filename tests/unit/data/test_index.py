import os
import pickle
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoscale.data.shards.row_table import DamagedTableError, RowTable, RowTableWriter
from dinoscale.errors import DataError

ROWS = [
    ("a.jpg", 1, -5),
    ("", 2**64 - 1, 0),
    ("caf\u00e9/\u56fe.png", 0, 2**62),
    ("\udcff.jpg", 3, 1),
]


def _write(path: Path, rows: list[tuple] = ROWS) -> RowTable:
    with RowTableWriter("Qq", str(path)) as writer:
        for row in rows:
            writer.add(*row)
        return writer.finish({"of": "test"})


def _rows(index: RowTable) -> list[tuple]:
    return [(index.name(i), *index.numbers(i)) for i in range(len(index))]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    _write(tmp_path / "a.index")
    index = RowTable(str(tmp_path / "a.index"), "Qq")
    assert index.metadata == {"of": "test"}
    assert _rows(index) == ROWS
    assert [(name, *numbers) for name, numbers in index.rows(1, 3)] == ROWS[1:3]
    assert os.listdir(tmp_path) == ["a.index"]


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 3_000_000), max_size=6), st.integers(0, 60_000))
def test_names_of_any_length_are_read_in_order(lengths: list[int], short: int) -> None:
    """Longer than one read, or many in one."""
    names = ["x" * length for length in lengths] + [f"{i}.jpg" for i in range(short)]
    with RowTableWriter("") as writer:
        for name in names:
            writer.add(name)
        index = writer.finish({})
    assert [name for name, _ in index.rows(0, len(index))] == names


def test_numbers_beyond_the_end_are_refused(tmp_path: Path) -> None:
    index = _write(tmp_path / "a.index")
    for number in (-1, 4):
        with pytest.raises(IndexError):
            index.numbers(number)
        with pytest.raises(IndexError):
            index.name(number)


def test_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    with RowTableWriter("Q", str(tmp_path / "a.index")) as writer, pytest.raises(struct.error):
        writer.add("a", -1)
    assert os.listdir(tmp_path) == []


def test_temporary_index_goes_with_its_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with RowTableWriter("") as writer:
        writer.add("a")
        index = writer.finish({})
    assert len(os.listdir(tmp_path)) == 1
    if os.fork() == 0:  # a worker's copy does not remove the file
        del index
        os._exit(0)
    os.wait()
    assert len(os.listdir(tmp_path)) == 1
    assert pickle.loads(pickle.dumps(index)).name(0) == "a"
    assert len(os.listdir(tmp_path)) == 1
    del index
    assert os.listdir(tmp_path) == []


def test_temporary_index_goes_with_its_process(tmp_path: Path) -> None:
    code = (
        "from dinoscale.data.shards.row_table import RowTableWriter\n"
        "with RowTableWriter('') as writer: index = writer.finish({})\n"
        "import os; print(len(os.listdir(os.environ['TMPDIR'])))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout == b"1\n"
    assert os.listdir(tmp_path) == []


def test_every_wrong_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.index"
    _write(path)
    data = path.read_bytes()
    blob = b"".join(os.fsencode(name) for name, *_ in ROWS)  # these alone are not summed
    names = slice(data.index(blob), data.index(blob) + len(blob))
    for place in (*range(names.start), *range(names.stop, len(data))):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :])
        with pytest.raises(DamagedTableError):
            _rows(RowTable(str(path), "Qq"))


@pytest.mark.parametrize("size", [0, 10, 59, 60, 200, -1])
def test_cut_file_is_noticed(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.index"
    _write(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedTableError, match=r"a\.index"):
        RowTable(str(path), "Qq")


def test_longer_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.index"
    _write(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(DamagedTableError):
        RowTable(str(path), "Qq")


def test_index_of_another_format_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a.index")
    with pytest.raises(DamagedTableError, match="not an index of this kind"):
        RowTable(str(tmp_path / "a.index"), "qQ")


def test_file_cut_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    index = _write(tmp_path / "a.index")
    os.truncate(tmp_path / "a.index", 70)
    with pytest.raises(DataError, match=r"is damaged\. Remove it and start again"):
        index.numbers(3)


def test_copy_of_another_process_notices_a_new_file(tmp_path: Path) -> None:
    index = _write(tmp_path / "a.index")
    packed = pickle.dumps(index)
    assert _rows(pickle.loads(packed)) == ROWS
    _write(tmp_path / "a.index", ROWS[:1])
    assert _rows(index) == ROWS
    with pytest.raises(DataError, match="has changed"):
        pickle.loads(packed)
