"""What a run is made of: the fields of `fedmoe train`, and what their values may be."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmoe_jax.data import shift
from fedmoe_jax.devices import SOURCES
from fedmoe_jax.training import conflicts, fields
from fedmoe_jax.training.conflicts import num_clients
from fedmoe_jax.training.fields import Options, UsageError, to_toml

__all__ = ["TrainConfig", "UsageError", "from_toml", "located", "num_clients", "parse", "to_toml", "validate"]

MAX_INT = 2**31 - 1  # of whole numbers, as devices count
SPLITS, MODELS = ("iid", "dirichlet", "classes", "natural"), ("mlp", "resnet", "transformer")
ALIGNERS = ("random", "greedy", "load_only", "balanced", "full")
FITNESSES = ("solo", "ranked_solo", "loss", "accuracy", "usage")
ROUTERS = ("shared", "personal", "soft", "statistics", "distilled")
PROFILES, PROFILE_FILES = tuple(SOURCES), (".json", ".jsonl")
LOSSES, PULLED = ("cross_entropy", "balanced_softmax"), ("all", "shared", "router")
ASSIGNMENTS, ENGINES = ("shared", "per_layer"), ("auto", "primal", "dual")
AGGREGATORS = ("mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median")
OPTIMIZERS = ("sgd", "momentum", "nesterov", "adagrad", "adam", "adamw", "fedadam", "lion", "rmsprop", "yogi")
DTYPES, SCHEDULES = ("float32", "bfloat16"), ("constant", "cosine", "linear")
DIVERGENCES = ("continue", "stop", "rollback")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains one federated Mixture-of-Experts model. A CONFIG.toml sets fields, flags go over it."""

    data: str = "digits"
    """digits, an .npz file, a folder of IDX or CIFAR files, a Hugging Face name, or package.module:name."""
    split: str = "dirichlet"
    """How examples go to clients: iid, dirichlet, classes or natural."""
    alpha: float = 0.3
    """Concentration of the dirichlet split; small is uneven."""
    classes_per_client: int = 2
    """Classes that a client has with the classes split."""
    shift: str = "none"
    """Clients fall into domains whose images look different (features), whose labels mean others (concepts), or both; or none."""
    domains: int = 8
    """Domains of the shift, at least 2, and at most 8 where images change."""
    augment: bool = False
    """Clients train on images mirrored and shifted at random."""
    population: int | None = None
    """Number of all clients; 100 if not given, or every natural client."""
    cohort: int = 20
    """Clients sampled each round."""
    model: str = "mlp"
    """mlp, resnet, transformer, or package.module:name."""
    model_options: Options = dataclasses.field(default_factory=dict)
    """Further arguments of the model, such as hidden=128; in TOML the table [model_options]."""
    experts: int = 8
    """Experts of the global model."""
    shared_experts: int = 0
    """Further experts that every client holds, outside alignment."""
    slots: int = 2
    """Most experts that a client holds."""
    top_k: int = 1
    """Experts that a token is sent to."""
    balance_weight: float = 0.01
    """Weight of the router's balance loss."""
    rounds: int = 300
    """Rounds of training."""
    local_epochs: int = 1
    """Passes of a client over its data in a round."""
    local_steps: int | None = None
    """Local steps in a round, in place of local_epochs."""
    batch_size: int = 16
    """Examples in a client's batch."""
    client_optimizer: str = "sgd"
    """sgd, momentum, nesterov, adagrad, adam, adamw, fedadam (for servers), lion, rmsprop or yogi."""
    client_lr: float = 0.3
    """Learning rate of the clients."""
    client_schedule: str = "cosine"
    """Client learning rate over the rounds: constant, cosine or linear."""
    weight_decay: float | None = None
    """Weight decay of the clients; none if not given, or what adamw and lion have of their own."""
    server_optimizer: str = "sgd"
    """As client_optimizer, applied to the aggregate of a round."""
    server_lr: float = 1.0
    """Learning rate of the server."""
    shared_optimizer: str | None = None
    """Server optimizer of the shared part, where it is not to be server_optimizer."""
    shared_lr: float | None = None
    """Its learning rate; server_lr if not given."""
    server_schedule: str = "constant"
    """Server learning rate over the rounds: constant, cosine or linear."""
    prox: float = 0.0
    """Weight of the FedProx term, which pulls clients to the global model."""
    prox_on: str = "all"
    """What it pulls: all weights, the shared part, or the rows of the router."""
    agreement: float = 0.0
    """How far the signs of clients' updates of a number must agree, 0 to 1, lest it changes less; 0 for the plain mean."""
    few_holders: float = 0.0
    """How much less an expert with fewer clients than others changes: a power of that ratio, 0 to 1."""
    loss: str = "cross_entropy"
    """What clients minimise: cross_entropy, or balanced_softmax, which adds a client's label prior to its logits."""
    control_variates: bool = False
    """Clients correct their gradients as in SCAFFOLD, which doubles the traffic."""
    compress_bits: int | None = None
    """Bits of a value that a client sends, 2 to 8, rounded at random; as many as in memory if not given."""
    compress_share: float | None = None
    """Share of each tensor's values that a client sends, the largest, keeping the rest for later; all if not given."""
    broadcast_bits: int | None = None
    """Bits of a value that clients receive, as compress_bits."""
    rotate: bool = False
    """Tensors are rotated at random before their values get fewer bits."""
    aggregator: str = "mean"
    """How updates become one: mean, or against bad clients median, trimmed_mean, krum, multi_krum or geometric_median."""
    bad_share: float = 0.2
    """Share of bad clients that trimmed_mean, krum and multi_krum are to stand, below 0.5."""
    clip_norm: float | None = None
    """Norm to which a client's whole update is scaled down; none if not given."""
    reject_above: float | None = None
    """Times the norm of the weights that a client received above which its update is rejected; any if not given."""
    noise_multiplier: float | None = None
    """Noise on the sum of updates, as a multiple of clip_norm, so that no client's data can be told; none if not given."""
    target_epsilon: float | None = None
    """In place of noise_multiplier: as much noise as keeps epsilon after all rounds at this or below."""
    target_delta: float = 1e-5
    """The delta of that epsilon, below 1 over the population."""
    clip_quantile: float | None = None
    """Quantile of the updates' norms that clip_norm, then that of the first round, is to follow; it stays if not given."""
    feedback_noise: float | None = None
    """Noise multiplier of the scores that clients tell, also spent; with noise on updates they are withheld if not given."""
    secret_cohorts: bool = False
    """Count on nobody seeing who is in a cohort, for which epsilon is lower."""
    sampling_rate: float | None = None
    """Chance of each client to be in a round, of whom at most cohort are; always as many as cohort if not given."""
    min_holders: int = 1
    """Clients that must hold an expert, lest it be left out of the round."""
    secure_bits: int | None = None
    """Binary places of the whole numbers that secure aggregation sums; updates are not summed so if not given."""
    aligner: str = "balanced"
    """Who trains which expert: random, greedy, load_only, balanced, full, or package.module:name."""
    assignment: str = "shared"
    """shared, one for the experts of all layers, or per_layer; a model of one's own makes `group`s of its experts for that."""
    fitness: str = "solo"
    """Feedback that scores a client-expert pair: solo, ranked_solo (the ranks of a client's scores), loss, accuracy or usage."""
    beta: float = 0.6
    """Weight of the newest feedback in the fitness, above 0 and at most 1."""
    probes: int = 1
    """Experts that a client tries each round without training them."""
    router: str = "shared"
    """shared; personal, rows stay on clients; of the global model also soft, to all experts; statistics or distilled, by what they saw."""
    router_prior: float = 0.0
    """Multiple of a client's centred fitness that its router logits get."""
    tolerance: float | None = None
    """How far clients per expert may be from the target of a round, as a share; 0.1 if not given, but 0.3 with demand."""
    least_spread: float = 0.0
    """Relative spread of a client's scores below which balanced deals experts out by load alone; 0 for never."""
    demand: float = 0.0
    """How far training of experts follows what clients ask for: 0 is even, 1 as they ask."""
    profile: str = "uniform"
    """What clients can afford: uniform, tiers (three kinds), phones (real ones), a .json or .jsonl file, or package.module:name."""
    deadline: float | None = None
    """Seconds that a client has for a round; no limit if not given."""
    availability: float = 1.0
    """Chance that a sampled client can be reached, above 0 and at most 1."""
    speed_bias: float = 0.0
    """How far a client's speed differs from its profile for good, as the deviation of its logarithm."""
    speed_jitter: float = 0.0
    """How far a client's speed differs from round to round, likewise."""
    engine: str = "auto"
    """Local training: primal, each client with its own weights; dual, without; or auto, whichever costs less for each kernel."""
    dtype: str = "float32"
    """Type of the computation: float32 or bfloat16."""
    chunk: int | None = None
    """Clients trained at once on a device; chosen from the memory, on a CPU from its cache, if not given."""
    devices: int | None = None
    """Devices that share the work of a round, cores where there is but a CPU; 1 if not given, but all of those of several processes."""
    expert_devices: int = 1
    """Of these devices so many share the experts, each keeping its part; must divide both."""
    stream: int | None = None
    """Rounds whose examples go to the device at once, those of the next ones while it computes; all examples are there if not given."""
    seed: int = 0
    """Of the split, the initial weights and the sampling."""
    eval_every: int = 20
    """Rounds between evaluations."""
    checkpoint_every: int = 100
    """Rounds between checkpoints."""
    init_from: str | None = None
    """Run folder or weights file to start from."""
    on_divergence: str = "continue"
    """What to do when no update, not the test loss or not every weight is finite: continue, stop, or rollback to the last checkpoint."""
    target: float | None = None
    """Global test accuracy for rounds and bytes to target, above 0 and at most 1."""


_NAMES = {
    "split": SPLITS,
    "shift": shift.KINDS,
    "model": MODELS,
    "aligner": ALIGNERS,
    "assignment": ASSIGNMENTS,
    "fitness": FITNESSES,
    "router": ROUTERS,
    "profile": PROFILES,
    "engine": ENGINES,
    "loss": LOSSES,
    "prox_on": PULLED,
    "aggregator": AGGREGATORS,
    "dtype": DTYPES,
    **dict.fromkeys(("client_optimizer", "server_optimizer", "shared_optimizer"), OPTIMIZERS),
    **dict.fromkeys(("client_schedule", "server_schedule"), SCHEDULES),
    "on_divergence": DIVERGENCES,
}
_CUSTOM = ("model", "aligner", "profile")
_LEAST = {
    **dict.fromkeys(("classes_per_client", "population", "cohort", "experts", "slots", "top_k", "rounds", "local_epochs"), 1),
    **dict.fromkeys(("local_steps", "batch_size", "eval_every", "checkpoint_every", "chunk", "stream", "devices", "expert_devices"), 1),
    "min_holders": 1,
    **dict.fromkeys(("domains", "compress_bits", "broadcast_bits"), 2),
    **dict.fromkeys(("shared_experts", "probes", "seed", "balance_weight", "prox", "router_prior", "tolerance"), 0),
    **dict.fromkeys(("demand", "agreement", "few_holders", "least_spread", "speed_bias", "speed_jitter", "bad_share"), 0),
    **dict.fromkeys(("noise_multiplier", "clip_quantile", "secure_bits", "weight_decay"), 0),
}
_ABOVE_ZERO = (
    *("availability", "alpha", "client_lr", "server_lr", "shared_lr", "beta", "deadline", "target", "compress_share"),
    *("clip_norm", "reject_above", "target_epsilon", "target_delta", "feedback_noise", "sampling_rate"),
)
_MOST: dict[str, float] = dict.fromkeys(
    ("availability", "demand", "beta", "target", "compress_share", "agreement", "few_holders", "clip_quantile", "sampling_rate"), 1
)
_MOST |= {"seed": 2**32 - 1, "compress_bits": 8, "broadcast_bits": 8, "secure_bits": 30, "target_delta": 0.5}
_MOST |= {"noise_multiplier": 1e4, "feedback_noise": 1e4, "clip_norm": 1e12}


def validate(config: Any) -> None:
    """Checks a TrainConfig, or another dataclass with fields of these names.

    Raises:
      ValueError: "field: what is wrong, what would be right", for the first field whose value cannot be.
    """
    for name, hint in fields.hints(type(config)).items():
        value = getattr(config, name)
        try:
            fields.convert(value, hint)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        problem = None if value is None else _number(config, name, value) if isinstance(value, int | float) else _text(config, name, value)
        if problem:
            raise ValueError(f"{name}: {problem}")


def _number(config, name, value):
    """What is wrong with a number, or None."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be finite, got {value}"
    if name in _ABOVE_ZERO and value <= 0:
        return f"must be above 0, got {value}"
    if name in _LEAST and value < _LEAST[name]:
        return f"must be at least {_LEAST[name]}, got {fields.shown(value)}"
    most = _MOST.get(name, MAX_INT if isinstance(value, int) else math.inf)
    if value > most:
        return f"must be at most {most}, got {fields.shown(value)}"
    return conflicts.problem(config, name, value)


def _text(config, name, value):
    """What is wrong with a text, or None. Names of functions are only looked at, not imported."""
    if isinstance(value, str) and not value.strip():
        return "must not be empty"
    known = _NAMES.get(name)
    if known is None or value in known or (name in _CUSTOM and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value)):
        return conflicts.problem(config, name, value)
    if name == "profile" and value.endswith(PROFILE_FILES):
        return None
    file = f", a file that ends in {' or '.join(PROFILE_FILES)}" if name == "profile" else ""
    custom = " or package.module:name" if name in _CUSTOM else ""
    return f"{fields.shown(value)} is unknown{fields.nearest(value, known).removesuffix('?')}; expected {', '.join(known)}{file}{custom}"


def from_toml(path: str | Path, cls: type = TrainConfig) -> dict[str, Any]:
    """The fields that a TOML file sets; their values are not validated yet. Paths of what lies beside the file become absolute.

    Raises:
      ValueError: in one line with the file, and the field where there is one: not readable, not TOML, an unknown field, a wrong type.
    """
    values = fields.from_toml(path, cls)
    return values | _found(values, Path(path).parent)


def located(config: Any) -> Any:
    """The same configuration with absolute paths of the files and folders that it names, where they exist, so that it serves anywhere."""
    return dataclasses.replace(config, **_found(vars(config), Path()))


def _found(values: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The fields that name what exists in a folder, as absolute paths. The names of what is no file go first, as when they are loaded."""
    given = {name: values[name] for name in ("data", "profile", "init_from") if values.get(name)}
    if given.get("data") == "digits" or given.get("data", "").startswith("hf:"):
        del given["data"]
    if not given.get("profile", "").endswith(PROFILE_FILES):
        given.pop("profile", None)
    paths = {name: folder / value for name, value in given.items()}
    return {name: str(path.parent.resolve() / path.name) for name, path in paths.items() if os.path.exists(path)}


def parse(
    cls: type, argv: Sequence[str], prog: str, *, default: Any = None, options: type | None = None, description: str | None = None
) -> tuple[Any, Any]:
    """Reads `[CONFIG.toml] [--field value ...]` into a valid `cls`, `located`, and the flags of `options`; see `fields.parse`.

    Raises:
      UsageError: for any mistake, in one line that names the field.
    """
    config, chosen = fields.parse(
        cls, argv, prog, default=default, options=options, read=from_toml, check=validate, description=description
    )
    return located(config), chosen
