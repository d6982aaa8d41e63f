"""Publishers to a static registry as processes of their own, for tests.

``python -m tests.laying all FOLDERS PLACE`` lays out each release in the folder FOLDERS.
``python -m tests.laying kills RELEASE REGISTRY COPIES`` lays one out in a copy of the folder REGISTRY, killed at the
first step that touches the disk; in another copy, killed at the second; and so on. Prints how many steps there are.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import depots, layout


def lay_out_all(folders: Path, place: str) -> None:
    """Lay out each release below `folders`."""
    depot = depots.at(place)
    for folder in sorted(folders.iterdir()):
        layout.lay_out(folder, depot)


def kills(release: Path, registry: Path, copies: Path) -> int:
    """How many steps there are; after each but the last one a copy is left."""
    count = 0
    while True:
        count += 1
        copy = copies / f"{count:03}"
        shutil.copytree(registry, copy)
        child = os.fork()
        if child == 0:
            _die_at(count)
            layout.lay_out(release, depots.at(copy))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return count - 1


def _die_at(count: int) -> None:
    """Make this process die before step `count` of those that touch the disk, of which one is half a write."""
    left = count

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(owner: Any, name: str) -> None:
        known: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            step()
            return known(*arguments, **options)

        setattr(owner, name, watched)

    def write_bytes(path: Path, data: bytes) -> None:
        with path.open("wb", buffering=0) as stream:
            stream.write(data[: len(data) // 2])
            step()
            stream.write(data[len(data) // 2 :])

    def copyfile(source: Path, to: Path) -> None:
        write_bytes(to, source.read_bytes())

    for owner, name in ((os, "fsync"), (os, "fchmod"), (Path, "replace"), (Path, "mkdir")):
        watch(owner, name)
    Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]
    shutil.copyfile = copyfile  # type: ignore[assignment]


if __name__ == "__main__":
    if sys.argv[1] == "all":
        lay_out_all(Path(sys.argv[2]), sys.argv[3])
    else:
        print(kills(*map(Path, sys.argv[2:5])))
