"""Effective ranks of features, and how fast their spectrum decays; all in float64.

They need no labels, and rank checkpoints of one run; between architectures they mislead.

Shape letters: N images, n images of which q views each are taken, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANKME_IMAGES = 25_000  # Garrido et al. 2023, section 3
ALPHA_FIRST, ALPHA_LAST = 10, 100  # eigenvalues that the slope is fitted to, counted from 1
ALPHA_LEAST = 10  # of them; fewer give no slope
_ROWS = 2**12  # views in float64 at once
LIDAR_DELTA = 1e-4  # added to the diagonal of the covariance within images; Thilak et al. 2024


def rankme(features: Tensor) -> float:
    """Effective rank of features: how many directions they use, 1 to min(N, D).

    p_k = sigma_k / sum over j of sigma_j,    RankMe = exp(-sum over k of p_k log p_k)
    sigma are the singular values of the features, which are not centered.
    Source: Garrido et al. 2023 (arXiv:2210.02885), eq. 1 and 2. Differs: in float64 no 1e-7 is
    added to p; 0 log 0 is 0.

    Args:
        features: (N, D), any float dtype.

    Returns:
        1 for features that are multiples of each other, 0 if all are zero.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    return _effective_rank(_singular_values(_checked(features)))


def alpha_req(features: Tensor) -> float | None:
    """Decay of the spectrum of features: alpha of lambda_j ~ j^-alpha.

    Minus the slope of a least-squares line through (log j, log lambda_j), j from 10 to 100, where
    lambda_1 >= lambda_2 >= ... are the eigenvalues of the covariance of the features. Close to 1 is
    said to be best: above, few directions hold the variance; below, noise fills the others.
    Source: Agrawal et al. 2022, "alpha-ReQ: Assessing representation quality in self-supervised
    learning by measuring eigenspectrum decay" (NeurIPS). Differs: the range of j is ours; the first
    eigenvalues do not follow the law.

    Args:
        features: (N, D), any float dtype.

    Returns:
        None if fewer than ten of these eigenvalues are above zero, up to rounding.

    Raises:
        ValueError: there are none, or one is not finite.
    """
    exact = _checked(features)
    values = _singular_values(_centered(exact))
    last = min(int((values > _rounding(exact)).sum()), ALPHA_LAST)
    if last - ALPHA_FIRST + 1 < ALPHA_LEAST:
        return None
    x = torch.arange(ALPHA_FIRST, last + 1, dtype=torch.float64).log()
    y = 2 * values[ALPHA_FIRST - 1 : last].cpu().log()  # log lambda, up to a constant
    x, y = x - x.mean(), y - y.mean()
    return -float((x @ y) / (x @ x))


def lidar(views: Tensor, *, delta: float = LIDAR_DELTA) -> float:
    """Effective rank of what tells images apart, beyond how views of an image differ.

    S_b = mean over i of (mu_i - mu)(mu_i - mu)^T
    S_w = mean over i, v of (x_iv - mu_i)(x_iv - mu_i)^T + delta I
    LiDAR = exp(-sum over k of p_k log p_k),  p = lambda / sum of lambda, of S_w^-1/2 S_b S_w^-1/2
    x_iv is the feature of view v of image i, mu_i their mean over v, mu that over all.
    Source: Thilak et al. 2024 (arXiv:2312.04000), section 3. Differs: in float64 no epsilon is
    added to p; 0 log 0 is 0.

    Args:
        views: (n, q, D), any float dtype; n, q >= 2.
        delta: > 0, in squared units of a feature.

    Returns:
        From 1 to min(n - 1, D), and 0 if all images have one mean.

    Raises:
        ValueError: there are fewer images or views, or a feature is not finite.
    """
    if views.ndim != 3 or min(views.shape[:2]) < 2 or not delta > 0:
        raise ValueError(f"need (n, q, D), n, q >= 2 and delta > 0; got {[*views.shape]}, {delta}")
    n, q, width = views.shape
    means, scatter = [], views.new_zeros(width, width, dtype=torch.float64)
    for some in views.split(max(1, _ROWS // q)):
        x = _checked(some.flatten(0, 1)).view(some.shape)
        means.append(x.mean(dim=1))
        rest = (x - means[-1][:, None]).flatten(0, 1)
        scatter += rest.T @ rest
    within, axes = torch.linalg.eigh(scatter / (n * q))
    whitened = _centered(torch.cat(means)) @ axes / (within.clamp(min=0) + delta).sqrt()
    return _effective_rank(_singular_values(whitened).square())


def _checked(features: Tensor) -> Tensor:
    """Features in float64."""
    if features.ndim != 2 or not features.numel():
        raise ValueError(f"need features (N, D), N > 0; got {[*features.shape]}")
    if not features.isfinite().all():
        raise ValueError("features are not finite")
    return features.double()


def _centered(features: Tensor) -> Tensor:
    """Features minus their mean; zeros where nothing but its rounding would be left."""
    rest = features - features.mean(dim=0)
    return rest if rest.norm() > _rounding(features) else torch.zeros_like(rest)


def _rounding(features: Tensor) -> Tensor:
    """Singular values of the centered features that may come from rounding."""
    norm: Tensor = features.norm()
    return norm * torch.finfo(torch.float64).eps * max(features.shape)


def _singular_values(matrix: Tensor) -> Tensor:
    """Singular values of (N, D), the largest first: those of R = Q^T matrix, where N > D."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R
    values: Tensor = torch.linalg.svdvals(matrix)
    return values


def _effective_rank(weights: Tensor) -> float:
    """Exponential of the entropy of weights (K,) >= 0 as probabilities; 0 if all are 0."""
    total = weights.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(weights / total).sum().exp())
