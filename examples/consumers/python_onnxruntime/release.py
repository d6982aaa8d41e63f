"""Runs an ONNX Runtime engine of a release folder. Needs numpy and onnxruntime, and nothing of exportyard.

As a program it checks the engine on the release's golden vectors: ``python release.py RELEASE [--target T]``.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class Engine:
    """One engine of the release in `folder`; without `target`, the only one that is there for ONNX Runtime.

    Call it with an array for each input by name; it answers with an array for each output by name.

    Raises:
        ValueError: the release has no such engine, or there are several.
    """

    def __init__(self, folder, target=None, threads=0):
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.target = target or self._only()
        if self.manifest["engines"].get(self.target, {}).get("target", {}).get("backend") != "onnxruntime":
            raise ValueError(f"the release has no engine of ONNX Runtime for `{self.target}`")
        self.entry = self.manifest["engines"][self.target]
        self.inputs = self.manifest["signature"]["inputs"]
        self.outputs = self.manifest["signature"]["outputs"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if self.entry["target"]["options"].get("optimization") == "all":
            # it is laid out for its CPU already; another one gets its layout as it is loaded
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # an engine of fixed sizes for each bucket, smaller before larger; or one for all sizes
        parts = self.entry.get("selector", {}).get("buckets") or [
            {"sizes": {}, "files": [file["path"] for file in self.entry["files"]]}
        ]
        self.parts = [
            (part["sizes"], onnxruntime.InferenceSession(self._model(part["files"]), options, ["CPUExecutionProvider"]))
            for part in parts
        ]

    def _only(self):
        there = [
            name
            for name, entry in self.manifest["engines"].items()
            if entry["target"]["backend"] == "onnxruntime" and self._model(f["path"] for f in entry["files"]).exists()
        ]
        if len(there) != 1:
            raise ValueError(f"name a target: {', '.join(there) or 'none'} would do")
        return there[0]

    def _model(self, paths):
        return self.folder / next(path for path in paths if path.endswith((".onnx", ".ort")))

    def serves(self, sizes):
        """Whether the engine takes inputs of these sizes of the axes."""
        axes = self.entry.get("selector", self.manifest["signature"])["axes"]
        return all(axes[name]["min"] <= size <= axes[name]["max"] for name, size in sizes.items())

    def __call__(self, feeds):
        """Outputs by name, for inputs by name."""
        shapes = ((spec["shape"], feeds[spec["name"]].shape) for spec in self.inputs)
        sizes = {axis: size for dims, shape in shapes for axis, size in zip(dims, shape, strict=True)}
        fitting = [part for part in self.parts if all(sizes[axis] <= n for axis, n in part[0].items())]
        if not fitting:
            raise ValueError(f"the engine has no bucket for {sizes}")
        fixed, session = fitting[0]
        names = [spec["name"] for spec in self.outputs]
        if not fixed:
            return dict(zip(names, session.run(names, feeds), strict=True))
        made = session.run(names, {spec["name"]: _filled(feeds[spec["name"]], spec, fixed) for spec in self.inputs})
        return {spec["name"]: _cut(array, spec, sizes) for spec, array in zip(self.outputs, made, strict=True)}

    def golden(self):
        """Each golden case whose sizes the engine serves: its name, inputs, and the outputs of eager PyTorch."""
        tensors = read_safetensors(self.folder / self.manifest["golden"]["file"]["path"])
        for case, sizes in self.manifest["golden"]["cases"].items():
            if self.serves(sizes):
                feeds = {spec["name"]: tensors[f"{case}/in/{spec['name']}"] for spec in self.inputs}
                yield case, feeds, {spec["name"]: tensors[f"{case}/out/{spec['name']}"] for spec in self.outputs}


def _filled(array, spec, sizes):
    whole = np.zeros([sizes.get(dim, dim) for dim in spec["shape"]], array.dtype)
    whole[tuple(map(slice, array.shape))] = array
    return whole


def _cut(array, spec, sizes):
    return array[tuple(slice(sizes.get(dim, dim)) for dim in spec["shape"])]


def read_safetensors(path):
    """Arrays by name: 8 bytes with the header's length, the header in JSON, the numbers."""
    content = Path(path).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(
            content, DTYPES[at["dtype"]], math.prod(at["shape"]), start + at["data_offsets"][0]
        ).reshape(at["shape"])
        for name, at in header.items()
    }


def fault(got, want, bound):
    """How far `got` is from `want`, in words, and whether that is too far. A NaN is too far from anything."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"is {got.dtype}{list(got.shape)}, expected {want.dtype}{list(want.shape)}", True
    if "argmax_agreement" in bound:
        share, least = float((got == want).mean()), bound["argmax_agreement"]
        return f"{share:.4f} equal, at least {least:.4f} expected", share < least
    with np.errstate(invalid="ignore"):
        far = np.abs(got.astype(np.float64) - want.astype(np.float64))
    far[got == want] = 0  # equal infinities, too
    worst = float(far.max(initial=0))
    return f"differs by {worst:.1e}, {bound['max_abs']:.1e} allowed", not worst <= bound["max_abs"]


def distances(engine):
    """For each output of each golden case: the case, the output, `fault`'s words, and whether that is too far."""
    for case, feeds, wanted in engine.golden():
        made = engine(feeds)
        for name, want in wanted.items():
            yield case, name, *fault(made[name], want, engine.entry["golden"][name])


def check(engine):
    """Run the golden vectors and print the distances; whether all are within bounds."""
    good = True
    for case, name, words, wrong in distances(engine):
        good = good and not wrong
        print(f"{'WRONG' if wrong else 'ok':6}{case:5}{name}: {words}")
    return good


def main():
    """Check the release that the command line names; 0 if its engine does what it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", help="a folder, as `exportyard pull` makes it")
    parser.add_argument("--target")
    arguments = parser.parse_args()
    try:
        engine = Engine(arguments.release, arguments.target)
    except (OSError, ValueError) as error:
        print(f"release.py: {error}", file=sys.stderr)
        return 2
    print(f"{engine.manifest['recipe']} v{engine.manifest['version']}, {engine.target} ({engine.entry['scheme']})")
    return 0 if check(engine) else 1


if __name__ == "__main__":
    sys.exit(main())
