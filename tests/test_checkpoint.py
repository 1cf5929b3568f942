"""Checkpoints: what is restored is what was saved, bit for bit, or an error says what differs."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fedmoe_jax.base import Batch
from fedmoe_jax.training.checkpoint import Checkpoints


def make_state(seed=0):
    """Every kind of node and leaf that a run's state may have."""
    weights = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(seed)))
    return {
        "weights": weights,
        "optimizer": optax.adam(0.1).init(weights),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed), 3),
        "no_keys": jax.random.split(jax.random.key(seed), 3)[:0],
        "other_key": jax.random.key(seed, impl="rbg"),
        "batch": Batch(jnp.full(2, seed, jnp.float32), jnp.arange(2), jnp.array([True, False])),
        "empty": jnp.zeros((0, 3)),
        "half": jnp.array([0.1, jnp.inf], jnp.bfloat16) + seed,
        "host": np.arange(3),
        "odd name/['x']": (jnp.float32(seed), None, ()),
        "round": 5 + seed,
    }


def raw(leaf):
    return np.asarray(
        jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(one) is type(other) and getattr(one, "dtype", None) == getattr(other, "dtype", None)
        np.testing.assert_array_equal(raw(one), raw(other))


def test_every_kind_of_state_comes_back(tmp_path):
    state = make_state(7)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(12, state, {"chunk": 10, "names": ["a"]})
    round, restored, extra = Checkpoints(tmp_path / "checkpoints").restore(make_state(0))
    assert (round, extra) == (12, {"chunk": 10, "names": ["a"]})
    assert_same(restored, state)
    np.testing.assert_array_equal(jax.random.normal(restored["key"]), jax.random.normal(state["key"]))


def test_an_abstract_template_serves(tmp_path):
    state = {name: value for name, value in make_state(3).items() if name not in ("host", "round")}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        assert_same(checkpoints.restore(jax.eval_shape(lambda: state))[1], state)


def test_a_state_without_elements_comes_back(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"empty": jnp.zeros((0, 2))})
        assert checkpoints.restore({"empty": jnp.zeros((0, 2))})[1]["empty"].shape == (0, 2)


def test_the_newest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() is None and not checkpoints.dir.exists()
    for round in (1, 20, 3 + 20):
        checkpoints.save(round, {"x": jnp.full(2, round)})
        assert checkpoints.latest() == round
    checkpoints.close()
    assert sorted(path.name for path in checkpoints.dir.iterdir()) == ["20", "23"]


def test_the_same_round_is_replaced_and_donated_buffers_are_safe(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for value in (1.0, 2.0):
            state = {"x": jnp.full(1000, value)}
            checkpoints.save(4, state, {"value": value})
            jax.jit(lambda state: {"x": state["x"] * 0}, donate_argnums=0)(state)
        round, restored, extra = checkpoints.restore({"x": jnp.zeros(1000)})
    assert (round, extra) == (4, {"value": 2.0})
    np.testing.assert_array_equal(restored["x"], 2.0)


def test_what_a_killed_run_left_is_ignored_and_removed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, {"x": jnp.ones(2)})
    torn = tmp_path / "8.orbax-checkpoint-tmp"
    torn.mkdir()
    assert Checkpoints(tmp_path).latest() == 4
    assert Checkpoints(tmp_path).restore({"x": jnp.zeros(2)})[0] == 4
    assert torn.exists(), "reading must not disturb a run that is writing"
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(8, {"x": jnp.ones(2)})
        assert checkpoints.latest() == 8
    assert not torn.exists()


DIFFERENT = {
    "missing": ({"x": jnp.zeros(2), "y": jnp.zeros(2)}, r"\['y'\] is missing"),
    "unexpected": ({}, r"\['x'\] is unexpected"),
    "shape": ({"x": jnp.zeros(3)}, r"\['x'\] is float32\[2\], expected float32\[3\]"),
    "type": ({"x": jnp.zeros(2, jnp.bfloat16)}, r"\['x'\] is float32\[2\], expected bfloat16\[2\]"),
    "key": ({"x": jax.random.key(0)}, r"\['x'\] is float32\[2\], expected key"),
}


@pytest.mark.parametrize(("template", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_different_state_is_refused(tmp_path, template, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)})
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(template)


def test_many_differences_are_counted(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)})
        with pytest.raises(ValueError, match="and 7 more"):
            checkpoints.restore({f"y{place}": jnp.zeros(1) for place in range(9)})


def test_no_checkpoint_or_a_damaged_one_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint"):
        Checkpoints(tmp_path).restore({"x": jnp.zeros(2)})
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)})
    for path in sorted((tmp_path / "1").rglob("*")):
        if path.is_file() and "ocdbt" in str(path):
            path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="round 1 cannot be read"):
        Checkpoints(tmp_path).restore({"x": jnp.zeros(2)})


def test_the_caller_goes_on_while_a_checkpoint_is_written_and_may_donate(tmp_path, monkeypatch):
    go, write = threading.Event(), Checkpoints._write

    def held(self, *args):
        assert go.wait(20)
        return write(self, *args)

    monkeypatch.setattr(Checkpoints, "_write", held)
    with Checkpoints(tmp_path) as checkpoints:
        state = {"x": jnp.full(1000, 1.0)}
        checkpoints.begin(4, state)
        jax.block_until_ready(jax.jit(lambda state: {"x": state["x"] * 0}, donate_argnums=0)(state))
        assert checkpoints.latest() is None
        go.set()
        assert checkpoints.restore({"x": jnp.zeros(1000)})[1]["x"].tolist() == [1.0] * 1000 and checkpoints.latest() == 4


@pytest.mark.parametrize("call", ["begin", "wait", "end"])
def test_what_went_wrong_on_the_thread_is_raised_by_the_next_call(tmp_path, monkeypatch, call):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"round 4 cannot be written \(No space left on device\)"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"x": jnp.ones(3)})
        monkeypatch.setattr(Checkpoints, "_complete", full)
        checkpoints.begin(4, {"x": jnp.ones(3)})
        if call == "begin":
            checkpoints.begin(6, {"x": jnp.ones(3)})
        elif call == "wait":
            checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
