"""The table of candidates and the report: what they say is what was measured."""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import cli, report, run
from pipeline.workspace import Workspace
from tests import workspaces

ROWS = (
    workspaces.ROWS
    + """
    [targets.elsewhere]
    backend = "onnxruntime"
    platform = "linux"
    machine = "riscv64"
    arch = "generic"
    schemes = ["int8-s8s8", "fp32"]
    options = { optimization = "extended" }
    vs_onnx = { fp32 = { sqnr_db = 80 }, int8-s8s8 = { sqnr_db = 20 } }
"""
)
TARGETS = ("any-onnxruntime", "any-echo", "elsewhere")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace, exported once; two forms can be chosen, one target is for another machine."""
    folder = workspaces.tiny(tmp_path_factory.mktemp("report"), rows=ROWS)
    job = run.prepare(Workspace(folder), "tiny")
    report.write(job, run.export(job))
    return folder


def quantize(root, capsys, *options):
    code = cli.invoke(["quantize", "tiny", "-C", str(root), *options])
    return code, *capsys.readouterr()


def test_every_form_is_listed_with_what_was_found_out(root, capsys):
    code, out, err = quantize(root, capsys, "--json", "--target", "any-onnxruntime")
    assert (code, "warning" in err) == (0, False)
    integer, fp32 = json.loads(out)
    assert (integer["scheme"], fp32["scheme"]) == ("int8-u8u8", "fp32")
    assert integer["method"] == "minmax"
    assert integer["int8_share"] == 1
    assert fp32["int8_share"] == 0
    assert {integer["chosen"], fp32["chosen"]} == {True, False}
    assert {speed["threads"] for speed in integer["speeds"]} >= {1}
    assert fp32["sqnr_db"] > integer["sqnr_db"] > 20
    assert integer["size_bytes"] < fp32["size_bytes"] * 2
    chosen, other = (integer, fp32) if integer["chosen"] else (fp32, integer)
    assert chosen["outcome"] == "chosen"
    assert re.search(r"fp32 \(|fp32 at|form's speed", other["outcome"])


def test_a_target_of_another_machine_is_audited_but_not_measured(root, capsys):
    code, out, _ = quantize(root, capsys, "--json", "--target", "elsewhere")
    assert code == 10
    for found in json.loads(out):
        assert found["outcome"] == "not measured on the device"
        assert (found["speeds"], found["metric"]) == ([], None)
        assert found["int8_share"] is not None


def test_the_table_and_its_explanation(root, capsys):
    code, out, _ = quantize(root, capsys, "--explain", *(part for name in TARGETS for part in ("-t", name)))
    lines = out.splitlines()
    assert code == 0
    assert re.search(r"target +scheme +ranges +float ops +size +metric +drop +SQNR +cosine +latency +vs fp32", lines[0])
    assert re.search(r"any-onnxruntime +int8-u8u8 +minmax +0 .* of 0.05 .* 100.0%", out)
    assert re.search(r"any-echo +fp32 .* not audited +chosen", out)
    assert re.search(r"any-onnxruntime +fp32 +batch=1, 1 thread ", out)
    assert re.search(r"^any-onnxruntime: (int8-u8u8|fp32): fastest form within budget", out, re.MULTILINE)
    assert "elsewhere: not verified: built, but not measured on the device: it is for riscv64" in out


def test_a_recipe_may_ask_for_a_share_of_int8(tmp_path, capsys):
    recipe = workspaces.RECIPE + "    min_int8_share = 0.5\n"
    rows = workspaces.ROWS.replace('"int8-u8u8", "fp32"', '"int8-dynamic", "fp32"').replace(
        "int8-u8u8 =", "int8-dynamic ="
    )
    model = workspaces.MODEL.replace("padding=1)", "padding=1)\n            self.wide = nn.Conv2d(4, 4, 5, padding=2)")
    model = model.replace("torch.relu(self.conv(images))", "torch.relu(self.wide(self.conv(images)))")
    workspaces.tiny(tmp_path, rows=rows, recipe=recipe, model=model)
    wide = {"wide.weight": np.full((4, 4, 5, 5), 0.01, np.float32), "wide.bias": np.zeros(4, np.float32)}
    save_file(workspaces.weights() | wide, tmp_path / "recipes" / "tiny" / "weights.safetensors")
    code, out, _ = quantize(tmp_path, capsys, "--json", "--explain", "--target", "any-onnxruntime")
    dynamic, fp32 = json.loads(out)
    assert code == 0
    # the head alone is a matrix product: 256 * 4 of its products beside 64 * 9 * 4 and 64 * 100 * 4
    assert dynamic["int8_share"] == pytest.approx(1024 / (1024 + 2304 + 25600))
    assert dynamic["outcome"] == "runs 3.5% of its compute in INT8, the recipe asks for 50.0%"
    assert fp32["chosen"]
    because = [(one["module"], one["why"]) for one in dynamic["left_in_float"]]
    assert because == [(name, "dynamic convolutions are slower than float ones") for name in ("conv", "wide")]


class Cells(HTMLParser):
    """Texts of all table cells, of all titles, and every address."""

    def __init__(self):
        super().__init__()
        self.rows, self.titles, self.addresses, self._into = [], [], [], None

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._into = self.rows[-1]
            self._into.append("")
        elif tag == "title":
            self._into = self.titles
            self._into.append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th", "title"):
            self._into = None

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] += data


@pytest.fixture
def page(root):
    found = Cells()
    found.feed((root / "artifacts/tiny/report/index.html").read_text())
    return found


def test_the_pages_numbers_are_those_of_the_data(root, page):
    data = json.loads((root / "artifacts/tiny/report/report.json").read_text())
    assert len(data["tried"]) == 5
    for one in data["tried"]:
        if one["metric"] is None:
            continue
        (line,) = [
            row
            for row in page.rows
            if len(row) == 12 and row[0] == one["scheme"] and row[8] == f"{one['speeds'][0]['median_ms']:.3g} ms"
        ]
        assert line[4] == f"{one['metric']:.4f}"
        assert line[5] == f"{one['drop']:+.4f} of {one['budget']:g}"
        assert line[7] == f"{one['cosine']:.6f}"
        assert line[10] == ("not audited" if one["int8_share"] is None else f"{one['int8_share']:.1%}")
        assert line[11] == one["outcome"]
    drawn = [one for one in data["tried"] if one["target"] == "any-onnxruntime"]
    assert page.titles[1:] == [
        f"{one['scheme']}: {one['speeds'][0]['median_ms']:.3g} ms, {one['metric']:.4f}" for one in drawn
    ]


def test_the_page_stands_alone(page):
    assert [address for address in page.addresses if not address.startswith("#")] == []


def test_a_report_of_the_same_data_is_not_drawn_again(root):
    path = root / "artifacts/tiny/report/index.html"
    os.utime(path, (1, 1))
    job = run.prepare(Workspace(root), "tiny")
    assert report.write(job, run.export(job)) == path
    assert path.stat().st_mtime == 1


def test_doubts_are_in_the_report_and_on_the_terminal(tmp_path, capsys):
    workspaces.tiny(tmp_path, rows=workspaces.ROWS.replace('"int8-u8u8", "fp32"', '"fp32"'))
    np.savez(tmp_path / "recipes" / "tiny" / "calibration.npz", images=workspaces.images(4, 1) * 0.2)
    assert cli.invoke(["export", "tiny", "-C", str(tmp_path), "-t", "any-echo"]) == 0
    err = capsys.readouterr().err
    assert "warning: [calibration] has 4 rows" in err
    assert "warning: [calibration] input `images` goes from" in err
    text = (tmp_path / "artifacts/tiny/report/index.html").read_text()
    assert text.count("<strong>Warning:</strong>") == 2
