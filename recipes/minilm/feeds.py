"""Random inputs of any size. A value range can't describe them: a mask is a run of ones, then zeros."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

START, END, FIRST_WORD, VOCABULARY = 101, 102, 1000, 30522


def random_texts(sizes: Mapping[str, int], seed: int) -> dict[str, NDArray[np.int64]]:
    """Random words in texts of random length, at least two words; the first text is as long as can be."""
    batch, seq = sizes["batch"], sizes["seq"]
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, seq, batch, endpoint=True)  # start, two words, end
    lengths[0] = seq
    place = np.arange(seq)[None, :]
    ids = rng.integers(FIRST_WORD, VOCABULARY, (batch, seq))
    ids[:, 0] = START
    ids[place == lengths[:, None] - 1] = END
    mask = (place < lengths[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask}
