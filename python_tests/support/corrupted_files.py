"""Reads randomly corrupted activation files: python corrupted_files.py FOLDER FIRST COUNT.

Each must be read or refused with a DataError of one line, and what is read is what h5py, numpy or
safetensors read from it. Each is read in a process of its own, which it may kill.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sparsekern.data import ActivationStore, DataError, write_activations

ROWS = np.random.default_rng(0).standard_normal((96, 6)).astype(np.float32)


def make(folder: Path) -> list[Path]:
    """One file of each kind."""
    with h5py.File(folder / "whole.h5", "w") as file:
        file["activations"], file["directions"] = ROWS, np.eye(6)
    with h5py.File(folder / "packed.h5", "w") as file:
        options = {"compression": "gzip", "shuffle": True, "fletcher32": True}
        file.create_dataset("activations", data=ROWS, chunks=(8, 6), **options)
    with h5py.File(folder / "new.h5", "w", libver="latest") as file:
        file.create_dataset("activations", data=ROWS, chunks=(8, 6), maxshape=(None, 6))
    with h5py.File(folder / "old.h5", "w") as file:
        half = ROWS.astype(np.float16)
        file.create_dataset("activations", data=half, chunks=(8, 6), maxshape=(None, 6))
    write_activations(folder / "ours.h5", [torch.from_numpy(ROWS).bfloat16()], chunk_rows=8)
    np.save(folder / "a.npy", ROWS)
    tensors = {"activations": torch.from_numpy(ROWS), "directions": torch.eye(6)}
    save_file(tensors, folder / "a.safetensors", {"note": "none"})
    return sorted(folder.iterdir())


def corrupted(content: bytes, random: np.random.Generator) -> bytes:
    """Bytes flipped, set, moved or cut off, mostly near the front, where headers lie."""
    data, size = bytearray(content), len(content)
    near = 1 + int(random.choice([64, 512, 2048, size]))
    for _ in range(int(random.integers(1, 5))):
        at = int(random.integers(min(near, size)))
        match random.integers(6):
            case 0 | 1:
                data[at] ^= 1 << int(random.integers(8))
            case 2:
                data[at] = int(random.integers(256))
            case 3:
                data[at : at + 8] = bytes([int(random.choice([0, 127, 255]))]) * 8
            case 4:
                other = int(random.integers(size))
                data[at : at + 16] = data[other : other + 16]
            case 5:
                data = data[: int(random.integers(size))] if random.random() < 0.3 else data
                data += bytes(max(0, at + 16 - len(data))) if random.random() < 0.5 else b""
        if len(data) < size:
            break
    return bytes(data)


def read_by_others(path: Path) -> np.ndarray | None:
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".safetensors":
        return load_file(path)["activations"].float().numpy()
    with h5py.File(path) as file:
        try:
            values = file["activations"][:]
        except OSError:  # such as a damaged number for the file's end, which the rows lie beyond
            return None
    if values.dtype.kind == "u":
        return torch.from_numpy(values.astype(np.uint16)).view(torch.bfloat16).float().numpy()
    return values.astype(np.float32)


def check(path: Path) -> bool:
    """Whether the file was read; a DataError of one line refuses it."""
    try:
        with ActivationStore(path) as store:
            rows = store.batches(40, seed=0, shuffle=False, prefetch=False)
            found = torch.cat(list(rows)).numpy()
            directions = store.directions
            next(store.batches(40, seed=0, buffer_rows=8, prefetch=False))
    except DataError as error:
        assert "\n" not in str(error) and str(path) in str(error), error
        return False
    assert directions is None or directions.shape[1] == found.shape[1]
    others = read_by_others(path)
    # Where h5py does not find a chunk that is there, the rows are those that were written.
    if others is None or not np.array_equal(found, others):
        assert np.isclose(found, ROWS[: len(found)], 1e-2).mean() > 0.8, "other rows than h5py's"
    return True


def outcome(path: Path) -> str:
    """``read``, ``refused``, or what went wrong, found out in a child that may be killed by it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            said = "read" if check(path) else "refused"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode()[:4000])
        os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    return said or f"killed by signal {os.WTERMSIG(status)}"


def main(folder: Path, first: int, count: int) -> None:
    # A claim that is believed shows as memory.
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    torch.set_num_threads(1)
    originals = make(folder)
    found: dict[str, int] = {}
    for seed in range(first, first + count):
        original = originals[seed % len(originals)]
        content = corrupted(original.read_bytes(), np.random.default_rng(seed))
        path = folder / f"damaged{original.suffix}"
        path.write_bytes(content)
        said = outcome(path)
        if said not in ("read", "refused"):
            said = f"{seed} {original.name}: {said}"
        found[said] = found.get(said, 0) + 1
    print(json.dumps(found, indent=1))
    sys.exit(bool(found.keys() - {"read", "refused"}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
