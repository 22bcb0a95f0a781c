import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dinoscale.data.shards.tar_headers import Member, read_members
from dinoscale.errors import DataError
from tests.unit.data.conftest import write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def _by_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path, "r:") as tar:
        return [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


def _pack(path: Path, names: list[str], *, tar_format: int, mtime: float = 0) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = number * 300
            info.mtime = mtime  # type: ignore[assignment]  # a fraction makes a pax header
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    return path


NAMES = ["a.jpg", "d/e/f.jpg", "x" * 95 + ".jpg", "d" * 90 + "/" + "x" * 60 + ".jpg"]
LONG = ["y" * 120 + ".jpg", "\u56fe/\u00e9.jpg", "\u56fe" * 100 + ".jpg", "d" * 300 + "/a.jpg"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_reads_as_the_standard_library_reads_it(tmp_path: Path, kind: str) -> None:
    names = NAMES if kind == "ustar" else NAMES + LONG + NAMES
    path = _pack(tmp_path / "a.tar", names, tar_format=FORMATS[kind], mtime=1.5)
    members = list(read_members(str(path)))
    assert members == _by_tarfile(path)
    assert [member.name for member in members] == names
    data = path.read_bytes()
    for number, member in enumerate(members):
        assert data[member.offset :][: member.size] == bytes([number]) * member.size


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=200),
        max_size=5,
    ),
    kind=st.sampled_from(["gnu", "pax"]),
)
@example(names=["<"], kind="gnu")  # was taken for a web page
def test_any_name_reads_as_the_standard_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.tar"
    _pack(path, names, tar_format=FORMATS[kind])
    assert list(read_members(str(path))) == _by_tarfile(path)


def test_folders_links_and_pipes_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("odd.jpg")
            info.type, info.linkname = kind, "z" * 150
            tar.addfile(info)
        info = tarfile.TarInfo("b.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert [m.name for m in read_members(str(path))] == ["b.jpg"]
    assert list(read_members(str(path))) == _by_tarfile(path)


def test_size_beyond_eight_gigabytes_is_read(tmp_path: Path) -> None:
    """GNU tar writes it in binary, pax in a record; the file here is mostly a hole."""
    size = 9 * 2**30
    for kind in ("gnu", "pax"):
        path = tmp_path / f"{kind}.tar"
        info = tarfile.TarInfo("big.jpg")
        info.size = size
        header = info.tobuf(format=FORMATS[kind])
        path.write_bytes(header)
        os.truncate(path, len(header) + size + 1024)
        assert list(read_members(str(path))) == [Member("big.jpg", len(header), size)]


def test_sparse_member_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "a.tar").write_bytes(info.tobuf(format=tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match=r"sparse files\. Pack it without --sparse"):
        list(read_members(str(tmp_path / "a.tar")))


def test_any_wrong_byte_of_a_header_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"abc", "b.jpg": b"abc"})
    data = path.read_bytes()
    for place in (1024, 1024 + 124, 1024 + 130, 1024 + 156, 1024 + 257, 1024 + 511):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x15]) + data[place + 1 :])
        with pytest.raises(DataError, match="no valid header at byte 1024"):
            list(read_members(str(path)))


@pytest.mark.parametrize("record", [b"9999 path=a.jpg\n", b"x path=a\n", b"0 path=a\n"])
def test_damaged_pax_header_is_noticed(tmp_path: Path, record: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    data = info.tobuf() + record.ljust(512, b"\0") + tarfile.TarInfo("a.jpg").tobuf() + bytes(1024)
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match="pax header is not valid"):
        list(read_members(str(tmp_path / "a.tar")))


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"abc"})
    before = len(os.listdir("/dev/fd"))
    list(read_members(str(path)))
    assert len(os.listdir("/dev/fd")) == before


def test_odd_shards_read_as_the_standard_library_reads_them(image_sets: Path) -> None:
    shards = sorted((image_sets / "odd-images" / "shards").glob("[!B]*.tar"))
    shards += sorted((image_sets / "davis-video").glob("*.tar"))
    shards += sorted((image_sets / "odd-images").glob("*.tar"))
    assert len(shards) >= 10
    for shard in shards:
        assert list(read_members(str(shard))) == _by_tarfile(shard)
