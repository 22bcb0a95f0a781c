import logging
from pathlib import Path

import pytest

from dinoscale.data.sources.classes import read_classes
from dinoscale.data.sources.source import Source, open_source
from dinoscale.errors import DataError, UnavailableError
from dinoscale.evaluate import overlap
from dinoscale.evaluate.classification.labelled_sets import renumber_classes
from dinoscale.evaluate.overlap import equal_pictures, first_of_equals
from tests.unit.data.conftest import jpeg, write_tar

PICTURE = jpeg(0)


def _folder(root: Path, *classes: str, listed: str | None = None) -> Source:
    for name in classes:
        (root / name).mkdir(parents=True)
        (root / name / "1.jpg").write_bytes(PICTURE)
    if listed is not None:
        (root / "classes.txt").write_text(listed, encoding="utf-8")
    return open_source(str(root))


def _shards(root: Path, *numbers: int, listed: str | None = None) -> Source:
    root.mkdir()
    members = [(f"{i}.{kind}", value) for i, number in enumerate(numbers)
               for kind, value in (("jpg", PICTURE), ("cls", b"%d" % number))]  # fmt: skip
    write_tar(root / "a.tar", members)
    if listed is not None:
        (root / "classes.txt").write_text(listed, encoding="utf-8")
    return open_source(str(root))


def _joined(train: Source, test: Source) -> list[int]:
    return renumber_classes(train, test).tolist()


def test_folders_named_by_numbers_are_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    source = _folder(tmp_path / "a", "10", "2", "0")
    assert source.class_names == ["0", "2", "10"]
    assert source.labels.tolist() == [0, 2, 1]  # type: ignore[union-attr]  # there are labels


def test_folders_named_by_numbers_join_numbers_as_integers(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", *map(str, range(11)))
    shards = _shards(tmp_path / "b", *range(11))
    padded = _folder(tmp_path / "c", "02", "10", "007")
    assert _joined(folder, shards) == list(range(11)) == _joined(shards, folder)
    assert _joined(folder, padded) == [2, 7, 10] == _joined(shards, padded)


def test_a_class_list_relates_names_and_numbers(tmp_path: Path) -> None:
    named = _folder(tmp_path / "a", "cat", "dog", "eel")
    shards = _shards(tmp_path / "b", 0, 5, 9, listed="0\teel\tn01\n5\tcat\n9\tdog\n")
    bare = _shards(tmp_path / "c", 9, 0)
    listed = _folder(tmp_path / "d", "n01", "dog", listed="9\tdog\thound\n0\teel\tn01\n")
    assert _joined(named, shards) == [2, -1, -1, -1, -1, 0, -1, -1, -1, 1]
    assert _joined(listed, bare) == [1, *8 * [-1], 0]  # dog is its class 0, and 9 in the list
    assert _joined(shards, listed) == [9, 0]
    assert _joined(shards, bare) == [0, *8 * [-1], 9]
    swapped = _shards(tmp_path / "e", 0, 5, listed="0\tcat\n5\teel\n")
    assert _joined(shards, swapped) == [5, -1, -1, -1, -1, 0]  # names count, not numbers


def test_names_without_numbers_do_not_join_numbers(tmp_path: Path) -> None:
    named, shards = _folder(tmp_path / "a", "cat", "dog"), _shards(tmp_path / "b", 0, 1)
    for sets in ((named, shards), (shards, named)):
        with pytest.raises(
            DataError, match=r"nothing says which .* classes\.txt beside the shards"
        ):
            _joined(*sets)


def test_two_classes_are_never_made_one(tmp_path: Path) -> None:
    text = "0\tn01\tcat\n1\tn02\tdog\n"
    twice = _folder(tmp_path / "a", "cat", "dog", "n01")
    listed = _folder(tmp_path / "b", "n01", "n02", listed=text)
    for train in (listed, _shards(tmp_path / "c", 0, 1, listed=text)):
        with pytest.raises(DataError, match="'cat' and 'n01', are one of train"):
            _joined(train, twice)
    (tmp_path / "a" / "classes.txt").write_text(text)
    with pytest.raises(DataError, match="'cat' and 'n01' are both the class 0 of classes"):
        _joined(twice, listed)


def test_folders_called_by_numbers_have_the_names_of_their_list(tmp_path: Path) -> None:
    numbered = _folder(tmp_path / "a", "0", "1", "2", listed="0\ttench\n1\teel\n2\tcat\n")
    assert _joined(numbered, _folder(tmp_path / "b", "cat", "eel", "tench")) == [2, 1, 0]
    assert _joined(numbered, _folder(tmp_path / "c", "02", "00")) == [0, 2]


def test_a_list_for_some_of_the_shards_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _shards(tmp_path / "a", 0, 1, listed="0\tcat\n1\tdog\n")
    _shards(tmp_path / "b", 0, 1)
    both = open_source(f"{tmp_path}/[ab]/a.tar")
    assert _joined(both, _folder(tmp_path / "c", "dog")) == [1]
    assert f"{tmp_path}/b/classes.txt is missing" in caplog.text


def test_a_class_missing_in_the_test_set_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = _folder(tmp_path / "a", "0", "1", "x")
    with caplog.at_level(logging.INFO):
        assert _joined(train, _folder(tmp_path / "b", "0", "x")) == [0, 2]
    assert "images of 2 of the 3 classes" in caplog.text
    with pytest.raises(DataError, match="train has no images of: 'y'; train has '0', '1', 'x'"):
        _joined(train, _folder(tmp_path / "c", "0", "y"))


def test_composed_and_decomposed_names_are_the_same(tmp_path: Path) -> None:
    train, test = ("caf\u00e9", "z"), ("cafe\u0301", "z")
    assert _joined(_folder(tmp_path / "a", *train), _folder(tmp_path / "b", *test)) == [0, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeff0\ta b\tn1\r\n\n3\tc\n", {0: ("a b", "n1"), 3: ("c",)}),
        ("1 001.Auk\n2 002.Tit\n", {1: ("001.Auk",), 2: ("002.Tit",)}),
        ("3\t3 doors\n5\t5 doors\n", {3: ("3 doors",), 5: ("5 doors",)}),
        ("tench\n2 wheels\n", {0: ("tench",), 1: ("2 wheels",)}),
        ("0\tn1\tcrane\n1\tn2\tcrane\n", {0: ("n1", "crane"), 1: ("n2", "crane")}),
    ],
)
def test_lists_of_classes_are_read(
    tmp_path: Path, text: str, expected: dict[int, tuple[str, ...]]
) -> None:
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert read_classes(str(tmp_path / "classes.txt")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\ta\n0\tb\n", "one number to two classes"),
        ("0\ta\n1\ta\n", "two classes are called 'a'"),
        ("a\nb\na\n", "two classes are called 'a'"),
        ("0\ta\nb\n", "some lines begin with a number"),
        ("3 doors\n5 doors\n", "nothing says whether .* '3 doors'"),
        ("0\ta\n", "names no class 1"),
    ],
)
def test_lists_that_contradict_are_refused(tmp_path: Path, text: str, message: str) -> None:
    shards = _shards(tmp_path / "a", 0, 1, listed=text)
    with pytest.raises(DataError, match=message):
        _joined(shards, shards)


def test_shared_files_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = _folder(tmp_path / "a", "0", "1")
    for name, numbers in (("apart", (0, 1)), ("more", (0, 1, 2))):
        (tmp_path / name).mkdir()
        pictures = {f"{name}/{i}.jpg": jpeg(9 + i) for i in numbers}
        labels = {f"{name}/{i}.cls": b"%d" % (i % 2) for i in numbers}
        write_tar(tmp_path / name / "a.tar", pictures | labels)
    (tmp_path / "links").mkdir()
    for name in "01":
        (tmp_path / "links" / name).symlink_to(tmp_path / "a" / name)
    (tmp_path / "half" / "0").mkdir(parents=True)
    (tmp_path / "half" / "0" / "1.jpg").write_bytes(PICTURE)
    (tmp_path / "half" / "0" / "2.jpg").write_bytes(jpeg(7))
    _shards(tmp_path / "packed", 0, 1, 0)
    apart, more, packed = (open_source(f"{tmp_path}/{x}") for x in ("apart", "more", "packed"))
    (tmp_path / "other" / "0").mkdir(parents=True)
    (tmp_path / "other" / "0" / "1.jpg").write_bytes(PICTURE[:-1] + b"\0")  # of the same size
    other = open_source(f"{tmp_path}/other")
    (tmp_path / "b").mkdir()
    for train, test in ((whole, apart), (apart, whole), (whole, other), (packed, other)):
        _joined(train, test)
    assert "the accuracy is too high" not in caplog.text
    (tmp_path / "half" / "0" / "1.jpg").rename(tmp_path / "half" / "0" / "renamed.jpg")
    copies = {"b/../a": "2 of the 2", "links": "2 of the 2", "a": "2 of the 2",
              "half": "1 of the 2", "packed": "3 of the 3"}  # fmt: skip
    pairs = [(whole, open_source(f"{tmp_path}/{x}"), number) for x, number in copies.items()]
    for train, test, number in (*pairs, (packed, whole, "2 of the 2"), (more, apart, "2 of the 2")):
        caplog.clear()
        _joined(train, test)
        assert f"{number} pictures of test" in caplog.text, test.path(0)
        assert "the accuracy is too high" in caplog.text


def test_of_large_sets_a_part_and_equal_names_are_compared(tmp_path: Path) -> None:
    for i in range(20):
        for folder, name in (("a", f"{i:02}.jpg"), ("renamed", f"x{i:02}.jpg")):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(PICTURE + bytes([i]))
    whole, renamed = (open_source(f"{tmp_path}/{name}") for name in ("a", "renamed"))
    total = 20 * (len(PICTURE) + 1)
    for limits, found in (({}, 20), ({"sizes_read": 5}, 5), ({"bytes_read": total / 4}, 5)):
        assert len(equal_pictures(renamed, range(20), whole, **limits)) == found
        assert len(equal_pictures(whole, range(20), whole, **limits)) == 20
    (tmp_path / "list.txt").write_text(
        "a/00.jpg\ngone.jpg\ngone.jpg\n"
    )  # which may be readable later
    with pytest.raises(UnavailableError, match=r"gone\.jpg: cannot be read"):
        first_of_equals(open_source(f"{tmp_path}/list.txt"))


def test_names_that_every_class_has_cost_no_look_at_all_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(40):
        (tmp_path / f"{i:02}").mkdir()
        (tmp_path / f"{i:02}" / "1.jpg").write_bytes(PICTURE + bytes([i]))
    whole, size = open_source(str(tmp_path)), overlap._size_of_file
    asked: list[str] = []

    def counted(path: str) -> int:
        asked.append(path)
        return size(path)

    monkeypatch.setattr(overlap, "_size_of_file", counted)
    assert len(equal_pictures(whole, [0], whole, sizes_read=4)) == 1
    assert len(asked) == 1 + 4
