"""DVC, asked through `dvc_worker`; its failures as ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.errors import ReleaseError

_WORKER = Path(__file__).with_name("dvc_worker.py")


class DvcError(Exception):
    """What DVC could not do: `kind` is one of the worker's, `detail` and `heard` are DVC's own words."""

    def __init__(self, kind: str, detail: str, heard: Collection[str]) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.heard = tuple(heard)

    @property
    def words(self) -> str:
        """The detail and the last thing that DVC logged, at most two lines."""
        last = " ".join(self.heard[-1].split()) if self.heard else ""
        lines = [self.detail, last] if last and last not in self.detail else [self.detail]
        return "\n  ".join(line[:300] for line in lines)


def ask(root: Path, do: str, *, keep_open: Collection[int] = (), **request: Any) -> dict[str, Any]:
    """The worker's answer to one request, run in `root`.

    Args:
        keep_open: descriptors that the worker inherits. It then holds their locks until it ends, even when this
            process is killed first.

    Raises:
        DvcError: DVC could not do it.
        ReleaseError: DVC is not installed, or its process was killed.
    """
    environment = dict(os.environ) | {"DVC_NO_ANALYTICS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-P", str(_WORKER)],
        cwd=root,
        env=environment,
        input=json.dumps({"do": do, **request}),
        capture_output=True,
        text=True,
        pass_fds=tuple(keep_open),
        check=False,
    )
    if "No module named 'dvc'" in done.stderr + done.stdout:  # a missing plug-in (dvc_s3) is named by DVC itself
        raise ReleaseError("DVC is not installed", hint="`pip install dvc`, then run this again")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ReleaseError(
            f"DVC stopped unexpectedly: {said[:300]}", hint="run it again; `exportyard doctor`"
        ) from None
    if "problem" in answer:
        problem = answer["problem"]
        raise DvcError(problem["kind"], problem["detail"], problem["heard"])
    found: dict[str, Any] = answer["done"]
    return found
