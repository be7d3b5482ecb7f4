"""Effects on tasks, pooled: the plain mean over tasks, and means weighted by precision as a check

The task is the unit, so what counts is how the tasks differ. The plain mean weighs them equally. A weighted mean needs
to know how much they differ (`tau`), which eight tasks say badly, and where large effects have large errors it leans to
the tasks with small effects."""
from functools import partial

import numpy as np, pandas as pd
from scipy.optimize import brentq
from scipy.stats import t as student_t

def t_test(y, mean, se, level, **more):
    "A mean of the effects `y` of `k` tasks, its interval and p by Student's t, and how many are below 0 (`better`)"
    k = len(y)
    half = student_t.ppf((1 + level)/2, k-1)*se
    p = 2*student_t.sf(abs(mean/se), k-1)
    return pd.Series(dict(mean=mean, low=mean-half, high=mean+half, p=p, better=(y < 0).sum(), k=k, **more))

def plain_mean(effects, level=0.95):
    "Mean over tasks of effects (or of `diff` in a table of them) with the interval of Student's t"
    y = np.asarray(effects['diff'] if isinstance(effects, pd.DataFrame) else effects, float)
    return t_test(y, y.mean(), y.std(ddof=1)/len(y)**.5, level)

def excess(y, v, tau2):
    "How far the effects differ beyond their variances `v` and `tau2`; 0 is as expected"
    w = 1/(v + tau2)
    return (w*(y - (w@y)/w.sum())**2).sum() - (len(y) - 1)

def dersimonian_laird(y, v):
    "Variance between tasks by moments: one step from weights that know of none"
    w = 1/v
    return max(0., excess(y, v, 0)/(w.sum() - (w**2).sum()/w.sum()))

def paule_mandel(y, v):
    "Variance between tasks at which the effects differ as much as expected"
    if excess(y, v, 0) <= 0: return 0.
    return brentq(lambda tau2: excess(y, v, tau2), 0, 2*y.var(ddof=1)) # at the end they differ less than expected

def weighted_mean(effects, spread=dersimonian_laird, level=0.95):
    "Mean weighted by precision (random effects), Hartung and Knapp's interval; `spread`: the variance between tasks"
    y, se = effects[['diff', 'se']].to_numpy(float).T
    tau2 = spread(y, se**2)
    w = 1/(se**2 + tau2)
    mean = (w@y)/w.sum()
    se_mean = np.sqrt((w*(y - mean)**2).sum()/(len(y) - 1)/w.sum())
    return t_test(y, mean, se_mean, level, tau=tau2**.5)

estimators = {'plain mean': plain_mean, 'DerSimonian–Laird': weighted_mean,
    'Paule–Mandel': partial(weighted_mean, spread=paule_mandel)}

def coverage(effects, n=500):
    """The share of each estimator's intervals that holds the true mean, in `n` simulations: effects that grow with the
    errors of these tasks, in as many tasks and as spread out"""
    se, rng = effects.se.to_numpy(float), np.random.default_rng(0)
    mean, tau = effects['diff'].mean(), paule_mandel(effects['diff'].to_numpy(float), se**2)**.5
    by_error, held = np.argsort(np.argsort(-se)), {k: 0 for k in estimators}
    for _ in range(n):
        true = np.sort(rng.normal(mean, tau, len(se)))[by_error] # the largest gain where the error is largest
        drawn = pd.DataFrame(dict(diff=rng.normal(true, se), se=se))
        for name,estimate in estimators.items():
            found = estimate(drawn)
            held[name] += found.low <= mean <= found.high
    return pd.Series(held)/n
