"""Commands that publish releases, compare them, and check them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer
from rich.markup import escape

from pipeline import console, workspace
from pipeline.commands.options import HERE, AsJson, Checkpoint, Folder, PublicKey, RecipeName, Targets, again, exported

Bump = Literal["patch", "minor", "major"]


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

    with exported(root, recipe, checkpoint, target, jobs) as (job, verdicts):
        again(job, verdicts)
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


def keygen(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="For the private key; FILE.pub is the public one.")],
) -> None:
    """Make a pair of keys: one to sign releases with, one for those who verify them."""
    from pipeline import trust

    public = trust.keygen(file)
    print(f"made `{file}` (keep it secret, and out of git) and `{public}` (give it to devices)")
    console.say(f"next: `export {trust.SIGNING_KEY}={file.resolve()}`, then publish")
