"""Cross-entropy between teacher and student views.

Shape letters: S student crops, T teacher crops, B images, K prototypes.
Source: Caron et al. 2021 (arXiv:2104.14294), eq. 3; divided by the number of pairs as in the
authors' code, so that the value does not depend on the number of crops.
"""

import torch
from torch import Tensor


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, *, student_temp: float) -> Tensor:
    """Cross-entropy of each teacher view against every student crop of another view.

    L = mean over b and pairs s != t of  -sum_k p[t,b,k] * log softmax(z[s,b] / tau)[k]

    With P[s] the sum of p[t] over t != s this is, per student crop, sum(P) logsumexp(z) - <P, z>:
    no (S, B, K) tensor of log probabilities exists, and the teachers are added once.

    Args:
        student_logits: z, (S, B, K), any float dtype; student crop t is teacher crop t.
        teacher_probs: p, (T, B, K) float32 or float64, 2 <= T <= S, rows sum to 1, no gradient.
        student_temp: tau > 0, dimensionless.

    Returns:
        Scalar in nats: float32, or float64 if an argument is.

    Raises:
        ValueError: the shapes disagree, or there is no pair of distinct views.
    """
    z_shape, p_shape = student_logits.shape, teacher_probs.shape
    if len(z_shape) != 3 or z_shape[1:] != p_shape[1:] or not 2 <= p_shape[0] <= z_shape[0]:
        raise ValueError(f"need (S,B,K), (T,B,K), 2 <= T <= S; got {[*z_shape]}, {[*p_shape]}")
    dtype = torch.promote_types(
        torch.promote_types(student_logits.dtype, teacher_probs.dtype), torch.float32
    )
    teachers = teacher_probs.to(dtype).unbind(0)
    everyone = _total(teachers)
    losses = []
    for s, logits in enumerate(student_logits.unbind(0)):
        own = s < len(teachers)
        target = _total(teachers[:s] + teachers[s + 1 :]) if own else everyone  # (B, K)
        z = logits.to(dtype) / student_temp
        losses.append(target.sum(-1) * z.logsumexp(-1) - torch.linalg.vecdot(target, z))  # (B,)
    num_pairs = len(teachers) * (len(losses) - 1)
    return torch.stack(losses).mean(1).sum() / num_pairs


def _total(tensors: tuple[Tensor, ...]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
