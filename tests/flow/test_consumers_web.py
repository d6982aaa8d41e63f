"""The page and the Node program in examples/consumers: they get a release from a static server, check it and run it."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from pipeline import trust
from tests import browser, consumers, extras, workspaces
from tests.consumers import BUCKETS, EXAMPLES, ORT, ran

CORNERS = [(0.2, 0.2), (0.8, 0.2), (0.5, 0.5), (0.4, 0.9)]
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A pair of the publisher's, and one of somebody else."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("release", "other"):
        trust.keygen(folder / name)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, keys):
    """A signed release folder; not to be changed."""
    rows = consumers.ORT_ROW.format(name=ORT) + consumers.ORT_ROW.format(name=BUCKETS) + "    buckets = 'auto'\n"
    root = tmp_path_factory.mktemp("web") / "yard"
    return consumers.released(root, rows=rows, recipe=workspaces.RECIPE, model=workspaces.MODEL, key=keys / "release")


@pytest.fixture
def registry(folder, keys, tmp_path) -> Path:
    """A registry with the release, and the second assignment of the channel `prod`."""
    consumers.shelved(folder, tmp_path / "site" / "models", "prod", 2, keys / "release")
    return tmp_path / "site" / "models"


def spoil(registry: Path, folder: Path, name: str) -> None:
    """Flip a bit in the blob of a file of the release."""
    wanted = (folder / name).read_bytes()
    blob = next(path for path in (registry / "tiny/blobs/sha256").iterdir() if path.read_bytes() == wanted)
    blob.write_bytes(bytes([wanted[0] ^ 1]) + wanted[1:])


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Runs the Node program with words."""
    if shutil.which("node") is None:
        extras.skip("node is not installed")
    root = tmp_path_factory.mktemp("node")
    for name in ("browser", "node"):
        shutil.copytree(EXAMPLES / name, root / name, ignore=shutil.ignore_patterns("node_modules", "ort"))
    (root / "node" / "node_modules").symlink_to(browser.npm_modules(EXAMPLES / "node"))
    return lambda *words: ran("node", root / "node" / "check.mjs", *words)


@pytest.mark.parametrize("target", [ORT, BUCKETS])
def test_node_runs_a_release_folder(check, folder, target):
    code, told = check(folder, "--target", target)

    assert code == 0, told
    assert told.count("ok ") == 3


@pytest.mark.parametrize("ref", [(), ("1.0.0",), ("prod",)])
def test_node_runs_a_release_of_a_registry(check, registry, ref):
    with browser.served(registry) as url:
        code, told = check(url, "tiny", *ref)

    assert code == 0, told
    assert told.startswith(f"tiny v1.0.0, {ORT} (fp32)\n")


def test_node_says_what_it_can_not_run(check, folder, tmp_path):
    assert check(folder, "--target", "no-such") == (
        2,
        'check.mjs: the release has no engine of ONNX Runtime for "no-such"\n',
    )
    assert "ENOENT" in check(tmp_path)[1]


def test_node_refuses_what_was_not_published(check, registry, folder):
    spoil(registry, folder, f"engines/{ORT}/model.onnx")
    with browser.served(registry) as url:
        code, told = check(url, "tiny")
        unknown = check(url, "tiny", "stable")

    assert code == 2
    assert "has other bytes than were published (sha256 differs)" in told
    assert unknown == (2, 'check.mjs: tiny has no version or channel "stable"; it has v1.0.0, prod\n')


@pytest.mark.parametrize("source", ["folder", "version", "channel"])
def test_node_checks_signatures(check, folder, registry, keys, source):
    words = {"folder": (folder,), "version": ("URL", "tiny", "1.0.0"), "channel": ("URL", "tiny", "prod")}[source]
    with browser.served(registry) as url:
        good, bad = (
            check(*(url if word == "URL" else word for word in words), "--target", ORT, "--key", keys / f"{name}.pub")
            for name in ("release", "other")
        )
    what = "the channel prod" if source == "channel" else "the release"

    assert good[0] == 0, good[1]
    assert bad == (2, f"check.mjs: {what} is not signed with the key that was given\n")


def test_node_compares_what_lies_beside_with_the_signature(check, folder, keys, tmp_path):
    shutil.copytree(folder, tmp_path / "release")
    with (tmp_path / "release" / "sbom.json").open("a") as stream:
        stream.write(" ")
    code, told = check(tmp_path / "release", "--target", ORT, "--key", keys / "release.pub")

    assert (code, told) == (2, "check.mjs: sbom.json is not what was signed\n")


def entries(registry, change):
    """Change the entries of the index."""
    path = registry / "tiny" / "index.json"
    index = json.loads(path.read_text())
    index["manifests"] = change(index["manifests"])
    path.write_text(json.dumps(index))


def test_node_is_not_led_to_another_release(check, registry, keys):
    def renamed(found):
        for one in found:
            notes = one["annotations"]
            notes["dev.exportyard.version"] = "1.0.1"
            if "dev.exportyard.channel" not in notes:
                notes["org.opencontainers.image.ref.name"] = "v1.0.1"
        return found

    entries(registry, renamed)
    with browser.served(registry) as url:
        version = check(url, "tiny", "1.0.1")
        channel = check(url, "tiny", "prod", "--key", keys / "release.pub")

    assert version == (2, "check.mjs: the registry gives tiny v1.0.0 for tiny v1.0.1\n")
    assert channel == (2, "check.mjs: the registry says that prod is v1.0.1, which is not what was signed\n")


def test_node_wants_signatures_where_it_has_a_key(check, registry, keys):
    def unsigned(found):
        for one in found:
            one["annotations"].pop("dev.exportyard.statement", None)
        return found

    entries(registry, unsigned)
    with browser.served(registry) as url:
        channel = check(url, "tiny", "prod", "--key", keys / "release.pub")

    assert channel == (2, "check.mjs: tiny#prod is not signed\n")


def test_python_runs_what_the_puller_has_got(registry, tmp_path):
    with browser.served(registry) as url:
        options = ("--from", url, "--to", tmp_path / "tiny", "--target", "auto", "--backend", "onnxruntime")
        pulled = ran(sys.executable, "-I", registry / "exportyard-pull.py", "tiny#prod", *options)
    code, told = ran(sys.executable, "-I", EXAMPLES / "python_onnxruntime" / "release.py", tmp_path / "tiny")

    assert pulled[0] == 0, pulled[1]
    assert len([*(tmp_path / "tiny" / "engines").iterdir()]) == 1
    assert code == 0, told
    assert told.count("ok ") == 3


@pytest.fixture
def site(registry) -> Path:
    """What a static server needs: the page, the runtime and the registry."""
    root = registry.parent
    shutil.copytree(
        EXAMPLES / "browser", root, ignore=shutil.ignore_patterns("node_modules", "ort"), dirs_exist_ok=True
    )
    (root / "ort").mkdir()
    for name in RUNTIME:
        shutil.copy(browser.npm_modules(EXAMPLES / "browser") / "onnxruntime-web" / "dist" / name, root / "ort")
    return root


def test_the_page_reproduces_the_golden_vectors_and_reads_drawings(site, folder, keys, tmp_path):
    shutil.copy(keys / "release.pub", site)
    with browser.served(site) as url, browser.browser(tmp_path / "chromium") as page:
        page.open(f"{url}/index.html?recipe=tiny&ref=prod&key=release.pub")
        state, text = page.wait("document.body.dataset.state"), page.value("document.body.innerText")
        page.draw(CORNERS, "#pad")
        answer = page.wait("/^[0-3]$/.exec(document.getElementById('answer').textContent)?.[0]")
        shares = page.value("[...document.querySelectorAll('#bars span')].map((one) => parseFloat(one.textContent))")

        consumers.shelved(folder, site / "models", "prod", 1, keys / "release")
        page.open(f"{url}/index.html?recipe=tiny&ref=prod&key=release.pub&again=1")
        back = page.wait("document.body.dataset.state"), page.value("document.body.innerText")

        spoil(site / "models", folder, f"engines/{ORT}/model.onnx")
        page.open(f"{url}/index.html?recipe=tiny")
        refused = page.wait("document.body.dataset.state"), page.value("document.body.innerText")

    assert state == "ready", text
    assert "tiny v1.0.0" in text
    assert text.count("✓") == 3
    assert "This browser reproduces the release's golden vectors." in text
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert shares[int(answer)] == max(shares)
    assert "the signature, with the key" in text
    assert back[0] == "failed"
    assert "tiny#prod was turned back: 2 was seen here, the registry gives 1" in back[1]
    assert refused[0] == "failed"
    assert "has other bytes than were published (sha256 differs)" in refused[1]
