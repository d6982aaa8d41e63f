"""Content digests: what two artifacts must share to be the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def of_bytes(data: bytes) -> str:
    """sha256 of `data`, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> str:
    """sha256 of the bytes of `path`, read in constant memory.

    Raises:
        OSError: the file can't be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical(value: Any) -> str:
    """`value` as JSON in its one canonical form: sorted keys, no spaces, no NaN.

    Raises:
        TypeError, ValueError: `value` is not plain JSON data.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def of_json(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return of_bytes(canonical(value).encode())


def of_arrays(arrays: Mapping[str, Any]) -> str:
    """sha256 of NumPy arrays by name: their dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.tobytes())  # in C order, however it lies
    return found.hexdigest()
