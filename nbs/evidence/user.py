"""The two questions of PROTOCOL.md, answered from the stored results: effects on tasks, and what they say together"""
import matplotlib.pyplot as plt, numpy as np, pandas as pd
from pathlib import Path
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

def comparisons(folder, tasks):
    "By task; one that has not been run is left out"
    return {t: Comparison.load(here/folder/t) for t in tasks if (here/folder/t/'results.csv').exists()}

def effects(
    folder:str, # Such as `swap_middle`
    tasks:list, # Which tasks; one that has not been run is left out
    opt:str='NAdam', # Optimizer
    base:str='Adam' # Baseline
) -> pd.DataFrame: # Index task; `diff`, `half` of its 95 % interval over seeds, `se`, `n` seeds
    "Difference in test loss on the same seeds, in per cent of it; below 0 `opt` is better"
    rows = {}
    for t,c in comparisons(folder, tasks).items():
        e = c.effect(opt, base, log=True)
        rows[t] = dict(e, half=half_width(e.se, e.n))
    return pd.DataFrame(rows).T

def verdict(r, margin=2):
    "The words that the protocol has for an answer"
    within = -margin < r.low90 and r.high90 < margin
    if r.high < 0 and r.p_holm < 0.05: return 'take it, but it is worth less than 2 %' if within else 'take it'
    if r.low > 0 and r.p_holm < 0.05: return 'leave it, but it costs less than 2 %' if within else 'leave it'
    return 'either' if within else 'not shown'

def answers(opt='NAdam', base='Adam') -> pd.DataFrame: # A row for each comparison
    """Means over tasks in per cent of the loss, with 95 % and 90 % intervals

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

def plot_answer(
    groups:dict, # Tables from `effects` by title
    opt:str='NAdam', # What is compared, in words
    base:str="fastai's Adam" # With what
):
    "Effect on each task, and their mean; returns the figure"
    height = 0.3*max(map(len, groups.values())) + 1.8
    fig, axs = plt.subplots(1, len(groups), sharex=True, squeeze=False, figsize=(9, height), layout='constrained')
    for ax,(title,e) in zip(axs[0], groups.items()):
        e, p = e.sort_values('diff', ascending=False), plain_mean(e)
        ys = np.arange(len(e)) + 1.5
        ax.axvspan(-2, 2, color='0.92', label='less than 2 %')
        ax.axvline(0, color='k', lw=0.8)
        ax.errorbar(e['diff'], ys, xerr=e.half, fmt='o', color='0.4', capsize=2, label='a task (95 % over seeds)')
        ax.errorbar(p['mean'], 0, xerr=[[p['mean']-p.low], [p.high-p['mean']]], fmt='D', color='k', ms=7, lw=2,
            capsize=4, label='mean over tasks (95 %)')
        ax.set_yticks([0, *ys], ['mean', *e.index])
        ax.set(title=title, ylim=(-.8, len(e) + 1.2))
        ax.spines[['top', 'right']].set_visible(False)
    fig.supxlabel(f"← {opt} is better        difference in test loss (%)        {base} is better →", fontsize='medium')
    fig.legend(*axs[0,0].get_legend_handles_labels(), loc='outside upper center', ncols=3, frameon=False)
    return fig

# In words and in pictures

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
    'either': 'there is no difference that matters', 'not shown': 'no difference is shown'}

def outcome(r):
    "What a row of `answers` has shown, in words"
    corrected = r.verdict == 'not shown' and r.low*r.high > 0
    return "no difference is left after Holm's correction" if corrected else outcomes[r.verdict]

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
    return f"""**Which optimizer for `fine_tune`?** With all its defaults, on {first.k:.0f} small tasks{named}, the test
loss with `NAdam` differs from that with fastai's `Adam` by {percent(first)} on average (95 % interval over
tasks), and is lower on {first.better:.0f} of them. In the words of the protocol this is "{first.verdict}":
{outcome(first)}.{more}
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

def plot_finetune():
    "NAdam − Adam in fine-tuning, task by task"
    titles = {'finetune': 'base_lr 2e-3, the default', 'finetune_tuned': 'best of 10 settings'}
    groups = {title: e for f,title in titles.items() if len(e := effects(f, tuned)) > 1}
    plot_answer(groups)
