"""The tutorial in docs/recipes.md, typed as it stands, works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
BIN = Path(sys.executable).parent


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_model_of_ones_own_in_five_minutes(tmp_path: Path) -> None:
    run(tmp_path, str(BIN / "exportyard"), "init", "yard")
    yard = tmp_path / "yard"
    (yard / "recipes" / "gestures").mkdir()
    files = re.findall(r"```(?:python|toml)\n# (recipes/\S+)\n(.*?)```", TEXT, re.DOTALL)
    assert len(files) == 3
    for name, text in files:
        (yard / name).write_text(text)
    run(yard, str(BIN / "python"), "recipes/gestures/train.py")
    table = run(yard, str(BIN / "exportyard"), "export", "gestures", "--target", "any-python-eager")
    assert re.search(r"any-python-eager .*passed", table)
    assert "gestures" in run(yard, str(BIN / "exportyard"), "recipes")
