"""Data that stay on the host: the same bits as on the device, whichever rounds share a window, read ahead of time."""

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

COHORT = 5


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
    alg = algorithm()
    run = rounds(alg.step, block)
    state, counts, shapes = alg.init(KEY, host.index), [], set()
    for count, window in host.windows(KEY, cohort_size=COHORT, stops=[*range(block, 7, block), 7]):
        state, _ = jax.block_until_ready(run(state, window, count))
        counts.append(count)
        shapes.add(window.x.shape)
    wanted, whole = alg.init(KEY, data), rounds(alg.step, block)
    for count in counts:
        wanted, _ = whole(wanted, data, count)
    same(state, wanted)
    assert sum(counts) == 7 and max(counts) == block and len(shapes) == 1
    assert shapes.pop()[0] < len(data.x) or block == 3


def test_a_run_goes_on_in_the_middle_of_a_window():
    host = streamed(population())
    spans = [count for count, _ in host.windows(KEY, cohort_size=COHORT, stops=[4, 8, 10], start=3)]
    assert spans == [1, 4, 2] and not list(host.windows(KEY, cohort_size=COHORT, stops=[], start=3))


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
    host, keys = streamed(population()), jax.random.split(KEY, 2)
    (_, both), *_ = host.windows(keys, cohort_size=2, stops=[1])
    alone = [next(iter(host.windows(key, cohort_size=2, stops=[1])))[1] for key in keys]
    sizes = [np.diff(window.offsets) for window in (both, *alone)]
    np.testing.assert_array_equal(sizes[0], np.maximum(sizes[1], sizes[2]))


def test_the_next_window_is_read_while_one_is_in_use(monkeypatch):
    reading, plain = threading.Semaphore(0), stream._taken

    def taken(*args):
        reading.release()
        return plain(*args)

    monkeypatch.setattr(stream, "_taken", taken)
    windows = streamed(population()).windows(KEY, cohort_size=COHORT, stops=[1, 2, 3])
    next(windows)
    for _ in range(4):  # x and y of the first window and, without being asked, of the second
        assert reading.acquire(timeout=10)
    assert not reading.acquire(timeout=0.2)
    windows.close()


def test_the_index_knows_the_sizes_of_all():
    index = streamed(population()).index
    assert [int(index.num_examples(jnp.int32(client))) for client in range(len(SIZES))] == list(SIZES)
    assert index.max_examples == max(SIZES) and index.x.shape[0] == 1


def test_wrong_arguments_are_named():
    host = streamed(population())
    for options in (dict(stops=[2, 2]), dict(stops=[2], start=-1), dict(stops=[2, 4], start=2)):
        with pytest.raises(ValueError, match="stops must be ascending and above start"):
            host.windows(KEY, cohort_size=2, **options)
    with pytest.raises(ValueError, match="y must have as many rows as x"):
        Stream.from_arrays(host.x, host.y[1:], [np.arange(3)])
