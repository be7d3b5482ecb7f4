"""The results of `tutorial.compare`, loaded and pooled, its first screen and the picture of the effects"""
import matplotlib.pyplot as plt
from analysis import *

labels = {nadam: 'NAdam', adam: 'exact Adam'}
dfs = {k: load(k) for k in ('short', 'middle', 'long')}
ends = {k: finals(df) for k,df in dfs.items()}
points = {k: f[f.seed < 100].groupby(['task', 'opt', *point])[['tune', 'test']].mean() for k,f in ends.items()}
trials = {k: int(m.groupby(['task', 'opt']).size().max()) for k,m in points.items()}
measured = {k: effects(f) for k,f in ends.items()}
at5 = {k: pool(trial_effects(f, 5)) for k,f in ends.items()}
end, equal = ({k: pool(e, level) for k,e in measured.items()} for level in (.95, .90))

searches = {k: [measured[k], *(effects(finals(load(f'{k}-{i}'))) for i in (1, 2, 3))] for k in ('short', 'middle')}
again = {k: repeated(es) for k,es in searches.items()}
means = {k: pool(e) for k,e in again.items()} # over four searches

def favours(p): return p.high < 0 and p.better >= 6
met = [k for k in ends if favours(at5[k]) and favours(end[k])] # horizons at which the decision rule holds

def adam_loss(k): return ends[k].query('seed >= 100 and opt == @adam').groupby('task').test.mean()
def doublings():
    "NAdam's effect at the middle horizon, in per cent and in doublings of exact Adam's training"
    doubling = 50*(adam_loss('long') - adam_loss('middle')) # from 8 epochs to 32: two of them
    d = pd.DataFrame({'effect (%)': measured['middle']['diff'], 'a doubling (%)': doubling})
    return d.reindex(names).assign(**{'effect in doublings': d.iloc[:,0]/d.iloc[:,1]})

def trials_gain(n):
    "What `n` trials in place of one lower exact Adam's loss by, in per cent, geometric mean over tasks (middle)"
    logs = [expected_best(d.tune, d.test, n) - expected_best(d.tune, d.test, 1)
        for _,d in points['middle'].xs(adam, level='opt').groupby('task')]
    return 100*(1 - np.exp(np.mean(logs)))

new_names = ['houses', 'code_conv', 'digits_vit']
held = finals(pd.concat(load(k, new_names).assign(opt=lambda d: d.opt.map(labels) + f' ({moms})') for k,moms in
    dict(held_out='0.95, 0.85, 0.95', held_out_nadam='0.9, 0.7, 0.9', held_out_adam='0.8, 0.4, 0.8').items()))
default, default_nadam, low_nadam, low_adam = (f'{o} ({moms})' for o,moms in (('exact Adam', '0.95, 0.85, 0.95'),
    ('NAdam', '0.95, 0.85, 0.95'), ('NAdam', '0.9, 0.7, 0.9'), ('exact Adam', '0.8, 0.4, 0.8')))
same_lr = winners(held).lr.unstack('opt')[[default, default_nadam]].nunique(axis=1).eq(1).sum()

def num(x, digits=1): return f'{x:+.{digits}f}'.replace('-', '−')
def percent(p): return f"{num(p['mean'], 2)} % ({num(p.low, 2)} to {num(p.high, 2)})"
def lower(p): return f'{p.better:.0f} of {p.k:.0f}'
def plus_minus(r): return f'{num(r["diff"])} ± {half_width(r):.1f}'

def in_short():
    "The first screen"
    def row(k):
        cells = f'{k}, {ends[k].epoch.max()} epochs', percent(at5[k]), percent(end[k]), lower(end[k])
        return f'| {" | ".join(cells)} | {"yes" if k in met else "no"} |'
    pooled = '\n'.join(map(row, ends))
    others = ' and '.join(f'{percent(p)} in {k} runs' for k,p in means.items())
    within = ', '.join(k for k in ends if -1 < equal[k].low and equal[k].high < 1)
    shown = f'shown for {within}' if within else 'not shown'
    ranges = ', '.join(f'{k} {num(equal[k].low)} to {num(equal[k].high)}' for k in ends)
    new = ', '.join(f'`{t}` {plus_minus(r)} %' for t,r in effects(held, default_nadam, default).iterrows())
    worth, gain5, gain32 = doublings().iloc[:,2].median(), trials_gain(5), trials_gain(32)
    return f"""
**What Nesterov is worth.** Eight small tasks; learning rate, momentum and weight decay tuned for both; test data that
chose nothing. This is NAdam's test loss compared with that of *exact Adam*, the same code without
[looking ahead](tutorial.nesterov.ipynb). Pooled over tasks, with 95 % intervals; negative is better:

| training | tuned by 5 trials | by the whole search | lower on | rule met |
|---|---|---|---|---|
{pooled}

**Is it worth choosing?** The rule, set before the runs, asks for intervals that leave out 0 and for 6 of 8 tasks, at
two of the three lengths. It is met at {len(met)}. So by the rule NAdam **is{"" if len(met) > 1 else " not"}** worth
choosing over an Adam that is tuned as well. Its loss is lower on most tasks, but the tasks differ so much in how much
lower that their mean is not known well.

**Was it the choice of points?** In part. Three more searches with other points, made when the rule had been applied,
[gave less](#with-other-points): the mean of all four is {others}.

**The recipe.**

- Tune the learning rate first and the momentum second. Which of the two optimizers comes after that.
- If you do not tune the momentum, leave it as it is in fastai. NAdam is then a good choice, with the learning rate and
  the weight decay that you have for Adam. On three tasks that took no part in finding anything, its test loss differs
  from exact Adam's by {new}, each at its best of 8 learning rates, which was the same one on {same_lr} of
  {len(new_names)}.
- A lower momentum, `moms=(0.9, 0.7, 0.9)` for NAdam or `(0.8, 0.4, 0.8)` for Adam, is often better and sometimes much
  worse, so no rule came out of it. In long runs take a lower learning rate, not a lower momentum
  ([below](#the-recipe-which-momentum)).

| an expert asks | |
|---|---|
| tuned how? | {trials["middle"]} points, the same for both, × 2 seeds (long: {trials["long"]} × 1), by tuning data |
| judged on what? | test data, 30 new seeds (long: 10), the same for both |
| how many comparisons? | one, which must meet all conditions at once; any other is corrected by Holm's method |
| equal, then? | within ±1 % of the loss: {shown} (90 % intervals in %: {ranges}) |
| how much is that? | in the median over tasks as much as {worth:.2f} doublings of the training (middle) |
| what is worth more? | tuning: 5 trials in place of 1 lower exact Adam's loss by {gain5:.0f} %, 32 by {gain32:.0f} % |
"""

def plot_effects(
    tables:dict, # Length of training → table from `effects` or `repeated`; a panel for each
    searches:dict={} # Length of training → tables of single searches, drawn beside
):
    "NAdam's effect on each task and over all, with 95 % intervals"
    size = (2 + 2.5*len(tables), 3.4)
    fig, axs = plt.subplots(1, len(tables), figsize=size, layout='constrained', sharex=True, sharey=True)
    for ax,(k,e) in zip(axs, tables.items()):
        p, y = pool(e), len(names) + 0.3
        ax.axvline(0, color='0.6', lw=1)
        for o in searches.get(k, []): ax.plot(o['diff'], o.index.map(names.index) + .25, 'o', color='0.6', ms=3)
        ax.errorbar(e['diff'], e.index.map(names.index), xerr=half_width(e), fmt='o', color='k', ms=4, capsize=2)
        half = [[p['mean'] - p.low], [p.high - p['mean']]]
        ax.errorbar(p['mean'], y, xerr=half, fmt='D', color='C0', ms=7, capsize=4)
        ax.set_yticks([*range(len(names)), y], [*names, 'all tasks'])
        ax.set_title(f'{k} runs: lower on {lower(p)} tasks', fontsize='medium')
    axs[0].invert_yaxis()
    fig.supxlabel("NAdam's test loss − exact Adam's (%)", fontsize='medium')
