"""What a command loads before its input is read: every user waits for it at every start."""

import json
import os
import subprocess
import sys

import pytest

from tests.unit.evaluate.tiny_files import save_weights

# One process does it all, since its start takes longest: first the lines, which end at a help, a
# result or a mistake in the input, then what loads more.
_RUN = """
import contextlib, io, json, os, sys, warnings
from dinoscale import cli
from dinoscale.errors import DinoscaleError

groups, weights = json.loads(sys.argv[1])
cli.parser()
loaded = {"parser()": sorted(sys.modules.keys() & set(groups[0][1]))}
for lines, slow in groups:
    for line in lines:
        before = set(sys.modules)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.run(line.split())
            except DinoscaleError:
                pass
            except SystemExit as end:  # a help; else the line is wrong and shows nothing
                if end.code:
                    raise
        loaded[line] = sorted((sys.modules.keys() - before) & set(slow))
print(json.dumps(loaded), flush=True)

import dinoscale
warnings.simplefilter("error", UserWarning)  # of torchvision, whose operators may be missing
model, _ = dinoscale.load_backbone(weights)
assert model.embed_dim == 64
heavy = {"deepspeed", "transformers", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
from dinoscale.models._torchvision import ensure_torchvision
ensure_torchvision()
import timm, torchvision
assert torchvision.models.resnet50 is not None
warnings.resetwarnings()

from dinoscale.runtime import distributed
from dinoscale.engine.student import import_deepspeed
from dinoscale.runtime.launcher_env import read_process
distributed.stop()
os.environ.pop("MASTER_PORT", None)  # where `train` met the other ranks above
distributed.start(read_process({}))
import_deepspeed()
assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
assert "TORCHDYNAMO_DISABLE" not in os.environ
import torch
graphs = []
def backend(graph, _):
    graphs.append(graph)
    return graph
assert torch.compile(torch.sin, backend=backend)(torch.zeros(1)) == 0
assert len(graphs) == 1
distributed.stop()
"""
# What most commands do without, or need late: each takes a quarter of a second to a few seconds.
_LATE = (
    "deepspeed",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "pandas",
    "scipy",
    "sklearn",
    "submitit",
    "sympy",
    "tifffile",
    "timm",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "transformers",
    "triton",
    "wandb",
    "webdataset",
)
_WITHOUT_TORCH = (
    "--help",
    "presets",
    "config vit_s16",
    "config vit_s16 data.train=/missing",
    "config nosuch",
    "train --help",
    "train nosuch",
    "quickstart --help",
    "plan nosuch --gpus 8",
    "doctor --help",
    "bench data nosuch",
    "bench step nosuch",
    "show crops nosuch",
    "launch nosuch",
    "launch vit_s16 --nodes 2 --node-rank 0 --master-addr here --dry-run",
    "checkpoint list missing",
    "checkpoint verify missing",
    "checkpoint prune missing",
    "convert --help",
    "export --help",
    "evaluate --help",
    "evaluate knn --help",
    "evaluate compare w.safetensors --out there --task nosuch",
    "sweep missing.yaml plan",
    "sweep missing.yaml run",
    "sweep missing.yaml status",
    "sweep missing.csv fit",
    "sweep missing.csv report",
    "data build-shards missing shards",
    "data verify-shards missing",
    "data inspect-shards missing",
    "data dataset-stats missing",
    "data deduplicate missing --weights w.safetensors",
    "data cluster --help",
    "data retrieve --help",
    "data deduplicate-embeddings --help",
    "data balance missing chosen.txt --images 3",
)
_SETS = "--train a --test b"
_WITH_TORCH = (
    "train vit_s16 data.train=/missing",
    "bench data vit_s16 data.train=/missing",
    "convert missing to --to hf",
    "convert missing to --to onnx",
    "export missing to.safetensors",
    f"evaluate knn missing {_SETS}",
    f"evaluate linear missing {_SETS}",
    f"evaluate logistic missing {_SETS}",
    f"evaluate finetune missing {_SETS}",
    "evaluate attention missing images sheet.png",
    "evaluate attention missing images --out there",
    "evaluate segment missing images",
    "evaluate pca missing images --out there",
    "evaluate video missing videos",
    "evaluate retrieve missing --data images",
    "evaluate retrieve missing --images images --ground-truth truth.json",
    "evaluate copies missing --data images --make-copies",
    "evaluate discover missing images --boxes boxes.json",
    "evaluate correspond missing --images images --warp",
    "evaluate transfer missing --sets a b",
    "data retrieve missing near.txt --seeds missing",
    "data deduplicate-embeddings missing kept.txt",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> "subprocess.CompletedProcess[str]":
    """The process, ended; it prints what each line loaded."""
    folder = tmp_path_factory.mktemp("start")
    weights = save_weights(folder / "weights.safetensors")
    groups = [(_WITHOUT_TORCH, ("torch", *_LATE)), (_WITH_TORCH, _LATE)]
    command = [sys.executable, "-c", _RUN, json.dumps([groups, str(weights)])]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHDYNAMO_DISABLE", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_command_begins_without_what_it_needs_late(
    done: "subprocess.CompletedProcess[str]",
) -> None:
    assert done.stdout, done.stderr
    loaded: dict[str, list[str]] = json.loads(done.stdout.splitlines()[0])
    assert loaded.keys() == {"parser()", *_WITHOUT_TORCH, *_WITH_TORCH}
    assert not {line: names for line, names in loaded.items() if names}


def test_weights_load_without_deepspeed_which_loads_no_compiler_and_lets_others_compile(
    done: "subprocess.CompletedProcess[str]",
) -> None:
    assert done.returncode == 0, done.stderr
