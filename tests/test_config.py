"""Configuration: TOML and flags in, one-line errors out."""

import dataclasses
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_jax.training import config as config_module
from fedmoe_jax.training.config import TrainConfig, UsageError, from_toml, located, parse, to_toml, validate

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20)
OPTION = st.one_of(st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), TEXT, st.lists(st.integers(0, 9), max_size=3))


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags that are not part of a configuration."""

    out: str | None = None
    """Folder."""
    resume: bool = False
    """Go on."""


@dataclasses.dataclass(frozen=True)
class Several(TrainConfig):
    """A configuration that builds on TrainConfig."""

    aligners: tuple[str, ...] = ("random", "balanced")
    """Aligners."""


def read(*words, cls=TrainConfig, **kwargs):
    return parse(cls, list(words), "fedmoe train", **kwargs)[0]


def test_defaults_are_valid():
    validate(TrainConfig())
    assert read() == TrainConfig()


def test_flags_take_hyphens_underscores_and_equals():
    config = read(
        "--client-lr", "0.5", "--local_steps=3", "--aligner=my.module:make", "--model-options.hidden", "64", "--model-options.name=wide"
    )
    assert (config.client_lr, config.local_steps, config.aligner) == (0.5, 3, "my.module:make")
    assert config.model_options == {"hidden": 64, "name": "wide"}
    assert read("--model_options", "hidden=64", "rates=[1, 2]").model_options == {"hidden": 64, "rates": [1, 2]}


@pytest.mark.parametrize("place", [0, 1, 3])
def test_flags_go_over_the_file_wherever_it_stands(tmp_path, place):
    path = tmp_path / "run.toml"
    path.write_text("alpha = 1\nrounds = 7\n[model_options]\nhidden = 32\ndepth = 2\n")
    words = ["--resume", "--rounds", "9", "--model-options.hidden=8"]
    words.insert(place, str(path))
    config, flags = parse(TrainConfig, words, "fedmoe train", options=Flags)
    assert (config.alpha, config.rounds, config.model_options) == (1.0, 9, {"hidden": 8, "depth": 2})
    assert flags == Flags(resume=True)


def test_a_value_that_ends_in_toml_is_not_the_file():
    assert read("--data", "x.toml").data == "x.toml"
    assert parse(TrainConfig, ["--out", "x.toml"], "fedmoe", options=Flags)[1].out == "x.toml"


def test_a_default_and_a_subclass_serve_other_commands():
    config = read("--aligners", "random", "full", "--rounds", "2", cls=Several, default=Several(alpha=0.7))
    assert (config.aligners, config.rounds, config.alpha) == (("random", "full"), 2, 0.7)


WRONG_FLAGS = {
    "--alpha x": "alpha: expected a number, got 'x'",
    "--rounds 1.5": "rounds: expected a whole number, got '1.5'",
    "--deadline soon": "deadline: expected a number or None, got 'soon'",
    "--local-steps 1.5": "local_steps: expected a whole number or None, got '1.5'",
    "--alphaa 1": "alphaa: unknown field, did you mean 'alpha'?",
    "--model.hidden 1": "model: has no option 'hidden'",
    "--model-options hidden": "model_options: expected NAME=VALUE, got 'hidden'",
    "--model-options.hidden": "model_options.hidden: expected a value",
    "--alpha": "alpha: expected a value",
    "--alpha 1 stray": "stray: neither a flag nor the value of one",
    "--slots 9": "slots: must be at most experts (8), got 9",
    "--aligner balancd": "aligner: 'balancd' is unknown, did you mean 'balanced'; expected random, greedy,",
    "missing.toml": "missing.toml: cannot be read",
}


@pytest.mark.parametrize(("words", "message"), WRONG_FLAGS.items())
def test_a_mistake_is_one_line_that_names_the_field(words, message, capsys):
    with pytest.raises(UsageError) as error:
        read(*words.split())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value) and str(error.value).isascii()
    assert capsys.readouterr() == ("", "")


def test_help_shows_the_fields_and_succeeds(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, ["--help"], "fedmoe train", options=Flags)
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in out
    assert "Dirichlet" in out.title() and "--resume" in out


WRONG_FILES = {
    "alpha = ": "not a TOML file",
    "alphaa = 1": "alphaa: unknown field, did you mean 'alpha'?",
    "alpha = 'x'": "alpha: expected a number, got 'x'",
    "rounds = 1.5": "rounds: expected a whole number, got 1.5",
    "rounds = true": "rounds: expected a whole number, got True",
    "data = 3": "data: expected a text, got 3",
    "model_options = 3": "model_options: expected a table, got 3",
}


@pytest.mark.parametrize(("text", "message"), WRONG_FILES.items())
def test_from_toml_names_file_and_field(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        from_toml(path)
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


def test_from_toml_refuses_what_is_no_text_file(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "absent.toml", tmp_path / "bytes.toml"):
        with pytest.raises(ValueError, match=str(path)):
            from_toml(path)


def test_paths_are_looked_for_beside_the_file_and_then_in_the_folder(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for name in ("configs/both.npz", "both.npz", "here.json", "digits", "phones"):
        (tmp_path / name).touch()
    path = tmp_path / "configs" / "run.toml"
    path.write_text('data = "both.npz"\nprofile = "here.json"\ninit_from = "absent"\n')
    monkeypatch.chdir(tmp_path)
    config = read("configs/run.toml")
    assert config.data == str(tmp_path / "configs" / "both.npz") and config.profile == str(tmp_path / "here.json")
    assert config.init_from == "absent"
    assert read("configs/run.toml", "--data", "both.npz").data == str(tmp_path / "both.npz")
    assert read("--profile", "phones") == TrainConfig(profile="phones")  # the names of what is no file go first
    assert located(TrainConfig(data="both.npz")).data == str(tmp_path / "both.npz")


@given(data=TEXT, alpha=st.floats(allow_nan=False), steps=st.none() | st.integers(), options=st.dictionaries(TEXT, OPTION, max_size=4))
def test_toml_round_trip(data, alpha, steps, options):
    config = TrainConfig(data=data, alpha=alpha, local_steps=steps, model_options=options)
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config


def test_toml_keeps_tuples_and_nested_tables(tmp_path):
    config = Several(aligners=("full", "greedy"), model_options={"inner": {"a b": 1, "none": None}})
    (tmp_path / "c.toml").write_text(to_toml(config))
    read_back = Several(**from_toml(tmp_path / "c.toml", Several))
    assert read_back == dataclasses.replace(config, model_options={"inner": {"a b": 1}})


IMPOSSIBLE = [
    *[(name, value) for name, least in config_module._LEAST.items() for value in (least - 1, -5)],
    *[(name, value) for name in config_module._ABOVE_ZERO for value in (0.0, -1.0, float("nan"), float("inf"))],
    *[(name, float("nan")) for name in ("prox", "router_prior", "tolerance", "balance_weight")],
    *[(name, "nonsense") for name in config_module._NAMES],
    *[("cohort", 101), ("slots", 9), ("top_k", 9), ("probes", 9), ("beta", 1.5), ("target", 1.5), ("seed", 2**32)],
    *[("bad_share", 0.5), ("compress_bits", 9), ("broadcast_bits", 16), ("compress_share", 1.01), ("rotate", True)],
    *[
        ("data", ""),
        ("model", " "),
        ("init_from", ""),
        ("split", "my.module:split"),
        ("model", "module:"),
        ("model", "a b:c"),
        ("model", "a.json"),
    ],
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_validate_refuses_the_impossible(name, value):
    if "float" in str(TrainConfig.__dataclass_fields__[name].type) and not isinstance(value, str):
        value = float(value)
    with pytest.raises(ValueError, match=rf"^{name}: .*(must be|must not|is unknown)") as error:
        validate(dataclasses.replace(TrainConfig(), **{name: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        *[{"slots": 8}, {"cohort": 100}, {"probes": 8}, {"top_k": 8}, {"tolerance": 0.0}, {"beta": 1.0}],
        *[{"compress_bits": 2, "rotate": True}, {"broadcast_bits": 8, "rotate": True}, {"compress_share": 1.0}, {"bad_share": 0.0}],
        *[{"profile": name} for name in ("uniform", "tiers", "phones", "a.b:c", "a/b.json", "c:b.jsonl")],
    ],
)
def test_validate_takes_the_limits(fields):
    validate(dataclasses.replace(TrainConfig(), **fields))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(agreement=0.4, aggregator="median"), "agreement: must be 0 with compress_share"),
        (dict(agreement=0.4, compress_share=0.05), "agreement: must be 0 with compress_share"),
        (dict(compress_bits=2, compress_share=0.05), "compress_bits: must be at least 3 with compress_share"),
    ],
)
def test_options_that_undo_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        validate(TrainConfig(**options))
    for name in options:
        validate(TrainConfig(**{other: value for other, value in options.items() if other != name}))
