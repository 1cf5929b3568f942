"""Compression of single tensors: quantisation, rotation and top-k against slow NumPy, and their bytes against bits that are written."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from fedmoe_jax import aggregation
from fedmoe_jax.aggregation.chain import Message, Wire, num_bytes
from fedmoe_jax.aggregation.compression import rotated, unrotated

KEY, SIZE = jax.random.key(0), 37
CHAINS = {
    "quantize": (aggregation.quantize(bits=8),),
    "rotate": (aggregation.quantize(bits=4, rotate=True),),
    "sparsify": (aggregation.sparsify(share=0.05),),
    "half": (aggregation.sparsify(share=0.5),),
    "both": (aggregation.sparsify(share=0.2), aggregation.quantize(bits=3)),
    "all": (aggregation.sparsify(share=0.2), aggregation.quantize(bits=5, rotate=True)),
    "whole": (aggregation.sparsify(share=1.0), aggregation.quantize(bits=2)),
}
seeds = st.integers(0, 2**32 - 1)


UNIFORM = np.asarray(jax.random.uniform(KEY, (SIZE,)))


@functools.cache
def sender(*transforms):
    """send(key, values) -> the message of one tensor."""

    @jax.jit
    def send(key, values):
        message = Message(values)
        for transform in transforms:
            ((), (message,)) = transform.apply(([], [key]), ([], [message]))
        return message

    return send


def draw(seed, size=SIZE):
    """Values of very different magnitude, a few zeros among them."""
    random = np.random.default_rng(seed)
    values = random.normal(size=size) * 10.0 ** random.integers(-3, 4, size)
    return np.where(random.random(size) < 0.1, 0, values).astype(np.float32)


def quantized(uniform, values, bits):
    """The definition, one value after the other, in float64."""
    levels = 2 ** (bits - 1) - 1
    largest = max(abs(float(value)) for value in values)
    out = []
    for value, chance in zip(values, uniform, strict=True):
        steps = float(value) / largest * levels if largest else 0.0
        below = math.floor(steps)
        out.append((below + (chance < steps - below)) * largest / levels)
    return np.array(out)


@functools.cache
def _bits(bits):
    return aggregation.quantize(bits=bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_quantisation_is_its_definition(bits, seed):
    values = draw(seed)
    got = jax.device_get(sender(_bits(bits))(KEY, jnp.array(values)))
    step = np.abs(values).max() / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(got.values, quantized(UNIFORM, values, bits), rtol=1e-5, atol=1e-5 * step)
    assert got.index is None and (np.abs(got.values - values) < step * (1 + 1e-5)).all()
    assert (np.asarray(got.values)[values == 0] == 0).all()
    top = np.abs(values).argmax()
    np.testing.assert_allclose(got.values[top], values[top], rtol=1e-6)


@pytest.mark.parametrize("rotate", [False, True])
def test_quantisation_is_right_on_average_and_varies_as_qsgd_does(rotate):
    values, count, bits = draw(3), 4000, 3
    keys = jax.random.split(KEY, count)
    got = np.asarray(jax.vmap(sender(aggregation.quantize(bits=bits, rotate=rotate)), (0, None))(keys, jnp.array(values)).values, float)
    # Of a rotated tensor the step follows from its own largest value, at most the norm.
    step = (np.linalg.norm(values) if rotate else np.abs(values).max()) / (2 ** (bits - 1) - 1)
    deviation = step / 2  # at most, of a value between two steps
    assert np.abs(got.mean(0) - values).max() < 5 * deviation / count**0.5
    square = ((got - values) ** 2).sum(1)
    assert square.mean() < SIZE * deviation**2 * (1 + 5 / count**0.5)
    if not rotate:
        low = values / step - np.floor(values / step)
        expected = (low * (1 - low)).sum() * step**2
        assert abs(square.mean() - expected) < 5 * square.std() / count**0.5


def test_nothing_and_almost_nothing_and_very_much_stay_finite():
    for transforms in CHAINS.values():
        for size in (0.0, 1e-44, 1e-30, 1e37):
            values = jnp.full(SIZE, size).at[1::2].multiply(-1)
            got = sender(*transforms)(KEY, values).values
            assert np.isfinite(got).all() and (np.abs(got) <= 6.1 * np.float32(size)).all()


@settings(max_examples=30, deadline=None)
@given(seed=seeds)
def test_rotation_is_an_orthogonal_matrix(seed):
    values = draw(seed)
    turned = jax.jit(rotated)(KEY, jnp.array(values))
    words = np.asarray(jax.random.bits(KEY, (2, 1), jnp.uint32))[:, 0]
    signs = np.array([1.0 - 2.0 * (int(word) >> bit & 1) for word in words for bit in range(32)])
    padded = np.concatenate([values, np.zeros(64 - SIZE)])
    norm = np.linalg.norm(padded)
    np.testing.assert_allclose(turned, hadamard(64) @ (signs * padded) / 8, atol=1e-6 * norm)
    np.testing.assert_allclose(np.linalg.norm(turned), norm, rtol=1e-5)
    back = jax.jit(unrotated, static_argnums=2)(KEY, turned, SIZE)
    np.testing.assert_allclose(back, values, atol=1e-6 * norm)


def test_rotation_helps_a_tensor_of_a_few_large_values():
    values = jnp.array(np.random.default_rng(0).normal(size=1000), jnp.float32).at[:3].set(1000.0)
    error = {
        rotate: float(((sender(aggregation.quantize(bits=4, rotate=rotate))(KEY, values).values - values) ** 2).sum())
        for rotate in (False, True)
    }
    assert error[True] < 0.5 * error[False]


@functools.cache
def _top(share):
    return aggregation.sparsify(share=share)


@pytest.mark.parametrize(("share", "number"), [(0.01, 1), (0.05, 2), (0.5, 19), (1 / 37, 1), (0.999, 37)])
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_the_largest_travel(share, number, seed):
    values = draw(seed)
    got = jax.device_get(sender(_top(share))(KEY, jnp.array(values)))
    if number == SIZE:
        assert got.index is None
        return np.testing.assert_array_equal(got.values, values)
    index = np.asarray(got.index)
    assert len(set(index.tolist())) == number == len(index)
    np.testing.assert_array_equal(got.values, values[index])
    left = np.delete(np.abs(values), index)
    assert np.abs(values)[index].min() >= left.max()


def test_a_share_that_rounding_makes_more_is_not():
    assert 0.07 * 100 > 7
    assert sender(aggregation.sparsify(share=0.07))(KEY, jnp.arange(100.0)).index.shape == (7,)


def written(transforms, message, size):
    """A message as a text of bits, and what is read back from it."""
    values, bits = np.asarray(message.values), ""
    quantizer = next((t for t in transforms if t.name == "quantize"), None)
    if message.index is not None:
        order = np.argsort(np.asarray(message.index))
        place, width = np.asarray(message.index)[order], (size - 1).bit_length()
        listed = "".join(f"{p:0{width}b}" for p in place)
        bitmap = "".join("01"[p in place] for p in range(size))
        bits += min(listed, bitmap, key=len)
        values = values[order]
        if len(listed) > len(bitmap):
            place = [p for p, bit in enumerate(bitmap) if bit == "1"]
    else:
        place = np.arange(size)
    if quantizer is None:
        bits += "".join(f"{word:032b}" for word in values.view(np.uint32))
        read = np.array([int(bits[-32 * len(values) :][32 * i : 32 * i + 32], 2) for i in range(len(values))], np.uint32).view(np.float32)
    else:
        width = quantizer.wire(Wire(size, size, 32)).bits
        levels, largest = 2 ** (width - 1) - 1, np.float32(np.abs(values).max())
        whole = np.rint(values / largest * levels).astype(int)
        bits += f"{largest.view(np.uint32):032b}" + "".join(f"{number + levels:0{width}b}" for number in whole)
        tail = bits[-width * len(values) :]
        read = (np.array([int(tail[width * i : width * (i + 1)], 2) for i in range(len(values))]) - levels) / levels * largest
    out = np.zeros(size, np.float32)
    out[place] = read
    return bits, out


@pytest.mark.parametrize("name", [name for name in CHAINS if name not in ("rotate", "all")])
@pytest.mark.parametrize("size", [1, 2, SIZE, 200])
def test_bytes_are_those_of_the_bits_that_are_written(name, size):
    transforms, values = CHAINS[name], draw(5, size)
    message = sender(*transforms)(KEY, jnp.array(values))
    bits, read = written(transforms, message, size)
    assert num_bytes(transforms, size, 32) == -(-len(bits) // 8)
    expected = np.zeros(size, np.float32)
    expected[slice(None) if message.index is None else np.asarray(message.index)] = message.values
    np.testing.assert_allclose(read, expected, rtol=1e-6)


def test_bytes_by_hand():
    quantize, sparsify = aggregation.quantize, aggregation.sparsify
    assert num_bytes((), 100, 32) == 400 and num_bytes((), 3, 16) == 6
    assert quantize(bits=8).num_bytes(100, 32) == 104 and quantize(bits=4).num_bytes(101, 32) == 51 + 4
    assert quantize(bits=4, rotate=True).num_bytes(100, 32) == 64 + 4  # 128 values
    assert sparsify(share=0.05).num_bytes(1000, 32) == 200 + math.ceil(50 * 10 / 8)  # places of 10 bits
    assert sparsify(share=0.5).num_bytes(1000, 32) == 2000 + 125  # a bitmap
    assert sparsify(share=1.0).num_bytes(1000, 32) == 4000
    assert num_bytes((sparsify(share=0.05), quantize(bits=8)), 1000, 32) == math.ceil((50 * 8 + 500) / 8) + 4
    assert num_bytes((sparsify(share=0.05), quantize(bits=8, rotate=True)), 1000, 32) == math.ceil((64 * 8 + 500) / 8) + 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a: a.quantize(bits=1), "bits is 1, it must be a whole number from 2 to 8"),
        (lambda a: a.quantize(bits=9), "bits is 9"),
        (lambda a: a.quantize(bits=True), "bits is True"),
        (lambda a: a.sparsify(share=0.0), "share is 0.0, it must be above 0 and at most 1"),
        (lambda a: a.sparsify(share=1.1), "share is 1.1"),
        (lambda a: a.sparsify(share=float("nan")), "share is nan"),
        (lambda a: a.chain(), "chain must end in an aggregator, such as aggregation.mean"),
        (lambda a: a.chain(a.quantize()), "chain must end in an aggregator"),
        (lambda a: a.chain(a.quantize(), a.sparsify(), a.mean()), "chain has quantize before sparsify, it must come after it"),
        (lambda a: a.chain(a.quantize(), a.quantize(), a.mean()), "chain has quantize twice"),
        (lambda a: a.chain(a.mean(), a.quantize(), a.mean()), "chain has an aggregator in place 1, nothing may follow it"),
        (lambda a: a.chain("int8", a.mean()), "chain has 'int8' in place 1, it must be a transform"),
        (lambda a: a.chain(a.sparsify(), a.chain(a.quantize(), a.mean())), "chain ends in a chain, give all transforms to one"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(aggregation)


def test_a_chain_of_nothing_is_its_aggregator():
    mean = aggregation.mean()
    assert aggregation.chain(mean) is mean
    made = aggregation.chain(aggregation.sparsify(), aggregation.quantize(), mean)
    assert made.needs == "deltas" and made.encoder is not None and (made.add, made.finish) == (mean.add, mean.finish)
