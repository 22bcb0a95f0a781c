"""The quickstart: pre-train on drawn images on two processes, then show what was learned."""

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from dinoscale.config import RunConfig, load_config, text_override
from dinoscale.convert.conversion import convert
from dinoscale.convert.run_checkpoint import card_of
from dinoscale.convert.weights_file import save_backbone
from dinoscale.engine.build import build_networks
from dinoscale.engine.precision import fastest_precision
from dinoscale.errors import PreemptedError, RunFailedError
from dinoscale.evaluate.classification.knn import evaluate_knn
from dinoscale.evaluate.dense.attention import evaluate_attention
from dinoscale.evaluate.frozen_backbone import ExtractionOptions
from dinoscale.runtime.distributed import free_port
from dinoscale.runtime.launcher_env import on_this_node
from dinoscale.runtime.preemption import stop_signals
from dinoscale.training.hooks.events import count_events

log = logging.getLogger(__name__)

PRESET = "quickstart"


def quickstart(run_dir: Path) -> dict[str, Any]:
    """Draw images, pre-train on them, compare k-NN with the untrained network and with pixels.

    Args:
        run_dir: folder for all results; a finished run in it is shown again, not repeated.

    Returns:
        JSON-able: accuracies in percent, paths of the results, seconds, and the count of each event
        (a collapse, a skipped step).

    Raises:
        PreemptedError: it was asked to stop, and has saved or is about to.
        RunFailedError: the training ended with an error.
    """
    precision = fastest_precision()
    overrides = [text_override("run_dir", str(run_dir)), f"engine.precision={precision}"]
    config = load_config(PRESET, overrides)
    run_dir = Path(config.run_dir)  # with ~ expanded
    begin = time.monotonic()
    _pretrain(overrides)
    trained_s = time.monotonic() - begin
    weights, untrained = run_dir / "teacher.safetensors", run_dir / "untrained.safetensors"
    convert(run_dir, weights, to="dino", overwrite=True)
    backbone = build_networks(config)[0].backbone  # the initial weights of the run
    save_backbone(untrained, backbone.state_dict(), card_of(config, source="untrained"))
    picture = run_dir / "attention.png"
    # Not scored: the objects fill most of an image, and uniform attention would cover them best.
    evaluate_attention(weights, str(config.eval.test), picture, scored=False)
    result = {
        **_accuracies(config, weights, untrained),
        "precision": precision,
        "events": count_events(run_dir),
        "training_s": round(trained_s, 1),
        "total_s": round(time.monotonic() - begin, 1),
        "run_dir": str(run_dir),
        "weights": str(weights),
        "attention_image": str(picture),
    }
    print(_in_words(config, result))
    return result


def _pretrain(overrides: list[str]) -> None:
    """Run `dinoscale train` on two processes through the deepspeed launcher; output to stderr."""
    processes = min(2, torch.cuda.device_count()) or 2
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    training = ["train", PRESET, *overrides]
    command = on_this_node(training, processes=processes, port=free_port(), environ=environment)
    log.info("pre-training on %d processes: %s", processes, " ".join(command[2:]))
    code, asked = _end_of(command, environment)
    if asked or code == PreemptedError.exit_code:
        raise PreemptedError("the training was asked to stop, and saves; the same command goes on")
    if code:
        raise RunFailedError(f"the training ended with exit code {code}; see above")


def _end_of(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, bool]:
    """Exit code of a launcher, and whether this process was asked to stop, as it then is too."""
    asked = False
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as launcher:

        def stop(_number: int, _frame: FrameType | None) -> None:
            nonlocal asked
            asked = True
            launcher.terminate()

        before = {number: signal.signal(number, stop) for number in stop_signals()}
        try:
            return launcher.wait(), asked
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _accuracies(config: RunConfig, weights: Path, untrained: Path) -> dict[str, float]:
    """Top-1 of k-NN in percent: 16 x 16 pixels, the untrained and the trained network."""
    k = config.eval.k
    found = {}
    for name, file in (("untrained", untrained), ("trained", weights)):
        report: dict[str, Any] = evaluate_knn(
            file,
            str(config.eval.train),
            str(config.eval.test),
            ks=(k,),
            pixels=name == "untrained",
            options=ExtractionOptions(num_workers=0, progress=False),
        )
        if "pixels" in report:
            found["knn_top1_pixels"] = round(report["pixels"]["knn"][str(k)]["top1"], 2)
        found[f"knn_top1_{name}"] = round(report["knn"][str(k)]["top1"], 2)
    return found


def _in_words(config: RunConfig, result: dict[str, Any]) -> str:
    baseline = max(result["knn_top1_pixels"], result["knn_top1_untrained"])
    gain = result["knn_top1_trained"] - baseline
    return f"""
A small ViT was trained on drawn objects for {config.train.epochs} epochs, without labels.
Classifying the pattern on new drawings by {config.eval.k} nearest neighbours is right for

  {result["knn_top1_trained"]:5.1f} %   with its features after training
  {result["knn_top1_untrained"]:5.1f} %   with the same network untrained
  {result["knn_top1_pixels"]:5.1f} %   with raw pixels

{_verdict(gain)} Pre-training took {result["training_s"]:.0f} s.

  weights         {result["weights"]}   (plain PyTorch, no DeepSpeed needed)
  where it looks  {result["attention_image"]}
  curves          {_activated()}dinoscale report {result["run_dir"]}
  next            dinoscale train vit_s16 data.train=/your/images run_dir=runs/first
"""


def _activated() -> str:
    """What a shell has to say before `dinoscale`, after `quickstart.sh` has made an environment."""
    script = Path(sys.prefix) / "bin" / "activate"
    if "VIRTUAL_ENV" in os.environ or not script.is_file():
        return ""
    return f". {shlex.quote(os.path.relpath(script))} && "


def _verdict(gain: float) -> str:
    if gain < 0:
        return f"It has learned nothing: it is {-gain:.1f} points below the better baseline."
    return f"It has learned: it is {gain:.1f} points above the better baseline."
