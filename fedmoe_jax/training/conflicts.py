"""Which values of fields do not go together, such as noise with what clients return without any."""

from typing import Any

DEFAULT_POPULATION = 100
_MOST_FIELD = {"cohort": "population", "min_holders": "cohort"} | dict.fromkeys(("slots", "top_k", "probes"), "experts")
_WITHOUT_NOISE = ("clip_quantile", "feedback_noise", "secret_cohorts")


def problem(config: Any, name: str, value: Any) -> str | None:
    """What is wrong with a number or flag beside others, or None. Fields that a configuration lacks conflict with nothing."""
    compresses = getattr(config, "compress_share", None) is not None
    if name == "bad_share" and value >= 0.5:
        return f"must be below 0.5, got {value}"
    if name == "rotate" and value and config.compress_bits is None and config.broadcast_bits is None:
        return "must be false where neither compress_bits nor broadcast_bits is given"
    if name == "few_holders" and value and getattr(config, "aggregator", "mean") != "mean":
        return "must be 0 with any aggregator but mean"
    if name == "agreement" and value and (compresses or getattr(config, "aggregator", "mean") != "mean"):
        return "must be 0 with compress_share, where most numbers are not sent, and with any aggregator but mean"
    if name == "compress_bits" and value < 3 and compresses:
        return f"must be at least 3 with compress_share, since errors of fewer add up, got {value}"
    if name in ("noise_multiplier", "target_epsilon", "secure_bits"):
        return _of_sums(config, name)
    if name == "on_divergence" and value == "rollback" and is_private(config):
        return "must not be rollback with noise, since the rounds that are lost have been seen and cost budget"
    if name in _WITHOUT_NOISE and value is not False and not is_private(config):
        return "goes with noise_multiplier or target_epsilon only, give one of them"
    if name == "feedback_noise" and config.fitness not in ("solo", "ranked_solo"):
        return f"goes with fitness solo or ranked_solo, whose scores it is on, not {config.fitness}"
    if name == "secret_cohorts" and value:
        return _of_secret_cohorts(config)
    if name in ("devices", "expert_devices") and value > 1 and is_private(config):
        return f"must be 1 with noise_multiplier or target_epsilon, whose noise is drawn on one device, got {value}"
    if name == "sampling_rate" and num_clients(config) is None:
        return "needs population with the natural split"
    if name == "sampling_rate" and value * (num_clients(config) or 0) < 1:
        return f"must be at least 1 / population, got {value}"
    if name == "target_delta" and is_private(config) and value * (num_clients(config) or 0) >= 1:
        return f"must be below 1 / population, got {value}"
    other = _MOST_FIELD.get(name)
    most = num_clients(config) if other == "population" else getattr(config, other or "", None)
    return f"must be at most {other} ({most}), got {value}" if most is not None and value > most else None


def num_clients(config: Any) -> int | None:
    """How many clients the population is to have; None for all natural ones."""
    given = getattr(config, "population", None)
    return DEFAULT_POPULATION if given is None and getattr(config, "split", None) != "natural" else given


def is_private(config: Any) -> bool:
    """Whether a configuration asks for noise."""
    return getattr(config, "noise_multiplier", None) is not None or getattr(config, "target_epsilon", None) is not None


def _of_sums(config, name):
    """Where clients' updates are no more than summed, privately or securely."""
    if config.aggregator != "mean" or config.agreement or config.few_holders:
        return "goes with aggregator mean, agreement 0 and few_holders 0 only, since no more than a sum is known of updates"
    if config.control_variates or config.router in ("statistics", "distilled"):
        beside = "control_variates" if config.control_variates else f"router {config.router}"
        return f"does not go with {beside}: what clients return for it is not protected"
    if name == "secure_bits" and config.min_holders < 2:
        return "needs min_holders of at least 2: the sum over one holder is its update"
    if name == "secure_bits" and (config.clip_norm or 0) * 2.0**config.secure_bits * config.cohort >= 2**31:
        return f"must be less, so that clip_norm x 2^secure_bits x cohort is below 2^31, got {config.secure_bits}"
    if name == "secure_bits":
        return None
    if config.router == "personal":
        return "does not go with router personal: the rows of the global model would be the mean of what clients keep, without noise"
    if config.loss == "balanced_softmax":
        return "does not go with loss balanced_softmax: how frequent labels are with all clients is told without noise"
    if config.clip_norm is None:
        return "needs clip_norm, the most that a client's update may count"
    both = config.noise_multiplier is not None and config.target_epsilon is not None
    return "and target_epsilon: give one of them" if both else None


def _of_secret_cohorts(config):
    if config.aligner not in ("random", "full") or config.min_holders > 1:
        return "goes with aligner random or full and min_holders 1 only: others give clients other experts where one is not in the cohort"
    if num_clients(config) is None:
        return "needs population with the natural split"
    if config.compress_share is not None or config.deadline is not None:
        what = "compress_share" if config.compress_share is not None else "deadline"
        return f"does not go with {what}, for which something is kept of the rounds in which a client was"
    return "does not go with feedback_noise, since scores tell who was there" if config.feedback_noise is not None else None
