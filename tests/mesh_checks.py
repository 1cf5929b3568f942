"""Rounds on meshes of virtual devices against one device; run in a process of its own, since the number of devices is fixed at its start.

python tests/mesh_checks.py light          what tests/test_mesh.py looks at, one JSON line a check
python tests/mesh_checks.py aligners       all aligners with both engines on 1, 2, 4 and 8 devices
python tests/mesh_checks.py options        all options of a round on 2 x 2 devices
python tests/mesh_checks.py mass           the aggregate against what clients sent on 2 x 2 devices, also where one is left out
python tests/mesh_checks.py broken         a client whose data are broken, of whom the sum of a device tells
python tests/mesh_checks.py command        fedmoe train --devices, and --resume with others
"""

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import small_groups
import small_round

import fedmoe_jax as fm
from fedmoe_jax import cli, sharding
from fedmoe_jax.distributed.traffic import collectives
from fedmoe_jax.local import spread
from fedmoe_jax.local.cohort import Trainer
from fedmoe_jax.training.checkpoint import Checkpoints

SIZES = small_round.SIZES * 2  # 16 clients, of whom 11 train: no number of devices divides them
COHORT = 11
EXPERTS = 8  # of the program that is looked at
MESHES = {1: ((1, 1),), 2: ((2, 1), (1, 2)), 4: ((4, 1), (2, 2)), 8: ((8, 1), (4, 2), (2, 4))}


def difference(a, b):
    """The largest one between two pytrees; NaN equals NaN."""

    def one(x, y):
        x, y = (np.asarray(jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v, np.float64) for v in (x, y))
        assert x.shape == y.shape
        return float(np.nan_to_num(np.abs(x - y), nan=0.0 if (np.isnan(x) == np.isnan(y)).all() else np.inf).max(initial=0.0))

    return max(one(*pair) for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def made(mesh, of=None, sizes=SIZES, placed=True, broken=(), **options):
    """Population, algorithm and first state, on a mesh or without."""
    data = small_round.population(sizes=sizes, broken=broken)
    if mesh is not None and placed:
        data = fm.distributed.place(data, mesh)
    algorithm = small_round.algorithm(of=of, mesh=mesh, **(dict(cohort_size=COHORT, solo_examples=3) | options))
    return data, algorithm, algorithm.init(small_round.KEY, data)


def rounds(made, count=3):
    """The states and Infos of some rounds."""
    data, algorithm, state = made
    found = []
    for _ in range(count):
        state, info = jax.block_until_ready(algorithm.step(state, data))
        found.append((state, info))
    return found


def compared(name, meshes, **options):
    """How far rounds on meshes are from those on one device: weights, everything else that is carried, Info, and who held what."""
    reference = rounds(made(None, **options))
    for shape in meshes:
        start = time.perf_counter()
        found = rounds(made(fm.distributed.mesh(*shape), **options))
        line = dict(check=name, clients=shape[0], experts=shape[1], seconds=round(time.perf_counter() - start, 1))
        names = ("state", "all_but_residuals", "info")
        yield line | dict(zip(names, (max(column) for column in zip(*map(_apart, found, reference), strict=True)), strict=True))


def _apart(found, reference):
    (state, info), (state_there, info_there) = found, reference
    sums, sums_there = (dataclasses.replace(each, residuals=None) for each in (state, state_there))
    return difference(state, state_there), difference(sums, sums_there), difference(info, info_there)


def of_program():
    """A round in two chunks on 2 x 2 devices by the dual engine, against the other one on one device: its result, what devices send
    each other, and where its state lies."""
    aligner = small_round.aligner("greedy", num_experts=EXPERTS)
    mesh, options = fm.distributed.mesh(2, 2), dict(of=small_round.model(EXPERTS), aligner=aligner, chunk_size=2)
    data, algorithm, state = made(mesh, engine="dual", **options)
    compiled = algorithm.step.lower(state, data).compile()
    text = compiled.as_text()
    found = [c._asdict() for c in collectives(text, mesh.size)]
    weights = jax.tree.leaves(state.experts)
    stacks = sorted({str(list(leaf.shape)).replace(" ", "") for leaf in weights if leaf.ndim == 3})
    new, info = compiled(state, data)
    reference = rounds(made(None, **options), 1)[0]
    yield dict(
        check="program", state=difference(new, reference[0]), info=difference(info, reference[1]), collectives=found,
        whole_stacks=[stack for stack in stacks if stack in text], stacks=stacks,
        expert_bytes=sum(leaf.nbytes for leaf in weights) / EXPERTS,
        shared_bytes=1.0 * sum(leaf.nbytes for leaf in jax.tree.leaves(state.shared)), largest=data.largest,
        rows=int(data.x.shape[1]), examples=int(sum(SIZES)), floats=int(np.prod(data.x.shape[2:])),
        kept=_placed_alike(new, state),
        fitness=str(new.aligner.fitness.value.sharding.spec), experts=str(jax.tree.leaves(new.experts)[0].sharding.spec),
    )  # fmt: skip
    yield from of_checkpoint(new, made(None, **options), reference)


def of_checkpoint(state, alone, reference):
    """A checkpoint of four devices goes on with one, and the other way round."""
    data, algorithm, template = alone
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state, {})
        _, restored, _ = checkpoints.restore(template)
        there = difference(restored, state)
        went_on, _ = algorithm.step(restored, data)
        straight, _ = algorithm.step(reference[0], data)
        checkpoints.save(2, went_on, {})
        wider = sharding.place(template, len(SIZES), fm.distributed.mesh(4, 2))
        _, back, _ = checkpoints.restore(wider)
    placed = _placed_alike(back, wider)
    yield dict(check="checkpoint", there=there, on=difference(went_on, straight), back=difference(back, went_on), placed=placed)


def _placed_alike(a, b):
    pairs = [(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True) if x.size]
    return all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)


def of_exchanges():
    """`fetch`, `take` and `ring_sum` alone: what is taken is bit for bit what is there, also with fewer wanted than kept."""
    mesh = fm.distributed.mesh(2, 4)
    draw = np.random.default_rng(0)
    stack, whole = draw.normal(size=(8, 3)).astype(np.float32), sharding.AXES
    for number in (1, 2, 5):
        wanted = draw.integers(0, 8, (8, number))
        take = jax.shard_map(
            lambda shard, wanted: sharding.take(shard, wanted[0], 4)[None],
            mesh=mesh, in_specs=(jax.P("expert"), jax.P(whole)), out_specs=jax.P(whole), check_vma=False,
        )  # fmt: skip
        yield dict(check="take", wanted=number, exact=bool((np.asarray(jax.jit(take)(stack, wanted)) == stack[wanted]).all()))
    given = draw.integers(0, 100, (8, 4)).astype(np.int32)  # [device, what it gives to each along the axis expert]
    ring = jax.shard_map(
        lambda given: sharding.ring_sum(lambda total, device: total + given[0, device], jnp.int32(0), 4)[None],
        mesh=mesh, in_specs=jax.P(whole), out_specs=jax.P(whole), check_vma=False,
    )  # fmt: skip
    sums = given.reshape(2, 4, 4).sum(1).reshape(-1)
    yield dict(check="ring", exact=bool((np.asarray(jax.jit(ring)(given)) == sums).all()))


def light():
    yield from of_exchanges()
    yield from of_program()
    yield from compared(
        "kept", [(2, 2)], aligner=small_round.aligner(), chunk_size=2, router="personal", placed=False, solo_examples=0,
        aggregator=fm.aggregation.chain(fm.aggregation.sparsify(share=0.5), fm.aggregation.median()), sizes=SIZES[:15],
    )  # fmt: skip


ALIGNERS = ("random", "greedy", "load_only", "balanced", "full")
OPTIONS = {
    "adam": dict(client_optimizer=optax.adam(0.01), server_optimizer=optax.adam(0.01)),
    "personal routers": dict(router="personal", router_prior=1.0),
    "statistics": dict(router="statistics"),
    "control variates": dict(control_variates=True),
    "sparsified and quantized": dict(
        aggregator=fm.aggregation.chain(fm.aggregation.sparsify(share=0.5), fm.aggregation.quantize(bits=8), fm.aggregation.mean())
    ),
    "broadcast": dict(broadcast=fm.aggregation.quantize(bits=8, rotate=True)),
    "agreement": dict(aggregator=fm.aggregation.mean(agreement=0.5)),
    "few holders": dict(aggregator=fm.aggregation.mean(few_holders=1.0)),
    "median": dict(aggregator=fm.aggregation.median()),
    "multi-krum": dict(aggregator=fm.aggregation.krum(byzantine=0.2, keep=None)),
    "rejected": dict(reject_above=0.05),
    "deadline and jitter": dict(
        deadline=1e-4, conditions=fm.conditions.varying(availability=0.8, speed_bias=0.3, speed_jitter=0.3), router_prior=1.0
    ),
    "momentum, dual": dict(client_optimizer=optax.sgd(0.3, momentum=0.9), engine="dual", local_steps=2),
    "two groups": dict(of=small_groups.Net),
    "secure sums": dict(
        aggregator=fm.aggregation.fixed_mean(clients=11.0, holders=5.0, fixed_point=fm.aggregation.FixedPoint(16, clients=COHORT))
    ),
    "enough holders": dict(min_holders=3, sampling_rate=0.6),
}


def aligners():
    """Every aligner with both engines on every mesh."""
    everywhere = [shape for shapes in MESHES.values() for shape in shapes]
    for name in ALIGNERS:
        for engine in ("primal", "dual"):
            slots = dict(num_experts=small_round.EXPERTS) | ({} if name == "full" else dict(max_slots=2))
            options = dict(aligner=getattr(fm.alignment, name)(**slots), engine=engine, chunk_size=3)
            yield from compared(f"{name}, {engine}", everywhere, **options)


def options():
    """Every option."""
    for name, options in OPTIONS.items():
        options = dict(engine="auto") | options
        groups = 2 if "of" in options else 1
        options |= {"of": options["of"]()} if "of" in options else {}
        aligner = fm.alignment.greedy(num_experts=small_round.EXPERTS, max_slots=2, groups=groups)
        yield from compared(name, [(2, 2)], aligner=aligner, chunk_size=2, **options)


def of_mass():
    """Whether the last invariant holds: in rounds that are right, and in such whose sums over devices are not."""

    def line(name, **options):
        mesh = fm.distributed.mesh(2, 2)
        found = rounds(made(mesh, chunk_size=2, solo_examples=0, check=True, **options), 1)
        return dict(check=name, holds=bool(found[0][1].invariants[-1]))

    yield from (line(f"good, {engine}", engine=engine) for engine in ("primal", "dual"))
    together, ring_sum = spread.Links.together, sharding.ring_sum
    spread.Links.together = lambda self, aggregator, total: total
    yield line("not summed over clients", engine="primal")
    spread.Links.together = together
    sharding.ring_sum = lambda add, start, devices: add(start, jax.lax.axis_index(sharding.EXPERT))
    yield line("a device left out", engine="dual")
    sharding.ring_sum = ring_sum


def of_broken():
    """Both ways to find who is to be left out, of which one is known to the devices by a sum that passes between them."""
    tells = Trainer._sum_tells
    for sum_tells in (False, True):
        Trainer._sum_tells = lambda *_, sum_tells=sum_tells: sum_tells
        for engine in ("primal", "dual"):
            options = dict(engine=engine, broken=(5, 12), chunk_size=2, solo_examples=0, router="statistics")
            yield from compared(f"broken, {engine}, sum tells: {sum_tells}", [(2, 2), (1, 4)], **options)
    Trainer._sum_tells = tells


def command():
    """A run on four devices, one that goes on with two after its end was lost, and one on one device."""
    words = [
        "train",
        "--population",
        "20",
        "--cohort",
        "7",
        "--experts",
        "4",
        "--rounds",
        "4",
        "--eval_every",
        "2",
        "--checkpoint_every",
        "2",
        "--model_options",
        "hidden=16",
    ]
    ours, alone = (["--devices", "4", "--expert_devices", "2"], ["--devices", "2", "--expert_devices", "2"]), ["--devices", "1"]
    with tempfile.TemporaryDirectory() as folder:
        statuses = [cli.main([*words, *flags, "--out", f"{folder}/{name}"]) for name, flags in (("many", ours[0]), ("one", alone))]
        for lost in ("checkpoints/4", "summary.json"):
            path = Path(folder) / "many" / lost
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        statuses.append(cli.main([*words, *ours[1], "--resume", "--out", f"{folder}/many"]))
        yield dict(check="command", statuses=statuses, apart=processes.apart(Path(folder) / "many", Path(folder) / "one"))


if __name__ == "__main__":
    checks = dict(light=light, aligners=aligners, options=options, mass=of_mass, broken=of_broken, command=command)
    for line in checks[sys.argv[1]]():
        print(json.dumps(line), flush=True)
