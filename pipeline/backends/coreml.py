"""Backend `coreml`: a package for iPhones, iPads and Macs. It converts anywhere; only macOS can run it.

Options of a row:
    deployment_target: the oldest system that is to run it, by coremltools' names (default ``iOS17``).
    precision: ``float32`` (default), or ``float16``, which the Neural Engine needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from pipeline import host, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, UnavailableError, last_line, root_line, unknown
from pipeline.types import Runner, Scheme, Target

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.types import Tensors

SYSTEMS = ("iOS16", "iOS17", "iOS18", "macOS13", "macOS14", "macOS15")
PRECISIONS = ("float32", "float16")


class CoreMl:
    """See `pipeline.types.Backend`. Its engine is ``model.mlpackage``, a folder."""

    name = "coreml"
    option_names = frozenset({"deployment_target", "precision"})
    schemes: frozenset[Scheme] = frozenset({"fp32"})

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """It takes the program."""
        return "program"

    def missing(self, target: Target) -> str | None:  # noqa: ARG002
        """The package, which has no converter for Windows."""
        if host.system() == "windows":
            return "coremltools converts on Linux and macOS"
        return host.absent("coremltools", "coremltools", "coreml")

    def not_runnable(self, target: Target) -> str | None:
        """Anything but a Mac."""
        if host.system() == "macos" and target.platform in ("ios", "macos", "any"):
            return targets.unfit(target.model_copy(update={"platform": "macos"})) or self.missing(target)
        return targets.unfit(target) or f"Core ML runs on macOS, this host is {host.system()}"

    def tools(self, target: Target) -> Mapping[str, str]:  # noqa: ARG002
        """Versions of coremltools and torch."""
        return host.versions(["coremltools", "torch"])

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Convert the program, and compare what came out with the signature: here nobody can call it.

        Raises:
            UsageError: an option has a value that doesn't exist.
            UnavailableError: the package is missing.
            BuildError: an operator can't be converted, or the package is called otherwise than the signature says.
        """
        system = _choice(target, "deployment_target", "iOS17", SYSTEMS)
        half = _choice(target, "precision", "float32", PRECISIONS) == "float16"
        reason = self.missing(target)
        if reason is not None:
            raise UnavailableError(f"`{target.name}`: {reason}")
        from pipeline import coreml_package as package
        from pipeline import program as programs
        from pipeline.origin import of_program_error

        program, signature = programs.load(model.file(programs.FILE)), model.signature()
        try:
            spec, weights = package.converted(program, signature, system, half)
        except BuildError:
            raise
        except Exception as error:  # its converters raise everything from ValueError to NotImplementedError
            told = root_line(error)
            raise BuildError(
                f"coreml can't build `{target.name}`: {told}{of_program_error(program, told)}",
                hint="change that part of the model, or leave out the target in the recipe's `targets`",
            ) from error
        package.write(spec, weights, out / package.PACKAGE)
        wrong = package.fault(package.read(out / package.PACKAGE), signature, half)
        if wrong is not None:
            raise BuildError(
                f"coreml can't build `{target.name}`: the package is not what the signature says: {wrong}",
                hint="give the row `buckets` (fixed sizes), or leave out the target in the recipe's `targets`",
            )
        narrowed: list[JsonValue] = [
            spec.name for spec in (*signature.inputs, *signature.outputs) if spec.dtype in ("int64", "bool")
        ]
        return {"int32": narrowed, "specification": spec.specificationVersion}

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:  # noqa: ARG002
        """The model on the CPU of a Mac.

        Raises:
            BuildError: the package is broken.
            UnavailableError: this is no Mac.
        """
        from pipeline import coreml_package as package

        path, signature = engine.path / package.PACKAGE, engine.signature()
        half = _choice(target, "precision", "float32", PRECISIONS) == "float16"
        wrong = package.fault(package.read(path), signature, half)
        if wrong is not None:
            raise BuildError(f"`{path}` is not what `signature.json` says: {wrong}")
        reason = self.not_runnable(target)
        if reason is not None:
            raise UnavailableError(f"`{target.name}` can't be run on this host: {reason}")
        tools = package.library()
        try:
            model = tools.models.MLModel(str(path), compute_units=tools.ComputeUnit.CPU_ONLY)
        except Exception as error:  # Core ML's compiler speaks through many kinds
            raise BuildError(f"Core ML can't load `{path}`: {last_line(error)}") from error

        def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
            found = model.predict({name: _narrow(array) for name, array in feeds.items()})
            return {spec.name: found[spec.name].astype(spec.dtype) for spec in signature.outputs}

        yield checked(run, signature)


def _narrow(array: NDArray[Any]) -> NDArray[Any]:
    return (array if array.dtype.kind == "f" else array.astype("int32")).reshape(array.shape or (1,))


def _choice(target: Target, option: str, default: str, choices: tuple[str, ...]) -> str:
    value = str(target.options.get(option, default))
    if value not in choices:
        raise unknown(f"value of `{option}`", value, choices, where=f"target `{target.name}`")
    return value


BACKEND = CoreMl()
