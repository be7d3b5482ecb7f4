"""The two questions of PROTOCOL.md, answered from the stored results: effects on tasks, and what they say together"""
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, pandas as pd
from fastai_nadam.tools.results import Comparison, half_width, holm
from pooling import plain_mean

here = Path(__file__).parent
scratch = '''digits mnist autoencoder mnist1d text_gru text_transformer diamonds photo
    houses code_conv digits_vit'''.split()
tuned = 'emoji mnist digits diamonds prose_lm docstring'.split()
# What was compared: its folder, its tasks, is it primary? In the order of the runs
questions = {
    'only swap, 8 epochs, each its own lr_find': ('swap_middle', scratch, True),
    'fine-tune, default base_lr': ('finetune', tuned, True),
    'only swap, 8 epochs, lr_find with Adam': ('swap_middle_adam', scratch, False),
    'only swap, 32 epochs, each its own lr_find': ('swap_long', scratch, False),
    'fine-tune, best of 10 points': ('finetune_tuned', tuned, False),
    'only swap, 32 epochs, lr_find with Adam': ('swap_long_adam', scratch, False)}

load = cache(Comparison.load)

def comparisons(folder, tasks):
    "By task; one that has not been run is left out"
    return {t: load(here/folder/t) for t in tasks if (here/folder/t/'results.csv').exists()}

def effects(folder, tasks, opt='NAdam', base='Adam'):
    "Difference in test loss on the same `n` seeds, in per cent of it, by task; below 0 `opt` is better"
    return pd.DataFrame({t: c.effect(opt, base, log=True) for t,c in comparisons(folder, tasks).items()}).T

def verdict(r, margin=2):
    "The words that the protocol has for an answer"
    within = -margin < r.low90 and r.high90 < margin
    if r.high < 0 and r.p_holm < 0.05: return 'take it, but it is worth less than 2 %' if within else 'take it'
    if r.low > 0 and r.p_holm < 0.05: return 'leave it, but it costs less than 2 %' if within else 'leave it'
    return 'either' if within else 'not shown'

def answers(opt='NAdam', base='Adam'):
    """A row for each comparison: means over tasks in per cent of the loss, with 95 % and 90 % intervals

    Holm corrects primary and secondary comparisons apart. One that was planned and not made counts with p = 1.
    """
    rows = {}
    for k,(folder,tasks,primary) in questions.items():
        if len(e := effects(folder, tasks, opt, base)) < 2: continue
        p, p90 = plain_mean(e), plain_mean(e, 0.90)
        rows[k] = {**p, 'low90': p90.low, 'high90': p90.high, 'primary': primary, 'missing': len(tasks) - len(e)}
    df = pd.DataFrame(rows).T
    planned = pd.Series({k: primary for k,(*_,primary) in questions.items()})
    p = df.p.astype(float).reindex(planned.index).fillna(1)
    df['p_holm'] = p.groupby(planned).transform(holm)
    return df.assign(verdict=[verdict(r) for r in df.itertuples()])

# In words

def num(x, digits=1): return f'{x:+.{digits}f}'.replace('-', '−')
def interval(p, digits=1): return f'{num(p.low, digits)} to {num(p.high, digits)}'
def percent(p, digits=1):
    "A mean and its interval, which no line break parts"
    return f"{num(p['mean'], digits)} % ({interval(p, digits)})".replace(' ', '\N{NO-BREAK SPACE}')

def seconds(folder, tasks, opt='NAdam', base='Adam'):
    "Processor time of a run as a part of that of the baseline's run with the same seed: the median of each task"
    def ratio(d): return (d[opt]/d[base]).median()
    return pd.Series({t: ratio(c.runs.pivot(index='seed', columns='opt', values='seconds'))
        for t,c in comparisons(folder, tasks).items()})

outcomes = {
    'take it': 'NAdam ends lower', 'take it, but it is worth less than 2 %': 'NAdam ends lower, by less than 2 %',
    'leave it': 'NAdam ends higher', 'leave it, but it costs less than 2 %': 'NAdam ends higher, by less than 2 %',
    'either': 'any difference is below 2 %', 'not shown': 'no difference is shown'}

def outcome(r):
    "What a row of `answers` has shown, in words"
    corrected = r.verdict == 'not shown' and r.low*r.high > 0
    return 'no difference is shown once corrected for the number of questions' if corrected else outcomes[r.verdict]

def looks_ahead(r):
    "Does a row of `answers` recommend `NAdam`?"
    return r.verdict.startswith('take it')

def finetune_in_short():
    "The first screen of `tutorial.finetune`: the answer to question B"
    df = answers()
    first, name = df.loc['fine-tune, default base_lr'], 'fine-tune, best of 10 points'
    exact = plain_mean(effects('finetune', tuned, 'NAdam(nesterov=False)'))
    time = seconds('finetune', tuned)
    named = f' of the {len(tuned)} in the protocol' if first.missing else ''
    more = ''
    if name in df.index:
        r = df.loc[name]
        more = f" With the best of 10 settings for each, it is {percent(r)}: {outcome(r)}."
    plain = 'Adam, as `partial(NAdam, nesterov=False)`: nothing was shown to be better'
    take = '`NAdam`' if looks_ahead(first) else plain
    return f"""**Which optimizer for `fine_tune`?** {take}. With all its defaults, on {first.k:.0f} small
tasks{named}, the test loss with `NAdam` differs from that with fastai's `Adam` by {percent(first)}
on average (95 % interval over tasks), and is lower on {first.better:.0f} of them: {outcome(first)}.{more}
`NAdam(nesterov=False)`, which is `Adam` with exact bias correction, differs from it by {percent(exact)}
(exploratory).

A run takes {100*(1 - time.median()):.0f} % less processor time than with fastai's `Adam` (median of the tasks;
{100*(1-time.max()):.0f} to {100*(1-time.min()):.0f} %), and frozen weights
[stay where they are](#frozen-weights-that-stay)."""

def finetune_recipe():
    "What to type, by the answer to question B"
    ahead = looks_ahead(answers().loc['fine-tune, default base_lr'])
    opt_func = 'NAdam' if ahead else 'partial(NAdam, nesterov=False)'
    why = ("It looks ahead, and its loss is lower. `partial(NAdam, nesterov=False)` does not look ahead: it is Adam"
        if ahead else "This is Adam, without looking ahead, as nothing else was shown to be better. For `NAdam`, "
        "leave `nesterov=False` out")
    return f"""**What to type.** Set `opt_func`, and leave the rest as it is:

```python
from fastai.vision.all import *
from fastai_nadam.all import *

learn = vision_learner(dls, resnet34, opt_func={opt_func}, metrics=error_rate)
learn.fine_tune(3)
```

{why}."""

# In pictures

def draw_tasks(ax, e, xlim, searches=()):
    "Effects on tasks with their intervals, an arrow where one goes on, and their mean; `searches` beside them"
    ax.axvline(0, color='0.6', lw=1)
    for y,r in enumerate(e.itertuples()):
        half = half_width(r.se, r.n)
        low, high = r.diff - half, r.diff + half
        ax.plot(np.clip([low, high], *xlim), [y, y], color='k', lw=1.3)
        if low < xlim[0]: ax.plot(xlim[0], y, '<', color='k', ms=5, clip_on=False)
        if high > xlim[1]: ax.plot(xlim[1], y, '>', color='k', ms=5, clip_on=False)
        ax.plot(np.clip(r.diff, *xlim), y, 'o', color='k', ms=5)
    for o in searches: ax.plot(o['diff'].clip(*xlim), np.arange(len(o)) + .28, 'o', color='0.6', ms=3, clip_on=False)
    p, y = plain_mean(e), len(e) + .3
    half = [[p['mean'] - p.low], [p.high - p['mean']]]
    ax.errorbar(p['mean'], y, xerr=half, fmt='D', color='C0', ms=7, capsize=4)
    ax.set_yticks([*range(len(e)), y], [*e.index, 'all tasks'])
    ax.set(xlim=xlim, ylim=(y + .7, -.7))

def plot_users(kinds=('only swap', 'fine-tune')):
    "The effect on each task in the questions of some kinds; those of fine-tuning are smaller, and so is their scale"
    asked = [q for kind in kinds for q in questions if q.startswith(kind)]
    done = {q: e for q in asked if len(e := effects(*questions[q][:2])) > 1}
    n_rows = (len(done) + 1)//2
    fig, axs = plt.subplots(n_rows, 2, figsize=(9.5, 3.7*n_rows), layout='constrained', squeeze=False)
    for ax,(q,e) in zip(axs.flat, done.items()):
        ax.axvspan(-2, 2, color='0.93')
        draw_tasks(ax, e, (-6, 6) if q.startswith('fine-tune') else (-20, 20))
        ax.set_title(q, fontsize='medium')
    for ax in axs.flat[len(done):]: ax.set_visible(False)
    fig.supxlabel("NAdam's test loss − that of fastai's Adam (%); grey: less than 2 %", fontsize='medium')
