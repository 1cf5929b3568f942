"""Repairs a plan that leaves experts with too many or too few clients, along shortest paths [1].

References:
  [1] Ahuja, Magnanti and Orlin, "Network Flows", 1993, section 9.7 (successive shortest paths).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from fedmoe_jax.alignment.flow import FAR, Plan, Problem, apply_if, excess, surplus

_NEAR, _SHARE = 1024, 16  # a repair looks first among so many clients, or one in so many
_PARTS = 8  # in so many steps the arcs of all experts are computed
_RELAXATIONS = 4  # between two looks whether there was any use in them


def repair(problem: Problem, plan: Plan) -> Plan:
    """Moves clients along shortest paths, for as long as the plan leaves experts with too many or too few.

    While that is enough, along such as need only clients that nearly moved already.
    """
    num_clients = problem.slots.shape[0]
    nobody = jnp.zeros(problem.lower.shape, jnp.int32)
    count = max(_NEAR, num_clients // _SHARE)

    def among_all(plan):
        return _move(problem, plan, nobody, jnp.int32(FAR))[0]

    def step(state):
        plan, near = apply_if(state[1], lambda state: _among_near(problem, state[0], count), state)
        return apply_if(~near, among_all, plan), near

    def unfinished(state):
        return surplus(state[0]) > 0

    if num_clients <= count:
        return lax.while_loop(lambda plan: surplus(plan) > 0, among_all, plan)
    return lax.while_loop(unfinished, step, (plan, jnp.bool_(True)))[0]


def _among_near(problem: Problem, plan: Plan, count: int) -> tuple[Plan, Bool[Array, ""]]:
    """Moves among the `count` clients nearest to a change, for as long as none of the others could cost less.

    Returns whether there was a move.
    """
    worth = jnp.where(problem.allowed, problem.value - plan.prices[:, None], -FAR)
    least, best = jnp.where(plan.mask, worth, FAR).min(axis=0), jnp.where(plan.mask, -FAR, worth).max(axis=0)
    margins, near = lax.top_k(jnp.maximum(best - least, -FAR), count + 1)
    near, limit = near[:-1], -margins[-1]
    part = problem._replace(value=problem.value[:, near], allowed=problem.allowed[:, near], slots=problem.slots[near])
    mask = plan.mask[:, near]
    outside = plan.mask.sum(axis=1, dtype=jnp.int32) - mask.sum(axis=1, dtype=jnp.int32)

    def step(state):
        plan, limit, _, before = state
        plan, reach, moved = _move(part, plan, outside, limit)
        return plan, limit - reach, moved, before | moved  # prices changed by at most `reach`, and with them the others' costs

    start = plan._replace(mask=mask), limit, jnp.bool_(True), jnp.bool_(False)
    found, _, _, moved = lax.while_loop(lambda state: state[2] & (surplus(state[0]) > 0), step, start)
    return found._replace(mask=plan.mask.at[:, near].set(found.mask)), moved


def _move(
    problem: Problem, plan: Plan, outside: Int[Array, " expert"], limit: Int[Array, ""]
) -> tuple[Plan, Int[Array, ""], Bool[Array, ""]]:
    """Moves clients along shortest paths that share nothing but one end, a node with too many clients or one with too few.

    Which of both is chosen so that there can be more paths.

    Args:
      outside: further clients of each expert, which stay.
      limit: paths are at most so long; it is what moving a client outside costs at least.

    Returns:
      The plan, the length of the longest path, and whether there is any.
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
    end = _ends(jnp.where(distance <= limit, distance, FAR), parent, jnp.append(client, -1), needs)
    longest = jnp.max(jnp.where(end, distance, 0))
    client = jnp.where(_ancestors(end, parent)[:-1], client, num_clients)
    mask = plan.mask.at[source, client].set(False, mode="drop").at[target, client].set(True, mode="drop")
    reach = jnp.minimum(distance, longest)
    change = jnp.where(back, reach[:-1] - reach[-1], reach[-1] - reach[:-1])
    prices = jnp.clip(plan.prices + change, -problem.fine, problem.fine)  # matters to experts that nobody holds only
    load = outside + mask.sum(axis=1, dtype=jnp.int32)
    return Plan(mask, prices, excess(problem, prices, load)[1]), longest, end.any()


def _costs(problem: Problem, plan: Plan, load, worth) -> Int[Array, "node node"]:
    """Cost of each arc at the current prices, at least 0: between experts, to the bank and from it."""
    leave = jnp.where(plan.mask, worth, FAR)
    enter = jnp.where(plan.mask | ~problem.allowed, -FAR, worth).T  # so that the least over clients is one of vectors
    swap = lax.map(lambda held: jnp.min(held[:, None] - enter, axis=0), leave, batch_size=-(-len(leave) // _PARTS))
    taken, _ = excess(problem, plan.prices, load)
    fine = problem.fine
    to_bank = jnp.where(taken < problem.lower, -fine, jnp.where(taken < problem.upper, 0, fine)) - plan.prices
    from_bank = jnp.where(taken > problem.upper, -fine, jnp.where(taken > problem.lower, 0, fine)) + plan.prices
    from_bank = jnp.where(taken > 0, from_bank, FAR)
    swap = jnp.where(swap < FAR // 2, swap, FAR)  # nobody can swap: what is left of FAR
    cost = jnp.block([[swap, to_bank[:, None]], [from_bank[None, :], jnp.full((1, 1), FAR)]])
    return jnp.minimum(cost, FAR)


def _shortest_paths(cost, excess) -> tuple[Int[Array, " node"], Int[Array, " node"]]:
    """Bellman-Ford from all nodes with an excess: distance, and the node before (itself at the start)."""
    node = jnp.arange(excess.shape[0], dtype=jnp.int32)

    def relax(_, carry):
        distance, parent = carry
        through = distance[:, None] + cost
        nearer = through.min(axis=0) < distance
        parent = jnp.where(nearer, through.argmin(axis=0).astype(jnp.int32), parent)
        return jnp.where(nearer, through.min(axis=0), distance), parent

    def some(carry):
        distance, parent, _ = carry
        new, parent = lax.fori_loop(0, _RELAXATIONS, relax, (distance, parent))
        return new, parent, (new < distance).any()

    start = jnp.where(excess > 0, 0, FAR)
    return lax.while_loop(lambda carry: carry[2], some, (start, node, jnp.bool_(True)))[:2]


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
    return lax.fori_loop(0, parent.shape[0].bit_length(), lambda _, ancestor: ancestor[ancestor], parent)


def _ancestors(end: Bool[Array, " node"], parent: Int[Array, " node"]) -> Bool[Array, " node"]:
    """All nodes from the ends back to their roots."""

    def back(carry):
        seen, _ = carry
        more = seen.at[parent].max(seen)
        return more, (more != seen).any()

    return lax.while_loop(lambda carry: carry[1], back, (end, jnp.bool_(True)))[0]
