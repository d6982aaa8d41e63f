"""Builders that hang, grow or die are ended and told about, and leave the others standing; what a release requires."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows.export import export
from pipeline import cli, manifest, release, run
from pipeline.errors import LimitError, ReleaseError, UsageError, WorkspaceError
from pipeline.types import Limits
from pipeline.workspace import ROWS, Workspace
from tests import workspaces

if TYPE_CHECKING:
    from tests.flow.conftest import Bench

SOON = "limits = { minutes = 0.02 }"  # for what never ends
ROOMY = "limits = { minutes = 2, memory_gb = 4 }"


def write_rows(bench: Bench, **rows: tuple[str, str]) -> None:
    """Replace the rows, each given by its options and its limits."""
    text = "".join(workspaces.echo_row(name, options) + f"{limits}\n" for name, (options, limits) in rows.items())
    (bench.root / ROWS).write_text(text)
    bench.commit()


def require(bench: Bench, value: str) -> None:
    path = bench.root / "recipes/tiny/recipe.toml"
    path.write_text(f"require = {value}\n{path.read_text()}")
    bench.commit()


def prepared(bench: Bench, **options: Any) -> Any:
    return run.prepare(Workspace(bench.root), "tiny", **options)


def log_of(bench: Bench, target: str) -> str:
    return (bench.root / f"artifacts/tiny/.logs/{target}.log").read_text()


def engines(bench: Bench) -> set[str]:
    """What lies in the store of engines, hidden things but for locks included."""
    folder = bench.root / "artifacts/tiny/engine"
    found = {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}
    return {name for name in found if not name.endswith(".lock")} - {"other/fp32"}


def test_who_goes_beyond_a_limit_is_ended_and_the_others_go_on(bench: Bench) -> None:
    write_rows(
        bench,
        slow=('hang = "here"', SOON),
        fat=('memory_mb = 600, hang = "child"', "limits = { minutes = 1, memory_gb = 0.5 }"),
        broken=('fail = "build", say = "last words"', ROOMY),
        kept=('say = "hello"', ROOMY),
        good=("", ""),
    )
    job = prepared(bench)
    begun = time.monotonic()
    verdicts = {one.target.name: one for one in run.export(job)}
    assert time.monotonic() - begun < 45
    assert {name: one.status for name, one in verdicts.items()} == {
        "slow": "failed",
        "fat": "failed",
        "broken": "failed",
        "kept": "passed",
        "good": "passed",
    }
    assert verdicts["slow"].reason.endswith(
        "ended after 0.02 min, the limit of `limits.minutes` in row `slow` (log: `artifacts/tiny/.logs/slow.log`)"
    )
    assert "above 0.5 GB, the limit of `limits.memory_gb` in row `fat`" in verdicts["fat"].reason
    assert "fails in build, as its row says (log: `artifacts/tiny/.logs/broken.log`)" in verdicts["broken"].reason
    assert log_of(bench, "kept").splitlines()[:2] == ["hello", "hello"]
    assert "== built in " in log_of(bench, "kept")
    assert log_of(bench, "broken").splitlines()[:2] == ["last words", "last words"]
    assert not (bench.root / "artifacts/tiny/.logs/good.log").exists()
    assert engines(bench) == {"kept/fp32", "good/fp32"}


def test_what_was_ended_in_a_process_of_many_is_not_tried_again(bench: Bench) -> None:
    write_rows(bench, slow=('hang = "here"', SOON), kept=('say = "hello"', ROOMY))
    job = prepared(bench)
    assert [one.status for one in run.export(job, jobs=2)] == ["failed", "passed"]
    assert set(job.ended) == {"engine/slow/fp32"}
    assert "== ended after 0.02 min" in log_of(bench, "slow")
    assert "slow" not in job._logs  # this process has built nothing for it


def test_limits_decide_no_bytes_and_those_of_the_job_are_for_rows_without(bench: Bench) -> None:
    write_rows(bench, good=("", ROOMY))
    assert run.export(prepared(bench))[0].status == "passed"
    assert not (bench.root / "artifacts/tiny/.logs/good.log").exists()  # nothing was built

    write_rows(bench, stuck=('hang = "child"', "limits = { memory_gb = 4 }"))
    job = prepared(bench, limits=Limits(minutes=0.02))
    assert "ended after 0.02 min, the limit of rows without `limits.minutes`" in run.export(job)[0].reason
    with pytest.raises(LimitError):
        job.engine(job.targets[0], "fp32")


def test_a_failure_says_how_to_see_it_again(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(bench, bad=('fail = "build"', ""), good=("", ""))
    given = bench.root / "weights.safetensors"
    given.write_bytes((bench.root / "recipes/tiny/weights.safetensors").read_bytes())
    assert cli.invoke(["export", "tiny", "-C", str(bench.root), "--checkpoint", str(given)]) == 9
    told = capsys.readouterr().err
    again = "engine of `bad` again: `exportyard export tiny --target bad --checkpoint weights.safetensors` (commit "
    assert again in told
    assert "of `good`" not in told
    page = bench.root / "artifacts/tiny/report"
    (failure,) = json.loads((page / "report.json").read_text())["failures"]
    assert (failure["target"], failure["stage"]) == ("bad", "engine")
    assert ", checkpoint sha256 " in failure["inputs"]
    assert failure["command"] in (page / "index.html").read_text()


def test_a_killed_export_leaves_no_builder_and_the_next_one_goes_on(bench: Bench) -> None:
    write_rows(bench, stuck=('hang = "child"', ROOMY))
    command = [sys.executable, "-m", "pipeline", "export", "tiny", "-C", str(bench.root)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        below = wait_for_sleeper(process.pid)
        process.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while time.monotonic() < until and any(lives(pid) for pid in below):
        time.sleep(0.05)
    assert not any(lives(pid) for pid in below)
    assert engines(bench) - {"stuck/fp32"} != {"good/fp32"}  # half of an engine lies there ...
    write_rows(bench, stuck=("", ROOMY))
    assert run.export(prepared(bench))[0].status == "passed"
    assert engines(bench) == {"stuck/fp32", "good/fp32"}  # ... and is cleared away


def wait_for_sleeper(parent: int) -> list[int]:
    """The processes below `parent`, as soon as the builder's own child is among them."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        table = {int(path.name): path for path in Path("/proc").iterdir() if path.name.isdigit()}
        found, parents = [parent], {pid: parent_of(path) for pid, path in table.items()}
        for pid in found:
            found += [child for child, above in parents.items() if above == pid]
        if any(name_of(pid) == "sleep" for pid in found):
            return found[1:]
        time.sleep(0.1)
    raise AssertionError("the builder has not started")


def status(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ["", "X", "0"]
    return [text.partition("(")[2].rpartition(")")[0], *text.rpartition(")")[2].split()]


def parent_of(path: Path) -> int:
    return int(status(int(path.name))[2])


def name_of(pid: int) -> str:
    return status(pid)[0]


def lives(pid: int) -> bool:
    return status(pid)[1] not in "XZ"


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ("limits = { minutes = 0 }", "`limits.minutes` = 0: input should be greater than 0"),
        ("limits = { minuts = 3 }", "(?s)unknown key `limits.minuts`.*did you mean `minutes`"),
        ("limits = {}", "limits nothing; expected `minutes`, `memory_gb` or both"),
    ],
)
def test_wrong_limits_are_refused(bench: Bench, limits: str, told: str) -> None:
    write_rows(bench, good=("", limits))
    with pytest.raises(WorkspaceError, match=told) as raised:
        prepared(bench)
    assert raised.value.hint


def test_a_release_may_leave_out_what_is_not_required(bench: Bench) -> None:
    bench.rows(good="", bad='fail = "build"', elsewhere='fail = "missing"')
    require(bench, '["good"]')
    assert cli.invoke(["publish", "tiny", "-C", str(bench.root)]) == 0
    assert bench.tags() == ["tiny@v1.0.0"]
    skipped = manifest.load(bench.root / "artifacts/tiny/release").skipped
    assert skipped["bad"].startswith("failed: ")
    assert skipped["elsewhere"].startswith("not built here: ")


@pytest.mark.parametrize(
    ("required", "targets", "told"),
    [
        ('["good", "bad"]', None, r"since 1 of 2 targets that the recipe requires did not pass:\n  bad: "),
        ('["good", "elsewhere"]', ["good", "elsewhere"], "\n  elsewhere: the row says so"),
        ('["good", "elsewhere"]', ["good"], "\n  elsewhere: it was not asked for"),
        ('"all"', None, r"since 1 of 3 targets failed:\n  bad: "),
    ],
    ids=["failed", "not built", "not asked for", "all"],
)
def test_a_release_lacks_nothing_that_is_required(
    bench: Bench, required: str, targets: list[str] | None, told: str
) -> None:
    bench.rows(good="", bad='fail = "build"', elsewhere='fail = "missing"')
    require(bench, required)
    job = prepared(bench, targets=targets)
    with pytest.raises(ReleaseError, match=told):
        release.publish(job, run.export(job))
    assert bench.tags() == []


def test_what_is_required_must_exist(bench: Bench) -> None:
    require(bench, '["god"]')
    with pytest.raises(UsageError, match=r"(?s)unknown target `god` in `require`.*did you mean `good`"):
        prepared(bench)


@pytest.mark.usefixtures("on_server")
def test_a_flow_limits_every_builder_and_publishes_what_is_required(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(bench, good=("", ""), bad=('fail = "build", say = "last words"', ROOMY), stuck=('hang = "here"', ""))
    require(bench, '["good"]')
    flow = partial(export, "tiny", workspace=str(bench.root), build_minutes=0.02, return_state=True)
    state = flow(publish=False)
    assert state.is_failed()
    assert "\n  stuck: " in state.message
    assert "ended after 0.02 min, the limit of rows without `limits.minutes`" in state.message
    assert "\n    engine of `bad` again: `exportyard export tiny --target bad` (commit " in state.message
    assert (
        "bad: the last lines of its log\nlast words\nlast words\n" in caplog.text
    )  # goes to the run, where Prefect was told to show what `pipeline` logs

    state = flow()
    assert state.is_completed(), state.message
    assert "published tiny@v1.0.0; 1 of 3 targets passed; not in it: bad (failed), stuck (failed)" in state.message
