"""AudioMNIST: ten digits spoken by 60 people 50 times each, 16-bit WAV at 48 kHz.

The published layout, of https://github.com/soerenab/AudioMNIST: ``data/01/0_01_0.wav`` is digit 0
by speaker 01, take 0. Files are read when they are first needed, brought to the asked-for rate and
kept: all of them at 8 kHz take 0.6 GB.
"""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np

from ..._system import require
from ..errors import DataError

DIGITS, SPEAKERS, TAKES = 10, 60, 50
SAMPLE_BYTES, FULL_SCALE = 2, 1 << 15
NAMED = 5  # missing things that an error names


class Recordings:
    """The recordings of a folder at one sampling rate.

    Args:
        folder: what the repository holds, or its folder ``data``.
        rate: samples a second of :meth:`sound`.

    Attributes:
        speakers: their number.
        takes: recordings of each digit by each speaker.

    Raises:
        DataError: the folder or some of the files are missing; the message names them.
        ModuleNotFoundError: scipy is not installed.
    """

    speakers, takes = SPEAKERS, TAKES

    def __init__(self, folder: str | Path, rate: int) -> None:
        folder = Path(folder)
        self._folder = folder / "data" if (folder / "data").is_dir() else folder
        self._rate = rate
        self._sounds: dict[tuple[int, int, int], np.ndarray] = {}
        if not folder.is_dir():
            raise DataError(f"folder of recordings not found: {folder}")
        self._check()
        self._signal = require("scipy.signal", "bringing recordings to another rate")

    def _check(self) -> None:
        names_by_speaker = {
            speaker: {path.name for path in self._speaker(speaker).glob("*.wav")}
            for speaker in range(1, self.speakers + 1)
        }
        speakers = [f"{speaker:02d}" for speaker, names in names_by_speaker.items() if not names]
        missing = {
            (speaker, digit): [name for name in self._names(digit, speaker) if name not in names]
            for speaker, names in names_by_speaker.items()
            for digit in range(DIGITS)
            if names
        }
        digits = [
            f"{digit} by {speaker:02d}"
            for (speaker, digit), names in missing.items()
            if len(names) == self.takes
        ]
        files = [name for names in missing.values() if len(names) < self.takes for name in names]
        lacks = [
            f"{len(names)} {kind} ({', '.join(names[:NAMED])}{', ...' * (len(names) > NAMED)})"
            for kind, names in (("speakers", speakers), ("digits", digits), ("files", files))
            if names
        ]
        if lacks:
            raise DataError(
                f"recordings are not complete: {self._folder} lacks {', '.join(lacks)}; expected "
                "are 01/0_01_0.wav to 60/9_60_49.wav, as in AudioMNIST"
            )

    def sound(self, digit: int, speaker: int, take: int) -> np.ndarray:
        """Read a recording, float32 ``[samples]`` in -1 .. 1; do not change it.

        Args:
            digit: 0..9.
            speaker: 1..60.
            take: 0..49.

        Raises:
            DataError: the file is damaged, or not 16-bit mono.
        """
        key = (digit, speaker, take)
        if key not in self._sounds:
            name = self._names(digit, speaker)[take]
            self._sounds[key] = self._read(self._speaker(speaker) / name)
        return self._sounds[key]

    def _speaker(self, speaker: int) -> Path:
        return self._folder / f"{speaker:02d}"

    def _names(self, digit: int, speaker: int) -> list[str]:
        return [f"{digit}_{speaker:02d}_{take}.wav" for take in range(self.takes)]

    def _read(self, path: Path) -> np.ndarray:
        try:
            with wave.open(str(path)) as file:
                rate, layout = file.getframerate(), (file.getnchannels(), file.getsampwidth())
                frames = file.getnframes()
                data = file.readframes(frames)
        except (OSError, EOFError, wave.Error) as error:
            raise DataError(f"recording is truncated or damaged: {path} ({error})") from error
        if layout != (1, SAMPLE_BYTES):
            raise DataError(
                f"recording has another layout: {path} must be 16-bit mono, got "
                f"{8 * layout[1]}-bit with {layout[0]} channels"
            )
        held = len(data) // SAMPLE_BYTES
        if not frames or held < frames:
            raise DataError(
                f"recording is truncated or damaged: {path} (it holds {held} of {frames} samples)"
            )
        sound = np.frombuffer(data, "<i2").astype(np.float32) / FULL_SCALE
        common = math.gcd(rate, self._rate)
        resampled = self._signal.resample_poly(sound, self._rate // common, rate // common)
        return np.asarray(resampled, np.float32)
