import pickle

import pytest

from dinoscale.data.names import PackedNames


def test_names_come_back_as_they_were() -> None:
    names = ["a.jpg", "", "caf\u00e9/\u56fe.png", "bad-\udcff-bytes.jpg"]
    packed = PackedNames(names)
    assert len(packed) == 4
    assert [packed[i] for i in range(4)] == names


def test_joined_names_are_those_of_the_parts() -> None:
    parts = [PackedNames(["a", "bb"]), PackedNames([]), PackedNames(["", "ccc"])]
    assert list(PackedNames.joined(parts)) == ["a", "bb", "", "ccc"]


def test_no_names_are_an_empty_sequence() -> None:
    assert list(PackedNames([])) == []


def test_numbers_beyond_the_end_are_refused() -> None:
    with pytest.raises(IndexError):
        PackedNames(["a"])[1]


def test_names_survive_pickling() -> None:
    packed = pickle.loads(pickle.dumps(PackedNames(["a", "bb"])))
    assert [packed[0], packed[1]] == ["a", "bb"]
