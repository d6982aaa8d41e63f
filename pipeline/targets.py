"""Target rows: ``targets/targets.toml`` read into frozen models."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline import host
from pipeline.errors import UsageError, WorkspaceError, nearest, unknown
from pipeline.types import Target


def read(path: Path) -> dict[str, Target]:
    """All rows of `path` by name, in the file's order.

    Raises:
        WorkspaceError: the file is missing, isn't TOML, or a row has an unknown key or a wrong value.
    """
    content = read_toml(path)
    strange = sorted(set(content) - {"targets"})
    if strange:
        raise WorkspaceError(
            f"unknown table `{strange[0]}` in `{path}`", hint="a row begins with `[targets.linux-x86_64-onnxruntime]`"
        )
    tables = content.get("targets", {})
    if not isinstance(tables, dict) or not tables:
        raise WorkspaceError(f"`{path}` has no target", hint="a row begins with `[targets.linux-x86_64-onnxruntime]`")
    return {name: _row(path, name, table) for name, table in tables.items()}


def _row(path: Path, name: str, table: object) -> Target:
    if not isinstance(table, dict):
        raise WorkspaceError(f"`targets.{name}` in `{path}` must be a table", hint=f"write `[targets.{name}]`")
    try:
        return Target(name=name, **table)
    except ValidationError as error:
        raise WorkspaceError(f"`{path}`, target `{name}`: {explain(error)}", hint=hint_for(error, Target)) from None


def select(rows: Mapping[str, Target], names: Iterable[str]) -> list[Target]:
    """The rows called `names`, each once, in the order asked for.

    Raises:
        UsageError: there is no such row; the nearest name is suggested.
    """
    chosen: dict[str, Target] = {}
    for name in names:
        if name not in rows:
            raise unknown("target", name, rows, where="targets/targets.toml")
        chosen[name] = rows[name]
    return list(chosen.values())


def to_build(rows: Mapping[str, Target], asked: Iterable[Target]) -> list[Target]:
    """The rows that are built for `asked`, each once: in the place of one that chooses, those it chooses among.

    Raises:
        UsageError: such a row names one that doesn't exist, or that chooses itself.
    """
    found: dict[str, Target] = {}
    for target in asked:
        for row in select(rows, target.candidates) if target.candidates else [target]:
            if row.candidates:
                raise UsageError(
                    f"target `{target.name}` chooses among others, and so does its candidate `{row.name}`",
                    hint="name rows that are built in `candidates`",
                )
            found[row.name] = row
    return list(found.values())


def unfit(target: Target) -> str | None:
    """Why code made for `target` doesn't run on this host, or None if it does. Never raises."""
    if target.platform not in ("any", host.system()):
        return f"it is for {target.platform}, this host is {host.system()}"
    if target.machine not in ("any", host.machine()):
        return f"it is for {target.machine}, this host is {host.machine()}"
    lacking = host.lacking(target.requires)
    if lacking:
        return f"this CPU lacks {', '.join(feature.replace('|', ' or ') for feature in lacking)}"
    return None


def not_measured(target: Target) -> str | None:
    """Why times taken here would say nothing about the target's hardware (it is emulated), or None."""
    reason = None if target.device is not None else unfit(target)
    return None if reason is None else f"not measured on the device: {reason}"


def check_options(target: Target, known: Iterable[str]) -> None:
    """Refuse an option that the target's backend does not have, and a device that it can't use.

    Raises:
        UsageError: names the nearest option.
    """
    if target.device is not None and "device.rpc" not in set(known):
        raise UsageError(
            f"backend `{target.backend}` can't run engines on a device (target `{target.name}`)",
            hint="take the table `device` out of the row; the backend `tvm` can use one",
        )
    for option in target.options:
        if option not in set(known):
            raise UsageError(
                f"unknown option `{option}` in target `{target.name}` (backend `{target.backend}`)",
                hint=unknown("option", option, known).hint,
            )


def read_toml(path: Path) -> dict[str, object]:
    """The content of a TOML file.

    Raises:
        WorkspaceError: it can't be read or isn't TOML; the line is named.
    """
    if path.exists() and not path.is_file():
        raise WorkspaceError(f"`{path}` is not a file", hint="put a text file there")
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise WorkspaceError(f"`{path}` is missing", hint="`exportyard init DIR` writes a workspace with one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise WorkspaceError(f"can't read `{path}`: {error}", hint="see whether it is a readable text file") from None
    except RecursionError:
        raise WorkspaceError(
            f"`{path}` is nested too deeply", hint="no key of it needs more than three levels"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise WorkspaceError(f"`{path}` is not valid TOML: {error}", hint="correct the line that it names") from None


def explain(error: ValidationError) -> str:
    """The fault that matters most, on one line, with the key and the value."""
    fault = _first(error)
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown key `{key}`"
    if fault["type"] == "missing":
        return f"`{key}` is missing"
    message = fault["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"`{key}` = {fault['input']!r}: {message[0].lower()}{message[1:]}"


def hint_for(error: ValidationError, model: type[BaseModel]) -> str:
    """For an unknown key, the known key that is nearest; `model` is what the file was read into."""
    fault = _first(error)
    if fault["type"] == "extra_forbidden":
        fields = set(_table(model, fault["loc"]).model_fields) - {"folder", "root"}
        close = nearest(str(fault["loc"][-1]), fields)
        return f"did you mean `{close}`?" if close else "known keys: " + ", ".join(sorted(fields))
    if fault["type"] == "missing":
        return f"add `{fault['loc'][-1]}`; docs/recipes.md and docs/targets.md list the keys"
    return "docs/recipes.md and docs/targets.md say what each key may be"


def _first(error: ValidationError) -> ErrorDetails:
    """An unknown key if there is one: a misspelt key is a missing one, too, and says less as that."""
    faults = error.errors()
    return next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])


def _table(model: type[BaseModel], place: tuple[int | str, ...]) -> type[BaseModel]:
    """The model of the table that holds the key at `place`."""
    for part in place[:-1]:
        field = model.model_fields.get(str(part))  # None for a position in a list, or a name that the user chose
        if field is not None:
            model = next(_models_in(field.annotation), model)
    return model


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
