"""Client-expert assignment: who trains which expert this round. Every rule gives a mask [client, expert]."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from fedmoe_jax.alignment import flow, transport

_TIES = 2.0**-15  # times the root of up to 4,096 clients: the share of the mean absolute deviation within which ties are broken
_APART, _SAMPLE = 2.0**-13, 1024  # the same of the distance from a common fitness; pairs that show which that is
_TINY = 1e-6
_HUGE = 1e37  # differences of so large a fitness are still finite


class BalancedInfo(NamedTuple):
    """What `balanced` found out.

    `violation`: clients above upper plus clients below lower, summed over experts; 0 whenever the bounds are feasible,
    the least possible otherwise, at most 2**30. `gap`: how far the total fitness may be below that of the best assignment with as
    little violation, relative to the total of absolute fitness, or the largest if that is more; a proven bound.
    `prices`: what a place at each expert is worth, in units of fitness; serves for the same problem once more.
    """

    violation: Int[Array, ""]
    gap: Float[Array, ""]
    prices: Float[Array, " expert"]


def random(key: Key[Array, ""] | Key[Array, " client"], slots: Int[Array, " client"], num_experts: int) -> Bool[Array, "client expert"]:
    """A uniformly random set of min(slots, num_experts) experts for each client.

    Args:
      key: one key, or one for each client, so that a client's experts do not depend on its place.
      slots: experts that each client can hold.
      num_experts: at least 1.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}, it must be at least 1")
    _check_slots(slots)
    return _best(_noise(key, slots.shape[0], num_experts), slots)


def greedy(
    fitness: Float[Array, "client expert"],
    slots: Int[Array, " client"],
    *,
    key: Key[Array, ""] | Key[Array, " client"] | None = None,
) -> Bool[Array, "client expert"]:
    """Each client's fittest experts, whatever that does to the load.

    Args:
      fitness: value of a pair; a non-finite value forbids the pair.
      slots: experts that each client can hold. A client with fewer allowed experts gets those.
      key: breaks ties at random, one key or one for each client; None breaks them by expert number.
    """
    _check_slots(slots, fitness)
    allowed = jnp.isfinite(fitness)
    noise = None if key is None else _noise(key, *fitness.shape)
    return _best(jnp.where(allowed, fitness, -jnp.inf), slots, noise) & allowed


def round_robin(
    load: Float[Array, " expert"] | Int[Array, " expert"], slots: Int[Array, " client"], *, key: Key[Array, ""] | None = None
) -> Bool[Array, "client expert"]:
    """Deals the experts out in turn, least loaded first: clients per expert differ by at most one.

    Args:
      load: how much each expert was trained so far.
      slots: experts that each client can hold; at most all of them are dealt.
      key: breaks ties of the load and shuffles the clients; None goes by number.
    """
    _check_slots(slots)
    num_clients, num_experts = slots.shape[0], load.shape[0]
    turn, ties = jnp.arange(num_clients), jnp.arange(num_experts)
    if key is not None:
        turn = jax.random.permutation(jax.random.fold_in(key, 0), num_clients)
        ties = jax.random.permutation(jax.random.fold_in(key, 1), num_experts)
    slots = jnp.minimum(slots, num_experts)
    dealt = jnp.cumsum(slots[turn]) - slots[turn]  # what was dealt before each client's turn
    first = jnp.zeros(num_clients, dealt.dtype).at[turn].set(dealt)
    place = jnp.argsort(jnp.lexsort((ties, load)))  # of each expert in the order of dealing
    return (place[None, :] - first[:, None]) % num_experts < slots[:, None]


def balanced(
    fitness: Float[Array, "client expert"],
    slots: Int[Array, " client"],
    lower: Int[Array, " expert"],
    upper: Int[Array, " expert"],
    *,
    key: Key[Array, ""] | None = None,
    prices: Float[Array, " expert"] | None = None,
    return_info: bool = False,
) -> Bool[Array, "client expert"] | tuple[Bool[Array, "client expert"], BalancedInfo]:
    """Assigns experts to clients: the most total fitness within client slots and expert load bounds.

    A transportation problem, solved on device to its optimum by Newton's method on a smoothed dual and shortest paths
    (`transport`, [1]). Bounds that cannot be met are broken as little as possible in total, and then fitness is maximised.

    Fitness is compared to within 2**-9 of its mean absolute deviation (less for under 4,096 clients), or 3 x 2**-23 of its
    range if that is more. Where more than half of all pairs are equally fit, as those are of which nothing is known, the deviation is
    that of the others, and 2**-13 of the distance from their mean to that common fitness will do. Where bounds must be broken,
    fitness is compared to within num_experts 2**-24 of its range. Ties within that are broken at random. Under jit, negative
    slots and prices that are NaN count as 0, and an upper below lower counts as lower.

    Args:
      fitness: value of a pair, higher is better; a non-finite value forbids the pair, one beyond 1e37 in size counts as that.
      slots: experts that each client can hold, 0 to num_experts.
      lower, upper: least and most clients that each expert may get.
      key: breaks ties; None breaks them in the same way each time.
      prices: tried by a few moves before any others, such as those of the last round; changes the time, not the quality.
      return_info: also return `BalancedInfo`.

    Returns:
      The assignment. Row sums equal min(slots, allowed experts); column sums lie in [lower, upper] whenever that is feasible.

    Raises:
      ValueError: if shapes disagree, there is no client or no expert or, outside jit, slots are negative, a lower bound is
        above its upper bound or a price is NaN.

    References:
      [1] Ahuja, Magnanti and Orlin, "Network Flows", 1993, section 9.7.
    """
    _check_slots(slots, fitness)
    _check_bounds(lower, upper, fitness.shape[1])
    if 0 in fitness.shape:
        raise ValueError(f"fitness has shape {fitness.shape}, it must have a client and an expert")
    key = jax.random.key(0) if key is None else key
    prices = jnp.zeros(fitness.shape[1], jnp.float32) if prices is None else prices
    if prices.shape != fitness.shape[1:]:
        raise ValueError(f"prices has shape {prices.shape}, fitness has {fitness.shape[1]} experts")
    if _concrete(prices) and (unknown := np.isnan(np.asarray(prices))).any():
        raise ValueError(f"prices is NaN for expert {int(unknown.argmax())}; 0 is the price of which nothing is known")
    mask, info = _balanced(fitness.astype(jnp.float32), slots, lower, upper, key, prices, return_info)
    return (mask, info) if return_info else mask


def least_violation(slots: Int[Array, " client"], lower: Int[Array, " expert"], upper: Int[Array, " expert"]) -> Int[Array, ""]:
    """The least `BalancedInfo.violation` of any assignment that fills all slots, where every pair is allowed.

    Any k experts get at most f(k) = sum over clients of min(slots, k) clients, and at least f(E) - f(E - k). As f is concave, bounds
    are broken by what the highest lower bounds ask for beyond the first, and by what the lowest upper bounds refuse of the second.

    Args:
      slots: experts that each client holds, 0 to num_experts.
      lower, upper: as in `balanced`; an upper below lower counts as lower.
    """
    asked = jnp.maximum(lower, 0)
    least, most = (jnp.clip(bound, 0, slots.shape[0]) for bound in (asked, jnp.maximum(asked, upper)))  # so that sums fit in 32 bits

    def sums(values):
        return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(values, dtype=jnp.int32)])

    reach = sums((slots[:, None] > jnp.arange(lower.shape[0])).sum(axis=0))
    missing = (sums(jnp.sort(least, descending=True)) - reach).max()
    crowding = (reach[-1] - reach[::-1] - sums(jnp.sort(most))).max()
    return (asked - least).sum() + missing + crowding


@functools.partial(jax.jit, static_argnames="return_info")
def _balanced(fitness, slots, lower, upper, key, prices, return_info):
    """`balanced` on arrays that may be anything: rounds the fitness to integers, solves, and proves the result."""
    allowed = jnp.isfinite(fitness)
    fitness = jnp.clip(fitness, -_HUGE, _HUGE)
    slots = jnp.clip(slots, 0, allowed.sum(axis=1)).astype(jnp.int32)
    lower = jnp.maximum(lower, 0).astype(jnp.int32)
    upper = jnp.maximum(lower, upper).astype(jnp.int32)

    least = jnp.where(allowed.any(), jnp.min(fitness, where=allowed, initial=jnp.inf), 0.0)
    spread = jnp.max(fitness, where=allowed, initial=-jnp.inf) - least
    tied = ~(spread > 0)
    steps = flow.STEPS
    relative = jnp.where(allowed & ~tied, (fitness - least) / jnp.where(tied, 1.0, spread), 0.0)
    ties = jnp.where(tied, steps, jnp.clip(_indifference(relative, allowed, jax.random.fold_in(key, 1)) * steps, 2.0, steps))
    unit = jnp.where(tied, _TINY * jnp.maximum(jnp.abs(least), _TINY), spread) / steps
    rounded = jnp.round(relative * (steps - ties)).astype(jnp.int32)
    noise = jax.random.uniform(key, fitness.shape) * ties
    value = jnp.where(allowed, rounded + noise.astype(jnp.int32), 0)

    least_load, most_load = (jnp.minimum(bound, fitness.shape[0]) for bound in (lower, upper))  # so that sums fit in 32 bits
    problem = flow.Problem(value.T, allowed.T, slots, least_load, most_load, part=(noise % 1.0).T)
    start = jnp.clip(jnp.nan_to_num(prices / unit), -problem.fine, problem.fine)
    mask, found = transport.solve(problem, start)
    mask, prices = mask.T, found * unit
    if not return_info:
        return mask, None
    load = mask.sum(axis=0)
    gap = _gap(jnp.where(allowed, fitness, 0.0), allowed, mask, least_load, most_load, prices)
    violation = jnp.abs(load - jnp.clip(load, lower, upper)).astype(jnp.float32).sum()
    return mask, BalancedInfo(jnp.minimum(violation, 2.0**30).astype(jnp.int32), jnp.where(tied, 0.0, gap), prices)


def _indifference(relative, allowed, key) -> Float[Array, ""]:
    """Up to which difference pairs count as equally fit, in a range of 0 to 1."""
    sample = jax.random.bits(key, (_SAMPLE,)) % relative.size  # compiles in half the time of randint
    common = jnp.nanmedian(jnp.where(allowed, relative, jnp.nan).ravel()[sample])
    others = allowed & (relative != common)
    mostly = 2 * others.sum() < allowed.sum()  # have the common fitness
    counted = jnp.where(mostly, others, allowed)
    centre = jnp.mean(relative, where=counted)
    deviation = jnp.mean(jnp.abs(relative - centre), where=counted)
    share = _TIES * math.sqrt(min(relative.shape[0], 4096))  # what breaking ties costs averages out over many clients
    return jnp.nan_to_num(jnp.maximum(share * deviation, jnp.where(mostly, _APART * jnp.abs(centre - common), 0.0)))


def _gap(fitness, allowed, mask, lower, upper, prices) -> Float[Array, ""]:
    """The relative duality gap, from differences that are each 0 at the optimum, so that it does not drown in rounding.

    The dual variable of a client is the least worth of what it holds; what it does not hold and is worth more is the gap.
    """
    load = jnp.clip(mask.sum(axis=0), lower, upper)
    worth = fitness - prices
    threshold = jnp.min(worth, axis=1, where=mask, initial=jnp.inf, keepdims=True)
    rows = jnp.where(allowed & ~mask, jnp.maximum(worth - threshold, 0.0), 0.0)
    columns = jnp.where(prices > 0, upper - load, load - lower) * jnp.abs(prices)
    total = jnp.maximum(jnp.abs(jnp.where(mask, fitness, 0.0)).sum(), jnp.abs(fitness).max(initial=0.0))
    return (rows.sum() + columns.sum()) / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)


def _best(score, slots, ties=None):
    """Mask of the `slots` highest scores of each row, the first of equals (or the highest of `ties`)."""
    order = jnp.argsort(-score, axis=1) if ties is None else jnp.lexsort((-ties, -score), axis=1)
    return jnp.argsort(order, axis=1) < slots[:, None]


def _noise(key, num_clients: int, num_experts: int) -> Float[Array, "client expert"]:
    if key.ndim == 0:
        return jax.random.uniform(key, (num_clients, num_experts))
    if key.shape != (num_clients,):
        raise ValueError(f"key has shape {key.shape}, it must be one key or one for each of the {num_clients} clients")
    return jax.vmap(lambda k: jax.random.uniform(k, (num_experts,)))(key)


def _concrete(*arrays) -> bool:
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def _check_slots(slots, fitness=None) -> None:
    if fitness is not None and fitness.shape[:1] != slots.shape:
        raise ValueError(f"slots has {slots.shape[0]} clients and fitness {fitness.shape[0]}, they must agree")
    if _concrete(slots) and (np.asarray(slots) < 0).any():
        raise ValueError(f"slots has a negative entry, {int(np.asarray(slots).min())}; 0 is the least")


def _check_bounds(lower, upper, num_experts: int) -> None:
    for name, bound in (("lower", lower), ("upper", upper)):
        if bound.shape != (num_experts,):
            raise ValueError(f"{name} has shape {bound.shape}, fitness has {num_experts} experts")
    if _concrete(lower, upper) and (crossed := np.asarray(lower) > np.asarray(upper)).any():
        expert = int(crossed.argmax())
        raise ValueError(f"lower is above upper for expert {expert}: {int(lower[expert])} > {int(upper[expert])}")
