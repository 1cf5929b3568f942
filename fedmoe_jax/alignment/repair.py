"""Repairs a plan that leaves experts with too many or too few clients, along shortest paths [1].

References:
  [1] Ahuja, Magnanti and Orlin, "Network Flows", 1993, section 9.7 (successive shortest paths).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from fedmoe_jax.alignment.flow import FAR, Plan, Problem, excess, surplus
from fedmoe_jax.conditional import apply_if

_NEAR, _SHARE = 1024, 16  # a repair of a large problem looks first among so many clients, or one in so many
_LARGE = 1 << 26  # swaps of experts that clients could make; below, to look among all takes little longer and compiles sooner
_ROWS, _ROWS_ON_CPU = 8, 4  # experts whose arcs are computed side by side
_AT_ONCE = 1 << 23  # swaps up to which other devices compute the arcs of all
_SLACK = 4  # times the cost of a change outside by which prices may change before the nearest are chosen anew
_RELAXATIONS = 8  # between two looks whether the last was of any use


def repair(problem: Problem, plan: Plan, most: Int[Array, ""] | int = FAR) -> Plan:
    """Moves clients along shortest paths, at most `most` times, until the plan leaves no expert with too many or too few.

    In a large problem it looks among the clients that nearly moved already first, and among all of them where that does not help.
    """
    num_experts, num_clients = problem.value.shape
    nobody = jnp.zeros(num_experts, jnp.int32)
    count = max(_NEAR, num_clients // _SHARE)

    def among_all(state):
        plan, moves = state
        return _move(problem, plan, nobody)[0], moves + 1

    def step(state):
        plan, _ = state
        found, moves = _among_near(problem, state, count, most)
        better = surplus(found) < surplus(plan)
        found = jax.tree.map(lambda new, old: jnp.where(better, new, old), found, plan)
        return apply_if(~better & (surplus(plan) > 0) & (moves < most), among_all, (found, moves))

    def unfinished(state):
        plan, moves = state
        return (surplus(plan) > 0) & (moves < most)

    large = num_clients > count and num_clients * num_experts**2 > _LARGE
    return lax.while_loop(unfinished, step if large else among_all, (plan, jnp.int32(0)))[0]


def _among_near(problem: Problem, state, count: int, most) -> tuple[Plan, Int[Array, ""]]:
    """Moves among the `count` clients nearest to a change; then all others take what is best for them at the new prices.

    It stops where prices have changed by several times what it would cost the others to change, as too many of them would. State
    and result are a plan and the number of moves so far.
    """
    plan, moves = state
    worth = jnp.where(problem.allowed, problem.value - plan.prices[:, None], -FAR)
    least, best = jnp.where(plan.mask, worth, FAR).min(axis=0), jnp.where(plan.mask, -FAR, worth).max(axis=0)
    margins, near = lax.top_k(jnp.maximum(best - least, -FAR), count + 1)
    near, limit = near[:-1], _SLACK * jnp.clip(-margins[-1], 0, FAR // _SLACK)
    part = problem._replace(value=problem.value[:, near], allowed=problem.allowed[:, near], slots=problem.slots[near])
    mask = plan.mask[:, near]
    outside = plan.mask.sum(axis=1, dtype=jnp.int32) - mask.sum(axis=1, dtype=jnp.int32)

    def useful(state):
        found, moves, moved = state
        return moved & (surplus(found) > 0) & (moves < most) & (jnp.abs(found.prices - plan.prices).max() <= limit)

    def move(state):
        found, moves, _ = state
        found, moved = _move(part, found, outside)
        return found, moves + 1, moved

    found, moves, _ = lax.while_loop(useful, move, (plan._replace(mask=mask), moves, jnp.bool_(True)))
    mask = _settled(problem, plan.mask.at[:, near].set(found.mask), found.prices)
    return Plan(mask, found.prices, excess(problem, found.prices, mask.sum(axis=1, dtype=jnp.int32))[1]), moves


def _settled(problem: Problem, mask: Bool[Array, "expert client"], prices) -> Bool[Array, "expert client"]:
    """The mask after each client exchanged what it holds for what is worth more than a step more to it at these prices."""
    worth = jnp.where(problem.allowed, problem.value - prices[:, None], -FAR)
    expert = jnp.arange(worth.shape[0])[:, None]

    def exchange(state):
        mask, _ = state
        held, free = jnp.where(mask, worth, FAR), jnp.where(mask, -FAR, worth)
        wrong = free.max(axis=0) > held.min(axis=0) + 1
        changed = wrong & ((expert == held.argmin(axis=0)) | (expert == free.argmax(axis=0)))
        return mask ^ changed, wrong.any()

    return lax.while_loop(lambda state: state[1], exchange, (mask, jnp.bool_(True)))[0]


def _move(problem: Problem, plan: Plan, outside: Int[Array, " expert"]) -> tuple[Plan, Bool[Array, ""]]:
    """Moves clients along shortest paths that share nothing but one end, a node with too many clients or one with too few.

    Which of both is chosen so that there can be more paths.

    Args:
      outside: further clients of each expert, which stay.

    Returns:
      The plan, and whether there is any such path.
    """
    num_experts, num_clients = problem.value.shape
    load = outside + plan.mask.sum(axis=1, dtype=jnp.int32)
    worth = problem.value - plan.prices[:, None]
    cost = _costs(problem, plan, load, worth)
    emptied = (excess(problem, plan.prices, load)[0] == 0) & (load > 0)  # only forwards do their prices stay within the fine
    back = ((plan.excess < 0).sum() < (plan.excess > 0).sum()) & ~emptied.any()  # from few with too few to many with too many
    needs = jnp.where(back, -plan.excess, plan.excess)
    distance, parent = _shortest_paths(jnp.where(back, cost.T, cost), needs)

    node = jnp.arange(num_experts)
    before = jnp.minimum(parent[:-1], num_experts - 1)
    source, target = jnp.where(back, node, before), jnp.where(back, before, node)
    moves = (parent[:-1] == before) & (before != node)  # the bank's own arcs move nobody
    loss = jnp.where(plan.mask[source] & ~plan.mask[target] & problem.allowed[target], worth[source] - worth[target], FAR)
    client = jnp.where(moves, loss.argmin(axis=1), num_clients + node)
    end = _ends(distance, parent, jnp.append(client, -1), needs)
    longest = jnp.max(jnp.where(end, distance, 0))
    client = jnp.where(_ancestors(end, parent)[:-1], client, num_clients)
    mask = plan.mask.at[source, client].set(False, mode="drop").at[target, client].set(True, mode="drop")
    reach = jnp.minimum(distance, longest)
    change = jnp.where(back, reach[:-1] - reach[-1], reach[-1] - reach[:-1])
    prices = jnp.clip(plan.prices + change, -problem.fine, problem.fine)  # matters to experts that nobody holds only
    load = outside + mask.sum(axis=1, dtype=jnp.int32)
    return Plan(mask, prices, excess(problem, prices, load)[1]), end.any()


def _costs(problem: Problem, plan: Plan, load, worth) -> Int[Array, "node node"]:
    """Cost of each arc at the current prices, at least 0: between experts, to the bank and from it."""
    leave = jnp.where(plan.mask, worth, FAR)
    enter = jnp.where(plan.mask | ~problem.allowed, -FAR, worth).T  # so that the least over clients is one of vectors
    few = worth.size * worth.shape[0] <= _AT_ONCE
    rows = _ROWS_ON_CPU if jax.default_backend() == "cpu" else worth.shape[0] if few else _ROWS
    swap = lax.map(lambda held: jnp.min(held[:, None] - enter, axis=0), leave, batch_size=rows)
    taken, _ = excess(problem, plan.prices, load)
    fine = problem.fine
    to_bank = jnp.where(taken < problem.lower, -fine, jnp.where(taken < problem.upper, 0, fine)) - plan.prices
    from_bank = jnp.where(taken > problem.upper, -fine, jnp.where(taken > problem.lower, 0, fine)) + plan.prices
    from_bank = jnp.where(taken > 0, from_bank, FAR)
    swap = jnp.where(swap < FAR // 2, jnp.maximum(swap, 0), FAR)  # of who holds a step less; nobody can swap: what is left of FAR
    cost = jnp.block([[swap, to_bank[:, None]], [from_bank[None, :], jnp.full((1, 1), FAR)]])
    return jnp.minimum(cost, FAR)


def _shortest_paths(cost, excess) -> tuple[Int[Array, " node"], Int[Array, " node"]]:
    """Bellman-Ford from all nodes with an excess: distance, and the node before (itself at the start)."""
    node = jnp.arange(excess.shape[0], dtype=jnp.int32)

    def relax(_, carry):
        distance, parent, _ = carry
        through = distance[:, None] + cost
        least = through.min(axis=0)
        nearer = least < distance
        parent = jnp.where(nearer, through.argmin(axis=0).astype(jnp.int32), parent)
        return jnp.where(nearer, least, distance), parent, nearer

    def some(carry):
        return lax.fori_loop(0, _RELAXATIONS, relax, carry, unroll=True)

    begin = some((jnp.where(excess > 0, 0, FAR), node, excess > 0))
    return lax.while_loop(lambda carry: carry[2].any(), some, begin)[:2]


def _ends(distance, parent, client, excess) -> Bool[Array, " node"]:
    """Of the nodes with a negative excess the nearest in each branch that starts with a client of its own, within the excess.

    A branch is what hangs together in the tree of paths without the node where it starts.
    """
    num_nodes = excess.shape[0]
    node = jnp.arange(num_nodes)
    root, branch = jax.vmap(_top)(jnp.stack([parent, jnp.where(parent[parent] == parent, node, parent)]))
    goal = jnp.where((excess < 0) & (distance < FAR), distance, FAR)
    nearest = jax.ops.segment_min(goal, branch, num_nodes)[branch]
    first = jax.ops.segment_min(jnp.where((goal < FAR) & (goal == nearest), node, num_nodes), branch, num_nodes)
    end = first[branch] == node
    earlier = (goal[:, None] < goal) | ((goal[:, None] == goal) & (node[:, None] < node))
    ahead = end[:, None] & (root[:, None] == root) & earlier
    rival = ahead & (client[branch][:, None] == client[branch])
    return end & ~rival.any(axis=0) & (ahead.sum(axis=0) < excess[root])


def _top(parent: Int[Array, " node"]) -> Int[Array, " node"]:
    """The last of each node's ancestors."""
    return lax.fori_loop(0, parent.shape[0].bit_length(), lambda _, ancestor: ancestor[ancestor], parent, unroll=True)


def _ancestors(end: Bool[Array, " node"], parent: Int[Array, " node"]) -> Bool[Array, " node"]:
    """All nodes from the ends back to their roots."""

    def back(_, carry):
        seen, ancestor = carry
        return seen.at[ancestor].max(seen), ancestor[ancestor]

    return lax.fori_loop(0, parent.shape[0].bit_length(), back, (end, parent), unroll=True)[0]
