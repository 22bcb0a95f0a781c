"""Imported by the server of `forked.py`: everything slow to import, nothing that acts."""

import gc
import importlib
import os
from contextlib import suppress

# Read when torch is imported; `dinoscale train` sets it before.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import pytest  # noqa: F401
import sklearn.linear_model  # noqa: F401
import torch._dynamo  # noqa: F401

import dinoscale.cli
import dinoscale.training.trainer  # noqa: F401
from dinoscale.engine.student import _import_muon
from dinoscale.models._torchvision import ensure_torchvision

for name in ("matplotlib.figure", "wandb"):
    with suppress(ImportError):  # gpu/check.sh does without them
        importlib.import_module(name)
_import_muon()  # as a rank does, before anything compiles
ensure_torchvision()

import timm  # noqa: E402, F401  # needs torchvision

gc.collect()
gc.freeze()  # collections in the forks leave these pages shared
