"""The two questions of PROTOCOL.md, answered from the stored results: effects on tasks, and what they say together"""
import matplotlib.pyplot as plt, numpy as np, pandas as pd
from pathlib import Path
from fastai_nadam.tools.results import Comparison, half_width, holm
from pooling import plain_mean

here = Path(__file__).parent
scratch = 'digits mnist autoencoder mnist1d text_gru text_transformer diamonds photo houses code_conv digits_vit'.split()
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
) -> pd.DataFrame: # Index task; `diff`, `half` of its 95 % interval over seeds, `se`, `n` seeds, in per cent of the loss
    "Difference in test loss on the same seeds; below 0 `opt` is better"
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
    "Means over tasks in per cent of the loss, with 95 % and 90 % intervals; p is corrected by Holm, primary and others apart"
    rows = {}
    for k,(folder,tasks,primary) in questions.items():
        if len(e := effects(folder, tasks, opt, base)) < 2: continue
        p, p90 = plain_mean(e), plain_mean(e, 0.90)
        rows[k] = {**p, 'low90': p90.low, 'high90': p90.high, 'primary': primary, 'missing': len(tasks) - len(e)}
    df = pd.DataFrame(rows).T
    df['p_holm'] = df.groupby('primary').p.transform(lambda p: holm(p.astype(float)))
    return df.assign(verdict=[verdict(r) for r in df.itertuples()])

def plot_answer(
    groups:dict, # Tables from `effects` by title; a row of points for each task, below them the mean
    axs=None
):
    "Effect on each task, and their mean"
    axs = np.atleast_1d(axs if axs is not None else plt.subplots(1, len(groups), sharex=True, squeeze=False,
        figsize=(5*len(groups), 0.32*max(map(len, groups.values())) + 1.5), layout='constrained')[1][0])
    for ax,(title,e) in zip(axs, groups.items()):
        e, p = e.sort_values('diff', ascending=False), plain_mean(e)
        ys = np.arange(len(e)) + 1.5
        ax.axvspan(-2, 2, color='0.92', label='less than 2 %')
        ax.axvline(0, color='k', lw=0.8)
        ax.errorbar(e['diff'], ys, xerr=e.half, fmt='o', color='0.4', capsize=2, label='a task (95 % over seeds)')
        ax.errorbar(p['mean'], 0, xerr=[[p['mean']-p.low], [p.high-p['mean']]], fmt='D', color='k', ms=8, lw=2, capsize=4,
            label='mean over tasks (95 %)')
        ax.set(yticks=[0, *ys], yticklabels=['mean', *e.index], title=title, xlabel='difference in test loss (%)')
    return axs

def num(x, digits=1): return f'{x:+.{digits}f}'.replace('-', '−')
def said(r): return f"{num(r['mean'])} % ({num(r.low)} to {num(r.high)})"

def finetune_in_short():
    "The first screen of `tutorial.finetune`"
    return ''

def plot_finetune():
    "NAdam − Adam in fine-tuning, task by task"
    folders = {k: effects(f, t) for k,(f,t,_) in questions.items() if k.startswith('fine-tune')}
    if not (folders := {k: e for k,e in folders.items() if len(e) > 1}): return
    axs = plot_answer(folders)
    axs[0].figure.legend(*axs[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False)
