"""The key of a run: a hash of every setting that its result depends on, 16 hex digits.

Runs with equal keys are the same run, in any sweep and at any time, and are trained once. The key
covers every setting except those in `NOT_IN_KEY`, which control where and how often something is
written or checked, how fast images arrive, or how the work is split to fit in memory, which changes
sums only by rounding. So a run that ran out of memory is repaired without training the others
again. Settings at their defaults are omitted, so that a later version with more settings gives the
same keys; `reuse.py` finds the same run under the key of an earlier version, which covered more.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dinoscale.config import RunConfig
from dinoscale.config.renamed import with_first_names
from dinoscale.data.shards.remote import is_remote

NOT_IN_KEY = (
    "run_dir",
    "resume",
    "eval.every_epochs",  # the rest of eval.* does not affect training, but the online k-NN
    "eval.batch_size",
    "eval.rank_images",  # a number beside the result
    "log",
    "checkpoint",
    "data.num_workers",  # an image is a function of seed and position, not of the worker
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
_MICRO_BATCH = "train.micro_batch_size"  # see `_depends_on_micro_batch`


def key_of(config: RunConfig) -> str:
    """16 hex digits of a SHA-256; equal for configurations that give the same result."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    micro_batch = () if _depends_on_micro_batch(config) else (_MICRO_BATCH,)
    for dotted in (*NOT_IN_KEY, *micro_batch):
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
    """Whether the micro-batch size changes the result by more than rounding.

    Batch norm averages over a micro-batch, KoLeo looks for neighbours in one, the subset mode of
    drop path drops a fraction of one, and the order of streamed images depends on their number per
    step.
    """
    subset = config.model.drop_path_mode == "subset" and config.model.drop_path_rate > 0
    streamed = any(is_remote(source.source) for source in config.data.sources)
    batch_norm = any(head.batch_norm for head in (config.head, config.patch_head) if head)
    return batch_norm or subset or streamed or config.koleo.loss_weight > 0
