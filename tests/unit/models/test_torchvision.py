import subprocess
import sys

from dinoscale.models._torchvision import ensure_torchvision

_MISSING = """
import torch
try:
    torch.ops.torchvision.nms
    print("present")
except AttributeError:
    print("missing")
from dinoscale.models._torchvision import ensure_torchvision
ensure_torchvision()
ensure_torchvision()
import timm, torchvision
print(torchvision.models.resnet50 is not None)
"""


def test_timm_imports_after_ensure_torchvision_in_a_fresh_process() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", _MISSING],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "True"


def test_it_may_be_called_repeatedly() -> None:
    ensure_torchvision()
    ensure_torchvision()
