"""The command line: one subcommand a verb. Importing this loads neither torch nor prefect nor dvc."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer
from rich.markup import escape
from typer.exceptions import TyperException

from pipeline import backends, console, host, run, store, turns, workspace
from pipeline.errors import ExportyardError, UnavailableError, UsageError, unknown
from pipeline.job import Job
from pipeline.types import Recipe

if TYPE_CHECKING:
    from pipeline.channels import Promoted
    from pipeline.depot import Depot
    from pipeline.puller import Wish

app = typer.Typer(
    name="exportyard",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing the help with rich takes longer than all the rest of a command with nothing to do
    help="From a PyTorch checkpoint to a checked, versioned release with one engine per hardware target.",
)

# Typer reads annotations at run time and knows Optional[...] on every Python that we support
Folder = Annotated[Path, typer.Option("-C", metavar="DIR", help="Workspace (default: here or the nearest above).")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a folder below recipes/.")]
Checkpoint = Annotated[
    Optional[Path],  # noqa: UP045  see above
    typer.Option("--checkpoint", metavar="P", help="Trained weights, instead of the recipe's own."),
]
Targets = Annotated[
    Optional[list[str]],  # noqa: UP045  see above
    typer.Option("--target", "-t", metavar="T", help="A row of targets/targets.toml; may be repeated."),
]
Registry = Annotated[
    Optional[str],  # noqa: UP045  see above
    typer.Option("--registry", metavar="DIR|URL", help="Static registry (default: the DVC remote `registry`)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
PublicKey = Annotated[
    Optional[Path],  # noqa: UP045  see above
    typer.Option("--key", metavar="FILE", help="Public key that must have signed it (default: EXPORTYARD_KEY)."),
]
Bump = Literal["patch", "minor", "major"]
HERE = Path()
TYPER_INTERRUPTED = 130  # what it turns Ctrl-C into


def _version(wanted: bool) -> None:
    if wanted:
        print(host.version("exportyard"))
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """See `app`."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the workspace shall be.")],
    remote: Annotated[
        Optional[Path],  # noqa: UP045  see above
        typer.Option("--remote", metavar="DIR", help="A folder to be the DVC remote that releases are pushed to."),
    ] = None,
) -> None:
    """Make a workspace: recipes/ targets/ artifacts/ dvc.yaml, under git and DVC."""
    from pipeline import initial

    for line in initial.init(folder, remote):
        print(line)
    console.say(f"\nnext: `cd {folder}` and `exportyard export example`")


@app.command()
def recipes(root: Folder = HERE, as_json: AsJson = False) -> None:
    """List the recipes of the workspace."""
    found = workspace.find(root)
    loaded = [found.recipe(name) for name in found.recipe_names()]
    if as_json:
        print(json.dumps([recipe.model_dump(mode="json") for recipe in loaded], indent=2))
        return
    rows = [
        [
            recipe.name,
            ", ".join(f"{name} {axis.min}..{axis.max}" for name, axis in recipe.axes.items()),
            escape(recipe.summary),
        ]
        for recipe in loaded
    ]
    console.table(["recipe", "axes", "summary"], rows)


def _axes(recipe: Recipe) -> str:
    return ", ".join(f"{name} {axis.min}..{axis.max}" for name, axis in recipe.axes.items())


@app.command()
def targets(root: Folder = HERE, as_json: AsJson = False) -> None:
    """List the target rows: what each is, whether this host can build it, and if not why."""
    rows = workspace.find(root).rows()
    state = {name: backends.find(row.backend).missing(row) for name, row in rows.items()}
    running = {name: backends.find(row.backend).not_runnable(row) for name, row in rows.items()}
    if as_json:
        found = [row.plain() | {"missing": state[name], "not_runnable": running[name]} for name, row in rows.items()]
        print(json.dumps(found, indent=2))
        return
    lines = []
    for name, row in rows.items():
        verdict = "[green]builds here[/]"
        missing, stopped = state[name], running[name]
        if missing is not None:
            verdict = f"[yellow]not here:[/] {escape(missing)}"
        elif stopped is not None:
            verdict = f"[yellow]builds here, not run:[/] {escape(stopped)}"
        lines.append([name, row.backend, ", ".join(row.schemes), verdict, escape(row.summary)])
    console.table(["target", "backend", "schemes", "this host", "summary"], lines)


@app.command()
def export(
    recipe: RecipeName,
    checkpoint: Checkpoint = None,
    target: Targets = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Targets to build at the same time.")] = 1,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Build, check and measure an engine for each target; what is up to date is not made again."""
    with _exported(root, recipe, checkpoint, target, jobs) as (job, verdicts):
        _show(job, verdicts, as_json=as_json)


@contextlib.contextmanager
def _exported(
    root: Path, recipe: str, checkpoint: Path | None, target: list[str] | None, jobs: int
) -> Iterator[tuple[Job, list[run.Verdict]]]:
    """What an export has made; inside, no other command exports this recipe, and makes something else of it."""
    steps = console.Steps()
    with contextlib.ExitStack() as stack:
        with console.progress() as report:
            job = run.prepare(workspace.find(root), recipe, checkpoint=checkpoint, targets=target, report=report)
            stack.enter_context(turns.only_one(job.folder / ".export.lock", partial(_wait, recipe)))
            verdicts = run.export(job, jobs, steps)
        steps.close()
        yield job, verdicts


def _wait(recipe: str) -> None:
    console.say(f"another export of `{recipe}` is at work in this workspace; waiting for its end (Ctrl-C leaves)")


def _show(job: Job, verdicts: list[run.Verdict], *, as_json: bool) -> None:
    """Print what became of each target, write the report, and exit with the first failure's code."""
    from pipeline import report, summary

    if as_json:
        print(json.dumps([summary.plain(verdict) for verdict in verdicts], indent=2))
    else:
        console.table(summary.COLUMNS, [summary.row(verdict) for verdict in verdicts], numbers=summary.NUMBERS)
    _warn(job)
    page = report.write(job, verdicts)
    console.say(f"report: {_short(page)}")
    _again(job, verdicts)
    failed = [verdict for verdict in verdicts if verdict.status == "failed"]
    if failed:
        first = failed[0]
        console.fail(
            ExportyardError(
                f"{len(failed)} of {len(verdicts)} targets failed; `{first.target.name}`: {first.reason}",
                hint="`--target T` exports some targets only; `targets = [...]` in recipe.toml says which a recipe has",
            )
        )
    _leave(verdicts)


def _again(job: Job, verdicts: list[run.Verdict]) -> None:
    """Say how to see each failure again, and with what."""
    from pipeline import failures

    for one in failures.of(job, verdicts):
        console.say(escape(one.again))


def _warn(job: Job) -> None:
    for text in job.warnings():
        console.say(f"[yellow]warning:[/] {escape(text)}")


def _leave(verdicts: list[run.Verdict]) -> None:
    """Exit with the first failure's code, or with that of a target that isn't for this host when none is."""
    code = next((verdict.exit_code for verdict in verdicts if verdict.status == "failed"), 0)
    if code == 0 and not any(verdict.status == "passed" for verdict in verdicts):
        code = next((verdict.exit_code for verdict in verdicts if verdict.exit_code), 10)
    if code:
        raise typer.Exit(code)


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@app.command()
def parity(recipe: RecipeName, target: Targets = None, root: Folder = HERE, as_json: AsJson = False) -> None:
    """Show how far each engine is from its ONNX graph and from eager PyTorch, size by size."""
    from pipeline import summary

    with _exported(root, recipe, None, target, 1) as (_, verdicts):
        reports = [(verdict.target.name, found) for verdict in verdicts for found in verdict.candidates.values()]
        if as_json:
            print(json.dumps([found.plain() for _, found in reports], indent=2))
        else:
            console.table(summary.PARITY_COLUMNS, summary.parity_rows(reports), numbers=summary.PARITY_NUMBERS)
            for name, found in reports:
                for reason in found.reasons:
                    console.say(f"[red]failed[/] {name} {found.scheme}: {escape(reason)}")
            for verdict in verdicts:
                if not verdict.candidates:
                    console.say(f"[yellow]{verdict.status}[/] {verdict.target.name}: {escape(verdict.reason)}")
        code = next((verdict.exit_code for verdict in verdicts if verdict.status == "failed"), 0)
        if code:
            raise typer.Exit(code)


@app.command()
def quantize(
    recipe: RecipeName,
    target: Targets = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say which operators stay in float, and why.")] = False,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show every numeric form that was tried for a target: speed, accuracy, share of INT8, and what came of it."""
    from pipeline import candidates, summary

    with _exported(root, recipe, None, target, 1) as (job, verdicts):
        tried = [one for verdict in verdicts for one in candidates.of(job, verdict)]
        if as_json:
            print(json.dumps([one.plain() for one in tried], indent=2))
        else:
            rows = [summary.candidate_row(one) for one in tried]
            console.table(summary.CANDIDATE_COLUMNS, rows, numbers=summary.CANDIDATE_NUMBERS)
            if explain:
                console.table(summary.SPEED_COLUMNS, summary.speed_rows(tried), numbers=summary.SPEED_NUMBERS)
                console.table(summary.FLOAT_COLUMNS, summary.float_rows(tried))
                console.table(
                    summary.SENSITIVE_COLUMNS, summary.sensitive_rows(tried), numbers=summary.SENSITIVE_NUMBERS
                )
            for verdict in verdicts:
                if explain or not candidates.of(job, verdict):
                    print(f"{verdict.target.name}: {verdict.scheme or verdict.status}: {verdict.reason}")
        _warn(job)
        _leave(verdicts)


@app.command()
def publish(
    recipe: RecipeName,
    checkpoint: Checkpoint = None,
    target: Targets = None,
    bump: Annotated[Bump, typer.Option("--bump", help="Which number of the version to raise.")] = "patch",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Targets to build at the same time.")] = 1,
    allow_dirty: Annotated[bool, typer.Option("--allow-dirty", help="Release code that isn't committed.")] = False,
    allow_regression: Annotated[
        bool, typer.Option("--allow-regression", help="Release what is worse than [regression] in recipe.toml admits.")
    ] = False,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Publish a release: manifest, DVC, remote and git tag; all or nothing."""
    from pipeline import release

    with _exported(root, recipe, checkpoint, target, jobs) as (job, verdicts):
        _again(job, verdicts)
        published = release.publish(job, verdicts, bump, allow_dirty=allow_dirty, allow_regression=allow_regression)
        if as_json:
            names = ("version", "tag", "fresh", "registry")
            print(json.dumps({name: getattr(published, name) for name in names}))
        elif published.fresh:
            print(f"published {published.tag}")
            console.say(f"next: `exportyard pull {recipe}@{published.version} --to DIR`")
            if published.registry is not None:
                console.say(
                    f"it is in the registry {published.registry}, too; `exportyard promote` names it in a channel"
                )
        else:
            print(f"nothing changed since {published.tag}")


@app.command()
def releases(recipe: RecipeName, root: Folder = HERE, as_json: AsJson = False) -> None:
    """List the releases of a recipe."""
    from pipeline import registry

    found = workspace.find(root)
    found.recipe(recipe)
    listed = registry.versions(found.root, recipe)
    if as_json:
        print(json.dumps([release.plain() for release in listed], indent=2))
        return
    if not listed:
        console.say(f"there is no release of `{recipe}` yet\n\nhint: `exportyard publish {recipe}`")
    console.table(["version", "date", "commit", "targets"], [registry.row(release) for release in listed])


@app.command()
def diff(
    recipe: RecipeName,
    before: Annotated[str, typer.Argument(metavar="V1", help="A version, such as 1.0.0.")],
    after: Annotated[str, typer.Argument(metavar="V2", help="The version to compare with it.")],
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Compare two releases target by target, say what was changed, and judge it by the recipe's [regression]."""
    from pipeline import difference, registry

    where = workspace.find(root)
    own = where.recipe(recipe)
    one, other = (registry.manifest_of(where.root, recipe, version) for version in (before, after))
    code = registry.changed_files(where.root, recipe, one.source.commit, other.source.commit)
    higher = own.evaluation.higher_is_better
    found = difference.between(one, other, own.regression, higher_is_better=higher, code=code)
    if as_json:
        print(json.dumps(found.plain(), indent=2))
        return
    rows = [difference.change_row(change, "") for change in found.changes]
    rows += [difference.change_row(change, pair.target) for pair in found.pairs for change in pair.changes]
    console.table(["changed", "of", one.version, other.version], [[escape(cell) for cell in row] for row in rows])
    if not rows:
        print("nothing that went into them differs")
    print()
    console.table(difference.COLUMNS, [difference.row(pair) for pair in found.pairs])
    for text in found.regressions:
        print(f"regression: {text}")
    print(f"verdict: {found.verdict()}")


@app.command()
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


@app.command()
def mirror(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE[@VERSION]", help="All its versions if none is given.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Every recipe of the workspace.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every byte, and replace what is damaged.")] = False,
    registry: Registry = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Put releases into the static registry that aren't there yet, and say there where channels point."""
    from pipeline import mirror as mirrors
    from pipeline import tags

    if everything == bool(recipe):
        raise UsageError("give either a recipe or `--all`", hint="`exportyard mirror RECIPE`")
    found, (name, _, version) = workspace.find(root), recipe.partition("@")
    depot = _depot(found.root, registry)
    wanted = [tags.parse(version)] if version else None
    names = mirrors.released(found.root, None if everything else name, wanted)
    done = [mirrors.mirror(found.root, depot, one, wanted, verify=verify) for one in names]
    if as_json:
        print(json.dumps([asdict(one) for one in done], indent=2))
        return
    for one in done:
        fresh = f"{', '.join(one.fresh)} ({console.size(one.sent_bytes)})" if one.fresh else "nothing new"
        print(
            f"{one.recipe}: {len(one.versions)} version{'s' if len(one.versions) != 1 else ''} in {depot.name}; {fresh}"
        )


def _depot(root: Path, given: str | None) -> Depot:
    """The static registry that was named, or the workspace's own."""
    found = _own_depot(root, given)
    if found is None:
        raise UsageError(
            "this workspace has no static registry",
            hint="`dvc remote add registry s3://BUCKET/PATH` (or a folder), or name one with `--registry`",
        )
    return found


def _own_depot(root: Path, given: str | None) -> Depot | None:
    from pipeline import depots

    return depots.at(given) if given is not None else depots.of(root)


@app.command()
def promote(
    release: Annotated[str, typer.Argument(metavar="RECIPE@VERSION", help="A release.")],
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", help="Such as `prod`; made if it is new.")],
    registry: Registry = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Let a channel point to a version: by a git tag, and in the static registry if there is one."""
    from pipeline import channels

    found, (name, _, version) = workspace.find(root), release.partition("@")
    if not version:
        raise UsageError(f"`{release}` names no version", hint=f"`exportyard promote {name}@1.0.0 {channel}`")
    _show_promoted(found.root, name, channels.promote(found.root, name, version, channel), registry, as_json=as_json)


@app.command()
def rollback(
    recipe: RecipeName,
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", help="Such as `prod`.")],
    version: Annotated[
        Optional[str],  # noqa: UP045  see above
        typer.Argument(metavar="VERSION", help="Where to (default: to the version before)."),
    ] = None,
    registry: Registry = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Let a channel point to the version again that it pointed to before."""
    from pipeline import channels

    found = workspace.find(root)
    done = channels.rollback(found.root, recipe, channel, version)
    _show_promoted(found.root, recipe, done, registry, as_json=as_json)


def _show_promoted(root: Path, recipe: str, done: Promoted, registry: str | None, *, as_json: bool) -> None:
    """Say where a channel points now, after the static registry says so, too."""
    from pipeline import mirror as mirrors

    depot = _own_depot(root, registry)
    if depot is not None:
        mirrors.promoted(root, depot, recipe, done)
    if as_json:
        print(json.dumps(asdict(done)))
        return
    was = f" (was {done.was})" if done.changed and done.was else "" if done.changed else ", as before"
    print(f"{recipe}#{done.channel} is {done.version}{was}")


@app.command(name="channels")
def _channels(recipe: RecipeName, root: Folder = HERE, as_json: AsJson = False) -> None:
    """List the channels of a recipe, and the versions that they point to."""
    from pipeline import channels

    known = channels.channels(workspace.find(root).root, recipe)
    if as_json:
        print(json.dumps([one.plain() for one in known.values()], indent=2))
        return
    if not known:
        console.say(f"`{recipe}` has no channel yet\n\nhint: `exportyard promote {recipe}@VERSION prod`")
    rows = [
        [
            one.name,
            str(one.now.version) if one.now else "none",
            one.now.assigned if one.now else "",
            escape(one.now.who) if one.now else "",
            ", ".join(map(str, one.before[:5])),
        ]
        for one in known.values()
    ]
    console.table(["channel", "version", "since", "by", "before"], rows)


@app.command()
def gc(
    recipe: Annotated[
        Optional[list[str]],  # noqa: UP045  see above
        typer.Argument(metavar="[RECIPE]...", help="Recipes in the registry (default: all)."),
    ] = None,
    keep: Annotated[
        Optional[int],  # noqa: UP045  see above
        typer.Option("--keep", metavar="N", min=1, help="Keep the newest N versions, and those of channels."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this it is only said.")] = False,
    registry: Registry = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show what the static registry takes and what nothing leads to any more; with --yes, delete that."""
    from pipeline import depots, garbage

    depot = depots.at(registry) if registry is not None else _depot(workspace.find(root).root, None)
    known = garbage.recipes(depot)
    for name in recipe or ():
        if name not in known:
            raise unknown("recipe", name, known, where=f"the registry `{depot.name}`")
    work = garbage.sweep if yes else garbage.usage
    found = [work(depot, name, keep) for name in recipe or known]
    if as_json:
        print(json.dumps([one.plain() for one in found], indent=2))
        return
    rows = [
        [
            one.recipe,
            str(len(one.kept)),
            console.size(one.size_bytes),
            console.size(one.alone_bytes - one.size_bytes),
            ", ".join(one.dropped),
            console.size(one.free_bytes),
        ]
        for one in found
    ]
    columns = ["recipe", "versions", "size", "saved by sharing", "versions to go", "freed" if yes else "to free"]
    console.table(columns, rows, numbers=["versions", "size", "saved by sharing", columns[-1]])
    young = sum(one.young_bytes for one in found)
    if young:
        console.say(
            f"{console.size(young)} are younger than an hour, and stay until somebody has listed them or they are older"
        )
    if not yes and any(one.names for one in found):
        console.say(
            "nothing was deleted; `--yes` does it. Tags in git stay, and `exportyard mirror` brings versions back"
        )


@app.command()
def status(
    recipe: RecipeName,
    checkpoint: Checkpoint = None,
    target: Targets = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show what is stale and why; makes nothing."""
    job = run.prepare(workspace.find(root), recipe, checkpoint=checkpoint, targets=target, maker=run.Inspector())
    states = run.status(job)
    if as_json:
        print(json.dumps([{"step": one.step, "fresh": one.fresh, "reason": one.reason} for one in states], indent=2))
        return
    rows = [[one.step, "[green]fresh[/]" if one.fresh else "[yellow]stale[/]", escape(one.reason)] for one in states]
    console.table(["step", "state", "why"], rows)


@app.command()
def make(
    recipe: RecipeName,
    step: Annotated[str, typer.Argument(help="Folder below artifacts/RECIPE/, such as program or engine/TARGET.")],
    root: Folder = HERE,
) -> None:
    """Make one step and what it needs; this is what the stages of dvc.yaml run."""
    steps = console.Steps()
    with console.progress() as report:
        job = run.prepare(workspace.find(root), recipe, report=report)
        folder = run.make_step(job, step, steps)
    steps.close()
    print(_short(folder))


def _need_prefect() -> None:
    """Raise UnavailableError where the package that only `flows/` uses is missing."""
    if find_spec("prefect") is None:
        raise UnavailableError("Prefect is not installed", hint="`pip install 'exportyard[flows]'`")


@app.command()
def notify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="File with trained weights.")],
    recipe: Annotated[str, typer.Option("--recipe", metavar="R", help="Name of a folder below recipes/.")],
    again: Annotated[bool, typer.Option("--again", help="Export it even if that was started before.")] = False,
    event: Annotated[bool, typer.Option("--event", help="Send the event checkpoint.created instead.")] = False,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Tell the Prefect server of a new checkpoint, which exports it once; a training job's last line."""
    _need_prefect()
    from flows import api, notify

    if again and event:
        raise UsageError("an event can't ask for another export", hint="leave out `--event` or `--again`")
    found = workspace.find(root)
    with api.connected() as client:  # before anything is read or sent
        client.hello()
    offered = notify.offer(found, recipe, checkpoint)
    if event:
        sent = notify.emit(offered)
        print(json.dumps({"event": sent, "checkpoint": offered.checkpoint}) if as_json else f"sent event {sent}")
        return
    told = notify.start(offered, again=again)
    if as_json:
        print(json.dumps(asdict(told) | {"checkpoint": offered.checkpoint}))
        return
    print(f"started {told.url}" if told.fresh else f"known already: {told.url} ({told.state})")
    if not told.fresh and told.state in ("Failed", "Crashed", "Cancelled"):
        console.say("`--again` starts another export of the same checkpoint")


@app.command()
def watch(
    place: Annotated[str, typer.Argument(metavar="DIR|URL", help="A folder, or s3://bucket/prefix.")],
    recipe: Annotated[
        Optional[str],  # noqa: UP045  see above
        typer.Option("--recipe", metavar="R", help="Whose checkpoints these are (default: DIR/RECIPE/FILE)."),
    ] = None,
    pattern: Annotated[
        Optional[str],  # noqa: UP045  see above
        typer.Option("--pattern", metavar="GLOB", help="Of file names (default: all kinds of checkpoints)."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    poll: Annotated[float, typer.Option("--poll", metavar="S", min=0.1, help="Seconds between two looks.")] = 5.0,
    root: Folder = HERE,
) -> None:
    """Start an export of each new checkpoint in a folder or bucket, once it is whole; until Ctrl-C or SIGTERM."""
    _need_prefect()
    from flows.watch import watching

    def say(word: str, name: str, details: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {word:<8} {name}  {details}".rstrip(), flush=True)

    with watching(workspace.find(root), place, recipe, pattern, say) as found:
        if once:
            left = found.once()
            if left:
                raise UnavailableError("\n  ".join(["not done yet:", *left]), hint="what is left is seen the next time")
            return
        console.say(f"watching `{found.place.name}`; Ctrl-C ends it")
        try:
            found.go_on(poll)
        except KeyboardInterrupt:
            console.say("ended; the same command goes on from there")


@app.command()
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


@app.command()
def deploy(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Make work pools, deployments and automations on the Prefect server, as prefect.yaml and the targets say."""
    _need_prefect()
    from flows.deploy import deploy

    changes = deploy(workspace.find(root), dry=dry_run)
    if as_json:
        print(json.dumps([asdict(change) for change in changes], indent=2))
        return
    colours = {"created": "green", "updated": "yellow", "removed": "red", "unchanged": "dim"}
    rows = [[one.kind, escape(one.name), f"[{colours[one.state]}]{one.state}[/]", one.what] for one in changes]
    console.table(["kind", "name", "state", "what of it"], rows)
    if dry_run:
        console.say("nothing was changed; without `--dry-run` it is")


@app.command()
def worker(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Work pool whose runs this machine takes.")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="Runs at the same time.")] = 1,
    root: Folder = HERE,
) -> None:
    """Run what is scheduled in a work pool, in this clone of the workspace, until Ctrl-C or SIGTERM."""
    _need_prefect()
    from flows.steps import prepare_worker

    prepare_worker(workspace.find(root))
    from flows.worker import work

    work(pool, limit)


@app.command()
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


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A release, as `pull` leaves it.")],
    key: PublicKey = None,
    expect: Annotated[
        Optional[str],  # noqa: UP045  see above
        typer.Option("--expect", metavar="RECIPE[@VERSION]", help="What the release must be."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a release, offline: every file, where it comes from, what it consists of, who has signed it."""
    from pipeline import trust, verification

    found = verification.verify(folder, trust.public_key(key), expect)
    if as_json:
        print(json.dumps(found.plain(), indent=2))
        return
    colours = {"verified": "green", "unchecked": "yellow", "absent": "yellow"}
    rows = [[one.what, f"[{colours[one.state]}]{one.state}[/]", escape(one.details)] for one in found.checks]
    console.table([f"{found.manifest.recipe}@{found.manifest.version}", "", ""], rows)
    others = [name for name in found.manifest.engines if name not in found.targets]
    if others:
        console.say(f"not in this folder: {', '.join(others)}")


@app.command()
def keygen(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="For the private key; FILE.pub is the public one.")],
) -> None:
    """Make a pair of keys: one to sign releases with, one for those who verify them."""
    from pipeline import trust

    public = trust.keygen(file)
    print(f"made `{file}` (keep it secret, and out of git) and `{public}` (give it to devices)")
    console.say(f"next: `export {trust.SIGNING_KEY}={file.resolve()}`, then publish")


def invoke(arguments: list[str]) -> int:
    """Run one command; every failure ends in one clear message on stderr and its exit code, which is returned.

    Raises:
        KeyboardInterrupt: the user has stopped it.
    """
    try:
        code = int(app(arguments, standalone_mode=False) or 0)
    except typer.Exit as leave:
        return int(leave.exit_code)
    except ExportyardError as error:
        return console.fail(error)
    except TyperException as error:
        return console.fail(UsageError(error.format_message(), hint="`exportyard --help` lists commands and options"))
    except typer.Abort:
        raise KeyboardInterrupt from None
    except BrokenPipeError:  # `exportyard targets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _refused(error)
    except Exception as error:
        return _bug(error)
    if code == TYPER_INTERRUPTED:
        raise KeyboardInterrupt
    return code


def _refused(error: OSError) -> int:
    """What the operating system would not do, with a file or with the stream that we print to."""
    if error.filename:
        return console.fail(store.explained(error, Path(os.fspath(error.filename))))
    if error.errno == errno.ENOSPC:
        hint = "free some space where it goes"
        return console.fail(ExportyardError(f"can't write the output: {error.strerror}", hint=hint))
    return _bug(error)


def _bug(error: Exception) -> int:
    """Something that no message was written for: say so, and keep the traceback for the report."""
    if os.environ.get("EXPORTYARD_DEBUG"):
        traceback.print_exc()
        return 1
    with tempfile.NamedTemporaryFile("w", prefix="exportyard-", suffix=".log", delete=False) as log:
        traceback.print_exception(error, file=log)
    first = (str(error).splitlines() or [""])[0][:200]
    return console.fail(
        ExportyardError(
            f"a bug in exportyard: {type(error).__name__}: {first}",
            hint=f"please report it with `{log.name}`, which has the details",
        )
    )
