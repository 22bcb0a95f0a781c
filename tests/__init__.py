"""Tests; `DINOSCALE_TEST_ONEDNN=0` keeps them and their ranks from using oneDNN (`matrix.sh`).

Where `ATEN_CPU_CAPABILITY` chooses the vector instructions of torch, compiled code lies in a folder
of its own: torch runs kept code of other instructions, which may write beyond its memory.
"""

import os
import tempfile

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    folder = f"{tempfile.gettempdir()}/torchinductor-{os.getuid()}-{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
if os.environ.get("DINOSCALE_TEST_ONEDNN") == "0":
    import torch

    torch.backends.mkldnn.set_flags(False)
if (threads := os.environ.get("OMP_NUM_THREADS", "1")) != "1":
    import torch

    torch.set_num_threads(int(threads))  # as forked ranks do: else MKL takes no more than cores
