"""Import torchvision even where its compiled operators are missing or of another torch build.

torchvision registers fake and autograd rules for its compiled `nms` operator while it is imported.
Where the extension cannot be loaded (a CPU wheel beside a CUDA torch, or two indices that lag each
other) that fails with "operator torchvision::nms does not exist" and takes timm down with it,
although nothing here ever runs a detection operator. Declaring the schemas is enough to import.
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
