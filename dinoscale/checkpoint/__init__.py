"""Checkpoints: one file of named fragments per rank, readable at any ZeRO stage and world size.

    RUN/checkpoints/step_00000100/
        shard_00000.safetensors    fragments of master, ema and the optimizer's moments of rank 0
        shared.safetensors         center; buffers of student and teacher (batch norm only)
        shards.index               which elements lie where in the shards: opening reads this one
        state.json                 format, step, shapes, step counts, config, versions, progress
        SHA256SUMS                 `sha256sum --check SHA256SUMS` agrees
        measured.json              its k-NN accuracy, added when that is known; not in SHA256SUMS

A directory is written under another name and renamed when every rank's file is on disk, so one that
is named step_* was written to its end; the checksums tell whether it still is what was written.
Nothing random is stored: sample order, crops and stochastic depth are functions of (seed, step), so
the step and the data offset in `progress` are the whole position of a run.
"""
