"""Sizes small enough to work out by hand."""

from dinoscale.engine.model_sizes import Dims
from dinoscale.planning.plan.partition import Setup

# 12 D^2 + 13 D = 872 scalars a block; K x bottleneck = 400 of 700 in the head.
DIMS = Dims(
    groups=((2000, 20), (144, 30), (400, 1)),
    backbone=1844,
    head=700,
    largest=400,
    block=872,
    block_matrices=768,
    depth=2,
    embed_dim=8,
    num_heads=2,
    mlp_hidden=32,
    mlp_matrices=512,
    layer_scale=False,
    patch_size=4,
    channels=3,
    head_hidden=10,
    head_layers=3,
    bottleneck=4,
    prototypes=100,
    global_size=16,
    local_size=8,
    num_local=2,
    num_special=1,
)

SETUP = Setup(
    zero_stage=2,
    world_size=4,
    micro_batch_size=3,
    accumulation_steps=1,
    bf16=True,
    communication_bytes=4,
    checkpoint_every=0,
    recompute="block",
    moments=2,
    offload_optimizer=False,
    reduce_bucket_size=1000,
    stage3_max_live_parameters=1000,
    zero_hpz_partition_size=1,
    compiled=False,
    on_gpu=True,
)
