"""The names of a model's weights in messages, and the weights of a few experts as a client trains them.

`shared.PATH` is a shared weight, `expert.N.PATH` that of expert N, numbered group after group. A client that holds and tries M
experts of each group trains a model of M experts: its i-th one of group g has the number g M + i there.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from fedmoe_jax.base import NO_EXPERT
from fedmoe_jax.deploy.messages import Array
from fedmoe_jax.experts import Partition, RouterParam, groups, num_experts


class Layout(NamedTuple):
    """What travels of a model: the shapes of shared weights, and of an expert's weights, by path, for each group."""

    shared: dict[str, Array]
    expert: tuple[dict[str, Array], ...]
    num_experts: int

    def group(self, expert: int) -> dict[str, Array]:
        """The weights of an expert by path."""
        return self.expert[expert // self.num_experts]

    def arrays(self, experts: Iterable[int]) -> dict[str, Array]:
        """The arrays of a message with the shared part and these experts."""
        wanted = {f"shared.{path}": array for path, array in self.shared.items()}
        return wanted | {f"expert.{e}.{path}": array for e in experts for path, array in self.group(e).items()}


def of_model(parts: Partition, *, personal: bool) -> Layout:
    """The layout of a model. Router rows that are `personal` do not travel."""
    names = groups(parts.experts)
    expert: tuple[dict[str, Array], ...] = tuple({} for _ in names)
    for path, variable in nnx.to_flat_state(parts.experts):
        if not (personal and isinstance(variable, RouterParam)):
            expert[names.index(variable.get_metadata().get("group"))][dotted(path)] = Array(variable.shape[1:], variable.dtype.name)
    shared = {dotted(path): Array(variable.shape, variable.dtype.name) for path, variable in nnx.to_flat_state(parts.shared)}
    return Layout(shared, expert, num_experts(parts.experts))


def grouped(numbers: np.ndarray, num_groups: int) -> np.ndarray:
    """Slots or probes that go group after group as [group, part]."""
    return numbers.reshape(num_groups, len(numbers) // num_groups)


def dotted(path: Iterable[Any]) -> str:
    """The name of a weight."""
    return ".".join(map(str, path))


def host(state: Any) -> dict[str, np.ndarray]:
    """The weights of a state by name, on the host."""
    return {dotted(path): np.asarray(variable.get_value()) for path, variable in nnx.to_flat_state(state)}


def cut(layout: Layout, weights: Mapping[str, np.ndarray], experts: Iterable[int]) -> dict[str, np.ndarray]:
    """The arrays of these experts, of weights [expert, ...] by path."""
    return {f"expert.{e}.{path}": weights[path][e % layout.num_experts] for e in experts for path in layout.group(e)}


def filled(state: Any, values: Mapping[str, np.ndarray]) -> Any:
    """A state of the structure of `state` with these values by path."""
    return nnx.from_flat_state([(path, variable.replace(values[dotted(path)])) for path, variable in nnx.to_flat_state(state)])


def stacked(layout: Layout, candidates: np.ndarray, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights [candidate, ...] by path of what a client received, zeros where a place is empty.

    Args:
      candidates: numbers of experts [group, candidate].
    """
    made = {}
    for group, row in zip(layout.expert, candidates, strict=True):
        for path, (shape, dtype) in group.items():
            made[path] = np.zeros((len(row), *shape), dtype)
            for place, expert in enumerate(row):
                if expert != NO_EXPERT:
                    made[path][place] = arrays[f"expert.{expert}.{path}"]
    return made


def renumbered(held: np.ndarray, probed: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The experts that a client holds and tries, [group, candidate], and their numbers among these: (candidates, held, probed)."""
    own, tried = (grouped(numbers, num_groups) for numbers in (held, probed))
    candidates = np.concatenate([own, tried], axis=1)
    number = np.where(candidates == NO_EXPERT, NO_EXPERT, np.arange(candidates.size).reshape(candidates.shape)).astype(np.int32)
    return candidates, number[:, : own.shape[1]].reshape(-1), number[:, own.shape[1] :].reshape(-1)


def of_slots(layout: Layout, held: np.ndarray, deltas: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a message with what became of each held expert, of deltas [slot, ...] by path."""
    rows = grouped(held, len(layout.expert))
    return {
        f"expert.{expert}.{path}": deltas[path][slot]
        for group, row in zip(layout.expert, rows, strict=True)
        for slot, expert in enumerate(row)
        if expert != NO_EXPERT
        for path in group
    }


def feedback(slots: int, probes: int, solo: int) -> dict[str, Array]:
    """The arrays of a message that tell what training told, as `base.Feedback` names them; no solo losses without `solo` examples."""
    each = {"tokens": Array((slots,), "int32"), "correct": Array((slots,)), "loss": Array((slots,))}
    return each | ({"solo_loss": Array((slots + probes,))} if solo else {})
