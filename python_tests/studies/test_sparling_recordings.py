"""A run on recordings goes on with these recordings, wherever they lie."""

from sparsekern.studies.sparling.run import recordings_digest


def folder_of(path, sounds):
    for name, content in sounds.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_recordings_are_known_by_what_they_hold(tmp_path):
    sounds = {
        f"{speaker:02d}/{take}.wav": bytes([speaker, take]) for speaker in (1, 2) for take in (0, 1)
    }
    first = recordings_digest(folder_of(tmp_path / "first", sounds))
    assert recordings_digest(folder_of(tmp_path / "moved" / "deep", sounds)) == first
    found = {first}
    for name, changes in (
        ("content", {"01/0.wav": b"xy"}), ("size", {"01/0.wav": b"xyz"}),
        ("more", {"03/0.wav": b"a"}),
    ):  # fmt: skip
        found.add(recordings_digest(folder_of(tmp_path / name, sounds | changes)))
    assert len(found) == 4
