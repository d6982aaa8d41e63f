"""Lays a release out as a model repository of Triton Inference Server. Needs nothing but Python's standard library.

    python triton_repository.py RELEASE --to REPOSITORY [--target T]

writes REPOSITORY/<recipe>/config.pbtxt and REPOSITORY/<recipe>/<number>/model.onnx (or model.plan); release 1.2.3 is
number 1002003, since Triton counts versions. An engine with shape buckets becomes a model for each of them.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

TYPES = {
    "float64": "TYPE_FP64",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int16": "TYPE_INT16",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
# backends that Triton has, too: by the ending of the engine's file, the name that Triton looks for
BACKENDS = {
    "onnxruntime": {".onnx": "model.onnx", ".ort": "model.ort"},
    "tensorrt": {".engine": "model.plan"},
}
QUEUE_US = 2000  # how long a request may wait for others


class LayoutError(Exception):
    """What is asked for can't be laid out."""


def lay_out(release, repository, target=None):
    """Write the models of one engine; returns their folders, with the number of the version.

    Raises:
        LayoutError: no such engine, one that Triton has no backend for, or a file that isn't what was published.
    """
    manifest = json.loads((release / "manifest.json").read_text())
    target = target or _only(release, manifest)
    if target not in manifest["engines"]:
        raise LayoutError(f"the release has no engine for `{target}`; it has {', '.join(manifest['engines'])}")
    engine = manifest["engines"][target]
    if engine["target"]["backend"] not in BACKENDS:
        raise LayoutError(f"Triton has no backend for `{target}`; it has one for {' and '.join(BACKENDS)}")
    files = {file["path"]: file for file in engine["files"]}
    made = []
    for part in engine.get("selector", {}).get("buckets") or [{"sizes": {}, "files": [*files]}]:
        name = "-".join([manifest["recipe"], *(f"{axis}{size}" for axis, size in part["sizes"].items())])
        made.append(_model(release, repository / name, manifest, engine, [files[path] for path in part["files"]], part))
    return made


def _only(release, manifest):
    there = [
        name
        for name, engine in manifest["engines"].items()
        if engine["target"]["backend"] in BACKENDS and (release / engine["files"][0]["path"]).exists()
    ]
    if len(there) != 1:
        raise LayoutError(f"name a target: {', '.join(there) or 'none'} would do")
    return there[0]


def number(version):
    """Triton's number for a semantic version; later versions have higher numbers."""
    major, minor, patch = (int(part) for part in version.split("-")[0].split("."))
    return (major * 1000 + minor) * 1000 + patch


def _model(release, folder, manifest, engine, files, part):
    names = BACKENDS[engine["target"]["backend"]]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        fresh = Path(temporary) / "version"
        fresh.mkdir()
        for file in files:
            own = Path(file["path"])
            if own.suffix != ".json":
                # weights beside a graph are found by their own name
                _copy(release / own, fresh / names.get(own.suffix, own.name), file["sha256"])
        place = folder / str(number(manifest["version"]))
        shutil.rmtree(place, ignore_errors=True)
        fresh.rename(place)
    model = next(names[Path(file["path"]).suffix] for file in files if Path(file["path"]).suffix in names)
    warmup = _warmup(release, manifest, part)
    for name, content in warmup.items():
        (folder / "warmup").mkdir(exist_ok=True)
        (folder / "warmup" / name).write_bytes(content)
    config = _config(folder.name, manifest, engine, part, model) + _warmup_text(manifest, warmup)
    (folder / "config.pbtxt").write_text(config)
    return place


def _copy(source, to, sha256):
    hashed = hashlib.sha256()
    with source.open("rb") as reader, to.open("wb") as writer:
        while block := reader.read(1 << 20):
            hashed.update(block)
            writer.write(block)
    if hashed.hexdigest() != sha256:
        raise LayoutError(f"`{source}` has other bytes than were published (sha256 differs)")


def _batch_axis(signature):
    """The axis that is the first of every input and output, if there is one."""
    firsts = {spec["shape"][0] if spec["shape"] else None for spec in signature["inputs"] + signature["outputs"]}
    return firsts.pop() if len(firsts) == 1 and firsts <= set(signature["axes"]) else None


def _config(name, manifest, engine, part, model):
    signature, row = manifest["signature"], engine["target"]
    axis = None if part["sizes"] else _batch_axis(signature)
    gpu = row["backend"] == "tensorrt" or row["options"].get("provider", "cpu") != "cpu"
    lines = [
        f"# {manifest['recipe']} v{manifest['version']}, {row['name']} ({engine['scheme']})",
        f'name: "{name}"',
        f'backend: "{row["backend"]}"',
        f'default_model_filename: "{model}"',
        f"max_batch_size: {signature['axes'][axis]['max'] if axis else 0}",
        f"instance_group [{{ kind: {'KIND_GPU' if gpu else 'KIND_CPU'} }}]",
        *(_tensor("input", spec, part["sizes"], axis) for spec in signature["inputs"]),
        *(_tensor("output", spec, part["sizes"], axis) for spec in signature["outputs"]),
    ]
    # int8-dynamic takes its ranges from all that it is given: one request would change another's answer
    if axis and engine["scheme"] != "int8-dynamic":
        best = signature["axes"][axis]["opt"]
        lines.append(f"dynamic_batching {{ preferred_batch_size: [{best}] max_queue_delay_microseconds: {QUEUE_US} }}")
    if row["options"].get("optimization") == "all":
        lines.append("optimization { graph { level: -1 } }  # it is laid out for its CPU already")
    return "\n".join(lines) + "\n"


def _tensor(kind, spec, sizes, axis):
    shape = spec["shape"][1:] if axis else spec["shape"]
    dims = [sizes.get(dim, -1) if isinstance(dim, str) else dim for dim in shape]
    text = f'name: "{spec["name"]}" data_type: {TYPES[spec["dtype"]]} '
    # a tensor of Triton's has a dimension beside the batch's
    text += f"dims: {dims}" if dims else "dims: [1] reshape { shape: [] }"
    return f"{kind} [{{ {text} }}]"


def _warmup(release, manifest, part):
    """The inputs of the smallest golden case, by name, with which Triton tries a model before it is ready."""
    sizes = manifest["golden"]["cases"].get("min")
    axis = _batch_axis(manifest["signature"])
    if part["sizes"] or sizes is None or axis is None:
        return {}
    content = (release / manifest["golden"]["file"]["path"]).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    found = {}
    for spec in manifest["signature"]["inputs"]:
        first, end = header[f"min/in/{spec['name']}"]["data_offsets"]
        found[spec["name"]] = content[start + first : start + end]
    return found


def _warmup_text(manifest, warmup):
    if not warmup:
        return ""
    signature, sizes = manifest["signature"], manifest["golden"]["cases"]["min"]
    inputs = []
    for spec in signature["inputs"]:
        dims = [sizes[dim] if isinstance(dim, str) else dim for dim in spec["shape"][1:]] or [1]
        value = f'data_type: {TYPES[spec["dtype"]]} dims: {dims} input_data_file: "{spec["name"]}"'
        inputs.append(f'  inputs {{ key: "{spec["name"]}" value {{ {value} }} }}')
    batch = sizes[_batch_axis(signature)]
    return "\n".join(['model_warmup [{ name: "golden"', f"  batch_size: {batch}", *inputs, "}]"]) + "\n"


def main():
    """Lay out what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", type=Path, help="a folder, as `exportyard pull` makes it")
    parser.add_argument("--to", type=Path, required=True, help="the model repository")
    parser.add_argument("--target", help="which engine, if there are several that Triton can run")
    arguments = parser.parse_args()
    try:
        for folder in lay_out(arguments.release, arguments.to, arguments.target):
            print(folder)
    except (LayoutError, OSError) as error:
        print(f"triton_repository.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
