"""The key of a run: what its result depends on, in 16 hex digits.

Runs of one key are one run, in any sweep and at any time, and are not run twice. A key covers every
setting but those of `NO_PART`: they say where and how often something is written or watched, or how
fast the images come. Settings that
have their default are left out, so that a later version with more settings gives the same keys.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dinoscale.config import RunConfig

NO_PART = (
    "run_dir",
    "resume",
    "eval.every_epochs",  # the rest of eval.* trains nothing, but makes another online k-NN
    "eval.batch_size",
    "log",
    "checkpoint",
    "data.num_workers",  # an image is a function of seed and place, not of who draws it
    "train.hang_timeout_s",
)


def key_of(config: RunConfig) -> str:
    """16 hex digits of a SHA-256; equal for configurations that give the same result."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    for dotted in NO_PART:
        section, _, name = dotted.partition(".")
        if name:
            values.get(section, {}).pop(name, None)
        else:
            values.pop(section, None)
    given = {section: value for section, value in values.items() if value != {}}
    text = json.dumps(given, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
