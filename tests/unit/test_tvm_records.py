"""Records of tuning: the file that is shared, and what a broken one says."""

import multiprocessing

import pytest

from pipeline.errors import UsageError
from pipeline.tvm import records as tvm_records
from pipeline.tvm.records import Record

ONE = Record(choice=(4, 32, 0), ms=1.5, rule_ms=2.0)


def test_records_come_back_sorted_and_a_line_each(tmp_path):
    path = tmp_path / "tuning" / "cpu.json"
    tvm_records.write(path, {"b": ONE, "a": ONE})

    assert tvm_records.read(path) == {"a": ONE, "b": ONE}
    lines = path.read_text().splitlines()
    assert [line.split('"')[1] for line in lines[1:-1]] == ["a", "b"]


def test_no_file_is_no_record(tmp_path):
    assert tvm_records.read(tmp_path / "none.json") == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {"choice": "x", "ms": 1, "rule_ms": 1}}', '{"a": 3}'])
def test_a_broken_file_is_named(tmp_path, text):
    path = tmp_path / "cpu.json"
    path.write_text(text)

    with pytest.raises(UsageError, match=r"cpu\.json` is not a file of tuning records") as caught:
        tvm_records.read(path)
    assert "git" in caught.value.hint


def _add(path, first):
    for place in range(first, first + 20):
        tvm_records.add(path, f"workload {place:03}", ONE)


def test_processes_that_add_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "cpu.json"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(path, first)) for first in (0, 100, 200)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert len(tvm_records.read(path)) == 60


def test_choices_have_no_times(tmp_path):
    path = tmp_path / "choices.json"
    tvm_records.write_choices(path, {"b": (4, 32, 0), "a": (1, 16, 2)})

    assert tvm_records.read_choices(path) == {"a": (1, 16, 2), "b": (4, 32, 0)}
    assert "ms" not in path.read_text()
