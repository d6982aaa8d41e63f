"""Watching a place: what counts as a whole checkpoint, and that each is told once, in order, whatever happens."""

import json
import os
import subprocess
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from pipeline import digest, inbox, places
from pipeline.errors import UnavailableError, UsageError
from pipeline.watch import Told, Watch


def weights(seed=0):
    return save({"w": np.random.default_rng(seed).random(100, dtype=np.float32)})


def archive(path):
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("data.pkl", "x" * 500)
    return path.read_bytes()


WHOLE = weights()


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.safetensors", WHOLE, None),
        ("a.safetensors", WHOLE[:-1], "announces"),
        ("a.safetensors", WHOLE + b"x", "announces"),
        ("a.safetensors", WHOLE[:20], "header should have"),
        ("a.safetensors", (10).to_bytes(8, "little") + b"[1,2,3]   ", "no safetensors header"),
        ("a.safetensors", b"", "empty"),
        ("a.pt", b"\x80\x02 an old pickle", None),
        ("a.bin", b"x", "what kind"),
    ],
)
def test_half_a_file_is_known_by_its_header(tmp_path, name, data, told):
    (tmp_path / name).write_bytes(data)
    found = places.broken(tmp_path / name)
    assert found is None if told is None else told in found


def test_half_an_archive_is_known_by_its_end(tmp_path):
    path = tmp_path / "a.pt"
    data = archive(path)
    assert places.broken(path) is None
    path.write_bytes(data[:-30])
    assert "end is missing" in places.broken(path)


class Server:
    """What a watch hands over, tells and says; `away` makes the server or the remote fail."""

    def __init__(self):
        self.away = self.remote_away = False
        self.told, self.lines, self.runs = [], [], {}

    def hand_over(self, path):
        if self.remote_away:
            raise UnavailableError("the remote is away")
        return digest.of_file(path)

    def tell(self, found):
        if self.away:
            raise UnavailableError("the server is away")
        if found.file.startswith("bad"):
            raise UsageError("the server doesn't want it")
        self.told.append(found.file)
        fresh = found.key not in self.runs
        run = self.runs.setdefault(found.key, str(len(self.runs)))
        return Told(run, f"http://x/{run}", fresh, "Scheduled")

    def say(self, word, name, details):
        self.lines.append((word, name, details))

    def words(self, name):
        return [word for word, found, _ in self.lines if found == name]


class Desk:
    """A watch on a folder, whose watcher can be started anew."""

    def __init__(self, root, place=None):
        self.root, self.server, self.recipes = root, Server(), ["digits"]
        self.folder = root / "incoming"
        (self.folder / "digits").mkdir(parents=True)
        self.place = place or str(self.folder)
        self.journal = root / "journal.jsonl"

    def drop(self, name, data):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        # so that the order doesn't depend on the clock's resolution
        os.utime(path, (1e9 + len(list(path.parent.iterdir())),) * 2)

    def run(self, rounds=1, still_s=0.02, **options):
        with inbox.opened(self.journal) as known:
            server = self.server
            found = Watch(
                places.at(self.place, **options),
                known,
                lambda: self.recipes,
                server.hand_over,
                server.tell,
                server.say,
                self.root,
                still_s,
            )
            return [found.once() for _ in range(rounds)][-1]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def test_what_is_there_is_told_once_in_the_order_of_its_making(desk):
    for number, name in enumerate(["z.safetensors", "a.safetensors", "m.safetensors"]):
        desk.drop(f"digits/{name}", weights(number))
    desk.drop("digits/notes.txt", b"x")
    desk.drop("digits/.hidden.safetensors", weights(9))
    assert desk.run(rounds=2) == []
    assert desk.server.told == ["z.safetensors", "a.safetensors", "m.safetensors"]
    assert desk.server.words("digits/z.safetensors") == ["new", "whole"]
    assert desk.server.words("digits z.safetensors") == ["started"]
    assert desk.run() == []
    assert len(desk.server.told) == 3
    desk.drop("digits/z.safetensors", weights(7))
    desk.run()
    assert desk.server.told[3:] == ["z.safetensors"]


def test_the_same_content_under_another_name_is_known(desk):
    desk.drop("digits/a.safetensors", WHOLE)
    desk.run()
    desk.drop("digits/b.safetensors", WHOLE)
    desk.run()
    assert desk.server.told == ["a.safetensors"]
    assert desk.server.words("digits/b.safetensors") == ["new", "known"]


def test_a_lost_journal_starts_nothing_twice(desk):
    desk.drop("digits/a.safetensors", WHOLE)
    desk.run()
    desk.journal.unlink()
    desk.run()
    assert desk.server.words("digits a.safetensors") == ["started", "known"]


def test_half_a_file_is_refused_and_taken_when_it_is_whole(desk):
    desk.drop("digits/a.safetensors", WHOLE[:-100])
    assert desk.run(rounds=2) == []
    assert desk.server.words("digits/a.safetensors") == ["new", "refused"]
    assert desk.server.told == []
    desk.drop("digits/a.safetensors", WHOLE)
    desk.run()
    assert desk.server.told == ["a.safetensors"]


def test_a_file_that_changes_while_it_is_read_is_left_for_later(desk):
    desk.drop("digits/a.safetensors", WHOLE)
    path = desk.folder / "digits/a.safetensors"
    copy = places.Place.copy

    def changing(place, seen, to):
        copy(place, seen, to)
        path.write_bytes(weights(1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places.Place, "copy", changing)
        assert desk.run() == ["digits/a.safetensors: it changes while it is read"]
    assert desk.run() == []
    assert desk.server.runs.keys() == {f"digits:{digest.of_bytes(weights(1))}"}


def test_a_file_gets_its_name_when_it_is_whole(desk):
    desk.drop("digits/a.safetensors.tmp", WHOLE)
    desk.run()
    assert desk.server.lines == [("empty", str(desk.folder), "no checkpoint yet")]
    (desk.folder / "digits/a.safetensors.tmp").rename(desk.folder / "digits/a.safetensors")
    desk.run()
    assert desk.server.told == ["a.safetensors"]


def test_a_folder_without_a_recipe_is_refused_until_there_is_one(desk):
    desk.drop("digts/a.safetensors", WHOLE)
    desk.run(rounds=2)
    assert [(word, details) for word, _, details in desk.server.lines] == [
        ("refused", "unknown recipe `digts`; did you mean `digits`?")
    ]
    desk.recipes.append("digts")
    desk.run()
    assert desk.server.told == ["a.safetensors"]


def test_a_server_that_is_away_is_told_later_also_by_another_watcher(desk):
    desk.server.away = True
    desk.drop("digits/a.safetensors", weights(1))
    desk.drop("digits/bad.safetensors", weights(2))
    assert desk.run() == ["2 to tell the server of"]
    (desk.folder / "digits/a.safetensors").unlink()
    desk.drop("digits/c.safetensors", weights(3))
    assert desk.run() == ["3 to tell the server of"]
    assert desk.server.words("digits a.safetensors") == ["waiting", "waiting"]
    desk.server.away = False
    assert desk.run() == []
    assert desk.server.told == ["a.safetensors", "c.safetensors"]
    assert desk.server.words("digits bad.safetensors") == ["refused"]
    assert desk.run() == []
    assert len(desk.server.told) == 2


def test_a_remote_that_is_away_keeps_the_order(desk):
    desk.server.remote_away = True
    desk.drop("digits/a.safetensors", weights(1))
    desk.drop("digits/b.safetensors", weights(2))
    assert desk.run() == ["digits/a.safetensors: the remote is away"]
    desk.server.remote_away = False
    assert desk.run() == []
    assert desk.server.told == ["a.safetensors", "b.safetensors"]


def test_half_a_line_in_the_journal_costs_nothing_but_that_line(desk):
    desk.drop("digits/a.safetensors", WHOLE)
    desk.run()
    whole = desk.journal.read_text()
    desk.journal.write_text(whole + whole.splitlines()[0][:40])
    desk.drop("digits/b.safetensors", weights(1))
    desk.run()
    assert desk.server.told == ["a.safetensors", "b.safetensors"]
    lines = desk.journal.read_text().splitlines()
    assert json.loads(lines[-1])["what"] == "1"


def test_two_watchers_are_one_too_many(desk):
    with inbox.opened(desk.journal), pytest.raises(UsageError, match="another watcher"):
        desk.run()


def test_a_link_is_followed(desk):
    (desk.root / "runs").mkdir()
    (desk.root / "runs/epoch1.safetensors").write_bytes(WHOLE)
    (desk.folder / "best.safetensors").symlink_to(desk.root / "runs/epoch1.safetensors")
    (desk.folder / "gone.safetensors").symlink_to("nowhere")
    desk.run(recipe="digits", pattern="*.safetensors")
    assert desk.server.told == ["best.safetensors"]


def test_an_object_store_is_a_place_like_any_other(tmp_path):
    store = fsspec.filesystem("memory")
    desk = Desk(tmp_path, "memory://bucket/prefix")
    try:
        assert desk.run() == []
        assert desk.server.lines == [("empty", "memory:///bucket/prefix", "no checkpoint yet")]
        store.pipe("/bucket/prefix/digits/a.safetensors", WHOLE)
        store.pipe("/bucket/prefix/digits/b.safetensors", WHOLE[:-1])
        assert desk.run() == []
        assert desk.server.told == ["a.safetensors"]
        assert desk.server.words("digits/b.safetensors") == ["new", "refused"]
    finally:
        store.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("place", "error", "told"),
    [
        ("incomming", UsageError, "no folder.*\n\nhint: did you mean `.*incoming`"),
        ("file.pt", UsageError, "not a folder.*\n\nhint: `exportyard notify .*file.pt"),
        ("s4://bucket", UsageError, "can't watch `s4://bucket`"),
    ],
)
def test_a_place_that_is_none(tmp_path, place, error, told):
    (tmp_path / "incoming").mkdir()
    (tmp_path / "file.pt").write_bytes(b"x")
    with pytest.raises(error, match=told):
        places.at(place if "://" in place else str(tmp_path / place))


def test_a_folder_that_goes_away_is_said_and_awaited(desk):
    desk.drop("digits/a.safetensors", WHOLE)
    hidden = desk.root / "elsewhere"
    with inbox.opened(desk.journal) as known:
        server = desk.server
        place = places.at(str(desk.folder))
        watch = Watch(place, known, lambda: ["digits"], server.hand_over, server.tell, server.say, desk.root, 0.02)
        Path(desk.folder).rename(hidden)
        assert "can't read" in watch.once()[0]
        hidden.rename(desk.folder)
        assert watch.once() == []
    assert [word for word, _, _ in server.lines] == ["away", "back", "new", "whole", "started"]


def test_the_workflow_for_a_hosted_ci_takes_names_as_data(tmp_path):
    document = Path(__file__).parents[2] / "docs/examples/export-on-tag.yml"
    # what YAML 1.1 makes of the key `on`
    workflow = {"on" if key is True else key: value for key, value in yaml.safe_load(document.read_text()).items()}
    assert workflow["on"] == {"push": {"tags": ["checkpoint/**"]}}
    assert workflow["permissions"] == {"contents": "read"}
    scripts = [step["run"] for step in workflow["jobs"]["notify"]["steps"] if "run" in step]
    assert not any("${{" in script for script in scripts)
    # the script itself, with commands that only say what they were asked for
    said = tmp_path / "said"
    for name in ("dvc", "exportyard"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {said}\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TAG": "checkpoint/digits/v1;x"}
    subprocess.run(["bash", "-e", "-c", scripts[-1]], env=environment, check=True)
    assert said.read_text().splitlines() == [
        "dvc pull checkpoints/digits.safetensors",
        "exportyard notify checkpoints/digits.safetensors --recipe digits",
    ]
