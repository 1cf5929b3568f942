"""What local training costs, read off the traced program: FLOPs of products, bytes of parameters and activations."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend import core

from fedmoe_jax import gpu, posterior
from fedmoe_jax.base import Batch, LossFn, RoundCost
from fedmoe_jax.experts import Partition, RouterParam, groups
from fedmoe_jax.local.primal import objective, solo_losses


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the matrix products and convolutions of `function(*args)`, a multiply-add being two.

    Loops count their body times their length; loops of unknown length count it once, branches their dearest.
    Arguments may be `jax.ShapeDtypeStruct`.
    """
    return _flops(_traced(function, *args))


def _traced(function: Callable[..., Any], *args: Any) -> Any:
    with gpu.portable():
        return jax.make_jaxpr(function)(*args).jaxpr


def _flops(jaxpr: Any) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracting)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_features
    inner = [_flops(getattr(value, "jaxpr", value)) for value in _subprograms(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _subprograms(params: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(params, is_leaf=lambda value: isinstance(value, core.Jaxpr | core.ClosedJaxpr))
    return [value for value in leaves if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plain_bytes(values: int, bits: int) -> int:
    """Bytes of a tensor of so many values of so many bits without compression."""
    return values * bits // 8


def expert_bytes(
    experts: Any, *, personal_router: bool = False, control_variates: bool = False, num_bytes: Callable[[int, int], int] = plain_bytes
) -> tuple[int, ...]:
    """Bytes of one expert of each group that travel, in the order of `experts.groups`; without router rows that stay on the client.

    With `control_variates` a control variate travels with each weight. `num_bytes(values, bits)` are those of a tensor on the link.
    """
    total = dict.fromkeys(groups(experts), 0)
    for variable in jax.tree.leaves(experts, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        if not (personal_router and isinstance(variable, RouterParam)):
            one = jax.eval_shape(lambda weights: jax.tree.map(lambda weight: weight[0], weights), variable)
            total[variable.group] += (1 + control_variates) * link_bytes(one, num_bytes)
    return tuple(total.values())


def link_bytes(tree: Any, num_bytes: Callable[[int, int], int]) -> int:
    """Bytes of all arrays of a pytree on the link, each on its own."""
    return sum(num_bytes(leaf.size, 8 * leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))


def round_cost(
    parts: Partition,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    batch: Batch,
    *,
    personal_router: bool = False,
    control_variates: bool = False,
    solo_batch: Batch | None = None,
    max_slots: int = 1,
    statistics_batch: Batch | None = None,
    down: Callable[[int, int], int] = plain_bytes,
    up: Callable[[int, int], int] = plain_bytes,
) -> RoundCost:
    """The cost of a client's round from the actual model: the program is traced with one and with two experts of each group.

    Args:
      batch: one batch's shapes (arrays or `jax.ShapeDtypeStruct`).
      personal_router: whether router rows stay on the client and do not travel.
      control_variates: whether a control variate travels with each weight; a client then also keeps its correction and mean gradient.
      solo_batch: shapes of the batch on which experts are scored alone; None if they are not.
      max_slots: experts that the client holds, of each other group while one is scored alone, at most.
      statistics_batch: shapes of the batch of which a client returns statistics; None if it returns none.
      down, up: down(values, bits) are the bytes on the link of a tensor of so many values that have so many bits in memory.

    Returns:
      What an expert costs, one of every group, is the difference between two held experts and one, or three and two. Memory is
      weights, gradients, deltas and optimizer state, plus every intermediate of the forward pass on one batch.
    """
    one = jax.eval_shape(lambda tree: jax.tree.map(lambda weight: weight[:1], tree), parts.experts)

    num_groups = len(groups(parts.experts))

    def held(slots):
        return jax.tree.map(lambda w: jax.ShapeDtypeStruct((slots, *w.shape[1:]), w.dtype), parts.experts)

    def arguments(slots):
        return held(slots), parts.shared, batch, jnp.ones(num_groups * slots, bool), jnp.zeros(num_groups * slots), jax.random.key(0)

    def flops(slots):
        return count_flops(jax.grad(lambda *a: objective(parts, loss_fn, *a)[0], (0, 1)), *arguments(slots)) / batch.mask.shape[0]

    def activations(slots):
        return _intermediate_bytes(_traced(lambda *a: objective(parts, loss_fn, *a)[0], *arguments(slots)))

    def solo(candidates):
        if solo_batch is None:
            return 0
        score = functools.partial(solo_losses, parts=parts, loss_fn=loss_fn)
        slots = num_groups * min(candidates, max_slots)
        return count_flops(score, jax.random.key(0), solo_batch, held(candidates), parts.shared, jnp.ones(slots, bool), jnp.zeros(slots))

    kept = max(activations(3) - activations(2), 0)  # the program of a single expert is another, without a batch of experts
    copies = 3.0 + 2.0 * control_variates + tree_bytes(jax.eval_shape(optimizer.init, one)) / tree_bytes(one)
    shared_bytes = tree_bytes(parts.shared)

    def travels(num_bytes):
        each = expert_bytes(parts.experts, personal_router=personal_router, control_variates=control_variates, num_bytes=num_bytes)
        return (1 + control_variates) * link_bytes(parts.shared, num_bytes), sum(each)

    memory = copies * shared_bytes + max(activations(2) - 2 * kept, 0), copies * tree_bytes(one) + kept
    alone = _shared_and_each(solo, max_slots if num_groups > 1 else 1)
    report = 0.0, 0
    if statistics_batch is not None:
        slots = num_groups * max_slots
        seen = functools.partial(posterior.observe, parts)
        flops_seen = count_flops(seen, held(max_slots), parts.shared, statistics_batch, jnp.ones(slots, bool), jnp.zeros(slots))
        report = sum(posterior.report_bytes(posterior.start(parts, statistics_batch), num_groups)), flops_seen
    numbers = (*travels(down), *memory, *_shared_and_each(flops), *alone, *report, *travels(up))
    return RoundCost(*map(np.float32, numbers))


def _shared_and_each(count: Callable[[int], int | float], first: int = 1) -> tuple[int | float, int | float]:
    """The parts of `count(experts)` that do not and that do grow with the experts, from `first` experts and one more."""
    one, two = count(first), count(first + 1)
    return (first + 1) * one - first * two, two - one


def _intermediate_bytes(jaxpr: Any) -> int:
    """Bytes of every value that a program computes, calls and one pass of each loop included.

    Of what is computed again in the backward pass only the results stay, and the largest inside is there once.
    """
    kept, again = _kept_and_again(jaxpr)
    return kept + again


def _kept_and_again(jaxpr: Any) -> tuple[int, int]:
    kept = again = 0
    for equation in jaxpr.eqns:
        inside = [_kept_and_again(getattr(program, "jaxpr", program)) for program in _subprograms(equation.params)]
        outputs = [v.aval for v in equation.outvars if hasattr(v.aval, "dtype") and hasattr(v.aval.dtype, "itemsize")]
        results = sum(math.prod(v.shape) * v.dtype.itemsize for v in outputs)
        whole, most = sum(own for own, _ in inside), max((below for _, below in inside), default=0)
        rematerialised = equation.primitive is core.primitives.remat_p
        kept += whole if inside and not rematerialised else results
        again = max(again, most + whole * rematerialised)
    return kept, again
