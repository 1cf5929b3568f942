"""The transportation problem of the assignment, solved exactly on device.

Maximise sum value x over masks x with row sums `slots` and column sums within [lower, upper]. Experts are the nodes of
a small graph. An arc a -> b moves a client from expert a to expert b and costs the least value lost by that over the
clients that hold a and not b. One more node, the bank, takes in what each expert gets: free within the bounds, for
a large fine outside. Newton's method on a smoothed dual finds nearly optimal prices of the experts; each client takes
its best experts at these prices; the few clients that are then too many move along shortest paths, which keeps the
result optimal for prices that follow the distances [1]. Values and prices are integers, so that this is exact.

Everything is laid out [expert, client], which streams well.

References:
  [1] Ahuja, Magnanti and Orlin, "Network Flows", 1993, section 9.7 (successive shortest paths).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_UNITS = 1 << 18  # of an integer to a value of 1
_FAR = 1 << 29  # the cost of what is impossible; the sum of two still fits in 32 bits
_SHRINK = 10.0**-0.5
_SMOOTHING = tuple(0.1 * _SHRINK**level for level in range(11))  # relative to the range of values
_COARSE, _SAMPLE = 4, 1024  # the first few smoothings need about so many clients only
_NEWTON_STEPS = 10  # at most, for each smoothing
_FEW = 0.5  # moving so few clients, for each expert, takes less time than Newton's method
_NEAR = 1024  # clients among which a repair looks first


class Problem(NamedTuple):
    """Values lie in 0 to `resolution(num_experts)`; each client above `upper` or below `lower` costs `fine`."""

    value: Int[Array, "expert client"]
    allowed: Bool[Array, "expert client"]
    slots: Int[Array, " client"]
    lower: Int[Array, " expert"]
    upper: Int[Array, " expert"]

    @property
    def fine(self) -> int:
        """More than any chain of moves can gain, so that as few clients as possible are out of bounds."""
        return resolution(self.value.shape[0]) * (self.value.shape[0] + 1)


class _Plan(NamedTuple):
    """The mask is best for the prices. Nodes with an excess have too many clients for their price, or too few."""

    mask: Bool[Array, "expert client"]
    prices: Int[Array, " expert"]
    excess: Int[Array, " node"]


def resolution(num_experts: int) -> int:
    """The largest power of two for which no sum of costs overflows 32 bits."""
    return 1 << (26 - num_experts.bit_length())


def solve(problem: Problem, prices: Int[Array, " expert"]) -> tuple[Bool[Array, "expert client"], Int[Array, " expert"]]:
    """The best assignment and the prices that prove it.

    Starts from `prices` when they are nearly right already, else from those of Newton's method.
    """

    def anew(state):
        return _plan(problem, _newton(problem, state[0].prices)), jnp.bool_(False)

    # A loop of at most one step, not a cond: under vmap a cond computes both branches, this only what some problem needs.
    given = _plan(problem, prices), jnp.bool_(True)
    few = _FEW * problem.value.shape[0]
    plan, _ = lax.while_loop(lambda state: state[1] & (_surplus(state[0]) > few), anew, given)
    plan = lax.while_loop(lambda plan: _surplus(plan) > 0, functools.partial(_repair, problem), plan)
    return plan.mask, plan.prices


def _plan(problem: Problem, prices) -> _Plan:
    """Each client takes its best experts at these prices."""
    prices = jnp.clip(prices, -problem.fine, problem.fine)
    worth = jnp.where(problem.allowed, problem.value - prices[:, None], -_FAR)
    mask = _best(worth, problem.slots) & problem.allowed
    return _Plan(mask, prices, _excess(problem, prices, mask)[1])


def _best(worth: Int[Array, "expert client"], slots: Int[Array, " client"]) -> Bool[Array, "expert client"]:
    """The `slots` highest of each column, the first of equals."""
    least = _least(worth, slots)
    above, equal = worth > least, worth == least
    return above | (equal & (jnp.cumsum(equal, axis=0) <= slots - above.sum(axis=0)))


def _least(worth: Int[Array, "expert client"], slots: Int[Array, " client"]) -> Int[Array, " client"]:
    """The least of the `slots` highest of each column. Bisects, which is much faster than sorting."""

    def halve(_, interval):
        low, high = interval
        middle = low + (high - low) // 2
        enough = (worth >= middle).sum(axis=0) >= slots
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    start = jnp.full(slots.shape, -_FAR), jnp.full(slots.shape, _FAR)
    return lax.fori_loop(0, _FAR.bit_length(), halve, start)[0]


def _surplus(plan: _Plan) -> Int[Array, ""]:
    """Clients that are too many somewhere; 0 means optimal. As many are too few elsewhere."""
    return jnp.maximum(plan.excess, 0).sum()


def _excess(problem: Problem, prices, mask) -> tuple[Int[Array, " expert"], Int[Array, " node"]]:
    """What the bank takes from each expert at these prices, and the excess that this leaves at each node, the bank last.

    At a price above 0 an expert is full, below 0 it has the least it may have; only at the fine are bounds broken.
    """
    load = mask.sum(axis=1, dtype=jnp.int32)
    least = jnp.where(prices > 0, problem.upper, jnp.where(prices > -problem.fine, problem.lower, 0))
    most = jnp.where(prices < 0, problem.lower, jnp.where(prices < problem.fine, problem.upper, mask.shape[1]))
    taken = jnp.clip(load, least, most)
    return taken, jnp.append(load - taken, (taken - load).sum())


def _newton(problem: Problem, start: Int[Array, " expert"]) -> Int[Array, " expert"]:
    """Nearly optimal prices: those of a problem in which clients waver within `smoothing` of their threshold.

    A client holds sigmoid((value - price - threshold) / smoothing) of an expert, its threshold being such that it fills
    its slots; an expert has lower + (upper - lower) sigmoid(price / smoothing) clients. Newton's method solves for
    prices and thresholds, eliminating the thresholds, while the smoothing shrinks.
    """
    num_experts, num_clients = problem.value.shape
    scale = resolution(num_experts)
    value = jnp.where(problem.allowed, problem.value / scale, -1e3)
    slots, lower, room = (x.astype(jnp.float32) for x in (problem.slots, problem.lower, problem.upper - problem.lower))
    with_slots = jnp.cumsum(problem.slots > 0)
    some = jnp.searchsorted(with_slots, jnp.linspace(1, with_slots[-1], min(_SAMPLE, num_clients)).astype(jnp.int32))
    share = slots[some].sum() / jnp.maximum(slots.sum(), 1.0)
    prices = jnp.clip(start / scale, -1.0, 1.0)
    prices = _anneal(_SMOOTHING[:_COARSE], value[:, some], slots[some], share * lower, share * room, prices)
    prices = _anneal(_SMOOTHING[_COARSE:], value, slots, lower, room, prices)
    free = (problem.lower < problem.upper) & (jnp.abs(prices) < 20.0 * _SMOOTHING[-1])
    return jnp.round(jnp.where(free, 0.0, prices) * scale).astype(jnp.int32)


def _anneal(smoothings: tuple[float, ...], value, slots, lower, room, prices) -> Float[Array, " expert"]:
    """Newton's method for one smoothing after the other, from prices near those of the first."""

    def step(smoothing, state):
        prices, thresholds, _, count = state
        hold = jax.nn.sigmoid((value - prices[:, None] - thresholds) / smoothing)
        full = jax.nn.sigmoid(prices / smoothing)
        slope = hold * (1.0 - hold)
        steepness = slope.sum(axis=0) + 1e-3
        row, column = hold.sum(axis=0) - slots, hold.sum(axis=1) - lower - room * full
        part = slope / steepness
        diagonal = slope.sum(axis=1) + room * full * (1.0 - full)
        damping = 1e-2 + 1e-3 * diagonal.mean()
        hessian = jnp.diag(diagonal + damping) - jnp.matmul(part, slope.T, precision=lax.Precision.HIGHEST)
        solution = jax.scipy.linalg.solve(hessian, column - part @ row, assume_a="pos")
        change = jnp.clip(jnp.nan_to_num(solution), -4.0, 4.0)
        correction = jnp.clip((row - change @ slope) / steepness, -6.0, 6.0)
        prices, thresholds = prices + smoothing * change, thresholds + smoothing * correction
        return prices, thresholds, jnp.abs(column).max(), count + 1

    def unsettled(state):
        _, _, worst, count = state
        return (worst > tolerance) & (count < _NEWTON_STEPS)

    def level(carry, smoothing):
        prices, thresholds = carry
        free = (room > 0) & (jnp.abs(prices) < 5.0 * smoothing / _SHRINK)  # prices that are 0 but for the smoothing
        state = (jnp.where(free, _SHRINK * prices, prices), thresholds, jnp.inf, 0)
        return lax.while_loop(unsettled, functools.partial(step, smoothing), state)[:2], None

    tolerance = jnp.maximum(0.01 * slots.sum() / value.shape[0], 0.5)  # clients that an expert may be off
    worth = value - prices[:, None]
    least = _least((worth * _UNITS).astype(jnp.int32), slots.astype(jnp.int32)) / _UNITS
    start = prices, jnp.where(slots > 0, least - 0.5 * smoothings[0], worth.max(axis=0) + smoothings[0])
    (prices, _), _ = lax.scan(level, start, jnp.array(smoothings, jnp.float32))
    return prices


def _repair(problem: Problem, plan: _Plan) -> _Plan:
    """Moves clients along shortest paths: such as need only clients that nearly moved already, else whichever are shortest."""
    num_clients = problem.slots.shape[0]

    def among_all(state):
        return _move(problem, state[0], jnp.arange(num_clients), jnp.int32(_FAR))[0], jnp.bool_(True)

    if num_clients <= _NEAR:
        return among_all((plan,))[0]
    worth = jnp.where(problem.allowed, problem.value - plan.prices[:, None], -_FAR)
    least, best = jnp.where(plan.mask, worth, _FAR).min(axis=0), jnp.where(plan.mask, -_FAR, worth).max(axis=0)
    margins, near = lax.top_k(jnp.maximum(best - least, -_FAR), _NEAR + 1)
    moved = _move(problem, plan, near[:-1], -margins[-1])
    plan, _ = lax.while_loop(lambda state: ~state[1], among_all, moved)  # again a loop of at most one step instead of a cond
    return plan


def _move(problem: Problem, plan: _Plan, near: Int[Array, " near"], limit: Int[Array, ""]) -> tuple[_Plan, Bool[Array, ""]]:
    """Moves some of the clients `near` along disjoint shortest paths, one from each node with too many, to nodes with too few.

    Paths are at most `limit` long, which is what moving any other client costs at least. Returns whether there are such paths.
    """
    mask, allowed = plan.mask[:, near], problem.allowed[:, near]
    worth = problem.value[:, near] - plan.prices[:, None]
    distance, parent, root = _shortest_paths(_costs(problem, plan, mask, allowed, worth), plan.excess)
    end = _ends(jnp.where(distance <= limit, distance, _FAR), root, plan.excess)
    reach = jnp.minimum(distance, jnp.max(jnp.where(end, distance, 0)))
    on_path = _ancestors(end, parent)

    node = jnp.arange(plan.prices.shape[0])
    source = jnp.minimum(parent[:-1], node[-1])
    moves = on_path[:-1] & (parent[:-1] == source) & (source != node)  # the bank's own arcs move nobody
    loss = jnp.where(mask[source] & ~mask & allowed, worth[source] - worth, _FAR)
    client = jnp.where(moves, near[loss.argmin(axis=1)], problem.slots.shape[0])
    mask = plan.mask.at[source, client].set(False, mode="drop").at[node, client].set(True, mode="drop")
    prices = jnp.clip(plan.prices - reach[:-1] + reach[-1], -problem.fine, problem.fine)  # matters to unreachable experts only
    return _Plan(mask, prices, _excess(problem, prices, mask)[1]), end.any()


def _costs(problem: Problem, plan: _Plan, mask, allowed, worth) -> Int[Array, "node node"]:
    """Cost of each arc at the current prices, at least 0: between experts, to the bank and from it."""
    leave = jnp.where(mask, worth, _FAR)
    enter = jnp.where(mask | ~allowed, -_FAR, worth)
    swap = lax.map(lambda held: jnp.min(held - enter, axis=1), leave)
    taken, _ = _excess(problem, plan.prices, plan.mask)
    fine = problem.fine
    to_bank = jnp.where(taken < problem.lower, -fine, jnp.where(taken < problem.upper, 0, fine)) - plan.prices
    from_bank = jnp.where(taken > problem.upper, -fine, jnp.where(taken > problem.lower, 0, fine)) + plan.prices
    from_bank = jnp.where(taken > 0, from_bank, _FAR)
    swap = jnp.where(swap < _FAR // 2, swap, _FAR)  # nobody can swap: what is left of _FAR
    cost = jnp.block([[swap, to_bank[:, None]], [from_bank[None, :], jnp.full((1, 1), _FAR)]])
    return jnp.minimum(cost, _FAR)


def _shortest_paths(cost, excess) -> tuple[Int[Array, " node"], Int[Array, " node"], Int[Array, " node"]]:
    """Bellman-Ford from all nodes with too many clients: distance, the node before, and the node at the start."""
    node = jnp.arange(excess.shape[0], dtype=jnp.int32)

    def relax(carry):
        distance, parent, _ = carry
        through = distance[:, None] + cost
        nearer = through.min(axis=0) < distance
        parent = jnp.where(nearer, through.argmin(axis=0).astype(jnp.int32), parent)
        return jnp.where(nearer, through.min(axis=0), distance), parent, nearer.any()

    start = jnp.where(excess > 0, 0, _FAR)
    distance, parent, _ = lax.while_loop(lambda carry: carry[2], relax, (start, node, jnp.bool_(True)))
    root = lax.fori_loop(0, node.shape[0].bit_length(), lambda _, ancestor: ancestor[ancestor], parent)
    return distance, parent, root


def _ends(distance, root, excess) -> Bool[Array, " node"]:
    """For each root the nearest of the nodes with too few clients that it reaches."""
    num_nodes = excess.shape[0]
    node = jnp.arange(num_nodes)
    goal = jnp.where((excess < 0) & (distance < _FAR), distance, _FAR)
    nearest = jax.ops.segment_min(goal, root, num_nodes)[root]
    first = jax.ops.segment_min(jnp.where((goal < _FAR) & (goal == nearest), node, num_nodes), root, num_nodes)
    return first[root] == node


def _ancestors(end: Bool[Array, " node"], parent: Int[Array, " node"]) -> Bool[Array, " node"]:
    """All nodes from the ends back to their roots."""

    def back(carry):
        seen, _ = carry
        more = seen.at[parent].max(seen)
        return more, (more != seen).any()

    return lax.while_loop(lambda carry: carry[1], back, (end, jnp.bool_(True)))[0]
