"""The stored results of `tutorial.compare`, by `Comparison`: effects on tasks, over searches and over trials"""
from pathlib import Path

import numpy as np, pandas as pd
from fastai_nadam.tools import results
from fastai_nadam.tools.results import Comparison, expected_best, holm

here = Path(__file__).parent
names = 'digits mnist autoencoder mnist1d text_gru text_transformer diamonds photo'.split()
adam, nadam = 'NAdam(nesterov=False)', 'NAdam'
point = ['lr', 'mom', 'wd']

def load(
    folder:str, # `landscape`, `short`, `middle`, `long`, …
    tasks:list=names # Which tasks; one that has not been run is left out
) -> pd.DataFrame: # One row for each run
    "Results of a folder"
    folders = [here/folder/o for o in tasks if (here/folder/o).exists()]
    return pd.concat([Comparison.load(o).results for o in folders], ignore_index=True)

def comparisons(
    df:pd.DataFrame # From `load`
) -> dict: # Task → `Comparison`
    "The results of each task. A run that diverged has the worst outcome of its task, and seeds below 100 choose"
    def trials(d): return sorted(o for o in d.seed.unique() if o < 100)
    return {k: Comparison(d, 'valid_loss', margin=0, trial_seeds=trials(d)) for k,d in df.groupby('task', sort=False)}

def finals(
    df:pd.DataFrame # From `load`
) -> pd.DataFrame: # One row for each run; `tune` is the loss that chooses, `test` the logarithm of the one that judges
    "What each run is worth"
    runs = pd.concat([c.runs for c in comparisons(df).values()], ignore_index=True)
    return runs.assign(tune=runs.choose, test=np.log(runs.judge))

def winners(
    df:pd.DataFrame # From `load` or `finals`, of a search
) -> pd.DataFrame: # Index task and opt; lr, mom and wd
    "The point that the trials chose for each optimizer on each task: the best mean on the tuning data"
    best = {(task, opt): c.best(opt) for task,c in comparisons(df).items() for opt in c.opts}
    return pd.DataFrame.from_dict(best, orient='index', columns=point).set_axis(
        pd.MultiIndex.from_tuples(best, names=['task', 'opt']))

def effects(
    df:pd.DataFrame, # From `load` or `finals`, of a search
    opt:str=nadam, # Optimizer
    base:str=adam # Baseline
) -> pd.DataFrame: # Index task; `diff` and its standard error `se` in per cent of the loss, `n` seeds
    "Difference of the winners on new seeds, on the test data"
    found = {k: c.effect(opt, base, log=True) for k,c in comparisons(df).items() if {opt, base} <= {*c.opts}}
    return pd.DataFrame(found, index=['diff', 'se', 'n']).T.query('n > 0')

def trial_effects(
    df:pd.DataFrame, # From `load` or `finals`, of a search
    n:int, # Number of trials
    opt:str=nadam, # Optimizer
    base:str=adam # Baseline
) -> pd.DataFrame: # Index task; `diff` and `se` in per cent of the loss
    "Difference of the expected best of `n` trials; its standard error by a bootstrap of the points, the same for both"
    rng = np.random.default_rng(0)
    found = {k: c.trials_effect(n, opt, base, log=True, rng=rng) for k,c in comparisons(df).items()
        if {opt, base} <= {*c.opts}}
    return pd.DataFrame(found, index=['diff', 'se']).T

def half_width(
    e:pd.DataFrame # From `effects`, or a row of it
): # In per cent
    "Half of the 95 % interval of an effect, by Student's t"
    return results.half_width(e.se, e.n)

def repeated(
    searches:list # Tables from `effects`, one for each search
) -> pd.DataFrame: # Index task; `diff` and its `se` in per cent of the loss, `n` searches
    "Effects as means over searches that differ in their points only"
    d = pd.concat([e['diff'] for e in searches], axis=1)
    return pd.DataFrame(dict(diff=d.mean(axis=1), se=d.sem(axis=1), n=d.count(axis=1)))
