"""How long it takes to lay out a release in a static registry, against hashing its bytes once and copying them once.

    python -m benchmarks.publish [--gib 1] [--rounds 3] [--folder /tmp]

Turn by turn: sha256 of the file, a plain copy of it, one that is flushed to the disk (as the registry's files are), and
`layout.lay_out` into an empty registry; then a second version that shares the file. Prints JSON: medians of time on the
clock, and of processor time, which a busy machine disturbs less.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline import depots, digest, layout, store
from tests.releases import manifest_of


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        print(json.dumps(measure(Path(scratch), int(given.gib * 2**30), given.rounds), indent=2))


def measure(scratch: Path, size: int, rounds: int) -> dict[str, object]:
    """Medians in seconds, and what they make."""
    first, second = (release(scratch / version, version, size) for version in ("1.0.0", "1.0.1"))
    file = first / "engines/any-echo/model.bin"
    copy, registry = scratch / "copy", scratch / "registry"
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        took(found, "hash", lambda: digest.of_file(file))
        took(found, "copy", lambda: shutil.copyfile(file, copy))
        copy.unlink()
        took(found, "copy_to_disk", lambda: flushed(file, copy))
        copy.unlink()
        registry.mkdir()
        depot = depots.at(registry)
        took(found, "lay_out", lambda depot=depot: layout.lay_out(first, depot))
        took(found, "lay_out_again", lambda depot=depot: layout.lay_out(first, depot))
        took(found, "lay_out_next_version", lambda depot=depot: layout.lay_out(second, depot))
        shutil.rmtree(registry)
    clock, processor = (
        {name: round(statistics.median(pair[which] for pair in times), 3) for name, times in found.items()}
        for which in (0, 1)
    )
    return {
        "bytes": size,
        "seconds": clock,
        "processor_seconds": processor,
        "versus_hash_and_copy": ratio(clock, "copy"),
        "versus_hash_and_copy_to_disk": ratio(clock, "copy_to_disk"),
        "versus_hash_and_copy_processor": ratio(processor, "copy"),
    }


def ratio(medians: dict[str, float], copy: str) -> float:
    """How many times hashing once and copying once a release takes."""
    return round(medians["lay_out"] / (medians["hash"] + medians[copy]), 2)


def release(folder: Path, version: str, size: int) -> Path:
    """A release whose first engine has `size` bytes, the same in each version."""
    for name in ("any-echo", "linux-echo"):
        (folder / "engines" / name).mkdir(parents=True)
    with (folder / "engines/any-echo/model.bin").open("wb") as stream:
        for place in range(0, size, 2**20):
            stream.write(place.to_bytes(8, "little") * min(2**17, (size - place + 7) // 8))
    (folder / "engines/linux-echo/model.bin").write_text("small")
    (folder / "golden.safetensors").write_text("golden")
    (folder / "manifest.json").write_text(manifest_of(store.describe(folder), version).text())
    return folder


def flushed(source: Path, to: Path) -> None:
    """A copy that is on the disk when this returns."""
    shutil.copyfile(source, to)
    descriptor = os.open(to, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def took(found: dict[str, list[tuple[float, float]]], name: str, work: Callable[[], object]) -> None:
    """Note how long `work` takes; what others have left to write is written before."""
    os.sync()
    clock, processor = time.perf_counter(), time.process_time()
    work()
    found.setdefault(name, []).append((time.perf_counter() - clock, time.process_time() - processor))


if __name__ == "__main__":
    main()
