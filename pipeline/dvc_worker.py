"""DVC, in a process of its own: one request as JSON on standard input, one answer as JSON on standard output.

DVC resolves names against the current folder of the process, configures logging for all of it and warns; none of
that may happen to a program that runs several things at once. Run as a file, so that it needs nothing but DVC:
``python -P dvc_worker.py < request.json``, in the workspace's folder.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Problem(Exception):  # noqa: N818  what it is called in an answer
    """Something that the user can act on; `kind` tells `pipeline.dvc` what to say."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Overheard(logging.Handler):
    """Keeps what DVC logs about failures, since its exceptions often say only how many there were."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message and the exception that came with it."""
        cause = record.exc_info[1] if record.exc_info else None
        message = record.getMessage()
        self.lines.append(f"{message}: {cause}" if cause is not None and str(cause) not in message else message)


def init(request: Json) -> Json:
    """`dvc init` in the current folder if it isn't done, with telemetry off; a default remote where there is none."""
    from dvc.repo import Repo

    if not Path(".dvc").is_dir():
        with Repo.init(str(Path.cwd()), subdir=request["subdir"]) as repo, repo.config.edit() as config:
            config["core"].update({"analytics": False, "check_update": False})
    with Repo(str(Path.cwd())) as repo:
        name = repo.config["core"].get("remote")
        if name is None and request["remote"]:
            name = "storage"
            with repo.config.edit() as config:
                config["core"]["remote"] = name
                config["remote"][name] = {"url": request["remote"]}
        return {"remote": repo.config["remote"][name]["url"] if name else None}


def record(request: Json) -> Json:
    """Write the stages into dvc.yaml, what is on disk into dvc.lock and the cache, and push all of it."""
    from dvc.repo import Repo

    root = str(Path.cwd())
    with Repo(root) as repo:
        if not repo.config["core"].get("remote"):
            raise Problem("no-remote", "")
        check_remote(repo.cloud.get_remote())
    edit_pipeline(Path("dvc.yaml"), request)
    forget_stages(Path("dvc.lock"), request)
    with Repo(root, _wait_for_lock=True) as repo:
        return {"pushed": push(repo, commit(repo, request["stages"]))}


def check_remote(remote: Any) -> None:
    """Refuse a folder that has held releases and isn't there: DVC would make a new one, as below a missing mount."""
    if remote.fs.protocol == "local" and Path("dvc.lock").exists() and not Path(remote.path).is_dir():
        raise Problem("dvc", f"there is no folder `{remote.path}`, which has the files of earlier releases")


def commit(repo: Any, names: Iterable[str]) -> list[Any]:
    """``dvc commit --force`` of these stages of dvc.yaml at once; returns them.

    DVC's own takes one or all: one by one, the whole of dvc.yaml and dvc.lock would be read and written for each; and
    all would include recipes that nobody is publishing.
    """
    from dvc.dvcfile import load_file
    from dvc.repo import lock_repo

    with lock_repo(repo):
        file = load_file(repo, "dvc.yaml")
        found = file.stages
        stages = [found[name] for name in names]
        for stage in stages:
            stage.save()
            stage.commit()
        file.dump_stages(stages, update_pipeline=False)
    return stages


def push(repo: Any, stages: Iterable[Any]) -> int:
    """``dvc push`` of what these stages have made; returns how many objects were sent.

    DVC's own, given stages by name, reads all of dvc.yaml and dvc.lock again for each.
    """
    from dvc.exceptions import UploadError

    stages = list(stages)
    remote = repo.cloud.get_remote()
    if remote.worktree or remote.fs.version_aware:  # these hold files, not objects
        return int(repo.push(targets=[stage.name for stage in stages]))
    wanted: dict[Any, set[Any]] = {}
    for stage in stages:
        for odb, objects in stage.get_used_objs(push=True).items():
            wanted.setdefault(odb, set()).update(objects)
    sent = 0
    for odb, objects in wanted.items():
        done = repo.cloud.push(objects, odb=odb)
        if done.failed:
            raise UploadError(len(done.failed))
        sent += len(done.transferred)
    return sent


def edit_pipeline(path: Path, request: Json) -> None:
    """Replace the recipe's stages and its ``artifacts:`` entry; all else in the file stays, comments included."""
    text = path.read_text() if path.exists() else ""
    data = _parse(path, text)
    for section in ("stages", "artifacts"):
        if not data.get(section):
            data[section] = {}  # a new mapping: one read from `{}` would be written on one line for ever
    for name in stale(data["stages"], request):
        del data["stages"][name]
    data["stages"].update(request["stages"])
    data["artifacts"].update(request["artifacts"])
    header = text if text and not _parse(path, text) else ""
    _write(path, header, data)


def forget_stages(path: Path, request: Json) -> None:
    """Drop from dvc.lock the stages that `edit_pipeline` dropped from dvc.yaml."""
    if not path.exists():
        return
    data = _parse(path, path.read_text())
    gone = stale(data.get("stages") or {}, request)
    for name in gone:
        del data["stages"][name]
    if gone:
        _write(path, "", data)


def stale(stages: Json, request: Json) -> list[str]:
    """Stages that make something of this recipe, and that the release no longer has."""
    return [
        name
        for name, stage in stages.items()
        if name not in request["stages"]
        and _outs(stage)
        and all(out.startswith(request["below"]) for out in _outs(stage))
    ]


def _outs(stage: Json) -> list[str]:
    # dvc.yaml has `- path` or `- path: {options}`, dvc.lock has `- path: path`
    found = []
    for out in stage.get("outs") or []:
        if isinstance(out, dict):
            found.append(str(out["path"] if "path" in out else next(iter(out))))
        else:
            found.append(str(out))
    return found


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 1000
    return yaml


def _parse(path: Path, text: str) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        data = _yaml().load(text)
    except YAMLError as error:
        raise Problem("yaml", f"`{path}` is not valid YAML: {str(error).splitlines()[0]}") from None
    if data is not None and not isinstance(data, dict):
        raise Problem("yaml", f"`{path}` must hold a mapping")
    return {} if data is None else data


def _write(path: Path, header: str, data: Any) -> None:
    fresh = path.with_name(f".{path.name}.tmp")
    with fresh.open("w") as stream:
        stream.write(header)
        _yaml().dump(data, stream)
    fresh.replace(path)


def fetch(request: Json) -> Json:
    """Copy files of a repository at a revision, from DVC's cache or remote; each is named in the error if it fails."""
    from dvc.api import DVCFileSystem

    files: Iterable[tuple[str, str]] = request["files"]
    fs = DVCFileSystem(request["url"], rev=request["rev"], subrepos=True)
    for source, destination in files:
        Path(destination).parent.mkdir(parents=True, exist_ok=True)
        try:
            fs.get_file(source, destination)
        except Exception as error:
            raise Problem("file", f"{source}\n{_words(error)}") from error
    return {}


def _words(error: BaseException) -> str:
    """An exception and the one behind it, on one line."""
    words = " ".join((str(error) or type(error).__name__).split())
    cause = error.__cause__ or error.__context__
    if cause is not None and str(cause) and str(cause) not in words:
        words += f" ({' '.join(str(cause).split())})"
    return words


def main() -> int:
    """Answer one request; what DVC prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    overheard = Overheard()
    for name in ("dvc", "dvc_data", "dvc_objects"):
        logger = logging.getLogger(name)
        logger.addHandler(overheard)
        logger.propagate = False
    request = json.load(sys.stdin)
    operations: dict[str, Callable[[Json], Json]] = {"init": init, "record": record, "fetch": fetch}
    try:
        answer = {"done": operations[request["do"]](request)}
    except Problem as problem:
        answer = {"problem": {"kind": problem.kind, "detail": str(problem), "heard": overheard.lines[-3:]}}
    except Exception as error:  # whatever DVC or a storage library raises is the user's to read
        answer = {"problem": {"kind": "dvc", "detail": _words(error), "heard": overheard.lines[-3:]}}
    answers.write(json.dumps(answer))
    answers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
