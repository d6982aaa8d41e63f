"""The command line: one subcommand a verb. Importing this loads neither torch nor prefect nor dvc."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from pipeline import console, host, store
from pipeline.commands import (
    bench,
    checking,
    downloading,
    explaining,
    helping,
    making,
    profile,
    releasing,
    serving,
    shelving,
    stress,
    tolerance,
)
from pipeline.errors import ExportyardError, UsageError

app = typer.Typer(
    name="exportyard",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing the help with rich takes longer than all the rest of a command with nothing to do
    help="From a PyTorch checkpoint to a checked, versioned release with one engine per hardware target.",
)

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


# as `exportyard --help` lists them: from the checkpoint to the device
for _command in (
    making.init,
    making.recipes,
    making.targets,
    making.export,
    checking.parity,
    checking.quantize,
    explaining.explain,
    stress.stress,
    tolerance.tolerance,
    profile.profile,
    bench.bench,
    releasing.publish,
    releasing.releases,
    releasing.diff,
    downloading.pull,
    shelving.mirror,
    shelving.promote,
    shelving.rollback,
    shelving.channels,
    shelving.gc,
    making.status,
    making.make,
    serving.notify,
    serving.watch,
    helping.doctor,
    serving.deploy,
    serving.worker,
    helping.setup,
    releasing.verify,
    releasing.keygen,
):
    app.command()(_command)


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
