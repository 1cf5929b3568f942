"""Groups of experts with assignments of their own: what they reduce to, and each layer's numbers against slow oracles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_groups import HELD, HIDDEN, PROBED, WIDTHS, Net, everyone, examples, fixed, forward, masks, mean_loss
from small_round import BATCH, CLASSES, CLIENTS, EXPERTS, FEATURES, KEY, SIZES, algorithm, distance, model, population, run, weights

from fedmoe_jax import NO_EXPERT, ExpertParam, Slots, alignment, models, partition
from fedmoe_jax.alignment import fitness, load
from fedmoe_jax.base import Cohort, Feedback
from fedmoe_jax.experts import SlotState, bind, combine, gather, groups, held_mask, report
from fedmoe_jax.local.cost import count_flops, expert_bytes, round_cost
from fedmoe_jax.local.primal import solo_losses
from fedmoe_jax.models.losses import cross_entropy


def two(name, **options):
    size = {} if name == "full" else dict(max_slots=2)
    return getattr(alignment, name)(num_experts=EXPERTS, groups=2, **size, **options)


@pytest.fixture(scope="module")
def played():
    """A round with fixed experts from the same start at each rate: that without learning tells what was routed where."""
    net, data, rates = Net(), population(), (0.0, 0.3)
    optimizer = lambda round: optax.sgd(jnp.array(rates)[round])  # noqa: E731
    alg = algorithm(net, aligner=fixed(), cohort_size=CLIENTS, client_optimizer=optimizer, solo_examples=max(SIZES))
    starts = [dataclasses.replace(alg.init(KEY, data), round=jnp.int32(round)) for round in range(2)]
    return net, data, {rate: (alg.step(start, data), start) for rate, start in zip(rates, starts, strict=True)}


@pytest.mark.parametrize("router", ["shared", pytest.param("personal", marks=pytest.mark.slow)])
def test_one_group_with_a_name_is_the_default_bit_for_bit(router):
    data, options = population(), dict(router=router, router_prior=0.5, solo_examples=BATCH)
    results = [
        run(algorithm(start, aligner=alignment.greedy(num_experts=EXPERTS, max_slots=2, **more), **options), data, 2)
        for start, more in ((model(), {}), (model(group="name"), dict(groups=1)))
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        assert ours.shape == theirs.shape
        if not jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(ours, theirs)


def test_every_client_with_every_expert_is_the_shared_assignment():
    data, results = population(), []
    for names, number in (((None, None), 1), (("first", "second"), 2)):
        full = alignment.full(num_experts=EXPERTS, groups=number)
        results.append(run(algorithm(Net(names, top_k=EXPERTS), aligner=full), data, 2))
    (shared, shared_info), (apart, info) = results
    for ours, theirs in zip(*(map(jax.tree.leaves, map(weights, (apart, shared)))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert distance(weights(apart), tuple(partition(Net())[1:3])) > 0.1
    assert info.load.shape == (2 * EXPERTS,) and (info.load == 5).all()
    np.testing.assert_array_equal(info.tokens[:EXPERTS] + info.tokens[EXPERTS:], shared_info.tokens)


def test_random_layers_differ_and_hold_their_own_experts():
    aligner = two("random")
    cohort = Cohort(jnp.arange(CLIENTS), jnp.ones(CLIENTS, bool), jnp.full(CLIENTS, 2))
    aligned, _ = aligner.align(KEY, aligner.init(CLIENTS), cohort)
    held = np.asarray(aligned.held)
    assert held.shape == (CLIENTS, 4) and (held[:, :2] // EXPERTS == 0).all() and (held[:, 2:] // EXPERTS == 1).all()
    assert (held[:, :2] != held[:, 2:] - EXPERTS).any()


def test_tokens_of_each_layer_are_those_of_the_oracle(played):
    net, data, results = played
    (state, info), _ = results[0.0]
    total = np.zeros(2 * EXPERTS)
    for row, client in enumerate(everyone()):
        counts = np.concatenate(forward(net, examples(data, client)[0], masks(HELD[client]))[1])
        expected = np.where(HELD[client] >= 0, counts[np.maximum(HELD[client], 0)], 0)
        np.testing.assert_array_equal(state.aligner.tokens[row], expected)
        total += counts
    np.testing.assert_array_equal(info.tokens, total)
    np.testing.assert_array_equal(state.tokens, total)
    np.testing.assert_array_equal(info.load, [(expert == HELD).sum() for expert in range(2 * EXPERTS)])


def test_solo_losses_change_one_layer_only(played):
    net, data, results = played
    (state, _), _ = results[0.0]
    for row, client in enumerate(everyone()):
        x, y = examples(data, client)
        for place, expert in enumerate(np.concatenate([HELD[client], PROBED[client]])):
            layer, chosen, expected = expert // EXPERTS, masks(HELD[client]), 0.0
            if expert != NO_EXPERT:
                chosen[layer] = np.arange(EXPERTS) == expert % EXPERTS
                expected = mean_loss(forward(net, x, chosen)[0], y)
            np.testing.assert_allclose(state.aligner.solo_loss[row, place], expected, rtol=1e-4, atol=1e-6)


def test_an_expert_that_nobody_holds_stays_while_its_twin_learns(played):
    (state, info), start = played[2][0.3]
    assert info.tokens[2] > 0 and info.tokens[EXPERTS + 2] == 0
    for layer in range(2):
        for name in ("router", "w_in", "w_out"):
            before, after = (s.experts["moe"][layer][name].get_value() for s in (start, state))
            changed = np.asarray((before != after).reshape(EXPERTS, -1).any(1))
            trained = np.asarray(info.tokens).reshape(2, EXPERTS)[layer] > 0
            assert not changed[~trained].any()
            assert name == "router" or changed[trained].any()
    np.testing.assert_array_equal(state.last_trained, np.where(np.asarray(info.tokens) > 0, start.round, -1))


def test_bytes_are_those_of_the_experts_of_each_layer(played):
    net, _, results = played
    (_, info), _ = results[0.0]
    one = [4 * (HIDDEN + HIDDEN * width + width * HIDDEN + width + HIDDEN) for width in WIDTHS]
    shared = 4 * (FEATURES * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES)
    up = CLIENTS * shared + sum(one[layer] * (HELD[:, 2 * layer : 2 * layer + 2] >= 0).sum() for layer in range(2))
    down = up + sum(one[layer] * (PROBED[:, layer] >= 0).sum() for layer in range(2))
    assert (info.bytes_up, info.bytes_down) == (up, down)
    experts = partition(net).experts
    assert expert_bytes(experts) == tuple(one)
    assert expert_bytes(experts, personal_router=True) == tuple(each - 4 * HIDDEN for each in one)


def test_costs_are_those_of_the_shared_assignment_but_for_solo_evaluation():
    data, optimizer = population(), optax.sgd(0.1)
    batch = jax.eval_shape(lambda: data.batch(jnp.int32(0), jnp.arange(BATCH)))
    costs = [round_cost(partition(Net(names)), cross_entropy, optimizer, batch) for names in ((None, None), ("first", "second"))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02), *costs)  # memory counts the split of slots, too
    parts = partition(Net())
    cost = round_cost(parts, cross_entropy, optimizer, batch, solo_batch=batch, max_slots=2)
    candidates, held = gather(parts.experts, jnp.arange(8)), jnp.ones(4, bool)  # 2 held and 2 probed experts of each layer
    score = functools.partial(solo_losses, parts=parts, loss_fn=cross_entropy)
    flops = count_flops(score, KEY, batch, candidates, parts.shared, held, jnp.zeros(4))
    assert cost.solo_shared_flops + 4 * cost.solo_expert_flops == flops
    assert cost.expert_bytes == sum(expert_bytes(parts.experts))


def test_every_group_is_aligned_like_a_single_one_within_its_bounds():
    options = dict(num_experts=EXPERTS, max_slots=2, fitness=fitness.solo(probes=1))
    both, single, monitor = alignment.balanced(groups=2, **options), alignment.balanced(**options), load.monitor()
    align, learn, align_one, learn_one = map(jax.jit, (both.align, both.learn, single.align, single.learn))
    state, states = both.init(CLIENTS), [single.init(CLIENTS)] * 2
    for row in range(6):
        key = jax.random.fold_in(KEY, row)
        draw = np.random.default_rng(row)
        cohort = Cohort(
            jnp.array(draw.permutation(CLIENTS)), jnp.array(draw.random(CLIENTS) < 0.8), jnp.array(draw.integers(0, 3, CLIENTS))
        )
        aligned, state = align(key, state, cohort)
        slots, tried = aligned.held.shape[1], aligned.probed.shape[1]
        noise = jnp.array(draw.random((CLIENTS, slots + tried)), jnp.float32)
        tokens = jnp.where(aligned.held >= 0, 5 + aligned.held, 0)
        back = Feedback(jnp.full(CLIENTS, 9), tokens, noise[:, :slots], noise[:, :slots], noise)
        for group in range(2):
            mine, probes = slice(2 * group, 2 * group + 2), slice(group, group + 1)
            lower, upper = monitor.bounds(states[group].load, jnp.where(cohort.present, cohort.slots, 0), jnp.zeros(EXPERTS))
            alone, after = align_one(jax.random.fold_in(key, group), states[group], cohort)
            shift = np.where(alone.held >= 0, EXPERTS * group, 0)
            np.testing.assert_array_equal(aligned.held[:, mine], alone.held + shift)
            np.testing.assert_array_equal(aligned.probed[:, probes], np.where(alone.probed >= 0, alone.probed + EXPERTS * group, -1))
            np.testing.assert_allclose(aligned.fitness_mean[:, group], alone.fitness_mean, rtol=1e-6)  # compilers add in other orders
            np.testing.assert_allclose(aligned.centred[:, mine], alone.centred, atol=2e-7)  # likewise
            clients = held_mask(alone.held, EXPERTS).sum(0)
            assert ((lower <= clients) & (clients <= upper)).all()
            solo = jnp.concatenate([noise[:, mine], noise[:, slots + group : slots + group + 1]], axis=1)
            parts = Feedback(back.examples, tokens[:, mine], noise[:, mine], noise[:, mine], solo)
            states[group] = learn_one(after, cohort, alone, parts)
        state = learn(state, cohort, aligned, back)
        np.testing.assert_allclose(state.prices, jnp.stack([one.prices for one in states]), atol=1e-6)  # not unique to the last bit
        for ours, *theirs in zip(*(jax.tree.leaves((one.fitness, one.load)) for one in (state, *states)), strict=True):
            np.testing.assert_allclose(ours, jnp.stack(theirs), rtol=1e-6)


@pytest.mark.slow
def test_personal_routers_of_each_layer_follow_its_experts():
    data = population()
    options = dict(aligner=fixed(), cohort_size=CLIENTS, router="personal", solo_examples=BATCH)
    states = [run(algorithm(Net(), chunk_size=size, **options), data, 2)[0] for size in (None, 3)]
    for ours, theirs in zip(*map(jax.tree.leaves, map(weights, states)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for layer in range(2):
        rows = states[0].personal["moe"][layer]["router"].get_value()
        start = Net().moe[layer].router.get_value()
        changed = np.asarray((rows != start).any(-1))
        held = np.stack([masks(row)[layer] for row in HELD])
        assert not changed[~held].any() and changed[held].any()
        np.testing.assert_allclose(states[0].experts["moe"][layer]["router"].get_value(), rows.mean(0), atol=1e-6)


def test_gather_and_combine_and_report_go_group_after_group():
    parts = partition(Net())
    assert groups(parts.experts) == ("first", "second") and groups(partition(model()).experts) == (None,)
    slots = gather(parts.experts, jnp.array(HELD))
    back = combine(slots, jnp.array(HELD), jnp.ones(HELD.shape), EXPERTS)
    for layer in range(2):
        weight = np.asarray(parts.experts["moe"][layer]["w_in"].get_value())
        for client, slot in zip(*np.nonzero(HELD[:, 2 * layer : 2 * layer + 2] >= 0), strict=True):
            expert = HELD[client, 2 * layer + slot] - layer * EXPERTS
            np.testing.assert_array_equal(slots["moe"][layer]["w_in"].get_value()[client, slot], weight[expert])
        count = np.array([(layer * EXPERTS + expert == HELD).sum() for expert in range(EXPERTS)])
        np.testing.assert_allclose(back["moe"][layer]["w_in"].get_value(), count[:, None, None] * weight, rtol=1e-5)
    held = jnp.array([True, False, False, True])
    bound = bind(parts, gather(parts.experts, jnp.array(HELD[0])), parts.shared, Slots(held, jnp.zeros(4)))
    bound(jnp.ones((3, FEATURES)))
    np.testing.assert_array_equal(report(bound)[0], [[1, 0, 0, 1]] * 3)
    with pytest.raises(ValueError, match=r"slots.held has 3 entries, the weights have 4 experts"):
        bind(parts, gather(parts.experts, jnp.array(HELD[0])), parts.shared, Slots(held[:3], jnp.zeros(3)))


def test_groups_are_in_the_order_of_the_layers():
    shape = dict(input_shape=(6,), num_classes=CLASSES, num_experts=2, top_k=1, seed=0)
    many = models.create("transformer", layers=11, features=4, heads=2, expert_hidden=2, per_layer=True, **shape)
    assert groups(partition(many).experts) == tuple(f"layers.{layer}" for layer in range(11))


def test_a_layer_has_one_group():
    class Torn(nnx.Module):
        def __init__(self):
            self.a, self.b = ExpertParam(jnp.zeros((3, 2)), group="x"), ExpertParam(jnp.zeros((3, 2)))
            self.slots = SlotState(Slots(jnp.ones(3, bool), jnp.zeros(3)))

    class Around(nnx.Module):
        def __init__(self):
            self.inner = Torn()

    with pytest.raises(ValueError, match=r"model.inner has ExpertParams of groups \['x', None\], all of a layer must be of one group"):
        partition(Around())


def test_model_and_aligner_must_agree():
    with pytest.raises(ValueError, match="aligner is made for groups=1, the model needs groups=2"):
        algorithm(Net())
    with pytest.raises(ValueError, match="aligner is made for groups=2, the model needs groups=1"):
        algorithm(model(), aligner=two("random"))
    with pytest.raises(ValueError, match="groups is 0, it must be at least 1"):
        alignment.greedy(num_experts=EXPERTS, max_slots=1, groups=0)
    with pytest.raises(ValueError, match="aligner must be for one group"):
        alignment.grouped(two("greedy"), 3)


def test_cross_entropy_of_the_oracle_is_that_of_the_model():
    net, data = Net(), population()
    x, y = examples(data, 1)
    losses, _ = cross_entropy(net, data.batch(jnp.int32(1), jnp.arange(SIZES[1])), KEY)
    logits, _ = forward(net, x, [np.ones(EXPERTS, bool)] * 2)
    np.testing.assert_allclose(losses.mean(), mean_loss(logits, y), rtol=1e-5)
