"""`dinoscale data TOOL ...`: parse, call one function."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

Commands = Any  # argparse names the type of its sub-commands privately
