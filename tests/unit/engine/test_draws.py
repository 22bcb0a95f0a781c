import numpy as np
import pytest
import torch

from dinoscale.engine.draws import drop_path_uniforms, rope_uniforms
from dinoscale.models.stochastic_depth import stochastic_depth_keep

SIZES = {"crops": 5, "depth": 3}
BATCH = 12


def _of_batch(step: int = 4, seed: int = 7) -> torch.Tensor:
    """The whole batch by one process: (depth, 2, crops, batch)."""
    uniforms = drop_path_uniforms(seed=seed, step=step, first_image=0, images=BATCH, **SIZES)
    return uniforms.unflatten(2, (SIZES["crops"], BATCH))


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (3, 2), (1, 4), (4, 3), (12, 1)])
def test_any_split_of_the_batch_draws_what_one_process_draws(ranks: int, accumulation: int) -> None:
    images = BATCH // ranks // accumulation
    parts = [
        drop_path_uniforms(seed=7, step=4, first_image=slot * images, images=images, **SIZES)
        for slot in range(ranks * accumulation)
    ]
    joined = torch.cat([part.unflatten(2, (SIZES["crops"], images)) for part in parts], dim=3)
    assert torch.equal(joined, _of_batch())


def test_rows_are_crop_major_like_the_students() -> None:
    of_third = drop_path_uniforms(seed=7, step=4, first_image=2, images=1, **SIZES)
    assert of_third.shape == (3, 2, 5)
    assert torch.equal(of_third, _of_batch()[..., 2])


def test_draws_are_uniform_and_differ_everywhere() -> None:
    whole = drop_path_uniforms(seed=0, step=0, first_image=0, images=2000, **SIZES)
    assert whole.dtype == torch.float32
    assert whole.min() >= 0
    assert whole.max() < 1
    assert len(whole.unique()) > 0.99 * whole.numel()  # float32 has 2**24 numbers in [0, 1)
    counts = np.histogram(whole.numpy(), bins=20, range=(0, 1))[0]
    expected = whole.numel() / 20
    assert np.square(counts - expected).sum() / expected < 45  # chi2 of 19: 0.07 % lie above
    per_block = whole.mean(dim=2)
    assert (per_block - 0.5).abs().max() < 5 * 12**-0.5 / 10_000**0.5  # 5 standard errors


@pytest.mark.parametrize("change", [{"step": 5}, {"seed": 8}])
def test_other_step_or_seed_draws_other_numbers(change: dict[str, int]) -> None:
    assert not torch.isclose(_of_batch(**change), _of_batch()).all(dim=-1).any()


def test_largest_seed_and_step_are_accepted() -> None:
    uniforms = drop_path_uniforms(seed=2**32 - 1, step=10**7, first_image=10**5, images=2, **SIZES)
    assert uniforms.shape == (3, 2, 10)


def test_dropped_share_is_the_configured_rate() -> None:
    uniforms = drop_path_uniforms(seed=0, step=0, first_image=0, images=2000, **SIZES)
    keep = stochastic_depth_keep(uniforms, drop_path_rate=0.3)
    dropped = (keep == 0).float().mean(dim=(1, 2))  # (depth,) of 20 000 draws each
    assert dropped.tolist() == pytest.approx([0.0, 0.15, 0.3], abs=0.016)  # 5 standard errors
    assert keep.mean(dim=(1, 2)).tolist() == pytest.approx([1, 1, 1], abs=0.024)


def test_rotary_coordinates_of_a_block_depend_on_seed_step_and_block_only() -> None:
    few, many = (rope_uniforms(seed=7, step=4, depth=depth) for depth in (3, 40))
    assert many.shape == (2, 40, 5)
    assert torch.equal(many[:, :3], few)
    assert len(many.unique()) == many.numel()
    assert not torch.isclose(few, rope_uniforms(seed=7, step=5, depth=3)).any()
    assert not torch.isclose(few, rope_uniforms(seed=8, step=4, depth=3)).any()
    whole = torch.stack([rope_uniforms(seed=0, step=step, depth=40) for step in range(50)])
    assert (whole.mean() - 0.5).abs() < 5 * 12**-0.5 / whole.numel() ** 0.5  # 5 standard errors
