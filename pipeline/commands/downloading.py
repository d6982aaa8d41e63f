"""The command that downloads a release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pipeline import console, workspace
from pipeline.commands.options import HERE, AsJson, Folder, PublicKey
from pipeline.errors import UsageError, unknown

if TYPE_CHECKING:
    from pipeline.puller import Wish


def pull(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE[@VERSION|#CHANNEL]", help="The newest version if none is given.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where to put the release.")],
    target: Annotated[
        Optional[list[str]],  # noqa: UP045  see above
        typer.Option("--target", "-t", metavar="T|auto", help="Whose engines; `auto`: the best one for this machine."),
    ] = None,
    source: Annotated[
        Optional[str],  # noqa: UP045  see above
        typer.Option("--from", metavar="DIR|URL", help="A registry (a folder, http(s):// or s3://), workspace or git."),
    ] = None,
    key: PublicKey = None,
    backend: Annotated[
        Optional[list[str]],  # noqa: UP045  see above
        typer.Option("--backend", metavar="B", help="`auto` chooses among engines of B only; may be repeated."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Run the golden vectors before it is installed.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, and update when what is asked for moves.")] = False,
    every: Annotated[float, typer.Option("--every", metavar="S", min=0.01, help="Seconds between two looks.")] = 60.0,
    back: Annotated[bool, typer.Option("--back", help="Bring back the version that was there before.")] = False,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Download a release, or some of its targets, and verify every byte."""
    from pipeline import download, puller, trust

    wanted = download.wish(source or "", recipe, to, target, backend, trust.public_key(key), check=check)

    def tell(pulled: puller.Pulled) -> None:
        found = {"tag": f"{pulled.recipe}@v{pulled.version}", **puller.plain(pulled)}
        print(json.dumps(found, indent=None if watch else 2) if as_json else puller.words(pulled), flush=True)

    if back:
        tell(download.back(wanted))
    elif source is not None and download.is_registry(wanted):
        download.watch(wanted, every, tell) if watch else tell(download.pull(wanted))
    elif backend or check or watch or "auto" in (target or ()):
        raise UsageError(
            f"`auto`, `--check` and `--watch` are for a static registry; `{source or root}` is none "
            f"that has `{wanted.recipe}`",
            hint="`--from URL|DIR|s3://...`: `<registry>/<recipe>/index.json` must be there",
        )
    else:
        _pull_by_git(wanted, source if source is not None else str(workspace.find(root).root), as_json=as_json)


def _version_in(wanted: Wish, where: str) -> str:
    """The version that a channel points to, by the tags of a repository on this machine."""
    from pipeline import channels

    if not Path(where).is_dir():
        raise UsageError(
            f"channels are read from a static registry or a folder; `{where}` is neither that has `{wanted.recipe}`",
            hint="`--from URL|DIR|s3://...`: `<registry>/<recipe>/index.json` must be there",
        )
    found = {name: one.now for name, one in channels.channels(Path(where), wanted.recipe).items()}
    now = found.get(wanted.channel)
    if now is None:
        known = [name for name, event in found.items() if event is not None]
        raise unknown("channel", wanted.channel, known, where=f"`{wanted.recipe}`")
    return str(now.version)


def _pull_by_git(wanted: Wish, where: str, *, as_json: bool) -> None:
    from pipeline import manifest
    from pipeline.pull import fetch

    version = _version_in(wanted, where) if wanted.channel else wanted.version or None
    pulled = fetch(where, wanted.recipe, version, wanted.targets or None, wanted.to, wanted.key)
    if as_json:
        found = {"tag": pulled.tag, "folder": str(pulled.folder), "targets": pulled.targets, "changed": pulled.changed}
        print(json.dumps(found, indent=2))
        return
    state = "" if pulled.changed else " was there already"
    verified = "all verified" if wanted.key is None else "signature and digests verified"
    size = console.size(pulled.size_bytes)
    print(f"{pulled.tag} in {wanted.to}{state}: {', '.join(pulled.targets)} ({size}, {verified})")
    if wanted.key is None and manifest.SIGNATURE in pulled.manifest.beside:
        console.say("its signature was not checked (`--key FILE.pub` does)")
