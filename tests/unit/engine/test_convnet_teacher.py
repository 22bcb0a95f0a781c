"""ConvNeXts and ResNets as frozen teachers of features, against timm's own networks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dinoscale.config import RunConfig, parse_config, resolve
from dinoscale.convert.initial_weights import read_frozen_teacher
from dinoscale.convert.source import read_source
from dinoscale.engine.build import shapes_only
from dinoscale.engine.frozen.features import FeatureTeacher
from dinoscale.engine.micro_batch import MicroBatch
from dinoscale.engine.model_sizes import dims_of, flops_of
from dinoscale.errors import CheckpointError, ConfigError
from dinoscale.losses.patch_grid import resized
from dinoscale.models._torchvision import ensure_torchvision
from dinoscale.models.convnet import ConvNet, ForwardCounts
from dinoscale.models.network import FeatureNetwork
from dinoscale.models.sync_bn import convert_sync_batch_norm
from dinoscale.models.zoo import build_backbone
from dinoscale.planning.plan.memory_model import peak, persistent
from tests.unit.plan.tiny import SETUP

ATTO = "convnext_atto"
SIZE, IMAGES, PATCHES = 64, 2, 64  # patches of 8 x 8 pixels of the student
MODEL = {
    "backbone": "vit_tiny_patch16_224",
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "drop_path_rate": 0.0,
}


def _config(path: Path, backbone: str = ATTO, **distill: Any) -> RunConfig:
    given = {"class_feature_weight": 1.0, "patch_feature_weight": 0.5, **distill}
    return parse_config(
        {
            "model": MODEL,
            "dino": {"loss_weight": 0.0},
            "crops": {"global_size": SIZE, "num_local": 0},
            "distill": {"teacher": str(path), "model": {"backbone": backbone}, **given},
            "train": {"batch_size": IMAGES, "micro_batch_size": IMAGES},
            "eval": {"crop": SIZE, "resize": SIZE},
        }
    )


def _timms(name: str) -> Any:
    """Timm's network with a classifier, all of whose layers act."""
    ensure_torchvision()
    import timm

    torch.manual_seed(4)
    network = timm.create_model(name, num_classes=3)
    for key, value in network.state_dict().items():
        if key.endswith(("gamma", "norm.weight", "running_var")):
            value.uniform_(0.5, 1.5)
        elif key.endswith(("norm.bias", "running_mean")):
            value.uniform_(-0.1, 0.1)
    return network.eval()


def _as_its_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of timm's ConvNeXt under the names of DINOv3's, the norm of the last stage twice."""
    theirs = {}
    for key, value in state.items():
        if key.startswith("head.fc."):
            continue
        name = key.replace("head.norm.", "norm.").replace("stem.", "downsample_layers.0.")
        name = name.replace(".blocks.", ".").replace("conv_dw", "dwconv")
        name = name.replace("mlp.fc", "pwconv")
        if ".downsample." in name:
            stage, rest = name.removeprefix("stages.").split(".downsample.")
            name = f"downsample_layers.{stage}.{rest}"
        theirs[name] = value
    return theirs | {f"norms.3.{part}": theirs[f"norm.{part}"] for part in ("weight", "bias")}


def _teacher(config: RunConfig) -> FeatureTeacher:
    """As a run builds it."""
    backbone = shapes_only(config.of_teacher).backbone
    convert_sync_batch_norm(backbone, lambda summand: summand)
    network = FeatureNetwork(backbone, patches=True)
    plan = resolve(config, world_size=1, num_images=IMAGES)
    teacher = FeatureTeacher(network, config, plan, torch.float32)
    given = read_frozen_teacher(config)
    assert given is not None
    teacher.load(given.by_name(), identity=given.identity)
    return teacher


@pytest.mark.parametrize("name", [ATTO, "resnet18"])
def test_features_are_those_of_timms_own_network(tmp_path: Path, name: str) -> None:
    theirs = _timms(name)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    teacher = _teacher(_config(tmp_path / "w.pth", name))
    images = torch.randn(2, IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    found = teacher.targets(MicroBatch(images, images[:0], None))
    with torch.no_grad():
        maps = theirs.forward_features(images.flatten(0, 1))
        classes = theirs.forward_head(maps, pre_logits=True)
        if name == ATTO:  # after the final norm, as patch tokens of a ViT
            maps = theirs.head.norm(maps)
    assert float(classes.std(0).mean()) > 0.01  # of images that differ
    torch.testing.assert_close(found.classes, classes)
    places = maps.flatten(2).mT
    assert places.shape[1] == (SIZE // 32) ** 2
    on_grid = resized(places, num_patches=PATCHES, interpolation="bilinear")
    torch.testing.assert_close(found.patches, on_grid)


def test_names_of_its_authors_and_of_timm_are_the_same_teacher(tmp_path: Path) -> None:
    state = _timms(ATTO).state_dict()
    torch.save(state, tmp_path / "timm.pth")
    torch.save(_as_its_authors(state), tmp_path / "theirs.pth")
    given = [read_frozen_teacher(_config(tmp_path / f"{name}.pth")) for name in ("timm", "theirs")]
    assert given[0] is not None
    assert given[1] is not None
    assert given[0].identity == given[1].identity
    assert given[0].backbone.keys() == given[1].backbone.keys()
    assert "DINOv3 License" in (given[1].licence or "")
    left_out = read_source(tmp_path / "theirs.pth").left_out
    assert left_out == ("norms.3.weight", "norms.3.bias")
    del state["stages.2.blocks.5.conv_dw.weight"]
    torch.save(state, tmp_path / "timm.pth")
    with pytest.raises(CheckpointError, match=r"is a convnext of \[2, 2, 5, 2\] blocks and \[40,"):
        read_source(tmp_path / "timm.pth")


def test_a_resnet_that_has_counted_no_batches_is_the_same_teacher(tmp_path: Path) -> None:
    state = _timms("resnet18").state_dict()
    first = {name: value for name, value in state.items() if "num_batches" not in name}
    given = []
    for name, tensors in (("timm", state), ("torchvision", first)):
        state["bn1.num_batches_tracked"].fill_(7)
        torch.save(tensors, tmp_path / f"{name}.pth")
        given.append(read_frozen_teacher(_config(tmp_path / f"{name}.pth", "resnet18")))
    counted, plain = given
    assert counted is not None
    assert plain is not None
    assert plain.identity == counted.identity
    assert plain.backbone.keys() == counted.backbone.keys()
    assert all(
        torch.equal(value, first[name]) for name, value in plain.backbone.items() if name in first
    )


def test_another_network_than_the_settings_say_is_refused(tmp_path: Path) -> None:
    torch.save(_timms(ATTO).state_dict(), tmp_path / "w.pth")
    config = _config(tmp_path / "w.pth", "convnext_femto.d1_in1k")
    with pytest.raises(ConfigError, match=r"holds a convnext_atto, and .* is a convnext_femto"):
        read_frozen_teacher(config)


def test_the_plan_counts_weights_products_and_memory() -> None:
    config = _config(Path("w.pth"))
    dims = dims_of(config)
    with torch.device("meta"):
        network = build_backbone(ATTO, img_size=SIZE)
    assert isinstance(network, ConvNet)
    followed = dims.followed
    assert followed is not None
    assert followed.parameters == sum(p.numel() for p in network.parameters())
    products = 0
    for stage, (depth, width) in enumerate(zip((2, 2, 6, 2), (40, 80, 160, 320), strict=True)):
        places = (SIZE // 4 // 2**stage) ** 2
        below = 3 * 4**2 if stage == 0 else 2**2 * width // 2
        products += places * width * (below + depth * (7**2 + 8 * width))
    maps = 2 * (2 + 2 * PATCHES) * 24 * 320
    flops = flops_of(dims)
    assert flops.followed == 2 * 2 * products
    assert flops.student_head == maps
    without = replace(dims, followed=None)
    assert peak(dims, SETUP).total > peak(without, SETUP).total
    more = persistent(dims, SETUP)["teacher"] - persistent(without, SETUP)["teacher"]
    assert more == SETUP.weight_bytes * followed.parameters


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_memory_of_a_forward_is_counted_by_hand(precision: str) -> None:
    """In bytes of the two global crops of an image, in the layers with most."""
    scalar = {"bf16": 2, "fp32": 4}[precision]
    places, width = 2 * (SIZE // 4) ** 2, 40
    # In the first stage's second block: the stage's input and the block's, its norm's output, and
    # before and after the activation four times as wide.
    assert _live_bytes(ATTO, precision) == scalar * places * width * (1 + 1 + 1 + 4 + 4)
    # The first convolution's output, before and after its norm, whose statistics are small. In
    # bfloat16 the norm's input and output are there in float32, too.
    beside = 2 * 4 if precision == "bf16" else 0
    norm = 2 * 64 * (SIZE // 2) ** 2 * (2 * scalar + beside)
    assert _live_bytes("resnet18", precision) == pytest.approx(norm, rel=0.01)


def _live_bytes(name: str, precision: str) -> int:
    """What a plan counts."""
    config = _config(Path("w.pth"), name)
    engine = config.engine.model_copy(update={"precision": precision})
    followed = dims_of(config.model_copy(update={"engine": engine})).followed
    assert isinstance(followed, ForwardCounts)
    return followed.live_bytes
