"""Random numbers that are a pure function of (seed, sample, position).

The generator is SplitMix64: its state grows by an odd constant, its n-th number is a hash of the
n-th state, so any number can be had without those before it:

    word(start, n) = mix(start + (n + 1) * GAMMA)  mod 2^64
    mix(z): z ^= z >> 30; z *= MIX_1; z ^= z >> 27; z *= MIX_2; z ^= z >> 31

Each sample has its own start, itself a word: ``start(seed, i) = word(word(seed, 0), i)``. For one
seed all starts differ, because mix is a bijection and GAMMA is odd. Samples can therefore be drawn
in any order and any grouping, all of a batch at once.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figures
13 and 16 (GAMMA, and the finaliser "variant 13" of D. Stafford).
"""

from __future__ import annotations

import numpy as np

GAMMA = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = 1 << 64
LANES = 4  # coins of a word
LANE = 1 << 16  # a coin's probability is a multiple of 1 / LANE
BLOCK_WORDS = 1 << 14  # hashed at a time: with its copy 256 KB, which stays in the cache


def starts(seed: int, samples: np.ndarray) -> np.ndarray:
    """Find where the numbers of each sample start.

    Args:
        seed: of the stream, any int64.
        samples: numbers of the samples, int64 ``[n]``, 0 and up.

    Returns:
        uint64 ``[n]``, for the functions below.
    """
    first = words(np.array([seed % WORD], np.uint64), 0, 1)[0]
    return _mix(first + np.uint64(GAMMA) * (samples.astype(np.uint64) + np.uint64(1)))


def words(start: np.ndarray, position: int, count: int) -> np.ndarray:
    """Draw numbers ``position .. position + count - 1`` of each sample, uint64 ``[n, count]``.

    All 64 bits are random. ``start`` is uint64 ``[n]``, from :func:`starts`.

    Args:
        start: where the numbers of each sample start.
        position: of the first number, 0 and up.
        count: numbers of each sample.
    """
    return _mix(start[:, None] + _steps(position, count))


def fractions(word: np.ndarray) -> np.ndarray:
    """Convert words of any shape to float64 in [0, 1), multiples of 2^-53."""
    return (word >> np.uint64(11)) * 2.0**-53


def integers(word: np.ndarray, below: int | np.ndarray) -> np.ndarray:
    """Convert words to integers in ``0 .. below - 1``, int64; ``below`` broadcasts to their shape.

    The upper half of the word, times ``below``, over 2^32: for ``below`` up to 2^20, probabilities
    are off by less than 2^-12 of themselves.

    Args:
        word: uint64 of any shape.
        below: 1 and up.
    """
    scaled = (word >> np.uint64(32)) * np.asarray(below).astype(np.uint64)
    return (scaled >> np.uint64(32)).astype(np.int64)


def coins(start: np.ndarray, position: int, count: int, probability: float) -> np.ndarray:
    """Draw bool ``[n, count]``, true with the given probability.

    Every word gives four coins of 16 bits each, so the probability is rounded to a multiple of
    2^-16, and ``ceil(count / 4)`` positions are used.

    Args:
        start: where the numbers of each sample start, uint64 ``[n]``.
        position: of the first number.
        count: coins of each sample.
        probability: in 0..1.
    """
    width = -(-count // LANES)
    steps = _steps(position, width)
    limit = round(probability * LANE)
    out = np.empty((len(start), count), bool)
    rows = max(1, BLOCK_WORDS // max(1, width))
    for first in range(0, len(start), rows):
        block = _mix(start[first : first + rows, None] + steps)
        lanes = block.astype("<u8", copy=False).view("<u2")
        # A limit of LANE is certain, and would not fit in a lane.
        out[first : first + rows] = (lanes < limit)[:, :count]
    return out


def _steps(position: int, count: int) -> np.ndarray:
    return np.arange(position + 1, position + 1 + count, dtype=np.uint64) * np.uint64(GAMMA)


def _mix(z: np.ndarray) -> np.ndarray:
    """Hash uint64 of any shape, overwriting them."""
    shifted = np.empty_like(z)
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        z ^= np.right_shift(z, np.uint64(shift), out=shifted)
        z *= np.uint64(factor)
    z ^= np.right_shift(z, np.uint64(31), out=shifted)
    return z
