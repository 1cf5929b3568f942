"""Text by client as sequences of characters, for models that predict the next one."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

PADDING = -1
"""The target where there is no character: the loss leaves it out."""


def sequences(
    text_by_client: Sequence[UInt8[np.ndarray, " _"]],
    length: int = 64,
    vocabulary: UInt8[np.ndarray, " token"] | None = None,
) -> tuple[
    Int[np.ndarray, "example position"], Int[np.ndarray, "example position"], Int[np.ndarray, " example"], UInt8[np.ndarray, " token"]
]:
    """Cuts each client's text into windows that do not overlap; the target is the character that follows.

    The rest of a text that is shorter than a window is dropped below length / 2, else padded: `x` with token 0, `y`
    with `PADDING`.

    Args:
      text_by_client: the bytes of each client's text, one byte a character.
      length: positions of a window.
      vocabulary: the distinct bytes, sorted; token t stands for vocabulary[t]. None takes those of the texts.

    Returns:
      (x, y, client_ids, vocabulary); x and y are int32 tokens, client_ids the place of the client in
      `text_by_client`. Windows are sorted by client, then by position in the text.

    Raises:
      ValueError: if `length` is not positive, a character is not in `vocabulary`, or no text gives a window.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, not {length}")
    if vocabulary is None:
        present = np.zeros(256, bool)
        for text in text_by_client:
            present[text] = True
        vocabulary = np.flatnonzero(present).astype(np.uint8)
    token = np.full(256, PADDING, np.int32)
    token[vocabulary] = np.arange(len(vocabulary))
    if any((token[text] == PADDING).any() for text in text_by_client):
        raise ValueError("vocabulary must hold every character of text_by_client")
    windows = [_windows(token[text], length) for text in text_by_client]
    if not any(len(x) for x, _ in windows):
        raise ValueError(f"text_by_client has no text of {length // 2 + 2} characters or more: nothing fills a window of {length}")
    x, y = (np.concatenate(parts) for parts in zip(*windows, strict=True))
    return x, y, np.repeat(np.arange(len(windows)), [len(x) for x, _ in windows]), vocabulary


def _windows(tokens, length):
    """The windows of one text, as (x, y)."""
    pairs = max(len(tokens) - 1, 0)
    num_windows = pairs // length + (2 * (pairs % length) >= length)
    used = min(pairs, num_windows * length)
    x = np.zeros(num_windows * length, np.int32)
    y = np.full(num_windows * length, PADDING, np.int32)
    x[:used], y[:used] = tokens[:used], tokens[1 : used + 1]
    return x.reshape(num_windows, length), y.reshape(num_windows, length)
