"""Weights and checkpoints from elsewhere: nothing in them runs.

Every bomb would create the file `fired` if it were executed; that it would is checked too.
"""

import argparse
import collections
import io
import json
import os
import pickle
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dinoscale import cli
from dinoscale.checkpoint.checksums import sha256, write_sums
from dinoscale.checkpoint.load import Checkpoint
from dinoscale.convert.card import METADATA_KEY
from dinoscale.convert.source import read_source
from dinoscale.convert.weights_file import BackboneCard, BackboneShape, load_backbone
from dinoscale.errors import CheckpointError
from tests.e2e.hostile import SYNTHETIC, Call, dinoscale, refused, settings


class _SetState:
    """Unpickling this calls its own `__setstate__`."""

    def __init__(self, fired: Path) -> None:
        self.fired = str(fired)

    def __getstate__(self) -> str:
        return self.fired

    def __setstate__(self, fired: str) -> None:
        Path(fired).touch()


class _StateDict(collections.OrderedDict[str, object]):
    """Tensors with a bomb in the attribute where PyTorch keeps versions of modules."""

    bomb: object = None

    def __reduce__(self) -> Any:
        return collections.OrderedDict, (), {"_metadata": self.bomb}, None, iter(self.items())


BOMBS: dict[str, Callable[[Path], object]] = {
    "system": lambda fired: Call(os.system, f"touch '{fired}'"),
    "popen": lambda fired: Call(os.popen, f"touch '{fired}'"),
    "run": lambda fired: Call(subprocess.check_call, ["touch", str(fired)]),
    "open": lambda fired: Call(open, str(fired), "w"),
    "eval": lambda fired: Call(eval, f"open({str(fired)!r}, 'w')"),
    "exec": lambda fired: Call(exec, f"open({str(fired)!r}, 'w')"),
    "setstate": _SetState,
    "storage": lambda fired: Call(
        torch.storage._load_from_bytes, _torch_bytes(BOMBS["open"](fired), zipped=False)
    ),
    "numpy": lambda fired: np.array([BOMBS["open"](fired)], dtype=object),
    "pickle": lambda fired: Call(pickle.loads, pickle.dumps(BOMBS["open"](fired))),
}


def _with_metadata(bomb: object) -> _StateDict:
    state = _StateDict(weight=torch.zeros(2))
    state.bomb = bomb
    return state


PLACES: dict[str, Callable[[Any], object]] = {
    "bare": lambda bomb: bomb,
    "state dict": lambda bomb: {"cls_token": torch.zeros(1, 1, 4), "pos_embed": bomb},
    "metadata": _with_metadata,
    "args": lambda bomb: {"teacher": {}, "args": argparse.Namespace(arch="vit_small", extra=bomb)},
    "deep in args": lambda bomb: {"args": argparse.Namespace(list=[({"deeper": bomb},)])},
    "neighbour": lambda bomb: {"args": [argparse.Namespace(patch_size=16), bomb]},
    "optimizer": lambda bomb: {"optimizer": {"state": {0: {"step": bomb}}}},
}


def _torch_bytes(value: object, *, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _formats(value: object) -> dict[str, bytes]:
    """One value in every container that PyTorch has had, and in all plain pickles."""
    plain = {f"protocol {n}": pickle.dumps(value, n) for n in range(pickle.HIGHEST_PROTOCOL + 1)}
    zipped = {f"zip, {zipped}": _torch_bytes(value, zipped=zipped) for zipped in (True, False)}
    return plain | zipped | {"TorchScript": _script_archive(value)}


def _script_archive(value: object) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"archive/{name}", pickle.dumps(value, 2))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


@pytest.fixture
def fired(tmp_path: Path) -> Path:
    return tmp_path / "fired"


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_would_go_off_in_a_loader_without_an_allow_list(name: str, fired: Path) -> None:
    for zipped in (True, False):
        file = io.BytesIO(_torch_bytes(PLACES["args"](BOMBS[name](fired)), zipped=zipped))
        torch.load(file, weights_only=False)
        _wait_for(fired)
        fired.unlink()


def _wait_for(path: Path) -> None:
    end = time.monotonic() + 100
    while not path.exists() and time.monotonic() < end:  # popen does not wait for its child
        time.sleep(0.01)
    assert path.exists()


@pytest.mark.parametrize("name", BOMBS)
def test_pickled_weights_execute_nothing(name: str, tmp_path: Path, fired: Path) -> None:
    for place, put in PLACES.items():
        for container, content in _formats(put(BOMBS[name](fired))).items():
            for ending in (".pth", ".safetensors"):  # PyTorch looks at it
                weights = tmp_path / f"weights{ending}"
                weights.write_bytes(content)
                with pytest.raises(CheckpointError) as caught:
                    load_backbone(weights)
                assert not fired.exists(), (name, place, container)
                assert str(weights) in str(caught.value)
                assert "\n" not in str(caught.value)
    time.sleep(0.05 if name == "popen" else 0)
    assert not fired.exists()


@pytest.mark.parametrize("name", ["O", "V8", "U4", "M8[s]", "complex128"])
def test_numpy_scalar_of_a_kind_that_no_setting_has_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"args": np.dtype(name)}, path)
    with pytest.raises(CheckpointError, match="only tensors and settings are loaded"):
        load_backbone(path)


@pytest.mark.slow
def test_command_line_executes_nothing_in_weights(tmp_path: Path, fired: Path) -> None:
    zipped, plain = tmp_path / "dino.pth", tmp_path / "teacher.safetensors"
    zipped.write_bytes(_torch_bytes(PLACES["args"](BOMBS["system"](fired)), zipped=True))
    plain.write_bytes(pickle.dumps(BOMBS["open"](fired), 2))
    sets = ("--train", SYNTHETIC, "--test", SYNTHETIC)
    done = dinoscale(  # with the variable that lowers PyTorch's own guard
        "evaluate", "knn", zipped, *sets, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1"
    )
    refused(done, zipped, "only tensors")
    out = tmp_path / "out.png"
    with pytest.raises(CheckpointError, match=r"teacher\.safetensors"):
        cli.run(["evaluate", "attention", str(plain), SYNTHETIC, str(out)])
    assert not fired.exists()
    assert not out.exists()


HUGE = 10**12


@pytest.mark.parametrize(
    "sizes",
    [
        {"embed_dim": HUGE, "num_heads": 1},
        {"depth": HUGE},
        {"img_size": HUGE},
        {"patch_size": HUGE, "img_size": HUGE},
        {"embed_dim": 2**62, "num_heads": 2},
        {"name": "hf-hub:someone/something"},
        {"name": "local-dir:/tmp"},
        {"name": "vit_small_patch16_224\n\x1b[2J"},
    ],
)
def test_card_of_impossible_sizes_is_refused_before_memory_is_taken(
    sizes: dict[str, Any], tmp_path: Path
) -> None:
    shape = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, **sizes}
    card = BackboneCard(BackboneShape(**shape), (0, 0, 0), (1, 1, 1), 32, 32, "a test")
    path = tmp_path / "weights.safetensors"
    save_file({"cls_token": torch.zeros(1)}, path, metadata={METADATA_KEY: card.to_json()})
    with pytest.raises(CheckpointError, match=r"weights\.safetensors") as caught:
        load_backbone(path)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("card", ["[" * 100000, '{"format": ' + "1" * 9999 + "}", "null", "\0"])
def test_card_that_is_no_card_is_refused(card: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"cls_token": torch.zeros(1)}, path, metadata={METADATA_KEY: card})
    with pytest.raises(CheckpointError, match="its card"):
        load_backbone(path)


def test_block_numbers_of_weights_cannot_ask_for_memory(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for number in ("999999999", "9" * 5000):
        state = {
            "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8),
            "pos_embed": torch.zeros(1, 5, 64),
            "blocks.0.norm1.weight": torch.zeros(64),
            f"blocks.{number}.norm1.weight": torch.zeros(64),
        }
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=r"weights\.pth"):
            load_backbone(path)


def _checkpoint(folder: Path, state: object = None) -> Path:
    """A complete checkpoint of one small tensor."""
    step = folder / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    (step / "state.json").write_text(json.dumps(_state() if state is None else state))
    save_file({"center": torch.zeros(2)}, step / "shared.safetensors")
    tensors = {f"{kind}/backbone.a": torch.ones(2) for kind in ("master", "ema")}
    metadata = {"starts": json.dumps({"backbone.a": 0})}
    save_file(tensors, step / "shard_00000.safetensors", metadata=metadata)
    _sign(step)
    return step


def _sign(step: Path) -> None:
    """Whoever changes a file can write its checksum too: it guards against accidents only."""
    write_sums(step, {file: sha256(step / file) for file in FILES})


def _state(**changes: object) -> dict[str, object]:
    sections: dict[str, object] = {"config": {}, "plan": {}, "progress": {}, "optimizer_steps": {}}
    return {"format": 2, "step": 1, "shapes": {"backbone.a": [2]}, **sections, **changes}


FILES = ("state.json", "shared.safetensors", "shard_00000.safetensors")


@pytest.mark.parametrize("file", FILES)
def test_pickle_in_place_of_a_checkpoint_file_executes_nothing(
    file: str, tmp_path: Path, fired: Path
) -> None:
    step = _checkpoint(tmp_path)
    read_source(tmp_path)
    for content in _formats(PLACES["state dict"](BOMBS["open"](fired))).values():
        (step / file).write_bytes(content)
        _sign(step)
        with pytest.raises(CheckpointError, match="step_00000001 is not a complete checkpoint"):
            read_source(tmp_path)
        assert not fired.exists()


@pytest.mark.parametrize(
    "state",
    [
        [],
        "!!python/object/apply:os.system ['true']",
        {},
        _state(format="1"),
        _state(step="__import__('os').system('true')"),
        _state(step=None),
        _state(step=1e999),
        _state(shapes=[]),
        _state(shapes={"backbone.a": "ab"}),
        _state(shapes={"backbone.a": [-2]}),
        _state(shapes={"backbone.a": [HUGE, HUGE]}),
        _state(shapes={"backbone.a": 2}),
        _state(shapes={"backbone.a": [2], "backbone.b": [HUGE]}),
        _state(config="!!python/object/apply:os.system ['true']"),
        _state(config=[1]),
        _state(config=None),
    ],
)
def test_state_of_another_kind_is_refused_in_a_sentence(state: object, tmp_path: Path) -> None:
    _checkpoint(tmp_path, state)
    with pytest.raises(CheckpointError, match="step_00000001"):
        read_source(tmp_path, network="student")


@pytest.mark.parametrize(
    "starts",
    [None, "[]", '{"backbone.a": "x"}', "{}", "[" * 100000, "1" * 9, '{"backbone.a": 1e999}'],
)
def test_shard_with_an_odd_index_is_refused(starts: str | None, tmp_path: Path) -> None:
    step = _checkpoint(tmp_path)
    metadata = None if starts is None else {"starts": starts}
    tensors = {f"{kind}/backbone.a": torch.ones(2) for kind in ("master", "ema")}
    save_file(tensors, step / "shard_00000.safetensors", metadata=metadata)
    _sign(step)
    with pytest.raises(CheckpointError, match="step_00000001"):
        read_source(tmp_path, network="student")


def test_deeply_nested_state_is_refused(tmp_path: Path) -> None:
    step = _checkpoint(tmp_path)
    (step / "state.json").write_text("[" * 100000)
    _sign(step)
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        Checkpoint(step)


@pytest.mark.slow
def test_command_line_executes_nothing_in_a_checkpoint(tmp_path: Path, fired: Path) -> None:
    step = _checkpoint(tmp_path)
    bomb = pickle.dumps(BOMBS["system"](fired), 2)
    (step / "shard_00000.safetensors").write_bytes(bomb)
    _sign(step)
    refused(dinoscale("export", tmp_path, tmp_path / "out.safetensors"), step)
    (step / "state.json").write_bytes(bomb)
    _sign(step)
    where = [f"data.train={SYNTHETIC}", f"run_dir={tmp_path}"]
    refused(dinoscale("train", "vit_t16", *settings(), *where), step)
    assert not fired.exists()
    assert not (tmp_path / "out.safetensors").exists()
