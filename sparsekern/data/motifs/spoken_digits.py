"""Mel spectrograms of spoken digit sequences, labelled with the digits.

A clip of 15 s at 8 kHz holds 5 to 10 digits, any with any, each said by a speaker of its own, at
random places without overlap, under truncated normal noise of scale 2^-10. The input is its mel
spectrogram: 64 mels as channels, 642 frames as space. A motif reaches over the frames whose middle
lies within its sound.

The digits are recordings (AudioMNIST) or, without a folder, stand-ins made here
(:mod:`.synthetic_speech`); results on stand-ins should say so.

Source: Gupta, Osera, Solar-Lezama, arXiv 2302.01976, section "AudioMNIST". That every digit has its
own speaker, the even distribution of the free time, and the noise's truncation are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..counter_random import fractions, integers, words
from ..errors import DataError
from . import mel_spectrograms
from .audio_mnist import DIGITS, Recordings
from .domain import NONE, MotifBatch, MotifDomain, Replacement, check_parameters
from .synthetic_speech import Speech

RATE, WINDOW, MELS, TOP_DB = 8000, 375, 64, 80.0
TRAIN, TEST = "train", "test"
TEST_SPEAKERS = 9  # the last ones of an order shuffled with SHUFFLE_SEED
SHUFFLE_SEED = 0
TRUNCATION = 2.0  # standard deviations of the noise, on either side

# Positions of a sample's random numbers; PLACES and what is above it hold one per digit or sample.
COUNT, CHOICES, PLACES, NOISE = 0, 1 << 8, 1 << 16, 1 << 32


@dataclass(frozen=True)
class SpokenDigits(MotifDomain):
    """The domain with its parameters.

    Attributes:
        folder: recordings in the layout of AudioMNIST; ``None`` for stand-ins.
        split: ``"train"`` for 51 of the speakers, ``"test"`` for the other nine.
        name: for reports.
        seconds: length of a clip.
        count: smallest and largest number of digits, drawn uniformly.
        noise: scale of the noise, where a recording reaches up to 1.

    Raises:
        ValueError: a parameter is out of range.
        DataError: the folder or some of the recordings are missing.
    """

    folder: str | Path | None = None
    split: str = TRAIN
    name: str = "audio"
    seconds: float = 15.0
    count: tuple[int, int] = (5, 10)
    noise: float = 2.0**-10
    _sounds: Recordings | Speech = field(init=False, repr=False, compare=False)

    in_channels = MELS
    one_to_one = False

    def __post_init__(self) -> None:
        check_parameters(
            self,
            ("split", self.split in (TRAIN, TEST), f"must be {TRAIN!r} or {TEST!r}"),
            ("seconds", self.seconds * RATE >= WINDOW, f"must be at least {WINDOW / RATE}"),
            ("count", 1 <= self.count[0] <= self.count[1], "must be a range from 1 or more"),
            ("noise", self.noise >= 0, "must be 0 or more"),
        )
        sounds = Speech(RATE) if self.folder is None else Recordings(self.folder, RATE)
        object.__setattr__(self, "_sounds", sounds)

    @property
    def origin(self) -> str:
        """Whether the digits are recordings or stand-ins, for reports."""
        if self.folder is None:
            return (
                "digits synthesised as stand-ins for the recordings of AudioMNIST; what is found "
                "on them says nothing about those"
            )
        return "recordings of AudioMNIST"

    @property
    def symbols(self) -> tuple[str, ...]:
        """The ten digits."""
        return tuple(map(str, range(DIGITS)))

    @property
    def samples(self) -> int:
        """Samples of a clip."""
        return round(self.seconds * RATE)

    @property
    def space(self) -> tuple[int, ...]:
        """Frames of a clip."""
        return (mel_spectrograms.frames(self.samples, WINDOW),)

    @property
    def max_length(self) -> int:
        """The largest number of digits of a clip."""
        return self.count[1]

    @property
    def max_motifs(self) -> int:
        """The largest number of digits of a clip."""
        return self.count[1]

    @property
    def speakers(self) -> np.ndarray:
        """Numbers of the split's speakers, 1..60: int64 ``[51]`` or ``[9]``."""
        shuffled = 1 + np.random.default_rng(SHUFFLE_SEED).permutation(self._sounds.speakers)
        return shuffled[:-TEST_SPEAKERS] if self.split == TRAIN else shuffled[-TEST_SPEAKERS:]

    def mean_motifs(self) -> float:
        """Compute the expected number of digits of a clip."""
        return sum(self.count) / 2

    def draw(self, start: np.ndarray) -> MotifBatch:
        """Draw the spectrograms whose random numbers start at ``start``, uint64 ``[B]``."""
        labels = np.full((len(start), self.max_length), NONE)
        motifs = np.full((len(start), self.max_motifs, 3), NONE)
        inputs = torch.zeros(len(start), MELS, *self.space)
        for sample in range(len(start)):
            signal, digits, ends = self.clip(start[sample : sample + 1])
            labels[sample, : len(digits)] = digits
            motifs[sample, : len(digits), 0] = digits
            # Frame t has its middle at sample t * hop.
            hop = mel_spectrograms.hop(WINDOW)
            motifs[sample, : len(digits), 1:] = -(-ends // hop)
            inputs[sample] = mel_spectrograms.mel_spectrogram(
                torch.from_numpy(signal), rate=RATE, window=WINDOW, mels=MELS, top_db=TOP_DB
            )
        return MotifBatch(inputs, torch.from_numpy(labels), torch.from_numpy(motifs))

    def replacements(self, label: list[int], symbols: list[int]) -> list[Replacement]:
        """List every way to make one digit another: any may follow any."""
        return [
            Replacement(motif, other, [*label[:motif], other, *label[motif + 1 :]])
            for motif, symbol in enumerate(symbols)
            for other in range(DIGITS)
            if other != symbol
        ]

    def clip(self, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Put together the sound whose random numbers start at ``start``, uint64 ``[1]``.

        Returns:
            The signal float32 ``[samples]``, the digits int64 ``[n]``, and the first and one past
            the last sample of each int64 ``[n, 2]``.

        Raises:
            DataError: a recording is damaged, or together they are too long for a clip.
        """
        fewest, most = self.count
        count = fewest + int(integers(words(start, COUNT, 1), most - fewest + 1)[0, 0])
        random = words(start, CHOICES, 3 * most)[0].reshape(3, most)[:, :count]
        digits = integers(random[0], DIGITS)
        speakers = self.speakers[integers(random[1], len(self.speakers))]
        takes = integers(random[2], self._sounds.takes)
        sounds = [
            self._sounds.sound(*map(int, which))
            for which in zip(digits, speakers, takes, strict=True)
        ]
        lengths = np.array([len(sound) for sound in sounds])
        free = self.samples - lengths.sum()
        if free < 0:
            raise DataError(
                f"SpokenDigits: {count} sounds of together {lengths.sum()} samples do not fit a "
                f"clip of {self.samples}: take longer clips or fewer digits"
            )
        before = np.sort(integers(words(start, PLACES, count)[0], free + 1))
        stops = before + lengths.cumsum()
        signal = self._noise(start)
        for sound, stop in zip(sounds, stops, strict=True):
            signal[stop - len(sound) : stop] += sound
        return signal, digits, np.stack([stops - lengths, stops], 1)

    def _noise(self, start: np.ndarray) -> np.ndarray:
        """Draw truncated normal noise float32 [samples], by inverting the distribution function."""
        if not self.noise:
            return np.zeros(self.samples, np.float32)
        share = torch.from_numpy(fractions(words(start, NOISE, self.samples)[0]))
        least = torch.special.ndtr(torch.tensor(-TRUNCATION, dtype=torch.float64))
        normal = torch.special.ndtri(least + (1 - 2 * least) * share)
        noise: np.ndarray = (self.noise * normal).float().numpy()
        return noise
