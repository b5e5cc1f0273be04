"""One file of activations ``[tokens, D]``: opened, checked, and read in ranges of rows.

======================  ==================================================================
``.h5``, ``.hdf5``      a dataset, chunked or not, of float32, float16, or bfloat16 kept as
                        uint16 with the attribute ``dtype = "bfloat16"``; floats of other
                        sizes as h5py converts them
``.npy``                float32 or float16 in row-major order
``.safetensors``        F32, F16 or BF16
======================  ==================================================================

HDF5 and safetensors files may hold a second field ``directions`` ``[n, D]``: the true directions
that the activations are mixtures of. HDF5 files may hold columns ``[tokens]`` that say where a row
comes from: ``documents``, ``positions`` and ``token_ids``.

A file that changes while it is open is refused at the next read. One that is replaced by another
under its name is read on to its end.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError
from .activation_file import ACTIVATIONS, ActivationFile
from .arrays import NpyFile, SafetensorsFile
from .hdf5 import Hdf5File

SUFFIXES = (".h5", ".hdf5", ".npy", ".safetensors")
_KINDS = dict(zip(SUFFIXES, (Hdf5File, Hdf5File, NpyFile, SafetensorsFile), strict=True))


def open_activations(path: str | Path, dataset: str = ACTIVATIONS) -> ActivationFile:
    """Open a file of activations by its suffix.

    Args:
        path: ``.h5``, ``.hdf5``, ``.npy`` or ``.safetensors``.
        dataset: name of the dataset (HDF5) or tensor (safetensors).

    Raises:
        DataError: it is missing, of another kind, damaged, locked by a writer, laid out
            otherwise, or empty. The message names the file.
        ModuleNotFoundError: h5py is needed and not installed.
    """
    path = Path(path)
    if not isinstance(dataset, str):
        raise ValueError(f"open_activations: dataset must be a name, got {dataset!r}")
    if not path.is_file():
        raise DataError(f"activation file not found: {path}")
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"activation file of unknown kind: {path} (its name must end in {', '.join(SUFFIXES)})"
        )
    file: ActivationFile = kind(path, dataset)
    return file
