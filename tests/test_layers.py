"""Layers and the loss against oracles: attention and its rotation, convolution, norms, cross-entropy."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedmoe_jax import gpu
from fedmoe_jax.base import Batch
from fedmoe_jax.gpu import portable
from fedmoe_jax.models.losses import balanced_softmax, cross_entropy
from fedmoe_jax.nn.attention import Attention, is_fused, rotate
from fedmoe_jax.nn.convolution import convolve, patches
from fedmoe_jax.nn.linear import Conv, GroupNorm, RMSNorm

LENGTH = 7


def softmax(values):
    values = np.exp(values - values.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def attention_oracle(model, x, heads, kv_heads):
    """One text, head by head, position by position, with rotation as multiplication of complex numbers."""
    q, k, v, o = (np.asarray(getattr(model, name).kernel.get_value(), np.float64) for name in "qkvo")
    size = q.shape[1] // heads

    def normal(values, scale):
        return values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale.get_value())

    queries, keys, values = x @ q, x @ k, x @ v
    if model.qk_norm == "projection":
        queries, keys = normal(queries, model.q_norm.scale), normal(keys, model.k_norm.scale)
    if model.qk_norm == "head":
        queries, keys = (
            normal(a.reshape(len(x), -1, size), norm.scale).reshape(len(x), -1)
            for a, norm in ((queries, model.q_norm), (keys, model.k_norm))
        )
    out = np.zeros((len(x), heads * size))

    def turned(values, position):
        pair = values[: size // 2] + 1j * values[size // 2 :]
        pair = pair * np.exp(1j * position * model.rope_base ** (-2 * np.arange(size // 2) / size))
        return np.concatenate([pair.real, pair.imag])

    for h in range(heads):
        mine, theirs = slice(h * size, (h + 1) * size), slice(h // (heads // kv_heads) * size, (h // (heads // kv_heads) + 1) * size)
        turned_keys = np.stack([turned(keys[t, theirs], t) for t in range(len(x))])
        for t in range(len(x)):
            weight = softmax(turned_keys[: t + 1] @ turned(queries[t, mine], t) / np.sqrt(size))
            out[t, mine] = weight @ values[: t + 1, theirs]
    return out @ o


@pytest.mark.parametrize("qk_norm", [None, "head", "projection"])
def test_attention_equals_oracle(qk_norm):
    model = Attention(8, heads=4, kv_heads=2, rope_base=100.0, qk_norm=qk_norm, rngs=nnx.Rngs(0))
    for norm in (model.q_norm, model.k_norm):
        if norm is not None:
            norm.scale.set_value(1 + jnp.arange(norm.scale.shape[0], dtype=jnp.float32))
    x = np.random.default_rng(0).normal(size=(2, LENGTH, 8)).astype(np.float32)
    y = nnx.jit(lambda model, x: model(x))(model, jnp.asarray(x))
    for example in range(2):
        np.testing.assert_allclose(y[example], attention_oracle(model, x[example], 4, 2), atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "dtype", "tokens", "features", "fused"),
    [
        ("9.0", jnp.bfloat16, 256, 128, True),
        ("8.6", jnp.bfloat16, 2, 8, True),
        ("9.0", jnp.float16, 256, 128, False),
        ("10.3", jnp.bfloat16, 256, 128, False),
        ("9.0", jnp.float32, 256, 128, False),
        ("9.0", jnp.bfloat16, 255, 128, False),
        ("9.0", jnp.bfloat16, 256, 36, False),
        ("9.0", jnp.bfloat16, 256, 256, False),
        ("7.5", jnp.float16, 256, 128, False),
        ("gfx90a", jnp.bfloat16, 256, 128, False),
        (None, jnp.bfloat16, 256, 128, False),
    ],
)
def test_attention_is_fused_where_cudnn_takes_it(capability, dtype, tokens, features, fused, monkeypatch):
    device = types.SimpleNamespace() if capability is None else types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert is_fused((2, tokens, 4, features), dtype) is fused
    with portable():
        assert not is_fused((2, tokens, 4, features), dtype)
    with jax.default_device("cpu"):
        assert not is_fused((2, tokens, 4, features), dtype)
    used = []

    def attend(q, k, v, *, is_causal, implementation):
        used.append(implementation)
        assert is_causal and q.shape == (2, tokens, 4, features) and k.shape == v.shape == (2, tokens, 2, features)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    x = jnp.ones((2, tokens, 4 * features), dtype)
    for implementation in (None, "xla", "cudnn"):
        options = dict(heads=4, kv_heads=2, dtype=dtype, implementation=implementation)
        Attention(4 * features, **options, rngs=nnx.Rngs(0))(x)
    assert used == ["cudnn" if fused else "xla", "xla", "cudnn"]
    with pytest.raises(ValueError, match=r"^implementation is 'flash'"):
        Attention(8, heads=4, kv_heads=2, implementation="flash", rngs=nnx.Rngs(0))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's attention is for NVIDIA GPUs")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_fused_attention_is_that_of_xla_under_vmap_and_grad(kv_heads):
    x = jax.random.normal(jax.random.key(1), (3, 2, 16, 32), jnp.bfloat16)

    def losses(implementation):
        graph, weights = nnx.split(Attention(32, heads=4, kv_heads=kv_heads, implementation=implementation, rngs=nnx.Rngs(0)))
        own = jax.tree.map(lambda w: w * jnp.array([1.0, 2.0, 3.0]).reshape(-1, *(1,) * w.ndim), weights)
        loss = jax.value_and_grad(lambda weights, x: (nnx.merge(graph, weights)(x).astype(jnp.float32) ** 2).mean())
        return jax.jit(jax.vmap(loss))(own, x)

    for fused, plain in zip(jax.tree.leaves(losses(None)), jax.tree.leaves(losses("xla")), strict=True):
        assert jnp.linalg.norm(fused - plain) < 0.02 * jnp.linalg.norm(plain)


def test_grouped_heads_equal_repeated_ones():
    grouped, full = (Attention(8, heads=4, kv_heads=n, rngs=nnx.Rngs(0)) for n in (2, 4))
    for name in "qkvo":
        kernel = getattr(grouped, name).kernel.get_value()
        if name in "kv":
            kernel = jnp.repeat(kernel.reshape(8, 2, 2), 2, 1).reshape(8, 8)
        getattr(full, name).kernel.set_value(kernel)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 8))
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(grouped, x), run(full, x), atol=1e-6)


def test_rotary_products_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 3, 8))
    turn = jax.jit(lambda x, position: rotate(x, position[None], 100.0))

    def product(i, j):
        return (turn(q, jnp.asarray(i)) * turn(k, jnp.asarray(j))).sum(-1)

    np.testing.assert_allclose(product(5, 2), product(103, 100), atol=1e-4)
    assert np.abs(product(5, 2) - product(5, 3)).max() > 0.01
    np.testing.assert_array_equal(turn(q, jnp.asarray(0)), q)
    np.testing.assert_allclose(jnp.linalg.norm(turn(q, jnp.asarray(9)), axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("method", ["matmul", "convolution", "implicit"])
@pytest.mark.parametrize(("stride", "size"), [(1, (5, 6)), (2, (5, 6)), (2, (8, 7))])
def test_conv_equals_lax(stride, size, method):
    if method == "implicit" and stride > 1:
        with pytest.raises(ValueError, match="stride is 2, must be 1"):
            Conv(3, 4, stride=stride, method=method, rngs=nnx.Rngs(0))
        return
    conv = Conv(3, 4, stride=stride, method=method, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    kernel = conv.linear.kernel.get_value().reshape(3, 3, 3, 4)
    expected = jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(nnx.jit(lambda conv, x: conv(x))(conv, x), expected, atol=1e-5)
    with pytest.raises(ValueError, match="method is 'fft'"):
        Conv(1, 1, method="fft", rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("stride", "size"), [(1, (5, 6)), (2, (5, 6)), (2, (8, 7))])
def test_gradient_of_a_kernel_for_each_client_is_that_of_xla(stride, size, dtype):
    def lax(x, kernel):
        shape = dict(window_strides=(stride, stride), padding=((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), **shape)

    def gradients(convolved):
        of_one = jax.grad(lambda x, kernel: jnp.sin(convolved(x, kernel).astype(jnp.float32)).sum(), argnums=(0, 1))
        return jax.jit(jax.vmap(of_one))(x, kernel)

    x = jax.random.normal(jax.random.key(0), (2, 3, *size, 4)).astype(dtype)
    kernel = jax.random.normal(jax.random.key(1), (2, 3, 3, 4, 5))
    for found, expected in zip(gradients(lambda x, kernel: convolve(x, kernel, stride)), gradients(lax), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (found, expected)), atol=1e-4 if dtype == jnp.float32 else 0.3)


@pytest.mark.parametrize(("stride", "size"), [(1, (5, 6)), (2, (5, 6)), (2, (8, 7))])
def test_what_positions_read_is_the_same_by_a_table(stride, size, monkeypatch):
    def both(x):
        of_one = jax.value_and_grad(lambda x: jnp.sin(jnp.arange(27) * patches(x, stride)).sum())
        return jax.jit(jax.vmap(of_one))(x), str(jax.make_jaxpr(of_one)(x[0]))

    x = jax.random.normal(jax.random.key(0), (2, 3, *size, 3))
    joined, program = both(x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found, of_gpu = both(x)
    assert "gather" in of_gpu and "gather" not in program
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), found, joined)
    with portable():
        assert both(x)[1] == program


def test_conv_takes_what_is_the_quickest(monkeypatch):
    def method(size, out, stride=1, dtype=jnp.bfloat16, before=4):
        conv = Conv(before, out, stride=stride, dtype=dtype, rngs=nnx.Rngs(0))
        x = jnp.ones((1, size, size, before))
        same = Conv(before, out, stride=stride, dtype=dtype, method="matmul", rngs=nnx.Rngs(0))
        np.testing.assert_allclose(conv(x), same(x), atol=0.05)
        program = str(jax.make_jaxpr(lambda x: conv(x))(x))
        kernel = "pallas_call" in program
        return "implicit" if kernel else "convolution" if "conv_general_dilated" in program else "matmul"

    assert method(16, 4) == "matmul"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert method(16, 4) == method(16, 4, dtype=jnp.float32) == "convolution"
    assert {method(15, 4), method(16, 8), method(16, 4, stride=2)} == {"matmul"}
    monkeypatch.setattr(gpu, "has_kernels", lambda: True)
    assert {method(15, 4), method(16, 32, dtype=jnp.float32), method(16, 64)} == {"implicit"}
    assert {method(16, 33, dtype=jnp.float32), method(16, 65), method(16, 4, before=65), method(16, 4, stride=2)} == {"matmul"}
    with jax.enable_x64(True):
        assert method(16, 4, dtype=jnp.float64) == "convolution"
    with portable():
        assert method(16, 4) == "matmul"


def test_norms_equal_numpy():
    x = np.random.default_rng(0).normal(2, 3, (2, 3, 4, 6)).astype(np.float32)
    rms, group = RMSNorm(6), GroupNorm(6, 3)
    for variable in (rms.scale, group.scale, group.bias):
        variable.set_value(jnp.arange(6.0) - 1)
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(rms, jnp.asarray(x)), x / np.sqrt((x**2).mean(-1, keepdims=True)) * (np.arange(6) - 1), rtol=1e-4)
    grouped = x.reshape(2, 12, 3, 2)
    grouped = (grouped - grouped.mean((1, 3), keepdims=True)) / grouped.std((1, 3), keepdims=True)
    np.testing.assert_allclose(run(group, jnp.asarray(x)), grouped.reshape(x.shape) * (np.arange(6) - 1) + np.arange(6) - 1, atol=1e-4)


@pytest.mark.parametrize("inner", [(), (3,)])
def test_cross_entropy_equals_numpy(inner):
    random = np.random.default_rng(0)
    logits = random.normal(size=(4, *inner, 3)).astype(np.float32) * 3
    y = random.integers(0, 3, (4, *inner))
    y[0] = -1
    y[2, ...] = np.where(np.arange(np.prod(inner, dtype=int)) == 1, -1, y[2]) if inner else y[2]
    data = Batch(jnp.asarray(logits), jnp.asarray(y), jnp.ones(4, bool))
    loss, aux = cross_entropy(lambda x: x, data, jax.random.key(0))
    for b in range(4):
        rows = [(softmax(z.astype(np.float64)), t) for z, t in zip(logits[b].reshape(-1, 3), y[b].reshape(-1), strict=True) if t >= 0]
        np.testing.assert_allclose(loss[b], np.mean([-np.log(p[t]) for p, t in rows]) if rows else 0, rtol=1e-5)
        np.testing.assert_allclose(aux["correct"][b], np.mean([p.argmax() == t for p, t in rows]) if rows else 0, rtol=1e-6)


def test_balanced_softmax_is_cross_entropy_with_the_label_prior_added():
    random = np.random.default_rng(1)
    logits, prior = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((4, 3), 3))
    data = Batch(logits, jnp.asarray([0, 2, 1, 1]), jnp.ones(4, bool), prior)
    found = balanced_softmax(lambda x: x, data, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, found, cross_entropy(lambda x: x + prior, data, jax.random.key(0)))
    assert not np.allclose(found[0], cross_entropy(lambda x: x, data, jax.random.key(0))[0])
    with pytest.raises(ValueError, match=r"batch\.label_prior is None: balanced_softmax needs"):
        balanced_softmax(lambda x: x, dataclasses.replace(data, label_prior=None), jax.random.key(0))
