"""Tests; `DINOSCALE_TEST_ONEDNN=0` keeps them and their ranks from using oneDNN (`matrix.sh`)."""

import os

if os.environ.get("DINOSCALE_TEST_ONEDNN") == "0":
    import torch

    torch.backends.mkldnn.set_flags(False)
