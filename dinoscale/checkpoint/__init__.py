"""Checkpoints: one file of named fragments per rank, readable at any ZeRO stage and world size.

    RUN/checkpoints/step_00000100/
        shard_00000.safetensors    fragments of master, ema and the optimizer's moments of rank 0
        shared.safetensors         center; buffers of student and teacher (batch norm only)
        shards.index               position of every element in the shards; read on opening
        state.json                 format, step, shapes, step counts, config, versions, progress
        SHA256SUMS                 checksums for `sha256sum --check SHA256SUMS`
        measured.json              k-NN accuracy, added once it is measured; not in SHA256SUMS

A directory is written under another name and renamed once every rank's files are on disk, so a
directory named step_* is complete; the checksums show whether it has changed since. Nothing random
is stored: sample order, crops and stochastic depth are functions of (seed, step), so the step and
the data offset in `progress` are the whole position of a run.
"""
