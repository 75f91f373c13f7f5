"""Noise that need not be stored: a function of (seed, frame, pair) and nothing else.

Philox is a counter-based generator (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): its
key is the seed and its counter says which frame and pair, so that any noise can be drawn by itself, in any order,
by any process. It is drawn on the CPU, through `numpy.random.RandomState`, whose stream numpy promised to keep.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pair_noise(seed: int, frame: int, pair: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of one pair: `shape`, usually (chunk_size, max_action_dim), float32, on the CPU.

    Args:
        seed: 0 or more.
        frame: index in the dataset, 0 or more.
        pair: which of the frame's pairs, 0 or more.
        shape: of the noise.
    """
    # The low words of the counter count the numbers drawn; the high ones are free to say for whom.
    generator = np.random.Philox(key=seed, counter=[0, 0, pair, frame])
    return torch.from_numpy(np.random.RandomState(generator).standard_normal(shape).astype(np.float32))


def frames_noise(seed: int, frames: Sequence[int], per_frame: int, shape: tuple[int, ...]) -> Tensor:
    """The first `per_frame` noises of each frame, frame after frame: (frames * per_frame, *shape)."""
    return torch.stack([pair_noise(seed, frame, pair, shape) for frame in frames for pair in range(per_frame)])
