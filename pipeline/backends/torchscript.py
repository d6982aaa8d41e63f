"""Backend `torchscript`: the program as a frozen TorchScript module, for devices in the field that still load those.

PyTorch has given TorchScript up; a new device is better served by `aotinductor` or `onnxruntime`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from pipeline import host, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, first_line
from pipeline.types import Runner, Scheme, Target

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.store import Stored

FILE = "model.torchscript"


class TorchScript:
    """See `pipeline.types.Backend`. Its engine is ``model.torchscript``."""

    name = "torchscript"
    option_names: frozenset[str] = frozenset()
    schemes: frozenset[Scheme] = frozenset({"fp32"})

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """It takes the program."""
        return "program"

    def missing(self, target: Target) -> str | None:  # noqa: ARG002
        """Only torch can be."""
        return None if host.has_module("torch") else "the package `torch` is not installed"

    def not_runnable(self, target: Target) -> str | None:
        """As `missing`, and where the row is for another machine."""
        return targets.unfit(target) or self.missing(target)

    def tools(self, target: Target) -> Mapping[str, str]:  # noqa: ARG002
        """The compiler of TorchScript."""
        return host.versions(["torch"])

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:
        """Script the program's graph, and freeze it.

        Raises:
            BuildError: an operator has no form in TorchScript.
        """
        from pipeline import program as programs
        from pipeline import scripted
        from pipeline.origin import of_program_error

        loaded = programs.load(model.file(programs.FILE))
        try:
            module = scripted.frozen(loaded)
        except scripted.UnscriptableError as error:
            message = f"operator `{error}` has no form in TorchScript{of_program_error(loaded, str(error))}"
            raise _failed(target, message) from error
        except Exception as error:  # TorchScript's compiler raises RuntimeError, and its front end others
            raise _failed(target, f"{first_line(error)}{of_program_error(loaded, str(error))}") from error
        scripted.save(module, out / FILE)
        return {}

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:  # noqa: ARG002
        """The module, with as many threads as torch is set to unless told.

        Raises:
            BuildError: the file is broken.
        """
        from pipeline import program as programs
        from pipeline import scripted

        path, signature = engine.file(FILE), engine.signature()
        try:
            module = scripted.load(path)
        except Exception as error:  # RuntimeError of many kinds
            raise BuildError(
                f"torchscript can't load the engine `{path}`: {first_line(error)}",
                hint="`exportyard export` builds it again",
            ) from error
        with programs.threads(threads):
            yield checked(programs.runner(module, signature), signature)


def _failed(target: Target, message: str) -> BuildError:
    return BuildError(
        f"torchscript can't build `{target.name}`: {message}",
        hint="change that part of the model, or leave out the target in the recipe's `targets`",
    )


BACKEND = TorchScript()
