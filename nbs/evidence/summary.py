"""What the pages say of the evidence: effects pooled over tasks, in words, in tables and in pictures"""
from functools import cache

import matplotlib.pyplot as plt
from analysis import *
from pooling import coverage, paule_mandel, plain_mean, weighted_mean

labels = {nadam: 'NAdam', adam: 'exact Adam'}
styles = {nadam: dict(label='NAdam', color='k', ls='-', marker='o'),
    adam: dict(label='exact Adam', color='0.55', ls='--', marker='s')}
words = dict(short='short', middle='medium-length', long='long')
epochs = dict(short=2, middle=8, long=32)
folders = dict(short=['short', 'short-1', 'short-2', 'short-3'], middle=['middle', 'middle-1', 'middle-2', 'middle-3'],
    long=['long'])

# The searches: four of short and of medium-length runs, one of long ones

@cache
def ends(folder): return finals(load(folder))

def trial_points(folder):
    "The points that a search tried: mean losses over the seeds of its trials"
    f = ends(folder)
    return f[f.seed < 100].groupby(['task', 'opt', *point])[['tune', 'test']].mean()

@cache
def points(length): # of the four searches, a column with the distance of the momentum from 1
    return pd.concat(map(trial_points, folders[length])).reset_index(point).assign(x=lambda d: 1 - d.mom).sort_index()

@cache
def searched(length): return [effects(ends(o)) for o in folders[length]]

def mean_of_searches(length):
    "The effect on each task: the mean of its searches, or of the only one"
    es = searched(length)
    return repeated(es) if len(es) > 1 else es[0]

def best_of(length, n, reach=None):
    "NAdam's effect on each task (%), in expectation over all choices of `n` of the points that were tried"
    def loss(task, opt):
        d = points(length).loc[(task, opt)]
        if reach: d = d[d.x.between(*reach[opt])]
        return expected_best(d.tune, d.test, n)
    return pd.Series({task: 100*(loss(task, nadam) - loss(task, adam)) for task in names})

# exact Adam's 1 − momentum is searched twice as high as NAdam's, over as large a factor
own_ranges = {nadam: (0, .33/2), adam: (2*.0125, 1)}

def at_adams_point(length):
    """NAdam's effect (%) at the point that a search chose for exact Adam, the mean over searches. One seed of the trials
    chooses, the other one judges, and the other way round"""
    res = {}
    for folder in folders[length]:
        f = ends(folder)
        seeds = [d.set_index(['task', 'opt', *point])[['tune', 'test']].sort_index()
            for _,d in f[f.seed < 100].groupby('seed')]
        for task in names:
            for a,b in (seeds, seeds[::-1]):
                best = a.tune.loc[task, adam].idxmin()
                diff = b.test.loc[(task, nadam, *best)] - b.test.loc[(task, adam, *best)]
                res.setdefault(task, []).append(100*diff)
    return pd.DataFrame(res).mean()

def best_tenth(length):
    "How many times smaller 1 − momentum is in the best tenth of NAdam's points than of exact Adam's, on each task"
    def distance(task, opt):
        d = points(length).loc[(task, opt)]
        return np.log(d.nsmallest(len(d)//10, 'tune').x).mean()
    logs = pd.Series({task: distance(task, adam) - distance(task, nadam) for task in names})
    return np.exp(plain_mean(logs)[['mean', 'low', 'high']])

# The grid of learning rates and momenta

@cache
def cells(): return ends('landscape').groupby(['task', 'opt', 'mom', 'lr'])[['tune', 'test']].mean()

@cache
def at_momentum():
    "Test loss of each momentum at its best learning rate (by the tuning data), % above exact Adam at fastai's momentum"
    logs = 100*cells().loc[cells().groupby(['task', 'opt', 'mom']).tune.idxmin()].test.droplevel('lr').unstack('mom')
    return logs.sub(logs.xs(adam, level='opt')[.95], level='task', axis=0)

def tuning_gain(n, off=0):
    """What `n` trials lower exact Adam's loss by (%) on medium-length runs, compared with no tuning: fastai's momentum,
    weight decay 0.01 and the middle of the learning rates, or one `off` steps of √10 too large or too small"""
    grid = cells().test.xs((adam, .95), level=('opt', 'mom')).unstack('task') # of each task, from the lowest rate
    start = pd.Series({t: d.dropna().iloc[[2-off, 2+off]].mean() for t,d in grid.items()})
    tuned = {t: expected_best(d.tune, d.test, n) for t in names for d in [points('middle').loc[(t, adam)]]}
    return 100*(start - pd.Series(tuned)).reindex(names)

def doublings():
    "NAdam's effect on medium-length runs, in per cent and in doublings of exact Adam's training"
    def loss(k): return ends(k).query('seed >= 100 and opt == @adam').groupby('task').test.mean()
    d = pd.DataFrame({'effect (%)': mean_of_searches('middle')['diff'],
        'a doubling (%)': 50*(loss('long') - loss('middle'))}) # from 8 epochs to 32: two of them
    return d.reindex(names).assign(**{'effect in doublings': d.iloc[:,0]/d.iloc[:,1]})

# The rule that was set beforehand

estimators = {'DerSimonian–Laird, set beforehand': weighted_mean,
    'Paule–Mandel': lambda e: weighted_mean(e, paule_mandel), 'plain mean': plain_mean}

def favours(p): return p.high < 0 and p.better >= 6

@cache
def by_rule():
    "What the rule looks at, the first search of each length at 5 trials and at its end, by each estimator"
    at5 = {k: trial_effects(ends(k), 5) for k in words}
    return pd.DataFrame({(words[k], name): {'5 trials': f(at5[k]), 'whole search': f(searched(k)[0])}
        for k in words for name,f in estimators.items()}).T

def met(estimator='DerSimonian–Laird, set beforehand'):
    "Lengths of training at which the rule's conditions hold"
    return [k for k,r in by_rule().xs(estimator, level=1).iterrows() if favours(r['5 trials']) and favours(r['whole search'])]

# In words

def num(x, digits=1): return f'{x:+.{digits}f}'.replace('-', '−')
def percent(p, digits=1): return f"{num(p['mean'], digits)} % ({num(p.low, digits)} to {num(p.high, digits)})"
def lower(p): return f'{p.better:.0f} of {p.k:.0f}'
def plus_minus(r): return f'{num(r["diff"])} ± {half_width(r):.1f}'
def shown(p):
    "What an interval says"
    return 'lower' if p.high < 0 else 'higher' if p.low > 0 else 'nothing shown'
