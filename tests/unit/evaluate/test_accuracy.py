"""Accuracy and the choice of the best classifier, by hand."""

import pytest
import torch

from dinoscale.evaluate.classification.accuracy import choose_best, num_correct, percent


def test_right_is_the_highest_score_or_one_of_the_five_highest() -> None:
    logits = torch.arange(7.0).repeat(7, 1)  # class 6 first, then 5, 4, 3, 2
    top1, top5 = num_correct(logits, torch.arange(7))
    assert (int(top1), int(top5)) == (1, 5)


def test_each_of_several_classifiers_is_counted() -> None:
    logits = torch.tensor([[[2.0, 1.0], [1.0, 2.0]], [[0.0, 5.0], [1.0, 2.0]]])  # (N, G, C)
    top1, top5 = num_correct(logits, torch.tensor([0, 1]))
    assert top1.tolist() == [2, 1]
    assert top5.tolist() == [2, 2]


def test_non_finite_scores_are_never_right() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[nan] * 6, [nan, 1, 2, 3, 4, 5], [inf, 1, 2, 3, 4, 5], [-inf] * 3 + [1, 2, 3]]
    logits = torch.tensor(rows)
    for number in range(6):  # only of the last two rows some are
        top1, top5 = num_correct(logits, torch.full((4,), number))
        assert int(top1) == (number == 5)
        assert int(top5) == (number > 1) + (number > 2)


@pytest.mark.parametrize(("num_classes", "names"), [(5, {"top1"}), (6, {"top1", "top5"})])
def test_the_five_best_of_five_classes_are_not_reported(num_classes: int, names: set[str]) -> None:
    found = percent(1, 3, images=4, num_classes=num_classes)
    assert found.keys() == names
    assert found["top1"] == 25
    assert found.get("top5", 75) == 75


def test_the_first_of_the_best_is_chosen_and_the_last_is_reported_too() -> None:
    entries = [
        {"epoch": epoch, "top1": top1, "top5": top1 + 9}
        for epoch, top1 in enumerate((50.0, 70.0, 70.0, 60.0), start=1)
    ]
    found = choose_best(entries, with_last=True)
    assert found["chosen"] == {"epoch": 2, "top1": 70.0, "top5": 79.0, "chosen_on": "test"}
    assert found["score"] == {"top1": 70.0, "top5": 79.0, "last_top1": 60.0, "last_top5": 69.0}
    assert choose_best(entries, with_last=False)["score"] == {"top1": 70.0, "top5": 79.0}
