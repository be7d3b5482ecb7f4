"""The stored results of `tutorial.compare`, by `Comparison`: effects on tasks, over searches and over trials

Results are a table with one row for each run. Effects are in per cent of the loss, with their standard error `se`."""
from pathlib import Path

import numpy as np, pandas as pd
from fastai_nadam.tools import results
from fastai_nadam.tools.results import Comparison, expected_best, holm, point_cols as point

here = Path(__file__).parent
names = 'digits mnist autoencoder mnist1d text_gru text_transformer diamonds photo'.split()
adam, nadam = 'NAdam(nesterov=False)', 'NAdam'

def load(folder, tasks=names):
    "Results of a folder such as `landscape`, `short` or `middle`; a task that has not been run is left out"
    folders = [here/folder/o for o in tasks if (here/folder/o).exists()]
    return pd.concat([Comparison.load(o).results for o in folders], ignore_index=True)

def comparisons(df):
    "Task → `Comparison`. A run that diverged has the worst outcome of its task, and seeds below 100 choose"
    def trials(d): return sorted(o for o in d.seed.unique() if o < 100)
    return {k: Comparison(d, 'valid_loss', margin=0, trial_seeds=trials(d)) for k,d in df.groupby('task', sort=False)}

def finals(df):
    "What each run is worth: `tune` is the loss that chooses, `test` the logarithm of the one that judges"
    runs = pd.concat([c.runs for c in comparisons(df).values()], ignore_index=True)
    return runs.assign(tune=runs.choose, test=np.log(runs.judge))

def winners(df):
    "The point that the trials of a search chose, by task and optimizer: the best mean on the tuning data"
    best = {(task, opt): c.best(opt) for task,c in comparisons(df).items() for opt in c.opts}
    index = pd.MultiIndex.from_tuples(best, names=['task', 'opt'])
    return pd.DataFrame(best.values(), columns=point, index=index)

def with_both(df, opt, base): return {k: c for k,c in comparisons(df).items() if {opt, base} <= {*c.opts}}

def effects(df, opt=nadam, base=adam):
    "Difference of the winners of a search on `n` new seeds, on the test data, by task"
    found = {k: c.effect(opt, base, log=True) for k,c in with_both(df, opt, base).items()}
    return pd.DataFrame(found, index=['diff', 'se', 'n']).T.query('n > 0')

def trial_effects(df, n, opt=nadam, base=adam):
    "Difference of the expected best of `n` trials; its standard error by a bootstrap of the points, the same for both"
    rng = np.random.default_rng(0)
    found = {k: c.trials_effect(n, opt, base, log=True, rng=rng) for k,c in with_both(df, opt, base).items()}
    return pd.DataFrame(found, index=['diff', 'se']).T

def half_width(e):
    "Half of the 95 % interval of effects, by Student's t"
    return results.half_width(e.se, e.n)

def repeated(searches):
    "Effects as means over the tables of `n` searches that differ in their points only"
    d = pd.concat([e['diff'] for e in searches], axis=1)
    return pd.DataFrame(dict(diff=d.mean(axis=1), se=d.sem(axis=1), n=d.count(axis=1)))
