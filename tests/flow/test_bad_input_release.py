"""Publishing and pulling where something is in the way: refused with a message, nothing changed, and then it works."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import cli, depots, git, layout, release, store
from tests import releases

PUBLISH = ("publish", "tiny", "--target", "good")


def state(root):
    """What a failed publish must leave as it was."""
    files = {name: (root / name).read_bytes() for name in ("dvc.yaml", "dvc.lock") if (root / name).is_file()}
    names = [
        path.parent.relative_to(root).as_posix() for path in sorted(root.glob("artifacts/*/release/artifact.json"))
    ]
    return git.run(root, "for-each-ref"), git.run(root, "status", "--short", "--", "artifacts"), files, names


@pytest.fixture
def refused(bench, capsys):
    """Runs a command that must fail and leave everything as it was; returns what it said."""

    def run(*arguments, code=12):
        before = state(bench.root)
        found = cli.invoke([*arguments, "-C", str(bench.root)])
        err = capsys.readouterr().err
        assert found == code, err
        assert "a bug in exportyard" not in err
        assert "hint: " in err
        assert len(err.splitlines()) <= 10, err
        assert state(bench.root) == before
        return err

    return run


def publish(bench):
    assert cli.invoke([*PUBLISH, "-C", str(bench.root)]) == 0
    assert len(bench.tags()) == 1


def test_another_git_command_holds_the_index(bench, refused):
    lock = bench.root / ".git/index.lock"
    lock.touch()
    assert "another git command is at work" in refused(*PUBLISH)
    lock.unlink()
    publish(bench)
    assert not git.run(bench.root, "status", "--short")


def test_a_folder_where_dvc_yaml_should_be(bench, refused):
    (bench.root / "dvc.yaml").rename(bench.root / "kept.yaml")
    (bench.root / "dvc.yaml").mkdir()
    assert "dvc.yaml` is a folder" in refused(*PUBLISH)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a disk")
def test_a_remote_on_a_full_disk(bench, refused, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a disk of a few kB can't be mounted here: {done.stderr.strip()}")
    try:
        releases.dvc(bench.root, "remote", "modify", "storage", "url", str(place))
        bench.commit()
        assert "DVC could not record or push the release" in refused(*PUBLISH)
        subprocess.run(["mount", "-o", "remount,size=8m", str(place)], check=True)
        publish(bench)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_storage_that_dvc_has_no_plug_in_for(bench, refused):
    with suppress(ModuleNotFoundError):
        __import__("dvc_gdrive")
        pytest.skip("the plug-in is installed")
    releases.dvc(bench.root, "remote", "modify", "storage", "url", "gdrive://folder/x")
    bench.commit()
    err = refused(*PUBLISH)
    assert "DVC is not installed" not in err
    assert "gdrive" in err


def test_what_a_killed_publish_has_laid_out_is_not_taken_for_the_last_release(bench, refused):
    publish(bench)
    folder = bench.root / "artifacts/tiny/release"
    shutil.copytree(folder, folder.with_name(".release.kept"))
    made = store.load(folder)
    facts = {**made.artifact.facts, "version": "9.9.9"}
    store.write_json(folder / store.MANIFEST, made.artifact.model_copy(update={"facts": facts}).plain())
    with pytest.raises(ZeroDivisionError), release._kept(folder, {"1.0.0"}):
        raise ZeroDivisionError
    assert store.load(folder).artifact.facts["version"] == "1.0.0"
    assert not folder.with_name(".release.kept").exists()


def test_pulling_into_a_loop_of_links(bench, tmp_path, capsys):
    publish(bench)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert cli.invoke(["pull", "tiny", "--to", str(tmp_path / "loop"), "-C", str(bench.root)]) == 12
    assert "a bug in exportyard" not in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(bench, closed):
    command = f"{sys.executable} -m pipeline recipes -C {bench.root} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


ORPHANED = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pipeline import run
if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=run.end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc")
def test_workers_end_when_the_parent_is_killed(tmp_path):
    (tmp_path / "orphaned.py").write_text(ORPHANED)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "orphaned.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the resource tracker tells of what was killed
        text=True,
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while _lives(worker) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _lives(worker)


def _lives(process):
    """Whether a process runs; one that only waits to be asked how it ended doesn't."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_registry_that_is_away_gets_the_release_later(bench, tmp_path, capsys):
    folder = tmp_path / "registry"
    releases.dvc(bench.root, "remote", "add", "registry", str(folder))
    assert cli.invoke([*PUBLISH, "-C", str(bench.root)]) == 10
    said = capsys.readouterr().err
    assert f"`tiny` 1.0.0 is published, but not in the registry yet: the registry `{folder}` can't be used" in said
    assert "hint: `exportyard mirror tiny` brings it there" in said
    assert bench.tags() == ["tiny@v1.0.0"]
    folder.mkdir()
    assert cli.invoke([*PUBLISH, "--json", "-C", str(bench.root)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"version": "1.0.0", "tag": "tiny@v1.0.0", "fresh": False, "registry": str(folder)}
    entries = layout.index(depots.at(folder), "tiny").entries
    assert [layout.notes(one)[layout.NAME] for one in entries] == ["v1.0.0", "v1.0.0-good"]
