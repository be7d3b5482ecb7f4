"""Effects on tasks, pooled: the plain mean over tasks, and means weighted by precision as a check

The task is the unit, so what counts is how the tasks differ. The plain mean weighs them equally. A weighted mean needs
to know how much they differ (`tau`), which eight tasks say badly, and where large effects have large errors it leans to
the tasks with small effects."""
from functools import partial

import numpy as np, pandas as pd
from scipy.optimize import brentq
from scipy.stats import binomtest, t as student_t

def t_test(mean, se, k, level, **more):
    "A mean of `k` tasks with its interval, what else is known of it, and its p-value by Student's t"
    half = student_t.ppf((1 + level)/2, k-1)*se
    return dict(mean=mean, low=mean-half, high=mean+half, **more, p=2*student_t.sf(abs(mean/se), k-1))

def with_counts(found, y):
    "The same with a sign test of the effects"
    n = int((y < 0).sum())
    return pd.Series(dict(**found, better=n, k=len(y), sign_p=binomtest(n, len(y)).pvalue))

def plain_interval(y, v, level): return t_test(y.mean(), y.std(ddof=1)/len(y)**.5, len(y), level)

def plain_mean(
    effects:pd.Series|pd.DataFrame, # An effect for each task, or a table with them in `diff`; negative is better
    level:float=0.95 # Of the interval
) -> pd.Series: # `mean`, `low`, `high`, `p`, `better` of `k` tasks, `sign_p`
    "Mean over tasks with the interval of Student's t; a sign test"
    y = np.asarray(effects['diff'] if isinstance(effects, pd.DataFrame) else effects, float)
    return with_counts(plain_interval(y, None, level), y)

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

def weighted_interval(y, v, level, spread):
    tau2, k = spread(y, v), len(y)
    w = 1/(v + tau2)
    mean = (w@y)/w.sum()
    se = np.sqrt((w*(y - mean)**2).sum()/(k-1)/w.sum())
    return t_test(mean, se, k, level, tau=tau2**.5)

def weighted_mean(
    effects:pd.DataFrame, # `diff` and `se` of each task
    spread=dersimonian_laird, # Gives the variance between tasks
    level:float=0.95 # Of the interval
) -> pd.Series: # As `plain_mean`, and `tau`, the deviation between tasks
    "Mean weighted by precision (random effects) with the interval of Hartung and Knapp"
    y, se = effects[['diff', 'se']].to_numpy(float).T
    return with_counts(weighted_interval(y, se**2, level, spread), y)

estimators = {'plain mean': plain_mean, 'DerSimonian–Laird': weighted_mean,
    'Paule–Mandel': partial(weighted_mean, spread=paule_mandel)}
intervals = dict(zip(estimators, (plain_interval, partial(weighted_interval, spread=dersimonian_laird),
    partial(weighted_interval, spread=paule_mandel))))

def coverage(
    effects:pd.DataFrame, # `diff` and `se` of each task
    n:int=1000 # Simulations
) -> pd.Series: # Of the intervals of each estimator, the share that holds the true mean
    "Simulated effects that grow with the errors of these tasks, in as many tasks and as spread out"
    se, rng = effects.se.to_numpy(float), np.random.default_rng(0)
    mean, tau = effects['diff'].mean(), paule_mandel(effects['diff'].to_numpy(float), se**2)**.5
    by_error, held = np.argsort(np.argsort(-se)), {}
    for _ in range(n):
        true = np.sort(rng.normal(mean, tau, len(se)))[by_error] # the largest gain where the error is largest
        y = rng.normal(true, se)
        for name,f in intervals.items():
            found = f(y, se**2, .95)
            held.setdefault(name, []).append(found['low'] <= mean <= found['high'])
    return pd.DataFrame(held).mean()
