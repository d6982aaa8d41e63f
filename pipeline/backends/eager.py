"""Backend `eager`: the captured program itself, run operator by operator by PyTorch. The reference for all others."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from pipeline import host, targets
from pipeline.backends import checked
from pipeline.errors import BuildError, StoreError
from pipeline.types import Runner, Scheme, Target

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.store import Stored

FILE = "program.pt2"


class Eager:
    """See `pipeline.types.Backend`. Its engine is a copy of ``program.pt2``."""

    name = "eager"
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
        """The engine's bytes are the program's."""
        return {}

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:  # noqa: ARG002
        """Copy the program."""
        shutil.copyfile(model.file(FILE), out / FILE)
        return {}

    @contextlib.contextmanager
    def load(self, engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:  # noqa: ARG002
        """The program under `torch.inference_mode`, with as many threads as torch is set to unless told.

        Raises:
            BuildError: the file is broken.
        """
        from pipeline import program

        try:
            module = program.runnable(program.load(engine.file(FILE)))
        except StoreError as error:
            raise BuildError(error.message, hint=error.hint) from error
        signature = engine.signature()
        with program.threads(threads):
            yield checked(program.runner(module, signature), signature)


BACKEND = Eager()
