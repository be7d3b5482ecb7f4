"Runs of a comparison are fair, survive an interruption, extend, and refuse what cannot be compared"
import itertools, json, math, multiprocessing, os, random, re, shutil, signal, sys, time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.metrics import mse, rmse
from fastai.optimizer import Adam, OptimWrapper
from fastai.torch_core import set_seed
from fastcore.basics import first
from torch import nn
import fastai.callback.schedule # gives Learner its fit_one_cycle

from fastai_nadam import NAdam
from fastai_nadam.tools import runs as runs_module
from fastai_nadam.tools.compare import compare_opts, main, search_opts, search_points
from fastai_nadam.tools.results import Comparison
from fastai_nadam.tools.tasks import tensor_dls
from runs import Forked

def name(o): return re.sub(" at 0x[0-9a-f]+", "", str(o)) # the same in each process, or pytest -n 2 stops

@lru_cache
def dls(test=False):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(128, 4, generator=g)
    sets = [(o, o.sum(1, keepdim=True)) for o in x.split([64, 32, 32])]
    return tensor_dls(*sets[:2 + test], bs=16)

def tiny(opt_func, test=False, **kwargs):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))
    return Learner(dls(test), model, MSELossFlat(), opt_func, metrics=mse, **kwargs)

def halves(model): return [list(o.parameters()) for o in (model[:2], model[2:])]

def tuned(opt_func, **kwargs): return tiny(opt_func, test=True, splitter=halves, **kwargs)

def linear(opt_func, loss=None, **kwargs):
    return Learner(dls(True), nn.Linear(4, 1), loss or MSELossFlat(), opt_func, **kwargs)

small = dict(opts=['NAdam', partial(NAdam, nesterov=False), Adam], lrs=[1e-2, 1e-1], epochs=2, seeds=3, grow=0)

def compare(make_learner=tiny, **kwargs): return compare_opts(make_learner, **{**small, **kwargs}).results

run_cols = ['opt', 'lr', 'mom', 'wd', 'seed']

def same(a, b): return a.drop(columns=['task', 'seconds']).equals(b.drop(columns=['task', 'seconds']))

# What a run is

def test_table(tmp_path):
    df = compare(out=tmp_path)
    assert list(df) == ['task', *run_cols, 'train_loss', 'valid_loss', 'metric', 'test_loss', 'test_metric',
        'seconds', 'diverged']
    assert len(df) == 3*2*3 and set(df.task) == {'tiny'}
    assert list(df.opt.unique()) == ['NAdam', 'NAdam(nesterov=False)', 'Adam']
    assert (df.seconds > 0).all() and not df.diverged.any()
    assert (df.metric == df.valid_loss).all() and df.metric.nunique() == len(df)
    assert df[['mom', 'wd', 'test_loss', 'test_metric']].isna().all(axis=None)
    c = Comparison.load(tmp_path)
    assert c.results.equals(df) and c.metric == 'valid_loss' and c.lower_is_better
    assert sorted(f.name for f in tmp_path.iterdir()) == ['results.csv', 'settings.json']

def seeded(seed, make_learner=tuned, opt_func=Adam):
    "A `Learner` that starts as a run with this seed does"
    set_seed(seed, reproducible=True)
    learn = make_learner(opt_func)
    set_seed(seed, reproducible=True)
    for dl in learn.dls.loaders: dl.rng = random.Random(seed)
    return learn

@pytest.mark.parametrize('given, called', [(dict(lrs=1e-2), dict(lr_max=1e-2)),
    (dict(lrs=1e-2, moms=(.9, .7, .8)), dict(lr_max=1e-2, moms=(.9, .7, .8))),
    (dict(lrs=1e-2, moms=.6), dict(lr_max=1e-2, moms=(.6,)*3)),
    (dict(lrs=1e-2, momenta=.9, wds=.3), dict(lr_max=1e-2, moms=(.9, .7, .9), wd=.3)),
    (dict(fine_tune=True), {}), (dict(fine_tune=True, freeze_epochs=2), dict(freeze_epochs=2)),
    (dict(fine_tune=True, freeze_epochs=0), dict(freeze_epochs=0)),
    (dict(fine_tune=True, lrs=.05), dict(base_lr=.05)),
    (dict(fine_tune=True, lrs=.05, freeze_epochs=3, momenta=.9, wds=.3),
        dict(base_lr=.05, freeze_epochs=3, moms=(.9, .7, .9), wd=.3))], ids=name)
def test_a_run_is_what_fastai_does_by_itself(given, called):
    "Its defaults too: in `fine_tune` nothing has to be chosen"
    df = compare(tuned, **{**dict(opts=['NAdam', 'Adam'], seeds=2, lrs=None, metric='mse'), **given})
    for r in df[df.opt == 'Adam'].itertuples():
        learn = seeded(r.seed)
        with learn.no_bar(), learn.no_logging():
            train = learn.fine_tune if 'fine_tune' in given else learn.fit_one_cycle
            train(2, **called)
            values = [*learn.recorder.values[-1], *learn.validate(dl=learn.dls[2])]
        assert np.allclose([r.train_loss, r.valid_loss, r.metric, r.test_loss, r.test_metric], values, rtol=1e-5)
        assert r.lr == given.get('lrs', 2e-3) and ('wds' not in given or (r.mom, r.wd) == (.9, .3))

class Start(Callback):
    "Note the initial weights and all batches"
    def __init__(self, log): self.log = log
    def before_train(self):
        if self.epoch == 0: self.log.append([sum(float(p.double().sum()) for p in self.model.parameters())])
    def before_batch(self):
        if self.log: self.log[-1].append(float(self.x.sum()))

def test_runs_of_a_seed_have_the_same_weights_and_batches():
    log = []
    compare(partial(tiny, cbs=Start(log)))
    assert len(log) == 3*2*3 and all(len(o) == 1 + 2*(4 + 1) for o in log)
    seeds = [log[i:i+6] for i in (0, 6, 12)]
    assert all(o == s[0] for s in seeds for o in s)
    assert seeds[0][0][0] != seeds[1][0][0] and seeds[0][0][1:] != seeds[1][0][1:] != seeds[2][0][1:]
    assert log[0][1:6] != log[0][6:11] # each epoch has an order of its own

@lru_cache
def loaded():
    "Data that is split at random, once"
    x, y = dls().train.create_batch(list(range(64)))
    return tensor_dls(*((x[i], y[i]) for i in torch.randperm(64).split(32)), bs=16)

def loads(opt_func): return Learner(loaded(), nn.Linear(4, 1), MSELossFlat(), opt_func)

@pytest.mark.parametrize('method,n_workers', [('fork', 2), ('spawn', 1)])
def test_workers_give_what_one_process_gives(method, n_workers, tmp_path, monkeypatch):
    "Also where loading the data draws random numbers. A forked worker takes along any function"
    monkeypatch.setattr(runs_module, 'get_context', lambda _: multiprocessing.get_context(method))
    threads = torch.get_num_threads()
    loaded.cache_clear()
    serial = compare(loads)
    assert torch.get_num_threads() == threads
    loaded.cache_clear()
    df = compare((lambda opt_func: loads(opt_func)) if method == 'fork' else loads, n_workers=n_workers, out=tmp_path)
    assert same(df, serial) and len(serial) == 3*2*3
    df.sample(frac=1).to_csv(tmp_path/'results.csv', index=False)
    assert Comparison.load(tmp_path).results.equals(df)

# Interrupted, killed, extended, damaged

class Stop(Callback):
    "Stop in the middle of some run"
    def __init__(self, n): self.n = n
    def after_batch(self):
        self.n -= 1
        if self.n == 0: raise KeyboardInterrupt

def test_an_interrupted_comparison_goes_on(tmp_path):
    whole = compare()
    with pytest.raises(KeyboardInterrupt): compare(partial(tiny, cbs=Stop(12*10 + 3)), task='tiny', out=tmp_path)
    partly = Comparison.load(tmp_path).results
    assert 0 < len(partly) < len(whole)
    calls = []
    def make(opt_func):
        calls.append(1)
        return tiny(opt_func)
    assert same(compare(make, task='tiny', out=tmp_path), whole)
    assert len(calls) == len(whole) - len(partly) + 5 # and five to check
    before = (tmp_path/'results.csv').read_bytes()
    assert same(compare(out=tmp_path), whole) and (tmp_path/'results.csv').read_bytes() == before

def test_a_comparison_is_extended(tmp_path):
    "By seeds, learning rates, optimizers, momenta and weight decays: the whole is what one call gives"
    compare(opts=['NAdam'], lrs=[1e-2], seeds=1, out=tmp_path)
    before = (tmp_path/'results.csv').read_text()
    compare(opts=['NAdam'], lrs=[1e-2], seeds=3, out=tmp_path)
    compare(opts=['NAdam'], out=tmp_path)
    assert same(compare(out=tmp_path), compare())
    more = dict(momenta=[.8, .9], wds=[.1, .2], opts=['Adam', 'NAdam'], lrs=[1e-2], seeds=2)
    df = compare(**more, out=tmp_path)
    after = (tmp_path/'results.csv').read_text()
    assert set(before.splitlines()) < set(after.splitlines())
    assert len(df) == 3*2*3 + 2*4*2
    assert same(df[df.mom.notna() & (df.opt == 'Adam')].reset_index(drop=True), compare(**{**more, 'opts': ['Adam']}))

def test_a_run_that_was_cut_off_is_made_again(tmp_path):
    whole = compare(out=tmp_path)
    text = (tmp_path/'results.csv').read_text()
    for cut in (1, random.randrange(2, len(text.splitlines()[-1])), len(text.splitlines()[-1])):
        (tmp_path/'results.csv').write_text(text[:-cut])
        assert len(Comparison.load(tmp_path).results) == len(whole) - 1
        assert same(compare(out=tmp_path), whole)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp('made')
    compare(out=path)
    return path

@pytest.fixture
def stored(made, tmp_path): return Path(shutil.copytree(made, tmp_path/'stored'))

@pytest.mark.parametrize('line, old, new', [(5, ',', ';'), (8, '$', ',1'), (7, 'False', 'no'), (3, ',0.1,', ',x,'),
    (6, 'Adam', 'adam'), (9, '.+', ''), (1, '.+', 'opt,lr'), (6, '0.0', '1e'), (4, '^tiny', 'other'), (3, '^', '"'),
    (8, ',[^,]*,False', ',-1,False'), (7, ',[012],', ',-1,'), (5, '0.1', '10'*400), (6, '$', chr(27)),
    (9, 'tiny', 'x'*200_000)])
def test_a_damaged_line_is_named(line, old, new, stored):
    lines = (stored/'results.csv').read_text().split('\n')
    lines[line-1] = re.sub(old, new, lines[line-1])
    (stored/'results.csv').write_text('\n'.join(lines))
    with pytest.raises(ValueError, match=r"results.csv' is damaged in line (\d+): ") as e: Comparison.load(stored)
    named = int(re.search(r'in line (\d+)', str(e.value))[1])
    assert named >= line if old == '^' else named == line # an open quote goes on to the end
    assert len(str(e.value)) < 500 and (stored/'results.csv').read_text() == '\n'.join(lines)

@pytest.mark.parametrize('data', [b'\0'*50, b'\xff', b'tiny,\xff\n', b'\0\n'])
def test_results_that_are_no_text_are_refused(data, stored):
    with open(stored/'results.csv', 'ab') as f: f.write(data)
    with pytest.raises(ValueError, match=r"results.csv' is invalid: "): Comparison.load(stored)

@pytest.mark.parametrize('entry, value', [(None, []), (None, 'x'), (None, None), ('settings', None), ('settings', []),
    ('versions', 3), ('versions', {'torch': 2}), ('more', 1), ('opts', 'Adam'), ('opts', None), ('opts', [1]),
    ('task', 3), ('epochs', 0), ('epochs', '2'), ('epochs', 2.), ('metric', None), ('lower_is_better', 'yes'),
    ('moms', .9), ('moms', [.9, .8]), ('moms', [.9, .8, 1]), ('chance', 'x'), ('chance', math.nan),
    ('trial_seeds', 'x'), ('trial_seeds', [.5]), ('freeze_epochs', -1), ('lr_find', 1), ('batches', None),
    ('unknown', 1), ('task', 'x'*10**5), ('task', '\x1b[31m')], ids=name)
def test_settings_are_checked_whole_before_use(entry, value, stored):
    file = stored/'settings.json'
    data = json.loads(file.read_text())
    if entry is None: data = value
    elif entry in ('settings', 'versions', 'more'): data[entry] = value
    else: data['settings'][entry] = value
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError) as e: Comparison.load(stored)
    msg = str(e.value)
    assert "settings.json' is invalid: " in msg and len(msg) < 500 and '\x1b' not in msg
    assert not entry or entry in msg

def test_a_command_in_a_damaged_folder_is_one_line(stored, capsys):
    for name,text in (('settings.json', '[]'), ('results.csv', '\0\n')):
        before = (stored/name).read_text()
        (stored/name).write_text(text)
        assert main(['--task', 'tabular', '--quick', '--out', str(stored)]) == 2 or name == 'results.csv'
        with pytest.raises(ValueError, match=name): compare(out=stored)
        (stored/name).write_text(before)
    err = capsys.readouterr().err
    assert "settings.json' is invalid: " in err and err.startswith('nadam-compare: ') and err.count('\n') == 2

def test_two_comparisons_in_one_folder(tmp_path):
    class Again(Callback):
        def before_train(self): compare(out=tmp_path)
    with pytest.raises(ValueError, match='another run is at work in'):
        compare(partial(tiny, cbs=Again()), task='tiny', out=tmp_path)

# Diverged or not defined

class EndEarly(Callback):
    "End training in the third epoch"
    def after_train(self):
        if self.epoch == 2: raise CancelFitException()

class EndAtOnce(Callback):
    "End training in the first epoch"
    def before_batch(self):
        if self.training: raise CancelFitException()

never_better = partial(EarlyStoppingCallback, min_delta=1e9, patience=1)

@pytest.mark.parametrize('cb', [EndEarly, EndAtOnce, never_better], ids=['own', 'at once', 'fastai'])
def test_a_run_that_is_stopped_early_has_a_result(cb):
    df = compare(lambda opt_func: tiny(opt_func, test=True, cbs=cb()), opts=['Adam'], epochs=4)
    assert not df.diverged.any()
    assert df[['valid_loss', 'metric', 'test_loss', 'seconds']].notna().all(axis=None)

def per_class(*args): return np.array([0.5, 0.7])

def test_a_metric_of_several_numbers_is_no_number_and_disturbs_no_other():
    def two(opt_func): return Learner(dls(), nn.Linear(4, 1), MSELossFlat(), opt_func, metrics=[mse, per_class])
    assert compare(two, metric='mse').metric.notna().all()

def test_a_metric_is_found_without_its_underscores():
    def rooted(opt_func): return Learner(dls(), nn.Linear(4, 1), MSELossFlat(), opt_func, metrics=rmse)
    assert '(_rmse, lower' in compare_opts(rooted, **small, metric='rmse').verdict()

def picky(*args):
    "A loss that refuses NaN"
    if not torch.isfinite(args[0]).all(): raise AssertionError('NaN')
    return F.mse_loss(*args)

@pytest.mark.parametrize('loss', [MSELossFlat(), picky])
def test_a_run_that_diverges_is_a_result(loss, tmp_path):
    def make(opt_func): return linear(opt_func, loss, metrics=mse)
    df = compare(make, opts=['NAdam'], lrs=[1e-2, 1e37], epochs=3, seeds=2, out=tmp_path)
    assert df.groupby('lr').diverged.all().to_dict() == {1e-2: False, 1e37: True}
    assert df[df.lr > 1].drop(columns=['task', 'opt', 'lr', 'seed', 'diverged']).isna().all(axis=None)
    assert Comparison.load(tmp_path).best('NAdam')[0] == 1e-2 and Comparison.load(tmp_path).results.equals(df)

def sometimes(*args): return math.nan if random.random() < 0.5 else 1.
def never(*args): return None

@pytest.mark.parametrize('metric', [sometimes, never])
def test_a_metric_that_is_not_defined_is_no_divergence(metric):
    def make(opt_func): return linear(opt_func, metrics=[mse, FromFunc(metric)])
    df = compare(make, metric=metric.__name__, lower_is_better=False, opts=['Adam'], seeds=12)
    assert df.metric.isna().any() and not df.diverged.any() and df.valid_loss.notna().all()

class FromFunc(fastai.learner.Metric):
    "A metric with a value of its own"
    def __init__(self, f): self.f = f
    def reset(self): pass
    def accumulate(self, learn): pass
    value = property(lambda self: self.f())
    name = property(lambda self: self.f.__name__)

@pytest.mark.parametrize('n_workers', [0, 2])
def test_an_error_of_a_run_is_not_a_result(n_workers, tmp_path):
    class Fail(Callback):
        def after_train(self): raise RuntimeError('broken callback')
    with pytest.raises(RuntimeError, match='broken callback'):
        compare(partial(tiny, cbs=Fail()), out=tmp_path, n_workers=n_workers)
    with pytest.raises(ValueError, match='no results yet'): Comparison.load(tmp_path)

# A search

def test_a_search_tries_the_same_points_and_judges_on_fresh_seeds(tmp_path):
    kw = dict(opts=['NAdam', 'Adam'], lrs=(1e-3, 1e-1), epochs=2, seeds=3, trials=8, grow=0, task='tiny')
    c = search_opts(partial(tiny, test=True), **kw, out=tmp_path)
    df = c.results
    trials = df[df.seed < 2]
    tried = trials.groupby(['opt', 'seed'])[['lr', 'mom', 'wd']].apply(lambda o: sorted(map(tuple, o.to_numpy())))
    assert len(tried) == 4 and all(o == tried.iloc[0] for o in tried) and len(tried.iloc[0]) == 8
    pts = np.array(tried.iloc[0])
    assert (pts >= [1e-3, .67, 5e-3]).all() and (pts <= [1e-1, .9875, 1]).all() and len(np.unique(pts[:,0])) == 8
    for o in ('NAdam', 'Adam'):
        judged = df[(df.opt == o) & (df.seed >= 100)]
        assert sorted(judged.seed) == [100, 101, 102] and (judged[['lr', 'mom', 'wd']] == c.best(o)).all(axis=None)
        means = trials[trials.opt == o].groupby(['lr', 'mom', 'wd']).metric.mean()
        assert c.best(o) == means.idxmin()
        assert math.isclose(c.summary().value[o], judged.test_metric.mean())
    more = search_opts(partial(tiny, test=True), **{**kw, 'trials': 16, 'seeds': 4}, out=tmp_path).results
    assert len(c.results.merge(more)) == len(c.results) and (more.seed < 2).sum() == 2*(c.results.seed < 2).sum()
    with pytest.raises(ValueError, match='another comparison, with search True, not False'):
        compare(partial(tiny, test=True), task='tiny', out=tmp_path)

def test_points_of_a_search():
    some = search_points(['mom', 'lr'], (1e-4, 1), 16)
    assert search_points(['mom', 'lr'], (1e-4, 1), 64)[:16] == some and {p[2] for p in some} == {None}
    lrs = np.log10([p[0] for p in search_points(['lr', 'wd'], (1e-4, 1), 63)])
    assert np.histogram(lrs, 4, (-4, 0))[0].tolist() == [15, 16, 16, 16] # without the corner
    assert search_points(['wd'], [0.3], 1)[0][:2] == (0.3, None)

def test_the_grid_grows_where_the_best_is_at_its_edge(tmp_path):
    def slow(opt_func): return Learner(dls(), nn.Linear(4, 1), MSELossFlat(), opt_func)
    kw = dict(opts=['Adam', 'NAdam'], epochs=2, seeds=2, out=tmp_path)
    c = compare_opts(slow, lrs=[1e-5, 1e-4], **kw, grow=1)
    assert sorted(c.results.lr.unique()) == [1e-5, 1e-4, 1e-3] and (c.results.groupby('lr').size() == 4).all()
    assert 'at the edge' in c.verdict()
    c = compare_opts(slow, lrs=[1e-5, 1e-4], **{**kw, 'seeds': 3}, grow=2)
    assert sorted(c.results.lr.unique()) == [1e-5, 1e-4, 1e-3, 1e-2] and (c.results.groupby('lr').size() == 6).all()
    assert len(compare_opts(slow, lrs=[1e-5, 1e-4], **{**kw, 'seeds': 3}, grow=2).results) == len(c.results)
    c = search_opts(slow, ['Adam'], (1e-5, 1e-4), 1, 1, trials=4, grow=1)
    assert c.best('Adam')[0] > 1e-4 and c.results.lr.max() < 1e-4*10**.25 and sum(c.results.lr > 1e-4) == 2 + 1

# Fine-tuning, and the learning rate of lr_find

def fine(make_learner=tuned, **kwargs):
    kwargs = {**dict(opts=['NAdam', 'Adam'], epochs=2, seeds=2, fine_tune=True), **kwargs}
    return compare_opts(make_learner, **kwargs)

@pytest.mark.parametrize('at', [0, 1, 3])
def test_fine_tuning_resumes_in_each_of_its_phases(at, tmp_path):
    whole = fine().results
    with pytest.raises(KeyboardInterrupt): fine(partial(tuned, cbs=Stop(3*12 + 4*at + 2)), task='tuned', out=tmp_path)
    assert same(fine(out=tmp_path).results, whole)
    before = (tmp_path/'results.csv').read_bytes()
    assert same(fine(out=tmp_path).results, whole) and (tmp_path/'results.csv').read_bytes() == before
    for other in (dict(freeze_epochs=2), dict(fine_tune=False, lrs=[2e-3])):
        with pytest.raises(ValueError, match='another comparison, with freeze_epochs 1, not'):
            fine(out=tmp_path, **other)
    assert same(fine(out=tmp_path, n_workers=2, seeds=3).results, fine(seeds=3).results)

@pytest.mark.parametrize('when', range(4))
def test_fine_tuning_that_diverges_or_is_stopped_is_a_result(when):
    class Spoil(Callback):
        def before_train(self):
            if len(self.learn.seen) == when: self.model[-1].weight.data.fill_(math.nan)
            self.learn.seen.append(1)
    def spoiled(opt_func):
        learn = tuned(opt_func, cbs=Spoil())
        learn.seen = []
        return learn
    df = fine(spoiled, opts=['Adam'], freeze_epochs=2).results
    assert df.diverged.all()

def test_a_callback_that_ends_the_frozen_phase_leaves_the_other():
    class EndPhase(Callback):
        def after_train(self):
            if not first(self.model.parameters()).requires_grad: raise CancelFitException()
    df = fine(partial(tuned, cbs=EndPhase()), opts=['Adam']).results
    assert not df.diverged.any() and df.test_loss.notna().all()

@pytest.mark.parametrize('whose,kwargs', [('own', {}), ('NAdam', dict(fine_tune=True)),
    ('Adam', dict(wds=[.1, .2], momenta=[.9]))], ids=name)
def test_lr_find_gives_the_learning_rate_of_each_seed(whose, kwargs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kw = dict(opts=['NAdam', Adam], epochs=2, seeds=3, lr_find=whose, task='t', **kwargs)
    c, funcs, lrs = compare_opts(tuned, **kw, out='out'), dict(NAdam=NAdam, Adam=Adam), {}
    assert sorted(o.name for o in tmp_path.iterdir()) == ['out'] # no models
    for name,seed in itertools.product(funcs if whose == 'own' else [whose], range(3)):
        learn = seeded(seed, opt_func=funcs[name])
        learn.path = tmp_path/'by hand'
        if kwargs.get('fine_tune'): learn.freeze()
        with learn.no_bar(): lrs[name, seed] = learn.lr_find(show_plot=False).valley
    assert len({*lrs.values()}) > 1
    for r in c.results.itertuples():
        assert r.lr == pytest.approx(lrs[r.opt if whose == 'own' else whose, r.seed], rel=1e-5)
    adam = c.results[(c.results.opt == 'Adam') & (c.results.seed == 2)] # which trains as if nothing had been before
    again = compare_opts(tuned, **dict(kw, lrs=[adam.lr.iloc[0]], seeds=[2], opts=[Adam], lr_find=None)).results
    assert np.allclose(adam.valid_loss, again.valid_loss, rtol=1e-4)
    before = Path('out/results.csv').read_bytes()
    assert same(compare_opts(tuned, **kw, out='out', n_workers=2).results, c.results)
    assert Path('out/results.csv').read_bytes() == before
    s = c.summary()
    assert (s.seeds == 3).all() and math.isnan(c.best('Adam')[0])
    assert s.lr['Adam'] == pytest.approx(c.judged('Adam').lr.median())
    assert [*c.table()][0] == 'median lr of lr_find' and ' lr ' not in c.verdict()
    with pytest.raises(ValueError, match=f'another comparison, with lr_find {whose!r}, not None'):
        compare_opts(tuned, **{**kw, 'lr_find': None, 'lrs': [1e-2]}, out='out')

def test_lr_find_on_a_loss_that_is_never_finite_is_one_error():
    def nan(*args): return args[0].sum()*math.nan
    with pytest.raises(ValueError, match='lr_find: .*NAdam.* seed 0: the loss was nan after 1 batch'):
        compare_opts(partial(linear, loss=nan), ['NAdam'], epochs=1, seeds=2, lr_find='own')

def test_fine_tuning_and_lr_find_by_command(tmp_path, capsys):
    (tmp_path/'tuned_task.py').write_text("""from fastai.vision.all import *
from fastai_nadam.tools.tasks import tabular_task_learner
def halves(model): return [params(model[:2]), params(model[2:])]
def mine(opt_func):
    learn = tabular_task_learner(opt_func)
    learn.splitter = halves
    return learn
def whole(opt_func): return tabular_task_learner(opt_func)
mine.lrs = whole.lrs = 3e-3, 1e-2, 3e-2
""")
    def command(args):
        try: code = main(['--task', f'{tmp_path}/tuned_task.py:mine', '--opts', 'NAdam,Adam', '--seeds', '2',
            '--epochs', '1', '--n_workers', '0', '--out', str(tmp_path/'out'), *args.split()])
        except SystemExit as e: code = e.code
        return code, capsys.readouterr().err
    for args,msg in {f'--fine_tune --task {tmp_path}/tuned_task.py:whole': 'fine_tune needs a splitter',
            '--freeze_epochs 2': 'freeze_epochs is for fine_tune',
            '--fine_tune --freeze_epochs -1': 'freeze_epochs must be a whole number from 0, got -1',
            '--lr_find own --lrs 1e-2': 'give lrs or lr_find, not both',
            '--lr_find SGD': "lr_find must be own or one of NAdam, Adam, got 'SGD'",
            '--lr_find own --search mom': 'lr_find is not for a search'}.items():
        code, err = command(args)
        assert code == 2 and msg in err and err.count('\n') == 1, err
        assert not (tmp_path/'out').exists()
    assert command('--fine_tune') == (0, '')
    c = Comparison.load(tmp_path/'out')
    assert c.results.lr.unique().tolist() == [2e-3] and c.settings['freeze_epochs'] == 1
    code, err = command('--fine_tune --quick --lr_find Adam')
    assert code == 2 and 'another comparison' in err
    assert command(f'--fine_tune --quick --lr_find Adam --out {tmp_path}/2') == (0, '')

# What is refused

def wrapped(opt, **kwargs): return partial(OptimWrapper, opt=partial(opt, **kwargs))
def ignores(opt_func): return tiny(Adam)
the_model = nn.Linear(4, 1)
def shares(opt_func): return Learner(dls(), the_model, MSELossFlat(), opt_func, metrics=mse)
def counts(opt_func, n=itertools.count()): 
    learn = tiny(opt_func)
    learn.model[0].bias.data += next(n)
    return learn
def no_learner(opt_func): return opt_func
def no_valid(opt_func): return Learner(type(dls())(dls()[0]), nn.Linear(4, 1), MSELossFlat(), opt_func)
def unknown_metric(opt_func): return Learner(dls(), nn.Linear(4, 1), MSELossFlat(), opt_func, metrics=sometimes)

@pytest.mark.parametrize('changed, msg', [
    (dict(make_learner=ignores), 'make_learner ignores its opt_func: '),
    (dict(make_learner=shares), 'make_learner must make a new model each time'),
    (dict(make_learner=counts), 'make_learner must give the same initial weights'),
    (dict(make_learner=no_learner), 'make_learner must return a Learner'),
    (dict(make_learner=no_valid), 'with validation data'),
    (dict(make_learner=unknown_metric, metric='sometimes'), "lower_is_better must be given for 'sometimes'"),
    (dict(opts=['NAdam', 'Nadam']), "opts: no optimizer 'Nadam'; did you mean NAdam?"),
    (dict(opts=['dozatnadam(wd=.1)']), "did you mean DozatNAdam?"),
    (dict(opts=['-'*3000]), 'opts: no optimizer'),
    (dict(opts=['NAdam(wd=' + '('*3000]), 'opts: no optimizer'),
    (dict(opts=['NAdam(wd=' + '-'*90_000 + '1)']), 'opts: no optimizer'),
    (dict(opts=['\0']), 'opts: no optimizer'),
    (dict(opts=['__import__("os")']), 'opts: no optimizer'),
    (dict(opts=['NAdam(eps=-1)']), 'eps must be'),
    (dict(opts=[]), 'opts must have one value or more'),
    (dict(opts=['Adam', Adam]), 'opts has a value twice: Adam, Adam'),
    (dict(opts=[print]), 'opts: print does not work'),
    (dict(opts=['NAdam(mom=.5)']),
        'opts: NAdam(mom=0.5) would not keep its mom, since the schedule sets it; use moms or momenta'),
    (dict(opts=[partial(Adam, lr=.1)]), 'would not keep its lr'),
    (dict(opts=['Adam(wd=.1)'], wds=[.1, .2]), 'would not keep its wd'),
    (dict(opts=[wrapped(torch.optim.NAdam, betas=(.5, .9))]), 'would not keep its mom'),
    (dict(opts=[partial(OptimWrapper, opt=torch.optim.NAdam, betas=(.5, .9))]), 'would not keep its mom'),
    (dict(opts=[wrapped(torch.optim.SGD, momentum=.5)]), 'would not keep its mom'),
    (dict(opts=[wrapped(torch.optim.AdamW, weight_decay=.5)], wds=[.1]), 'would not keep its wd'),
    (dict(opts=['Adam(sqr_mom=1.0)']), 'Adam(sqr_mom=1.0) does not work'),
    (dict(opts=['ranger(k=0)']), 'ranger(k=0) does not work'),
    (dict(opts=["Adam(eps='x')"]), "Adam(eps='x') does not work"),
    (dict(lrs=[]), 'lrs must have one value or more'),
    (dict(lrs=[0.]), 'lrs must be above 0'),
    (dict(lrs=[-1]), 'lr must be'),
    (dict(epochs=0), 'epochs must be a whole number from 1, got 0'),
    (dict(seeds=0), 'seeds must have one value or more'),
    (dict(metric='f1'), "metric must be one of valid_loss, mse, got 'f1'"),
    (dict(momenta=[.5]), 'momenta must be from 2/3'),
    (dict(momenta=[1.]), 'mom must be'),
    (dict(wds=[-1]), 'wd must be'),
    (dict(moms=(.9, .8)), 'moms must be three numbers'),
    (dict(moms=.9, momenta=[.9]), 'momenta cannot be compared'),
    (dict(grow=-1), 'grow must be'),
    (dict(margin=-1.), 'margin must be a finite number from 0, got -1.0'),
    (dict(baseline='SGD'), "baseline must be one of NAdam, NAdam(nesterov=False), Adam, got 'SGD'"),
    (dict(n_workers=-1), 'n_workers must be')], ids=name)
def test_what_cannot_be_compared_is_refused(changed, msg, tmp_path):
    out = tmp_path/'out'
    with pytest.raises(ValueError) as e: compare(**{'out': out, **changed})
    assert msg in str(e.value) and len(str(e.value)) < 500 and not out.exists()

@pytest.mark.parametrize('changed, msg', [
    (dict(search=['lr', 'eps']), 'search must be some of lr, mom, wd'),
    (dict(search=[]), 'search must be some of'),
    (dict(lrs=[.1]), 'lrs must be the lowest and the highest'),
    (dict(search=['mom'], lrs=(.1, .2)), 'or one if lr is not searched'),
    (dict(trials=0), 'trials must be'),
    (dict(skip=-1), 'skip must be a whole number from 0'),
    (dict(moms=.9), 'momenta cannot be compared'),
    (dict(opts=['Adam(wd=0)']), 'would not keep its wd')], ids=name)
def test_what_cannot_be_searched_is_refused(changed, msg):
    with pytest.raises(ValueError) as e: search_opts(tiny, **{**dict(opts=['Adam'], lrs=(.1, .2), epochs=1), **changed})
    assert msg in str(e.value)

def another(opt_func): return Learner(dls(), nn.Linear(4, 1), MSELossFlat(), opt_func, metrics=mse)

@pytest.mark.parametrize('changed', [dict(epochs=3), dict(task='other'), dict(metric='mse'), dict(moms=.5),
    dict(make_learner=another)], ids=name)
def test_the_folder_of_another_comparison_is_refused(changed, tmp_path):
    kw = dict(lrs=[1e-2, 1e-1], seeds=1, opts=['NAdam'], task='tiny', epochs=1, out=tmp_path)
    compare(**kw)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(ValueError, match='has another comparison'): compare(**{**kw, **changed})
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before

def test_other_folders_are_refused(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'results.csv').write_text('mine')
    (tmp_path/'file').touch()
    refused = {'a': 'has no results of a comparison', 'file': 'File exists', 'file/below': 'Not a directory'}
    for out,msg in refused.items():
        with pytest.raises((ValueError, OSError), match=msg): compare(out=tmp_path/out)
    assert {f.name: f.read_text() for f in (tmp_path/'a').iterdir()} == {'results.csv': 'mine'}

# The command

@pytest.mark.parametrize('args, msg', [
    ('--task digit',
        "task must be digits, tabular, text, imagenette, imagewoof, a folder, or FILE.py:function, got 'digit'"),
    ('--task {tmp}', "has no folder 'train'"),
    ('--opts NAdam,SGDD', "no optimizer 'SGDD'"),
    ('--opts ,', 'opts must have one value or more'),
    ('--metric f1', 'metric must be one of valid_loss, accuracy'),
    ('--seeds 1', 'seeds must be a whole number from 2'),
    ('--seeds many', 'invalid int value'),
    ('--lrs fast', "argument --lrs: invalid floats value: 'fast'"),
    ('--margin -1', 'margin must be a finite number from 0, got -1.0'),
    ('--baseline SGD', "baseline must be one of NAdam, Adam, got 'SGD'"),
    ('--size 32', 'for a folder of images'),
    ('--moms .9,.8', 'moms must be three numbers'),
    ('--momenta .5', 'momenta must be from 2/3'),
    ('--search lr,eps', 'search must be some of'),
    ('--lower_is_better maybe', "invalid yes_no value: 'maybe'"),
    ('--n_workers -1', 'n_workers must be'),
    ('--quik', 'unrecognized arguments: --quik')])
def test_bad_input_is_one_line_and_nothing_is_written(args, msg, tmp_path, capsys):
    (tmp_path/'images').mkdir()
    args = [o.replace('{tmp}', str(tmp_path/'images')) for o in args.split()]
    try: rc = main([*args, '--quick', '--out', str(tmp_path/'out')])
    except SystemExit as e: rc = e.code
    out, err = capsys.readouterr()
    assert rc == 2 and msg in err and err.count('\n') == 1 and err.startswith('nadam-compare: ') and not out
    assert [o.name for o in tmp_path.iterdir()] == ['images']

quick = ['--task', 'tabular', '--quick']

def results_lines(out): return (out/'results.csv').read_text().count('\n') if (out/'results.csv').exists() else 0

@pytest.mark.skipif(sys.platform != 'linux', reason='looks for the workers in /proc')
def test_a_stopped_command_resumes_where_it_was(tmp_path):
    "By Ctrl-C, by the end of a worker, and by its own end, after which its workers end too"
    out, before = tmp_path/'out', None
    for how in ('Ctrl-C', 'worker', 'kill'):
        made = results_lines(out)
        p = Forked(main, [*quick, '--out', str(out), '--n_workers', '2', '--epochs', '6'])
        p.until(lambda: results_lines(out) > max(made, 1)) # it has new results
        workers = [int(o) for o in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split()]
        assert len(workers) == 2
        if how == 'worker': os.kill(workers[0], signal.SIGKILL)
        else: p.send_signal(signal.SIGINT if how == 'Ctrl-C' else signal.SIGKILL)
        code = p.ended(30)
        end = time.time() + 30
        while time.time() < end and any(Path(f'/proc/{o}').exists() for o in workers): time.sleep(0.02)
        left = [o for o in workers if Path(f'/proc/{o}').exists()]
        for o in left: os.kill(o, signal.SIGKILL)
        assert not left
        assert code == {'Ctrl-C': 130, 'worker': 2, 'kill': -signal.SIGKILL}[how]
        if how != 'kill':
            assert p.err.count('\n') == 1, p.err
            assert 'the same command with the same out resumes' in (p.err + p.out).lower()
        df = Comparison.load(out).results
        assert 0 < len(df) < 16
        if before is not None: assert len(before.merge(df, on=list(df.columns))) == len(before)
        before = df

def test_a_command_prints_the_table_and_the_verdict(tmp_path, capsys):
    out = tmp_path/'out'
    assert main([*quick, '--epochs', '1', '--seeds', '2', '--out', str(out), '--n_workers', '0']) == 0
    said, err = capsys.readouterr()
    assert 'runs, about 0 s left' in said and 'best lr' in said and not err
    c = Comparison.load(out)
    assert said.rstrip('\n').split('\n')[-1] == c.verdict() and len(c.results) == 8
    assert sorted(f.name for f in out.iterdir()) == ['results.csv', 'results.png', 'settings.json']

def test_a_search_by_command(tmp_path):
    (tmp_path/'my_task.py').write_text('from fastai_nadam.tools.tasks import tabular_task_learner as mine\n')
    args = '''--opts NAdam,Adam --search lr,mom --trials 3 --trial_seeds 1 --lrs 1e-3,1e-1 --seeds 2 --epochs 1
        --n_workers 0 --grow 0 --metric accuracy --margin 0.1 --baseline NAdam'''.split()
    assert main(['--task', f'{tmp_path}/my_task.py:mine', *args, '--out', str(tmp_path/'out')]) == 0
    c = Comparison.load(tmp_path/'out')
    assert c.settings['task'] == 'mine' and c.metric == 'accuracy' and not c.lower_is_better
    assert len(c.results) == 2*(3 + 2)
    assert c.results.wd.isna().all() and c.results.mom.nunique() == 3
