import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

from pipeline import calibrate, probe
from pipeline.calibrate import BINS, HALF, TensorStatistics
from pipeline.errors import DataError, StoreError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = hnp.arrays(np.float32, st.integers(0, 40), elements=FLOATS)


def same(one: TensorStatistics, two: TensorStatistics) -> bool:
    return (one.low, one.high, one.exponent, one.stray) == (two.low, two.high, two.exponent, two.stray) and bool(
        np.array_equal(one.counts, two.counts)
    )


@given(ARRAYS, ARRAYS)
def test_statistics_of_shards_merge_into_those_of_one_pass(one, two):
    whole = calibrate.observe(np.concatenate([one, two]))
    assert same(calibrate.joined(calibrate.observe(one), calibrate.observe(two)), whole)


@given(ARRAYS, ARRAYS, ARRAYS)
def test_merging_does_not_depend_on_order(one, two, three):
    a, b, c = ({"x": calibrate.observe(each)} for each in (one, two, three))
    left = calibrate.merge(calibrate.merge(a, b), c)
    right = calibrate.merge(c, calibrate.merge(b, a))
    assert same(left["x"], right["x"])


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=FLOATS))
def test_each_value_is_counted_in_the_bin_that_holds_it(values):
    seen = calibrate.observe(values)
    assert seen.counts.sum() == values.size
    assert (seen.low, seen.high) == (values.min(), values.max())
    for value in values.astype(np.float64):
        place = int(np.floor(np.ldexp(value, -seen.exponent))) + HALF
        assert seen.counts[place] > 0


def test_the_bins_are_as_fine_as_the_range_allows():
    seen = calibrate.observe(np.array([-3.0, 1.0, 2.5], np.float32))
    assert HALF / 2 <= 3.0 / 2.0**seen.exponent < HALF
    assert len(seen.edges) == BINS + 1
    assert seen.edges[HALF] == 0


def test_nan_and_infinity_are_counted_apart():
    seen = calibrate.observe(np.array([np.nan, -np.inf, 1.0, 2.0, np.inf], np.float32))
    assert (seen.low, seen.high, seen.stray, seen.counts.sum()) == (1.0, 2.0, 3, 2)
    nothing = calibrate.observe(np.array([np.nan], np.float32))
    both = calibrate.joined(nothing, seen)
    assert (both.low, both.high, both.stray) == (1.0, 2.0, 4)


def test_statistics_of_different_graphs_do_not_merge():
    seen = calibrate.observe(np.ones(3, np.float32))
    with pytest.raises(DataError, match="only one of them has `b`"):
        calibrate.merge({"a": seen}, {"a": seen, "b": seen})


def test_a_file_gives_back_what_was_saved_in_the_same_bytes_every_time(tmp_path):
    rng = np.random.default_rng(0)
    found = {name: calibrate.observe(rng.normal(size=1000)) for name in ("b", "a", "with space")}
    found["empty"] = calibrate.observe(np.zeros(0, np.float32))
    calibrate.save(found, tmp_path / "one")
    calibrate.save(dict(reversed(found.items())), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = calibrate.load(tmp_path / "one")
    assert set(again) == set(found)
    assert all(same(again[name], found[name]) for name in found)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "statistics.safetensors"
    calibrate.save({"a": calibrate.observe(np.ones(3, np.float32))}, path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StoreError, match="holds no calibration statistics"):
        calibrate.load(path)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["normal", "laplace", "exponential", "uniform"]))
def test_ranges_lie_inside_what_was_seen_and_percentiles_are_ordered(seed, shape):
    values = getattr(np.random.default_rng(seed), shape)(size=2000).astype(np.float32)
    seen = calibrate.observe(values)
    least, most = calibrate.range_of(seen, "minmax")
    assert (least, most) == (values.min(), values.max())
    for method in ("entropy", "percentile", "mse"):
        low, high = calibrate.range_of(seen, method)
        assert least <= low <= high <= most
    spans = [calibrate.range_of(seen, "percentile", percentile=cut) for cut in (90, 99, 99.9, 100)]
    assert all(one[0] >= two[0] and one[1] <= two[1] for one, two in itertools.pairwise(spans))
    assert spans[-1] == (least, most)


def test_percentile_keeps_the_share_that_it_promises():
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    low, high = calibrate.range_of(calibrate.observe(values), "percentile", percentile=99)
    assert np.mean((values >= low) & (values <= high)) == pytest.approx(0.99, abs=0.002)


def rounding_error(values: np.ndarray, low: float, high: float) -> float:
    step = (max(high, 0) - min(low, 0)) / 255
    levels = np.clip(np.round((values - min(low, 0)) / step), 0, 255) * step + min(low, 0)
    return float(np.mean((values - levels) ** 2))


@pytest.mark.parametrize("outlier", [8.0, 40.0])
def test_mse_finds_a_range_with_less_error_than_the_full_one(outlier):
    values = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    values[0] = outlier
    seen = calibrate.observe(values)
    chosen = rounding_error(values, *calibrate.range_of(seen, "mse"))
    best = min(rounding_error(values, -cut, cut) for cut in np.linspace(2, outlier, 200))
    assert chosen < rounding_error(values, seen.low, seen.high)
    assert chosen < 1.3 * best


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile", "mse"])
@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0, 3.0], [-1e-40, 0.0], [0.0, 3e38]])
def test_degenerate_tensors_have_ranges_too(method, values):
    low, high = calibrate.range_of(calibrate.observe(np.array(values, np.float32)), method)
    assert min(np.float32(values)) <= low <= high <= max(np.float32(values))


# --- through a model, against ONNX Runtime's own calibrators ---------------------------------------------------------


def small_net(path: Path) -> Path:
    """x [N, 3, 8, 8] -> two convolutions with a sum and a ReLU -> logits [N, 5]."""
    rng = np.random.default_rng(1)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array((rng.normal(size=shape) / 4).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="one", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w2"], ["b"], name="two", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a", "b"], ["c"], name="sum"),
        helper.make_node("Relu", ["c"], ["d"], name="cut"),
        helper.make_node("Conv", ["d", "w3"], ["e"], name="three"),
        helper.make_node("Flatten", ["e"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], name="head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [
            *(weight("w1", 8, 3, 3, 3), weight("b1", 8), weight("w2", 8, 8, 3, 3), weight("w3", 4, 8, 3, 3)),
            *(weight("w4", 5, 144), weight("b4", 5)),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def feeds(count: int, batch: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    return [{"x": rng.normal(size=(batch, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


class Reader:
    def __init__(self, samples):
        self.samples = iter(samples)

    def get_next(self):
        return next(self.samples, None)


def theirs(path: Path, method: CalibrationMethod, samples, **options) -> dict[str, tuple[float, float]]:
    calibrator = create_calibrator(
        path,
        ["Conv", "Add", "Relu", "Gemm"],
        augmented_model_path=str(path.with_suffix(".augmented.onnx")),
        calibrate_method=method,
        extra_options=options,
    )
    calibrator.collect_data(Reader(samples))
    data = calibrator.compute_data()
    return {name: tuple(np.asarray(end).item() for end in data[name].range_value) for name in data}


def test_minmax_is_exactly_that_of_onnxruntime(tmp_path):
    path, samples = small_net(tmp_path / "model.onnx"), feeds(6)
    ours = calibrate.ranges(calibrate.collect(path, samples), "minmax")
    reference = theirs(path, CalibrationMethod.MinMax, samples)
    assert set(ours) == {"x", "a", "b", "c", "d", "e", "f"}
    assert ours == {name: reference[name] for name in ours}


def test_percentile_is_that_of_onnxruntime_up_to_the_width_of_a_bin(tmp_path):
    path, samples = small_net(tmp_path / "model.onnx"), feeds(6)
    found = calibrate.collect(path, samples)
    reference = theirs(path, CalibrationMethod.Percentile, samples, percentile=99.0, symmetric=False)
    for name, (low, high) in calibrate.ranges(found, "percentile", percentile=99.0).items():
        width = (found[name].high - found[name].low) / 250
        assert reference[name] == pytest.approx((low, high), abs=width), name


def test_entropy_is_close_to_that_of_onnxruntime(tmp_path):
    path, rng = small_net(tmp_path / "model.onnx"), np.random.default_rng(3)
    # heavy tails, so that there is something to cut; one run, since theirs takes the width of its bins from the first
    samples = [{"x": rng.laplace(size=(500, 3, 8, 8)).astype(np.float32)}]
    found = calibrate.collect(path, samples)
    reference = theirs(path, CalibrationMethod.Entropy, samples, num_bins=512, num_quantized_bins=128)
    ours = calibrate.ranges(found, "entropy")
    # the measure is flat around its minimum, and theirs gives the rest of an uneven division to its last level;
    # not after the ReLU: theirs takes its many exact zeros for a peak to be kept at any cost
    for name in ("x", "a", "b", "c", "e"):
        reach = max(-found[name].low, found[name].high)
        assert ours[name] == pytest.approx(reference[name], abs=0.25 * reach), name
    assert max(ours["x"]) < 0.9 * found["x"].high
    assert ours["d"][1] > reference["d"][1]


def test_the_number_of_samples_and_their_batching_do_not_matter_to_the_counts(tmp_path):
    path = small_net(tmp_path / "model.onnx")
    singles = feeds(4)
    one = calibrate.collect(path, singles)
    two = calibrate.merge(calibrate.collect(path, singles[:1]), calibrate.collect(path, singles[1:]))
    assert all(same(one[name], two[name]) for name in one)


def test_a_large_graph_runs_in_segments_with_the_same_result(tmp_path, monkeypatch):
    path, samples = small_net(tmp_path / "model.onnx"), feeds(3, batch=2)
    whole = calibrate.collect(path, samples)
    monkeypatch.setattr(probe, "SEGMENT_BYTES", 3000)  # less than any two of its tensors
    cut = calibrate.collect(path, samples)
    assert all(same(whole[name], cut[name]) for name in whole)


def test_no_sample_and_a_sample_of_the_wrong_shape_are_errors(tmp_path):
    path = small_net(tmp_path / "model.onnx")
    with pytest.raises(DataError, match="no calibration sample"):
        calibrate.collect(path, [])
    with pytest.raises(DataError, match=r"can't run a calibration sample of shapes .*\[1, 4, 8, 8\]"):
        calibrate.collect(path, [{"x": np.zeros((1, 4, 8, 8), np.float32)}])
