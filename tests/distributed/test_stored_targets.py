"""Students of the stored outputs of a frozen teacher: bit for bit those of the live one."""

import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinoscale.checkpoint.layout import directory, shard_file
from dinoscale.checkpoint.load import open_run
from dinoscale.config.resolve import resolve
from dinoscale.data.sources.bad_samples import BadSample
from dinoscale.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DinoscaleError,
    OutputError,
    UnavailableError,
)
from dinoscale.runtime.outputs import sha256
from tests.distributed.tiny_run import dinov2, tiny_config
from tests.harness import RankFailedError, run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(180)]

STEPS, SHARD_STEPS, STOP = 3, 2, 1
IMAGES = 8
LOGGED = ("loss", "dino_loss", "ibot_loss")
# Wider and deeper than the students, 8 x 8 patches in a crop, of which they have 4 x 4.
LARGE = {"embed_dim": 24, "depth": 3, "patch_size": 4, "registers": 2}
HEADS = {
    "head": {"num_prototypes": 33, "hidden_dim": 26, "bottleneck_dim": 17, "batch_norm": True},
    "patch_head": {"num_prototypes": 29, "hidden_dim": 14, "bottleneck_dim": 11},
}
TEACHER = {"backbone": "vit_tiny_patch16_224", "num_heads": 2, **LARGE}
SECOND = {"model": {"embed_dim": 16, "depth": 1}, "head": {"batch_norm": True}}
FEATURES = {
    "dino": {"loss_weight": 0.0},
    "ibot": {"loss_weight": 0.0},
    "crops": {"global_size": 32, "num_local": 0},
}
LEARNED = {"class_feature_weight": 1.0, "patch_feature_weight": 0.5}
# Of pairs, a live run and one of stored targets: stage, images of a micro-batch, other settings.
PAIRS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "first": (0, 1, {}),
    "second": (3, 1, SECOND),
    "features": (0, 1, FEATURES),
}


def _run(run_dir: Path, *, stop: int = STEPS, images: int = 1, **changes: Any) -> dict[str, Any]:
    """Arguments of `tiny_config`."""
    sections = dinov2("sinkhorn_knopp", patch_head=True)
    if changes.get("ibot", {}).get("loss_weight") == 0:
        del sections["patch_head"]
    names = sections.keys() | changes
    sections = {name: sections.get(name, {}) | changes.get(name, {}) for name in names}
    sections["koleo"] = {"loss_weight": 0.0}  # which needs two images
    sections["train"] = {"epochs": 2, "batch_size": 4, "micro_batch_size": images}
    sections["train"] |= {"stop_after_steps": stop} | changes.get("train", {})
    sections["data"] = {"train": f"synthetic:shapes?images={IMAGES}&size=40", "num_workers": 0}
    sections["checkpoint"] = {"every_steps": 9, "keep_last": 9}
    return {"run_dir": str(run_dir), **sections}


def _student(
    root: Path, name: str, pair: str, *, targets: str | None = None, **more: Any
) -> dict[str, Any]:
    """A student of a pair, of the live teacher or of stored targets."""
    stage, images, changes = PAIRS[pair]
    distill: dict[str, Any] = {"model": TEACHER, **(LEARNED if pair == "features" else HEADS)}
    distill |= (
        {"teacher": str(root / "source")} if targets is None else {"targets": str(root / targets)}
    )
    engine = {"zero_stage": stage, "precision": "fp32"}
    more = {"images": images} | more
    return _run(root / name, **{**changes, **more}, distill=distill, engine=engine)


def work(jobs: list[tuple[str, dict[str, Any], str]]) -> list[str]:
    """On every rank: do jobs (kind, arguments of `tiny_config`, folder), say how each ended."""
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.targets.write import write_targets
    from dinoscale.training.trainer import train

    process, ends = read_process(os.environ), []
    for kind, run, out in jobs:
        try:
            if kind == "train":
                train(tiny_config(**run), process)
                for thread in threading.enumerate():
                    if thread.name.startswith("targets"):
                        thread.join(10)
                        assert not thread.is_alive(), "it waits for steps that nobody takes"
            else:
                write_targets(tiny_config(**run), process, out, shard_steps=SHARD_STEPS)
            ends.append("done")
        except DinoscaleError as error:  # noqa: PERF203  # other jobs follow
            ends.append(str(error))
    return ends


def write_and_die(run: dict[str, Any], out: str, renames: int) -> None:
    """Write targets, and be killed before a file gets its name."""
    left = renames

    def count(event: str, _arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "os.rename":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    work([("write", run, out)])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs and targets."""
    root = tmp_path_factory.mktemp("stored")
    jobs: list[tuple[str, dict[str, Any], str]] = [
        ("train", _run(root / "source", stop=1, model=LARGE, **HEADS), ""),
        ("write", _student(root, "unused", "first"), str(root / "targets")),
        ("write", _student(root, "unused", "features"), str(root / "targets_features")),
        ("write", _student(root, "unused", "second"), str(root / "targets_sharded")),
    ]
    for pair in PAIRS:
        targets = "targets_features" if pair == "features" else "targets"
        jobs.append(("train", _student(root, f"{pair}_live", pair), ""))
        if pair == "first":  # the run of stored targets goes on from the live teacher
            jobs.append(("train", _student(root, "first_stored", "first", stop=STOP), ""))
        jobs.append(("train", _student(root, f"{pair}_stored", pair, targets=targets), ""))
    jobs.append(("train", _student(root, "pairs", "first", images=2, targets="targets"), ""))
    function = "tests.distributed.test_stored_targets:work"
    first, _ = run_distributed(function, world_size=2, timeout_s=150, jobs=jobs)
    assert first == len(jobs) * ["done"]
    return root


def _differing(one: Path, other: Path, step: int = STEPS) -> list[str]:
    """Names of tensors that two runs on two ranks have not alike at a step."""
    found = []
    for file in (shard_file(0), shard_file(1), "shared.safetensors"):
        first, second = (load_file(directory(run, step) / file) for run in (one, other))
        assert first.keys() == second.keys()
        found += [key for key, value in first.items() if not torch.equal(value, second[key])]
    return found


def _logged(run_dir: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in LOGGED if key in line} for line in lines if "loss" in line]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_student_of_stored_targets_is_that_of_the_live_teacher(root: Path, pair: str) -> None:
    live, stored = root / f"{pair}_live", root / f"{pair}_stored"
    assert len(_logged(live)) == STEPS
    assert _logged(stored) == _logged(live)
    assert _differing(live, stored) == []


@pytest.mark.parametrize(("pair", "out"), [("first", ""), ("features", "_features")])
def test_the_bytes_of_an_image_are_those_that_are_said(root: Path, pair: str, out: str) -> None:
    from dinoscale.training.targets.write import bytes_of_image

    config = tiny_config(**_student(root, "unused", pair))
    stored = load_file(root / f"targets{out}" / "steps-00000-slot-00000.safetensors")
    of_step = sum(value.nbytes for name, value in stored.items() if name.startswith("0."))
    plan = resolve(config, world_size=2, num_images=IMAGES)
    assert of_step == bytes_of_image(config, plan) * plan.micro_batch_size


def test_two_students_of_one_folder_are_different_ones(root: Path) -> None:
    first, second = _logged(root / "first_stored"), _logged(root / "second_stored")
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_a_run_of_the_live_teacher_has_gone_on_with_its_stored_targets(root: Path) -> None:
    begun, resumed = (
        open_run(directory(root / "first_stored", step)).state["config"]["distill"]
        for step in (STOP, STEPS)
    )
    assert (begun["targets"], resumed["teacher"]) == (None, None)
    assert begun["teacher"]
    assert resumed["targets"]


def test_micro_batches_of_another_size_read_the_same_targets(root: Path) -> None:
    # The student multiplies other shapes, which rounds otherwise.
    pairs, first = _logged(root / "pairs"), _logged(root / "first_live")
    for here, there in zip(pairs, first, strict=True):
        assert here == pytest.approx(there, rel=1e-5)


def _written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_one_process_that_was_killed_writes_the_same_bytes(root: Path, tmp_path: Path) -> None:
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.targets.write import write_targets

    run, out = _student(root, "unused", "first"), tmp_path / "targets"
    function = "tests.distributed.test_stored_targets:write_and_die"
    # Renamed: settings, prototypes, a file of each slot, a record; then the second shard's.
    slots = 4
    arguments: dict[str, Any] = {"run": run, "out": str(out), "renames": 2 + slots + 1 + 2}
    with pytest.raises(RankFailedError, match="exit -9"):
        run_distributed(function, world_size=1, timeout_s=60, **arguments)
    assert (out / "unfinished.json").exists()
    assert len([*out.glob("steps-*.safetensors")]) == slots + 1
    with pytest.raises(DataError, match=r"^distill.targets: .* is not finished: start the comm"):
        _open(root, "first", targets=str(out))
    found = write_targets(tiny_config(**run), read_process({}), out, shard_steps=SHARD_STEPS)
    assert (found["shards"], found["new_shards"]) == (2, 1)
    assert _written(out) == _written(root / "targets")
    another = tiny_config(**run).model_copy(update={"seed": 4})
    with pytest.raises(OutputError, match=r"holds other targets: run.seed is 0 there and 4 now"):
        write_targets(another, read_process({}), out, shard_steps=SHARD_STEPS)
    in_training = tiny_config(**_of_teacher(run, drop_path_rate=0.5))
    found = write_targets(in_training, read_process({}), out, shard_steps=SHARD_STEPS)
    assert found["new_shards"] == 0
    another = tiny_config(**_of_teacher(run, position_resize="by_size"))
    with pytest.raises(
        OutputError, match=r"distill.model.position_resize is null there and \"by_s"
    ):
        write_targets(another, read_process({}), out, shard_steps=SHARD_STEPS)


def _of_teacher(run: dict[str, Any], **model: Any) -> dict[str, Any]:
    return run | {"distill": run["distill"] | {"model": run["distill"]["model"] | model}}


def _open(
    root: Path,
    pair: str,
    *,
    targets: str = "targets",
    go_on: Path | None = None,
    seed: int = 0,
    **changes: Any,
) -> None:
    """What the start of a student asks of its targets; None in changes takes a setting out."""
    from dinoscale.training.feed import open_images
    from dinoscale.training.frozen_teacher import read_same_teacher
    from dinoscale.training.targets.folder import open_targets

    run = _student(root, "unused", pair, targets=targets)
    for name, change in changes.items():
        if change is None:
            del run[name]
        else:
            merged = run.get(name, {}) | change if isinstance(change, dict) else change
            kept = isinstance(merged, dict) and {k: v for k, v in merged.items() if v is not None}
            run[name] = kept or merged
    config = tiny_config(**run).model_copy(update={"seed": seed})
    source = open_images(config)
    plan = resolve(config, world_size=1, num_images=len(source))
    folder = open_targets(config, plan, source, source.identity())
    read_same_teacher(config, None if go_on is None else open_run(go_on), folder)


CLASSES_ALONE: dict[str, Any] = {"ibot": {"loss_weight": 0.0}, "patch_head": None}
NO_HEADS: dict[str, Any] = {"head": None, "patch_head": None}


@pytest.mark.parametrize(
    ("pair", "changes", "says"),
    [
        ("first", {"seed": 4}, "seed is 0 there and 4 now"),
        ("first", {"train": {"batch_size": 2}}, "train.batch_size is 4 there and 2 now"),
        ("first", {"crops": {"num_local": 1}}, "crops.num_local is 2 there and 1 now"),
        ("first", {"augment": {"hue": 0.0}}, r"augment.hue is 0\.\d+ there and 0.0 now"),
        ("first", {"ibot": {"mask_prob": 1.0}}, "ibot.mask_prob is 0.5 there and 1.0 now"),
        ("first", {"engine": {"precision": "bf16"}}, 'engine.precision is "fp32" there and "bf16"'),
        (
            "first",
            {"train": {"stop_after_steps": None}},
            "targets of 3 steps, and this run takes 4",
        ),
        ("first", {"data": {"train": "synthetic:shapes?images=8&size=41"}}, "data.train is "),
        (
            "first",
            {"distill": LEARNED | NO_HEADS, **CLASSES_ALONE},
            "outputs of heads, and this run learns",
        ),
        ("features", {"distill": {"model": TEACHER | {"embed_dim": 26}}}, "features of width 24"),
        (
            "first",
            {"distill": {"patch_head": HEADS["patch_head"] | {"bottleneck_dim": 10}}},
            r"head of patch tokens of .* is not that of distill.patch_head.* of another shape",
        ),
        (
            "first",
            {"distill": {"patch_head": None}, "patch_head": {"num_prototypes": 33}},
            "has a head of its own for patch tokens",
        ),
        ("first", CLASSES_ALONE, None),  # which are there, too
        ("first", {}, None),
    ],
)
def test_what_decides_the_targets_is_the_same(
    root: Path, pair: str, changes: dict[str, Any], says: str | None
) -> None:
    targets = str(root / ("targets_features" if pair == "features" else "targets"))
    if says is None:
        _open(root, pair, targets=targets, **changes)
        return
    with pytest.raises(ConfigError, match=rf"^distill.targets: .*{says}"):
        _open(root, pair, targets=targets, **changes)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"patch_head.last_layer.weight_v": None}, "has no own head of patch tokens; compute"),
        ({"head.last_layer.bias": torch.zeros(33)}, "is not that of distill.head.*unexpected"),
        ({"head.last_layer.weight_g": torch.full((33, 1), 2.0)}, "distill.head.*norms between 2 a"),
        ({"head.last_layer.weight_g": torch.ones(33, 1)}, None),  # as normed ones are
    ],
)
def test_prototypes_are_those_of_the_heads_that_the_student_names(
    root: Path, tmp_path: Path, changed: dict[str, torch.Tensor | None], says: str | None
) -> None:
    folder = tmp_path / "targets"
    shutil.copytree(root / "targets", folder)
    path = folder / "prototypes.safetensors"
    found = load_file(path) | changed
    save_file({name: value for name, value in found.items() if value is not None}, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["prototypes"] |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if says is None:
        _open(root, "first", targets=str(folder))
        return
    with pytest.raises((CheckpointError, ConfigError), match=rf"^distill.targets: .*{says}"):
        _open(root, "first", targets=str(folder))


@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "manifest", "absent"])
def test_damaged_targets_are_named(root: Path, tmp_path: Path, damage: str) -> None:
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.targets.write import write_targets

    folder = tmp_path / "targets"
    if damage != "absent":
        shutil.copytree(root / "targets", folder)
    file = folder / "steps-00000-slot-00001.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "flipped":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{}")
    says = {
        "missing": r"slot-00001.safetensors is missing",
        "short": r"slot-00001.safetensors is damaged: it has \d+ bytes",
        "flipped": r"slot-00001.safetensors is damaged: its SHA-256 is",
        "manifest": r"manifest.json is not as it was written \(KeyError: .format.\)",
        "absent": r"is not there; compute them with",
    }[damage]
    with pytest.raises(DataError, match=rf"^distill.targets: .*{says}") as raised:
        _first(root, folder).of(0, 1, *_crops(root, 1))
    assert raised.value.exit_code == 2
    if damage == "missing":  # the command that wrote them writes what is missing
        run = _student(root, "unused", "first")
        found = write_targets(tiny_config(**run), read_process({}), folder, shard_steps=SHARD_STEPS)
        assert found["new_shards"] == 1
        assert _written(folder) == _written(root / "targets")


def _first(root: Path, folder: Path) -> Any:
    """A reader of targets in one process, once they are opened."""
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.feed import open_images
    from dinoscale.training.targets.folder import open_targets
    from dinoscale.training.targets.read import TargetReader

    config = tiny_config(**_student(root, "unused", "first", targets=str(folder)))
    source = open_images(config)
    plan = resolve(config, world_size=1, num_images=len(source))
    opened = open_targets(config, plan, source, source.identity())
    assert opened is not None
    return TargetReader(opened, config, plan, read_process({}))


def _crops(root: Path, index: int) -> tuple[Any, torch.Tensor]:
    """A micro-batch of the first step in one process, and its chosen patches."""
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.feed import Feed, masks_of, open_images

    config = tiny_config(**_student(root, "unused", "first"))
    source = open_images(config)
    plan = resolve(config, world_size=1, num_images=len(source))
    feed = Feed(config, plan, read_process({}), source, depth=2)
    masks = masks_of(config, step=0, first_image=index, images=1)
    assert masks is not None
    return next(feed.steps(0, offset=0))[index], masks.rows


@pytest.mark.parametrize("kind", ["images", "crops", "pixels", "restored", "unreadable", "patches"])
def test_each_micro_batch_is_compared_with_what_its_targets_are_of(root: Path, kind: str) -> None:
    reader = _first(root, root / "targets")
    batch, rows = _crops(root, 1)
    assert len(rows)
    reader.of(0, 1, batch, rows)
    params, pixels = batch.params.copy(), batch.global_crops.clone()
    params["flip"][0] ^= True
    pixels[1, 0, -1, -1, -1] += 1
    bad = [BadSample("a.jpg", "stale", sample_id=0, replaced_by=1, repeat=0, unavailable=True)]
    others = {
        "images": (replace(batch, sample_ids=batch.sample_ids + 1), rows),
        "crops": (replace(batch, params=params), rows),
        "pixels": (replace(batch, global_crops=pixels), rows),
        "unreadable": (replace(batch, global_crops=pixels, bad=bad), rows),
        "restored": (replace(batch, global_crops=pixels), rows),
        "patches": (batch, rows + 1),
    }
    listed = {"number": int(batch.sample_ids[0]), "path": "b.jpg", "error": "damaged"}
    of_crops = "the crops of step 0 are others"
    says = {
        "images": "the images of step 0 are others .* another version of dinoscale",
        "crops": f"{of_crops} .* files of data.train have other contents, or another version",
        "pixels": f"{of_crops} .* start again, or remove that folder and compute them with",
        "restored": rf"{of_crops} .*: b.jpg could not .* \(damaged\), and can be read now; remove",
        "unreadable": rf"{of_crops} .*: a.jpg cannot be read now \(stale\)",
        "patches": "the patches of step 0 are others",
    }
    if kind == "restored":
        reader._folder.manifest["shards"][0]["unreadable"].append(listed)
    with pytest.raises(DataError, match=rf"^distill.targets: {says[kind]}") as raised:
        reader.of(0, 1, *others[kind])
    assert isinstance(raised.value, UnavailableError) == (kind == "unreadable")


def test_a_run_goes_on_with_the_targets_of_its_own_teacher_only(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "targets"
    shutil.copytree(root / "targets", other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["teacher"]["identity"] = 64 * "0"
    (other / "manifest.json").write_text(json.dumps(manifest))
    _open(root, "first", go_on=root / "first_stored")
    with pytest.raises(ConfigError, match=r"^distill.targets: the run of .* weights are others"):
        _open(root, "first", targets=str(other), go_on=root / "first_stored")


def test_a_teacher_in_partitions_writes_the_same_bytes(root: Path) -> None:
    assert _written(root / "targets_sharded") == _written(root / "targets")


def test_targets_of_mixed_sizes_and_larger_micro_batches_are_those_of_each_step(
    root: Path, tmp_path: Path
) -> None:
    from dinoscale.runtime.launcher_env import read_process
    from dinoscale.training.feed import Feed, open_images
    from dinoscale.training.targets.folder import open_targets
    from dinoscale.training.targets.read import TargetReader
    from dinoscale.training.targets.write import write_targets

    mixture = [
        {"weight": 0.5, "global_size": size, "local_size": 16, "gram_crop_size": None}
        for size in (48, 32)
    ]
    crops = {"crops": {"global_size": 48, "local_size": 16, "mixture": mixture}}
    live, config = (
        tiny_config(
            **_student(root, "unused", "first", targets=targets, images=images, **crops)
        ).model_copy(update={"seed": 2})  # draws both sizes
        for targets, images in ((None, 2), (str(tmp_path), 1))
    )
    process = read_process({})
    write_targets(live, process, tmp_path, shard_steps=SHARD_STEPS)
    source = open_images(config)
    plan = resolve(config, world_size=1, num_images=len(source))
    opened = open_targets(config, plan, source, source.identity())
    assert opened is not None
    reader = TargetReader(opened, config, plan, process)
    feed = Feed(config, plan, process, source, depth=2, targets=reader)
    sizes = set()
    for step, batches in enumerate(feed.steps(0, offset=0)):
        for index, batch in enumerate(batches):
            found = feed.finish(step, index, batch)
            sizes.add(found.global_crops.shape[-1])
            assert found.stored is not None
            assert found.masks is not None
            assert found.stored.patches is not None
            assert len(found.stored.patches) == len(found.masks.rows)
    assert sizes == {32, 48}
