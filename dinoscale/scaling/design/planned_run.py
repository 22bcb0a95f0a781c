"""A run of a sweep before it has begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dinoscale.config import RunConfig


@dataclass(frozen=True)
class PlannedRun:
    """One run, worked out on paper.

    Attributes:
        key: 16 hex digits of what its result depends on; equal for equal runs of any sweep.
        name: of its folder, unique in the sweep: readable, and the first digits of the key.
        config: all settings; `run_dir` is set by whoever runs it.
        axes: what the sweep varies, as in its file, by name of the axis.
        parameters: N, scalars of the backbone.
        flops_per_image: of training on one image with all its crops, see `flops.py`.
        images: D, images seen, repetitions counted.
        distinct_images: of them different ones, at most.
        steps: optimizer steps.
        rules: of the sweep, as they are given in its file.
    """

    key: str
    name: str
    config: RunConfig
    axes: Mapping[str, object]
    parameters: int
    flops_per_image: int
    images: int
    distinct_images: int
    steps: int
    rules: Mapping[str, Any] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """C, of the whole training."""
        return self.images * self.flops_per_image
