"""The key of a run: what its result depends on, in 16 hex digits.

Runs of one key are one run, in any sweep and at any time, and are not run twice. A key covers every
setting but those of `NO_PART`: they say where and how often something is written or watched, how
fast the images come, or how the work is cut for memory, which changes sums by rounding alone. So a
run that lacked memory is mended without training the others again. Settings that have their default
are left out, so that a later version with more settings gives the same keys, and those that were
renamed enter under their first names; `reuse.py` finds what an earlier version, whose keys covered
more, has called the same run.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dinoscale.config import RunConfig
from dinoscale.config.renamed import with_first_names
from dinoscale.data.shards.remote import is_remote

NO_PART = (
    "run_dir",
    "resume",
    "eval.every_epochs",  # the rest of eval.* trains nothing, but makes another online k-NN
    "eval.batch_size",
    "log",
    "checkpoint",
    "data.num_workers",  # an image is a function of seed and place, not of who draws it
    "data.max_bad_fraction",
    "train.hang_timeout_s",
    "engine.zero_stage",
    "engine.checkpoint_every_k_blocks",
    "engine.recompute",
    "engine.compile",
    "engine.offload_optimizer",
    "engine.reduce_bucket_size",
    "engine.stage3_max_live_parameters",
    "engine.zero_hpz_partition_size",
)
_CUTS = "train.micro_batch_size"  # see `_depends_on_micro_batch`


def key_of(config: RunConfig) -> str:
    """16 hex digits of a SHA-256; equal for configurations that give the same result."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    cuts = () if _depends_on_micro_batch(config) else (_CUTS,)
    for dotted in (*NO_PART, *cuts):
        section, _, name = dotted.partition(".")
        if name:
            values.get(section, {}).pop(name, None)
        else:
            values.pop(section, None)
    given = {section: value for section, value in values.items() if value != {}}
    given = with_first_names(given)
    text = json.dumps(given, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _depends_on_micro_batch(config: RunConfig) -> bool:
    """Whether what is computed together changes more than rounding.

    Batch norm is over a micro-batch, the subset mode of drop path drops a share of one, and the
    order of streamed images depends on the number of them in a step.
    """
    subset = config.model.drop_path_mode == "subset" and config.model.drop_path_rate > 0
    streamed = any(is_remote(source.source) for source in config.data.sources)
    return config.head.batch_norm or subset or streamed
