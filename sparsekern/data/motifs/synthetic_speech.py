"""Sounds that stand in for recordings of ten spoken digits by 60 speakers.

Not speech, and results on them should say so: a buzz (harmonics of a pitch) and two kinds of noise,
shaped by three formants that move as they roughly do in the English digit. A speaker has a pitch, a
speed and a length of the vocal tract, which scales the formants; every take differs a little in
pitch, speed and level.

A harmonic of frequency f has the amplitude (1 / f) prod_i F_i^2 / |F_i^2 - f^2 + j f b_i|: a source
that falls off with frequency, and one resonance F_i of bandwidth b_i per formant. Source: G. Fant,
"Acoustic Theory of Speech Production", Mouton 1960, chapter 1.
"""

from __future__ import annotations

import numpy as np

from ..counter_random import fractions, starts, words

DIGITS, SPEAKERS, TAKES = 10, 60, 10
# Streams of the speakers' and the takes' random numbers.
SPEAKER_SEED, TAKE_SEED = 1, 2

# Each digit as points in time, between which everything changes linearly:
# milliseconds, buzz, hiss (high noise), breath (flat noise), and the formants in hertz.
_Point = tuple[float, float, float, float, float, float, float]
_SCORES: tuple[tuple[_Point, ...], ...] = (
    (  # zero
        (0, 0, 0.3, 0, 300, 1700, 2500), (30, 0.3, 0.7, 0, 300, 1700, 2500),
        (110, 0.4, 0.5, 0, 320, 1800, 2500), (140, 1, 0, 0, 400, 2000, 2550),
        (230, 1, 0, 0, 350, 1200, 1600), (330, 1, 0, 0, 520, 900, 2400),
        (480, 0.8, 0, 0, 400, 800, 2300), (540, 0, 0, 0, 400, 800, 2300),
    ),
    (  # one
        (0, 0, 0, 0, 300, 650, 2200), (40, 0.7, 0, 0, 300, 650, 2200),
        (160, 1, 0, 0, 680, 1200, 2450), (270, 1, 0, 0, 620, 1300, 2400),
        (310, 0.4, 0, 0, 280, 1450, 2300), (430, 0.3, 0, 0, 280, 1450, 2300),
        (460, 0, 0, 0, 280, 1450, 2300),
    ),
    (  # two
        (0, 0, 0, 0, 350, 1800, 2500), (5, 0, 1, 0.3, 350, 1800, 2500),
        (60, 0, 0.3, 0.2, 350, 1700, 2400), (80, 1, 0, 0, 330, 1600, 2300),
        (200, 1, 0, 0, 330, 1000, 2200), (360, 0.8, 0, 0, 320, 850, 2200),
        (410, 0, 0, 0, 320, 850, 2200),
    ),
    (  # three
        (0, 0, 0, 0, 330, 1200, 1700), (40, 0, 0, 0.5, 330, 1200, 1700),
        (110, 0, 0, 0.5, 330, 1200, 1700), (130, 0.7, 0, 0, 330, 1050, 1500),
        (210, 1, 0, 0, 300, 1900, 2500), (280, 1, 0, 0, 270, 2300, 3000),
        (430, 0.8, 0, 0, 270, 2300, 3000), (480, 0, 0, 0, 270, 2300, 3000),
    ),
    (  # four
        (0, 0, 0, 0, 450, 850, 2400), (30, 0, 0.15, 0.6, 450, 850, 2400),
        (130, 0, 0.15, 0.6, 500, 850, 2400), (150, 1, 0, 0, 560, 850, 2400),
        (310, 1, 0, 0, 560, 870, 2400), (420, 0.8, 0, 0, 450, 1250, 1600),
        (490, 0, 0, 0, 450, 1250, 1600),
    ),
    (  # five
        (0, 0, 0, 0, 650, 1200, 2400), (30, 0, 0.15, 0.6, 650, 1200, 2400),
        (110, 0, 0.15, 0.6, 700, 1200, 2400), (130, 1, 0, 0, 760, 1250, 2450),
        (270, 1, 0, 0, 700, 1400, 2500), (370, 0.9, 0, 0, 380, 2050, 2600),
        (400, 0.3, 0.1, 0.2, 260, 1200, 2300), (470, 0.2, 0.1, 0.2, 250, 1150, 2300),
        (500, 0, 0, 0, 250, 1150, 2300),
    ),
    (  # six
        (0, 0, 0, 0, 400, 1950, 2550), (30, 0, 1, 0, 400, 1950, 2550),
        (130, 0, 1, 0, 400, 1950, 2550), (150, 1, 0, 0, 400, 1950, 2550),
        (240, 1, 0, 0, 400, 2000, 2500), (255, 0, 0, 0, 350, 2000, 2400),
        (310, 0, 0, 0, 350, 2000, 2400), (315, 0, 0.8, 0.4, 350, 2000, 2400),
        (350, 0, 1, 0, 350, 2000, 2400), (480, 0, 0.8, 0, 350, 2000, 2400),
        (530, 0, 0, 0, 350, 2000, 2400),
    ),
    (  # seven
        (0, 0, 0, 0, 550, 1800, 2500), (30, 0, 1, 0, 550, 1800, 2500),
        (120, 0, 1, 0, 550, 1800, 2500), (140, 1, 0, 0, 570, 1800, 2500),
        (220, 1, 0, 0, 550, 1700, 2450), (250, 0.35, 0.05, 0.1, 260, 1150, 2300),
        (290, 0.35, 0.05, 0.1, 260, 1150, 2300), (320, 0.9, 0, 0, 540, 1400, 2400),
        (390, 0.8, 0, 0, 500, 1450, 2400), (420, 0.4, 0, 0, 280, 1450, 2300),
        (520, 0.3, 0, 0, 280, 1450, 2300), (550, 0, 0, 0, 280, 1450, 2300),
    ),
    (  # eight
        (0, 0, 0, 0, 500, 1950, 2600), (20, 1, 0, 0, 500, 1950, 2600),
        (120, 1, 0, 0, 450, 2050, 2600), (230, 0.9, 0, 0, 320, 2300, 2800),
        (250, 0, 0, 0, 320, 2200, 2800), (330, 0, 0, 0, 320, 2200, 2800),
        (335, 0, 1, 0.3, 320, 2200, 2800), (400, 0, 0, 0, 320, 2200, 2800),
    ),
    (  # nine
        (0, 0, 0, 0, 280, 1450, 2300), (30, 0.4, 0, 0, 280, 1450, 2300),
        (100, 0.4, 0, 0, 280, 1450, 2300), (125, 1, 0, 0, 740, 1250, 2450),
        (240, 1, 0, 0, 700, 1400, 2500), (340, 0.9, 0, 0, 380, 2050, 2600),
        (370, 0.4, 0, 0, 280, 1600, 2300), (470, 0.35, 0, 0, 280, 1500, 2300),
        (500, 0, 0, 0, 280, 1500, 2300),
    ),
)  # fmt: skip

# Ranges of what differs between speakers, and between takes.
PITCH = (90.0, 230.0)  # hertz
SPEED = (0.8, 1.25)
TRACT = (0.88, 1.15)  # formants are multiplied by it
TAKE_PITCH, TAKE_SPEED, TAKE_LEVEL = (0.94, 1.06), (0.93, 1.07), (0.7, 1.4)

PITCH_FALL = (1.08, 0.88)  # from start to end, of the pitch
BANDWIDTHS = (80.0, 110.0, 160.0)  # hertz
LOUDNESS = 0.08  # root mean square of a sound of level 1
HISS, BREATH = 0.35, 0.2  # root mean squares of noises at 1, where the buzz's is 1
STEP = 32  # samples between two computations of the amplitudes


class Speech:
    """Stand-ins at one sampling rate, with the interface of :class:`~.audio_mnist.Recordings`.

    Args:
        rate: samples a second.

    Attributes:
        speakers: their number.
        takes: sounds of each digit by each speaker.
    """

    speakers, takes = SPEAKERS, TAKES

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._sounds: dict[tuple[int, int, int], np.ndarray] = {}

    def sound(self, digit: int, speaker: int, take: int) -> np.ndarray:
        """Make a sound, float32 ``[samples]`` in -1 .. 1; do not change it.

        Args:
            digit: 0..9.
            speaker: 1..60.
            take: 0..9.
        """
        key = (digit, speaker, take)
        if key not in self._sounds:
            self._sounds[key] = self._speak(digit, speaker, take)
        return self._sounds[key]

    def _speak(self, digit: int, speaker: int, take: int) -> np.ndarray:
        pitch, speed, tract = _draw_between(SPEAKER_SEED, speaker, (PITCH, SPEED, TRACT))
        number = (speaker * DIGITS + digit) * TAKES + take
        changes = _draw_between(TAKE_SEED, number, (TAKE_PITCH, TAKE_SPEED, TAKE_LEVEL))
        pitch, speed, level = pitch * changes[0], speed * changes[1], changes[2]

        score = np.array(_SCORES[digit])
        ends = score[:, 0] / 1000 / speed
        samples = round(ends[-1] * self._rate)
        time = np.arange(samples) / self._rate
        buzz, hiss, breath = (np.interp(time, ends, score[:, part]) for part in (1, 2, 3))
        coarse = np.arange(0, samples + STEP, STEP) / self._rate
        formants = tract * np.stack([np.interp(coarse, ends, score[:, part]) for part in (4, 5, 6)])
        contour = pitch * np.interp(time, (0, ends[-1]), PITCH_FALL)

        start = starts(TAKE_SEED, np.array([number]))
        noise = fractions(words(start, 1 << 8, samples + 1)[0]) * 2 - 1
        voice = self._buzz(contour, formants)
        sound = buzz * voice / _root_mean_square(voice)
        sound += HISS * hiss * np.diff(noise) / _root_mean_square(np.diff(noise))
        sound += BREATH * breath * noise[1:] / _root_mean_square(noise)
        levelled: np.ndarray = level * LOUDNESS / _root_mean_square(sound) * sound
        return levelled.clip(-1, 1).astype(np.float32)

    def _buzz(self, pitch: np.ndarray, formants: np.ndarray) -> np.ndarray:
        """Sum the harmonics of a pitch [n] in hertz, shaped by formants [3, n / STEP].

        The harmonics are those below half the rate.

        Returns:
            float64 ``[n]``.
        """
        # Whole turns do not matter, and without them float32 is precise enough for the sine.
        turns = np.cumsum(pitch / self._rate) % 1
        harmonics = np.arange(1, int(self._rate / 2 / pitch.max()) + 1)[:, None]
        frequency = harmonics * np.append(pitch[::STEP], pitch[-1])[: formants.shape[1]]
        amplitude = 1 / frequency
        for formant, bandwidth in zip(formants, BANDWIDTHS, strict=True):
            square = formant**2
            amplitude *= square / np.hypot(square - frequency**2, bandwidth * frequency)
        place, within = np.divmod(np.arange(len(pitch)), STEP)
        left, right = amplitude[:, place], amplitude[:, place + 1]
        waves = np.sin((2 * np.pi * (harmonics * turns % 1)).astype(np.float32))
        summed: np.ndarray = ((left + (right - left) * (within / STEP)) * waves).sum(0)
        return summed


def _draw_between(seed: int, number: int, ranges: tuple[tuple[float, float], ...]) -> list[float]:
    """Draw one random number in each range, those of ``number`` in the stream ``seed``."""
    start = starts(seed, np.array([number]))
    shares = fractions(words(start, 0, len(ranges))[0])
    return [low + (high - low) * share for (low, high), share in zip(ranges, shares, strict=True)]


def _root_mean_square(sound: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(sound))))
