"""Backend `auto`: builds nothing. A row of it names other rows in `candidates`, and ships the engine of the fastest.

`pipeline.run` builds, checks and measures those rows as any others, and `pipeline.choice` takes one that passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from pipeline import targets
from pipeline.errors import UsageError
from pipeline.types import Runner, Scheme, Target

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.store import Stored


class Auto:
    """See `pipeline.types.Backend`. What a row can be is decided by the rows that it names."""

    name = "auto"
    option_names: frozenset[str] = frozenset()
    schemes: frozenset[Scheme] = frozenset({"fp32"})

    def source(self, target: Target) -> Literal["onnx", "program"]:  # noqa: ARG002
        """Nothing asks."""
        return "onnx"

    def missing(self, target: Target) -> str | None:
        """Only rows to choose among can be."""
        return None if target.candidates else "the row names no `candidates`"

    def not_runnable(self, target: Target) -> str | None:
        """Where the row is for another machine."""
        return targets.unfit(target) or self.missing(target)

    def tools(self, target: Target) -> Mapping[str, str]:  # noqa: ARG002
        """None decides any bytes."""
        return {}

    def build(self, model: Stored, target: Target, out: Path) -> Mapping[str, JsonValue]:  # noqa: ARG002
        """Never.

        Raises:
            UsageError: always.
        """
        raise _only_chooses(target)

    def load(self, engine: Stored, target: Target, threads: int | None = None) -> AbstractContextManager[Runner]:  # noqa: ARG002
        """Never: what is loaded is an engine of another row.

        Raises:
            UsageError: always.
        """
        raise _only_chooses(target)


def _only_chooses(target: Target) -> UsageError:
    return UsageError(
        f"`{target.name}` has no engine of its own: it chooses among {', '.join(target.candidates) or 'no rows'}",
        hint="name one of these rows",
    )


BACKEND = Auto()
