"""The Gaussians of the router of statistics, against those of scipy, and far from the origin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from fedmoe_jax import posterior
from fedmoe_jax.posterior import RIDGE, SHRUNK, TEMPER, Statistics


def gaussians(seed=0, experts=3, classes=4, features=5, each=40):
    """Statistics of tokens around a centre for each expert and class; the last expert was sent nothing, and some pairs nothing."""
    draw = np.random.default_rng(seed)
    count = draw.integers(1, each, (experts, classes)) * 1.0
    count[0, 1] = count[-1] = 0
    mixing = draw.normal(size=(experts, features, features)) * 0.4
    rows, total, second = [], np.zeros((experts, classes, features)), np.zeros((experts, features, features))
    for e, c in np.argwhere(count):
        tokens = draw.normal(size=features) + 2 + draw.normal(size=(int(count[e, c]), features)) @ mixing[e]
        total[e, c] = tokens.sum(0)
        second[e] += tokens.T @ tokens
        rows.append(tokens)
    statistics = Statistics(*(jnp.asarray(a, jnp.float32) for a in (count, total, second)), group=0)
    return statistics, np.concatenate(rows)


def log_posterior(statistics, tokens):
    """TEMPER times the log posterior of each expert that was sent anything, but for a constant of each token, by scipy."""
    count, total, second = (np.asarray(a, np.float64) for a in (statistics.count, statistics.total, statistics.second))
    pairs = np.argwhere(count)
    mean = {(e, c): total[e, c] / count[e, c] for e, c in pairs}
    scatter = second.copy()
    for e, c in pairs:
        scatter[e] -= count[e, c] * np.outer(mean[e, c], mean[e, c])
    pooled = scatter.sum(0) / count.sum()
    pooled += RIDGE * np.trace(pooled) / len(pooled) * np.eye(len(pooled))
    score = np.full((len(tokens), *count.shape), -np.inf)
    for e, c in pairs:
        covariance = SHRUNK * pooled + (1 - SHRUNK) * scatter[e] / count[e].sum()
        score[:, e, c] = np.log(count[e, c]) + multivariate_normal.logpdf(tokens, mean[e, c], covariance)
    return TEMPER * logsumexp(score, axis=2)


def test_the_router_is_the_tempered_posterior_of_gaussians_whose_covariances_are_shrunk():
    statistics, tokens = gaussians()
    (router,) = posterior.posteriors((statistics,))
    found, wanted = np.asarray(router.logits(jnp.asarray(tokens, jnp.float32))), log_posterior(statistics, tokens)
    seen = np.isfinite(wanted[0])
    assert seen.tolist() == [True, True, False]
    np.testing.assert_allclose(*(a[:, seen] - a[:, seen].mean(1, keepdims=True) for a in (found, wanted)), atol=5e-3)
    assert np.ptp(wanted[:, seen][:, 0] - wanted[:, seen][:, 1]) > 1


def test_features_far_from_the_origin_lose_little_to_rounding():
    statistics, tokens = gaussians()
    count, total, second = (np.asarray(a, np.float64) for a in (statistics.count, statistics.total, statistics.second))
    offset = 30 * tokens.std()
    cross = total.sum(1)[:, :, None] * offset
    second = second + cross + cross.transpose(0, 2, 1) + count.sum(1)[:, None, None] * offset**2
    moved = Statistics(*(jnp.asarray(a, jnp.float32) for a in (count, total + count[..., None] * offset, second)), group=0)
    near, far = (
        jax.nn.softmax(posterior.posteriors((layer,))[0].logits(jnp.asarray(x, jnp.float32)))
        for layer, x in ((statistics, tokens), (moved, tokens + offset))
    )
    np.testing.assert_allclose(far, near, atol=1e-2)


@pytest.mark.parametrize("where", ["among the others", "at the origin", "far away"])
def test_an_expert_that_was_sent_nothing_gets_no_token(where):
    statistics, tokens = gaussians()
    tokens = {"among the others": tokens, "at the origin": tokens * 0, "far away": tokens * -3}[where]
    (router,) = posterior.posteriors((statistics,))
    share = jax.nn.softmax(router.logits(jnp.asarray(tokens, jnp.float32)))
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-5)
    assert float(share[:, -1].max()) < 1e-6
