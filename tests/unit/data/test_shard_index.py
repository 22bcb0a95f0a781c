import fcntl
import logging
import multiprocessing
import os
import random
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import synchronize
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoscale.data.cache_folder import locked
from dinoscale.data.decoding.decode import BadSampleError
from dinoscale.data.shards.shard_index import (
    Part,
    Shard,
    _in_shard_order,
    _make_part,
    _scan,
    _shard_state,
    make_parts,
    open_shard_index,
    parts_of,
)
from dinoscale.data.shards.tar_source import TarSource
from dinoscale.errors import DataError
from tests.unit.data.conftest import jpeg, write_tar


class Bytes:
    """A decoder that decodes nothing."""

    def open(self, data: bytes, path: str) -> tuple[bytes, str]:
        return data, path.rpartition("::")[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that the first use makes."""
    folder = tmp_path / "new" / "cache"
    monkeypatch.setenv("DINOSCALE_CACHE", str(folder))
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Three shards of one, two and three images."""
    return [
        str(write_tar(tmp_path / f"{i}.tar", {f"{i}-{j}.jpg": jpeg(j) for j in range(i + 1)}))
        for i in range(3)
    ]


def _read(source: TarSource) -> list[tuple[bytes, str]]:
    return [source.picture(i) for i in range(len(source))]


def _index_file(cache: Path) -> Path:
    (path,) = cache.glob("*.index")
    return path


NAMES = st.from_regex(r"([abc]/)?[a-d]{1,3}", fullmatch=True)


@settings(deadline=None, max_examples=60)
@given(
    contents=st.lists(
        st.dictionaries(
            st.tuples(NAMES, st.sampled_from(["jpg", "cls", "json"])), st.integers(0, 2000)
        ),
        min_size=1,
        max_size=4,
    ),
    kind=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    data=st.data(),
)
def test_index_gives_what_reading_the_tars_gives(
    contents: list[dict[tuple[str, str], int]], kind: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths, expected = [], []
        for number, sizes in enumerate(contents):
            paths.append(os.path.join(folder, f"{number}.tar"))
            members = data.draw(st.permutations(list(sizes)))
            with tarfile.open(paths[-1], "w", format=kind) as tar:
                for key, extension in members:
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = sizes[key, extension]
                    seeded = random.Random(f"{number}{key}{extension}")
                    with tempfile.TemporaryFile() as file:
                        file.write(seeded.randbytes(info.size))
                        file.seek(0)
                        tar.addfile(info, file)
            with tarfile.open(paths[-1], "r:") as tar:
                keys = dict.fromkeys(name.rpartition(".")[0] for name in tar.getnames())
                pictures = [f"{key}.jpg" for key in keys if (key, "jpg") in sizes]
                expected += [(tar.extractfile(name).read(), name) for name in pictures]  # type: ignore[union-attr]  # plain files
        if not expected:
            with pytest.raises(DataError, match="no images"):
                TarSource(paths)
            return
        for _ in range(2):  # scanned, then from the cache
            assert _read(TarSource(paths, Bytes())) == expected


def test_second_opening_reads_no_headers(
    cache: Path, shards: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        first = _read(TarSource(shards, Bytes()))
        assert "reading the headers of 3 of 3 shards" in caplog.text
        caplog.clear()
        assert _read(TarSource(shards, Bytes())) == first
        assert "reading the headers" not in caplog.text
        assert "6 images" in caplog.text
    assert len(list(cache.iterdir())) == 2  # the index and its lock


def test_only_a_changed_shard_is_scanned_again(
    cache: Path, shards: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = _read(TarSource(shards, Bytes()))
    write_tar(Path(shards[1]), {"new.jpg": b"new", "new.cls": b"3"})
    with caplog.at_level(logging.INFO):
        source = TarSource(shards, Bytes())
    assert "reading the headers of 1 of 3 shards" in caplog.text
    assert _read(source) == [before[0], (b"new", "new.jpg"), *before[3:]]
    assert source.labels.tolist() == [-1, 3, -1, -1, -1]
    _index_file(cache)  # still one


def test_only_a_few_scanned_shards_wait_in_memory() -> None:
    taken = []

    def shards() -> Iterator[Shard]:
        for number in range(1000):
            taken.append(number)
            yield Shard(str(number), 0, 0)

    with ThreadPoolExecutor(8) as pool:
        results = _in_shard_order(lambda shard: (shard, []), shards(), pool)
        assert [next(results)[0].path for _ in range(100)] == [str(i) for i in range(100)]
        assert len(taken) < 150


def _many(folder: Path) -> list[str]:
    """Forty shards of one image, three parts of an index."""
    return [str(write_tar(folder / f"{i:02}.tar", {f"{i}.jpg": b"%d" % i})) for i in range(40)]


def test_many_shards_are_indexed_in_parts_by_processes(cache: Path, tmp_path: Path) -> None:
    paths = _many(tmp_path)
    index, shards = open_shard_index(paths, num_processes=2)
    assert [name for name, _ in index.rows(0, 40)] == [f"{i}.jpg" for i in range(40)]
    assert [shard.path for shard in shards] == paths
    assert len(list(cache.iterdir())) == 2  # the index and its lock


def test_reading_shards_calls_alive(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(shard: Shard) -> object:
        time.sleep(0.02)
        return _scan(shard)

    monkeypatch.setattr("dinoscale.data.shards.shard_index._scan", slowly)
    monkeypatch.setattr("dinoscale.data.shards.shard_index._POLL_S", 0.01)
    path, signs = str(cache / "x.index"), []
    cache.mkdir(parents=True)
    parts = parts_of(path, list(map(_shard_state, _many(tmp_path))), ())
    make_parts(parts, path, lambda: signs.append(1), num_processes=1, before=None)
    assert 10 < len(signs) <= 43  # not one a part, and none without a shard or part


def test_index_that_another_process_makes_meanwhile_leaves_no_parts(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = _many(tmp_path)

    def overtaken(*args: Any) -> list[Part]:
        monkeypatch.setattr("dinoscale.data.shards.shard_index.parts_of", parts_of)
        open_shard_index(paths, num_processes=1)  # as another process might now
        monkeypatch.setattr(
            "dinoscale.data.shards.shard_index._make_part", None
        )  # nothing to be made
        parts = parts_of(*args)
        Path(parts[0].path).touch()  # begun too late
        return parts

    monkeypatch.setattr("dinoscale.data.shards.shard_index.parts_of", overtaken)
    index, _ = open_shard_index(paths, num_processes=1)
    assert len(index) == 40
    assert len(list(cache.iterdir())) == 2  # the index and its lock


def test_parts_of_an_interrupted_start_are_used_again(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = _many(tmp_path)
    whole = Path(paths[39]).read_bytes()
    Path(paths[39]).write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"39\.tar is damaged"):
        open_shard_index(paths, num_processes=1)
    Path(paths[39]).write_bytes(whole)
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*.part")}
    assert len(kept) == 2
    with caplog.at_level(logging.INFO):
        index, _ = open_shard_index(paths, num_processes=1)
    assert "2 of 3 parts of the index are there already" in caplog.text
    assert "reading the headers of 0 of 40 shards" in caplog.text
    assert [name for name, _ in index.rows(0, 40)] == [f"{i}.jpg" for i in range(40)]
    assert not list(cache.glob("*.part*"))


def test_a_part_that_another_process_makes_is_left_to_it(cache: Path, tmp_path: Path) -> None:
    first, second, _ = parts_of(
        str(cache / "x.index"), list(map(_shard_state, _many(tmp_path))), ()
    )
    cache.mkdir(parents=True)
    with open(f"{first.path}.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert (_make_part(first), _make_part(second)) == (False, True)
    assert _make_part(first)


def test_waiting_for_a_lock_calls_alive(tmp_path: Path) -> None:
    path, signs = str(tmp_path / "index"), []
    with open(f"{path}.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def heartbeat() -> None:
            signs.append(1)
            if len(signs) == 2:
                fcntl.flock(other, fcntl.LOCK_UN)

        with locked(path, heartbeat):
            assert len(signs) == 2


def test_order_of_the_shards_is_another_set(cache: Path, shards: list[str]) -> None:
    forward, backward = TarSource(shards, Bytes()), TarSource(shards[::-1], Bytes())
    assert sorted(_read(forward)) == sorted(_read(backward))
    assert _read(backward)[0] == _read(forward)[3]
    assert len(list(cache.glob("*.index"))) == 2


def _garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _tables_byte(path: Path) -> None:
    data = path.read_bytes()
    place = data.index(b'"num_images": 2') + 14
    path.write_bytes(data[:place] + b"1" + data[place + 1 :])


def _of_older_version(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"dinoscale-index1", b"dinoscale-index0"))


@pytest.mark.parametrize("damage", [_garbage, _cut, _emptied, _tables_byte, _of_older_version])
def test_damaged_index_is_made_anew(
    cache: Path,
    shards: list[str],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
) -> None:
    expected = _read(TarSource(shards, Bytes()))
    damage(_index_file(cache))
    with caplog.at_level(logging.WARNING):
        assert _read(TarSource(shards, Bytes())) == expected
    assert "the shards are scanned again" in caplog.text
    caplog.clear()
    assert _read(TarSource(shards, Bytes())) == expected
    assert not caplog.records


def test_index_of_other_shards_is_not_used(cache: Path, shards: list[str], tmp_path: Path) -> None:
    expected = _read(TarSource(shards, Bytes()))
    ours = _index_file(cache)
    other = [str(write_tar(tmp_path / f"o{i}.tar", {"x.jpg": b"other"})) for i in range(3)]
    TarSource(other)
    (theirs,) = set(cache.glob("*.index")) - {ours}
    shutil.copy(theirs, ours)
    assert _read(TarSource(shards, Bytes())) == expected


def test_damaged_row_stops_the_run(cache: Path, shards: list[str]) -> None:
    TarSource(shards)
    path = _index_file(cache)
    data = bytearray(path.read_bytes())
    data[60 + 3 * 36 + 9] ^= 1  # the offset in the fourth row
    path.write_bytes(data)
    source = TarSource(shards, Bytes())
    source.picture(1)
    with pytest.raises(DataError, match=r"is damaged\. Remove it and start again") as caught:
        source.picture(3)
    assert not isinstance(caught.value, BadSampleError)  # not to be replaced by another image


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("same size, other time", "the shard has changed since it was indexed"),
        ("longer", "the shard has changed since it was indexed"),
        ("shorter", "the shard has become shorter since it was indexed"),
        ("another file", "the shard has changed since it was indexed"),
        ("a folder", "Is a directory"),
        ("a pipe", "cannot be read"),
        ("gone", "No such file"),
    ],
)
@pytest.mark.parametrize("opened", [True, False])
def test_shard_that_changes_gives_bad_samples(
    shards: list[str], change: str, message: str, opened: bool
) -> None:
    source = TarSource(shards, Bytes())
    path, size = Path(shards[2]), os.path.getsize(shards[2])
    if opened:
        source.picture(3)
    replaced = change in ("another file", "a folder", "a pipe", "gone")
    if change == "same size, other time":
        path.write_bytes(b"\0" * size)
        os.utime(path, ns=(0, 0))
    elif change == "longer":
        path.write_bytes(path.read_bytes() + bytes(10240))
    elif change == "shorter":
        os.truncate(path, size - 10)
    else:
        path.unlink()
    if change == "another file":
        write_tar(path, {"other.jpg": b"x" * 5000})
    elif change == "a folder":
        path.mkdir()
    elif change == "a pipe":
        os.mkfifo(path)
    if replaced and opened:
        source.picture(3)  # the old file is still there for this process
        return
    with pytest.raises(BadSampleError, match=message):
        source.picture(3)
    source.picture(0)


def _open_together(
    start: synchronize.Barrier, paths: list[str], results: "multiprocessing.Queue[tuple[int, int]]"
) -> None:
    start.wait()
    source = TarSource(paths, Bytes())
    results.put((os.fstat(source._index._descriptor).st_ino, len(source)))


def test_one_process_of_many_scans(cache: Path, tmp_path: Path) -> None:
    members = {f"{i}.jpg": b"x" for i in range(3000)}
    paths = [str(write_tar(tmp_path / f"{i}.tar", members)) for i in range(2)]
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(4), fork.Queue()
    processes = [
        fork.Process(target=_open_together, args=(start, paths, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = {results.get(timeout=200) for _ in processes}
    for process in processes:
        process.join()
    assert found == {(_index_file(cache).stat().st_ino, 6000)}  # the same file for all
    assert not list(cache.glob("*.partial"))


def test_what_a_killed_process_left_is_removed(cache: Path, shards: list[str]) -> None:
    TarSource(shards)
    index = _index_file(cache)
    old, young = (cache / f"{index.name}.{part}.partial" for part in ("old", "young"))
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    index.unlink()
    TarSource(shards)
    assert (old.exists(), young.exists()) == (False, True)


def test_file_system_without_locks_is_no_obstacle(
    cache: Path, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert len(TarSource(shards)) == len(TarSource(shards)) == 6
    _index_file(cache)


def test_without_a_writable_cache_the_index_is_temporary(
    shards: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("DINOSCALE_CACHE", "/proc/none")
    with caplog.at_level(logging.WARNING):
        source = TarSource(shards, Bytes())
    assert "Set DINOSCALE_CACHE to a folder that can be written" in caplog.text
    assert len(_read(source)) == 6
    assert len(os.listdir(temporary)) == 1
    del source
    assert os.listdir(temporary) == []
    temporary.rmdir()
    with pytest.raises(DataError, match="Set DINOSCALE_CACHE or TMPDIR to a folder with room"):
        TarSource(shards)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"DINOSCALE_CACHE": "{tmp}/own", "XDG_CACHE_HOME": "{tmp}/xdg"}, "own"),
        ({"DINOSCALE_CACHE": "", "XDG_CACHE_HOME": "{tmp}/xdg"}, "xdg/dinoscale"),
        ({"DINOSCALE_CACHE": "", "XDG_CACHE_HOME": "relative"}, ".cache/dinoscale"),
        ({"DINOSCALE_CACHE": "", "XDG_CACHE_HOME": ""}, ".cache/dinoscale"),
    ],
)
def test_cache_folder_is_where_the_environment_says(
    shards: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    place: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    TarSource(shards)
    _index_file(tmp_path / place)


def test_pipe_in_place_of_a_shard_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar: it is not a plain file"):
        TarSource([str(tmp_path / "a.tar")])
