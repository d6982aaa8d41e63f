"""Releases in a real git repository with real DVC: all or nothing, whatever goes wrong on the way."""

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import initial, journal, record, registry
from pipeline.errors import ReleaseError
from tests.releases import dvc, lay_out, publish, run, steps, with_origin

IDENTITY = (("user.name", "test"), ("user.email", "test@example.com"), ("commit.gpgSign", "false"))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A workspace without remotes; copied for every test, since `dvc init` takes half a second."""
    root = tmp_path_factory.mktemp("template") / "workspace"
    root.mkdir()
    run(root, "git", "init", "-q", "-b", "main")
    for name, value in IDENTITY:
        run(root, "git", "config", name, value)
    initial.init(root)
    (root / "recipes/toy").mkdir()
    (root / "recipes/toy/recipe.toml").write_text('name = "toy"\n')
    (root / "targets/targets.toml").write_text('[targets.any-echo]\nbackend = "echo"\n')
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "-qm", "workspace")
    return root


@pytest.fixture
def root(template, tmp_path):
    """A workspace with a local DVC remote beside it, and no git remote."""
    shutil.copytree(template, tmp_path / "workspace")
    use_remote(tmp_path / "workspace", tmp_path / "remote")
    run(tmp_path / "workspace", "git", "commit", "-qam", "remote")
    return tmp_path / "workspace"


@pytest.fixture
def shared(root, tmp_path):
    """As `root`, with a bare origin."""
    run(tmp_path, "git", "init", "-q", "--bare", "-b", "main", "origin.git")
    run(root, "git", "remote", "add", "origin", str(tmp_path / "origin.git"))
    run(root, "git", "push", "-q", "-u", "origin", "main")
    return root


def use_remote(root: Path, place: Path) -> None:
    text = (root / ".dvc/config").read_text().partition("['remote")[0]
    text = text.replace("    remote = storage\n", "")
    (root / ".dvc/config").write_text(f"{text}    remote = storage\n['remote \"storage\"']\n    url = {place}\n")


def snapshot(root: Path) -> dict[str, object]:
    """All that a publish which fails must leave as it was."""
    names = ["dvc.yaml", "dvc.lock", "artifacts/toy/release.json", *map(str, root.rglob(".gitignore"))]
    files = {name: (root / name).read_bytes() if (root / name).exists() else None for name in names}
    git = {
        command: run(root, "git", *command.split())
        for command in (
            "rev-parse HEAD",
            "status --porcelain -uall",
            "diff --cached",
            "tag",
            "rev-parse --abbrev-ref HEAD",
        )
    }
    return files | git


def versions(root: Path) -> list[str]:
    return [str(release.version) for release in registry.versions(root, "toy")]


def assert_whole(root: Path) -> None:
    """DVC and git agree with what is on disk, and there is nothing to do."""
    assert run(root, "git", "status", "--porcelain") == ""
    ask = "from dvc.repo import Repo; repo = Repo('.'); print(repo.status(), repo.status(cloud=True))"
    assert run(root, sys.executable, "-W", "ignore", "-c", ask) == "{} {}"
    assert not (root / ".git/exportyard-publish.json").exists()
    run(root, "git", "fsck", "--strict")


# --- when all goes well ------------------------------------------------------------------------------------------


def test_two_releases(shared):
    first = publish(shared, "1.0.0", "one")
    assert (first.tag, first.commit) == ("toy@v1.0.0", run(shared, "git", "rev-parse", "HEAD"))
    publish(shared, "1.1.0", "two")
    assert_whole(shared)
    assert dvc(shared, "status") == "Data and pipelines are up to date."
    assert "didn't change, skipping" in dvc(shared, "repro")
    assert run(shared, "git", "ls-remote", "origin", "main").split()[0] == run(shared, "git", "rev-parse", "HEAD")
    newest, oldest = registry.versions(shared, "toy")
    assert (str(newest.version), str(oldest.version)) == ("1.1.0", "1.0.0")
    assert newest.manifest is not None
    assert registry.row(newest)[3] == "any-echo (fp32), linux-echo (fp32)"
    assert newest.plain()["targets"] == {"any-echo": "fp32", "linux-echo": "fp32"}
    assert run(shared, "git", "cat-file", "-t", "toy@v1.1.0") == "tag"


def test_those_who_live_in_dvc_and_gto_see_it(shared, tmp_path):
    publish(shared, "1.0.0", "one")
    gto = "import sys; from gto.cli import app; app(['show', 'toy', '--json'])"
    assert '"v1.0.0"' in run(shared, sys.executable, "-W", "ignore", "-c", gto)
    dvc(tmp_path, "artifacts", "get", f"file://{tmp_path}/origin.git", "toy", "--rev", "v1.0.0", "-o", "got")
    assert (tmp_path / "got/engines/any-echo/model.bin").read_text() == "one for any-echo"


def test_a_step_that_is_gone_is_dropped_and_others_stay(root):
    (root / "dvc.yaml").write_text("# mine\nstages:\n  other: # kept\n    cmd: echo\n    deps: [README.md]\n")
    publish(root, "1.0.0", "one")
    with record.queue(root) as turn:
        text = lay_out(root, "1.0.1", "two")
        record.record(turn, steps(engine="renamed"), "toy", text, "1.0.1")
    pipeline = (root / "dvc.yaml").read_text()
    assert pipeline.startswith("# mine\n")
    assert "other: # kept" in pipeline
    assert "toy-renamed:" in pipeline
    assert "toy-engine-any-echo:" not in pipeline + (root / "dvc.lock").read_text()


def test_what_the_user_has_staged_stays_staged_and_is_not_committed(root):
    (root / "README.md").write_text("mine")
    run(root, "git", "add", "README.md")
    (root / "notes.txt").write_text("untracked")
    publish(root, "1.0.0", "one")
    assert run(root, "git", "status", "--porcelain") == "M  README.md\n?? notes.txt"
    changed = run(root, "git", "show", "--stat", "--format=", "HEAD")
    assert "README.md" not in changed
    assert "dvc.lock" in changed


def test_dvc_keeps_its_own_list_of_ignored_files_where_git_has_none(root):
    (root / ".gitignore").write_text(".*.lock\n")
    run(root, "git", "commit", "-qam", "nothing is ignored")
    publish(root, "1.0.0", "one")
    assert (root / "artifacts/toy/.gitignore").read_text() == "/release\n"
    assert_whole(root)


def test_a_workspace_in_a_folder_of_its_repository(template, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    run(outer, "git", "init", "-q", "-b", "main")
    for name, value in IDENTITY:
        run(outer, "git", "config", name, value)
    inner = outer / "edge" / "models"
    initial.init(inner, tmp_path / "remote")
    for name in ("recipes/toy/recipe.toml", "targets/targets.toml"):
        (inner / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(template / name, inner / name)
    run(outer, "git", "add", "-A")
    run(outer, "git", "commit", "-qm", "workspace")
    (inner / "recipes/toy/recipe.toml").write_text("changed")
    assert registry.dirty_files(inner, "toy") == ["recipes/toy/recipe.toml"]
    run(outer, "git", "commit", "-qam", "change")
    assert publish(inner, "1.0.0", "one").tag == "edge/models=toy@v1.0.0"
    assert_whole_inside(inner)
    assert versions(inner) == ["1.0.0"]
    assert versions(outer) == []
    assert len(dvc(tmp_path, "artifacts", "get", str(outer), "edge/models:toy", "-o", "got")) > 0
    assert (tmp_path / "got/engines/any-echo/model.bin").read_text() == "one for any-echo"


def assert_whole_inside(inner: Path) -> None:
    assert run(inner, "git", "status", "--porcelain") == ""
    assert dvc(inner, "status") == "Data and pipelines are up to date."


def test_a_withdrawn_version_is_listed_and_its_number_stays_taken(root):
    publish(root, "1.0.0", "one")
    run(root, "git", "tag", "toy@v1.0.0!")
    (found,) = registry.versions(root, "toy")
    assert found.withdrawn
    with pytest.raises(ReleaseError, match=r"`toy@v1\.0\.0` exists already"):
        publish(root, "1.0.0", "two")


def test_a_tag_that_somebody_made_by_hand_is_listed_with_what_is_wrong(root):
    run(root, "git", "tag", "toy@v0.9.0")
    (found,) = registry.versions(root, "toy")
    assert found.manifest is None
    assert "exportyard did not make it" in found.problem


def test_dirty_files(root):
    assert registry.dirty_files(root, "toy") == []
    (root / "recipes/toy/recipe.toml").write_text("changed")
    (root / "recipes/toy/new file.py").write_text("new")
    (root / "recipes/toy/weights.safetensors").write_text("ignored")
    (root / "recipes/shared.py").write_text("imported")
    (root / "README.md").write_text("not part of it")
    assert registry.dirty_files(root, "toy") == ["recipes/toy/new file.py", "recipes/toy/recipe.toml"]
    assert "recipes/shared.py" in registry.dirty_files(root, "toy", [Path("recipes/shared.py")])


# --- when it fails -----------------------------------------------------------------------------------------------


def no_remote(root: Path) -> str:
    dvc(root, "remote", "remove", "storage")
    return "no default DVC remote"


def remote_is_a_file(root: Path) -> str:
    (root.parent / "remote").write_text("in the way")
    return "DVC could not record or push the release"


def detached(root: Path) -> str:
    run(root, "git", "checkout", "-q", "--detach")
    return "HEAD is detached"


def broken_pipeline(root: Path) -> str:
    (root / "dvc.yaml").write_text("stages: [")
    return r"`dvc\.yaml` is not valid YAML"


def wrong_pipeline(root: Path) -> str:
    (root / "dvc.yaml").write_text("stages: {}\nsurprise: 1\n")
    return "(?s)DVC could not record.*surprise"


def unreachable_origin(root: Path) -> str:
    run(root, "git", "remote", "set-url", "origin", str(root.parent / "nowhere.git"))
    return "(?s)the push of `toy@v1.0.0` to origin failed.*nowhere.git"


def refusing_origin(root: Path) -> str:
    hook = root.parent / "origin.git/hooks/pre-receive"
    hook.write_text("#!/bin/sh\necho not today >&2\nexit 1\n")
    hook.chmod(0o755)
    return "the push of `toy@v1.0.0` to origin failed"


def origin_moved(root: Path) -> str:
    run(root.parent, "git", "clone", "-q", str(root.parent / "origin.git"), "colleague")
    colleague = root.parent / "colleague"
    (colleague / "README.md").write_text("theirs")
    author = ("-c", "user.name=c", "-c", "user.email=c@example.com")
    run(colleague, "git", *author, "commit", "-qam", "meanwhile")
    run(colleague, "git", "push", "-q")
    return "origin has commits or tags that are not here"


def missing_output(root: Path) -> str:
    shutil.rmtree(root / "artifacts/toy/engine/any-echo")
    return "`artifacts/toy/engine/any-echo` is missing"


FAULTS = [
    no_remote,
    remote_is_a_file,
    detached,
    broken_pipeline,
    wrong_pipeline,
    unreachable_origin,
    refusing_origin,
    origin_moved,
    missing_output,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_failure_leaves_everything_as_it_was(shared, fault):
    text = lay_out(shared, "1.0.0", "one")
    (shared / "README.md").write_text("staged")
    run(shared, "git", "add", "README.md")
    message = fault(shared)
    before = snapshot(shared)
    with record.queue(shared) as turn, pytest.raises(ReleaseError, match=message) as caught:
        record.record(turn, steps(), "toy", text, "1.0.0")
    assert snapshot(shared) == before
    assert caught.value.hint is not None
    assert len(str(caught.value).splitlines()) <= 10
    assert run(shared.parent / "origin.git", "git", "tag") == ""


STEPS = [(record.dvc, "ask"), (record, "_make_objects"), (journal, "save"), (record, "_push"), (journal, "move_names")]


def test_any_exception_on_the_way_leaves_everything_as_it_was(root, monkeypatch):
    text = lay_out(root, "1.0.0", "one")
    before = snapshot(root)
    for module, name in STEPS:
        error = KeyboardInterrupt if name == "_push" else RuntimeError
        with record.queue(root) as turn:
            monkeypatch.setattr(module, name, failing(module, name, error(f"broken in {name}")))
            with pytest.raises(error, match=f"broken in {name}"):
                record.record(turn, steps(), "toy", text, "1.0.0")
            monkeypatch.undo()
        assert snapshot(root) == before
    publish(root, "1.0.0", "one")
    assert_whole(root)


def failing(module, name, error):
    original = getattr(module, name)

    def fail(*arguments, **options):
        if name == "save" and arguments[0].commit is None:
            return original(*arguments, **options)  # the journal's first entry, before anything is touched
        if name == "ask":
            original(*arguments, **options)
        raise error

    return fail


def test_no_identity(root, monkeypatch, tmp_path):
    run(root, "git", "config", "--unset", "user.email")
    for name in ("EMAIL", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "none"))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", str(tmp_path / "none"))
    with pytest.raises(ReleaseError, match=r"git doesn't know who you are[^$]*hint: `git config user\.name"):
        publish(root, "1.0.0", "one")


def test_outside_git(tmp_path):
    with pytest.raises(ReleaseError, match="is not in a git work tree"):
        registry.versions(tmp_path, "toy")


def test_nothing_committed(tmp_path):
    run(tmp_path, "git", "init", "-q")
    with pytest.raises(ReleaseError, match="nothing is committed"):
        registry.git.head(tmp_path)


# --- two at once -------------------------------------------------------------------------------------------------


def test_publishers_in_one_workspace_queue(root):
    order = []

    def second():
        with record.queue(root):
            order.append("second")

    with record.queue(root):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_of_two_clones_one_wins_a_version_and_the_other_can_go_on(shared, tmp_path):
    run(tmp_path, "git", "clone", "-q", str(tmp_path / "origin.git"), "clone")
    clone = tmp_path / "clone"
    for name, value in IDENTITY:
        run(clone, "git", "config", name, value)
    contents = {shared: "one", clone: "two"}
    texts = {root: lay_out(root, "1.0.0", content) for root, content in contents.items()}
    before = {root: snapshot(root) for root in contents}
    outcome = {}

    def work(root):
        with record.queue(root) as turn:
            try:
                outcome[root] = record.record(turn, steps(), "toy", texts[root], "1.0.0")
            except ReleaseError as error:
                outcome[root] = error

    threads = [threading.Thread(target=work, args=(root,)) for root in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (loser,) = [root for root in contents if isinstance(outcome[root], ReleaseError)]
    (winner,) = set(contents) - {loser}
    assert "origin has commits or tags that are not here" in str(outcome[loser])
    assert snapshot(loser) == before[loser]
    assert_whole(winner)
    run(loser, "git", "pull", "-q", "--rebase", "--tags")
    assert versions(loser) == ["1.0.0"]
    publish(loser, "1.0.1", contents[loser])
    assert_whole(loser)
    assert len(run(tmp_path / "origin.git", "git", "tag").split()) == 2


# --- killed ------------------------------------------------------------------------------------------------------

POINTS = [
    "after:journal.begin",
    "after:record._track",
    "after:record._make_objects",
    "before:record._push",
    "after:record._push",
    "after:journal.move_names",
    "after:journal.refresh",
]


def test_a_killed_publish_is_finished_or_undone_by_the_next_run(shared):
    # one workspace for all points, so that each run also starts from what the one before has left
    published = []
    for number, point in enumerate(POINTS):
        version = f"1.{number}.0"
        command = [sys.executable, "-m", "tests.releases", str(shared), version, point, point]
        killed = subprocess.run(command, check=False, capture_output=True)
        assert killed.returncode == -9, killed.stderr
        done = point in POINTS[-3:]
        published += [version] if done else []
        with record.queue(shared) as turn:
            found = (turn.finished, turn.undone)
            assert found == ((f"toy@v{version}", None) if done else (None, f"toy@v{version}")), point
            assert versions(shared) == published[::-1], point
            assert run(shared, "git", "status", "--porcelain") == "", point
    publish(shared, "2.0.0", "at last")
    assert_whole(shared)
    assert run(shared, "git", "ls-remote", "origin", "main").split()[0] == run(shared, "git", "rev-parse", "HEAD")


@pytest.mark.parametrize("delay_s", [0.45, 0.6, 0.8])
def test_killed_at_any_time(root, delay_s):
    command = [sys.executable, "-m", "tests.releases", str(root), "1.0.0", "one", "after:journal.close"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(delay_s)
        process.kill()
    with record.queue(root):  # waits for the worker that the killed process has left behind
        assert versions(root) in (["1.0.0"], [])
    if not versions(root):
        publish(root, "1.0.0", "one")
    assert_whole(root)
    assert versions(root) == ["1.0.0"]


def test_hand_edits_made_after_a_kill_are_kept_aside(root):
    subprocess.run(
        [sys.executable, "-m", "tests.releases", str(root), "1.0.0", "one", "after:record._track"], check=False
    )
    (root / "dvc.yaml").write_text("# edited\n")
    with record.queue(root) as turn:
        assert turn.undone == "toy@v1.0.0"
    assert "stages: {}" in (root / "dvc.yaml").read_text()
    assert (root / ".git/exportyard-undone/dvc.yaml").read_text() == "# edited\n"


def test_an_emptied_remote_is_filled_again(root, tmp_path):
    publish(root, "1.0.0", "one")
    shutil.rmtree(tmp_path / "remote")
    with pytest.raises(ReleaseError, match="there is no folder"):  # a disk that isn't mounted, most likely
        publish(root, "1.0.1", "one")
    (tmp_path / "remote").mkdir()
    publish(root, "1.0.1", "one")
    assert_whole(root)


def test_the_newest_release_is_neither_withdrawn_nor_a_candidate(tmp_path):
    root = with_origin(tmp_path)
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "-qm", "workspace")
    assert registry.newest(root, "toy") is None
    for tag in ("toy@v1.0.0", "toy@v1.2.0", "toy@v1.10.0", "toy@v1.10.0!", "toy@v2.0.0-rc.1", "other@v3.0.0"):
        run(root, "git", "tag", tag)
    found = registry.newest(root, "toy")
    assert found is not None
    assert (found.tag, found.manifest) == ("toy@v1.2.0", None)
    assert "exportyard did not make it" in found.problem
