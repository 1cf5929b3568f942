"""What kinds of device there are: a plain phone, three made-up tiers, and real phones and networks.

`PHONES` and `NETWORKS` are derived, by experiments/derive_devices.py, from the data of FLASH [1] in the repository
PKU-Chengxu/FLASH at commit 55cbede0131877b583ed55333e980985a1925afd (BSD-2-Clause). The AI-Benchmark scores in it look copied
from the public ranking at ai-benchmark.com, for which no licence is stated; so only derived numbers stand here: 37 of 333 scores,
without names.

What the data do not say is assumed:
  * The score of floating-point inference on the CPU (CPU-F) stands for float32 training. Scores are relative: the median phone
    is set to the rate of `PLAIN`, 100 GFLOP/s, and the others are in proportion to their scores.
  * `MEMORY_SHARE`, a quarter of a phone's memory, is what an app may use.
  * Every phone of the ranking is as frequent as any other, and its network does not depend on it. The phones are from 2009 to
    2019; the ranking does not say how many people have which.
  * A client has one network, drawn with equal chances, and keeps one speed each way: max(normal(mean, deviation), `SLOWEST_LINK`
    of the mean). The numbers are read as kB/s, as FLASH's code does; here a kB is 1,000 bytes.

References:
  [1] C. Yang et al., "Characterizing Impacts of Heterogeneity in Federated Learning upon Large-Scale Smartphone Data", WWW 2021.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


class Device(NamedTuple):
    """FLOP/s in float32, bytes of memory, downlink and uplink bytes/s of one kind of device, in the order of a `ClientProfile`."""

    flops_per_second: float
    memory_bytes: float
    downlink_bytes_per_second: float
    uplink_bytes_per_second: float


PLAIN = Device(1e11, 4e9, 10e6, 2.5e6)
"""A plain phone, in round numbers."""

TIERS = {"small": Device(2e10, 2e9, 2.5e6, 0.6e6), "medium": PLAIN, "large": Device(5e11, 12e9, 40e6, 10e6)}
"""Three kinds of phone. Round numbers, not measurements."""

PHONES = (
    (123, 1), (208, 1), (235, 0.5), (269, 1), (282, 1), (309, 1.5), (357, 1), (397, 1), (478, 2),
    (595, 4), (666, 3), (786, 4), (1078, 4), (1197, 4), (1306, 4), (1400, 6), (1442, 4), (1495, 8),
    (1548, 4), (1581, 4), (1641, 4), (1680, 4), (1723, 4), (1858, 4), (1977, 4), (2015, 4),
    (2067, 6), (2150, 6), (2214, 6), (2568, 6), (2808, 8), (3079, 8), (3207, 8), (3466, 8),
    (3558, 8), (3744, 8), (4147, 12),
)  # fmt: skip
"""CPU-F score and GB of memory of phones of equal frequency, from the slowest to the fastest: the middles of 37 groups of 9."""

NETWORKS = (
    (7491, 3369, 4935, 2767), (4055, 1820, 3006, 890), (2370, 1388, 2774, 1097),
    (9913, 1551, 6635, 1460), (4209, 1482, 2974, 833), (3778, 2843, 2632, 1576),
    (3473, 1277, 5141, 2277), (4668, 613, 3205, 419), (3298, 771, 2337, 1610),
    (4284, 1561, 3642, 1495), (3658, 1316, 2547, 1089), (7214, 3363, 4040, 2189),
    (8885, 1999, 6279, 489), (5125, 2088, 3730, 461), (7271, 1914, 5743, 1964),
    (4318, 1265, 3286, 1018), (6708, 6738, 665, 312), (17333, 11182, 5641, 2550),
    (3177, 1838, 431, 158),
)  # fmt: skip
"""Mean and standard deviation of the downlink, then of the uplink, of 19 networks in kB/s."""

MEMORY_SHARE = 0.25
"""Share of a phone's memory that an app may use."""

SLOWEST_LINK = 0.1
"""Least speed of a link, as a share of its network's mean."""


def uniform(key: Key[Array, ""], n: int) -> Float[Array, "quantity client"]:
    """`n` times `PLAIN`; `key` does not matter. One row for each field of `Device`, here and below."""
    return jnp.repeat(jnp.array(PLAIN, jnp.float32)[:, None], n, axis=1)


def tiers(key: Key[Array, ""], n: int) -> Float[Array, "quantity client"]:
    """`n` devices of the three `TIERS`, drawn with equal chances."""
    table = jnp.array(list(TIERS.values()), jnp.float32)
    return table[jax.random.randint(key, (n,), 0, len(TIERS))].T


def phones(key: Key[Array, ""], n: int) -> Float[Array, "quantity client"]:
    """`n` devices that each are one of the `PHONES` in one of the `NETWORKS`, with link speeds of their own."""
    phone_key, network_key, link_key = jax.random.split(key, 3)
    table = jnp.array(PHONES, jnp.float32)
    score, memory = table[jax.random.randint(phone_key, (n,), 0, len(PHONES))].T
    flops = score * (PLAIN.flops_per_second / jnp.median(table[:, 0]))
    network = jax.random.randint(network_key, (n,), 0, len(NETWORKS))
    mean, deviation = jnp.array(NETWORKS, jnp.float32)[network].reshape(n, 2, 2).T  # [direction, client] each
    speed = jnp.maximum(mean + deviation * jax.random.normal(link_key, mean.shape), SLOWEST_LINK * mean)
    return jnp.concatenate([flops[None], 1e9 * MEMORY_SHARE * memory[None], 1e3 * speed])


SOURCES: dict[str, Callable[[Key[Array, ""], int], Float[Array, "quantity client"]]] = {
    "uniform": uniform,
    "tiers": tiers,
    "phones": phones,
}
"""What `ClientProfile.sample` draws from, by name."""
