"""Bad input harms nobody: whatever is read is accepted or refused in one line, without code, memory, time or files of its choosing."""

import contextlib
import io

import fuzz
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe_jax import cli
from fedmoe_jax.data.npz import read_npz
from fedmoe_jax.training.config import TrainConfig, UsageError, from_toml, parse, to_toml, validate
from fedmoe_jax.training.fields import _toml_value

QUICK = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_no_case_goes_wrong(tmp_path):
    found = fuzz.campaign(tmp_path, 180, seed=1)
    assert found["wrong"] == []
    assert all(counts.keys() & {"refused", "accepted"} for counts in found["outcomes"].values())


@pytest.mark.slow
def test_no_case_of_many_goes_wrong(tmp_path):
    assert fuzz.campaign(tmp_path, 10_000)["wrong"] == []


VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(st.characters(codec="utf-8"))),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=5,
)
NAMES = st.sampled_from([*TrainConfig.__dataclass_fields__, "colour"])


@QUICK
@given(fields=st.dictionaries(NAMES, VALUES, max_size=3))
def test_any_fields_are_a_configuration_or_one_line(fields, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("".join(f"{name} = {_toml_value(value)}\n" for name, value in fields.items()))
    try:
        config = TrainConfig(**from_toml(path))
        validate(config)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    path.write_text(to_toml(config))
    assert TrainConfig(**from_toml(path)) == config


@QUICK
@given(words=st.lists(st.one_of(st.text(max_size=12), NAMES.map("--{}".format), st.integers().map(str), st.floats().map(str)), max_size=5))
def test_any_words_are_a_configuration_or_one_line(words):
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            parse(TrainConfig, words, "fedmoe train")
    except UsageError as error:
        assert "\n" not in str(error) and str(error)
    except SystemExit as error:
        assert not error.code and printed.getvalue()


@pytest.mark.parametrize(
    "words", [["--rounds", "9" * 30], ["--population", "9" * 12], ["--seed", "-1"], ["--data", "\0"], ["--init_from", "\0"]]
)
def test_extreme_numbers_and_names_take_one_line(words, tmp_path, capsys):
    assert cli.main(["train", *words, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "shape, message",
    [(b"(99999999,", "."), (b"(9999999,)", "bytes follow"), (b"(-1,-2,60)", "bytes follow"), (b"(30, 2, 3)", "bytes follow")],
)
def test_declared_shapes_are_not_believed(shape, message, tmp_path):
    data = fuzz.zipped(lambda npy: npy.replace(b"(30, 2, 2)", shape), x=np.zeros((30, 2, 2)))
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_npz(tmp_path / "a.npz")


def test_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([fuzz.Marker(tmp_path / "executed")], object))
    with pytest.raises(ValueError, match="holds objects"):
        read_npz(tmp_path / "a.npz")
    assert not (tmp_path / "executed").exists()
