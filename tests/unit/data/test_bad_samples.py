import json
from pathlib import Path

import pytest

from dinoscale.data.sources.bad_samples import BadSample, BadSampleLog
from dinoscale.errors import DataError


def _bad(number: int, repeat: int = 0) -> BadSample:
    return BadSample(f"/d/{number}.jpg", "the file is empty", number, number + 1, repeat)


def _listed(path: Path) -> list[int]:
    return [json.loads(line)["sample_id"] for line in path.read_text().splitlines()]


def test_each_file_is_listed_once_and_counted_always(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "run" / "bad.jsonl")
    log.add([_bad(1), _bad(2), _bad(1)])
    log.add([_bad(2, repeat=1), _bad(3, repeat=1)])
    assert _listed(tmp_path / "run" / "bad.jsonl") == [1, 2, 3]
    assert (log.num_occurrences, log.num_files) == (5, 3)
    line = json.loads((tmp_path / "run" / "bad.jsonl").read_text().splitlines()[2])
    assert line == {
        "path": "/d/3.jpg",
        "error": "the file is empty",
        "sample_id": 3,
        "replaced_by": 4,
        "repeat": 1,
        "unavailable": False,
    }


def test_no_file_is_made_for_nothing(tmp_path: Path) -> None:
    BadSampleLog(tmp_path / "bad.jsonl").add([])
    assert not (tmp_path / "bad.jsonl").exists()


def test_reopened_list_repeats_no_file_and_counts_anew(tmp_path: Path) -> None:
    BadSampleLog(tmp_path / "bad.jsonl").add([_bad(1)])
    log = BadSampleLog(tmp_path / "bad.jsonl")
    assert (log.num_occurrences, log.num_files) == (0, 0)
    log.add([_bad(1), _bad(2)])
    assert _listed(tmp_path / "bad.jsonl") == [1, 2]


def test_line_cut_off_by_a_crash_does_not_damage_the_next(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    BadSampleLog(path).add([_bad(1)])
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    BadSampleLog(path).add([_bad(1), _bad(2)])
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])["sample_id"] for i in (0, 2)] == [1, 2]
    assert len(lines) == 3


def test_name_that_is_no_unicode_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    BadSampleLog(path).add([BadSample("/d/\udcff.jpg", "x", 0, 1, 0)])
    assert json.loads(path.read_text())["path"] == "/d/\udcff.jpg"
    log = BadSampleLog(path)
    log.add([BadSample("/d/\udcff.jpg", "x", 0, 1, 0)])
    assert len(path.read_text().splitlines()) == 1


def _checks(tmp_path: Path, *, bad: int, repeat: int = 1, **limits: float) -> bool:
    """Whether the check passes after `bad` files were met `repeat` times each."""
    log = BadSampleLog(tmp_path / "bad.jsonl")
    for again in range(repeat):
        log.add([_bad(number, again) for number in range(bad)])
    try:
        log.check(**limits)
    except DataError:
        return False
    return True


@pytest.mark.parametrize(
    ("bad", "seen", "num_images", "passes"),
    [
        (0, 100, 1000, True),
        (1, 1, 1000, True),  # one early bad file
        (9, 16, 100_000, True),
        (10, 16, 100_000, False),
        (10, 700, 1000, True),  # 1 % met a little early
        (10, 1000, 1000, True),  # exactly at the limit
        (11, 1000, 1000, False),
        (11, 900, 1000, False),  # already more than 1 % of the source
        (1, 40, 40, False),  # all of a small source seen
        (120, 10_000, 10**9, True),  # within three standard errors
        (140, 10_000, 10**9, False),
    ],
)
def test_one_percent_is_judged_with_enough_evidence(
    tmp_path: Path, bad: int, seen: int, num_images: int, passes: bool
) -> None:
    limits = {"max_fraction": 0.01, "seen": seen, "num_images": num_images}
    assert _checks(tmp_path, bad=bad, **limits) == passes


def test_the_same_files_every_epoch_are_not_more_bad_files(tmp_path: Path) -> None:
    limits = {"max_fraction": 0.25, "seen": 10_000, "num_images": 100}
    assert _checks(tmp_path, bad=25, repeat=100, **limits)


def test_zero_allows_none_and_one_allows_all(tmp_path: Path) -> None:
    assert not _checks(tmp_path, bad=1, max_fraction=0.0, seen=1, num_images=10**6)
    assert _checks(tmp_path, bad=0, max_fraction=0.0, seen=1, num_images=10**6)
    assert _checks(tmp_path, bad=50, max_fraction=1.0, seen=50, num_images=50)


def test_error_names_counts_examples_and_the_key(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "bad.jsonl")
    log.add([_bad(number) for number in range(12)])
    with pytest.raises(DataError) as caught:
        log.check(max_fraction=0.01, seen=48, num_images=100)
    text = str(caught.value)
    assert "12 of 48 drawn (12 different files)" in text
    assert "/d/0.jpg: the file is empty" in text
    assert "and 9 more" in text
    assert "data.max_bad_fraction=0.01" in text
    assert str(tmp_path / "bad.jsonl") in text
