"""What the stored results of `tutorial.compare` say: effects on tasks, over searches and over trials"""
from math import comb
from pathlib import Path

import numpy as np, pandas as pd
from scipy.stats import t as student_t
from fastai_nadam.tools.results import holm

here = Path(__file__).parent
names = 'digits mnist autoencoder mnist1d text_gru text_transformer diamonds photo'.split()
adam, nadam = 'NAdam(nesterov=False)', 'NAdam'
point = ['lr', 'mom', 'wd']

def load(
    folder:str, # `landscape`, `short`, `middle`, `long`, …
    tasks:list=names # Which tasks; one that has not been run is left out
) -> pd.DataFrame: # One row per run and epoch
    "Results of a folder"
    return pd.concat([pd.read_csv(f) for o in tasks if (f := here/folder/o/'results.csv').exists()], ignore_index=True)

def finals(
    df:pd.DataFrame # From `load`
) -> pd.DataFrame: # One row per run; `tune` is the loss that chooses, `test` the logarithm of the one that judges
    "The end of each run. One that diverged has the worst outcome of its task"
    df = df[df.epoch == df.groupby('task').epoch.transform('max')].copy()
    for k,val in dict(tune=df.valid_loss, test=np.log(df.test_loss)).items():
        val = val.where(~df.diverged)
        df[k] = val.fillna(val.groupby(df.task).transform('max'))
    return df

def winners(
    f:pd.DataFrame # From `finals`, of a search
) -> pd.DataFrame: # Index task and opt; lr, mom, wd and the mean losses of the trials
    "The point that the trials chose for each optimizer on each task: the best mean on the tuning data"
    m = f[f.seed < 100].groupby(['task', 'opt', *point], sort=False, dropna=False)[['tune', 'test']].mean()
    m = m.reset_index()
    return m.loc[m.groupby(['task', 'opt'], sort=False).tune.idxmin()].set_index(['task', 'opt'])

def paired(
    a:pd.Series, # Logarithms of the loss, by seed
    b:pd.Series # The same of the baseline
) -> tuple: # (mean difference, its standard error, number of pairs), the first two in per cent of the loss
    "Difference on the same seeds"
    d = 100*(a - b).dropna()
    return d.mean(), d.std()/np.sqrt(len(d)), len(d)

def effects(
    f:pd.DataFrame, # From `finals`, of a search
    opt:str=nadam, # Optimizer
    base:str=adam # Baseline
) -> pd.DataFrame: # Index task; `diff`, `se`, `n`
    "Difference of the winners on new seeds, on the test data"
    new = f[f.seed >= 100].set_index(['task', 'opt', 'seed']).test.sort_index()
    tasks = [o for o in dict.fromkeys(f.task) if {(o, opt), (o, base)} <= {k[:2] for k in new.index}]
    return pd.DataFrame({o: paired(new[o, opt], new[o, base]) for o in tasks}, index=['diff', 'se', 'n']).T

def half_width(
    e:pd.DataFrame # From `effects`, or a row of it
): # In per cent
    "Half of the 95 % interval of an effect, by Student's t"
    return e.se*student_t.ppf(0.975, e.n-1)

def repeated(
    searches:list # Tables from `effects`, one for each search
) -> pd.DataFrame: # Index task; `diff` and its `se` in per cent of the loss, `n` searches
    "Effects as means over searches that differ in their points only"
    d = pd.concat([e['diff'] for e in searches], axis=1)
    return pd.DataFrame(dict(diff=d.mean(axis=1), se=d.sem(axis=1), n=d.count(axis=1)))

def trial_weights(
    n_points:int, # Number of points that were tried
    n:int # Number of trials
) -> np.ndarray: # One weight per point, the best first
    "Chance of each point to be the best of `n` of them, drawn without replacement"
    return np.array([comb(n_points-1-i, n-1) for i in range(n_points)])/comb(n_points, n)

def expected_best(
    tune, # Points: what chooses, lower is better
    test, # Points: what is judged
    n:int # Number of trials
) -> float:
    "Mean of what is judged at the best of `n` trials, over all choices of them"
    return trial_weights(len(tune), n) @ np.asarray(test)[np.argsort(tune, kind='stable')]

def trial_effects(
    f:pd.DataFrame, # From `finals`, of a search
    n:int, # Number of trials
    opt:str=nadam, # Optimizer
    base:str=adam, # Baseline
    n_boot:int=400 # Bootstrap samples of the points
) -> pd.DataFrame: # Index task; `diff` and `se` in per cent of the loss
    "Difference of the expected best of `n` trials; its standard error by a bootstrap of the points, the same for both"
    m = f[f.seed < 100].groupby(['task', 'opt', *point], dropna=False)[['tune', 'test']].mean()
    rng, res = np.random.default_rng(0), {}
    for task in dict.fromkeys(f.task):
        if not {(task, opt), (task, base)} <= {k[:2] for k in m.index}: continue
        a, b = m.loc[task, opt], m.loc[task, base]
        a, b = (o.loc[a.index.intersection(b.index)].to_numpy().T for o in (a, b))
        def diff(i): return 100*(expected_best(*a[:,i], n) - expected_best(*b[:,i], n))
        every = np.arange(a.shape[1])
        res[task] = diff(every), np.std([diff(rng.choice(every, len(every))) for _ in range(n_boot)], ddof=1)
    return pd.DataFrame(res, index=['diff', 'se']).T
