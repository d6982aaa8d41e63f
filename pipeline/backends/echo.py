"""Backend `echo`: the fake that ships. It needs numpy and onnx, builds in no time, and fails where it is told to.

Options of a row:
    reference: true runs the graph with ONNX's own evaluator, so that the engine is right (and slow). False (default)
        answers zeros of the right shapes: such an engine never passes parity.
    fail: ``build``, ``load`` or ``run`` raises there, as a broken backend would; ``missing`` says that this host
        can't build it.
    sleep_ms: how long a build takes.
    hang: ``here`` or ``child``: a build never ends, in C code that lets nothing else run, or in a child's.
    memory_mb: how much memory a build takes, to its end.
    say: what a build prints, first from Python, then from another program.
    needs: an environment variable without which this host can't build it, as if it named a package.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import dims, host, targets
from pipeline.backends import checked
from pipeline.errors import BuildError
from pipeline.types import Runner, Scheme, Signature, Target

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.types import Tensors

FILE = "model.onnx"
ALL: frozenset[Scheme] = frozenset({"fp32", "fp16", "bf16", "int8-dynamic", "int8-u8s8", "int8-s8s8", "int8-u8u8"})


class Echo:
    """See `pipeline.types.Backend`. Its engine is a copy of the ONNX graph."""

    name = "echo"
    option_names = frozenset({"reference", "fail", "sleep_ms", "hang", "memory_mb", "say", "needs"})
    schemes = ALL

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """It takes the ONNX graph."""
        return "onnx"

    def missing(self, target: Target) -> str | None:
        """Nothing, unless the row plays it."""
        needs = target.options.get("needs")
        if needs is not None and str(needs) not in os.environ:
            return f"`{needs}` is not set, which the row needs"
        return "the row says so (option `fail`)" if target.options.get("fail") == "missing" else None

    def not_runnable(self, target: Target) -> str | None:
        """The row's hardware, as with a real backend."""
        return targets.unfit(target)

    def tools(self, target: Target) -> Mapping[str, str]:  # noqa: ARG002
        """The copy depends on nothing; its evaluator's version is told because parity depends on it."""
        return host.versions(["onnx"])

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Copy the graph, after what the row plays.

        Raises:
            RuntimeError: the row plays a broken backend.
        """
        _work(target.options)
        _play(target, "build")
        for name in model.artifact.files:
            if name != "signature.json":
                shutil.copyfile(model.file(name), out / name)
        return {}

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:  # noqa: ARG002
        """Zeros, or the answers of `onnx.reference`.

        Raises:
            BuildError: the file is broken.
        """
        import onnx
        from onnx.reference import ReferenceEvaluator

        _play(target, "load")
        path, signature = engine.file(FILE), engine.signature()
        try:
            onnx.checker.check_model(path)
            evaluator = ReferenceEvaluator(str(path)) if target.options.get("reference") else None
        except Exception as error:  # protobuf's, onnx's and the evaluator's own
            raise BuildError(
                f"echo can't load the engine `{path}`: {str(error).strip().splitlines()[0]}",
                hint="`exportyard export` builds it again",
            ) from error
        names = [spec.name for spec in signature.outputs]

        def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
            _play(target, "run")
            if evaluator is None:
                return _zeros(signature, feeds)
            found = evaluator.run(names, {name: array.copy() for name, array in feeds.items()})
            return {name: array.copy() for name, array in zip(names, found, strict=True)}

        yield checked(run, signature)


def _work(options: Mapping[str, str | int | bool]) -> None:
    """What a builder does that takes time and memory."""
    words, megabytes = options.get("say"), int(options.get("memory_mb", 0))
    if words is not None:
        print(words)
        subprocess.run(["echo", str(words)], check=True)
    held = bytearray(b"x") * (1_000_000 * megabytes)  # bytes that are written, or they would take no room
    time.sleep(float(options.get("sleep_ms", 0)) / 1000)
    if options.get("hang") == "child":
        subprocess.run(["sleep", "3600"], check=True, start_new_session=True)
    elif options.get("hang") is not None:
        ctypes.PyDLL(None).sleep(3600)
    del held


def _play(target: Target, moment: str) -> None:
    if target.options.get("fail") == moment:
        raise RuntimeError(f"target `{target.name}` fails in {moment}, as its row says")


def _zeros(signature: Signature, feeds: Tensors) -> dict[str, NDArray[Any]]:
    import numpy as np

    named = {
        dim: size
        for spec in signature.inputs
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }
    sizes = collections.defaultdict(lambda: 1, named)  # also for a size that only the data decides
    return {
        spec.name: np.zeros([dims.size_of(dim, sizes) for dim in spec.shape], spec.dtype) for spec in signature.outputs
    }


BACKEND = Echo()
