"""What a command loads before its input is read: every user waits for it at every start."""

import json
import os
import subprocess
import sys
from pathlib import Path

# One process a group runs all its lines, which end at a help, a result or a mistake in the input.
_RUN = """
import contextlib, io, json, sys
from dinoscale import cli
from dinoscale.errors import DinoscaleError

lines, slow = json.loads(sys.argv[1])
cli.parser()
loaded = {"parser()": sorted(sys.modules.keys() & set(slow))}
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
print(json.dumps(loaded))
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


def _assert_none_loaded(lines: tuple[str, ...], slow: tuple[str, ...], folder: Path) -> None:
    command = [sys.executable, "-c", _RUN, json.dumps([lines, slow])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    assert loaded.keys() == {"parser()", *lines}
    assert not {line: names for line, names in loaded.items() if names}


def test_mistakes_and_help_come_before_torch(tmp_path: Path) -> None:
    _assert_none_loaded(_WITHOUT_TORCH, ("torch", *_LATE), tmp_path)


def test_commands_that_need_torch_begin_without_more(tmp_path: Path) -> None:
    _assert_none_loaded(_WITH_TORCH, _LATE, tmp_path)


def test_deepspeed_loads_no_compiler_for_an_unused_optimizer_and_others_still_compile() -> None:
    code = (
        "import os, sys\n"
        "from dinoscale.runtime import distributed\n"
        "from dinoscale.engine.student import import_deepspeed\n"
        "from dinoscale.runtime.launcher_env import read_process\n"
        "distributed.start(read_process({}))\n"
        "import_deepspeed()\n"
        "assert 'deepspeed.runtime.zero.muon.muon_optimizer' in sys.modules\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
        "assert 'TORCHDYNAMO_DISABLE' not in os.environ\n"
        "import torch\n"
        "graphs = []\n"
        "def backend(graph, _):\n"
        "    graphs.append(graph)\n"
        "    return graph\n"
        "assert torch.compile(torch.sin, backend=backend)(torch.zeros(1)) == 0\n"
        "assert len(graphs) == 1\n"
        "distributed.stop()\n"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment.pop("TORCHDYNAMO_DISABLE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
