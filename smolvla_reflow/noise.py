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

PAIRS, EVALUATION, SCALES = 0, 1, 2
# Share of the scaled noises that are exactly zero, the mean of a standard normal.
ZEROS = 0.5


def pair_noise(seed: int, frame: int, pair: int, shape: tuple[int, ...], stream: int = PAIRS) -> Tensor:
    """Standard normal noise of a frame's pair, float32 on the CPU; `shape` is usually (chunk_size, max_action_dim)."""
    # The lowest word of the counter counts the numbers drawn, and reaches the next word after 2**64 numbers.
    generator = np.random.Philox(key=seed, counter=[0, stream, pair, frame])
    return torch.from_numpy(np.random.RandomState(generator).standard_normal(shape).astype(np.float32))


def pairs_noise(
    seed: int, pairs: Sequence[tuple[int, int]], shape: tuple[int, ...], scaled_noise: float = 0.0
) -> Tensor:
    """The noise of N stored pairs, named by frame and number: (N, *shape). A share `scaled_noise` is scaled."""
    noise = torch.stack([pair_noise(seed, frame, pair, shape) for frame, pair in pairs])
    if not scaled_noise:
        return noise
    keys = [np.random.Philox(key=seed, counter=[0, SCALES, pair, frame]) for frame, pair in pairs]
    uniform = torch.tensor([np.random.RandomState(key).random_sample() for key in keys], dtype=torch.float32)
    return scaled(noise, scaled_noise, uniform)


def evaluation_noise(seed: int, frames: Sequence[int], per_frame: int, shape: tuple[int, ...]) -> Tensor:
    """`per_frame` noises of each frame that no pair has, frame after frame: (frames * per_frame, *shape)."""
    pairs = [(frame, pair) for frame in frames for pair in range(per_frame)]
    return torch.stack([pair_noise(seed, frame, pair, shape, EVALUATION) for frame, pair in pairs])


def scaled(noise: Tensor, share: float, uniform: Tensor) -> Tensor:
    """Noise of which a share is scaled: half of the share to zero, the other half by a number from 0 to 1.

    Standard normal noise of many dimensions has nearly always the same length. Some runtimes start from zeros, and a
    student that never saw shorter noise cannot know what to do there.

    Args:
        noise: (N, chunk_size, max_action_dim).
        share: 0 to 1.
        uniform: (N,), numbers from 0 to 1 that choose the scales.
    """
    if not share:
        return noise
    factors = ((uniform / share - ZEROS) / (1 - ZEROS)).clamp(min=0)
    return noise * torch.where(uniform < share, factors, 1.0)[:, None, None]
