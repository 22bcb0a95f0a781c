"""A run of a sweep before it has started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dinoscale.config import RunConfig


@dataclass(frozen=True)
class PlannedRun:
    """One planned run.

    Attributes:
        key: hash of all that the result depends on, 16 hex digits; equal for equal runs of any
            sweep.
        name: name of its folder, unique in the sweep: a readable label and the start of the key.
        config: all settings; whoever runs it sets `run_dir`.
        axes: axis -> value, as in the file of the sweep.
        parameters: N, parameters of the backbone.
        flops_per_image: training FLOPs of one image with all its crops, see `engine/flops.py`.
        images: D, images seen, counting repetitions.
        distinct_images: at most this many different images among them.
        steps: optimizer steps.
        rules: rules of the sweep, as given in its file.
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
        """C, FLOPs of the whole training."""
        return self.images * self.flops_per_image
