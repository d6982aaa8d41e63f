"""Backend `litert`: ``.tflite`` files for LiteRT (TensorFlow Lite) on phones and small boards, of fixed sizes.

Its converter has an environment of its own (`exportyard setup litert`), because its pins don't fit beside ours; its
runtime is the extra `litert`. 64-bit integers become 32-bit ones; INT8 engines take and give integers where the
program quantises its inputs and outputs, and say their scales themselves.

Options of a row:
    threads: threads that run one operator; 0 (default) takes every core.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import environments, host, processes, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, UnavailableError, UsageError, last_line
from pipeline.types import Runner, Scheme, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.types import Tensors

FILE = "model.tflite"
ENVIRONMENT = "litert"
SCRIPT = Path(__file__).parents[1] / "native" / "litert_convert.py"
KNOWN = ("aten", "prims", "quantized_decomposed")  # operators that torch brings along
LIMITS = -(2**31), 2**31 - 1
_RAISED = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Iteration)\b")


class LiteRt:
    """See `pipeline.types.Backend`. Its engine is ``model.tflite``, one for each bucket."""

    name = "litert"
    option_names = frozenset({"threads"})
    schemes: frozenset[Scheme] = frozenset({"fp32", "int8-s8s8"})
    static_only = True
    quantizer = "litert"

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """It takes the program."""
        return "program"

    def missing(self, target: Target) -> str | None:  # noqa: ARG002
        """The converter's environment."""
        return environments.absent(ENVIRONMENT)

    def not_runnable(self, target: Target) -> str | None:
        """The runtime, or the row's own hardware."""
        return targets.unfit(target) or host.absent("ai_edge_litert", "ai-edge-litert", "litert")

    def tools(self, target: Target) -> Mapping[str, str]:  # noqa: ARG002
        """The converter's environment."""
        return environments.versions(ENVIRONMENT)

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Let the converter's environment write the file.

        Raises:
            UsageError: `threads` is no number.
            UnavailableError: the environment is missing.
            BuildError: an operator can't be converted.
        """
        _threads(target)
        reason = self.missing(target)
        if reason is not None:
            raise UnavailableError(f"`{target.name}`: {reason}")
        signature = model.signature()
        wanted = {
            "inputs": {spec.name: [list(spec.shape), spec.dtype] for spec in signature.inputs},
            "outputs": [spec.name for spec in signature.outputs],
        }
        source = model.file("program.pt2")
        files = [str(path) for path in (SCRIPT, source, out / FILE)]
        command = [str(environments.python(ENVIRONMENT)), "-I", *files, json.dumps(wanted)]
        quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
        if done.returncode != 0:
            raise _failed(source, target, done.stderr)
        narrowed: list[JsonValue] = [
            spec.name for spec in (*signature.inputs, *signature.outputs) if spec.dtype == "int64"
        ]
        return {"int32": narrowed}

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:
        """LiteRT's interpreter, with XNNPACK.

        Raises:
            BuildError: the file is broken, or is called otherwise than the signature says.
        """
        path, signature = engine.file(FILE), engine.signature()
        try:
            with processes.native_silence():
                from ai_edge_litert.interpreter import Interpreter

                interpreter = Interpreter(str(path), num_threads=threads or _threads(target) or host.cpu_count())
                interpreter.allocate_tensors()
                call = interpreter.get_signature_runner()
                given, made = call.get_input_details(), call.get_output_details()
        except Exception as error:  # ValueError and RuntimeError, with the interpreter's own words
            raise BuildError(
                f"litert can't load the engine `{path}`: {last_line(error)}",
                hint="`exportyard export` builds it again",
            ) from error
        lacking = [spec.name for spec in signature.outputs if spec.name not in made]
        if lacking:
            raise BuildError(f"`{path}` has no output {lacking}; it has {sorted(made)}")

        def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
            found = call(**{name: _to(array, given[name]) for name, array in feeds.items() if name in given})
            return {spec.name: _from(found[spec.name], made[spec.name], spec.dtype) for spec in signature.outputs}

        yield checked(run, signature)


def _threads(target: Target) -> int:
    own = target.options.get("threads", 0)
    if not isinstance(own, int) or isinstance(own, bool) or own < 0:
        raise UsageError(f"target `{target.name}`: threads = {own!r}", hint="expected a whole number; 0 is all")
    return own


def _failed(source: Path, target: Target, printed: str) -> BuildError:
    """What the converter raised, in one line."""
    from pipeline import program as programs
    from pipeline.origin import of_program_error

    program = programs.load(source)
    raised = [line for line in printed.splitlines() if _RAISED.match(line)]
    told = (raised or printed.strip().splitlines() or ["no message"])[-1][:300]
    strange = next((name for name in map(_operator, program.graph.nodes) if name.partition(".")[0] not in KNOWN), "")
    if strange:
        told = f"the recipe's own operator {strange} is not known in the converter's environment"
    known = of_program_error(program, told)
    return BuildError(
        f"litert can't build `{target.name}`: {told}{known}",
        hint="change that part of the model, or leave out the target in the recipe's `targets`",
    )


def _operator(node: Any) -> str:
    """``namespace.name.overload`` of a call of an operator; ``aten`` for all else."""
    return str(node.target) if type(node.target).__name__ == "OpOverload" else "aten"


def _to(array: NDArray[Any], detail: Mapping[str, Any]) -> NDArray[Any]:
    """An array as the engine takes it."""
    import numpy as np

    wanted = np.dtype(detail["dtype"])
    if array.dtype == wanted:
        return np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.kind == "f" and wanted.kind == "i":
        scale, zero = detail["quantization"]
        limits = np.iinfo(wanted)
        return np.asarray(np.clip(np.rint(array / scale) + zero, limits.min, limits.max).astype(wanted))
    if array.size and not LIMITS[0] <= int(array.min()) <= int(array.max()) <= LIMITS[1]:
        raise UsageError(f"`{detail['name']}` has numbers that need 64 bits, and LiteRT's engine takes 32")
    return array.astype(wanted)


def _from(array: NDArray[Any], detail: Mapping[str, Any], dtype: str) -> NDArray[Any]:
    """An array as the signature has it; the caller's own."""
    import numpy as np

    if np.dtype(dtype).kind == "f" and array.dtype.kind == "i":
        scale, zero = detail["quantization"]
        array = (array.astype("float32") - zero) * scale
    return np.array(array, dtype=dtype)


BACKEND = LiteRt()
