"""What the pages say of the evidence: effects pooled over tasks, in words, in tables and in pictures"""
from functools import cache

import matplotlib.pyplot as plt, user
from analysis import *
from pooling import coverage, estimators, plain_mean
from user import draw_tasks, interval, looks_ahead, num, outcome, percent, plot_users

labels = {nadam: 'NAdam', adam: 'exact Adam'}
words = dict(short='short', middle='medium-length', long='long')
epochs = dict(short=2, middle=8, long=32)
folders = dict(short=['short', 'short-1', 'short-2', 'short-3'], middle=['middle', 'middle-1', 'middle-2', 'middle-3'],
    long=['long'])

# The searches: four of short and of medium-length runs, one of long ones

@cache
def ends(folder): return finals(load(folder))

@cache
def points(length):
    "The points of all searches: mean losses over the seeds of their trials, and the momentum's distance `x` from 1"
    trials = pd.concat([ends(o).query('seed < 100') for o in folders[length]])
    means = trials.groupby(['task', 'opt', *point])[['tune', 'test']].mean()
    return means.reset_index(point).assign(x=lambda d: 1 - d.mom)

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
    """NAdam's effect (%) at the point that a search chose for exact Adam, the mean over searches. One seed of the
    trials chooses, the other one judges, and the other way round"""
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

beforehand = 'DerSimonian–Laird' # the estimator that the protocol names

def favours(p): return p.high < 0 and p.better >= 6

@cache
def by_rule():
    "What the rule looks at, the first search of each length at 5 trials and at its end, by each estimator"
    at5 = {k: trial_effects(ends(k), 5) for k in words}
    return pd.DataFrame({(words[k], name): {'5 trials': f(at5[k]), 'whole search': f(searched(k)[0])}
        for k in words for name,f in estimators.items()}).T

def met(estimator=beforehand):
    "Lengths of training at which the rule's conditions hold"
    rows = by_rule().xs(estimator, level=1)
    return [k for k,r in rows.iterrows() if favours(r['5 trials']) and favours(r['whole search'])]

# In words

def figures(p): return percent(p, 2).replace('\N{NO-BREAK SPACE}%', '') # for a table whose header has the unit
def share(x): return f'{100*x:.0f} %'
def lower(p): return f'{p.better:.0f} of {p.k:.0f}'
def plus_minus(r): return f'{num(r["diff"])} ± {half_width(r):.1f}'

swap, fine_tune = 'Only swap opt_func', 'Fine-tune'
asked_by_users = {'only swap, 8 epochs, each its own lr_find': (swap, 'medium-length runs'),
    'only swap, 32 epochs, each its own lr_find': (swap, 'long runs'),
    'only swap, 8 epochs, lr_find with Adam': (f"{swap}, Adam's rate", 'medium-length runs'),
    'only swap, 32 epochs, lr_find with Adam': (f"{swap}, Adam's rate", 'long runs'),
    'fine-tune, default base_lr': (fine_tune, 'the defaults'),
    'fine-tune, best of 10 points': (fine_tune, 'the best of 10 settings')}

@cache
def users_answers():
    "What PROTOCOL.md asks: NAdam's test loss compared with that of fastai's Adam, with the verdict; what has been run"
    rows = user.answers()
    return pd.DataFrame({name: rows.loc[q] for q,name in asked_by_users.items() if q in rows.index}).T

@cache
def answers():
    "NAdam's test loss compared with Adam's: a row for each question and length of training, pooled over tasks"
    asked = {(f'Best of {n} settings', f'{words[k]} runs'): best_of(k, n) for n in (5, 32) for k in ('short', 'middle')}
    asked |= {('Best of 32, trained again', f'{words[k]} runs'): mean_of_searches(k) for k in ('short', 'middle')}
    asked['Best of 16, trained again', 'long runs'] = mean_of_searches('long')
    asked |= {('Recipe tuned for Adam', f'{words[k]} runs'): at_adams_point(k) for k in ('short', 'middle')}
    searches = pd.DataFrame({k: plain_mean(e) for k,e in asked.items()}).T
    users = users_answers()
    return pd.concat([users.reindex(columns=searches.columns), searches]) if len(users) else searches

def users_outcome(question):
    "What a question of PROTOCOL.md has shown, by its first row; None if it has not been run"
    return outcome(users_answers().loc[question].iloc[0]) if question in users_answers().index else None

def users_answer(question):
    "Outcomes and figures of a question of PROTOCOL.md as a phrase"
    rows, prep = users_answers().loc[question], 'with' if question == fine_tune else 'in'
    parts = []
    for what,p in rows.iterrows():
        figure = f'{percent(p)} {prep} {what}'
        if parts and outcome(p) == parts[-1][0]: parts[-1].append(figure)
        else: parts.append([outcome(p), figure])
    said = '; '.join(f"{what}, {' and '.join(figures)}" for what,*figures in parts)
    return f"{said} ({' and '.join(f'{k:.0f}' for k in rows.k.unique())} tasks)"

def answer(question):
    "The figures of a question as a phrase, for each length of training"
    return ' and '.join(f'{percent(p)} in {runs}' for runs,p in answers().loc[question].iterrows())

def in_a_line():
    "The answer for a reader who stops there"
    cases = {swap: 'if you only swap `opt_func`', fine_tune: 'if you fine-tune'}
    said = {}
    for q,case in cases.items():
        if shown := users_outcome(q): said.setdefault(shown, []).append(case)
    said = [f"{' or '.join(those)}, {shown}." for shown,those in said.items()]
    few = ' and '.join(f"{abs(p['mean']):.1f} % {'lower' if p['mean'] < 0 else 'higher'} in {runs}"
        for runs,p in answers().loc['Best of 5 settings'].iterrows())
    return ' '.join([*(o[0].upper() + o[1:] for o in said),
        f"If you train from scratch with the best of 5 settings for each, NAdam's test loss is {few}, on average over "
        "small tasks. In long runs, and in a recipe tuned for Adam, no difference is shown."])

def in_short(page=''):
    "The answers in words, the user's questions first; `page` is where the rule is, as a link"
    off, good = (plain_mean(tuning_gain(5, o)) for o in (1, 0))
    own = [percent(plain_mean(best_of(k, 5, own_ranges))) for k in ('short', 'middle')]
    asked = {swap: '**You only swap `opt_func`**, and take the learning rate that `lr_find` suggests',
        f"{swap}, Adam's rate": 'The same, at the rate that it suggests for Adam',
        fine_tune: '**You fine-tune** a pretrained network'}
    user_lines = '\n'.join(f'- {k}: {users_answer(q)}.' for q,k in asked.items() if users_outcome(q))
    return f"""
{user_lines}
- **You train from scratch and try a few settings:** NAdam ends lower. With the best of 5 settings of learning rate,
  momentum and weight decay for each, the difference is {answer('Best of 5 settings')}. If each
  may search the momenta that suit it, about half of that is left, and the intervals include 0: {own[0]} and {own[1]}.
- **You tune a lot:** the more settings are tried, the smaller the difference: {answer('Best of 32 settings')}, with
  the best of 32. Trained again with new seeds, those differ by {answer('Best of 32, trained again')}. By
  [the rule that was set beforehand]({page}#the-rule-that-was-set-beforehand) this is
  {'enough' if len(met()) > 1 else 'not enough'} to choose NAdam over an equally well-tuned Adam.
- **You train for long:** no difference is shown, {answer('Best of 16, trained again')}.
- **Your recipe is tuned for Adam:** putting NAdam into it brings no gain that is shown,
  {answer('Recipe tuned for Adam')}.
- **What matters more:** the learning rate. From one that is three times too large or too small, the best of 5
  settings lowers Adam's loss by {off['mean']:.0f} % ({off.low:.0f} to {off.high:.0f}); from a good one, by
  {good['mean']:.0f} % ({num(good.low, 0)} to {num(good.high, 0)}).
"""

def which_one():
    "What to take, a line for each case"
    exact_adam = '`partial(NAdam, nesterov=False)`'
    def asked(case, question):
        if question not in users_answers().index: return []
        if looks_ahead(users_answers().loc[question].iloc[0]): return [(case, '`NAdam`', users_answer(question))]
        return [(case, exact_adam, f'with `NAdam`, {users_answer(question)}')]
    rows = [*asked('a pretrained model to fine-tune', fine_tune),
        *asked('a model to train from scratch, and nothing is tuned', swap),
        ('a model to train from scratch, and a few settings are tried', '`NAdam`',
            f"its loss is lower, {answer('Best of 5 settings')}; about half of that, and not shown, if each may search "
            'its own momenta'),
        ('a recipe that is tuned for Adam', exact_adam,
            f"with `NAdam`, no gain is shown, {answer('Recipe tuned for Adam')}"),
        ('a long run', exact_adam,
            f"with `NAdam`, no difference is shown, {answer('Best of 16, trained again')}"),
        ('a recipe from another framework', '[the same NAdam as there](tutorial.which_nadam.ipynb)',
            '`NAdam` takes the steps of AlgoPerf and timm, `DozatNAdam` those of PyTorch, Keras and optax')]
    return '\n'.join(['| you have | take | because |', '|---|---|---|', *(f"| {' | '.join(o)} |" for o in rows)])

def at_a_glance():
    "How it was measured, for an expert"
    equal = {words[k]: plain_mean(searched(k)[0], .90) for k in words}
    within = ', '.join(k for k,p in equal.items() if -1 < p.low and p.high < 1)
    ranges = ', '.join(f'{k} {interval(p)}' for k,p in equal.items())
    shared = 1 - (1 - 500/1797)**2 # of the images of `digits`, 500 tune in each of two seeds
    n = len(points('short').loc[('digits', nadam)])
    rows = {'optimizers': '`NAdam` and exact Adam, `NAdam(nesterov=False)`: one code, ε = 1e-8, β₂ = 0.99, decoupled '
            'weight decay',
        'tasks': 'eight, small, of four kinds and from six sets of data; three more, set apart, check the recipe',
        'a setting': 'learning rate (over a factor of 100), momentum, weight decay; quasi-random, the same for both',
        'a *trial*': 'one setting, trained with two seeds (long runs: one). The tuning data choose among trials',
        'a search': f'32 trials. Four searches of short and of medium-length runs, {n} trials; one of long runs, of 16',
        'best of n': f'the test loss of the chosen trial, mean over all choices of n of the {n}',
        'trained again': 'the winner of a search, with 30 new seeds (long runs: 10); mean of the searches',
        'what is not independent': 'each seed splits its data anew. So test items of one seed were tuning items of '
            f"another ({share(shared)} of a new seed's test images of `digits`). Within a run no test item has trained "
            'or tuned',
        'unit and interval': 'the task. The plain mean over tasks with Student\'s t; '
            '[two other estimators](#the-mean-three-ways) as a check',
        'rule set beforehand': f'[met at {len(met())} of 3 lengths](#the-rule-that-was-set-beforehand), and it asks '
            f"for 2: {'met' if len(met()) > 1 else '**not met**'}",
        'corrected for their number': "DozatNAdam and fastai's Adam, by Holm's method, together. What is called "
            'exploratory is not corrected',
        'equivalence': 'within ±1 % of the loss, by two one-sided tests: '
            + (f'shown for {within}' if within else 'not shown') + f" (90 % intervals of the first search: {ranges})",
        'protocol': '[written and committed before the runs](#appendix-the-protocol)'}
    return '\n'.join(['| | |', '|---|---|', *(f'| {k} | {v} |' for k,v in rows.items())])

# In pictures

def users_table():
    "The questions of PROTOCOL.md, with their verdicts"
    rows = {}
    for q,r in user.answers().iterrows():
        e = user.effects(*user.questions[q][:2])
        rows['primary' if r.primary else 'secondary', q] = {'NAdam − Adam': percent(r),
            '90 % interval': f'{num(r.low90)} to {num(r.high90)}', 'p, after Holm': f'{r.p_holm:.2f}',
            'lower on': lower(r), 'not run': f'{r.missing:.0f}', 'seeds': f'{e.n.min():.0f}', 'verdict': r.verdict}
    return pd.DataFrame(rows).T.map(lambda v: v.replace(' ', '\N{NO-BREAK SPACE}'))

def plot_answers():
    "The answers with their 95 % intervals; full where 0 is outside"
    rows = answers()
    fig, ax = plt.subplots(figsize=(9, .7 + .36*len(rows)), layout='constrained')
    ax.axvline(0, color='0.6', lw=1)
    for y,((question, runs),p) in enumerate(rows.iterrows()):
        half = [[p['mean'] - p.low], [p.high - p['mean']]]
        ax.errorbar(p['mean'], y, xerr=half, fmt='o', color='k', mfc='k' if p.low*p.high > 0 else 'w', capsize=3)
        ax.text(1.02, y, percent(p), transform=ax.get_yaxis_transform(), va='center')
    first = ~rows.index.get_level_values(0).duplicated()
    for y in np.flatnonzero(first)[1:]: ax.axhline(y - .5, color='0.85', lw=.8)
    ax.set_yticks(range(len(rows)), [f'{q}:  {r}' if new else r for new,(q, r) in zip(first, rows.index)])
    ax.tick_params('y', length=0)
    ax.spines[['top', 'right', 'left']].set_visible(False)
    ax.set(ylim=(len(rows) - .5, -.5), xlabel="NAdam's test loss − Adam's (%), mean over tasks")
    ax.set_title('← NAdam is better', loc='left', fontsize='medium')
    ax.set_title('Adam is better →', loc='right', fontsize='medium')

def plot_tasks(xlim=(-16, 13)):
    "The effect on each task (grey: single searches), and the mean over tasks"
    fig, axs = plt.subplots(1, 3, figsize=(9.5, 3.4), layout='constrained', sharey=True)
    for ax,k in zip(axs, words):
        es = searched(k)
        draw_tasks(ax, mean_of_searches(k), xlim, es if len(es) > 1 else ())
        ax.set_title(f"{words[k]} runs, {'four searches' if len(es) > 1 else 'one search'}", fontsize='medium')
    fig.supxlabel("NAdam's test loss − exact Adam's (%)", fontsize='medium')

def plot_trials(ns=(1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128)):
    "The mean effect, by the number of settings that each optimizer may try"
    fig, axs = plt.subplots(1, 2, figsize=(9, 3.2), layout='constrained', sharey=True)
    for ax,k in zip(axs, ('short', 'middle')):
        ps = pd.DataFrame([plain_mean(best_of(k, n)) for n in ns], index=ns)
        ax.fill_between(ns, ps.low, ps.high, color='0.88', label='95 % interval over tasks')
        ax.plot(ns, ps['mean'], 'k-o', ms=4, label='the same range of momentum for both')
        own = [plain_mean(best_of(k, n, own_ranges))['mean'] for n in ns if n <= 100]
        ax.plot(ns[:len(own)], own, '--', color='0.45', label='a range of its own for each')
        ax.axhline(0, color='0.6', lw=1)
        ax.set(title=f'{words[k]} runs', xscale='log', xlabel='settings tried')
        ax.set_xticks([1, 2, 5, 12, 32, 128], ['1', '2', '5', '12', '32', '128'])
        ax.minorticks_off()
    axs[0].set_ylabel("NAdam's loss − exact Adam's (%)")
    axs[1].legend(frameon=False, loc='lower right', fontsize='small')
