"""Which static registry is meant: the workspace's own, or the one that a user has named."""

from __future__ import annotations

from pathlib import Path

from pipeline.depot import Depot
from pipeline.depot_bucket import BucketDepot
from pipeline.depot_folder import FolderDepot
from pipeline.errors import UnavailableError, UsageError, WorkspaceError, first_line

REMOTE = "registry"  # the DVC remote's name


def of(root: Path) -> Depot | None:
    """The registry of the workspace at `root`: its DVC remote called `registry`; None if it has no such remote.

    Raises:
        WorkspaceError: DVC's settings can't be read, or the remote is neither a folder nor on S3.
        UnavailableError: DVC, or its plug-in for that remote, is not installed.
    """
    try:
        from dvc.config import ConfigError
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
    except ImportError:
        raise UnavailableError("DVC is not installed", hint="`pip install dvc`, then run this again") from None
    try:
        with Repo(str(root)) as repo:
            if REMOTE not in repo.config["remote"]:
                return None
            remote = repo.cloud.get_remote(REMOTE)
            kind, place, files = remote.fs.protocol, str(remote.path), remote.fs.fs
    except ImportError as error:
        raise _no_plugin(first_line(error)) from None
    except (DvcException, ConfigError) as error:
        hint = "see `dvc remote list`; the registry is the remote called `registry`"
        raise WorkspaceError(f"can't use the DVC remote `{REMOTE}`: {first_line(error)}", hint=hint) from error
    if kind == "local":
        return FolderDepot(Path(place))
    if kind == "s3":
        return BucketDepot(files, place.strip("/"))
    raise WorkspaceError(
        f"a registry can't be in `{place}`: it must be a folder or on S3",
        hint="`dvc remote add --force registry s3://BUCKET/PATH`, or a folder that a web server serves",
    )


def at(place: Path | str) -> Depot:
    """The registry at `place`: a folder, or a URL such as ``s3://bucket/prefix`` with settings from AWS_*.

    Raises:
        UsageError: a URL that can't be written to.
        UnavailableError: the package for S3 is not installed.
    """
    text = str(place)
    if text.startswith("s3://"):
        try:
            from s3fs import S3FileSystem
        except ImportError as error:
            raise _no_plugin(first_line(error)) from None
        return BucketDepot(S3FileSystem(skip_instance_cache=True), text.removeprefix("s3://").strip("/"))
    if "://" in text:
        raise UsageError(
            f"can't lay out a registry at `{text}`",
            hint="give a folder or `s3://bucket/prefix`; devices read it by http",
        )
    return FolderDepot(Path(place).absolute())


def _no_plugin(detail: str) -> UnavailableError:
    return UnavailableError(f"DVC's plug-in for S3 is not installed: {detail}", hint="`pip install 'exportyard[s3]'`")
