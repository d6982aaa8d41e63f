"""Workspaces with something to release, for tests: real git, real DVC, and tiny made-up engines.

As a program it publishes and kills itself on the way: ``python -m tests.releases ROOT VERSION CONTENT POINT``.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import attest, initial, journal, record, store, trust
from pipeline.manifest import (
    Engine,
    Golden,
    Latency,
    Manifest,
    ParitySummary,
    ReleaseFile,
    Source,
)
from pipeline.record import Recorded, Step
from pipeline.store import Key
from pipeline.types import Distance, MetricResult, Signature, Target, Tolerance

TARGETS = ("any-echo", "linux-echo")
COMMIT = "0" * 40


def run(root: Path, *command: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def dvc(root: Path, *arguments: str) -> str:
    """Standard output of DVC's own command line."""
    return run(root, sys.executable, "-W", "ignore", "-m", "dvc", *arguments)


def with_origin(base: Path, remote: Path | None = None) -> Path:
    """An uncommitted workspace with the recipe `toy`, cloned from a bare repository beside it."""
    root = base / "workspace"
    run(base, "git", "init", "-q", "--bare", "-b", "main", "origin.git")
    run(base, "git", "clone", "-q", str(base / "origin.git"), str(root))
    run(root, "git", "config", "user.name", "test")
    run(root, "git", "config", "user.email", "test@example.com")
    initial.init(root, remote)
    (root / "recipes/toy").mkdir()
    (root / "recipes/toy/recipe.toml").write_text('name = "toy"\n')
    (root / "targets/targets.toml").write_text('[targets.any-echo]\nbackend = "echo"\n')
    return root


def target(name: str) -> Target:
    """A row."""
    return Target(
        name=name,
        backend="echo",
        platform="any",
        machine="any",
        arch="none",
        schemes=("fp32",),
        vs_onnx={"fp32": Tolerance(max_abs=0)},
    )


def manifest_of(files: dict[str, Any], version: str, recipe: str = "toy") -> Manifest:
    """A manifest of the files in `files` (as `store.describe` has them)."""

    def fact(name: str) -> ReleaseFile:
        return ReleaseFile(path=name, **files[name].model_dump())

    exact = Distance(output="y", max_abs=0, max_over_peak=0, rmse=0, sqnr_db=float("inf"), cosine=1)
    metric = MetricResult(name="accuracy", eager=1, engine=1, drop=0, budget=0, samples=1)
    engines = {
        name: Engine(
            target=target(name),
            scheme="fp32",
            reason="the row's only form",
            tools={},
            files=tuple(fact(file) for file in sorted(files) if file.startswith(f"engines/{name}/")),
            parity=ParitySummary(sizes=1, vs_onnx=(exact,), vs_eager=(exact,), metric=metric),
            latency=Latency(cpu="a cpu", rows=()),
            golden={"y": Tolerance(max_abs=0)},
        )
        for name in TARGETS
    }
    return Manifest(
        recipe=recipe,
        version=version,
        source=Source(commit=COMMIT, dirty=False),
        checkpoint={},
        data="",
        tools={},
        signature=Signature(inputs=(), outputs=(), axes={}),
        engines=engines,
        skipped={"web-any-echo": "not built here: no browser"},
        golden=Golden(file=fact("golden.safetensors"), cases={"min": {}}),
    )


def write_release(
    folder: Path, version: str, content: str, recipe: str = "toy", *, key: Path | None = None, beside: bool = False
) -> Manifest:
    """A release folder without artifact.json: two engines of one file each, whose bytes come from `content`.

    With `beside` it also has a provenance and an SBOM, and with `key` a signature, too.
    """
    for name in TARGETS:
        path = folder / "engines" / name / "model.bin"
        path.parent.mkdir(parents=True)
        path.write_text(f"{content} for {name}")
    (folder / "golden.safetensors").write_text(f"golden of {content}")
    made = manifest_of(store.describe(folder), version, recipe)
    if beside or key is not None:
        made = made.model_copy(
            update={"beside": attest.names(key), "signer": None if key is None else trust.signer(key)}
        )
    (folder / "manifest.json").write_text(made.text())
    if made.beside:
        attest.write(folder, "git+https://example.com/toys", key)
    return made


def lay_out(root: Path, version: str, content: str, recipe: str = "toy") -> str:
    """Put an engine and a release into the workspace's artifacts; returns the manifest's text."""

    def engine(out: Path) -> dict[str, Any]:
        (out / "model.bin").write_text(content)
        return {}

    def release(out: Path) -> dict[str, Any]:
        write_release(out, version, content, recipe)
        return {}

    folder = root / "artifacts" / recipe
    store.make(folder / "engine" / "any-echo", Key("engine", config={"content": content}), engine)
    made = store.make(folder / "release", Key("release", config={"content": content, "version": version}), release)
    return made.stored.file("manifest.json").read_text()


def steps(recipe: str = "toy", *, engine: str = "engine/any-echo") -> list[Step]:
    """Two stages; their commands fail, so that a `dvc repro` that runs one is seen."""
    row = {"targets/targets.toml": ("targets.any-echo",)}
    settings, made = f"recipes/{recipe}/recipe.toml", f"artifacts/{recipe}/engine/any-echo"
    name = record.step_name(recipe, engine)
    return [
        Step(name, f"exportyard-that-fails make {recipe} {engine}", (settings,), (made,), row),
        Step(
            f"{recipe}-release",
            f"exportyard-that-fails make {recipe} release",
            (made,),
            (f"artifacts/{recipe}/release",),
            {},
        ),
    ]


def publish(root: Path, version: str, content: str, recipe: str = "toy") -> Recorded:
    """Lay out a release and publish it."""
    with record.queue(root) as turn:
        text = lay_out(root, version, content, recipe)
        return record.record(turn, steps(recipe), recipe, text, version, "made by a test")


def kill_at(point: str) -> None:
    """Make this process die when it comes to `point`: ``before:module.name`` or ``after:module.name``."""
    when, _, where = point.partition(":")
    module = {"record": record, "journal": journal}[where.partition(".")[0]]
    name = where.partition(".")[2]
    original: Callable[..., Any] = getattr(module, name)

    def deadly(*arguments: Any, **options: Any) -> None:
        if when == "after":
            original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, deadly)


if __name__ == "__main__":
    kill_at(sys.argv[4])
    publish(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
