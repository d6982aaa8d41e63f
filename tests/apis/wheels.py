"""The wheels that the stubs beside this file describe: pinned, and downloaded once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CACHE = Path.home() / ".cache" / "exportyard" / "wheels"
TIMEOUT_S = 300


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel; `folder` is where its stub goes."""

    package: str
    version: str
    file: str
    sha256: str
    folder: str

    def path(self) -> Path:
        """The verified file, downloaded if it isn't in the cache.

        Raises:
            OSError: it can't be downloaded, or is another file than the pinned one.
        """
        path = CACHE / self.file
        if not path.is_file():
            CACHE.mkdir(parents=True, exist_ok=True)
            self._download()
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise OSError(f"{path} is not the wheel that was pinned")
        return path

    def _download(self) -> None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        here = ["--python-version=3.11", "--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_17_x86_64"]
        what = f"{self.package}=={self.version}"
        done = subprocess.run(
            [*pip, *here, f"--dest={CACHE}", what], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
        if done.returncode != 0:
            raise OSError(f"can't download {what}: {done.stderr.strip().splitlines()[-1]}")


WHEELS = (
    Wheel(
        "tensorrt_cu12_bindings",
        "10.3.0",
        "tensorrt_cu12_bindings-10.3.0-cp311-none-manylinux_2_17_x86_64.whl",
        "59ace22d7f2ca1e9dcde2cb0cb5916912cb3cd5a9d72dd7852be0160d9b3a0ee",
        "tensorrt-10.3",
    ),
    Wheel(
        "tensorrt_cu13_bindings",
        "10.16.1.11",
        "tensorrt_cu13_bindings-10.16.1.11-cp311-none-manylinux_2_28_x86_64.whl",
        "f986d47980d042cc126506a9b84586e55ad13737a7a46826fe45457c04d66294",
        "tensorrt-10.16",
    ),
    Wheel(
        "tensorrt_cu13_bindings",
        "11.4.0.106",
        "tensorrt_cu13_bindings-11.4.0.106-cp311-none-manylinux_2_28_x86_64.whl",
        "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc",
        "tensorrt-11.4",
    ),
    Wheel(
        "torch_tensorrt",
        "2.13.0",
        "torch_tensorrt-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "91b0cc45e4c1d7612b31a556116f01868393c3d7fdec97c6a703aef74335911c",
        "torch_tensorrt-2.13",
    ),
)
