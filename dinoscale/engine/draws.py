"""Random numbers that a step of the student needs, as functions of (seed, step).

Of drop path (stochastic depth) for each image, of rotary positions for each block.
"""

import numpy as np
import torch
from torch import Tensor

# Keep these streams apart from other uses of the run's seed.
_DROP_PATH, _ROPE = 0xD20, 0x20F
ROPE_GROUPS, ROPE_NUMBERS = 2, 5  # global and local crops; see `rope.coordinate_changes`


def drop_path_uniforms(
    *, seed: int, step: int, first_image: int, images: int, crops: int, depth: int
) -> Tensor:
    """Uniforms in [0, 1) for some images of a step's global batch.

    A counter-based generator is advanced to the first image, so ranks and micro-batches together
    draw what one process would draw for the whole batch.

    Args:
        seed: of the run.
        step: zero-based optimizer step.
        first_image: position of the first image in the step's global batch.
        images: B, number of consecutive images.
        crops: S, student crops an image.
        depth: number of blocks.

    Returns:
        (depth, 2, S * B) float32, crop-major like the student's rows.
    """
    per_image = crops * depth * 2
    blocks = -(-per_image // 4)  # Philox yields four 64-bit words per counter
    key = np.random.SeedSequence([seed, _DROP_PATH, step]).generate_state(2, np.uint64)
    generator = np.random.Philox(key=key)
    generator.advance(first_image * blocks)
    uniforms = np.random.Generator(generator).random(images * blocks * 4)
    uniforms = uniforms.reshape(images, blocks * 4)[:, :per_image]
    uniforms = uniforms.reshape(images, crops, depth, 2).transpose(2, 3, 1, 0)
    return torch.from_numpy(np.ascontiguousarray(uniforms, dtype=np.float32)).flatten(2)


def rope_uniforms(*, seed: int, step: int, depth: int) -> Tensor:
    """Uniforms in [0, 1) for the coordinates of rotary positions, the same for all images.

    Those of a block depend neither on how many there are, nor on ranks and micro-batches.

    Args:
        seed: of the run.
        step: zero-based optimizer step.
        depth: number of blocks.

    Returns:
        (2, depth, 5) float64, of global and of local crops.
    """
    key = np.random.SeedSequence([seed, _ROPE, step]).generate_state(2, np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    uniforms = torch.from_numpy(generator.random((depth, ROPE_GROUPS, ROPE_NUMBERS)))
    return uniforms.transpose(0, 1).contiguous()
