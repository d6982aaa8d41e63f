"""The report and the table of forms: what they say is what was measured."""

import json
import os
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import cli, manifest, release, run, store
from pipeline.report import files as report
from pipeline.types import Departure, Explanation, Layer
from pipeline.workspace import Workspace
from tests import browser, releases, reports, workspaces

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


def export(folder):
    """A job, and verdicts on all its targets."""
    job = run.prepare(Workspace(folder), "tiny")
    return job, run.export(job)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace, exported once; two forms can be chosen, one target is for another machine."""
    folder = workspaces.tiny(tmp_path_factory.mktemp("report"), rows=ROWS)
    report.write(*export(folder))
    return folder


@pytest.fixture(scope="module")
def page(root):
    return root / "artifacts/tiny/report/index.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.browser(tmp_path_factory.mktemp("chromium"), 1280, 900) as tab:
        yield tab


def opened(tab, path, width=1280, scheme="light", media="screen"):
    """The page at `path` in a window of this width."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    tab.tell("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    tab.tell("Emulation.setEmulatedMedia", features=features, media=media)
    tab.open(path.as_uri())
    return tab


def check_looks(tab, path):
    """At the width of a desk and of a phone, nothing sticks out, nothing is too small, no label lies on another."""
    for width in (1280, 390):
        opened(tab, path, width)
        tab.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert tab.value("document.documentElement.scrollWidth") <= width
        assert tab.value(reports.UNREADABLE) == []
        assert tab.value(reports.OVERLAPPING) == []
        assert tab.value(reports.SMALL) == []


def check_numbers(tab, path):
    """Every number and text of the page is that of report.json; how many there are."""
    data, _ = reports.load(path)
    return reports.compare(opened(tab, path).value(reports.SHOWN), data)


def test_every_number_on_the_page_is_one_of_the_data(page, chromium):
    found = check_numbers(chromium, page)
    assert found["numbers"] > 400
    assert found["texts"] > 50


def test_no_number_of_a_table_is_without_its_place(page, chromium):
    """But for columns, whose names are sizes, and names that have digits in them."""
    bare = opened(chromium, page).value(
        "[...document.querySelectorAll('td.n')].filter((cell) => /[0-9]/.test([...cell.childNodes].filter("
        "(node) => node.nodeType === 3).map((node) => node.textContent).join(''))).map((cell) => cell.textContent)"
    )
    assert bare == []


def test_the_data_are_those_of_the_artifacts(root, page):
    data, found = reports.load(page)
    assert [line.status for line in found.targets] == ["passed", "passed", "not verified"]
    first = found.targets[0]
    latency = json.loads((root / "artifacts/tiny/latency/any-onnxruntime/latency.json").read_text())
    assert data["targets"][0]["speed"]["time"] == latency["rows"][0]["engines"][first.scheme]
    parity = json.loads((root / f"artifacts/tiny/parity/any-onnxruntime/{first.scheme}/parity.json").read_text())
    assert data["targets"][0]["metric"] == parity["metric"]
    engine = store.load(root / f"artifacts/tiny/engine/any-onnxruntime/{first.scheme}")
    assert (first.size_bytes, first.engine) == (engine.size_bytes, engine.digest)
    assert [len(one.cells) for one in found.parity] == [len(parity["sizes"])] * 3
    assert {one.name for one in found.tensors} >= {"images"}
    for one in found.tensors:
        assert sum(one.counts) == one.values
        assert one.first <= one.low <= one.high <= one.first + one.width * len(one.counts)
    assert {one.step for one in found.timeline.steps} >= {"program", "onnx/fp32", "engine/any-echo/fp32"}
    assert found.timeline.busy_s <= sum(one.seconds for one in found.timeline.steps) + 1e-6
    assert found.verdict.state == "ready"
    assert found.release.told.startswith("not compared with a release") or found.release.tag is None


def test_the_looks(page, chromium):
    check_looks(chromium, page)


def test_dark_and_print(page, chromium):
    ink = "getComputedStyle(document.body).color"
    paper = "getComputedStyle(document.body).backgroundColor"
    light = [opened(chromium, page).value(value) for value in (ink, paper)]
    dark = [opened(chromium, page, scheme="dark").value(value) for value in (ink, paper)]
    assert light != dark
    tab = opened(chromium, page, scheme="dark", media="print")
    assert [tab.value(value) for value in (ink, paper)] == light, "paper is white"
    hidden = (
        "[...document.querySelectorAll('details table, details svg')].filter((one) => !one.checkVisibility()).length"
    )
    assert opened(chromium, page).value(hidden) > 0
    assert opened(chromium, page, media="print").value(hidden) == 0, "what is folded can't be read on paper"
    assert tab.tell("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"]


def test_the_page_stands_alone(page, chromium):
    text = page.read_text()
    addresses = re.findall(r'(?:src|href|action|poster)\s*=\s*"([^"]*)"', text)
    assert [address for address in addresses if not address.startswith("#")] == []
    assert re.findall(r"@import|url\((?!#)", text) == []
    assert re.findall(r'id="([^"]+)"', text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    wanted = {address[1:] for address in addresses}
    assert wanted <= set(ids), "a link leads nowhere"
    asked = opened(chromium, page).value("performance.getEntriesByType('resource').length")
    assert asked == 0


def test_the_same_data_give_the_same_bytes_and_are_not_drawn_again(root, page):
    before = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    os.utime(page, (1, 1))
    assert report.write(*export(root)) == page
    assert page.stat().st_mtime == 1
    page.write_text("damaged")
    report.write(*export(root))
    assert {path.name: path.read_bytes() for path in page.parent.iterdir()} == before


def test_the_markdown_says_the_same(page):
    data, found = reports.load(page)
    lines = (page.parent / "report.md").read_text().splitlines()
    assert lines[0] == "# tiny: ✅ Ready for release"
    (row,) = [line for line in lines if line.startswith("| any-onnxruntime |")]
    assert f"| {found.targets[0].speed.time.median_ms:.3g} ms |" in row
    assert f"{found.targets[0].metric.engine:.4f} (" in row
    assert all(any(line.target in text for text in lines) for line in found.targets)
    assert data["recipe"] == "tiny"


def test_the_picture_for_a_chat_is_a_png(page):
    assert (page.parent / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_marks_of_pictures_tell_what_they_are_of(page):
    _, found = reports.load(page)
    text = page.read_text()
    titles = [
        title.text
        for svg in re.findall(r'<svg [^>]*role="img".*?</svg>', text, flags=re.DOTALL)
        for title in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")
    ]
    for one in found.tried:
        if one.target == "any-onnxruntime":
            assert f"{one.scheme}: {one.speeds[0].median_ms:.3g} ms, {one.metric:.4f}" in titles
    for one in found.timeline.steps:
        assert f"{one.step}: {one.seconds:.2f} s" in titles


def test_after_a_release_the_page_compares_with_it(tmp_path, chromium):
    from pipeline import initial

    folder = workspaces.under_git(workspaces.tiny(tmp_path / "workspace", rows=ROWS))
    initial.init(folder, tmp_path / "remote")
    releases.run(folder, "git", "add", "-A")
    releases.run(folder, "git", "commit", "-qm", "workspace")
    job, verdicts = export(folder)
    page = report.write(job, verdicts)
    assert reports.load(page)[1].release.told == "none, this would be the first"
    release.publish(job, verdicts)
    job, verdicts = export(folder)
    assert report.write(job, verdicts) == page
    check_numbers(chromium, page)
    found = reports.load(page)[1]
    assert found.release.told == "the same engines as in tiny@v1.0.0"
    assert found.verdict.next == ("nothing to publish: these are the same engines as in tiny@v1.0.0",)
    published = manifest.load(folder / "artifacts/tiny/release")
    assert set(published.engines) == {line.target for line in found.targets if line.status == "passed"}
    for line in found.targets:
        engine = published.engines.get(line.target)
        if engine is None:
            assert published.skipped[line.target] == f"{line.status}: {line.reason}"
            continue
        assert (line.scheme, line.reason) == (engine.scheme, engine.reason)
        assert line.metric == engine.parity.metric
        assert line.size_bytes == sum(file.size_bytes for file in engine.files)
        assert line.speed.time == engine.latency.rows[0].engine
        assert line.speed.versus_eager.median == engine.latency.rows[0].versus_eager
        assert line.onnx_db == min(one.sqnr_db for one in engine.parity.vs_onnx)
    assert found.provenance.checkpoint == published.checkpoint
    assert {one.step: one.digest for one in found.provenance.made}["data"] == published.data
    recipe = folder / "recipes/tiny/recipe.toml"
    recipe.write_text(recipe.read_text() + "\n[regression]\nkeep_targets = true\n")
    job = run.prepare(Workspace(folder), "tiny", targets=["any-echo"])
    found = reports.load(report.write(job, run.export(job)))[1]
    assert found.verdict.state == "worse"
    assert any("any-onnxruntime: has no engine any more" in text for text in found.verdict.next)


def test_a_failure_is_told_with_the_operator_that_departs(tmp_path, chromium):
    recipe = workspaces.RECIPE + "    vs_eager = { sqnr_db = 900 }\n"
    folder = workspaces.tiny(tmp_path, rows=ROWS, recipe=recipe)
    job, verdicts = export(folder)
    engine = job.made["engine/any-onnxruntime/fp32"].stored.digest
    departure = Departure(
        level="engine",
        operator="Conv",
        node="node_conv2d",
        module="conv",
        line="model.py:17",
        output="relu",
        before=float("inf"),
        after=3.25,
        own=3.25,
        allowed=90,
        because="rounding in 9 products",
        kind="bias <&>",
        suggestion="build it again",
    )
    layers = (Layer(node="node_conv2d", operator="Conv", module="conv", output="relu", after_db=3.25, own_db=3.25),)
    found = Explanation(
        recipe="tiny", target="any-onnxruntime", scheme="fp32", departures=(departure,), layers=layers, compared=3
    )

    def work(out):
        store.write_json(out / "explanation.json", found.plain())
        return {}

    place = folder / "artifacts/tiny/explanation/any-onnxruntime/fp32"
    store.make(place, store.Key("explanation", {"engine": engine}), work)
    page = report.write(job, verdicts)
    text = opened(chromium, page).value("document.body.innerText")
    assert text.index("Not ready for release") < text.index("Conv in conv at model.py:17") < text.index("Targets\n")
    assert "bias <&>" in text
    assert "exportyard explain tiny --target any-onnxruntime" in text
    check_numbers(chromium, page)
    check_looks(chromium, page)
    assert "`model.py:17`" in (page.parent / "report.md").read_text()
    # an explanation of another engine would mislead
    store.make(place, store.Key("explanation", {"engine": "another"}), work)
    assert reports.load(report.write(job, verdicts))[1].explanations == ()


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


def test_doubts_are_in_the_report_and_on_the_terminal(tmp_path, capsys):
    workspaces.tiny(tmp_path, rows=workspaces.ROWS.replace('"int8-u8u8", "fp32"', '"fp32"'))
    np.savez(tmp_path / "recipes" / "tiny" / "calibration.npz", images=workspaces.images(4, 1) * 0.2)
    assert cli.invoke(["export", "tiny", "-C", str(tmp_path), "-t", "any-echo"]) == 0
    err = capsys.readouterr().err
    assert "warning: [calibration] has 4 rows" in err
    assert "warning: [calibration] input `images` goes from" in err
    text = (tmp_path / "artifacts/tiny/report/index.html").read_text()
    assert text.count("<strong>Warning:</strong>") == 2
