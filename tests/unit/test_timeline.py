"""The log of steps: newest line that is about what lies there, whoever wrote it, and never a reason to fail."""

import subprocess
import sys

from pipeline import timeline
from pipeline.timeline import StepTime


def line(step, key="k", start=0.0, seconds=1.0, where="here"):
    return StepTime(step=step, key=key, start=start, seconds=seconds, where=where)


def test_the_newest_line_of_what_lies_there_counts(tmp_path):
    timeline.note(tmp_path, [line("program", "old", 1), line("program", "new", 5), line("data", "d", 3)])
    timeline.note(tmp_path, [line("program", "new", 7, 2.5), line("onnx/fp32", "made elsewhere", 9)])
    found = timeline.read(tmp_path, {"program": "new", "data": "d", "onnx/fp32": "o", "checkpoint": "c"})
    assert [(one.step, one.start, one.seconds) for one in found] == [("data", 3, 1.0), ("program", 7, 2.5)]


def test_a_log_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path):
    timeline.note(tmp_path, [line("data")])
    with (tmp_path / timeline.FILE).open("a") as file:
        file.write('{"step": "progr')
    assert [one.step for one in timeline.read(tmp_path, {"data": "k", "program": "k"})] == ["data"]


def test_without_a_log_there_are_no_times(tmp_path):
    assert timeline.read(tmp_path, {"data": "k"}) == []


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / ".logs").write_text("a file where the folder should be")
    timeline.note(tmp_path, [line("data")])
    timeline.shorten(tmp_path)
    assert timeline.read(tmp_path, {"data": "k"}) == []


def test_processes_at_once_lose_no_line(tmp_path):
    script = (
        "import sys; from pathlib import Path; from pipeline import timeline; from pipeline.timeline import StepTime\n"
        "for place in range(200): timeline.note(Path(sys.argv[1]), [StepTime(step=f'{sys.argv[2]}{place}', key='k', "
        "start=0, seconds=1, where='w' * 50)])"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name]) for name in "ab"]
    assert [process.wait() for process in running] == [0, 0]
    steps = {f"{name}{place}": "k" for name in "ab" for place in range(200)}
    assert len(timeline.read(tmp_path, steps)) == 400


def test_a_long_log_is_shortened_to_what_is_newest(tmp_path):
    for start in range(10):
        timeline.note(tmp_path, [line("data", f"{start}", start), line("program", "p", start)])
    timeline.shorten(tmp_path)
    assert len((tmp_path / timeline.FILE).read_text().splitlines()) == 2
    assert [one.start for one in timeline.read(tmp_path, {"data": "9", "program": "p"})] == [9, 9]
    before = (tmp_path / timeline.FILE).read_bytes()
    timeline.shorten(tmp_path)
    assert (tmp_path / timeline.FILE).read_bytes() == before
