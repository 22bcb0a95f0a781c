"""Targets and losses of DINOv2 and DINOv3 against recorded calls of the reference.

The reference's losses take logits (M, K), ours unit vectors and prototypes. The rows of the
identity are unit vectors, with which the prototypes v = logits^T, g = ||v|| give these logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscale.losses.centering import teacher_probs, updated_center
from dinoscale.losses.dino import dino_loss, dino_loss_of_prototypes
from dinoscale.losses.gram import Negatives, gram_difference, gram_loss
from dinoscale.losses.ibot import PatchTargets, patch_loss_of_prototypes
from dinoscale.losses.koleo import koleo_loss
from dinoscale.losses.patch_grid import resized
from dinoscale.losses.sinkhorn import Reduction, sinkhorn_center
from tests.thread_ranks import on_ranks

Tensors = Callable[[str], dict[str, Tensor]]
Numbers = Callable[[str], dict[str, Any]]

assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def _head(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors (M, M), v (K, M) and g (K, 1) whose logits are `logits` (M, K)."""
    v = logits.T.contiguous()
    return torch.eye(len(logits), dtype=v.dtype), v, v.norm(dim=1, keepdim=True)


def _sinkhorn_probs(logits: list[Tensor], *, temp: float, iterations: int) -> list[Tensor]:
    """Targets of each rank from its own rows."""
    x, v, g = _head(torch.cat(logits))

    def center(share: Tensor, total: Reduction, highest: Reduction) -> Tensor:
        return sinkhorn_center(
            share.split(7),
            v,
            g,
            temp=temp,
            iterations=iterations,
            sum_over_ranks=total,
            max_over_ranks=highest,
        )

    centers = on_ranks(center, x.split([len(rows) for rows in logits]))
    return [
        teacher_probs(rows, center, temp=temp) for rows, center in zip(logits, centers, strict=True)
    ]


@pytest.mark.parametrize("tokens", ["cls", "patch"])
def test_sinkhorn_assignments(
    golden23_tensors: Tensors, golden23_json: Numbers, tokens: str
) -> None:
    tensors, numbers = golden23_tensors("sinkhorn"), golden23_json("sinkhorn")
    for temp in numbers["temps"]:
        name = f"temp{temp}.{tokens}"
        (probs,) = _sinkhorn_probs(
            [tensors[f"{name}_logits"]], temp=temp, iterations=numbers["iterations"]
        )
        assert_close(probs, tensors[f"{name}_probs"])


@pytest.mark.parametrize("tokens", ["cls", "patch"])
def test_sinkhorn_assignments_of_ranks(
    golden23_tensors: Tensors, golden23_json: Numbers, tokens: str
) -> None:
    tensors, numbers = golden23_tensors("sinkhorn_ranks"), golden23_json("sinkhorn_ranks")
    for ranks in numbers["ranks"]:
        for temp in numbers["temps"]:
            logits = [tensors[f"ranks{ranks}.{tokens}_logits.rank{r}"] for r in range(int(ranks))]
            found = _sinkhorn_probs(logits, temp=temp, iterations=numbers["iterations"])
            for r, probs in enumerate(found):
                wanted = tensors[f"ranks{ranks}.temp{temp}.{tokens}_probs.rank{r}"]
                assert_close(probs, wanted)


def _patch_loss(
    student: Tensor, teacher: Tensor, *, center: Tensor, temp: float, weights: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over patches, its gradient in the student's logits, and the sum of the targets."""
    x, v, g = (leaf.requires_grad_() for leaf in _head(student))
    targets = PatchTargets(*_head(teacher), center=center, temp=temp)
    loss, _, target_sum = patch_loss_of_prototypes(
        x, v, g, targets=targets, weights=weights, student_temp=tau
    )
    d_x, d_v, d_g = torch.autograd.grad(loss, (x, v, g))
    d_logits = (d_v + d_g * v / g).detach().T  # d_w of Salimans and Kingma, eq. 3, with g = ||v||
    assert_close(d_x, d_logits @ student.T)  # W = student^T
    return loss.detach(), d_logits, target_sum


def _weights(masks: Tensor) -> Tensor:
    """1 / (masked patches of the same crop) of each masked patch, view-major."""
    return (1 / masks.sum(1, keepdim=True).double()).expand_as(masks)[masks]


def test_patch_loss_with_centering(golden23_tensors: Tensors, golden23_json: Numbers) -> None:
    tensors, numbers = golden23_tensors("ibot_loss"), golden23_json("ibot_loss")
    center = tensors["call0.center_used"]
    for call in numbers["calls"]:
        name = f"call{call['call']}"
        student, teacher = (tensors[f"{name}.{who}_logits"] for who in ("student", "teacher"))
        masks, temp = tensors[f"{name}.masks"], call["teacher_temp"]
        loss, gradient, target_sum = _patch_loss(
            student,
            teacher,
            center=center,
            temp=temp,
            weights=_weights(masks),
            tau=numbers["student_temp"],
        )
        assert_close(center, tensors[f"{name}.center_used"])
        assert_close(target_sum, tensors[f"{name}.probs"].sum(0))
        # The reference rounds the weights to float32.
        assert_close(loss / len(masks), tensors[f"{name}.loss"][0], rtol=1e-7)
        assert_close(gradient / len(masks), tensors[f"{name}.student_logits_grad"], rtol=1e-7)
        center = updated_center(center, teacher.mean(0), momentum=numbers["center_momentum"])
    assert_close(center, tensors["center_after"])


def test_patch_loss_with_sinkhorn(golden23_tensors: Tensors, golden23_json: Numbers) -> None:
    tensors, numbers = golden23_tensors("ibot_loss_sinkhorn"), golden23_json("ibot_loss_sinkhorn")
    for call in numbers["calls"]:
        name, temp = f"call{call['call']}", call["teacher_temp"]
        student, teacher = (tensors[f"{name}.{who}_logits"] for who in ("student", "teacher"))
        masks = tensors[f"{name}.masks"]
        x, v, g = _head(teacher)
        center = sinkhorn_center(
            [x],
            v,
            g,
            temp=temp,
            iterations=numbers["iterations"],
            sum_over_ranks=torch.clone,
            max_over_ranks=torch.clone,
        )
        loss, gradient, _ = _patch_loss(
            student,
            teacher,
            center=center,
            temp=temp,
            weights=tensors[f"{name}.masks_weight"],
            tau=numbers["student_temp"],
        )
        assert_close(teacher_probs(teacher, center, temp=temp), tensors[f"{name}.probs"])
        assert_close(_weights(masks), tensors[f"{name}.masks_weight"], rtol=1e-7)
        assert_close(loss / len(masks), tensors[f"{name}.loss"][0])
        assert_close(gradient / len(masks), tensors[f"{name}.student_logits_grad"])


def test_class_losses(golden23_tensors: Tensors, golden23_json: Numbers) -> None:
    tensors, numbers = golden23_tensors("cls_loss"), golden23_json("cls_loss")
    num_globals, num_locals = (
        len(tensors[f"student_{crops}_logits"]) for crops in ("global", "local")
    )
    global_pairs, local_pairs = num_globals * (num_globals - 1), num_globals * num_locals
    logits = torch.cat([tensors["student_global_logits"], tensors["student_local_logits"]])
    logits.requires_grad_()
    probs, tau = tensors["teacher_probs"], numbers["student_temp"]

    loss = dino_loss(logits, probs, student_temp=tau)  # mean over all pairs
    (gradient,) = torch.autograd.grad(loss, logits)
    total = loss.detach() * (global_pairs + local_pairs)
    d_globals, d_locals = (gradient * (global_pairs + local_pairs)).split([num_globals, num_locals])
    # DINOv2: the sum over local pairs, and the mean over pairs of global crops.
    of_globals, of_locals = (tensors[f"v2.{crops}.loss"][0] for crops in ("global", "local"))
    assert_close(total, of_locals + of_globals * global_pairs)
    assert_close(d_globals, tensors["v2.global.grad"] * global_pairs)
    assert_close(d_locals, tensors["v2.local.grad"])
    # DINOv3: means over pairs.
    of_globals = tensors["v3.global_without_diagonal.loss"][0]
    assert_close(total, tensors["v3.local.loss"][0] * local_pairs + of_globals * global_pairs)
    assert_close(d_globals, tensors["v3.global_without_diagonal.grad"] * global_pairs)
    assert_close(d_locals, tensors["v3.local.grad"] * local_pairs)
    # Global crops alone.
    crops = logits[:num_globals].detach().requires_grad_()
    alone = dino_loss(crops, probs, student_temp=tau)
    assert_close(alone.detach(), of_globals)
    (gradient,) = torch.autograd.grad(alone, crops)
    assert_close(gradient, tensors["v3.global_without_diagonal.grad"])


@pytest.mark.parametrize("local_weight", [1.0, 0.5])
@pytest.mark.parametrize("diagonal", ["without", "with"])
def test_class_losses_weighted_as_in_dinov3(
    golden23_tensors: Tensors, golden23_json: Numbers, diagonal: str, local_weight: float
) -> None:
    """Both means over pairs, each scaled by its share of the pairs, the local one weighted."""
    tensors, numbers = golden23_tensors("cls_loss"), golden23_json("cls_loss")
    crops = [tensors["student_global_logits"], tensors["student_local_logits"]]
    probs, tau = tensors["teacher_probs"], numbers["student_temp"]
    views, local = len(crops[0]), len(crops[1])
    global_pairs = views * (views if diagonal == "with" else views - 1)
    shares = [pairs / (global_pairs + views * local) for pairs in (global_pairs, views * local)]
    scales = shares[0], shares[1] * local_weight
    names = f"v3.global_{diagonal}_diagonal", "v3.local"
    losses = [tensors[f"{name}.loss"][0] * share for name, share in zip(names, shares, strict=True)]
    options: dict[str, Any] = {"local_weight": local_weight, "same_view": diagonal == "with"}
    options["student_temp"] = tau

    logits = torch.cat(crops).requires_grad_()
    loss = dino_loss(logits, probs, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_close(loss.detach(), losses[0] + local_weight * losses[1])
    for part, name, scale in zip(gradient.split([views, local]), names, scales, strict=True):
        assert_close(part, scale * tensors[f"{name}.grad"])

    x, v, g = (leaf.requires_grad_() for leaf in _head(logits.detach().flatten(0, 1)))
    weighted, whole, of_global = dino_loss_of_prototypes(x, v, g, teacher_probs=probs, **options)
    d_v, d_g = torch.autograd.grad(weighted, (v, g))
    assert_close(weighted.detach(), loss.detach())
    assert_close(whole, losses[0] + losses[1])
    assert_close(of_global, losses[0])
    assert_close((d_v + d_g * v / g).detach().T, gradient.flatten(0, 1))


def test_koleo(golden23_tensors: Tensors) -> None:
    tensors = golden23_tensors("koleo")
    cases = [name[:-2] for name in tensors if name.endswith(".x")]
    assert len(cases) > 2
    for case in cases:
        count = int(case.removeprefix("topk")) if case.startswith("topk") else 1
        rows = tensors[f"{case}.x"].requires_grad_()
        loss, _ = koleo_loss(rows[None], num_neighbours=count)
        (gradient,) = torch.autograd.grad(loss, rows)
        assert_close(loss.detach(), tensors[f"{case}.loss"][0])
        assert_close(gradient, tensors[f"{case}.grad"])


def test_koleo_of_ranks(golden23_tensors: Tensors, golden23_json: Numbers) -> None:
    """Neighbours on all ranks, or in groups of images of neighbouring ranks."""
    tensors, cases = golden23_tensors("koleo_ranks"), golden23_json("koleo_ranks")["cases"]
    assert {case["loss_group_size"] is None for case in cases} == {True, False}
    for number, case in enumerate(cases):
        ranks = range(case["ranks"])
        rows = [tensors[f"koleo{number}.x.rank{rank}"].requires_grad_() for rank in ranks]
        losses = [
            koleo_loss(
                rows[rank][None],
                gather=partial(_with_others, rows=rows, rank=rank),
                first=rank * case["rows"],
                group_size=case["loss_group_size"],
                num_neighbours=case["topk"],
            )[0]
            for rank in ranks
        ]
        torch.stack(losses).sum().backward()
        for rank in ranks:
            assert_close(losses[rank].detach(), tensors[f"koleo{number}.loss.rank{rank}"].squeeze())
            assert_close(rows[rank].grad, tensors[f"koleo{number}.grad.rank{rank}"])


def _with_others(own: Tensor, *, rows: list[Tensor], rank: int) -> Tensor:
    """Unit vectors of all ranks, this one's as they are, (1, N, D)."""
    units = [F.normalize(x, dim=-1, eps=1e-8)[None] for x in rows]
    return torch.cat([*units[:rank], own, *units[rank + 1 :]], dim=1)


def test_koleo_is_summed_over_views(golden23_tensors: Tensors) -> None:
    tensors = golden23_tensors("koleo")
    one = tensors["case0.x"]
    views = torch.stack([one, 2 * one.flip(0).roll(1, dims=1)]).requires_grad_()
    loss, _ = koleo_loss(views)
    (gradient,) = torch.autograd.grad(loss, views)
    assert_close(loss.detach(), 2 * tensors["case0.loss"][0])
    assert_close(gradient[0], tensors["case0.grad"])


def _negatives(case: dict[str, Any]) -> Negatives:
    if case["remove_neg"]:
        return "removed"
    return "removed_from_target" if case["remove_only_teacher_neg"] else "kept"


def test_gram_loss(golden23_tensors: Tensors, golden23_json: Numbers) -> None:
    tensors, cases = golden23_tensors("gram_loss"), golden23_json("gram_loss")["cases"]
    for number, case in enumerate(cases):
        of = gram_loss if case["apply_norm"] else gram_difference
        student = tensors[f"case{number}.student"].requires_grad_()
        loss = of(
            student,
            tensors[f"case{number}.teacher"],
            per_crop=case["img_level"],
            negatives=_negatives(case),
        )
        (gradient,) = torch.autograd.grad(loss, student)
        assert_close(loss.detach(), tensors[f"case{number}.loss"][0])
        assert_close(gradient, tensors[f"case{number}.student_grad"])


def test_gram_loss_of_resized_targets(golden23_tensors: Tensors, golden23_json: Numbers) -> None:
    tensors, cases = golden23_tensors("gram_loss_resized"), golden23_json("gram_loss_resized")
    for number, case in enumerate(cases["cases"]):
        if case["antialias"]:
            continue  # an option that no released recipe takes
        student = tensors[f"case{number}.student"].requires_grad_()
        target, masks = (tensors[f"case{number}.{name}"] for name in ("teacher", "masks"))
        chosen = {"all": None, "masked": masks, "unmasked": ~masks}[case["tokens_used"]]
        used = resized(target, num_patches=student.shape[1], interpolation="bicubic")
        loss = gram_loss(
            student,
            used,
            per_crop=case["img_level"],
            negatives=_negatives(case),
            chosen=chosen,
        )
        (gradient,) = torch.autograd.grad(loss, student)
        used = used if chosen is None else used[chosen]
        assert_close(used, tensors[f"case{number}.teacher_used"])
        assert_close(loss.detach(), tensors[f"case{number}.loss"][0])
        assert_close(gradient, tensors[f"case{number}.student_grad"])


def test_centers_of_ranks(golden23_tensors: Tensors, golden23_json: Numbers) -> None:
    """Class tokens: mean over all rows. Patches: mean over ranks of each rank's mean."""
    tensors, numbers = golden23_tensors("center_ranks"), golden23_json("center_ranks")
    for ranks in numbers["ranks"]:
        for tokens in ("dino", "ibot"):
            center = torch.zeros(numbers["prototypes"], dtype=torch.float64)
            for call, temp in enumerate(numbers["temps"]):
                name = f"ranks{ranks}.call{call}.{tokens}"
                logits = [tensors[f"{name}_logits.rank{r}"] for r in range(int(ranks))]
                for r, rows in enumerate(logits):
                    probs = teacher_probs(rows, center, temp=temp)
                    assert_close(probs, tensors[f"{name}_probs.rank{r}"])
                mean = torch.stack([rows.mean(0) for rows in logits]).mean(0)
                center = updated_center(center, mean, momentum=numbers["center_momentum"])
            assert_close(center, tensors[f"ranks{ranks}.{tokens}_center_after"])
