"""Target rows: what the file may say, and what is said when it doesn't."""

from pathlib import Path

import pytest

from pipeline import backends, host, targets
from pipeline.errors import UsageError, WorkspaceError

ROW = """
[targets.here-echo]
backend = "echo"
platform = "any"
machine = "any"
arch = "none"
schemes = ["fp32"]
vs_onnx = { fp32 = { max_abs = 0.0 } }
"""
SHIPPED = Path(__file__).parents[2] / "targets" / "targets.toml"


def read(tmp_path, text):
    path = tmp_path / "targets.toml"
    path.write_text(text)
    return targets.read(path)


def test_shipped_rows_fit_their_backends():
    for name, row in targets.read(SHIPPED).items():
        backend = backends.find(row.backend)
        targets.check_options(row, backend.option_names)

        assert set(row.schemes) <= backend.schemes, name
        assert name.split("-")[0] in (row.platform, "rpi4", "jetson"), name
        assert name.endswith(row.backend), name
        assert row.summary, name


def test_every_backend_but_the_fake_has_a_row():
    rows = {row.backend for row in targets.read(SHIPPED).values()}

    assert rows >= {"aotinductor", "eager", "onnxruntime", "openvino", "stablehlo", "torch_compile", "torchscript"}
    assert rows >= {"coreml", "executorch", "litert", "tvm"}
    assert rows <= set(backends.names()) - {"echo"}


def test_rows_keep_the_order_of_the_file(tmp_path):
    rows = read(tmp_path, ROW + ROW.replace("here-echo", "a-first"))

    assert list(rows) == ["here-echo", "a-first"]


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('arch = "none"', 'arhc = "none"', "(?s)here-echo.*unknown key `arhc`.*did you mean `arch`"),
        ("max_abs = 0.0", "", "(?s)needs at least one bound"),
        ('["fp32"]', '["fp32", "fp16"]', "scheme `fp16` has no tolerance in `vs_onnx`"),
        ('["fp32"]', '["fp23"]', "(?s)schemes.*'fp23'"),
        ('machine = "any"', 'machine = "mips"', "(?s)`machine` = 'mips'"),
        ('arch = "none"', "", "(?s)`arch` is missing.*add `arch`"),
        ('schemes = ["fp32"]', "", "target `here-echo`: needs `schemes`"),
        ('arch = "none"', 'arch = "none"\ncandidates = ["x"]', "a row of the backend `auto` names the rows of `cand"),
        ('backend = "echo"', 'backend = "auto"\ncandidates = ["x"]', "`schemes` is for rows that are built"),
        ("[targets.here-echo]", "[target.here-echo]", "unknown table `target`"),
        ("[targets.here-echo]", "[targets.Here]", "(?s)target `Here`.*name"),
        ('backend = "echo"', "backend = echo", "is not valid TOML"),
        ('arch = "none"', 'arch = "none"\nbuckets = "all"', "(?s)`buckets` = 'all': expected \"auto\", or a table"),
        ('arch = "none"', 'arch = "none"\nbuckets = { batch = 8 }', "axis `batch` is 8: expected different sizes"),
        ('arch = "none"', 'arch = "none"\nbuckets = { batch = [] }', r"axis `batch` is \[\]: expected"),
        ('arch = "none"', 'arch = "none"\nbuckets = { batch = [0, 8] }', r"axis `batch` is \[0, 8\]: expected"),
        ('arch = "none"', 'arch = "none"\nbuckets = { batch = [8, 8] }', r"axis `batch` is \[8, 8\]: expected"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, match):
    assert old in ROW
    with pytest.raises(WorkspaceError, match=match) as caught:
        read(tmp_path, ROW.replace(old, new))
    assert len(str(caught.value).splitlines()) <= 10


@pytest.mark.parametrize(
    ("said", "found"),
    [('"auto"', {}), ("{}", {}), ("{ seq = [64, 32], batch = [1] }", {"seq": (32, 64), "batch": (1,)})],
)
def test_buckets_are_sizes_in_ascending_order(tmp_path, said, found):
    row = read(tmp_path, ROW + f"buckets = {said}\n")["here-echo"]

    assert row.buckets == found
    assert type(row).model_validate_json(row.model_dump_json()) == row
    assert read(tmp_path, ROW)["here-echo"].buckets is None


def test_misspelt_target_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"(?s)unknown target `linux-x86_64-tmv`.*`linux-x86_64-tvm`"):
        targets.select(targets.read(SHIPPED), ["linux-x86_64-tmv"])


def test_misspelt_option_suggests_the_nearest(tmp_path):
    row = read(tmp_path, ROW + "options = { sleep = 3 }\n")["here-echo"]

    with pytest.raises(UsageError, match=r"(?s)unknown option `sleep` in target `here-echo`.*`sleep_ms`"):
        targets.check_options(row, backends.find("echo").option_names)


def test_misspelt_backend_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"(?s)unknown backend `onxruntime`.*did you mean `onnxruntime`"):
        backends.find("onxruntime")


@pytest.mark.parametrize(
    ("requires", "lacking"),
    [
        ([], []),
        (["avx2", "fma"], []),
        (["avx512_vnni|avx_vnni"], []),
        (["avx2", "amx_int8", "sve|sve2"], ["amx_int8", "sve|sve2"]),
    ],
)
def test_a_requirement_may_offer_alternatives(monkeypatch, requires, lacking):
    monkeypatch.setattr(host, "cpu_features", lambda: frozenset({"avx2", "fma", "avx_vnni"}))

    assert host.lacking(requires) == lacking


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"platform": "ios"}, "it is for ios, this host is"),
        ({"machine": "wasm32"}, "it is for wasm32, this host is"),
        ({"requires": ("warp_drive|impulse",)}, "this CPU lacks warp_drive or impulse"),
    ],
)
def test_why_a_row_does_not_fit_this_host(tmp_path, changes, match):
    row = read(tmp_path, ROW)["here-echo"]

    assert targets.unfit(row) is None
    assert match in targets.unfit(row.model_copy(update=changes))
