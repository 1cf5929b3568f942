"""What bad clients do to the global model under each rule of aggregation.

    python -m experiments.attacks --out experiments/results/attacks.json

Digits on 100 clients, of which a fifth, drawn anew for each seed, is bad: it sends -4 times its update (sign flip), adds Gaussian noise
of ten times its update's norm (noise), or has 9 - y in place of each label y (label flip). Experts are assigned at random. Seeds
change initial weights, sampling and who is bad, not the split. Written are the global test accuracy after the last round of every run,
and beside it a table of means over the seeds.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedmoe_jax as fm
from fedmoe_jax.aggregation.chain import Encoder
from fedmoe_jax.base import Aggregator
from fedmoe_jax.training.config import TrainConfig
from fedmoe_jax.training.evaluate import global_evaluation
from fedmoe_jax.training.named import aggregator
from fedmoe_jax.training.setup import build, variant

SHARE = 0.2
RULES = {
    "mean": {},
    "mean of clipped updates": {"clip_norm": 0.3},
    "median": {"aggregator": "median"},
    "trimmed mean": {"aggregator": "trimmed_mean", "bad_share": 0.3},
    "Krum": {"aggregator": "krum", "bad_share": 0.3},
    "multi-Krum": {"aggregator": "multi_krum", "bad_share": 0.3},
    "geometric median": {"aggregator": "geometric_median"},
}
ATTACKS = {"nobody": (1.0, 0.0), "sign flip": (-4.0, 0.0), "noise": (1.0, 10.0), "label flip": (1.0, 0.0)}
"""How often a bad client sends its update, and the norm of the noise on top of it, as a multiple of its own."""
SIZES = dict(population=100, cohort=40, rounds=40, aligner="random", model_options=dict(hidden=64, expert_hidden=32))


def attacked(rule: Aggregator) -> Aggregator:
    """The rule, sent what bad clients make of their updates.

    What each client does is kept beside what the rule's own encoder keeps, so that one program serves all attacks: see `attack`.
    """
    inner = rule.encoder

    def init(experts, shared, num_clients, budget_bytes):
        own = None if inner is None else inner.init(experts, shared, num_clients, budget_bytes)
        return own, dict(factor=jnp.ones(num_clients), noise=jnp.zeros(num_clients))

    def apply(kept, keys, client, good, update, names):
        own, how = kept

        def sent(key, client, *leaves):
            size = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in leaves) / sum(leaf.size for leaf in leaves))
            noise = [jax.random.normal(jax.random.fold_in(key, place), leaf.shape) for place, leaf in enumerate(leaves)]
            scale = how["noise"][client] * size
            return [how["factor"][client] * leaf + scale * each for leaf, each in zip(leaves, noise, strict=True)]

        leaves, treedef = jax.tree.flatten((update.experts, update.shared))
        experts, shared = jax.tree.unflatten(treedef, jax.vmap(sent)(jax.vmap(jax.random.fold_in, (0, None))(keys, 99), client, *leaves))
        update = dataclasses.replace(update, experts=experts, shared=shared)
        if inner is not None:
            update, own = inner.apply(own, keys, client, good, update, names)
        return update, (own, how)

    def num_bytes(values, bits):
        return values * bits // 8 if inner is None else inner.num_bytes(values, bits)

    return rule._replace(needs="deltas", encoder=Encoder(init, apply, num_bytes))


def attack(state, population, bad, name, num_classes):
    """State and population in which the clients of the mask `bad` attack, and the population's labels as they have them."""
    factor, noise = ATTACKS[name]
    own, _ = state.residuals
    how = dict(factor=jnp.where(bad, factor, 1.0), noise=jnp.where(bad, noise, 0.0))
    state = dataclasses.replace(state, residuals=(own, how))
    if name == "label flip":
        owner = jnp.searchsorted(population.offsets, jnp.arange(len(population.order)), side="right") - 1
        rows = jnp.where(bad[owner], population.order, len(population.y))
        flipped = num_classes - 1 - population.y[population.order]
        population = dataclasses.replace(population, y=population.y.at[rows].set(flipped, mode="drop"))
    return state, population


def setups(seeds, sizes=SIZES):
    """What the runs are made of, for each seed: the clients and data of the first one."""
    config = TrainConfig(**sizes)
    first = build(config)
    return [first, *(variant(first, dataclasses.replace(config, seed=seed)) for seed in range(1, seeds))]


def accuracies(name, runs, attacks=tuple(ATTACKS)):
    """{attack: [global test accuracy of each run]} of a rule; `runs` as `setups` gives them."""
    made, config = runs[0], runs[0].config
    alg = fm.federated_moe(
        made.model,
        made.loss_fn,
        client_optimizer=optax.sgd(config.client_lr),
        server_optimizer=optax.sgd(config.server_lr),
        aligner=made.aligner,
        cohort_size=config.cohort,
        local_epochs=config.local_epochs,
        batch_size=config.batch_size,
        solo_examples=0,
        aggregator=attacked(aggregator(dataclasses.replace(config, **RULES[name]))),
    )
    play, evaluate = fm.rounds(alg.step, config.rounds), global_evaluation(made)
    found = {kind: [] for kind in attacks}
    for seed, run in enumerate(runs):
        bad = np.zeros(config.population, bool)
        bad[np.random.default_rng(seed).permutation(config.population)[: round(SHARE * config.population)]] = True
        for kind in attacks:
            start = alg.init(jax.random.key(seed), made.population)
            experts, shared = jax.tree.map(jnp.copy, (run.parts.experts, run.parts.shared))  # the state is donated
            start = dataclasses.replace(start, experts=experts, shared=shared)
            start, population = attack(start, made.population, jnp.array(bad), kind, made.num_classes)
            state, _ = play(start, population, config.rounds)
            found[kind].append(round(evaluate(state)["eval_accuracy"], 4))
    return found


def table(found):
    """Means over seeds, and the greatest distance of a seed from them, as a Markdown table."""
    kinds = list(next(iter(found.values())))
    lines = ["| rule | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name, results in found.items():
        cells = [f"{np.mean(values):.3f} ± {np.abs(np.array(values) - np.mean(values)).max():.3f}" for values in results.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    started, found, runs = time.perf_counter(), {}, setups(options.seeds)
    for name in options.rules:
        found[name] = accuracies(name, runs)
        print(f"{name}, {time.perf_counter() - started:.0f} s: {found[name]}", flush=True)
        about = dict(share=SHARE, sizes=SIZES, seconds=round(time.perf_counter() - started), jax=jax.__version__)
        about |= dict(rules=RULES, device=f"{jax.device_count()} x {jax.devices()[0].device_kind}", accuracy=found)
        options.out.write_text(json.dumps(about, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
