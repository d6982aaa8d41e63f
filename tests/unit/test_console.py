"""Tables on terminals of any width: nothing is cut, and no number is broken over two lines."""

import re

import pytest
from rich.text import Text

from pipeline import console, summary

ROW = [
    "linux-x86_64-vnni-onnxruntime",
    "int8-u8s8",
    "106.5 kB",
    "126.3 dB",
    "0.9978 (+0.0000)",
    "0.0161 ms",
    "9.77x",
    "[green]passed[/]: fastest form within budget; int8-dynamic is not faster than fp32 (0.99x); fp32 has 0.77x of it",
]
EMPTY = [
    "elsewhere",
    "",
    "",
    "",
    "",
    "",
    "",
    "[yellow]not verified[/]: built, but not measured: it is for aarch64 \\[x]",
]


@pytest.fixture
def printed(monkeypatch, capsys):
    def show(width, columns=summary.COLUMNS, rows=(ROW, EMPTY), numbers=summary.NUMBERS, terminal=True):
        monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("NO_COLOR", "1")
        console.table(columns, rows, numbers=numbers)
        return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()]

    return show


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, 240])
def test_every_cell_is_there_and_no_line_is_too_long(printed, width):
    lines = printed(width)
    assert max(map(len, lines)) <= width
    for cell in (*ROW[:-1], EMPTY[0]):
        assert any(cell in line for line in lines), cell
    told = " ".join(" ".join(lines).split())
    if width < 200:  # else columns stand between its lines
        for cell in (ROW[-1], EMPTY[-1]):
            words = Text.from_markup(cell).plain.split()
            assert all(word in told for word in words)


def test_a_hundred_columns_have_the_numbers_of_a_row_on_one_line(printed):
    lines = printed(100)
    (row,) = [line for line in lines if line.startswith(ROW[0])]
    assert row.split("  ")[0] == ROW[0]
    assert row.endswith("9.77x")
    assert "int8-u8s8  106.5 kB  126.3 dB" in row
    assert lines[lines.index(row) + 1].startswith("    passed: fastest form within budget")
    assert lines[0].split() == [word for name in summary.COLUMNS[:-1] for word in name.split()]


def test_eighty_columns_have_the_name_above_its_numbers(printed):
    lines = printed(80)
    place = lines.index(ROW[0])
    assert lines[place + 1].split()[0] == "int8-u8s8"
    assert lines[place + 1].endswith("9.77x")


def test_forty_columns_have_names_and_values(printed):
    assert "vs ONNX 126.3 dB" in " ".join(printed(40))


def test_a_wide_terminal_and_a_pipe_have_a_table(printed):
    assert any(line.strip().startswith(ROW[0]) and "passed" in line for line in printed(160))
    assert any(line.startswith(ROW[0]) and "passed" in line for line in printed(60, terminal=False))


def test_a_table_that_ends_in_a_number(printed):
    lines = printed(30, ["name", "first number", "second number"], [["a", "1", "2"]], ["first number", "second number"])
    assert any(line.split() == ["1", "2"] for line in lines)


def test_a_table_of_one_column_and_of_none(printed):
    assert "a long cell" in " ".join(printed(8, ["only"], [["a long cell"]], []))
    assert printed(80, ["only"], [], []) == []


def test_rows_of_one_name_have_it_once(printed):
    rows = [["a-long-name", "1", "why it is so"], ["a-long-name", "2", ""], ["other", "", "not there"]]
    assert printed(16, ["name", "first number", "why"], rows, ["first number"]) == [
        "  first number",
        "a-long-name",
        "             1",
        "    why it is so",
        "             2",
        "other",
        "    not there",
    ]
