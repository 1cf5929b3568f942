"""The README's Python blocks run as printed."""

import re
from pathlib import Path

import numpy as np

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


def test_functional_api_runs_and_learns():
    names = {}
    exec(compile(BLOCKS[0], "README", "exec"), names)
    losses = np.asarray(names["info"].train_loss)
    assert losses.shape == (10,) and losses[-1] < losses[0]
    assert np.asarray(names["info"].load[-1]).sum() == 40


def test_own_model_is_accepted():
    import fedmoe_jax as fm

    names = {"__name__": "mymodel"}
    exec(compile(BLOCKS[1], "README", "exec"), names)
    model = names["make"](input_shape=(8, 8, 1), num_classes=10, num_experts=4, top_k=1, seed=0, dtype=None)
    assert fm.partition(model).experts["moe"]["w_in"].shape[0] == 4


def test_own_aligner_is_an_aligner():
    from fedmoe_jax import alignment

    names = {}
    exec(compile(BLOCKS[2], "README", "exec"), names)
    aligner = names["by_usage"](num_experts=4, max_slots=2, fitness=None, load=alignment.load.monitor())
    assert aligner.max_slots == 2
