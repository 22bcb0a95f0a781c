"""Imported by the server of `forked.py`: everything slow to import, nothing that acts."""

import gc
import os

# Read when torch is imported; `dinoscale train` sets it before.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import matplotlib.figure  # noqa: F401
import pytest  # noqa: F401
import sklearn.linear_model  # noqa: F401
import torch._dynamo  # noqa: F401
import wandb  # noqa: F401

import dinoscale.cli
import dinoscale.training.trainer  # noqa: F401
from dinoscale.engine.student import _import_muon
from dinoscale.models._torchvision import ensure_torchvision

_import_muon()  # as a rank does, before anything compiles
ensure_torchvision()

import timm  # noqa: E402, F401  # needs torchvision

gc.collect()
gc.freeze()  # collections in the forks leave these pages shared
