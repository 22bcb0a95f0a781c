"""The quickstart: pre-train on drawn images on two processes, then show what was learned."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from dinoscale.checkpoint.next_phase import phase_before
from dinoscale.config import RunConfig, load_config, phases_of, text_override
from dinoscale.convert.conversion import convert
from dinoscale.convert.run_checkpoint import card_of
from dinoscale.convert.weights_file import save_backbone
from dinoscale.engine.build import build_networks
from dinoscale.engine.precision import fastest_precision
from dinoscale.errors import PreemptedError, RunFailedError
from dinoscale.evaluate.classification.knn import evaluate_knn
from dinoscale.evaluate.dense.attention import evaluate_attention
from dinoscale.evaluate.dense.pca import SHEET, evaluate_pca
from dinoscale.evaluate.frozen_backbone import ExtractionOptions, LoadOptions
from dinoscale.runtime.distributed import free_port
from dinoscale.runtime.launcher_env import on_this_node
from dinoscale.runtime.outputs import atomic_write
from dinoscale.runtime.preemption import stop_signals
from dinoscale.training.hooks.events import count_events
from dinoscale.training.hooks.online_knn import patch_pixels_top1

log = logging.getLogger(__name__)

# Of each recipe: its preset here, and the one to train next on images of one's own.
PRESETS = {
    "dino": ("quickstart", "vit_s16"),
    "dinov2": ("quickstart_dinov2", "dinov2_vits16"),
    "dinov3": ("quickstart_dinov3", "dinov3_vits16"),
}
_GRAM, _WITHOUT = "gram", "without_gram"  # phases that begin at the same place

# Pixels at which patches are drawn: 24 x 24 of 4, as many as of attention, four times as fine as
# in training. At 24 pixels, where 6 x 6 patches are as large as the objects' stripes, no shape is
# seen.
_PATCHES_AT = 96
_PATCHES_OF = 6  # images, one of each of the first classes; two lines of a sheet
_CAPTION = 34  # pixels above a sheet


def quickstart(recipe: str, run_dir: str | None = None) -> dict[str, Any]:
    """Draw images, pre-train on them, compare k-NN with the untrained network and with pixels.

    Args:
        recipe: a key of `PRESETS`.
        run_dir: folder for all results; a finished run in it is shown again, not repeated. None
            takes the preset's.

    Returns:
        JSON-able: accuracies in percent, paths of the results, seconds, and the count of each event
        (a collapse, a skipped step); a picture of patch features where patches have a loss; of a
        run of phases also the accuracy of single patches, in percent, after each.

    Raises:
        PreemptedError: it was asked to stop, and has saved or is about to.
        RunFailedError: the training ended with an error.
    """
    precision = fastest_precision()
    preset, following = PRESETS[recipe]
    overrides = [f"engine.precision={precision}"]
    if run_dir is not None:
        overrides.append(text_override("run_dir", run_dir))
    config = load_config(preset, overrides)
    folder, runs = Path(config.run_dir), phases_of(config)  # with ~ expanded
    begin = time.monotonic()
    _pretrain(preset, overrides)
    trained_s = time.monotonic() - begin
    weights, untrained = folder / "teacher.safetensors", folder / "untrained.safetensors"
    convert(Path(runs[-1].run_dir), weights, to="dino", overwrite=True)
    backbone = build_networks(config)[0].backbone  # the initial weights of the run
    save_backbone(untrained, backbone.state_dict(), card_of(config, source="untrained"))
    picture = folder / "attention.png"
    # Not scored: the objects fill most of an image, and uniform attention would cover them best.
    evaluate_attention(weights, str(config.eval.test), picture, scored=False)
    pictures = {"attention_image": str(picture)}
    if config.ibot.loss_weight:
        pictures["patches_image"] = str(_draw_patches(config, weights, untrained))
    of_patches = {"patch_knn_top1": _patch_accuracies(config)} if config.phases else {}
    result = {
        **_accuracies(config, weights, untrained),
        **of_patches,
        "precision": precision,
        "events": dict(sum((Counter(count_events(Path(run.run_dir))) for run in runs), Counter())),
        "training_s": round(trained_s, 1),
        "total_s": round(time.monotonic() - begin, 1),
        "run_dir": str(folder),
        "weights": str(weights),
        **pictures,
    }
    print(_in_words(config, result, following=following))
    return result


def _pretrain(preset: str, overrides: list[str]) -> None:
    """Run `dinoscale train` on two processes through the deepspeed launcher; output to stderr."""
    processes = min(2, torch.cuda.device_count()) or 2
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    training = ["train", preset, *overrides]
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


def _draw_patches(config: RunConfig, weights: Path, untrained: Path) -> Path:
    """Patch features as colors, of the untrained network above and of the trained one below."""
    sheets = {}
    for name, file in (("untrained", untrained), ("trained", weights)):
        folder = file.parent / "patches" / name
        evaluate_pca(
            file,
            str(config.eval.test),
            folder,
            size=_PATCHES_AT,
            limit=_PATCHES_OF,
            options=LoadOptions(progress=False),
        )
        with Image.open(folder / SHEET) as sheet:
            sheets[f"{name}: patch features as colors, the first three components"] = sheet.copy()
    path = weights.parent / "patches.png"
    with atomic_write(path) as beside:
        _with_captions(sheets).save(beside, format="png")
    return path


def _with_captions(sheets: Mapping[str, Image.Image]) -> Image.Image:
    """Sheets one below the other, each under its name."""
    width = max(sheet.width for sheet in sheets.values())
    whole = Image.new("RGB", (width, sum(_CAPTION + x.height for x in sheets.values())), "white")
    draw, font, top = ImageDraw.Draw(whole), ImageFont.load_default(size=0.6 * _CAPTION), 0
    for name, sheet in sheets.items():
        draw.text((4, top + _CAPTION / 2), name, fill="black", font=font, anchor="lm")
        whole.paste(sheet, (0, top + _CAPTION))
        top += _CAPTION + sheet.height
    return whole


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


def _patch_accuracies(config: RunConfig) -> dict[str, float]:
    """Top-1 of k-NN of single patches in percent: pixels, untrained, and after each phase."""
    found = {"pixels": patch_pixels_top1(config)}
    for phase, run in zip(config.phases, phases_of(config), strict=True):
        lines = (Path(run.run_dir) / "metrics.jsonl").read_text().splitlines()
        values = [json.loads(line).get("patch_knn_top1") for line in lines]
        measured = [value for value in values if value is not None]
        found.setdefault("untrained", measured[0])
        found[phase.name] = measured[-1]
    return {name: round(value, 2) for name, value in found.items()}


def _patches_in_words(accuracies: Mapping[str, float]) -> str:
    """What became of single patches, and whether Gram anchoring is why."""
    gain = accuracies[_GRAM] - accuracies[_WITHOUT]
    verdict = f"helps here, by {gain:.1f}" if gain > 0 else f"does not help here: {gain:.1f}"
    rows = "\n".join(f"  {value:5.1f} %   {name}" for name, value in accuracies.items())
    return f"""
Single patches of them, as one of the patterns or background, are classified rightly for

{rows}

Gram anchoring {verdict} points beside the same training without it; one seed.
"""


def _in_words(config: RunConfig, result: dict[str, Any], *, following: str) -> str:
    baseline = max(result["knn_top1_pixels"], result["knn_top1_untrained"])
    gain = result["knn_top1_trained"] - baseline
    patches = result.get("patches_image")
    drawn = f"  patch features  {patches}\n" if patches else ""
    of_patches = result.get("patch_knn_top1")
    also = _patches_in_words(of_patches) if of_patches else ""
    return f"""
A small ViT was trained on drawn objects for {_epochs_seen(config)} epochs, without labels.
Classifying the pattern on new drawings by {config.eval.k} nearest neighbours is right for

  {result["knn_top1_trained"]:5.1f} %   with its features after training
  {result["knn_top1_untrained"]:5.1f} %   with the same network untrained
  {result["knn_top1_pixels"]:5.1f} %   with raw pixels

{_verdict(gain)} Pre-training took {result["training_s"]:.0f} s.
{also}
  weights         {result["weights"]}   (plain PyTorch, no DeepSpeed needed)
  where it looks  {result["attention_image"]}
{drawn}  curves          {_activated()}dinoscale report {result["run_dir"]}
  next            dinoscale train {following} data.train=/your/images run_dir=runs/first
"""


def _epochs_seen(config: RunConfig) -> int:
    """Epochs behind the weights of the last phase: its own, and those of all that lead to it."""
    runs = phases_of(config)
    index: int | None = len(runs) - 1
    epochs = 0
    while index is not None:
        epochs += runs[index].train.epochs
        index = phase_before(config, index) if config.phases else None
    return epochs


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
