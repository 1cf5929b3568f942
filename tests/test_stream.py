"""Data that stay on the host: the same bits as on the device, whichever rounds share a window, read ahead of time."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_round import KEY, SIZES, algorithm, population
from test_round import same

from fedmoe_jax import rounds
from fedmoe_jax.training import stream
from fedmoe_jax.training.stream import Stream

COHORT = 2


def state_of(host, cohort=COHORT, round=0, key=KEY):
    """The state of an algorithm in some round."""
    start = algorithm(cohort_size=cohort).init(key, host.index)
    return dataclasses.replace(start, round=jnp.int32(round))


def streamed(data, folder=None):
    """The clients of `population()` on the host, or in files."""
    x, y = np.asarray(data.x), np.asarray(data.y)
    if folder is not None:
        for name, array in (("x", x), ("y", y)):
            np.save(folder / f"{name}.npy", array)
        x, y = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("x", "y"))
    return Stream.from_arrays(x, y, np.split(np.arange(len(x)), np.cumsum(SIZES)[:-1]), data.profile)


@pytest.mark.parametrize("block", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_rounds_on_windows_are_those_on_the_device_bit_for_bit(block, tmp_path):
    data, host = population(), streamed(population(), tmp_path)
    alg = algorithm(cohort_size=COHORT)
    run = rounds(alg.step, block)
    state, counts, shapes = alg.init(KEY, host.index), [], set()
    for count, window in host.windows(state, cohort_size=COHORT, stops=[*range(block, 7, block), 7]):
        state, _ = jax.block_until_ready(run(state, window, count))
        counts.append(count)
        shapes.add(window.x.shape)
    wanted, whole = alg.init(KEY, data), rounds(alg.step, block)
    for count in counts:
        wanted, _ = whole(wanted, data, count)
    same(state, wanted)
    assert sum(counts) == 7 and max(counts) == block and len(shapes) == 1
    assert shapes.pop()[0] < len(data.x)


def test_a_run_goes_on_in_the_middle_of_a_window():
    host = streamed(population())
    state = state_of(host, round=3)
    spans = [count for count, _ in host.windows(state, cohort_size=COHORT, stops=[4, 8, 10])]
    assert spans == [1, 4, 2] and not list(host.windows(state, cohort_size=COHORT, stops=[]))


def test_a_window_has_the_examples_of_its_clients_and_no_others():
    data, host = population(), streamed(population())
    window = host.window(np.array([6, 1, 1]), room=40)
    position = jnp.arange(max(SIZES))
    for client, size in enumerate(SIZES):
        got, wanted = window.batch(jnp.int32(client), position), data.batch(jnp.int32(client), position)
        if client in (1, 6):
            np.testing.assert_array_equal(got.mask, wanted.mask)
            np.testing.assert_array_equal(got.x[:size], wanted.x[:size])
            np.testing.assert_array_equal(got.y[:size], wanted.y[:size])
        else:
            assert not got.mask.any() and np.isfinite(got.x).all()
    assert window.x.shape[0] == 40 and host.window(np.array([], int)).num_clients == window.num_clients == len(SIZES)


def test_several_runs_share_windows():
    host = streamed(population())
    states = [state_of(host, key=key) for key in jax.random.split(KEY, 2)]
    together = jax.tree.map(lambda *rows: jnp.stack(rows), *states)
    windows = [next(host.windows(state, cohort_size=COHORT, stops=[1]))[1] for state in (together, *states)]
    both, *alone = [np.diff(window.offsets) for window in windows]
    np.testing.assert_array_equal(both, np.maximum(*alone))


def test_the_next_window_is_read_while_one_is_in_use(monkeypatch):
    reading, plain = threading.Semaphore(0), stream._taken

    def taken(*args):
        reading.release()
        return plain(*args)

    monkeypatch.setattr(stream, "_taken", taken)
    host = streamed(population())
    windows = host.windows(state_of(host), cohort_size=COHORT, stops=[1, 2, 3])
    next(windows)
    for _ in range(4):  # x and y of the first window and, without being asked, of the second
        assert reading.acquire(timeout=10)
    assert not reading.acquire(timeout=0.2)
    windows.close()


def test_the_index_knows_the_sizes_of_all():
    index = streamed(population()).index
    assert [int(index.num_examples(jnp.int32(client))) for client in range(len(SIZES))] == list(SIZES)
    assert index.max_examples == max(SIZES) and index.x.shape[0] == 1


@pytest.mark.parametrize("name", ["transposed", "part"])
def test_arrays_that_are_not_contiguous_are_read_as_well(name):
    data = population()
    x, y = np.asarray(data.x), np.asarray(data.y, np.int64)
    x = np.asfortranarray(x) if name == "transposed" else np.concatenate([x, x], axis=1)[:, : x.shape[1]]
    host = Stream.from_arrays(x, y, np.split(np.arange(len(x)), np.cumsum(SIZES)[:-1]))
    window = host.window(np.arange(len(SIZES)))
    np.testing.assert_array_equal(window.x, data.x)
    np.testing.assert_array_equal(window.y, data.y)
    assert host.index.y.dtype == window.y.dtype == jnp.int32


def test_wrong_arguments_are_named():
    host = streamed(population())
    state = state_of(host, round=2)
    for stops in ([4, 4], [2], [4, 3]):
        with pytest.raises(ValueError, match="stops must be ascending and above the round of the state, 2"):
            host.windows(state, cohort_size=COHORT, stops=stops)
    with pytest.raises(ValueError, match=f"room is 3, these clients have {SIZES[1]} examples"):
        host.window(np.array([1]), room=3)
    with pytest.raises(ValueError, match="y must have as many rows as x"):
        Stream.from_arrays(host.x, host.y[1:], [np.arange(3)])
