"""What clients send and keep: error feedback over rounds against plain accounts, in any order and chunks, in two groups of experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_groups import Net

from fedmoe_jax import NO_EXPERT, aggregation, partition
from fedmoe_jax.base import ClientUpdate, client_keys
from fedmoe_jax.experts import groups

POPULATION, COHORT, SLOTS, EXPERTS, ROUNDS = 9, 6, 2, 4, 6
PARTS = partition(Net())
WEIGHTS = PARTS.experts, PARTS.shared
NAMES = groups(PARTS.experts)
SHARE = 0.3
CHAINS = {
    "sparsify": (aggregation.sparsify(share=SHARE),),
    "all": (aggregation.sparsify(share=SHARE), aggregation.quantize(bits=3, rotate=True)),
}


@functools.cache
def encoder(name):
    """(what everyone keeps at first, apply as one program)."""
    made = aggregation.chain(*CHAINS[name], aggregation.mean()).encoder
    return made.init(*WEIGHTS, POPULATION, 1e9), jax.jit(lambda *args: made.apply(*args, NAMES))


def round_of(seed):
    """(keys, clients, who is good, updates): some are absent or rejected, some slots empty or without tokens."""
    draw = np.random.default_rng(seed)
    client = draw.permutation(POPULATION)[:COHORT]
    held = np.stack([np.concatenate([group * EXPERTS + draw.permutation(EXPERTS)[:SLOTS] for group in range(2)]) for _ in client])
    held[draw.random(held.shape) < 0.2] = NO_EXPERT
    good = draw.random(COHORT) < 0.8
    tokens = np.where((held == NO_EXPERT) | ~good[:, None] | (draw.random(held.shape) < 0.2), 0, draw.integers(1, 20, held.shape))

    def deltas(tree, lead, skip):
        return jax.tree.map(lambda leaf: jnp.array(draw.normal(size=(*lead, *leaf.shape[skip:])), jnp.float32), tree)

    experts, shared = deltas(WEIGHTS[0], (COHORT, SLOTS), 1), deltas(WEIGHTS[1], (COHORT,), 0)
    numbers = (jnp.array(rows, jnp.int32) for rows in (held, np.where(good, 5, 0), tokens))
    update = ClientUpdate(shared, experts, *numbers)
    return client_keys(jax.random.key(seed), jnp.array(client)), jnp.array(client), jnp.array(good), update


def tensors(client, good, update, trees):
    """Each tensor of a round: (what names it, its rows in `trees`, whether it is sent), client by client."""
    flat = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in trees]
    for row, number in enumerate(np.asarray(client).tolist()):
        for path, leaf in flat[1]:
            yield ("shared", jax.tree_util.keystr(path), number), (row, leaf), bool(good[row])
        for path, leaf in flat[0]:
            name = jax.tree_util.keystr(path)
            group = int("[1]" in name)
            for slot in range(SLOTS):
                expert = int(update.held[row, group * SLOTS + slot])
                sent = bool(good[row]) and expert != NO_EXPERT and int(update.tokens[row, group * SLOTS + slot]) > 0
                yield (name, expert, number), ((row, slot), leaf), sent


def kept_of(kept, name):
    """The residual of a tensor."""
    *_, client = name
    flat = {
        ("shared",) * shared + (jax.tree_util.keystr(path),): leaf
        for shared in (0, 1)
        for path, leaf in jax.tree_util.tree_flatten_with_path(kept[shared])[0]
    }
    if name[0] == "shared":
        return flat["shared", name[1]][client]
    return flat[(name[0],)][client, name[1] % EXPERTS]


@pytest.mark.parametrize("name", ["sparsify", "all"])
def test_what_arrived_and_what_is_kept_make_what_was_to_be_sent(name):
    kept, apply = encoder(name)
    wanted, arrived, times = {}, {}, {}
    for seed in range(ROUNDS):
        keys, client, good, update = round_of(seed)
        before = jax.device_get(kept)
        sent, kept = apply(kept, keys, client, good, update)
        after, sent, update = jax.device_get((kept, sent, update))
        rows = zip(
            tensors(client, good, update, (update.experts, update.shared)),
            tensors(client, good, update, (sent.experts, sent.shared)),
            strict=True,
        )
        touched = set()
        for (tensor, (place, leaf), is_sent), (_, (_, got), _) in rows:
            delta, got = leaf[place], got[place]
            if not is_sent:
                assert not np.any(got)
                continue
            touched.add(tensor)
            old = kept_of(before, tensor)
            if name == "sparsify":  # the definition
                value = (delta + old).ravel()
                most = np.argsort(-np.abs(value), kind="stable")[: int(np.ceil(SHARE * value.size))]
                expected = np.zeros_like(value)
                expected[most] = value[most]
                np.testing.assert_array_equal(got.ravel(), expected)
            wanted[tensor] = wanted.get(tensor, 0.0) + delta.astype(float)
            arrived[tensor] = arrived.get(tensor, 0.0) + got.astype(float)
            times[tensor] = times.get(tensor, 0) + 1
            np.testing.assert_allclose(arrived[tensor] + kept_of(after, tensor), wanted[tensor], atol=1e-5)
        for leaf, new in zip(jax.tree.leaves(before[0]), jax.tree.leaves(after[0]), strict=True):
            changed = {(int(c), int(e)) for c, e in np.argwhere((leaf != new).reshape(*leaf.shape[:2], -1).any(-1))}
            assert changed <= {(tensor[2], tensor[1] % EXPERTS) for tensor in touched if tensor[0] != "shared"}
        for leaf, new in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after[1]), strict=True):
            changed = np.flatnonzero((leaf != new).reshape(POPULATION, -1).any(-1))
            assert set(changed.tolist()) <= {tensor[2] for tensor in touched if tensor[0] == "shared"}
    assert max(times.values()) > 2


def test_the_order_of_clients_and_chunks_change_nothing():
    start, apply = encoder("all")
    kept = start
    for seed in (0, 1):
        keys, client, good, update = round_of(seed)
        sent, after = apply(kept, keys, client, good, update)
        order = np.random.default_rng(seed).permutation(COHORT)
        rows = jax.tree.map(lambda leaf, order=order: leaf[order], (keys, client, good, update))
        permuted, same = apply(kept, *rows)
        jax.tree.map(np.testing.assert_array_equal, permuted, jax.tree.map(lambda leaf, order=order: leaf[order], sent))
        jax.tree.map(np.testing.assert_array_equal, same, after)
        chunked, pieces = kept, []
        for half in (slice(0, 3), slice(3, 6)):
            piece, chunked = apply(chunked, *jax.tree.map(lambda leaf, half=half: leaf[half], (keys, client, good, update)))
            pieces.append(piece)
        jax.tree.map(lambda *parts: np.testing.assert_array_equal(np.concatenate(parts[1:]), parts[0]), sent, *pieces)
        jax.tree.map(np.testing.assert_array_equal, chunked, after)
        kept = after
    other, _ = apply(start, client_keys(jax.random.key(9), client), client, good, update)
    again, _ = apply(start, keys, client, good, update)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(again.shared), jax.tree.leaves(other.shared), strict=True))


def test_without_error_feedback_nothing_is_kept():
    forgets = aggregation.sparsify(share=SHARE, error_feedback=False), aggregation.quantize(bits=3)
    for transforms in (forgets, forgets[1:]):
        assert aggregation.chain(*transforms, aggregation.mean()).encoder.init(*WEIGHTS, POPULATION, 0.0) is None


def test_residuals_must_fit_their_budget():
    made = aggregation.chain(aggregation.sparsify(), aggregation.mean()).encoder
    needed = POPULATION * sum(4 * leaf.size for leaf in jax.tree.leaves(WEIGHTS))
    with pytest.raises(ValueError, match=f"keeps a residual of the whole model for every client, which takes {needed} bytes"):
        made.init(*WEIGHTS, POPULATION, float(needed - 1))
    kept = made.init(*WEIGHTS, POPULATION, float(needed))
    jax.tree.map(lambda rows, leaf: np.testing.assert_array_equal(rows, np.zeros((POPULATION, *leaf.shape))), kept, WEIGHTS)


def test_too_few_bits_after_error_feedback_are_refused():
    with pytest.raises(ValueError, match="chain has sparsify with error_feedback before fewer than 3 bits, whose errors would add up"):
        aggregation.chain(aggregation.sparsify(), aggregation.quantize(bits=2), aggregation.mean())
    aggregation.chain(aggregation.sparsify(error_feedback=False), aggregation.quantize(bits=2), aggregation.mean())
