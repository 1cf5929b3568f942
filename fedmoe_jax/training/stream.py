"""Client data that stay in host memory or in memory-mapped files: the examples of the next rounds go to the device ahead of them."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from fedmoe_jax import sampling
from fedmoe_jax.base import ClientProfile
from fedmoe_jax.data.population import Population, checked
from fedmoe_jax.round import State


@dataclasses.dataclass(frozen=True)
class Stream:
    """The data of all clients on the host, for populations that are larger than the device.

    Who is in a cohort depends on the key and the round only, so the examples of the next rounds are known. `windows` puts
    them, and no others, on the device while the rounds before are computed:

        stream = Stream.from_arrays(np.load("x.npy", mmap_mode="r"), np.load("y.npy", mmap_mode="r"), clients)
        state = algorithm.init(key, stream.index)
        run = fedmoe_jax.rounds(algorithm.step, 10)
        for count, population in stream.windows(state, cohort_size=100, stops=range(10, 1001, 10)):
            state, info = jax.block_until_ready(run(state, population, count))  # else windows pile up

    The result is bit for bit that of the same rounds on a `Population` on the device. In any other round, or where the
    algorithm's cohort is larger than `cohort_size` says, clients without examples there take no part: `Info.clients` tells.

    Attributes:
      x, y: all examples, one a row; NumPy arrays or memory maps.
      order: index into `x` and `y`, sorted by client.
      offsets: where each client starts in `order`, and where the last one ends.
      profile: what each client can afford, on the device.
    """

    x: np.ndarray
    y: np.ndarray
    order: np.ndarray
    offsets: np.ndarray
    profile: ClientProfile

    @classmethod
    def from_arrays(
        cls, x: np.ndarray, y: np.ndarray, client_indices: Sequence[np.ndarray], profile: ClientProfile | None = None
    ) -> "Stream":
        """As `Population.from_arrays`, without moving or copying `x` and `y`.

        Raises:
          ValueError: if the argument that it names has a wrong dtype, length or index, or a number of the profile is not above 0.
        """
        order, offsets, profile = checked(x, y, client_indices, profile)
        return cls(x, y, order, offsets, profile)

    @property
    def num_clients(self) -> int:
        """All clients, also those without examples."""
        return len(self.offsets) - 1

    @property
    def index(self) -> Population:
        """A population of the same clients and sizes without their examples, to start an algorithm with.

        What trains on it anyway sees NaN, or zeros where examples are no floats.
        """
        x, y = (jnp.asarray(_nothing(array)) for array in (self.x, self.y))
        return Population(x, y, jnp.zeros(1, jnp.int32), jnp.asarray(self.offsets, jnp.int32), self.profile, self._largest)

    def window(self, client: np.ndarray, room: int | None = None) -> Population:
        """The population with the examples of these clients on the device; all others have none.

        Args:
          client: IDs, in any order, also more than once.
          room: examples that the arrays on the device have place for, so that windows have one shape; None for no more than needed.

        Raises:
          ValueError: if there is not enough room.
        """
        client = np.unique(client)
        sizes = np.zeros(self.num_clients, np.int64)
        sizes[client] = self._sizes[client]
        rows = self._rows(client)
        room = max(len(rows), 1) if room is None else room
        if room < max(len(rows), 1):
            raise ValueError(f"room is {room}, these clients have {len(rows)} examples")
        x, y = (jax.device_put(_taken(array, rows, room)) for array in (self.x, self.y))
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        return Population(x, y, jnp.arange(room, dtype=jnp.int32), jnp.asarray(offsets), self.profile, self._largest)

    def windows(self, state: State, *, cohort_size: int, stops: Sequence[int]) -> Iterator[tuple[int, Population]]:
        """The windows of the rounds from that of `state` on, some rounds at a time.

        A thread reads the next window and sends it to the device while the caller works with this one, so that two are on
        the device, for a moment three; they have as many places as the largest of them needs.

        Args:
          state: where to start; of several runs at once, in the same round, with an axis of runs first.
          cohort_size: clients of a round, as given to `federated_moe`.
          stops: the rounds before which windows end, ascending and above that of `state`.

        Yields:
          How many rounds the window is for, and the population with the examples of their clients.

        Raises:
          ValueError: if the stops are not ascending.
        """
        start = int(jnp.ravel(state.round)[0])
        spans = list(zip([start, *stops][: len(stops)], stops, strict=True))
        if any(first >= last for first, last in spans):
            raise ValueError(f"stops must be ascending and above the round of the state, {start}")
        return self._windows([_clients(jnp.ravel(state.key), span, self.num_clients, cohort_size) for span in spans], spans)

    def _windows(self, clients: list[np.ndarray], spans: list[tuple[int, int]]) -> Iterator[tuple[int, Population]]:
        room = _rounded(max([1, *(int(self._sizes[ids].sum()) for ids in clients)]))
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self.window, ids, room) for ids in clients[:1]]
            for place, (first, last) in enumerate(spans):
                population = ahead.pop().result()
                ahead = [pool.submit(self.window, ids, room) for ids in clients[place + 1 : place + 2]]
                yield last - first, population
                del population

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        return np.diff(self.offsets)

    @functools.cached_property
    def _largest(self) -> int:
        return int(self._sizes.max())

    def _rows(self, client: np.ndarray) -> np.ndarray:
        """Where the examples of these clients are, one client after the other."""
        sizes = self._sizes[client]
        first = np.repeat(self.offsets[client] - (np.cumsum(sizes) - sizes), sizes)
        return self.order[first + np.arange(sizes.sum())]


def _nothing(array: np.ndarray) -> np.ndarray:
    return np.full((1, *array.shape[1:]), np.nan if np.issubdtype(array.dtype, np.floating) else 0, array.dtype)


def _taken(array: np.ndarray, rows: np.ndarray, room: int) -> np.ndarray:
    """The rows of an array, then zeros. Read by as many threads as there are cores."""
    taken = np.empty((room, *array.shape[1:]), array.dtype)
    taken[len(rows) :] = 0
    bounds = np.linspace(0, len(rows), (os.cpu_count() or 1) + 1).astype(int)

    def read(first, last):
        if array.flags.carray:  # otherwise take copies all of the array; in another mode it copies what it took
            np.take(array, rows[first:last], axis=0, out=taken[first:last], mode="clip")
        else:
            taken[first:last] = array[rows[first:last]]

    with ThreadPoolExecutor(len(bounds) - 1) as readers:
        list(readers.map(read, bounds[:-1], bounds[1:]))
    return taken


def _clients(keys, span, num_clients, cohort_size) -> np.ndarray:
    """All clients of the cohorts of some rounds, each once."""
    return np.unique(_cohorts(keys, jnp.arange(*span), num_clients, cohort_size))


def _rounded(room: int) -> int:
    """The room and at most a sixteenth more, so that runs alike have one shape and compile once."""
    step = 1 << max(room.bit_length() - 5, 0)
    return -(-room // step) * step


@functools.partial(jax.jit, static_argnums=(2, 3))
def _cohorts(keys, rounds, num_clients, cohort_size) -> Int[Array, "run round client"]:
    of_round = jax.vmap(lambda key, round: sampling.of_round(key, round, num_clients, cohort_size), (None, 0))
    return jax.vmap(of_round, (0, None))(keys, rounds)
