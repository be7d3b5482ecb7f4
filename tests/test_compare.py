"Comparisons are fair, survive an interruption, refuse what cannot be compared, and their statistics are right about as often as they say"
import itertools, math, random, subprocess, sys, time
from functools import lru_cache, partial
from pathlib import Path

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.metrics import mse
from fastai.optimizer import Adam, Lookahead
from fastai.torch_core import set_seed
from scipy import stats
from torch import nn
import fastai.callback.schedule # gives Learner its fit_one_cycle

from fastai_nadam import compare as c, NAdam
from fastai_nadam.compare import compare_opts, main, mean_interval, read_results, sentence, summarize

root = Path(__file__).parent.parent

# Statistics, on results whose answer is known

def results(gains, rng, seeds=10, lrs=(1e-3, 1e-2, 1e-1), drops=(0.05, 0, 0.03), shared=0.02, own=0.002, epochs=1):
    rows = []
    for seed in range(seeds):
        base = 0.8 + shared*rng.normal()
        for (opt, gain), (lr, drop) in itertools.product(gains.items(), zip(lrs, drops)):
            final = base + gain - drop + own*rng.normal()
            rows += [dict(task='fake', opt=opt, lr=lr, seed=seed, epoch=e, train_loss=1., valid_loss=1-final, metric=final - 0.1*(epochs-e),
                seconds=float(e), diverged=False) for e in range(1, epochs+1)]
    return pd.DataFrame(rows)

@pytest.fixture
def rng(): return np.random.default_rng(random.randrange(2**32))

def test_equal_optimizers_are_declared_different_at_the_nominal_rate(rng):
    n, found = 200, 0
    for _ in range(n): found += 'is better' in (s := sentence(summarize(results(dict(NAdam=0., Adam=0.), rng)))) or 'is worse' in s
    assert stats.binomtest(found, n, 0.05).pvalue > 1e-5, f'{found} of {n}'

def test_a_difference_of_known_size_is_found_and_its_interval_covers_it(rng):
    n, found, covered = 200, 0, 0
    for _ in range(n):
        r = summarize(results(dict(NAdam=0.006, Adam=0.), rng)).loc['NAdam']
        found += r['diff'] - r.diff_interval > 0
        covered += abs(r['diff'] - 0.006) < r.diff_interval
    assert found > 0.95*n
    assert stats.binomtest(covered, n, 0.95).pvalue > 1e-5, f'{covered} of {n}'

def test_pairing_removes_what_seeds_do_to_both(rng):
    r = summarize(results(dict(NAdam=0.006, Adam=0.), rng, shared=0.1))
    assert r.diff_interval['NAdam'] < r.interval['NAdam']/5

def test_the_interval_is_students(rng):
    x = rng.normal(size=8)
    lo, hi = stats.ttest_1samp(x, 0).confidence_interval()
    assert np.allclose(mean_interval([*x, np.nan])[:2], ((lo+hi)/2, (hi-lo)/2))
    assert mean_interval([1.]) == (1., math.inf, 1)
    assert np.isnan(mean_interval([])[0])

def test_the_learning_rate_is_chosen_on_seeds_that_do_not_count(rng):
    df = results(dict(NAdam=0., Adam=0.), rng, seeds=9, own=0)
    df.loc[(df.seed < 3) & (df.lr == 1e-1), 'metric'] = 0.99 # lucky on the seeds that choose
    df.loc[(df.seed >= 3) & (df.lr == 1e-1), 'metric'] = 0.5
    r = summarize(df)
    assert r.lr.tolist() == [1e-1]*2 and np.allclose(r['mean'], 0.5)

def test_less_of_a_loss_is_better(rng):
    df = results(dict(NAdam=0.01, Adam=0.), rng)
    up, down = summarize(df), summarize(df.assign(metric=1 - df.metric), 'valid_loss')
    assert down.lr.equals(up.lr) and np.allclose(down['diff'], -up['diff'], equal_nan=True) and np.allclose(down.epochs_to_target, up.epochs_to_target)
    assert down.lr_low.equals(up.lr_low)
    assert sentence(down, 'valid_loss').startswith('NAdam is better than Adam by ')

def test_the_sentence_is_that_of_the_table(rng):
    r = summarize(results(dict(NAdam=0.01, RAdam=0., ranger=-0.02, Adam=0.), rng, own=0.0005))
    s = sentence(r)
    assert f"NAdam is better than Adam by {100*r['diff']['NAdam']:.2f} ± {100*r.diff_interval['NAdam']:.2f} points" in s
    assert 'ranger is worse than Adam by ' in s and '7 seeds' in s
    r = summarize(results(dict(NAdam=0.01, Adam=0.), rng, seeds=2))
    assert sentence(r).startswith('no difference shown with 1 seed between Adam and NAdam (')
    r = summarize(results(dict(NAdam=0., Adam=0.), rng, seeds=3), baseline='NAdam')
    assert 'NAdam' in sentence(r, baseline='NAdam').split('Adam is ')[-1] and np.isnan(r['diff']['NAdam']) and np.isfinite(r['diff']['Adam'])

def test_diverged_runs_are_counted_and_avoided(rng):
    df = results(dict(NAdam=0., Adam=0.), rng)
    df.loc[(df.opt == 'NAdam') & (df.lr == 1e-2) & (df.seed == 1), ['metric', 'diverged']] = np.nan, True
    assert summarize(df).lr['NAdam'] == 1e-1 # a seed that chooses
    df = results(dict(NAdam=0., Adam=0.), rng)
    df.loc[(df.opt == 'NAdam') & (df.lr == 1e-2) & (df.seed == 9), ['metric', 'diverged']] = np.nan, True
    r = summarize(df).loc['NAdam']
    assert (r.lr, r.diverged, r.seeds) == (1e-2, 1, 6) and r.lr_low == 1e-1
    assert '1 of ' in sentence(summarize(df)) and 'diverged' in sentence(summarize(df))
    df.loc[df.opt == 'NAdam', ['metric', 'diverged']] = np.nan, True
    s = summarize(df)
    assert np.isnan(s.lr['NAdam']) and s.diverged['NAdam'] == 7
    assert sentence(s).startswith('no comparison of Adam with NAdam')
    assert c.plot_results(df)
    plt.close('all')

def test_reach(rng):
    df = results(dict(NAdam=0., Adam=0.), rng, epochs=6)
    r = c.reach(df, 0.6)
    for key,run in df.groupby(['task', 'opt', 'lr', 'seed']):
        hits = [i for i,m in enumerate(run.metric) if m >= 0.6]
        assert r.loc[key].tolist() == ([hits[0]+1, run.seconds[:hits[0]+1].sum()] if hits else [math.inf]*2)

@pytest.mark.parametrize('means, expected', [((1, .995, .98, .995), (1, 2)), ((.9, .995, 1, .993), (2, 4)), ((.5, .6, 1, .5), (3, 3)), ((np.nan, 1, 1, 1), (2, 4))])
def test_lr_range_leaves_no_gap(means, expected): assert c.lr_range(pd.DataFrame([means]*2, columns=[1., 2., 3., 4.])) == expected

# Runs

@lru_cache
def dls():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 4, generator=g)
    return c.tensor_dls((x[:64], x[:64].sum(1, keepdim=True)), (x[64:], x[64:].sum(1, keepdim=True)), bs=16)

def tiny(opt_func, **kwargs):
    return Learner(dls(), nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1)), MSELossFlat(), opt_func, metrics=mse, **kwargs)

small = dict(opts=['NAdam', partial(NAdam, nesterov=False), Adam], lrs=[1e-2, 1e-1], epochs=2, seeds=3)

def same(a, b): return a.drop(columns='seconds').equals(b.drop(columns='seconds'))

def test_table(tmp_path):
    df = compare_opts(tiny, **small, out=tmp_path)
    assert list(df.columns) == ['task', 'opt', 'lr', 'seed', 'epoch', 'train_loss', 'valid_loss', 'metric', 'seconds', 'diverged']
    assert len(df) == 3*2*3*2 and set(df.task) == {'tiny'} and list(df.opt.unique()) == ['NAdam', 'NAdam(nesterov=False)', 'Adam']
    assert (df.groupby(['opt', 'lr', 'seed']).epoch.apply(list).map(tuple) == (1, 2)).all() and (df.seconds > 0).all() and not df.diverged.any()
    assert np.allclose(df.metric, df.valid_loss) and df.metric.nunique() == len(df)
    saved, settings = read_results(tmp_path)
    assert saved.sort_values(list(saved)).reset_index(drop=True).equals(df.sort_values(list(df)).reset_index(drop=True))
    assert settings['metric'] == 'mse' and sorted(f.name for f in tmp_path.iterdir()) == ['results.csv', 'settings.json']

def test_a_run_is_what_fastai_does_by_itself():
    df = compare_opts(tiny, ['Adam'], [1e-2], 2, [7])
    set_seed(7, reproducible=True)
    learn = tiny(Adam)
    set_seed(7, reproducible=True)
    learn.dls.train.rng = random.Random(7)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    assert np.allclose(df[['train_loss', 'valid_loss', 'metric']], learn.recorder.values, rtol=1e-5)

class Start(Callback):
    "Note the initial weights and all batches"
    def __init__(self, log): self.log = log
    def before_fit(self): self.log.append([sum(float(p.double().sum()) for p in self.model.parameters())])
    def before_batch(self): self.log[-1].append(float(self.x.sum()))

def test_runs_of_a_seed_have_the_same_weights_and_batches():
    log = []
    compare_opts(partial(tiny, cbs=Start(log)), **small)
    assert len(log) == 3*2*3 and all(len(o) == 1 + 2*(4 + 1) for o in log)
    seeds = [log[i:i+6] for i in (0, 6, 12)]
    assert all(o == s[0] for s in seeds for o in s)
    assert seeds[0][0][0] != seeds[1][0][0] and seeds[0][0][1:] != seeds[1][0][1:] != seeds[2][0][1:]
    assert log[0][1:6] != log[0][6:11] # each epoch has an order of its own

def test_workers_give_what_one_process_gives(tmp_path):
    threads = torch.get_num_threads()
    serial = compare_opts(tiny, **small)
    assert torch.get_num_threads() == threads
    def local(opt_func): return tiny(opt_func)
    assert same(compare_opts(local if sys.platform == 'linux' else tiny, **small, task='tiny', n_workers=2, out=tmp_path), serial)
    df = read_results(tmp_path)[0]
    df.sample(frac=1).to_csv(tmp_path/'results.csv', index=False) # in whatever order they came
    assert same(read_results(tmp_path)[0], df) and df.opt.unique().tolist() == serial.opt.unique().tolist()

class Stop(Callback):
    "Stop in the middle of some run"
    def __init__(self, n): self.n = n
    def after_batch(self):
        self.n -= 1
        if self.n == 0: raise KeyboardInterrupt

def test_an_interrupted_comparison_goes_on(tmp_path):
    whole = compare_opts(tiny, **small)
    with pytest.raises(KeyboardInterrupt): compare_opts(partial(tiny, cbs=Stop(8*10*2//2 + 3)), **small, task='tiny', out=tmp_path)
    partly, _ = read_results(tmp_path)
    assert 0 < len(partly) < len(whole) and len(partly) % 2 == 0
    calls = []
    def make(opt_func):
        calls.append(1)
        return tiny(opt_func)
    assert same(compare_opts(make, **small, task='tiny', out=tmp_path), whole)
    assert len(calls) == (len(whole)-len(partly))//2 + 4 # and four to check
    before = (tmp_path/'results.csv').read_bytes()
    assert same(compare_opts(tiny, **small, out=tmp_path), whole) and (tmp_path/'results.csv').read_bytes() == before

def picky(*args):
    "A loss that refuses NaN"
    if not torch.isfinite(args[0]).all(): raise AssertionError('NaN')
    return F.mse_loss(*args)

@pytest.mark.parametrize('loss', [MSELossFlat(), picky])
def test_a_run_that_diverges_is_a_result(loss, tmp_path):
    def make(opt_func): return Learner(dls(), nn.Linear(4, 1), loss, opt_func, metrics=mse)
    df = compare_opts(make, ['NAdam'], [1e-2, 1e37], 3, 2, out=tmp_path)
    assert df.groupby('lr').diverged.all().to_dict() == {1e-2: False, 1e37: True}
    assert df[df.lr > 1].drop(columns=['task', 'opt', 'lr', 'seed', 'epoch', 'diverged']).isna().all(axis=None)
    assert summarize(df, 'mse').lr['NAdam'] == 1e-2
    assert len(read_results(tmp_path)[0]) == len(df)

@pytest.mark.parametrize('n_workers', [0, 2])
def test_an_error_of_a_run_is_not_a_result(n_workers, tmp_path):
    class Fail(Callback):
        def after_epoch(self): raise RuntimeError('broken callback')
    with pytest.raises(RuntimeError, match='broken callback'): compare_opts(partial(tiny, cbs=Fail()), **small, out=tmp_path, n_workers=n_workers)

# What is refused

def ignores(opt_func): return tiny(Adam)
def wraps_it(opt_func): return tiny(lambda ps, **kw: Lookahead(opt_func(ps, **kw)))
the_model = nn.Linear(4, 1)
def shares(opt_func): return Learner(dls(), the_model, MSELossFlat(), opt_func, metrics=mse)
def counts(opt_func, n=itertools.count()): 
    learn = tiny(opt_func)
    learn.model[0].bias.data += next(n)
    return learn
def no_learner(opt_func): return opt_func

@pytest.mark.parametrize('changed, msg', [
    (dict(make_learner=ignores), 'make_learner ignores its opt_func: asked for NAdam, it builds another optimizer (Adam)'),
    (dict(make_learner=wraps_it), 'make_learner ignores its opt_func'),
    (dict(make_learner=shares), 'make_learner must make a new model each time'),
    (dict(make_learner=counts), 'make_learner must give the same initial weights'),
    (dict(make_learner=no_learner), 'make_learner must return a Learner'),
    (dict(opts=['NAdam', 'Nadam']), "opts: no optimizer 'Nadam'"), (dict(opts=['__import__("os")']), 'opts: no optimizer'),
    (dict(opts=['NAdam(mom=1)']), 'mom must be in [0, 1), got 1.0'), (dict(opts=[]), 'opts must have one value or more'),
    (dict(opts=['Adam', Adam]), 'opts has a value twice: Adam, Adam'), (dict(opts=[print]), 'opts: print makes no optimizer'),
    (dict(lrs=[]), 'lrs must have one value or more'), (dict(lrs=[0.]), 'lrs must be above 0'), (dict(lrs=[math.nan]), 'lr'), (dict(lrs=[-1]), 'lr must be'),
    (dict(lrs=[.1, .1]), 'lrs has a value twice'), (dict(epochs=0), 'epochs must be a whole number from 1, got 0'), (dict(seeds=0), 'seeds must be'),
    (dict(seeds=[-1]), 'seeds must be a whole number from 0'), (dict(metric='f1'), "metric must be one of mse, valid_loss, got 'f1'"),
    (dict(n_workers=-1), 'n_workers must be')], ids=str)
def test_what_cannot_be_compared_is_refused(changed, msg, tmp_path):
    out = tmp_path/'out'
    with pytest.raises(ValueError) as e: compare_opts(**{**dict(make_learner=tiny), **small, 'out': out, **changed})
    assert msg in str(e.value) and not out.exists()

@pytest.mark.parametrize('changed', [dict(lrs=[1e-2]), dict(epochs=3), dict(seeds=4), dict(task='other'), dict(opts=['Adam']), dict(metric='valid_loss'),
    dict(make_learner=lambda opt_func: Learner(dls(), nn.Linear(4, 1), MSELossFlat(), opt_func, metrics=mse))], ids=str)
def test_the_folder_of_another_comparison_is_refused(changed, tmp_path):
    kw = {**small, 'lrs': [1e-2, 1e-1], 'seeds': 1, 'make_learner': tiny, 'opts': ['NAdam'], 'task': 'tiny', 'epochs': 1, 'out': tmp_path}
    compare_opts(**kw)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(ValueError, match='has another comparison'): compare_opts(**{**kw, **changed})
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before

def test_other_folders_are_refused(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'results.csv').write_text('mine')
    (tmp_path/'file').touch()
    for out,msg in (('a', 'has no results of a comparison'), ('file', 'out must be a folder'), ('file/below', 'out: cannot make')):
        with pytest.raises(ValueError, match=msg): compare_opts(tiny, **small, out=tmp_path/out)
    assert (tmp_path/'a'/'results.csv').read_text() == 'mine' and [f.name for f in (tmp_path/'a').iterdir()] == ['results.csv']
    with pytest.raises(ValueError, match='two or more'): summarize(compare_opts(tiny, ['Adam'], [1e-2], 1, 1))
    with pytest.raises(ValueError, match="baseline must be one of Adam, got 'SGD'"): summarize(compare_opts(tiny, ['Adam'], [1e-2], 1, 2), baseline='SGD')

# The command

@pytest.mark.parametrize('args, msg', [
    ('--task digit', "task must be one of digits, tabular, text, imagenette, imagewoof, or a folder of images, got 'digit'"), ('--opts NAdam,SGDD', "no optimizer 'SGDD'"),
    ('--opts NAdam(epps=1)', "unexpected keyword argument 'epps'"), ('--metric f1', 'metric must be one of accuracy, valid_loss'), ('--seeds 1', 'seeds must be a whole number from 2'),
    ('--lrs fast', "lrs must be numbers separated by commas, got 'fast'"), ('--lrs 0', 'lrs must be above 0'), ('--epochs 0', 'epochs must be a whole number from 1'),
    ('--baseline SGD', "baseline must be one of NAdam, Adam, got 'SGD'"), ('--width 0', 'width must be a whole number from 1'), ('--size 32', 'for a folder of images'),
    ('--n_workers -1', 'n_workers must be'), ('--task {tmp}', "has no folder 'train'"), ('--quik', 'unrecognized arguments: --quik'), ('--seeds many', 'invalid int value')])
def test_bad_input_is_one_line_and_nothing_is_written(args, msg, tmp_path, capsys):
    (tmp_path/'images').mkdir()
    try: rc = main([*(o.replace('{tmp}', str(tmp_path/'images')) for o in args.split()), '--quick', '--out', str(tmp_path/'out')])
    except SystemExit as e: rc = e.code
    out, err = capsys.readouterr()
    assert rc == 2 and msg in err and err.count('\n') == 1 and err.startswith('nadam-compare: ') and not out
    assert [o.name for o in tmp_path.iterdir()] == ['images']

def command(out, *args):
    return [sys.executable, '-m', 'fastai_nadam.compare', '--task', 'tabular', '--quick', '--out', str(out), *args]

def test_a_killed_command_goes_on_where_it_was(tmp_path):
    out = tmp_path/'out'
    p = subprocess.Popen(command(out, '--n_workers', '2', '--epochs', '3'), cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 120
    while not (out/'results.csv').exists() and time.time() < end and p.poll() is None: time.sleep(0.05)
    p.kill()
    p.communicate(timeout=30) # the workers end too, else their pipes stay open
    df, _ = read_results(out)
    assert 0 < len(df) < 16*3
    assert (df.groupby(['opt', 'lr', 'seed']).size() == 3).all()
    p = subprocess.run(command(out, '--n_workers', '0', '--epochs', '3'), cwd=root, capture_output=True, text=True)
    assert p.returncode == 0 and not p.stderr, p.stderr
    assert 'runs, about 0 s left' in p.stdout and 'lr within a point' in p.stdout
    assert p.stdout.rstrip('\n').split('\n')[-1] == sentence(summarize(read_results(out)[0]))
    assert sorted(f.name for f in out.iterdir()) == ['results.csv', 'results.png', 'settings.json']
    after = read_results(out)[0]
    key = ['opt', 'lr', 'seed', 'epoch']
    assert len(after) == 16*3 and df.merge(after, on=list(df.columns)).shape == df.shape

@pytest.mark.parametrize('task', c.tasks)
def test_tasks_train(task):
    "Better than always giving the most frequent answer"
    t = c.tasks[task]
    df = compare_opts(t['make_learner'], ['NAdam'], [t['lrs'][1]], t['epochs'], [0])
    assert df.metric.iloc[-1] > dict(digits=0.8, tabular=0.9, text=0.2)[task]
    numel = [sum(p.numel() for p in t['make_learner'](NAdam, width=w).model.parameters()) for w in (1, 2)]
    assert numel[1] > 1.5*numel[0]

def test_a_folder_of_images(tmp_path):
    from fastai_nadam.data import digits_path
    for f in digits_path().glob('*/[38]/*[05].png'):
        to = tmp_path/'images'/f.relative_to(digits_path())
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(f.read_bytes())
    args = ['--task', str(tmp_path/'images'), '--size', '8', '--bs', '16', '--opts', 'NAdam,Adam', '--lrs', '1e-2', '--epochs', '1', '--seeds', '2', '--n_workers', '0']
    assert main([*args, '--out', str(tmp_path/'out')]) == 0
    df, settings = read_results(tmp_path/'out')
    assert settings['task'] == f"{tmp_path/'images'}, size 8, bs 16" and len(df) == 4
