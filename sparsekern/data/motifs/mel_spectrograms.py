"""Mel spectrograms in decibels.

    P = | STFT(x) |^2, Hann window, hop half a window, frames centred, ends reflected
    M = triangular filters, evenly spaced in mel(f) = 2595 log10(1 + f / 700), times P
    D = 10 log10(max(M, 1e-10)), raised to at least max(D) - top_db

Source of the mel scale: D. O'Shaughnessy, "Speech Communication", Addison-Wesley 1987, page 150.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

SMALLEST_POWER = 1e-10


def hop(window: int) -> int:
    """Count the samples from one frame to the next."""
    return window // 2


def frames(samples: int, window: int) -> int:
    """Count the frames of a signal: one at each multiple of the hop."""
    return 1 + samples // hop(window)


def mel_spectrogram(
    signal: Tensor, *, rate: int, window: int = 375, mels: int = 64, top_db: float = 80.0
) -> Tensor:
    """Compute the spectrogram of one signal, float32 ``[mels, frames]``, in decibels.

    Args:
        signal: float32 ``[samples]``, at least half a window.
        rate: samples a second.
        window: samples of a frame.
        mels: filters, from 0 to half the rate.
        top_db: range below the loudest value that is kept.
    """
    # One signal at a time: the same numbers whatever batch it is in.
    spectrum = torch.stft(
        signal, window, hop(window), window=torch.hann_window(window), return_complex=True
    )
    power = _filters(rate, window, mels) @ spectrum.abs().square()
    decibels = 10 * power.clamp(min=SMALLEST_POWER).log10()
    return decibels.maximum(decibels.max() - top_db)


@cache
def _filters(rate: int, window: int, mels: int) -> Tensor:
    """Make the mel filters, float32 ``[mels, 1 + window // 2]``, of height 1."""
    frequency = np.fft.rfftfreq(window, 1 / rate)
    top = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    width = np.diff(corners)[:, None]
    rising = (frequency - corners[:-2, None]) / width[:-1]
    falling = (corners[2:, None] - frequency) / width[1:]
    return torch.from_numpy(np.minimum(rising, falling).clip(0)).float()
