"""Do aligners find hidden tasks? Clients of one task see the same permutation of the labels, which inputs do not reveal.

    python experiments/planted.py --sizes 37 18 12 10 7 6 5 5 --rounds 150 --seeds 48 --out experiments/results/demand.json
    python experiments/planted.py --out experiments/results/tasks.json

One run for each aligner, router and seed; written are means over the seeds of: the share of experts that two clients of one
task and of two tasks have in common, cumulative token CV and least-trained expert over the mean, accuracy of clients on
their own test examples with the experts that they would be assigned, mean and worst decile; and how far these two are above
greedy's on the same seeds, with the standard error of that.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import fedmoe_jax as fm
from fedmoe_jax.alignment import fitness, load
from fedmoe_jax.base import NO_EXPERT, Cohort
from fedmoe_jax.experts import RouterParam, Slots, bind, gather, held_mask

EXPERTS, SLOTS, CLASSES = 8, 2, 10
ROUTERS = {"personal": {"router": "personal"}, "fitness prior": {"router_prior": 10.0}}


def solo():
    return fitness.solo(probes=2)


def made(name, **options):
    return lambda: getattr(fm.alignment, name)(num_experts=EXPERTS, max_slots=SLOTS, fitness=solo(), **options)


ALIGNERS = {
    "random": made("random"),
    "greedy": made("greedy"),
    **{f"balanced, demand {demand}": made("balanced", load=load.monitor(demand=demand)) for demand in (0.0, 0.5, 0.75, 1.0)},
    **{f"fitness+deficit, {w}": made("balanced", objective="fitness+deficit", deficit_weight=w) for w in (0.1, 1.0)},
}


def clients_of_tasks(sizes, *, seed, train=200, test=50, features=16, noise=0.7):
    """The task of each client, a population of training examples and one of test examples."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(CLASSES, features))
    task = np.repeat(np.arange(len(sizes)), sizes)
    draw.shuffle(task)
    permutation = np.stack([draw.permutation(CLASSES) for _ in sizes])
    each = train + test
    y = draw.integers(0, CLASSES, (len(task), each))
    x = centres[y] + noise * draw.normal(size=(len(task), each, features))
    x, y = x.reshape(-1, features).astype(np.float32), permutation[task[:, None], y].reshape(-1).astype(np.int32)
    first = each * np.arange(len(task))[:, None]
    populations = (fm.Population.from_arrays(x, y, list(first + rows)) for rows in (np.arange(train), np.arange(train, each)))
    return task, *populations


def runs(aligner, sizes, *, rounds, seeds, **options):
    """Trains and measures one model for each seed, side by side on an accelerator: name -> value[seed]."""
    each = [clients_of_tasks(sizes, seed=seed) for seed in seeds]
    task, population, holdout = jax.tree.map(lambda *rows: jnp.stack(rows), *each)
    models = [
        fm.models.create("mlp", input_shape=(16,), num_classes=CLASSES, num_experts=EXPERTS, top_k=1, seed=s, hidden=32, expert_hidden=32)
        for s in seeds
    ]
    algorithms = [
        fm.federated_moe(
            model, fm.models.losses.cross_entropy, client_optimizer=optax.sgd(0.3), server_optimizer=optax.sgd(1.0), aligner=aligner,
            cohort_size=20, local_epochs=1, batch_size=20, solo_examples=40, engine="primal", **options,
        )
        for model in models
    ]  # fmt: skip
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    states = [algorithm.init(key, clients[1]) for algorithm, key, clients in zip(algorithms, keys, each, strict=True)]
    state = jax.tree.map(lambda *rows: jnp.stack(rows), *states)
    train = fm.rounds(algorithms[0].step, rounds)
    parts = fm.partition(models[0])

    def one(row):
        key, state, task, population, holdout = row
        state, info = train(state, population, rounds)
        return _measured(parts, aligner, key, state, info, task, holdout, options.get("router_prior", 0.0))

    over = jax.lax.map if jax.default_backend() == "cpu" else lambda f, rows: jax.vmap(f)(rows)
    return jax.tree.map(np.asarray, jax.jit(lambda *rows: over(one, rows))(keys, state, task, population, holdout))


def _measured(parts, aligner, key, state, info, task, holdout, router_prior):
    everyone = jnp.arange(len(task))
    cohort = Cohort(everyone, jnp.ones(len(task), bool), jnp.full(len(task), SLOTS))
    alignment, _ = aligner.align(key, state.aligner, cohort)
    mask = held_mask(alignment.held, EXPERTS).astype(jnp.float32)
    common = mask @ mask.T / SLOTS
    same, other = task[:, None] == task, ~jnp.eye(len(task), dtype=bool)
    prior = router_prior * (alignment.fitness - alignment.fitness_mean[:, None])
    accuracy = _accuracy(parts)(state, holdout, everyone, alignment.held, prior)
    return {
        "common_same_task": common.mean(where=same & other),
        "common_other_task": common.mean(where=~same),
        "load_cv_total": info.load_cv_total[-1],
        "least_trained": state.tokens.min() / state.tokens.mean(),
        "client_accuracy_mean": accuracy.mean(),
        "client_accuracy_p10": jnp.quantile(accuracy, 0.1),
    }


def _accuracy(parts):
    def one(state, holdout, client, held, prior):
        experts = gather(state.experts, held)
        if state.personal is not None:
            own = jax.tree.map(lambda rows: rows[client, jnp.maximum(held, 0)], state.personal)
            experts = nnx.merge_state(own, nnx.split_state(experts, RouterParam, ...)[1])
        batch = holdout.batch(client, jnp.arange(holdout.max_examples))
        model = bind(parts, experts, state.shared, Slots(held != NO_EXPERT, prior, batch.mask))
        _, aux = fm.models.losses.cross_entropy(model, batch, state.key)
        return jnp.where(batch.mask, aux["correct"], 0).sum() / batch.mask.sum()

    return jax.vmap(one, in_axes=(None, None, 0, 0, 0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[13, 13, 13, 13, 12, 12, 12, 12], help="clients of each task")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--aligners", nargs="+", choices=ALIGNERS, default=list(ALIGNERS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = []
    for router, options in ROUTERS.items():
        greedy = None
        for aligner in arguments.aligners:
            found = runs(ALIGNERS[aligner](), arguments.sizes, rounds=arguments.rounds, seeds=range(arguments.seeds), **options)
            greedy = found if aligner == "greedy" else greedy
            results.append({"aligner": aligner, "router": router} | summary(found) | against(found, greedy))
            print(results[-1], flush=True)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    about = dict(sizes=arguments.sizes, rounds=arguments.rounds, seeds=arguments.seeds, jax=jax.__version__, device=device)
    arguments.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


def summary(found):
    """Means over the seeds."""
    return {name: round(float(value.mean()), 4) for name, value in found.items()}


def against(found, greedy):
    """Client accuracy compared with greedy's on the same seeds: mean difference and its standard error."""
    metrics = ("client_accuracy_mean", "client_accuracy_p10")
    if greedy is None or found is greedy:
        return {}
    gains = {metric: found[metric] - greedy[metric] for metric in metrics}
    errors = {f"{m}_gain_error": round(float(gain.std(ddof=1) / len(gain) ** 0.5), 4) for m, gain in gains.items()}
    return {f"{m}_gain": round(float(gain.mean()), 4) for m, gain in gains.items()} | errors


if __name__ == "__main__":
    main()
