"""Commands about this machine."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Annotated, Literal

import typer
from rich.markup import escape

from pipeline import console, workspace
from pipeline.commands.options import HERE, AsJson, Folder


def doctor(root: Folder = HERE, as_json: AsJson = False) -> None:
    """Show this host, the versions of the tools, and what is missing for which target and how to get it."""
    from pipeline import diagnosis

    rows = workspace.find(root).rows()
    server = _server_warning()
    if as_json:
        print(json.dumps(diagnosis.plain(rows) | {"server": server}, indent=2))
        return
    console.table(["host", ""], diagnosis.host_rows())
    console.table(["tool", "version", "what it is for"], diagnosis.tool_rows())
    console.table(["target", "state", "how to get it"], diagnosis.target_rows(rows))
    if server is not None:
        console.say(f"[yellow]warning:[/] {escape(server)}")


def _server_warning() -> str | None:
    """Whether others can use the Prefect server, where there is one."""
    if find_spec("prefect") is None:
        return None
    from flows.exposure import warning

    return warning()


def setup(
    what: Annotated[
        Literal["emulator", "litert"],
        typer.Argument(help="`emulator` runs 64-bit Arm engines here; `litert` is LiteRT's converter."),
    ],
) -> None:
    """Get a tool that can't be installed beside ours, into a folder of the user's cache; needs no root."""
    from pipeline import emulator, environments

    def say(part: str) -> None:
        console.say(f"getting {part}")

    print(emulator.fetch(say) if what == "emulator" else environments.make(what, say))
