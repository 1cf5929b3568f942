"""Secure aggregation, simulated: the server learns the sum of the clients' numbers and nothing else, also where some drop out [1].

Numbers become whole ones, sums are those modulo 2^32. Each client adds a mask of its own and, for each pair with another client, a mask
that the one of the two adds and the other subtracts, so that what it sends looks uniform and the masks of pairs vanish from the sum.
The seeds of masks are split into Shamir shares. Of a client that sent its numbers, the others give the server shares of the seed of its
own mask; of one that dropped out, those of its seeds of pairs; never both, which would lay its numbers open.

What is real here: fixed point, masks, shares, recovery. What is taken as given: that two clients agree on a seed, that shares travel
in secret, and that the server follows the protocol (honest but curious). [1] shares one private key of a key agreement, from which
all seeds of pairs follow; here the seeds are shared themselves, which hides as much and takes more traffic. Threefry stands for a
generator that is proved to hide. It costs clients^2 masks and clients^3 shares, so training (`fixed_mean(fixed_point=...)`) computes
the sum that comes out, bit for bit, without them.

References:
  [1] Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from fedmoe_jax.base import client_keys, stage_key

PRIME = 65537
"""Shares are numbers below it: of a field that holds 16 bits and whose products fit into 32, but for one."""


class FixedPoint(NamedTuple):
    """Numbers as whole multiples of 2^-fraction_bits modulo 2^32, of which so many `clients` can be summed.

    Values that are too large for that, beyond (2^31 - 1) / clients multiples, are cut off; what is no number is 0.
    """

    fraction_bits: int = 16
    clients: int = 1

    def encode(self, values: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
        """Rounds towards 0, so that no norm grows."""
        most = np.float32((2**31 - 1) // self.clients)
        most = most if int(most) * self.clients < 2**31 else np.nextafter(most, np.float32(0))
        whole = jnp.trunc(jnp.clip(values.astype(jnp.float32) * 2.0**self.fraction_bits, -most, most))
        return jnp.where(jnp.isnan(whole), 0, whole).astype(jnp.int32).astype(jnp.uint32)

    def decode(self, total: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
        """A sum of at most `clients` encoded values, as numbers again."""
        return total.astype(jnp.int32).astype(jnp.float32) / 2.0**self.fraction_bits


class Seeds(NamedTuple):
    """Of masks, two words each: each client's `own`, and those that it has in common with each other client."""

    own: UInt32[Array, "client 2"]
    pairs: UInt32[Array, "client client 2"]


def seeds(key: Key[Array, ""], client: Int[Array, " client"]) -> Seeds:
    """Seeds of these clients, which follow from their IDs: `pairs` is symmetric."""
    own = client_keys(stage_key(key, "own mask"), client)

    def common(one, other):
        first = jax.random.fold_in(stage_key(key, "pair mask"), jnp.minimum(one, other))
        return jax.random.key_data(jax.random.fold_in(first, jnp.maximum(one, other)))

    pairs = jax.vmap(lambda one: jax.vmap(lambda other: common(one, other))(client))(client)
    return Seeds(jax.random.key_data(own), pairs)


def mask(seed: UInt32[Array, "2"], size: int) -> UInt32[Array, " value"]:
    """So many random words."""
    return jax.random.bits(jax.random.wrap_key_data(seed, impl="threefry2x32"), (size,), jnp.uint32)


def masked(
    values: UInt32[Array, "client value"], seeds: Seeds, client: Int[Array, " client"], joined: Bool[Array, " client"]
) -> UInt32[Array, "client value"]:
    """What each client sends: its values, its own mask, and its masks with all others that `joined`, where the lower ID adds them."""

    def one(value, own, pairs, number):
        pair_masks = _signed(pairs, number, client, joined, value.shape[0])
        return value + mask(own, value.shape[0]) + pair_masks

    return jax.vmap(one)(values, seeds.own, seeds.pairs, client)


def _signed(pairs, number, client, counted, size):
    """The sum of a client's masks with those that are `counted`, as it adds them."""

    def add(total, other):
        seed, name, counts = other
        words = mask(seed, size)
        return total + jnp.where(counts & (name != number), jnp.where(number < name, words, -words), 0), None

    return jax.lax.scan(add, jnp.zeros(size, jnp.uint32), (pairs, client, counted))[0]


def share(key: Key[Array, ""], secret: UInt32[Array, "*shape"], holders: int, threshold: int) -> UInt32[Array, "holder *shape 2"]:
    """Shamir shares of each half of some words: any `threshold` of them tell the secret, fewer tell nothing.

    Holder h, from 0, gets the value at h + 1 of a polynomial of degree threshold - 1 modulo `PRIME` whose value at 0 is the half.
    """
    halves = jnp.stack([secret >> 16, secret & 0xFFFF], axis=-1)
    coefficients = jax.random.randint(key, (threshold - 1, *halves.shape), 0, PRIME).astype(jnp.uint32)

    def at(place):
        def step(total, coefficient):
            return (_times(total, place) + coefficient) % PRIME, None

        return (_times(jax.lax.scan(step, jnp.zeros_like(halves), coefficients)[0], place) + halves) % PRIME

    return jax.vmap(at)(jnp.arange(1, holders + 1, dtype=jnp.uint32))


def reconstruct(shares: UInt32[Array, "holder *shape 2"], gives: Bool[Array, " holder"], threshold: int) -> UInt32[Array, "*shape"]:
    """The words that these are shares of, from the first `threshold` holders that give theirs; nonsense if fewer do."""
    shares = jnp.where(gives.reshape(-1, *(1,) * (shares.ndim - 1)), shares, 0)
    chosen = jnp.argsort(~gives, stable=True)[:threshold]
    place = (chosen + 1).astype(jnp.uint32)

    def weight(own):
        others = jnp.where(place == own, 1, place)
        apart = jnp.where(place == own, 1, (place + PRIME - own) % PRIME)
        return _times(_product(others), _inverse(_product(apart)))

    weights = jax.vmap(weight)(place)
    terms = _times(shares[chosen], weights.reshape(-1, *(1,) * (shares.ndim - 1)))
    halves = jax.lax.scan(lambda total, term: ((total + term) % PRIME, None), jnp.zeros_like(terms[0]), terms)[0]
    return (halves[..., 0] << 16) | halves[..., 1]


def _times(a, b):
    """The product modulo `PRIME`: -1 times -1, which has 33 bits, is 1."""
    return jnp.where((a == PRIME - 1) & (b == PRIME - 1), 1, a * b % PRIME)


def _product(factors):
    return jax.lax.scan(lambda total, factor: (_times(total, factor), None), jnp.uint32(1), factors)[0]


def _inverse(value):
    """By Fermat: value^(PRIME - 2), PRIME - 2 being sixteen ones."""
    power, result = value, jnp.uint32(1)
    for _ in range(16):
        result, power = _times(result, power), _times(power, power)
    return result


def unmasked(
    sent: UInt32[Array, "client value"],
    client: Int[Array, " client"],
    shares: tuple[UInt32[Array, "holder client 2 2"], UInt32[Array, "holder client client 2 2"]],
    joined: Bool[Array, " client"],
    survived: Bool[Array, " client"],
    threshold: int,
) -> UInt32[Array, " value"]:
    """What the server makes of what arrived: the sum of the values of those that `survived`, modulo 2^32.

    Args:
      shares: of own seeds, of which those of survivors are asked for, and of seeds of pairs, of which those of clients that joined but
        did not survive. Survivors give them; fewer than `threshold` of them make the sum nonsense.
    """
    survived, size = survived & joined, sent.shape[1]
    dropped = joined & ~survived
    own = reconstruct(jnp.where(survived[None, :, None, None], shares[0], 0), survived, threshold)
    pairs = reconstruct(jnp.where(dropped[None, :, None, None, None], shares[1], 0), survived, threshold)

    def add(total, row):
        value, seed, common, number, arrived, lost = row
        left = jnp.where(arrived, value - mask(seed, size), 0)
        return total + left + jnp.where(lost, _signed(common, number, client, survived, size), 0), None

    rows = sent, own, pairs, client, survived, dropped
    return jax.lax.scan(add, jnp.zeros(size, jnp.uint32), rows)[0]


def secure_sum(
    key: Key[Array, ""],
    client: Int[Array, " client"],
    values: UInt32[Array, "client value"],
    joined: Bool[Array, " client"],
    survived: Bool[Array, " client"],
    *,
    threshold: int,
) -> tuple[UInt32[Array, " value"], Bool[Array, ""]]:
    """The whole protocol for one sum, such as that of an expert's values over the clients that hold it.

    Args:
      client: IDs, all different.
      joined: who takes part; of them `survived` are those whose numbers arrive and who then help to unmask.
      threshold: survivors that it takes, at least 2, lest one client's numbers are the sum; more than half of those that joined keep a
        server that asks some clients for one kind of share and others for the other from getting both.

    Returns:
      The sum modulo 2^32 over the survivors, and whether there were enough; otherwise 0.

    Raises:
      ValueError: if `threshold` is out of its range.
    """
    if not 2 <= threshold <= client.shape[0] < PRIME:
        raise ValueError(f"threshold is {threshold}, it must be from 2 to the clients, {client.shape[0]}, which must be below {PRIME}")
    made = seeds(key, client)
    sent = masked(values, made, client, joined)
    keys = jax.random.split(stage_key(key, "shares"))
    shares = tuple(share(k, secret, client.shape[0], threshold) for k, secret in zip(keys, made, strict=True))
    enough = (survived & joined).sum() >= threshold
    return jnp.where(enough, unmasked(sent, client, shares, joined, survived, threshold), 0), enough  # type: ignore[arg-type]
