"""Noise that need not be stored: a function of (stream, seed, frame, pair) and nothing else.

Philox is a counter-based generator (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). Its key is
the seed, and its counter names stream, frame and pair, so any process can draw any noise by itself, in any order. The
noise is drawn on the CPU by `numpy.random.RandomState`, whose stream numpy promised to keep.

Stored pairs and evaluation draw from two streams. So a student of stored pairs never meets, in its evaluation, a noise
that it was trained on, whatever the two seeds.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PAIRS, EVALUATION = 0, 1


def pair_noise(seed: int, frame: int, pair: int, shape: tuple[int, ...], stream: int = PAIRS) -> Tensor:
    """Standard normal noise of a frame's pair, float32 on the CPU; `shape` is usually (chunk_size, max_action_dim)."""
    # The lowest word of the counter counts the numbers drawn, and reaches the next word after 2**64 numbers.
    generator = np.random.Philox(key=seed, counter=[0, stream, pair, frame])
    return torch.from_numpy(np.random.RandomState(generator).standard_normal(shape).astype(np.float32))


def frames_noise(
    seed: int, frames: Sequence[int], per_frame: int, shape: tuple[int, ...], stream: int = PAIRS
) -> Tensor:
    """The first `per_frame` noises of each frame, frame after frame: (frames * per_frame, *shape)."""
    return torch.stack([pair_noise(seed, frame, pair, shape, stream) for frame in frames for pair in range(per_frame)])
