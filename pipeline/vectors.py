"""Inputs that a search found to be the worst: files beside the recipe, which every later comparison looks at again.

``recipes/<name>/vectors/<content>.safetensors`` holds the inputs of one call by name; 12 digits of their own digest
name it, so that the same input is kept once, and a file that was changed is found out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import digest, store
from pipeline.errors import DataError, ExportyardError
from pipeline.types import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

SUFFIX = ".safetensors"
FOLDER = "vectors"
DIGITS = 12  # of 64: enough that two inputs of one recipe never meet


def files(recipe: Recipe) -> list[Path]:
    """The recipe's vectors, by name.

    Raises:
        DataError: something else is in their folder.
    """
    folder = recipe.folder / FOLDER
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise DataError(f"`{folder}` is a file", hint="that name is for a folder of kept inputs")
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in found:
        if path.suffix != SUFFIX or not path.is_file():
            raise DataError(
                f"recipe `{recipe.name}`: `{path}` is no kept input",
                hint=f"only `{SUFFIX}` files that `exportyard stress` wrote belong there; move it away",
            )
    return found


def digests(recipe: Recipe) -> dict[str, str]:
    """Content of each file, for keys.

    Raises:
        DataError: as `files`, or one can't be read.
    """
    found = {}
    for path in files(recipe):
        try:
            found[path.name] = digest.of_file(path)
        except OSError as error:
            raise DataError(f"can't read `{path}`: {error.strerror}", hint="see whether you may (`ls -l`)") from None
    return found


def read(recipe: Recipe) -> dict[str, dict[str, NDArray[Any]]]:
    """The inputs of each file, by its name, checked.

    Raises:
        DataError: a file is damaged, was changed, or holds something that isn't an input of the recipe.
    """
    return {path.name: _read(recipe, path) for path in files(recipe)}


def _read(recipe: Recipe, path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError, safe_open

    from pipeline import samples

    where = f"recipe `{recipe.name}`: the kept input `{path}`"
    remove = "remove it, or take it from git again (`git checkout`)"
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DataError(f"{where} is damaged: {error}", hint=remove) from None
    try:
        samples.check_feeds(recipe, arrays)
    except ExportyardError as error:
        said = error.message.removeprefix(f"recipe `{recipe.name}`: ")
        raise DataError(
            f"{where} doesn't fit the model: {said}", hint="remove it if the inputs are others now"
        ) from None
    if path.name != name_of(arrays):
        raise DataError(f"{where} isn't what its name says: its content is `{name_of(arrays)}`", hint=remove)
    return {spec.name: arrays[spec.name] for spec in recipe.inputs}


def name_of(feeds: Arrays) -> str:
    """The name of the file that holds these inputs."""
    return digest.of_arrays(feeds)[:DIGITS] + SUFFIX


def keep(recipe: Recipe, feeds: Arrays) -> Path:
    """Write `feeds` as a vector of the recipe; the file's path.

    Raises:
        StoreError: it can't be written.
    """
    import numpy as np
    from safetensors.numpy import save

    path = recipe.folder / FOLDER / name_of(feeds)
    store.write_whole(path, save({name: np.ascontiguousarray(array) for name, array in feeds.items()}))
    return path
