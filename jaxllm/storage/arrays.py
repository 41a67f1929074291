"""Arrays in an `.npz` file: written whole, read with nothing believed that the file does not bear out.

`np.savez` writes them. `np.load` takes a shape's memory before it has seen so many numbers, unpacks what is
compressed to any size, and fails in a dozen ways; here sizes are those of the file, and errors one line.
"""

import io
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from jaxllm.storage import checksums
from jaxllm.storage.metadata import one_line

KINDS = "biufU"  # of the types that are written: numbers, and text


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Each array of a file by its name.

    Raises FileNotFoundError where there is none, ValueError in one line for what `np.savez` did not write so.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
            if len({file.filename for file in files}) != len(files):
                raise ValueError("two arrays of one name")
            return {file.filename.removesuffix(".npy"): _array(archive, file) for file in files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise ValueError(f"{path.name} must be a whole .npz file, got {one_line(error)[:200]}") from error


def write_npz(directory: Path, name: str, arrays: Mapping[str, Any], *, checked: bool) -> None:
    """Adds a file to a directory that grows; it appears whole or not at all. checked: with its checksum."""
    part = directory / f"{name}.part"
    try:
        with part.open("wb") as file:
            np.savez(file, **arrays)
        if checked:
            checksums.add(directory, part, name)
        part.replace(directory / name)
    finally:
        part.unlink(missing_ok=True)


def _array(archive: zipfile.ZipFile, file: zipfile.ZipInfo) -> np.ndarray:
    if file.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{file.filename} compressed")
    data = archive.read(file)  # as long as the file says and has; its CRC is checked
    stream = io.BytesIO(data)
    version = npy.read_magic(stream)
    header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = header(stream)
    at = stream.tell()
    if dtype.kind not in KINDS or any(n < 0 for n in shape):
        raise ValueError(f"{file.filename} of {dtype}{list(shape)}")
    if prod(shape) * dtype.itemsize != len(data) - at:
        raise ValueError(f"{file.filename} of {dtype}{list(shape)} in {len(data) - at} bytes")
    numbers = np.frombuffer(data, dtype, offset=at, count=prod(shape))
    return numbers.reshape(shape, order="F" if is_fortran else "C")
