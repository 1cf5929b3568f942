"""Sequences of characters, against windows cut in plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.data import text


def as_bytes(string):
    return np.frombuffer(string.encode(), np.uint8)


@settings(deadline=None)
@given(texts=st.lists(st.text("abcde", max_size=40), min_size=1, max_size=5), length=st.integers(1, 9))
def test_sequences_equal_slow_windows(texts, length):
    expected = []
    for client, string in enumerate(texts):
        for start in range(0, max(len(string) - 1, 0), length):
            following = string[start + 1 : start + 1 + length]
            if len(following) >= length / 2:
                expected.append((client, string[start : start + len(following)], following))
    arrays = [as_bytes(string) for string in texts]
    if not expected:
        with pytest.raises(ValueError, match="text_by_client has no text"):
            text.sequences(arrays, length)
        return
    x, y, client_ids, vocabulary = text.sequences(arrays, length)
    assert list(map(chr, vocabulary)) == sorted(set("".join(texts)))
    assert x.dtype == y.dtype == np.int32 and x.shape == y.shape == (len(expected), length)
    for row, (client, window, following) in enumerate(expected):
        real = y[row] != text.PADDING
        assert client_ids[row] == client and real.sum() == len(window)
        assert "".join(chr(vocabulary[token]) for token in x[row][real]) == window
        assert "".join(chr(vocabulary[token]) for token in y[row][real]) == following
        assert (x[row] >= 0).all()


def test_sequences_errors():
    with pytest.raises(ValueError, match="length must be at least 1"):
        text.sequences([as_bytes("abc")], 0)
    with pytest.raises(ValueError, match="vocabulary must hold every character"):
        text.sequences([as_bytes("abc")], 2, as_bytes("ab"))
    x, _, _, vocabulary = text.sequences([as_bytes("bcb")], 2, as_bytes("abc"))
    assert x.tolist() == [[1, 2]] and len(vocabulary) == 3
