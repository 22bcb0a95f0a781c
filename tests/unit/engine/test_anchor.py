"""The anchor sees what the student sees, but for masks: both find the same at the start."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config import RunConfig, parse_config
from dinoscale.data.augmentation.masks import Masks
from dinoscale.engine.build import build_networks, loss_weights_of
from dinoscale.engine.frozen.anchor import anchor_caution, anchor_targets
from dinoscale.engine.micro_batch import MicroBatch, MicroBatchLoss, Targets
from dinoscale.models.network import TokenNetwork
from dinoscale.training.feed import coordinates_of, keep_of, masks_of

IMAGES = 6
EPS = torch.finfo(torch.float32).eps


def _config(**model: Any) -> RunConfig:
    return parse_config(
        {
            "model": {
                "backbone": "vit_tiny_patch16_224",
                "patch_size": 8,
                "embed_dim": 24,
                "depth": 4,
                "num_heads": 2,
                "drop_path_rate": 0.0,
                **model,
            },
            "head": {"num_prototypes": 7, "hidden_dim": 8, "bottleneck_dim": 4},
            "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
            "ibot": {"loss_weight": 1.0, "mask_group": 2},
            "anchor": {"class_weight": 1.5, "patch_weight": 0.5},
            "train": {"init_from": "w.pth", "batch_size": IMAGES, "micro_batch_size": IMAGES},
            "eval": {"crop": 32, "resize": 32},
        }
    )


def _batch(config: RunConfig) -> MicroBatch:
    generator = torch.Generator().manual_seed(3)
    rate = config.model.drop_path_rate
    uniforms = torch.rand(4, 2, 4 * IMAGES, generator=generator)
    return MicroBatch(
        torch.randn(2, IMAGES, 3, 32, 32, generator=generator),
        torch.randn(2, IMAGES, 3, 16, 16, generator=generator),
        keep_of(uniforms, config.model) if rate else None,
        masks_of(config, step=0, first_image=0, images=IMAGES),
        coordinates_of(config, step=0, depth=4),
    )


class _Frozen:
    """A `FrozenBackbone` in this process."""

    def __init__(self, backbone: Any) -> None:
        self._network = TokenNetwork(copy.deepcopy(backbone)).requires_grad_(False).eval()

    def tokens(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return self._network(*inputs)  # type: ignore[no-any-return]  # nn.Module is untyped


def _terms(config: RunConfig, batch: MicroBatch, *, moved: float) -> tuple[dict[str, Any], Any]:
    """The anchor's terms once the student's weights have moved, with gradients in its backbone."""
    student, _ = build_networks(config)
    anchor: Any = _Frozen(student.backbone)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in student.backbone.parameters():
            parameter += moved * torch.randn(parameter.shape, generator=generator)
    probs = torch.full((2, IMAGES, 7), 1 / 7)
    targets = Targets(probs, anchor=anchor_targets(anchor, batch))
    objective = MicroBatchLoss(targets, loss_weights_of(config), masks=batch.masks)
    assert batch.masks is not None
    crops = [batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)]
    tokens, patches = student.backbone(
        crops,
        batch.keep,
        masks=batch.masks.masks,
        coordinates=batch.coordinates,
        all_patches=True,
    )
    loss = objective.of_class_tokens(tokens)
    assert loss is not None
    loss = loss + objective.of_patches(patches)
    features = tokens, patches, targets.anchor
    return {**objective.terms, "loss": loss}, features


MODELS = {
    "plain": {},
    "drop_path": {"drop_path_rate": 0.5},
    "subset": {"drop_path_rate": 0.5, "drop_path_mode": "subset"},
    "uniform_subset": {
        "drop_path_rate": 0.5,
        "drop_path_mode": "subset",
        "drop_path_uniform": True,
    },
    "rotary": {"rope": {"jitter": 2.0, "rescale": 2.0, "shift": 0.5}},
}


@pytest.mark.parametrize("name", MODELS)
def test_is_zero_at_the_start_and_grows_as_the_weights_move(name: str) -> None:
    config = _config(**MODELS[name])
    batch = _batch(config)
    # Unit vectors that differ by a rounding in each operation of the forward.
    bound = (100 * EPS) ** 2
    start, _ = _terms(config, batch, moved=0.0)
    later, _ = _terms(config, batch, moved=0.01)
    for key in ("anchor_class_loss", "anchor_patch_loss", "loss"):
        assert float(start[key].detach()) <= bound, key
        assert float(later[key].detach()) > 1e6 * bound, key


@pytest.mark.parametrize("rule", ["dinov3", "dinov2"])
def test_is_a_weighted_mean_over_the_crops_that_are_not_chosen(rule: str) -> None:
    config = _config()
    if rule == "dinov2":  # of 16 patches: none of some chosen crops
        ibot = config.ibot.model_copy(update={"mask_rule": rule, "mask_ratio": (0.0, 0.1)})
        config = config.model_copy(update={"ibot": ibot})
    batch = _batch(config)
    terms, (tokens, patches, anchor) = _terms(config, batch, moved=0.05)
    assert batch.masks is not None
    seen = ~batch.masks.chosen
    assert int(seen.sum()) == IMAGES  # of twice as many crops
    assert torch.equal(seen, ~batch.masks.masks.any(1)) == (rule == "dinov3")
    apart = 1 - torch.cosine_similarity(tokens[: 2 * IMAGES], anchor.classes, dim=-1)[seen].mean()
    of_patches = 1 - torch.cosine_similarity(patches, anchor.patches, dim=-1)[seen].mean()
    torch.testing.assert_close(terms["anchor_class_loss"], apart.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        terms["anchor_patch_loss"], of_patches.detach(), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(terms["loss"], 1.5 * apart + 0.5 * of_patches, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("before", ["bf16", "fp32"])
@pytest.mark.parametrize("now", ["bf16", "fp32"])
def test_an_anchor_that_stays_rounded_is_named(before: str, now: str) -> None:
    config = _config()
    engine = config.engine.model_copy(update={"precision": now})
    config = config.model_copy(update={"engine": engine})
    said = anchor_caution(config, {"engine": {"precision": before}})
    assert (said is not None) == ((before, now) == ("bf16", "fp32"))
    assert anchor_caution(config, None) is None


def test_masked_crops_have_no_gradient() -> None:
    config = _config()
    batch = _batch(config)
    terms, (tokens, patches, _) = _terms(config, batch, moved=0.05)
    of_tokens, of_patches = torch.autograd.grad(terms["loss"], (tokens, patches))
    masks = batch.masks
    assert isinstance(masks, Masks)
    masked = masks.masks.any(1)
    assert not of_tokens[: 2 * IMAGES][masked].any()
    assert not of_tokens[2 * IMAGES :].any()  # local crops
    assert not of_patches[masked].any()
    assert of_tokens[: 2 * IMAGES][~masked].any(1).all()
    assert of_patches[~masked].any(2).all()
