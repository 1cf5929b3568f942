"""Statistics for the global router: what clients count, what the server keeps of it, and what it all costs."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from moe_oracle import expert as expert_by_hand
from moe_oracle import softmax
from small_groups import HELD, fixed
from small_round import (
    BATCH,
    CLASSES,
    CLIENTS,
    EXPERTS,
    FEATURES,
    KEY,
    SIZES,
    algorithm,
    distance,
    population,
    weights,
)
from test_round import close, same

from fedmoe_jax import NO_EXPERT, nn, partition, posterior, sampling
from fedmoe_jax.alignment import capacity
from fedmoe_jax.base import Batch, ClientProfile, client_keys, stage_key
from fedmoe_jax.experts import gather
from fedmoe_jax.kernels import is_dual
from fedmoe_jax.local.cohort import batch_shape
from fedmoe_jax.local.cost import round_cost
from fedmoe_jax.local.primal import local_batch
from fedmoe_jax.local.slots import receive
from fedmoe_jax.models.losses import IGNORE, cross_entropy
from fedmoe_jax.posterior import KEPT
from fedmoe_jax.round import STATISTICS_BATCHES
from fedmoe_jax.training.config import TrainConfig, validate

HIDDEN, WIDTH = 5, 6
FLAT, MIXED = (None,), ("a", "b", "a")


class Net(nnx.Module):
    """MoE layers of these groups over whatever axes an example has, then class logits of each position, or (pool) of their mean."""

    def __init__(self, names=FLAT, top_k=1, pool=False, layer=nn.MoE, **options):
        rngs = nnx.Rngs(0)
        self.into = nn.Linear(FEATURES, HIDDEN, rngs=rngs)
        quiet = dict(top_k=top_k, balance_weight=0.0, z_weight=0.0, rngs=rngs)
        self.moe = nnx.List([layer(HIDDEN, WIDTH, EXPERTS, group=name, **quiet, **options) for name in names])
        for layer in self.moe:
            layer.router.set_value(20 * layer.router.get_value())  # else close to no preference
        self.head = nn.Linear(HIDDEN, CLASSES, rngs=rngs)
        self.pool = pool

    def __call__(self, x):
        h = jax.nn.relu(self.into(x))
        for layer in self.moe:
            h = h + layer(h)
        return self.head(h.mean(1) if self.pool else h)


class Mute(nn.MoE):
    """A layer that does as it is told but does not say what it saw."""

    def __call__(self, x):
        y = super().__call__(x)
        self.slots.set_value(dataclasses.replace(self.slots.get_value(), seen=None))
        return y


def values_of(tree, place):
    """The weights of one layer, by name."""
    layer = tree["moe"][place]
    return {name: np.asarray(layer[name].get_value(), np.float64) for name in ("router", "w_in", "w_out", "b_in", "b_out")}


def features_of(shared, x):
    linear = {name: np.asarray(shared["into"][name].get_value(), np.float64) for name in ("kernel", "bias")}
    return np.maximum(np.asarray(x, np.float64).reshape(-1, FEATURES) @ linear["kernel"] + linear["bias"], 0)


def by_hand(names, experts, shared, batch, held, prior, top_k=1):
    """(count, total, second) of each layer in the order of its place, token by token; `held` and `prior` are of [group, slot]."""
    tokens, y = features_of(shared, batch.x), np.asarray(batch.y)
    label = np.where(np.asarray(batch.mask).reshape(-1, *(1,) * (y.ndim - 1)), y, IGNORE).reshape(-1)
    label = np.repeat(label, len(tokens) // len(label))
    groups, layers = tuple(dict.fromkeys(names)), []
    for place, name in enumerate(names):
        filled, extra = (np.asarray(rows)[groups.index(name)] for rows in (held, prior))
        values, choices = values_of(experts, place), np.flatnonzero(filled)
        sums = np.zeros((len(filled), CLASSES)), np.zeros((len(filled), CLASSES, HIDDEN)), np.zeros((len(filled), HIDDEN, HIDDEN))
        after = tokens.copy()
        for n, token in enumerate(tokens):
            logits = values["router"][choices] @ token + extra[choices]
            best = np.argsort(-logits, kind="stable")[:top_k]
            for slot, gate in zip(choices[best], softmax(logits[best]) if len(best) else (), strict=True):
                after[n] += gate * expert_by_hand(values, slot, token)
                if label[n] != IGNORE:
                    sums[0][slot, label[n]] += gate
                    sums[1][slot, label[n]] += gate * token
                    sums[2][slot] += gate * np.outer(token, token)
        layers.append(sums)
        tokens = after
    return layers


def assert_seen(found, expected, names=FLAT, rtol=1e-4, atol=1e-4):
    """Statistics against those of `by_hand`: layers come group after group."""
    groups = tuple(dict.fromkeys(names))
    order = sorted(range(len(names)), key=lambda place: (groups.index(names[place]), place))
    assert [layer.group for layer in found] == [groups.index(names[place]) for place in order]
    for layer, place in zip(found, order, strict=True):
        for got, wanted in zip((layer.count, layer.total, layer.second), expected[place], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol)


def drawn(shape, labels, seed=0):
    """A batch with masked examples and ignored labels."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, CLASSES, labels)
    y[np.unravel_index(1, labels)] = IGNORE
    x = draw.normal(size=(*shape, FEATURES)).astype(np.float32)
    return Batch(jnp.asarray(x), jnp.asarray(y, jnp.int32), jnp.asarray(np.arange(shape[0]) % 4 != 2))


CASES = {
    "a token an example": (dict(), (12,), (12,)),
    "two experts a token": (dict(top_k=2), (12,), (12,)),
    "text": (dict(top_k=2), (5, 4), (5, 4)),
    "a label for all positions": (dict(pool=True), (5, 4), (5,)),
    "three layers of two groups": (dict(names=MIXED), (12,), (12,)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_client_counts_what_it_sent_where(case):
    options, shape, labels = CASES[case]
    names, top_k = options.get("names", FLAT), options.get("top_k", 1)
    parts, number = partition(Net(**options)), len(set(names))
    held = jnp.array([[True, False, True], [False, True, True]])[:number]
    chosen = jnp.array([[3, NO_EXPERT, 1], [NO_EXPERT, 6, 4]])[:number]
    prior = jnp.array([[0.3, 9.0, -0.2], [9.0, 0.1, 0.0]])[:number]
    experts, batch = gather(parts.experts, chosen.reshape(-1)), drawn(shape, labels)
    found = jax.jit(functools.partial(posterior.observe, parts))(experts, parts.shared, batch, held.reshape(-1), prior.reshape(-1))
    expected = by_hand(names, experts, parts.shared, batch, held, prior, top_k)
    assert_seen(found, expected, names)
    counted = (np.asarray(batch.y) != IGNORE) & np.asarray(batch.mask).reshape(-1, *(1,) * (len(labels) - 1))
    for layer in found:
        assert not any(leaf[~held[layer.group]].any() for leaf in (layer.count, layer.total, layer.second))
        assert float(layer.count.sum()) == pytest.approx(counted.sum() * (4 if options.get("pool") else 1), rel=1e-5)
        assert (layer.count.sum(1) > 0).sum() == 2
    nothing = posterior.start(parts, batch)
    assert [layer.count.shape for layer in nothing] == [(EXPERTS, CLASSES)] * len(names)
    assert [layer.group for layer in nothing] == [layer.group for layer in found] and not any(map(jnp.any, jax.tree.leaves(nothing)))


TWO, BROKEN, SMALL = ("a", "b"), 2, 5
TASTE = np.random.default_rng(1).normal(size=HELD.shape).astype(np.float32)
BATCH_OF = jax.jit(local_batch, static_argnums=(3, 4))
PLAYED = dict(cohort_size=6, batch_size=1, local_steps=1, router_prior=0.5)


def opinionated():
    """HELD by client, whose fitness is TASTE."""
    base = fixed()

    def align(key, state, cohort):
        chosen, state = base.align(key, state, cohort)
        taste = jnp.where(chosen.held == NO_EXPERT, 0, jnp.array(TASTE)[cohort.client])
        return dataclasses.replace(chosen, fitness=taste), state

    return base._replace(align=align)


def clients():
    """One of them has broken data, one too little memory; uploads are slow."""
    data = population(broken=[BROKEN])
    profile = dataclasses.replace(
        data.profile, memory_bytes=data.profile.memory_bytes.at[SMALL].set(1.0), uplink_bytes_per_second=jnp.linspace(10.0, 20.0, CLIENTS)
    )
    return dataclasses.replace(data, profile=profile)


class Played(NamedTuple):
    """States and Infos of three rounds."""

    algorithm: Any
    states: list
    infos: list


def played(**options):
    data, alg = clients(), algorithm(Net(TWO), aligner=opinionated(), **(PLAYED | options))
    states, infos = [alg.init(KEY, data)], []
    for _ in range(3):
        state, info = alg.step(states[-1], data)
        states.append(state)
        infos.append(info)
    return Played(alg, states, infos)


@pytest.fixture(scope="module")
def counted():
    return played(router="statistics", chunk_size=4)


@pytest.fixture(scope="module")
def plain():
    return played(router="shared", chunk_size=4)


def test_the_server_keeps_decayed_sums_of_what_clients_saw(counted):
    """With the weights that they received, over batches of a key of their own; clients that are absent or broken leave no trace."""
    states = counted.states
    data = clients()
    layers = [(np.zeros((EXPERTS, CLASSES)), np.zeros((EXPERTS, CLASSES, HIDDEN)), np.zeros((EXPERTS, HIDDEN, HIDDEN))) for _ in TWO]
    came = []
    for round, state in enumerate(states[:-1]):
        layers = [tuple(KEPT * kept for kept in layer) for layer in layers]
        cohort = sampling.of_round(KEY, jnp.int32(round), CLIENTS, PLAYED["cohort_size"])
        keys = client_keys(stage_key(jax.random.fold_in(KEY, round), "local"), cohort)
        came += np.asarray(cohort).tolist()
        for client, key in zip(np.asarray(cohort), keys, strict=True):
            if client in (BROKEN, SMALL):
                continue
            batch = BATCH_OF(jax.random.fold_in(key, 2), data, jnp.int32(client), 0, STATISTICS_BATCHES * PLAYED["batch_size"])
            assert int(batch.mask.sum()) == min(SIZES[client], STATISTICS_BATCHES)
            held, prior = HELD[client].reshape(2, 2), PLAYED["router_prior"] * TASTE[client].reshape(2, 2)
            experts = gather(state.experts, jnp.asarray(HELD[client]))
            seen = by_hand(TWO, experts, state.shared, batch, held != NO_EXPERT, prior)
            for layer, new, own in zip(layers, seen, held, strict=True):
                for slot, expert in enumerate(own):
                    if expert != NO_EXPERT:
                        for kept, each in zip(layer, new, strict=True):
                            kept[expert % EXPERTS] += each[slot]
        assert_seen(states[round + 1].statistics, layers, TWO)
    assert {BROKEN, SMALL} <= set(came) and len(came) == len(states[1:]) * PLAYED["cohort_size"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(states[0].statistics))
    assert not states[-1].statistics[1].count[2].any()  # of the second group, which nobody holds


def test_clients_train_as_with_a_shared_router(counted, plain):
    """To the rounding of two programs."""
    (_, states, infos), (_, expected, told) = counted, plain
    for state, other in zip(states, expected, strict=True):
        close(weights(state), weights(other), atol=2e-7)
        close(state.aligner, other.aligner, atol=2e-7)
        same(state.tokens, other.tokens)
        assert other.statistics is None
    assert distance(weights(states[-1]), weights(states[0])) > 0.01
    close([info.train_loss for info in infos], [info.train_loss for info in told], atol=2e-7)
    assert sum(int(info.rejected_updates) for info in infos) > 0


def test_weights_of_the_dual_engine_do_as_well():
    parts, batch, chosen, prior = partition(Net(TWO)), drawn((12,), (12,)), jnp.array([3, 1, 7, 4]), jnp.zeros(4)
    names = [path[-1] for path, _ in nnx.to_flat_state(parts.experts)]
    uses = tuple("some" if name in ("w_in", "w_out") else None for name in names)
    see = jax.jit(lambda experts: posterior.observe(parts, experts, parts.shared, batch, jnp.ones(4, bool), prior))
    dual, copied = receive(parts.experts, chosen, uses), gather(parts.experts, chosen)
    assert sum(map(is_dual, jax.tree.leaves(dual, is_leaf=is_dual))) == 4
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), see(dual), see(copied))


@pytest.mark.slow
def test_the_dual_engine_sees_the_same(counted):
    states = counted.states
    dual = played(router="statistics", engine="dual").states
    moved = distance(weights(states[-1]), weights(states[0]))
    assert distance(weights(states[-1]), weights(dual[-1])) <= 1e-5 * moved
    for ours, theirs in zip(jax.tree.leaves(dual[-1].statistics), jax.tree.leaves(states[-1].statistics), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_round_returns_a_report_for_each_held_expert_of_its_group(counted, plain):
    report = 4 * (CLASSES * (HIDDEN + 1) + HIDDEN * (HIDDEN + 1) / 2)
    parts, data = partition(Net(TWO)), clients()
    cost = round_cost(parts, cross_entropy, optax.sgd(0.3), batch_shape(data, 1))
    held, uplink = (HELD.reshape(CLIENTS, 2, 2) != NO_EXPERT).sum(2), np.asarray(data.profile.uplink_bytes_per_second)
    for round, (info, without) in enumerate(zip(counted.infos, plain.infos, strict=True)):
        cohort = np.asarray(sampling.of_round(KEY, jnp.int32(round), CLIENTS, PLAYED["cohort_size"]))
        sent = cohort[cohort != SMALL]  # what is rejected has travelled
        for each, added in ((info, report), (without, 0)):
            upload = cost.shared_bytes + held.max(1) * (cost.expert_bytes + 2 * added)  # one of every group
            assert float(each.simulated_seconds) == pytest.approx(float(np.max((upload / uplink)[sent])), rel=1e-4)
        assert info.clients == len(sent) and info.bytes_down == without.bytes_down
        assert info.bytes_up - without.bytes_up == held[sent].sum() * report


@pytest.mark.parametrize("names", [FLAT, TWO])
def test_reports_cost_a_forward_pass_a_round_and_upload_only(names):
    examples, slots = 16, 2
    shape = Batch(jnp.zeros((examples, FEATURES)), jnp.zeros(examples, jnp.int32), jnp.ones(examples, bool))
    small = Batch(jnp.zeros((BATCH, FEATURES)), jnp.zeros(BATCH, jnp.int32), jnp.ones(BATCH, bool))
    of = functools.partial(round_cost, partition(Net(names)), cross_entropy, optax.sgd(0.1), small, max_slots=slots)
    with_it, without = of(statistics_batch=shape), of()
    routed = 2 * examples * slots * (HIDDEN + 2 * HIDDEN * WIDTH + HIDDEN)
    sums = 2 * examples * slots * (CLASSES * HIDDEN + HIDDEN + HIDDEN * HIDDEN)
    ends = 2 * examples * (FEATURES * HIDDEN + HIDDEN * CLASSES)
    added = float(with_it.report_flops - without.report_flops)
    assert added == ends + len(names) * (routed + sums)
    report = len(names) * 4 * (CLASSES * (HIDDEN + 1) + HIDDEN * (HIDDEN + 1) / 2)
    assert with_it.report_bytes == report and without.report_bytes == 0
    changed = {"report_flops": 0.0, "report_bytes": 0.0}
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(with_it, **changed), dataclasses.replace(without, **changed))
    profile = ClientProfile(*(jnp.full(3, number) for number in (100.0, 1e9, 7.0, 5.0)))
    held, processed = jnp.array([0, 1, 2]), jnp.array([4, 40, 400])
    longer = np.subtract(*(capacity.seconds(profile, cost, held, examples=processed) for cost in (with_it, without)))
    wanted = np.asarray(held) * report / 5 + np.array([0, added, added]) / 100
    np.testing.assert_allclose(longer, wanted, rtol=1e-3)


def test_statistics_that_are_not_finite_are_left_out(counted):
    """Those of an example that no local step used, so that the update is good."""
    client, data, alg = 1, clients(), counted.algorithm
    (key,) = client_keys(stage_key(jax.random.fold_in(KEY, 0), "local"), jnp.array([client]))
    used, seen = (
        {row.tobytes() for row in np.asarray(BATCH_OF(jax.random.fold_in(key, use), data, jnp.int32(client), 0, size).x)}
        for use, size in ((0, 1), (2, STATISTICS_BATCHES))
    )
    spoilt = np.array([row.tobytes() in seen - used for row in np.asarray(data.x)])
    assert spoilt.sum() >= STATISTICS_BATCHES - 1
    state = alg.init(KEY, data)
    fine, _ = alg.step(state, data)
    state, _ = alg.step(state, dataclasses.replace(data, x=jnp.where(spoilt[:, None], jnp.nan, data.x)))
    same(weights(state), weights(fine))
    for layer, whole in zip(state.statistics, fine.statistics, strict=True):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(layer))
        assert whole.count.sum() - STATISTICS_BATCHES <= layer.count.sum() < whole.count.sum()


def one_line(error):
    return "\n" not in str(error.value)


def test_what_cannot_be_is_said_in_a_line():
    with pytest.raises(ValueError, match=r"router is 'other', it must be 'shared', 'personal' or 'statistics'") as error:
        algorithm(router="other")
    assert one_line(error)
    mute = algorithm(Net(layer=Mute), router="statistics")
    with pytest.raises(ValueError, match=r"router is 'statistics', but .* a MoE layer that does not say what it saw") as error:
        mute.init(KEY, population())
    assert one_line(error)
    with pytest.raises(ValueError, match=r"outputs \(5, 3\) have no classes for labels \(5, 3\)") as error:
        posterior.start(partition(Net(pool=True)), drawn((5, 2), (5, 3)))
    assert one_line(error)
    with pytest.raises(
        ValueError, match="router: 'statistic' is unknown, did you mean 'statistics'; expected shared, personal, soft, statistics"
    ):
        validate(TrainConfig(router="statistic"))
