"""`dinoscale evaluate` on two processes: one report, and refusals on both."""

import json
from pathlib import Path

import pytest

from dinoscale.convert.weights_file import BackboneCard, BackboneShape, save_backbone
from dinoscale.models.zoo import build_backbone
from tests.forked import start_module
from tests.harness import environment_of
from tests.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
TRAIN, TEST = (f"synthetic:shapes?images=101&size=16&split={split}" for split in ("train", "test"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    shape = BackboneShape("vit_tiny_patch16_224", **SIZES)  # type: ignore[arg-type]  # sizes only
    card = BackboneCard(shape, (0.5,) * 3, (0.2,) * 3, resize=16, crop=16, source="untrained")
    save_backbone(path, build_backbone(shape.name, **SIZES).state_dict(), card)
    return path


def _on_ranks(world_size: int, *arguments: object) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of every rank."""
    port = free_port()
    ranks = [
        start_module(
            *("dinoscale", "evaluate", *arguments),
            environment=environment_of(rank, world_size=world_size, port=port),
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]


_TASKS = {
    "knn": f"--train {TRAIN} --test {TEST} --num-workers 0 --pixels",
    "discover": "synthetic:shapes?images=5&size=32 --size 32 --untrained",  # 3 and 2 images
    "transfer": f"--sets {TRAIN} --shots 1 --seeds 2 --c 1 --num-workers 0",
}


@pytest.mark.parametrize("task", _TASKS)
def test_rank_0_prints_the_report_of_one_process(weights: Path, task: str) -> None:
    arguments = (task, weights, *_TASKS[task].split())
    ((code, alone, _),) = _on_ranks(1, *arguments)
    assert code == 0
    (first, printed, said), (second, nothing, _) = _on_ranks(2, *arguments)
    assert (first, second) == (0, 0), said
    assert nothing == ""
    assert json.loads(printed) == json.loads(alone)


def test_a_user_error_ends_both_ranks_with_a_sentence(weights: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for code, printed, said in _on_ranks(2, "knn", weights, "--train", nowhere, "--test", TEST):
        assert code == 2
        assert printed == ""
        assert "error: " in said
        assert f"{nowhere} does not exist" in said
        assert "Traceback" not in said
