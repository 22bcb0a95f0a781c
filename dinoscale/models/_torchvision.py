"""Import torchvision even where its compiled operators are missing or built for another torch.

On import, torchvision registers fake and autograd rules for its compiled `nms` operator. If the
extension cannot be loaded (a CPU wheel beside a CUDA torch, or package indices out of step), this
fails with "operator torchvision::nms does not exist" and timm cannot be imported either, although
nothing here runs a detection operator. Declaring the schemas is enough for the import.
"""

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("torchvision::nms", "torchvision::qnms")


def ensure_torchvision() -> None:
    """Make `import torchvision` succeed; call before importing timm or torchvision.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the import fails for a reason other than the missing operator.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for operator in _OPERATORS:
            torch.library.define(operator, _SCHEMA)
        import torchvision  # noqa: F401
