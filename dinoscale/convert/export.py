"""`dinoscale export`: a run's backbone into a weights file of ours."""

from pathlib import Path

from dinoscale.checkpoint.load import open_run
from dinoscale.convert.run import read_run
from dinoscale.convert.weights import Network
from dinoscale.convert.weights_file import save_backbone


def export_backbone(run: Path, out: Path, *, network: Network) -> dict[str, object]:
    """Write the float32 backbone of a checkpoint under the reference's names.

    Args:
        run: a run directory (its newest checkpoint) or one of its step_* directories.
        out: safetensors file to write; folders above it are made.
        network: "teacher" or "student".

    Returns:
        JSON-able summary.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    checkpoint = open_run(run)
    weights = read_run(checkpoint.path, network=network)
    save_backbone(out, weights.backbone, weights.card)
    return {
        "weights": str(out),
        "network": network,
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "tensors": len(weights.backbone),
        "parameters": sum(tensor.numel() for tensor in weights.backbone.values()),
    }
