"""``make demo``: from a fresh clone to a published release, in a scratch workspace that git ignores.

The scratch workspace is a repository of its own, ``.scratch/demo``, with a folder as its DVC remote; the clone is
read only. The flow runs in this process, watched by a Prefect server on loopback that is stopped at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from flows.server import deliver, environment, local_server
from pipeline import console, git, initial, summary
from pipeline.errors import ExportyardError, UsageError
from pipeline.workspace import ROWS

if TYPE_CHECKING:
    from flows.export import Outcome
    from pipeline.run import Verdict

CLONE = Path(__file__).resolve().parent.parent
RECIPE = "digits"
NOT_SOURCES = ("__pycache__", "*.pt", "*.safetensors")


def demo(clone: Path) -> int:
    """Do it all below ``<clone>/.scratch``; returns the exit code.

    Raises:
        ExportyardError: what went wrong.
    """
    begun = time.perf_counter()
    scratch = clone / ".scratch"
    root = scratch / "demo"
    with alone(scratch):
        prepare(clone, root, scratch / "remote")
        console.say(f"recipe `{RECIPE}`, workspace `{root.relative_to(clone)}`; starting a Prefect server on loopback")
        outcome = run_flow(root, scratch / "prefect")
    show(clone, root, outcome)
    console.say(f"\n{time.perf_counter() - begun:.0f} s in all")
    return 0


@contextlib.contextmanager
def alone(scratch: Path) -> Iterator[None]:
    """One demo in a clone at a time.

    Raises:
        UsageError: another one is running.
    """
    scratch.mkdir(exist_ok=True)
    with (scratch / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another demo is running in `{scratch}`", hint="wait for it, or use another clone"
            ) from None
        yield


def prepare(clone: Path, root: Path, remote: Path) -> None:
    """Make the scratch workspace if there is none, and bring its recipe and rows up to the clone's; commit that."""
    if not (root / ".git").is_dir():
        git.run(clone, "init", "--quiet", "--initial-branch", "main", str(root))
        for name, value in (
            ("user.name", "exportyard demo"),
            ("user.email", "demo@exportyard.invalid"),
            # whatever the user's own history demands, this one is thrown away
            ("commit.gpgSign", "false"),
            ("tag.gpgSign", "false"),
        ):
            git.run(root, "config", "--local", name, value)
    if not (root / ROWS).is_file():
        initial.init(root, remote)
        git.run(root, "add", "--all", ".")
    mirror(clone / "recipes" / RECIPE, root / "recipes" / RECIPE)
    shutil.copyfile(clone / ROWS, root / ROWS)
    git.run(root, "add", "--all", "--", f"recipes/{RECIPE}", str(ROWS))
    if not git.succeeds(root, "diff", "--cached", "--quiet"):
        git.run(root, "commit", "--quiet", "--no-verify", "-m", f"Take {RECIPE} and the target rows from the clone")


def mirror(source: Path, copy: Path) -> None:
    """Make `copy` hold the sources of the recipe in `source`, and nothing else."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))


def run_flow(root: Path, home: Path) -> Outcome:
    """The flow `export` in this process, with a server of its own.

    Raises:
        ExportyardError: the server didn't start, a target failed, or the release was refused.
    """
    with local_server(home) as api_url:
        settings = environment(home, api_url)
        # its own lines are for workers' logs; here a person reads, and `_Lines` speaks
        settings["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
        os.environ.clear()
        os.environ.update(settings)
        # imported here, since Prefect reads its settings when it is first imported
        from flows.export import Outcome, export

        logging.getLogger("pipeline.flow").addHandler(_Lines())
        try:
            state = export(RECIPE, workspace=str(root), return_state=True)
        finally:
            deliver()
        result = state.result(raise_on_failure=False)
        if isinstance(result, BaseException):
            raise result
        assert isinstance(result, Outcome)
        return result


class _Lines(logging.Handler):
    """What the flow logs, on stderr: a line for each step that did something."""

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == len(("step", "state", "seconds")):
            step, state, seconds = record.args
            console.say(f"  {seconds:8.1f} s  {escape(str(step)):<58} {escape(str(state))}")
        else:
            console.say(f"  {escape(record.getMessage())}")


def show(clone: Path, root: Path, outcome: Outcome) -> None:
    """The table, where the report is, and what to type next."""
    print_table(outcome.verdicts)
    published = outcome.published
    assert published is not None
    where = root.relative_to(clone)
    command = f"{Path(sys.executable).parent.relative_to(clone)}/exportyard"
    release = f"{RECIPE}@{published.version}"
    if published.fresh:
        console.say(f"\npublished `{published.tag}`")
    else:
        console.say(f"\nnothing changed since `{published.tag}`")
    console.say(f"report: {outcome.report.relative_to(clone)}")
    console.say(
        "next:\n"
        f"  {command} releases {RECIPE} -C {where}\n"
        f"  {command} pull {release} --to .scratch/{release} -C {where}\n"
        f"  {command} status {RECIPE} -C {where}"
    )


def print_table(verdicts: Sequence[Verdict]) -> None:
    """What became of each target."""
    print()
    console.table(summary.COLUMNS, [summary.row(verdict) for verdict in verdicts], numbers=summary.NUMBERS)


def main() -> int:
    """Every failure ends in one message and its exit code."""
    try:
        return demo(CLONE)
    except KeyboardInterrupt:
        console.say("\ninterrupted: what was finished is kept; `make demo` goes on from there")
        return 130
    except ExportyardError as error:
        verdicts = getattr(error, "verdicts", ())
        if verdicts:
            print_table(verdicts)
        return console.fail(error)


if __name__ == "__main__":
    sys.exit(main())
