"""The transportation problem of the assignment, solved on device, to within a step of its integers.

Newton's method on a smoothed dual finds nearly optimal prices of the experts (`newton`); each client takes its best
experts at these prices (`flow`); the few clients that are then too many move along shortest paths, which keeps the
result optimal for prices that follow the distances (`repair`).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fedmoe_jax.alignment import flow, newton
from fedmoe_jax.alignment.repair import repair
from fedmoe_jax.conditional import apply_if

_FEW = 0.5  # clients too many, for each expert, up to which moves are tried
_MOVES = 6  # so many at most, in less time than Newton's method takes


def solve(problem: flow.Problem, prices: Float[Array, " expert"]) -> tuple[Bool[Array, "expert client"], Float[Array, " expert"]]:
    """The best assignment and the prices that prove it. `prices` will do where a few moves from them lead to the best.

    When bounds remain broken, it solves once more, with values so coarse that a client out of bounds costs more than any
    chain of moves can gain.
    """
    num_experts = problem.value.shape[0]
    coarsest = max(num_experts.bit_length() - 3, 0)

    def attempt(state):
        shift, _, prices, _ = state
        steps = problem.steps >> shift
        fine = jnp.where(shift > 0, steps * (num_experts + 1), problem.fine)
        part = ((problem.value & ((1 << shift) - 1)) + problem.part) / (1 << shift)
        rounded = problem._replace(value=problem.value >> shift, steps=steps, fine=fine, part=part)
        start = jnp.round(prices / jnp.exp2(shift)).astype(jnp.int32)
        plan = _optimum(rounded, start)
        load = plan.mask.sum(axis=1)
        broken = ((load < problem.lower) | (load > problem.upper)).any()
        return jnp.int32(coarsest), plan.mask, plan.prices * jnp.exp2(shift), broken & (shift < coarsest)

    start = jnp.int32(0), jnp.zeros(problem.value.shape, bool), prices, jnp.bool_(True)
    _, mask, prices, _ = lax.while_loop(lambda state: state[-1], attempt, start)
    return mask, prices


def _optimum(problem: flow.Problem, prices: Int[Array, " expert"]) -> flow.Plan:
    """The best plan, from `prices` or from none when a few moves from either lead there, else from those of Newton's method."""
    first, last = jnp.where((prices != 0).any(), 0, 1), 2

    def unfit(state):
        plan, count = state
        return (count == first) | ((count <= last) & (flow.surplus(plan) > 0))

    def attempt(state):
        _, count = state
        needed = unfit(state) & (count == last)  # under vmap others may need it
        tried = jnp.where(count == 0, prices, 0), jnp.zeros(prices.shape, jnp.float32)
        plan = flow.plan_at(problem, *apply_if(needed, lambda _: newton.prices(problem), tried))
        worth_it = jnp.where(unfit(state) & (flow.surplus(plan) <= _FEW * prices.shape[0]), _MOVES, 0)
        return repair(problem, plan, jnp.where(needed, flow.FAR, worth_it)), count + 1

    none = flow.Plan(jnp.zeros(problem.value.shape, bool), prices, jnp.zeros(problem.value.shape[0] + 1, jnp.int32))
    return lax.while_loop(unfit, attempt, (none, first))[0]
