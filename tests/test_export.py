"""Exports: what is written and loaded again computes the same logits, and a client's experts alone those of the masked model."""

import dataclasses
import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedmoe_jax import cli, distil, posterior
from fedmoe_jax.experts import Slots, bind, groups, num_experts
from fedmoe_jax.nn.moe import mix_all
from fedmoe_jax.training import export
from fedmoe_jax.training.checkpoint import Checkpoints
from fedmoe_jax.training.config import TrainConfig, to_toml
from fedmoe_jax.training.evaluate import client_evaluation
from fedmoe_jax.training.setup import build

pytest.importorskip("safetensors", reason="safetensors is not installed")

CONFIG = TrainConfig(
    population=6,
    cohort=4,
    experts=4,
    slots=2,
    top_k=2,
    aligner="greedy",
    router_prior=3.0,
    model_options={"hidden": 16, "expert_hidden": 8},
)


def made(folder, **changes):
    """A run folder whose state has weights, fitness and router rows drawn at random, and what it is made of."""
    config = dataclasses.replace(CONFIG, **changes)
    setup = build(config)
    state, draw = setup.algorithm(4).init(jax.random.key(0), setup.population), np.random.default_rng(0)

    def drawn(tree, least=-1.0):
        return jax.tree.map(lambda a: jnp.asarray(draw.uniform(least, 1, a.shape), a.dtype), tree)

    statistics = tuple(
        dataclasses.replace(layer, second=layer.second + 1e3 * jnp.eye(layer.second.shape[-1]))  # so that covariances are positive
        for layer in drawn(state.statistics, 0.1) or ()
    )
    fitness = state.aligner.fitness
    fitness = dataclasses.replace(fitness, value=drawn(fitness.value))
    state = dataclasses.replace(
        state,
        experts=drawn(state.experts),
        shared=drawn(state.shared),
        personal=drawn(state.personal),
        statistics=statistics or None,
        aligner=dataclasses.replace(state.aligner, fitness=fitness),
    )
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(3, state)
    return setup, state


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(router) -> (folder, setup, state), each made once."""
    return functools.cache(lambda router: (folder := tmp_path_factory.mktemp("runs") / router, *made(folder, router=router)))


@pytest.fixture
def known(runs, monkeypatch):
    """As `runs`, whose checkpoints then need not be read."""

    def one(router):
        _, setup, state = runs(router)
        monkeypatch.setattr(export, "restored", lambda *_: (3, setup, state))
        return runs(router)

    return one


def examples(setup):
    return jnp.asarray(setup.test[0][:40])


def full_logits(setup, weights, held=None, prior=None, adapt=lambda model: None):
    """Logits of all experts, of which `held` may be used."""
    number = len(groups(setup.parts.experts)) * num_experts(setup.parts.experts)
    mask = jnp.ones(number, bool) if held is None else jnp.isin(jnp.arange(number), held)

    @jax.jit
    def logits(x):
        model = bind(setup.parts, *weights, Slots(mask, jnp.zeros(number) if prior is None else jnp.asarray(prior)))
        adapt(model)
        return model(x)

    return logits(examples(setup))


@pytest.mark.parametrize("router", ["shared", "soft", "statistics", "distilled"])
def test_the_global_model_comes_back(tmp_path, runs, router):
    trained_as = {"soft": "shared", "distilled": "statistics"}.get(router, router)
    folder, setup, state = runs(trained_as)
    if router != trained_as:
        setup, folder = dataclasses.replace(setup, config=dataclasses.replace(setup.config, router=router)), tmp_path / router
        shutil.copytree(runs(trained_as)[0], folder)
        (folder / "config.toml").write_text(to_toml(setup.config))
    routers, experts = state.statistics and posterior.posteriors(state.statistics), nnx.clone(state.experts)
    if router == "distilled":
        experts = distil.weights(setup.parts, experts, state.shared, state.statistics)
        assert np.abs(experts["moe"]["router"].get_value() - state.experts["moe"]["router"].get_value()).max() > 0.1
    adapt = {"soft": mix_all, "statistics": lambda model: posterior.serve(model, routers)}.get(router, lambda model: None)
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "export")]) == 0
    found = export.load(tmp_path / "export")
    expected = full_logits(setup, (experts, state.shared), adapt=adapt)
    np.testing.assert_allclose(found.logits(examples(setup)), expected, rtol=1e-6, atol=1e-6)
    assert found.config["round"] == 3 and found.config["held"] is None


@pytest.mark.parametrize(("router", "client"), [("shared", 0), ("personal", 4)])
def test_a_clients_experts_alone_are_the_full_model_with_the_others_masked(tmp_path, known, router, client):
    folder, setup, state = known(router)
    held = np.array(export.export_run(folder, setup.config, tmp_path / "export", client)["held"])
    weights = nnx.clone(state.experts)
    if router == "personal":
        weights["moe"]["router"].set_value(state.personal["moe"]["router"].get_value()[client])
    value = np.asarray(state.aligner.fitness.value)[client]
    masked = full_logits(setup, (weights, state.shared), held, 3.0 * (value - value.mean()))
    found = export.load(tmp_path / "export")
    np.testing.assert_allclose(found.logits(examples(setup)), masked, rtol=2e-5, atol=2e-5)
    assert found.model.moe.w_in.shape[0] == 2 and len(set(held)) == 2
    assert np.abs(masked - full_logits(setup, (weights, state.shared))).max() > 1e-3


def test_clients_are_served_as_evaluation_serves_them(tmp_path, known):
    folder, setup, state = known("personal")
    right = []
    for client in range(6):
        export.export_run(folder, setup.config, tmp_path / str(client), client)
        batch = setup.holdout.batch(jnp.int32(client), jnp.arange(setup.holdout.max_examples))
        answer = np.argmax(export.load(tmp_path / str(client)).logits(batch.x), 1)
        if batch.mask.any():
            right.append((answer == batch.y)[batch.mask].mean())
    assert np.mean(right) == pytest.approx(client_evaluation(setup)(state)["client_accuracy_mean"], abs=1e-6)


def example():
    """The module examples/serve_client.py."""
    spec = importlib.util.spec_from_file_location("serve_client", Path(__file__).parents[1] / "examples" / "serve_client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_serves_a_client(tmp_path, known):
    folder, setup, _ = known("personal")
    assert cli.main(["export", str(folder), "--client", "2", "--out", str(tmp_path / "two")]) == 0
    x = examples(setup)[:3]
    found = [json.loads(answer) for answer in example().answers(str(tmp_path / "two"), (json.dumps(row) for row in x.tolist()))]
    logits = export.load(tmp_path / "two").logits(x)
    assert [answer["class"] for answer in found] == np.argmax(logits, 1).tolist()
    assert [answer["probability"] for answer in found] == pytest.approx(jax.nn.softmax(logits).max(1).tolist(), abs=1e-4)


@pytest.mark.slow
def test_the_example_serves_texts_and_survives_what_is_no_example(tmp_path):
    letters = np.random.default_rng(0).integers(0, 3, (60, 7)).astype(np.int32)
    np.savez(tmp_path / "texts.npz", x=letters[:, :-1], y=letters[:, 1:], test_x=letters[:9, :-1], test_y=letters[:9, 1:])
    options = {"features": 8, "heads": 2, "expert_hidden": 4}
    setup, _ = made(tmp_path / "run", model="transformer", data=str(tmp_path / "texts.npz"), split="iid", model_options=options)
    export.export_run(tmp_path / "run", setup.config, tmp_path / "one", 1)
    answers, x = example().answers, setup.test[0][:1]
    lines = [json.dumps(x[0].tolist()), "[1]", "", "[0, 0, 0, 0, 0, NaN]", "{}", "[0, 0, 0, 0, 0, 1e999]"]
    found = [json.loads(answer) for answer in answers(str(tmp_path / "one"), lines)]
    assert found[0]["class"] == int(export.load(tmp_path / "one").logits(x)[0, -1].argmax())
    assert all("no example of shape" in answer["error"] for answer in found[1:])


def test_mistakes_are_told_in_one_line(tmp_path, known, capsys):
    folder, setup, _ = known("shared")
    run, out = str(folder), tmp_path / "export"

    def told(*words):
        assert cli.main(["export", *words]) == 2
        return capsys.readouterr().err

    assert "takes the folder of a run" in told()
    assert "holds no run" in told(str(tmp_path / "nothing"), "--out", str(out))
    assert "--out is missing" in told(run)
    assert "client: must be from 0 to 5, got 6" in told(run, "--out", str(out), "--client", "6")
    assert "is not empty" in told(run, "--out", run)
    with pytest.raises(ValueError, match="holds no export"):
        export.load(out)
    export.export_run(folder, setup.config, out)
    about = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(ValueError, match="form 99"):
        export.load(out)
    (out / "config.json").write_text(json.dumps(about | {"model": about["model"] | {"hidden": 17}}))
    with pytest.raises(ValueError, match="missing or no float32 of shape"):
        export.load(out)
    (out / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ValueError, match="holds no export"):
        export.load(out)


def test_a_model_of_ones_own_is_imported_only_where_it_is_trusted(tmp_path, known, monkeypatch):
    folder, setup, _ = known("shared")
    export.export_run(folder, setup.config, tmp_path / "export")
    about = json.loads((tmp_path / "export" / "config.json").read_text())
    name = "own_model:create"
    (tmp_path / "export" / "config.json").write_text(json.dumps(about | {"model": about["model"] | {"name": name}}))
    own = "import fedmoe_jax\n\ndef create(**options):\n    return fedmoe_jax.models.create('mlp', **options)\n"
    (tmp_path / "own_model.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    for trusted in (None, "own_model:other"):
        with pytest.raises(ValueError, match="'own_model:create', which is code that is not trusted") as caught:
            export.load(tmp_path / "export", trusted=trusted)
        assert "\n" not in str(caught.value) and "own_model" not in sys.modules
    x = examples(setup)[:3]
    assert export.load(tmp_path / "export", trusted=name).logits(x).shape == (3, setup.num_classes)
    assert len(list(example().answers(str(tmp_path / "export"), [json.dumps(x[0].tolist())], name))) == 1


def test_a_model_that_computes_in_bfloat16_comes_back(tmp_path, runs, monkeypatch):
    folder, setup, state = runs("shared")
    config = dataclasses.replace(setup.config, dtype="bfloat16")
    setup = build(config)
    monkeypatch.setattr(export, "restored", lambda *_: (3, setup, state))
    export.export_run(folder, config, tmp_path / "export")
    found = export.load(tmp_path / "export")
    assert found.model.head.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.logits(examples(setup)), full_logits(setup, (state.experts, state.shared)))
