"""Pooling over tasks, against scipy, against its definitions, and on data whose mean is known"""
import numpy as np, pandas as pd, pytest
from helpers import evidence
from scipy.stats import ttest_1samp

@pytest.fixture(scope='module')
def pooling(): return evidence('pooling')

def table(y, se): return pd.DataFrame(dict(diff=y, se=se))
def drawn(rng, k=None):
    k = k or rng.integers(3, 15)
    return table(rng.normal(rng.normal(), 3, k), np.exp(rng.normal(0, 1, k)))

def check_t(got, y, level):
    ref = ttest_1samp(y, 0)
    ci = ref.confidence_interval(level)
    np.testing.assert_allclose([got['mean'], got.p, got.low, got.high], [y.mean(), ref.pvalue, ci.low, ci.high])
    assert (got.better, got.k) == ((y < 0).sum(), len(y))

def test_the_plain_mean_is_a_t_test(pooling, rng=np.random.default_rng()):
    e, level = drawn(rng), rng.uniform(.5, .99)
    check_t(pooling.plain_mean(e, level), e['diff'], level)
    check_t(pooling.plain_mean(e['diff'], level), e['diff'], level)

@pytest.mark.parametrize('spread', ['dersimonian_laird', 'paule_mandel'])
def test_a_weighted_mean_of_equal_errors_is_a_t_test(pooling, spread, rng=np.random.default_rng()):
    e, level = drawn(rng).assign(se=rng.uniform(.01, 1)), rng.uniform(.5, .99)
    check_t(pooling.weighted_mean(e, getattr(pooling, spread), level), e['diff'], level)

def test_the_spread_of_two_tasks_by_hand(pooling):
    # se 1 and 2: w = 1, 1/4; Q = 0.2 diff**2; tau2 = (Q - 1)/(1.25 - 1.0625/1.25)
    got = pooling.weighted_mean(table([0., 5.], [1., 2.]))
    tau2 = (0.2*25 - 1)/(1.25 - 1.0625/1.25)
    w = 1/(1 + tau2), 1/(4 + tau2)
    np.testing.assert_allclose([got.tau**2, got['mean']], [tau2, 5*w[1]/sum(w)])

def test_paule_and_mandels_spread_is_the_one_that_is_expected(pooling, rng=np.random.default_rng()):
    for _ in range(50):
        y, se = drawn(rng).to_numpy().T
        w = 1/(se**2 + pooling.paule_mandel(y, se**2))
        q = (w*(y - np.average(y, weights=w))**2).sum()
        alone = (se**-2*(y - np.average(y, weights=se**-2))**2).sum()
        assert q == pytest.approx(len(y) - 1) if alone > len(y) - 1 else q == pytest.approx(alone)

def test_where_gains_grow_with_errors_only_the_plain_mean_is_right(pooling):
    "8 tasks, gains in step with errors over a factor of 100: the weighted means lean to the small gains"
    se = np.geomspace(.03, 3, 8)
    held = pooling.coverage(table(-2 - 2*(np.argsort(se)/3.5 - 1), se), 300)
    assert held['plain mean'] > .9 and held['DerSimonian–Laird'] < .8

def test_where_errors_are_alike_all_are_right(pooling, rng=np.random.default_rng(1)):
    held = pooling.coverage(table(rng.normal(-2, 2, 8), rng.uniform(.9, 1.1, 8)), 300)
    assert (held > .9).all()
