"""Every backend that this host can build and run, held to the same promises."""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline import backends, host, samples, store
from pipeline.errors import BuildError, ExportyardError, UsageError
from pipeline.stages.build import build
from pipeline.store import Key
from pipeline.types import Target, Tolerance
from tests import extras

# option sets under which each backend keeps its promises; a plug-in without an entry is tried without options
OPTIONS = {
    "echo": [{"reference": True}],
    "onnxruntime": [{"optimization": "all"}, {"optimization": "basic", "threads": 1}, {"format": "ort"}],
    "openvino": [{}, {"import": "program"}],
    "tvm": [{}, {"import": "program"}],
} | {  # on a GPU
    "tensorrt": [{}, {"cuda_graph": True, "opt_profile": True}],
    "torch_tensorrt": [{}, {"format": "aoti"}, {"format": "engine"}],
    "tvm_cuda": [{}, {"import": "program"}],
}
OPTIONS["onnxruntime"] += [{"provider": "cuda"}, {"provider": "cuda", "cuda_graph": True}, {"provider": "tensorrt"}]
HEAVY = ("numpy", "torch", "onnx", "onnxruntime", "openvino", "tvm", "tensorrt", "torch_tensorrt")
HEAVY += ("executorch", "coremltools", "ai_edge_litert", "torchao")


def row(backend, options, **changes):
    table = {
        "name": f"here-{backend}",
        "backend": backend,
        "platform": host.system(),
        "machine": host.machine(),
        "arch": "native",
        "schemes": ["fp32"],
        "vs_onnx": {"fp32": Tolerance(max_over_peak=1e-4)},
        "options": options,
    }
    return Target.model_validate(table | changes)


NAMES = [name for name in backends.names() if name != "auto"]  # that one chooses between rows, and builds nothing
CASES = [(name, options) for name in NAMES for options in OPTIONS.get(name, [{}])]


def spell(case):
    name, options = case
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


@pytest.fixture(scope="session", params=CASES, ids=spell)
def engine(request, model, tmp_path_factory):
    """A backend, its row, and the engine that it built from one of the models."""
    name, options = request.param
    backend = backends.find(name)
    target = row(name, options, buckets="auto" if getattr(backend, "static_only", False) else None)
    reason = backend.missing(target) or backend.not_runnable(target)
    if reason is not None:
        extras.skip(reason)
    source = model.source(backend.source(target))
    folder = tmp_path_factory.mktemp(name)

    def make(place):
        key = Key("engine", {"model": source.digest})
        return store.make(folder / place, key, lambda out: build(source, target, "fp32", out)).stored

    return SimpleNamespace(backend=backend, target=target, make=make, built=make("first"), model=model)


@pytest.fixture(scope="session")
def run(engine):
    """Loaded once: some compile at every load."""
    with backends.loaded(engine.built, engine.target) as run:
        yield run


def feeds(engine, batch=2):
    return samples.feeds(engine.model.recipe, {"batch": batch}, seed=batch)


def test_equal_models_make_equal_bytes(engine):
    again = engine.make("second")

    assert again.artifact.files == engine.built.artifact.files


def test_engine_says_how_it_is_called(engine):
    assert engine.built.signature() == engine.model.onnx.signature()


def test_engine_serves_every_size_and_agrees_with_the_program(engine, run):
    eager = backends.find("eager")
    with eager.load(engine.model.program, row("eager", {})) as reference:
        for batch in (1, 2, 3, 4):
            given = feeds(engine, batch)
            want, got = reference(given), run(given)

            assert list(got) == [spec.name for spec in engine.built.signature().outputs]
            for name, array in want.items():
                assert got[name].dtype == array.dtype
                np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-5)


def test_returned_arrays_belong_to_the_caller(engine, run):
    given = feeds(engine)
    first = run(given)
    want = {name: array.copy() for name, array in first.items()}
    for array in first.values():
        array[...] = 7

    second = run(given)

    for name, array in want.items():
        np.testing.assert_array_equal(second[name], array)
        assert (first[name] == 7).all()


def test_feeds_are_left_alone_and_may_be_read_only(engine, run):
    given = feeds(engine)
    before = {name: array.copy() for name, array in given.items()}
    for array in given.values():
        array.setflags(write=False)

    run(given)

    for name, array in before.items():
        np.testing.assert_array_equal(given[name], array)


def test_strided_feeds_mean_what_they_say(engine, run):
    given = feeds(engine, 2)
    turned = {name: np.asfortranarray(array) if array.ndim else array for name, array in given.items()}

    for name, array in run(given).items():
        np.testing.assert_array_equal(run(turned)[name], array)


def test_order_of_feeds_means_nothing(engine, run):
    given = feeds(engine)
    turned = dict(reversed(given.items()))

    for name, array in run(given).items():
        np.testing.assert_array_equal(run(turned)[name], array)


def test_two_engines_at_once_do_not_mix(engine, run):
    with backends.loaded(engine.built, engine.target) as other:
        mine, its = feeds(engine, 1), feeds(engine, 4)
        want = run(mine)
        other(its)

        for name, array in run(mine).items():
            np.testing.assert_array_equal(array, want[name])


def wrong_name(given):
    name = next(iter(given))
    return {f"{name}_": given.pop(name)} | given


def no_input(given):
    given.popitem()
    return given


def wrong_dtype(given):
    name = next(iter(given))
    return given | {name: given[name].astype(np.float64)}


def wrong_rank(given):
    name = next(iter(given))
    return given | {name: given[name][None]}


def wrong_size(given):
    name = next(iter(given))
    return given | {name: np.concatenate([given[name], given[name]], axis=-1)}


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (wrong_name, "is not an input; did you mean"),
        (no_input, "is missing; got"),
        (wrong_dtype, "dtype is float64, expected float32"),
        (wrong_rank, r"shape is \[1, 2, .*\], expected \['batch'"),
        (wrong_size, r"shape is .*, expected \['batch'"),
    ],
)
def test_wrong_feeds_are_refused_in_words(engine, run, spoil, match):
    with pytest.raises(UsageError, match=match):
        run(spoil(feeds(engine)))


def test_sizes_out_of_range_are_refused(engine, run):
    most = engine.built.signature().axes["batch"].max
    given = {
        name: np.zeros((most + 1, *array.shape[1:]), array.dtype) if array.ndim else array
        for name, array in feeds(engine).items()
    }

    with pytest.raises(UsageError, match=f"axis `batch` is {most + 1}, outside 1 to {most}"):
        run(given)


def test_broken_files_are_a_build_error(engine, tmp_path):
    name = next(name for name in engine.built.artifact.files if name != "signature.json")

    def work(out):
        # nothing else of what the backend wrote there; with buckets, the other ones
        for file in map(Path, engine.built.artifact.files):
            (out / file).parent.mkdir(exist_ok=True)
            if file.name == "signature.json" or file.parent != Path(name).parent:
                shutil.copyfile(engine.built.path / file, out / file)
        (out / name).write_bytes(b"not an engine" * 100)
        return {}

    broken = store.make(tmp_path / "broken", Key("engine"), work).stored

    with pytest.raises(BuildError, match=name) as caught, backends.loaded(broken, engine.target):
        pytest.fail("a broken engine was loaded")
    assert len(str(caught.value).splitlines()) <= 10


@pytest.mark.parametrize("name", NAMES)
def test_questions_are_cheap_and_import_nothing_heavy(name):
    """`missing`, `not_runnable`, `tools` and `source` are asked at every start of the command line."""
    script = f"""
import sys, time
from pipeline import backends
from pipeline.types import Target, Tolerance
def row(**changes):
    table = dict(name="t", backend={name!r}, platform="linux", machine="x86_64", arch="native", schemes=["fp32"],
                 vs_onnx={{"fp32": Tolerance(max_abs=0)}})
    return Target.model_validate(table | changes)
start = time.process_time()
backend = backends.find({name!r})
for changes in (dict(), dict(machine="riscv64"), dict(platform="ios"), dict(requires=["warp_drive"]),
                dict(options={{"import": "nothing", "optimization": "all", "format": 7, "threads": "many"}})):
    target = row(**changes)
    for answer in (backend.missing(target), backend.not_runnable(target)):
        assert answer is None or answer.strip() and "\\n" not in answer, answer
    assert all(isinstance(text, str) for pair in backend.tools(target).items() for text in pair)
    assert backend.source(target) in ("onnx", "program")
print(time.process_time() - start)
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    seconds, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert float(seconds) < 0.25  # also finds the entry point, which reads the metadata of every package


def test_missing_answers_in_a_moment():
    for name in NAMES:
        backend, target = backends.find(name), row(name, {})
        backend.missing(target)
        start = time.process_time()
        backend.missing(target)
        backend.not_runnable(target)

        assert time.process_time() - start < 0.05, name


@pytest.mark.parametrize("name", NAMES)
def test_attributes_are_those_of_the_protocol(name):
    backend = backends.find(name)

    assert backend.name == name
    assert "fp32" in backend.schemes
    assert all(isinstance(option, str) for option in backend.option_names)


@pytest.mark.parametrize("name", NAMES)
def test_another_machine_is_not_runnable_here(name):
    elsewhere = row(name, {}, machine="riscv64", arch="generic")

    answer = backends.find(name).not_runnable(elsewhere) or ""
    assert "this host is" in answer or "is not installed" in answer


def test_errors_are_the_users(model, tmp_path):
    """Whatever a backend does with a graph that isn't one, it's an error with a message."""
    signature = model.onnx.file("signature.json").read_bytes()
    for name in NAMES:
        backend = backends.find(name)
        target = row(name, {}, buckets="auto" if getattr(backend, "static_only", False) else None)
        if backend.missing(target) is not None:
            continue
        files = {"model.onnx": b"\x08\x01nonsense", "program.pt2": b"nonsense", "signature.json": signature}

        def work(out, files=files):
            for file, content in files.items():
                (out / file).write_bytes(content)
            return {}

        nonsense = store.make(tmp_path / "nonsense", Key("onnx"), work).stored
        out = tmp_path / name
        out.mkdir()
        if name in ("echo", "eager"):
            continue  # they copy, and find out when they load
        with pytest.raises(ExportyardError, match=r"can't (build|import|load)"):
            build(nonsense, target, "fp32", out)
