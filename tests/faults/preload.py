"""Imported by the server that forks the ranks: everything slow to import, nothing that acts."""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # the engine imports it on demand
import torch._dynamo  # noqa: F401

import dinoscale.trainer  # noqa: F401
from dinoscale.models._torchvision import ensure_torchvision

ensure_torchvision()

import timm  # noqa: E402, F401  # needs torchvision
