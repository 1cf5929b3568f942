"""The transportation problem of the assignment as a flow between experts, and what follows from prices.

Maximise sum value x over masks x with row sums `slots` and column sums within [lower, upper]. Experts are the nodes of
a small graph. An arc a -> b moves a client from expert a to expert b and costs the least value lost by that over the
clients that hold a and not b. One more node, the bank, takes in what each expert gets: free within the bounds, for
a large fine outside. Values and prices are integers, so that sums are exact.

Everything is laid out [expert, client], which streams well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax.alignment import blocks

_PARTS = 1 << 7  # of a step, that are told apart
_SORTED = 1 << 20  # pairs up to which a GPU sorts
_AHEAD = 3  # steps that stand for any more: parts make up for less than two

STEPS = 1 << 23
"""Values are integers from 0 to this."""

FINE = 1 << 26
"""The most that a client out of bounds can cost: four times that is still less than `FAR`."""

FAR = 1 << 29
"""The cost of what is impossible; the sum of two still fits in 32 bits."""


class Problem(NamedTuple):
    """Values lie in 0 to `steps`; each client above `upper` or below `lower` costs `fine`.

    `part` is what a value is more than its integer, from 0 to 1, by which clients are told apart that differ by less than a step.
    Repairs do without, so that a client can hold an expert that is worth a step less to it than another.
    """

    value: Int[Array, "expert client"]
    allowed: Bool[Array, "expert client"]
    slots: Int[Array, " client"]
    lower: Int[Array, " expert"]
    upper: Int[Array, " expert"]
    steps: Int[Array, ""] | int = STEPS
    fine: Int[Array, ""] | int = FINE
    part: Float[Array, "expert client"] | float = 0.0


class Plan(NamedTuple):
    """The mask is best for the prices, to within a step. Nodes with an excess have too many clients for their price, or too few."""

    mask: Bool[Array, "expert client"]
    prices: Int[Array, " expert"]
    excess: Int[Array, " node"]


def plan_at(problem: Problem, prices, part) -> Plan:
    """Each client takes its best experts at these prices. `part` is what prices are more than these integers, from -0.5 to 0.5."""
    prices = jnp.clip(prices, -problem.fine, problem.fine)
    worth = jnp.where(problem.allowed, problem.value - prices[:, None], -FAR)
    ahead = jnp.clip(worth - least(worth, problem.slots), -_AHEAD, _AHEAD)
    beside = jnp.round((problem.part - part[:, None]) * _PARTS).astype(jnp.int32)
    rank = ahead * _PARTS + jnp.clip(beside, -_PARTS // 2, 3 * _PARTS // 2 - 1)
    mask = _best(rank, problem.slots) & problem.allowed
    load = mask.sum(axis=1, dtype=jnp.int32)
    prices = _level(problem, prices, load)
    return Plan(mask, prices, excess(problem, prices, load)[1])


def _level(problem: Problem, prices, load) -> Int[Array, " expert"]:
    """The prices plus the constant that leaves the fewest clients out of place.

    Clients fill their slots at any level of prices, so that a constant changes no choice, only which experts are to be full.
    """
    constants = jnp.append(0, -prices)

    def misplaced(constant):
        moved = prices + constant
        return jnp.where(jnp.abs(moved).max() > problem.fine, FAR, jnp.maximum(excess(problem, moved, load)[1], 0).sum())

    return prices + constants[jax.vmap(misplaced)(constants).argmin()]


def _best(worth: Int[Array, "expert client"], slots: Int[Array, " client"]) -> Bool[Array, "expert client"]:
    """The `slots` highest of each column, the first of equals."""
    threshold = least(worth, slots, (_AHEAD + 2) * _PARTS)
    above, equal = worth > threshold, worth == threshold
    return above | (equal & (counted(equal) <= slots - above.sum(axis=0)))


def counted(marked: Bool[Array, "expert client"]) -> Int[Array, "expert client"]:
    """How many are marked from the first row to each one. A GPU multiplies instead, which takes it less time."""
    if jax.default_backend() != "gpu":
        return jnp.cumsum(marked, axis=0)
    earlier = jnp.tri(marked.shape[0], dtype=jnp.bfloat16)  # zeros and ones, summed in float32, are exact
    return jnp.matmul(earlier, marked.astype(jnp.bfloat16), preferred_element_type=jnp.float32).astype(jnp.int32)


def least(worth: Int[Array, "expert client"], slots: Int[Array, " client"], far: int = FAR) -> Int[Array, " client"]:
    """The least of the `slots` highest of each column, far - 1 for none. Slots are at most the experts, values from -far to below far."""
    sort = jax.default_backend() == "gpu" and worth.size <= _SORTED
    return (sorted_least if sort else bisected_least)(worth, slots, far)


def bisected_least(worth: Int[Array, "expert client"], slots: Int[Array, " client"], far: int) -> Int[Array, " client"]:
    """As `least`, by bisection, which is much faster than sorting on a CPU."""

    def bisect(worth, slots):
        def halve(_, interval):
            low, high = interval
            middle = low + (high - low) // 2
            enough = (worth >= middle).sum(axis=0) >= slots
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        start = jnp.full(slots.shape, -far), jnp.full(slots.shape, far)
        return lax.fori_loop(0, (2 * far - 1).bit_length(), halve, start)[0]

    number = blocks.count(*worth.shape)
    return blocks.mapped(bisect, blocks.split(worth, number), blocks.split(slots, number)).ravel()[: slots.shape[0]]


def sorted_least(worth: Int[Array, "expert client"], slots: Int[Array, " client"], far: int) -> Int[Array, " client"]:
    """As `least`, by sorting, in a few kernels of a GPU, where each bisection takes several."""
    ascending = lax.sort(worth.T, is_stable=False)
    place = jnp.maximum(worth.shape[0] - slots, 0)
    found = jnp.take_along_axis(ascending, jnp.minimum(place, worth.shape[0] - 1)[:, None], axis=1)[:, 0]
    return jnp.where(slots > 0, found, far - 1)


def surplus(plan: Plan) -> Int[Array, ""]:
    """Clients that are too many somewhere; 0 means optimal, to within a step. As many are too few elsewhere."""
    return jnp.maximum(plan.excess, 0).sum()


def excess(problem: Problem, prices, load) -> tuple[Int[Array, " expert"], Int[Array, " node"]]:
    """What the bank takes from each expert at these prices, and the excess that this leaves at each node, the bank last.

    At a price above 0 an expert is full, below 0 it has the least it may have; only at the fine are bounds broken.
    """
    fewest = jnp.where(prices > 0, problem.upper, jnp.where(prices > -problem.fine, problem.lower, 0))
    most = jnp.where(prices < 0, problem.lower, jnp.where(prices < problem.fine, problem.upper, FAR))
    taken = jnp.clip(load, fewest, most)
    return taken, jnp.append(load - taken, (taken - load).sum(dtype=jnp.int32))
