"""Spoken digits: stand-ins and recordings, clips, spectrograms.

Bounds of statistics are five standard deviations; the seeds are fixed.
"""

import wave

import numpy as np
import pytest
import torch

from sparsekern.data import DataError, motif_domain
from sparsekern.data.counter_random import starts
from sparsekern.data.motifs.audio_mnist import Recordings
from sparsekern.data.motifs.mel_spectrograms import mel_spectrogram
from sparsekern.data.motifs.synthetic_speech import Speech

HOP = 187


@pytest.fixture(scope="module")
def speech():
    return Speech(8000)


@pytest.fixture(scope="module")
def domain():
    return motif_domain("audio")


# -- spectrograms ----------------------------------------------------------------------------------


def test_spectrogram_by_its_definition():
    random = np.random.default_rng(0)
    signal = random.standard_normal(2000).astype(np.float32)
    found = mel_spectrogram(torch.from_numpy(signal), rate=8000).numpy()
    padded = np.pad(signal, 187, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(375) / 375)
    mel = 2595 * np.log10(1 + np.arange(188) * 8000 / 375 / 700)
    corners = np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 66)
    hertz = 700 * (10 ** (corners / 2595) - 1)
    for frame in range(1 + 2000 // 187):
        part = padded[frame * 187 : frame * 187 + 375] * window
        power = np.abs(np.fft.rfft(part)) ** 2
        for row in (0, 1, 20, 63):
            frequency = np.arange(188) * 8000 / 375
            rise = np.interp(frequency, hertz[row : row + 2], (0, 1), right=0)
            fall = np.interp(frequency, hertz[row + 1 : row + 3], (1, 0), left=0)
            inside = (mel >= corners[row]) & (mel <= corners[row + 2])
            weight = np.where(inside, np.where(frequency <= hertz[row + 1], rise, fall), 0)
            expected = 10 * np.log10((weight * power).sum())
            # Single precision, of powers that span three orders of magnitude.
            assert found[row, frame] == pytest.approx(expected, abs=1e-3)
    assert found.shape == (64, 11)


def test_every_mel_hears_its_tone():
    corners = np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 66)[1:-1]
    for row in (5, 20, 40, 62):
        hertz = 700 * (10 ** (corners[row] / 2595) - 1)
        tone = torch.sin(2 * np.pi * hertz * torch.arange(4000) / 8000)
        found = mel_spectrogram(tone.float(), rate=8000)
        assert abs(int(found[:, 10].argmax()) - row) <= 1


def test_the_range_is_eighty_decibels():
    signal = torch.zeros(4000)
    signal[2000] = 1
    found = mel_spectrogram(signal, rate=8000)
    assert found.max() - found.min() == pytest.approx(80)


# -- stand-ins -------------------------------------------------------------------------------------


def features(sound):
    """The spectrogram of a sound in 12 steps of time, without its level."""
    found = mel_spectrogram(torch.from_numpy(sound), rate=8000)
    steps = torch.nn.functional.interpolate(found[None], 12, mode="linear")[0]
    return (steps - steps.mean()).flatten()


def test_stand_ins_can_be_told_apart_across_speakers(speech):
    train, test = range(1, 13), range(40, 50)
    centres = torch.stack(
        [torch.stack([features(speech.sound(d, s, 0)) for s in train]).mean(0) for d in range(10)]
    )
    right = [
        int((centres - features(speech.sound(digit, speaker, 1))).norm(dim=1).argmin()) == digit
        for digit in range(10)
        for speaker in test
    ]
    assert np.mean(right) >= 0.9


def test_stand_ins_differ_by_speaker_and_take_and_are_repeatable(speech):
    one = speech.sound(3, 7, 2)
    assert (Speech(8000).sound(3, 7, 2) == one).all() and one.dtype == np.float32
    for other in (speech.sound(3, 8, 2), speech.sound(3, 7, 3), speech.sound(4, 7, 2)):
        assert one.shape != other.shape or (one != other).any()


def test_stand_ins_are_as_long_and_loud_as_speech(speech):
    sounds = [speech.sound(d, s, 0) for d in range(10) for s in (1, 20, 60)]
    lengths = np.array([len(sound) for sound in sounds]) / 8000
    assert lengths.min() >= 0.25 and lengths.max() <= 0.8
    for sound in sounds:
        assert 0.05 <= np.sqrt(np.mean(sound**2)) <= 0.12 and np.abs(sound).max() <= 1
        # They start and end in silence, so nothing clicks.
        assert max(abs(sound[0]), abs(sound[-1])) <= 0.02


class Silence:
    """Sounds that take no time to make."""

    speakers, takes = 60, 1

    def sound(self, digit, speaker, take):
        return np.zeros(2000 + 300 * digit + 10 * speaker, np.float32)


# -- clips -----------------------------------------------------------------------------------------


def test_digits_do_not_overlap_and_carry_the_sound(domain):
    quiet = motif_domain("audio", noise=0)
    for sample in range(5):
        start = starts(0, np.array([sample]))
        signal, digits, ends = quiet.clip(start)
        assert signal.shape == (120_000,) and len(digits) == len(ends)
        assert (ends[1:, 0] >= ends[:-1, 1]).all() and (ends[:, 0] < ends[:, 1]).all()
        assert ends[0, 0] >= 0 and ends[-1, 1] <= 120_000
        heard = np.zeros(len(signal), bool)
        for first, stop in ends:
            heard[first:stop] = True
            assert np.abs(signal[first:stop]).max() > 0.1
        assert not signal[~heard].any()


def test_extents_hold_the_energy(domain):
    quiet = motif_domain("audio", noise=0).batch(0, 0, 6)
    loud = domain.batch(0, 0, 6)
    assert torch.equal(quiet.motifs, loud.motifs) and torch.equal(quiet.labels, loud.labels)
    for inputs, motifs in zip(quiet.inputs, quiet.motifs, strict=True):
        energy = (10 ** (inputs.double() / 10)).sum(0)
        inside = torch.zeros(642, dtype=torch.bool)
        for _, start, stop in motifs[motifs[:, 0] >= 0].tolist():
            assert not inside[start:stop].any(), "extents are disjoint"
            inside[start:stop] = True
            assert 0.25 * 8000 / HOP <= stop - start <= 0.8 * 8000 / HOP
        assert energy[inside].sum() / energy.sum() >= 0.999
        loudest = inputs.amax(0)
        assert loudest[inside].median() > loudest[~inside].median() + 40


def test_labels_are_the_digits_in_time(domain):
    _, labels, motifs = domain.batch(1, 0, 20)
    assert torch.equal(labels, motifs[:, :, 0])
    starts = motifs[:, :, 1].where(motifs[:, :, 0] >= 0, 10_000)
    assert (starts.diff(dim=1) >= 0).all()


def test_counts_digits_and_places_are_even():
    brief = motif_domain("audio", noise=0)
    object.__setattr__(brief, "_sounds", Silence())
    counts, digits, firsts = [], [], []
    for sample in range(400):
        _, said, ends = brief.clip(starts(2, np.array([sample])))
        counts.append(len(said))
        digits += said.tolist()
        firsts.append((ends[0, 0], 120_000 - ends[-1, 1]))
    numbers = np.bincount(counts, minlength=11)[5:]
    assert np.abs(numbers - 400 / 6).max() <= 5 * (400 / 6) ** 0.5
    assert np.mean(counts) == pytest.approx(brief.mean_motifs(), abs=5 * np.std(counts) / 20)
    each = np.bincount(digits, minlength=10)
    assert np.abs(each - len(digits) / 10).max() <= 5 * (len(digits) / 10) ** 0.5
    before, after = np.mean(firsts, 0)
    assert before == pytest.approx(after, abs=5 * np.std(firsts) * (2 / 400) ** 0.5)


def test_noise_is_a_truncated_normal(domain):
    signal, _, ends = domain.clip(starts(3, np.array([0])))
    silence = np.concatenate([signal[: ends[0, 0]], signal[ends[-1, 1] :]]) * 1024
    assert np.abs(silence).max() <= 2
    # Of a standard normal cut at 2 on either side.
    assert silence.std() == pytest.approx(0.8796, abs=5 / len(silence) ** 0.5)
    assert abs(silence.mean()) <= 5 / len(silence) ** 0.5


def test_speakers_are_divided():
    train, test = (motif_domain("audio", split=split).speakers for split in ("train", "test"))
    assert len(train) == 51 and len(test) == 9
    assert sorted([*train, *test]) == list(range(1, 61))
    one, other = (motif_domain("audio", split=split).batch(0, 0, 1) for split in ("train", "test"))
    assert torch.equal(one.labels, other.labels) and not torch.equal(one.inputs, other.inputs)


# -- recordings ------------------------------------------------------------------------------------


def write(path, sound, rate=48_000, channels=1, width=2):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.round(sound * 32767).astype("<i2").tobytes())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Recordings in the published layout, of fewer speakers and takes: tones of 400 Hz and up."""
    pytest.importorskip("scipy", reason="resampling: pip install 'sparsekern[data]'")
    monkeypatch.setattr(Recordings, "speakers", 12)
    monkeypatch.setattr(Recordings, "takes", 2)
    time = np.arange(14_400) / 48_000
    for speaker in range(1, 13):
        (tmp_path / "data" / f"{speaker:02d}").mkdir(parents=True)
        for digit in range(10):
            for take in range(2):
                path = tmp_path / "data" / f"{speaker:02d}" / f"{digit}_{speaker:02d}_{take}.wav"
                write(path, 0.5 * np.sin(2 * np.pi * (400 + 300 * digit) * time))
    return tmp_path


def test_recordings_are_found_in_either_folder_and_resampled(folder):
    for place in (folder, folder / "data"):
        sound = Recordings(place, 8000).sound(4, 11, 1)
        assert sound.dtype == np.float32 and sound.shape == (2400,)
        expected = 0.5 * np.sin(2 * np.pi * 1600 * np.arange(2400) / 8000)
        # The resampling filter needs some samples at either end.
        assert np.abs(sound - expected)[100:-100].max() <= 0.01


def test_clips_of_recordings(folder):
    domain = motif_domain("audio", folder=folder, noise=0)
    inputs, labels, motifs = domain.batch(0, 0, 3)
    assert inputs.shape == (3, 64, 642)
    corners = np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 66)[1:-1]
    for sound, rows in zip(inputs, motifs, strict=True):
        for digit, start, stop in rows[rows[:, 0] >= 0].tolist():
            mel = 2595 * np.log10(1 + (400 + 300 * digit) / 700)
            loudest = int(sound[:, (start + stop) // 2].argmax())
            assert abs(loudest - np.abs(corners - mel).argmin()) <= 1
    assert len(domain.speakers) == 3 and len(motif_domain("audio", folder=folder).symbols) == 10
    assert torch.equal(labels, motifs[:, :, 0])


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=f"^folder of recordings not found: {tmp_path}/no$"):
        motif_domain("audio", folder=tmp_path / "no")


def test_missing_speakers_digits_and_files_are_named(folder):
    data = folder / "data"
    for path in (data / "07").iterdir():
        path.unlink()
    (data / "07").rmdir()
    for path in (data / "05").glob("3_*.wav"):
        path.unlink()
    (data / "12" / "9_12_1.wav").unlink()
    with pytest.raises(DataError) as error:
        motif_domain("audio", folder=folder)
    text = str(error.value)
    assert f"recordings are not complete: {data} lacks 1 speakers (07), " in text
    assert "1 digits (3 by 05), 1 files (9_12_1.wav)" in text


def test_many_missing_speakers_are_counted(folder):
    for speaker in range(3, 13):
        for path in (folder / "data" / f"{speaker:02d}").iterdir():
            path.unlink()
    with pytest.raises(DataError, match=r"10 speakers \(03, 04, 05, 06, 07, \.\.\.\)"):
        motif_domain("audio", folder=folder)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(DataError, match=r"lacks 60 speakers .*expected are 01/0_01_0.wav"):
        Recordings(tmp_path, 8000)


def test_damaged_recordings_are_named(folder):
    path = folder / "data" / "01" / "2_01_0.wav"
    recordings = Recordings(folder, 8000)
    content = path.read_bytes()
    path.write_bytes(content[:20])
    with pytest.raises(DataError, match=f"recording is truncated or damaged: {path}"):
        recordings.sound(2, 1, 0)
    path.write_bytes(content[:2044])  # a header of 44 bytes, and 1000 samples
    with pytest.raises(DataError, match="it holds 1000 of 14400 samples"):
        recordings.sound(2, 1, 0)
    write(path, np.zeros(0))
    with pytest.raises(DataError, match="it holds 0 of 0 samples"):
        recordings.sound(2, 1, 0)
    write(path, np.zeros(200), channels=2)
    with pytest.raises(DataError, match="must be 16-bit mono, got 16-bit with 2 channels"):
        recordings.sound(2, 1, 0)


def test_sounds_that_do_not_fit_a_clip():
    with pytest.raises(DataError, match=r"20 sounds of together .* do not fit a clip"):
        motif_domain("audio", seconds=5, count=(20, 20)).batch(0, 0, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"split": "dev"}, "split must be 'train' or 'test', got 'dev'"),
        ({"seconds": 0}, "seconds must be at least 0.046875, got 0"),
        ({"count": (3, 2)}, r"count must be a range from 1 or more, got \(3, 2\)"),
        ({"noise": -1}, "noise must be 0 or more, got -1"),
    ],
)
def test_parameters_that_are_not_possible(options, message):
    with pytest.raises(ValueError, match=f"SpokenDigits: {message}"):
        motif_domain("audio", **options)
