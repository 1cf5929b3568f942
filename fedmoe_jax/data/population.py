"""The data of all clients, flat on the device and indexed by client."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from fedmoe_jax.base import Batch, ClientProfile, pytree, static


@pytree
class Population:
    """Every client's examples, as flat arrays and an index by client; implements `base.Population`.

    Client c owns the examples `order[offsets[c] : offsets[c + 1]]`, so a client costs one integer and an example one
    more. All methods take a traced client, work under vmap, and cost the same for any number of clients.

    Attributes:
      x, y: all examples; `x` keeps its dtype, so 8-bit images stay 8-bit.
      order: index into `x` and `y`, sorted by client.
      offsets: where each client starts in `order`, and where the last one ends.
      profile: what each client can afford.
      largest: examples of the largest client.
      label_prior: log of how much more frequent each class is with a client than with all; None if that is not known.
    """

    x: Shaped[Array, "example ..."]
    y: Shaped[Array, "example ..."]
    order: Int[Array, " position"]
    offsets: Int[Array, " population_and_end"]
    profile: ClientProfile
    largest: int = static()
    label_prior: Float[Array, "population class"] | None = None

    @classmethod
    def from_arrays(
        cls,
        x: Array | np.ndarray,
        y: Array | np.ndarray,
        client_indices: Sequence[np.ndarray],
        profile: ClientProfile | None = None,
        label_prior: Array | np.ndarray | None = None,
    ) -> "Population":
        """Builds a population from a data set and each client's examples.

        JAX arrays are not copied, so two populations (training and test examples, say) can share `x` and `y`.

        Args:
          x, y: one example a row; numbers.
          client_indices: for each client the rows that it owns; may be empty. No row has two owners; a row may have
            none.
          profile: one entry a client; None is the same plain phone for all (`devices.PLAIN`).
          label_prior: one row a client, for `models.losses.balanced_softmax`.

        Raises:
          ValueError: if the argument that it names has a wrong dtype, length or index, or a number of the profile is not above 0.
        """
        order, offsets, profile = checked(x, y, client_indices, profile)
        if label_prior is not None and (label_prior.ndim != 2 or len(label_prior) != len(client_indices)):
            raise ValueError(f"label_prior must have shape ({len(client_indices)}, classes), not {label_prior.shape}")
        return cls(
            x=jnp.asarray(x),
            y=jnp.asarray(y),
            order=jnp.asarray(order, jnp.int32),
            offsets=jnp.asarray(offsets, jnp.int32),
            profile=profile,
            largest=int(np.diff(offsets).max()),
            label_prior=None if label_prior is None else jnp.asarray(label_prior, jnp.float32),
        )

    @property
    def num_clients(self) -> int:
        """All clients, also those without examples."""
        return self.offsets.shape[-1] - 1

    @property
    def max_examples(self) -> int:
        """Examples of the largest client."""
        return self.largest

    def num_examples(self, client: Int[Array, ""]) -> Int[Array, ""]:
        """Examples of one client; 0 for a client that does not exist."""
        _, size = self._span(client)
        return size

    def batch(self, client: Int[Array, ""], position: Int[Array, " example"]) -> Batch:
        """One client's examples at `position`, 0 to num_examples - 1; other positions are masked."""
        start, size = self._span(client)
        mask = (position >= 0) & (position < size)
        place = jnp.where(mask, start + position, start)  # of its own examples: those of others may be broken
        row = jax.lax.optimization_barrier(self.order[place])  # else looked up for each number of x
        prior = None if self.label_prior is None else self.label_prior[jnp.clip(client, 0, self.num_clients - 1)]
        return Batch(x=self.x[row], y=self.y[row], mask=mask, label_prior=prior)

    def _span(self, client):
        exists = (client >= 0) & (client < self.num_clients)
        client = jnp.where(exists, client, 0)
        start = self.offsets[client]
        return start, jnp.where(exists, self.offsets[client + 1] - start, 0)


def checked(
    x: Array | np.ndarray, y: Array | np.ndarray, client_indices: Sequence[np.ndarray], profile: ClientProfile | None
) -> tuple[np.ndarray, np.ndarray, ClientProfile]:
    """The rows sorted by client, where each client starts in them, and the profile, by default the same plain phone for all.

    Raises:
      ValueError: as `Population.from_arrays`.
    """
    for name, array in (("x", x), ("y", y)):
        if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
            raise ValueError(f"{name} must hold real numbers, not {array.dtype}")
        if array.ndim == 0:
            raise ValueError(f"{name} must have one row an example, not be a single number")
    if len(x) != len(y):
        raise ValueError(f"y must have as many rows as x: {len(y)} against {len(x)}")
    order, sizes = _index(client_indices, len(x))
    if profile is None:
        profile = ClientProfile.sample(jax.random.key(0), len(sizes), source="uniform")
    for name, values in vars(profile).items():
        if values.shape != (len(sizes),):
            raise ValueError(f"profile.{name} must have shape ({len(sizes)},), one entry a client, not {values.shape}")
        if not isinstance(values, jax.core.Tracer) and (wrong := ~(np.asarray(values) > 0)).any():
            client = int(wrong.argmax())
            raise ValueError(f"profile.{name} of client {client} is {float(values[client])}, it must be above 0 (inf does not limit)")
    return order, np.concatenate([[0], np.cumsum(sizes)]), profile


def _index(client_indices, num_examples):
    """The rows sorted by client, and the number of each client's rows."""
    if len(client_indices) == 0:
        raise ValueError("client_indices must have at least one client")
    arrays = [np.asarray(rows) for rows in client_indices]
    for client, rows in enumerate(arrays):
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise ValueError(
                f"client_indices must hold one-dimensional integer arrays: that of client {client} is {rows.dtype} of shape {rows.shape}"
            )
    sizes = np.array([rows.size for rows in arrays])
    if not sizes.any():
        raise ValueError("client_indices must give at least one client an example")
    order = np.concatenate([rows for rows in arrays if rows.size], dtype=np.int64, casting="unsafe")
    if order.min() < 0 or order.max() >= num_examples:
        raise ValueError(f"client_indices must lie in 0 to {num_examples - 1}, and reach from {order.min()} to {order.max()}")
    owners = np.bincount(order, minlength=num_examples)
    if owners.max() > 1:
        raise ValueError(f"client_indices must give each example to at most one client, and example {owners.argmax()} is there twice")
    return order, sizes
