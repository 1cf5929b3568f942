"""Fitness, aligner, aggregator and broadcast that a configuration names."""

from collections.abc import Callable
from typing import Any

from fedmoe_jax import aggregation, alignment
from fedmoe_jax.alignment import fitness, holders, load
from fedmoe_jax.base import Aggregator, Aligner, Fitness
from fedmoe_jax.training import accountant
from fedmoe_jax.training.config import TrainConfig, num_clients
from fedmoe_jax.training.foreign import foreign


def make_fitness(config: TrainConfig) -> Fitness:
    """The fitness that a configuration names."""
    scores = {
        "solo": lambda: fitness.solo(beta=config.beta, probes=config.probes),
        "ranked_solo": lambda: fitness.ranked(fitness.solo(beta=config.beta, probes=config.probes)),
        "loss": lambda: fitness.loss_driven(beta=config.beta),
        "accuracy": lambda: fitness.accuracy_driven(beta=config.beta),
        "usage": lambda: fitness.usage_driven(beta=config.beta),
    }
    return scores[config.fitness]()


def make_aligner(config: TrainConfig, groups: int = 1) -> Aligner:
    """The aligner that a configuration names, for so many groups of experts."""
    monitor = holders.at_least(load.monitor(tolerance=config.tolerance, demand=config.demand), config.min_holders)
    common: dict[str, Any] = dict(fitness=make_fitness(config), load=monitor)
    if config.aligner == "full":
        return alignment.full(num_experts=config.experts, groups=groups, **common)
    common |= dict(num_experts=config.experts, max_slots=config.slots)
    if ":" in config.aligner:
        made = foreign(config.aligner, "aligner", Aligner, **common)
        if groups > 1 and made.num_experts is None:
            made = made._replace(num_experts=config.experts)
        return alignment.grouped(made, groups)
    if config.aligner == "balanced":
        common["least_spread"] = config.least_spread
    return getattr(alignment, config.aligner)(groups=groups, **common)


def aggregator(config: TrainConfig) -> Aggregator:
    """What makes one update of many, which are clipped and compressed first where a configuration says so."""
    rules: dict[str, Callable[[], Aggregator]] = {
        "mean": lambda: aggregation.mean(agreement=config.agreement, few_holders=config.few_holders),
        "trimmed_mean": lambda: aggregation.trimmed_mean(share=config.bad_share),
        "krum": lambda: aggregation.krum(byzantine=config.bad_share),
        "multi_krum": lambda: aggregation.krum(byzantine=config.bad_share, keep=None),
    }
    noise, transforms = accountant.multiplier(config), []
    if config.clip_quantile is not None and config.clip_norm is not None:
        deviation = max(config.cohort / 20, noise or 0.0)
        transforms.append(aggregation.adaptive_clip(norm=config.clip_norm, quantile=config.clip_quantile, deviation=deviation))
    elif config.clip_norm is not None:
        transforms.append(aggregation.clip(norm=config.clip_norm))
    if config.compress_share is not None:
        transforms.append(aggregation.sparsify(share=config.compress_share))
    if config.compress_bits is not None:
        transforms.append(aggregation.quantize(bits=config.compress_bits, rotate=config.rotate))
    if noise is not None:
        transforms.append(aggregation.gaussian_noise(noise_multiplier=noise, feedback_multiplier=config.feedback_noise))
    if noise is not None or config.secure_bits is not None:
        return aggregation.chain(*transforms, _fixed_mean(config))
    rule = rules.get(config.aggregator) or getattr(aggregation, config.aggregator)
    return aggregation.chain(*transforms, rule())


def _fixed_mean(config: TrainConfig) -> Aggregator:
    """A mean over what clients and holders are to be expected."""
    drawn = config.cohort if config.sampling_rate is None else config.sampling_rate * (num_clients(config) or 0)
    expected = config.availability * drawn
    share = 1.0 if config.aligner == "full" else config.slots / config.experts
    point = None if config.secure_bits is None else aggregation.FixedPoint(config.secure_bits, config.cohort)
    return aggregation.fixed_mean(clients=expected, holders=share * expected, fixed_point=point)


def broadcast(config: TrainConfig) -> aggregation.Transform | None:
    """What becomes of weights on their way to clients."""
    return None if config.broadcast_bits is None else aggregation.quantize(bits=config.broadcast_bits, rotate=config.rotate)
