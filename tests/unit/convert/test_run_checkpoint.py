"""A run's checkpoint of several ranks becomes whole weights, in little more than their memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinoscale.checkpoint.checksums import sha256, write_sums
from dinoscale.checkpoint.load import open_run
from dinoscale.convert.conversion import convert
from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import load_backbone
from dinoscale.engine.build import build_networks
from dinoscale.planning.bench.tensor_memory import with_peak_bytes
from tests.distributed.tiny_run import tiny_config

RANKS = 4
PROTOTYPES = 40_009  # odd, so that fragments end inside rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run whose checkpoint lies in the files of four ranks, and its teacher's weights."""
    head = {"num_prototypes": PROTOTYPES, "hidden_dim": 22, "bottleneck_dim": 15}
    config = tiny_config(head=head)
    teacher = dict(build_networks(config)[1].state_dict())
    kinds = {"ema": 0.0, "master": 1.0, "exp_avg": 2.0, "exp_avg_sq": 3.0}
    folder = tmp_path_factory.mktemp("run")
    step = folder / "checkpoints" / "step_00000007"
    step.mkdir(parents=True)
    for rank in range(RANKS):
        pieces: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        for name, tensor in teacher.items():
            share = -(-tensor.numel() // RANKS)
            piece = tensor.flatten()[rank * share : (rank + 1) * share]
            if len(piece):
                starts[name] = rank * share
                pieces |= {f"{kind}/{name}": piece + shift for kind, shift in kinds.items()}
        metadata = {"starts": json.dumps(starts)}
        save_file(pieces, step / f"shard_{rank:05d}.safetensors", metadata=metadata)
    save_file({"center": torch.zeros(2)}, step / "shared.safetensors")
    state: dict[str, Any] = {
        **{"format": 2, "step": 7, "plan": {}, "optimizer_steps": {}},
        "progress": {"knn_top1": 12.5, "of_a_later_version": 1},
        "config": config.model_dump(mode="json"),
        "shapes": {name: list(tensor.shape) for name, tensor in teacher.items()},
    }
    state["config"]["data"]["train"] = "http://bob:PASSW0RD@host/a.tar"  # as once was allowed
    (step / "state.json").write_text(json.dumps(state))
    write_sums(step, {file.name: sha256(file) for file in sorted(step.iterdir())})
    return folder, teacher


def test_either_network_is_merged_bit_for_bit(run: tuple[Path, dict[str, Tensor]]) -> None:
    folder, teacher = run
    for path in (folder, folder / "checkpoints" / "step_00000007"):
        for network, shift in (("teacher", 0.0), ("student", 1.0)):
            signs: list[None] = []
            weights = read_source(
                path,
                network=network,  # type: ignore[arg-type]  # both are
                heartbeat=lambda signs=signs: signs.append(None),  # type: ignore[misc]
            )
            assert len(signs) > RANKS + 2  # files are compared, and then read
            assert weights.kind == "run"
            assert weights.head is not None
            found = {f"backbone.{name}": tensor for name, tensor in weights.backbone.items()}
            found |= {f"head.{name}": tensor for name, tensor in weights.head.items()}
            assert found.keys() == teacher.keys()
            assert all(torch.equal(found[name], teacher[name] + shift) for name in found)
    assert weights.card.source.endswith("step_00000007 student")
    assert (weights.run or {})["knn_top1"] == 12.5


def test_a_run_is_loaded_like_any_weights(run: tuple[Path, dict[str, Tensor]]) -> None:
    folder, teacher = run
    backbone, card = load_backbone(folder)
    assert (card.crop, card.backbone.num_heads) == (16, 2)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, teacher[f"backbone.{name}"])


def test_a_published_card_has_the_recipe_and_no_paths(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, _ = run
    convert(folder, tmp_path / "w.safetensors", to="dino")
    text = (tmp_path / "w.safetensors.json").read_text()
    recipe = json.loads(text)["recipe"]
    sections = {"seed", "model", "head", "crops", "augment", "dino", "optim"}
    assert recipe.keys() == sections | {"data", "train", "engine"}
    assert recipe["train"].keys() == {"epochs", "batch_size", "micro_batch_size"}
    assert recipe["optim"] == tiny_config().optim.model_dump(mode="json")
    assert b"PASSW0RD" not in (tmp_path / "w.safetensors").read_bytes() + text.encode()
    assert str(folder.parent) not in text + str(read_source(tmp_path / "w.safetensors").card)


def test_merging_needs_the_result_and_at_most_one_shard(
    run: tuple[Path, dict[str, Tensor]],
) -> None:
    folder, teacher = run
    result = sum(tensor.numel() * 4 for tensor in teacher.values())
    largest = max(file.stat().st_size for file in folder.rglob("shard_*"))
    assert largest < 1.2 * result  # four kinds of a quarter each
    _, mapped = with_peak_bytes(lambda: open_run(folder))  # the allocator counts mapped files
    _, peak = with_peak_bytes(lambda: read_source(folder))
    assert result <= peak - mapped <= result + largest
