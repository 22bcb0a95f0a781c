"""Random numbers of drop path (stochastic depth) as a function of (seed, step, image)."""

import numpy as np
import torch
from torch import Tensor

_TAG = 0xD20  # keeps this stream apart from other uses of the run's seed


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
    key = np.random.SeedSequence([seed, _TAG, step]).generate_state(2, np.uint64)
    generator = np.random.Philox(key=key)
    generator.advance(first_image * blocks)
    uniforms = np.random.Generator(generator).random(images * blocks * 4)
    uniforms = uniforms.reshape(images, blocks * 4)[:, :per_image]
    uniforms = uniforms.reshape(images, crops, depth, 2).transpose(2, 3, 1, 0)
    return torch.from_numpy(np.ascontiguousarray(uniforms, dtype=np.float32)).flatten(2)
