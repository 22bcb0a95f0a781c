"""A run that draws the sizes of its crops for each step: on any ranks, stages and images."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from dinoscale.checkpoint.layout import directory, shard_file
from dinoscale.data.augmentation.mixed_sizes import drawn_size
from tests.distributed.tiny_run import dinov2, tiny_config
from tests.harness import run_distributed
from tests.unit.data.conftest import jpeg, write_tar

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STOP, LAST = 3, 6
WEIGHTS = (0.6, 0.12, 0.28)
# Of global, local and Gram crops, in pixels; of 20 the network sees 2 x 2 patches of 8.
SIDES = ((32, 16, 64), (48, 20, 48), (48, 24, 72))
IMAGES = 16
# Stage, images and precision: each two of them together. Stage 2 draws its images, in fp32.
PAIRS = [
    *("0_drawn_fp32", "1_drawn_bf16", "3_drawn_bf16"),
    *("0_streamed_bf16", "1_streamed_fp32", "3_streamed_fp32"),
]
BF16 = torch.finfo(torch.bfloat16).eps  # relative; of losses, which are means over many roundings
LOGGED = ("loss", "dino_loss", "ibot_loss", "gram_loss", "grad_norm", "global_size", "local_size")


def _run(
    run_dir: Path, *, kind: str = "2_drawn_fp32", stop: int = LAST, workers: int = 0
) -> dict[str, Any]:
    stage, images, precision = kind.split("_")
    keys = ("weight", "global_size", "local_size", "gram_crop_size")
    mixture = [
        dict(zip(keys, (weight, *sides), strict=True))
        for weight, sides in zip(WEIGHTS, SIDES, strict=True)
    ]
    del mixture[1]["gram_crop_size"]  # then as large as the global crop
    train = {"epochs": 2, "batch_size": 4, "micro_batch_size": 2, "stop_after_steps": stop}
    return {"run_dir": str(run_dir)} | dinov2(
        "centering",
        patch_head=False,
        model={"rope": {"rescale": 2.0}, "num_heads": 5},
        crops={"global_size": 48, "local_size": 24, "mixture": mixture},
        # As many masked patches on each rank: the center of patches averages the ranks' means.
        ibot={"mask_rule": "dinov3", "mask_group": 2},
        koleo={"loss_weight": 0.0},
        optim={"lr": 0.002},  # a few steps do not amplify the rounding to bf16
        gram={"loss_weight": 1.0, "refresh_every_steps": 1},
        engine={"zero_stage": int(stage), "precision": precision},
        train=train,
        data=_images(run_dir.parent, images) | {"num_workers": workers},
    )


def _images(folder: Path, images: str) -> dict[str, Any]:
    if images == "drawn":
        return {"train": f"synthetic:shapes?images={IMAGES}&size=40"}
    shards, manifest = f"pipe:cat {folder}/{{0..1}}.tar", str(folder / "manifest.json")
    return {"train": shards, "manifest": manifest, "stream_readers": 2, "shuffle_buffer": 3}


def _write_shards(folder: Path) -> None:
    for shard in range(2):
        keys = range(shard * IMAGES // 2, (shard + 1) * IMAGES // 2)
        write_tar(folder / f"{shard}.tar", [(f"{key:02}.jpg", jpeg(key)) for key in keys])
    shards = [{"name": f"{shard}.tar", "samples": IMAGES // 2} for shard in range(2)]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "shards": shards}))


def train_all(runs: list[dict[str, Any]]) -> None:
    """On every rank: train each of `runs`, arguments of `tiny_config`.

    How many patches each forward sees goes to a file in the run's directory.
    """
    from dinoscale.models.vit import PatchEmbed
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.trainer import train

    os.environ["DINOSCALE_ALLOW_PIPE"] = "1"
    process, counts = read_process(os.environ), list[int]()

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if isinstance(module, PatchEmbed):
            counts.append(len(inputs[0]))

    with register_module_forward_pre_hook(count):
        for run in runs:
            counts.clear()
            train(tiny_config(**run), process)
            (Path(run["run_dir"]) / f"patches_{process.rank}.json").write_text(json.dumps(counts))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On 2 ranks a run, one that is interrupted, `PAIRS`; on 1 rank one with 2 micro-batches."""
    root = tmp_path_factory.mktemp("mixed")
    _write_shards(root)
    on_two = [
        _run(root / "whole"),
        _run(root / "resumed", stop=STOP, workers=1),
        _run(root / "resumed"),
        *(_run(root / kind, kind=kind) for kind in PAIRS),
    ]
    function = "tests.distributed.test_mixed_sizes:train_all"
    for ranks, jobs in ((2, on_two), (1, [_run(root / "accumulated")])):
        run_distributed(function, world_size=ranks, timeout_s=200, runs=jobs)
    return root


def _logged(run_dir: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in LOGGED} for line in lines if "loss" in line]


def test_ranks_and_micro_batches_of_a_step_have_its_sizes(runs: Path) -> None:
    whole, accumulated = _logged(runs / "whole"), _logged(runs / "accumulated")
    assert len(whole) == LAST
    assert len({(line["global_size"], line["local_size"]) for line in whole}) == 3
    assert min(line["gram_loss"] for line in whole[1:]) > 0  # once the first step has given one
    for of_ranks, of_one in zip(whole, accumulated, strict=True):
        assert of_ranks == pytest.approx(of_one, rel=1e-5, abs=1e-7)


def test_resume_is_bitwise_identical_with_and_without_workers(runs: Path) -> None:
    assert _logged(runs / "resumed") == _logged(runs / "whole")
    for rank in (0, 1):
        files = [directory(runs / name, LAST) / shard_file(rank) for name in ("whole", "resumed")]
        first, second = map(load_file, files)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


def _patches() -> list[int]:
    """Of each forward of a rank: teacher, Gram network once it has weights, student."""
    found = []
    for step in range(LAST):
        sides = SIDES[drawn_size(WEIGHTS, seed=0, step=step)]
        of_global, of_local, of_gram = (4 * (side // 8) ** 2 for side in sides)  # 2 views, 2 images
        found += [of_global, *([of_gram] if step else []), of_global + of_local]
    return found


@pytest.mark.parametrize("kind", ["whole", *PAIRS])
def test_crops_have_the_sizes_drawn_at_every_stage_from_any_images_in_any_precision(
    runs: Path, kind: str
) -> None:
    for rank in (0, 1):
        assert json.loads((runs / kind / f"patches_{rank}.json").read_text()) == _patches()


@pytest.mark.parametrize("kind", PAIRS[:-1])
def test_stages_and_precisions_agree_on_the_same_images(runs: Path, kind: str) -> None:
    _, images, precision = kind.split("_")
    of_images = "whole" if images == "drawn" else PAIRS[-1]
    for here, there in zip(_logged(runs / kind), _logged(runs / of_images), strict=True):
        if precision == "fp32":
            assert here == pytest.approx(there, rel=1e-5, abs=1e-7)
        else:
            for term in ("loss", "gram_loss"):
                assert here[term] == pytest.approx(there[term], rel=BF16)
