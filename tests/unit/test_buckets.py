"""Shape buckets: which sizes a row gets, which bucket an input goes to, what is padded and cut."""

import contextlib

import numpy as np
import pytest

from pipeline import buckets, dims, padding, store
from pipeline.errors import BuildError
from pipeline.store import Key, write_json
from pipeline.types import Axis, Signature, Target, TensorSpec, Tolerance

AXES = {"batch": Axis(min=1, opt=4, max=8), "seq": Axis(min=4, opt=64, max=256)}


def signature(*outputs, axes=AXES):
    inputs = {"ids": ("int64", ("batch", "seq")), "mask": ("bool", ("batch", "seq")), "scale": ("float32", (2,))}
    return Signature(
        inputs=tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in inputs.items()),
        outputs=tuple(TensorSpec(name=f"out_{n}", dtype="float32", shape=shape) for n, shape in enumerate(outputs)),
        axes=axes,
    )


def row(sizes, **changes):
    table = {
        "name": "here",
        "backend": "echo",
        "platform": "any",
        "machine": "any",
        "arch": "none",
        "schemes": ["fp32"],
        "vs_onnx": {"fp32": Tolerance(max_abs=0)},
        "buckets": sizes,
    }
    return Target.model_validate(table | changes)


PLAIN = signature(("batch", 8))


@pytest.mark.parametrize(
    ("dim", "size"),
    [
        (7, 7),
        ("batch", 3),
        ("2*batch + 1", 7),
        ("((seq//2)) - 1", 4),
        ("(((seq - 1)//2)) + 1", 5),
        ("Max(1, batch - 9)", 1),
        ("Mod(seq, 4)", 2),
        ("-batch + seq**2", 97),
    ],
)
def test_a_dimension_has_the_size_that_it_says(dim, size):
    assert dims.size_of(dim, {"batch": 3, "seq": 10}) == size


@pytest.mark.parametrize(
    ("dim", "match"),
    [("sqrt(batch)", "can't read the dimension `sqrt"), ("data_0", "`data_0` isn't decided by the axes")],
)
def test_a_dimension_that_can_not_be_told_is_named(dim, match):
    with pytest.raises(BuildError, match=match):
        dims.size_of(dim, {"batch": 4})


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ("auto", [(4, 64), (4, 256), (8, 64), (8, 256)]),
        ({"batch": [1], "seq": [32, 128]}, [(1, 32), (1, 128)]),
        ({"batch": [1, 64], "seq": [2, 16]}, [(1, 16), (8, 16)]),
        ({"seq": [256, 512], "width": [3]}, [(4, 256), (8, 256)]),
        (None, []),
    ],
)
def test_a_bucket_for_each_combination_within_range(sizes, found):
    planned = buckets.plan(row(sizes), PLAIN)

    assert [tuple(one.sizes.values()) for one in planned] == found
    assert [one.folder for one in planned] == [f"batch{batch}-seq{seq}" for batch, seq in found]


def test_a_model_of_fixed_sizes_needs_no_buckets():
    fixed = Signature(inputs=(TensorSpec(name="x", dtype="float32", shape=(4,)),), outputs=(), axes=AXES)

    assert buckets.plan(row("auto"), fixed) == ()


@pytest.mark.parametrize(
    ("sizes", "outputs", "match"),
    [
        (
            {"seq": [1, 2]},
            [("batch",)],
            r"(?s)no bucket for axis `seq`: \[1, 2\] is all below its min, 4.*from 4 to 256",
        ),
        ("auto", [("batch",), ("data_0", 3)], "(?s)no buckets for output `out_1`.*`data_0`.*take `buckets` out"),
    ],
)
def test_what_buckets_can_not_serve_is_refused(sizes, outputs, match):
    with pytest.raises(BuildError, match=match):
        buckets.plan(row(sizes), signature(*outputs))


def test_an_axis_that_may_be_misspelt_is_told():
    assert buckets.doubts(row({"bach": [1]}), PLAIN) == [
        "`here`: `buckets` has sizes for `bach`, the model has `batch`, which gets its opt and max"
    ]
    assert buckets.doubts(row({"batch": [1], "bach": [1], "width": [7]}), PLAIN) == []


def test_a_bucket_is_a_model_of_fixed_sizes():
    found = buckets.at(signature(("2*seq", "batch", 3)), {"batch": 2, "seq": 16})

    assert [spec.shape for spec in found.inputs] == [(2, 16), (2, 16), (2,)]
    assert [spec.shape for spec in found.outputs] == [(32, 2, 3)]
    assert found.axes == {}


def test_together_they_serve_up_to_the_largest():
    found = buckets.served(PLAIN, buckets.plan(row({"batch": [1, 2], "seq": [32, 256]}), PLAIN))

    assert found.axes == {"batch": Axis(min=1, opt=2, max=2), "seq": Axis(min=4, opt=64, max=256)}


@pytest.mark.parametrize(
    ("sizes", "folder"),
    [
        ((1, 4), "batch1-seq32"),
        ((1, 32), "batch1-seq32"),
        ((1, 33), "batch1-seq128"),
        ((2, 5), "batch8-seq32"),
        ((8, 128), "batch8-seq128"),
    ],
)
def test_the_first_that_holds_an_input_is_the_smallest(sizes, folder):
    planned = buckets.plan(row({"batch": [1, 8], "seq": [32, 128]}), PLAIN)
    wanted = dict(zip(AXES, sizes, strict=True))
    found = buckets.smallest(planned, wanted)

    assert found.folder == folder
    assert buckets.smallest(planned, {"batch": 9, "seq": 4}) is None


def test_edges_are_full_buckets_and_the_emptiest():
    planned = buckets.plan(row({"batch": [1, 8], "seq": [32, 128]}), PLAIN)
    served = buckets.served(PLAIN, planned)
    found = buckets.edges(served.axes, planned)

    assert {one["batch"] for one in found if one["seq"] == 64} == {1, 2, 8}
    assert {one["seq"] for one in found if one["batch"] == 4} == {4, 32, 33, 128}
    assert found[-1] == {"batch": 2, "seq": 33}
    assert buckets.edges(AXES, ()) == []


# --- running them --------------------------------------------------------------------------------------------------

SUMS = signature(("batch",), ("seq", "batch"), ("2*batch", 1), (3,))
FEEDS = {
    "ids": np.arange(1, 7).reshape(1, 6),
    "mask": np.ones((1, 6), bool),
    "scale": np.ones(2, np.float32),
}


def test_zeros_are_put_behind_and_cut_off():
    whole = padding.padded(FEEDS, SUMS, {"batch": 2, "seq": 8})

    assert whole["ids"].tolist() == [[1, 2, 3, 4, 5, 6, 0, 0], [0] * 8]
    assert whole["mask"].sum() == 6
    assert whole["mask"].dtype == bool
    assert whole["scale"] is FEEDS["scale"]
    outputs = {
        "out_0": np.array([5.0, 0.0]),
        "out_1": np.arange(16.0).reshape(8, 2),
        "out_2": np.arange(4.0).reshape(4, 1),
        "out_3": np.ones(3),
    }
    found = padding.cut(outputs, SUMS, {"batch": 1, "seq": 6})
    assert found["out_0"].tolist() == [5.0]
    assert found["out_1"].tolist() == [[0.0], [2.0], [4.0], [6.0], [8.0], [10.0]]
    assert found["out_2"].tolist() == [[0.0], [1.0]]
    assert found["out_3"] is outputs["out_3"]
    assert all(array.flags.c_contiguous for array in found.values())


@pytest.fixture
def engine(tmp_path):
    planned = buckets.plan(row({"batch": [1, 8], "seq": [32]}), PLAIN)

    def work(out):
        for one in planned:
            (out / one.folder).mkdir()
            (out / one.folder / "model").write_text(one.folder)
        write_json(out / "signature.json", buckets.served(PLAIN, planned).plain())
        write_json(out / buckets.FILE, buckets.Index(buckets=planned).plain())
        return {"buckets": {one.folder: {"name": one.folder} for one in planned}}

    return store.make(tmp_path / "engine", Key("engine"), work).stored


class Loader:
    """Loads what answers how many rows it was given; remembers what is loaded."""

    def __init__(self, broken=None):
        self.now, self.seen, self.broken = [], [], broken

    @contextlib.contextmanager
    def __call__(self, part):
        name = part.file("model").read_text()
        assert part.artifact.facts == {"name": name}
        if name == self.broken:
            raise BuildError("broken")
        self.now.append(name)
        self.seen.append(name)
        try:
            yield lambda feeds: {"out_0": np.full((len(feeds["ids"]), 8), len(feeds["ids"]), np.float32)}
        finally:
            self.now.remove(name)


def texts(batch, seq=5):
    return {"ids": np.ones((batch, seq), int), "mask": np.ones((batch, seq), bool), "scale": np.ones(2, np.float32)}


@pytest.mark.parametrize(("room", "first", "loads"), [(None, 2, 2), (1, 1, 3)])
def test_inputs_go_to_their_bucket(engine, room, first, loads):
    load = Loader()
    with padding.Shelf(engine, load, room) as shelf:
        assert len(load.now) == first
        for batch, held in ((1, 1), (3, 8), (8, 8), (1, 1)):
            found = shelf.run(texts(batch))["out_0"]
            assert found.shape == (batch, 8)
            assert (found == held).all()
        assert len(load.now) == first
    assert load.now == []
    assert len(load.seen) == loads


def test_when_one_is_broken_none_stays_loaded(engine):
    load = Loader(broken="batch8-seq32")

    with pytest.raises(BuildError, match="broken"), padding.Shelf(engine, load, None):
        pytest.fail("it was loaded")
    assert load.now == []
    assert load.seen == ["batch1-seq32"]


def rows(feeds):
    assert len(feeds["ids"]) <= 8
    return {"out_0": feeds["ids"][:, :1] * feeds["scale"][0]}


def test_more_rows_than_are_served_are_asked_for_in_parts():
    given = texts(19) | {"ids": np.arange(19 * 5).reshape(19, 5)}
    found = padding.in_parts(rows, PLAIN)(given)

    np.testing.assert_array_equal(found["out_0"][:, 0], given["ids"][:, 0])


@pytest.mark.parametrize(
    "outputs", [[("seq", "batch")], [("batch", "batch")], [("batch",), (3,)], [("2*batch",)], [()]]
)
def test_what_is_not_in_rows_is_asked_for_at_once(outputs):
    asked = []
    padding.in_parts(lambda feeds: asked.append(len(feeds["ids"])) or {}, signature(*outputs))(texts(19))

    assert asked == [19]


@pytest.mark.parametrize(
    ("batch", "seq", "whole", "parts"),
    [(1, 4, True, True), (8, 256, True, True), (19, 5, False, True), (19, 257, False, False), (8, 3, False, False)],
)
def test_what_is_served_whole_or_in_parts(batch, seq, whole, parts):
    assert padding.fits(texts(batch, seq), PLAIN) is whole
    assert padding.fits(texts(batch, seq), PLAIN, parts=True) is parts
