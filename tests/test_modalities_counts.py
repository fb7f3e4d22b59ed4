"""Likelihoods of counts against scipy's, in float32 and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from scjax.objectives.counts import bernoulli_nll, negative_binomial_nll, poisson_nll

RNG = np.random.default_rng(0)
COUNT = RNG.choice([0, 1, 2, 5, 30, 400, 9000], (60, 40)).astype(np.float32)
MEAN = np.exp(RNG.uniform(-6, 8, COUNT.shape)).astype(np.float32)
THETA = np.exp(RNG.uniform(-3, 9, COUNT.shape[1])).astype(np.float32)
LOGIT = RNG.uniform(-12, 12, COUNT.shape).astype(np.float32)


def exact(name):
    count, mean, theta = (x.astype(np.float64) for x in (COUNT, MEAN, THETA))
    if name == "negative_binomial":
        return -stats.nbinom.logpmf(count, theta, theta / (theta + mean))
    if name == "poisson":
        return -stats.poisson.logpmf(count, mean)
    return -stats.bernoulli.logpmf(count > 0, 1 / (1 + np.exp(-LOGIT.astype(np.float64))))


GIVEN = {
    "negative_binomial": (negative_binomial_nll, MEAN, (THETA,)),
    "poisson": (poisson_nll, MEAN, ()),
    "bernoulli": (bernoulli_nll, LOGIT, ()),
}


@pytest.mark.parametrize("name", GIVEN)
def test_is_that_of_scipy(name):
    function, parameter, more = GIVEN[name]
    one = jax.vmap(jax.vmap(lambda *of: function(*(x[None, None] for x in of), jnp.ones((1, 1)))[0]))
    wide = [np.broadcast_to(x, COUNT.shape) for x in (COUNT, parameter, *more)]
    wanted = exact(name)
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(one(*wide), wanted, rtol=2e-3, atol=2e-3)
    with jax.enable_x64(True):
        fine = np.asarray(one(*(np.asarray(x, np.float64) for x in wide)))
    np.testing.assert_allclose(fine, wanted, rtol=1e-7, atol=1e-7)
    mask = RNG.random(COUNT.shape) < 0.3
    total, weight = function(COUNT, jnp.asarray(parameter), *map(jnp.asarray, more), jnp.asarray(mask))
    assert weight == mask.sum()
    np.testing.assert_allclose(total, wanted[mask].sum(), rtol=1e-3)


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("bad", [-1.0, 0.5, np.nan])
def test_what_is_no_count_stops_a_run_where_it_is_looked_at(name, bad):
    function, parameter, more = GIVEN[name]
    count, mask = COUNT.copy(), np.ones(COUNT.shape)
    count[3, 4] = bad
    assert np.isnan(function(count, jnp.asarray(parameter), *map(jnp.asarray, more), jnp.asarray(mask))[0])
    mask[3, 4] = 0
    grad = jax.grad(lambda p: function(count, p, *map(jnp.asarray, more), jnp.asarray(mask))[0])
    assert np.isfinite(grad(jnp.asarray(parameter))).all()


def test_a_mean_of_zero_is_finite():
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    for count in (zero, one):
        total, _ = negative_binomial_nll(count, zero, jnp.ones(1), one)
        assert np.isfinite(total) and np.isfinite(poisson_nll(count, zero, one)[0])
