"Whatever is thrown at the optimizer, it works or is refused with a word on why, and a refusal changes nothing"
import ast, inspect, math, os, re
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from fastai_nadam import DozatNAdam, NAdam
from fastai_nadam.tools import bench, compare, train
from fastai_nadam.interop import from_torch
from helpers import all_params, same, set_grads, snapshot, twin
from impls import each_impl, with_impl

def fuzz(n, **kwargs):
    n *= int(os.environ.get('NADAM_FUZZ', 1))  # for a long search
    only = settings(max_examples=n, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    return lambda f: only(given(**kwargs)(f))

opt_funcs = st.sampled_from([NAdam, DozatNAdam, partial(NAdam, nesterov=False), partial(NAdam, decouple_wd=False)])
seeds = st.integers(0, 2**32)
shapes = st.lists(st.sampled_from([(), (1,), (5,), (3, 4), (0, 2), (2, 1, 3), (70, 1000)]), min_size=2, max_size=5)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])

# Values that have no business being a hyper, or may be one
numbers = st.one_of(st.floats(max_value=1e30), st.integers(-3, 3),
    st.sampled_from([0.9, 0.99, 1e-8, 1., -0., -1e-8, math.nan, math.inf, 10**400, True]))
scalars = st.one_of(numbers, st.floats(max_value=2.**100, width=32).map(np.float32),
    st.floats(max_value=2.**100, width=32).map(torch.tensor))
junk = st.one_of(scalars, st.none(), st.text(max_size=3), st.binary(max_size=3), st.complex_numbers(),
    st.sampled_from([[math.nan], [], [[0.5]], {}, {'mom': 1}, object, np.zeros(2), torch.zeros(3), torch.zeros(0),
        torch.tensor(1j), torch.zeros(2, 2), 'nan', '0.9', b'0.9', slice(None), np.datetime64('nat')]))
hyper_names = ('lr', 'mom', 'sqr_mom', 'eps', 'wd', 'mom_decay')

def groups(ps): return [ps[:1], ps[1:]]

def make(opt_func, impl, shapes=((3, 2), (4,), ()), dtype=torch.float32, n_steps=2):
    "Parameters in two groups, the last exempt from weight decay, and their optimizer after some steps"
    ps = [nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
    opt = with_impl(opt_func, groups(ps), impl, lr=0.01, wd=0.1)
    opt.state[ps[-1]]['do_wd'] = False
    for i in range(n_steps):
        set_grads(ps, seed=i)
        opt.step()
    return ps, opt

def assert_same_run(ps, opt, other):
    "Both go on alike"
    qs = all_params(other)
    for i in range(2):
        for xs,o in ((ps, opt), (qs, other)):
            set_grads(xs, seed=100+i)
            o.step()
    assert same(snapshot(opt), snapshot(other))

# NaN and Inf

@each_impl
@fuzz(10, opt_func=opt_funcs, shapes=shapes, dtype=dtypes, bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    seed=seeds, data=st.data())
def test_a_bad_gradient_stays_where_it_is(impl, opt_func, shapes, dtype, bad, seed, data):
    "Neither another parameter nor another element of the same one notices"
    torch.manual_seed(seed)
    ps, opt = make(opt_func, impl, shapes, dtype)
    other = twin(opt, impl)
    sizes = [p.numel() for p in ps]
    i = data.draw(st.integers(0, len(ps)-1).filter(lambda i: sizes[i]) if any(sizes) else st.just(0), label='parameter')
    j = data.draw(st.integers(0, max(sizes[i]-1, 0)), label='element')
    for step in range(3):
        set_grads(ps, seed=seed+step)
        set_grads(all_params(other), seed=seed+step)
        if step == 0 and sizes[i]: ps[i].grad.view(-1)[j] = bad
        opt.step()
        other.step()
    def without(snap):
        for ts in (snap[0], snap[1]): ts[i].view(-1)[j:j+1] = 0
        for k in ('grad_avg', 'sqr_avg'): snap[2][i][k].view(-1)[j:j+1] = 0
        return snap
    if sizes[i]: assert not ps[i].detach().view(-1)[j].isfinite()
    assert same(without(snapshot(opt)), without(snapshot(other)))

# Hypers

def allowed(k, v): return 0 <= v < 1 if k in ('mom', 'sqr_mom') else v >= 0 if k == 'mom_decay' else 0 <= v < math.inf

@fuzz(150, opt_func=st.sampled_from([NAdam, DozatNAdam]),
    kwargs=st.dictionaries(st.sampled_from(hyper_names), junk, min_size=1, max_size=3))
def test_factories(opt_func, kwargs):
    "What is accepted is a float in its range; what is not is named"
    if opt_func is NAdam: kwargs.pop('mom_decay', None)
    p = nn.Parameter(torch.ones(2))
    try: opt = opt_func([p], **{'lr': 0.1, **kwargs})
    except (ValueError, AssertionError) as e:
        assert any(k in str(e) for k in kwargs), e
        return
    except TypeError:  # of fastai, which spreads the values of a slice
        assert any(isinstance(v, slice) for v in kwargs.values())
        return
    for k,v in opt.hypers[0].items(): assert type(v) is float and allowed(k, v)
    p.grad = torch.tensor([1., -1.])
    opt.step()

bad_params = st.recursive(st.one_of(st.none(), st.integers(), st.text(max_size=2),
        st.sampled_from([np.zeros(2), int, nn.Linear(1, 1), torch.zeros(2, dtype=torch.complex64), torch.zeros(2)])),
    lambda o: st.one_of(st.lists(o, max_size=3), st.tuples(o, o), st.dictionaries(st.text(max_size=2), o, max_size=2)),
    max_leaves=5)

@fuzz(100, params=bad_params, opt_func=opt_funcs)
def test_factories_params(params, opt_func):
    try: opt = opt_func(params, 0.1)
    except (TypeError, ValueError) as e: assert 'param' in str(e)
    else: assert all(torch.is_tensor(p) and not p.is_complex() for pg in opt.param_lists for p in pg)

values = st.one_of(junk, st.lists(scalars, max_size=4), st.builds(slice, scalars), st.builds(slice, scalars, scalars))

@fuzz(100, opt_func=opt_funcs, kwargs=st.dictionaries(st.sampled_from(hyper_names), values, min_size=1, max_size=4))
def test_set_hypers(opt_func, kwargs):
    "All are set or none"
    ps, opt = make(opt_func, {}, n_steps=1)
    before = snapshot(opt)
    try: opt.set_hypers(**kwargs)
    except (ValueError, AssertionError): assert same(before, snapshot(opt))
    except (TypeError, ArithmeticError):  # of fastai, which spreads the values of a slice
        assert any(isinstance(v, slice) for v in kwargs.values()) and same(before, snapshot(opt))
    else:
        for h in opt.hypers:
            for k,v in h.items(): assert type(v) is float and allowed(k, v)
        set_grads(ps)
        opt.step()

@each_impl
@fuzz(20, opt_func=opt_funcs, k=st.sampled_from(hyper_names[:5]), group=st.integers(0, 1), seed=seeds,
    bad=st.one_of(st.floats(max_value=-1e-300),
        st.sampled_from([math.nan, math.inf, 10**400, None, 'x', np.float64(-1), torch.tensor(math.nan),
            torch.ones(2)])))
def test_hypers_that_become_invalid(impl, opt_func, k, bad, group, seed):
    "Written past every check, they are refused by `step`, by name; without them the run goes on as if nothing had been"
    torch.manual_seed(seed)
    ps, opt = make(opt_func, impl)
    other = twin(opt, impl)
    good, opt.hypers[group][k] = opt.hypers[group][k], bad
    set_grads(ps, seed=seed)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=rf'\b{k} must be'): opt.step()
    assert same(before, snapshot(opt))
    opt.hypers[group][k] = good
    assert_same_run(ps, opt, other)

# A refused step

def sparse(p, opt): p.grad = torch.zeros(p.shape).to_sparse()
def reshaped(p, opt): p.data = torch.zeros(7, 7)
def bad_avg(p, opt): opt.state[p]['grad_avg'] = torch.zeros(9)
def bad_sqr(p, opt): opt.state[p]['sqr_avg'] = torch.zeros(9)

@each_impl
@fuzz(10, opt_func=opt_funcs, i=st.integers(0, 2), harm=st.sampled_from([sparse, reshaped, bad_avg, bad_sqr]),
    seed=seeds)
def test_a_refused_step(impl, opt_func, i, harm, seed):
    "Nothing has been decayed, averaged or counted, in any group"
    torch.manual_seed(seed)
    ps, opt = make(opt_func, impl)
    other = twin(opt, impl)
    set_grads(ps, seed=seed)
    data, state = ps[i].data, dict(opt.state[ps[i]])
    harm(ps[i], opt)
    before = snapshot(opt)
    with pytest.raises(ValueError, match='shape'): opt.step()
    assert same(before, snapshot(opt))
    ps[i].data, ps[i].grad = data, None
    opt.state[ps[i]].update(state)
    assert_same_run(ps, opt, other)

# A refused checkpoint

def nodes(o, path=()):
    "The places in nested dicts and lists"
    yield path
    for k,v in (o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ()):
        yield from nodes(v, (*path, k))

def at(o, path):
    for k in path: o = o[k]
    return o

tensors = st.sampled_from([torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.complex64),
    torch.full((3, 2), math.nan), torch.zeros(2, 3), torch.zeros(()),
    torch.zeros(3, 2).to_sparse(), torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.float16)])

@st.composite
def mutations(draw, sd):
    "A state dict with one to three things broken"
    sd = deepcopy(sd)
    for _ in range(draw(st.integers(1, 3))):
        *path, k = draw(st.sampled_from([o for o in nodes(sd) if o]))
        o = at(sd, path)
        how = draw(st.sampled_from(['replace', 'remove', 'repeat', 'add']))
        if how == 'remove': del o[k]
        elif how == 'repeat' and isinstance(o, list): o.append(deepcopy(o[k]))
        elif how == 'add' and isinstance(o, dict):
            k = draw(st.sampled_from(['grad_avg', 'sqr_avg', 'step', 'do_wd', 'mom_prod', 'mu_prod', 'x', 3]))
            o[k] = draw(st.one_of(junk, tensors))
        else: o[k] = draw(st.one_of(junk, tensors))
        if not any(nodes(sd)): break
    return sd

@each_impl
@fuzz(30, opt_func=st.sampled_from([NAdam, DozatNAdam]), n_steps=st.integers(0, 2), seed=seeds, data=st.data())
def test_broken_checkpoints(impl, opt_func, n_steps, seed, data):
    "Either the optimizer can go on with it, or it is a `ValueError` and the run goes on as before"
    torch.manual_seed(seed)
    ps, opt = make(opt_func, impl)
    other = twin(opt, impl)
    sd = data.draw(mutations(make(opt_func, impl, n_steps=n_steps)[1].state_dict()))
    before = snapshot(opt)
    try: opt.load_state_dict(sd)
    except ValueError:
        assert same(before, snapshot(opt))
        assert_same_run(ps, opt, other)
    else:
        for h in opt.hypers:
            for k,v in h.items(): assert type(v) is float and allowed(k, v)
        set_grads(ps)
        opt.step()
        for p in ps: assert opt.state[p]['grad_avg'].dtype == p.dtype and opt.state[p]['grad_avg'].shape == p.shape

@fuzz(50, seed=seeds, data=st.data())
def test_broken_torch_optimizers(seed, data):
    torch.manual_seed(seed)
    ps = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    torch_opt = torch.optim.NAdam(ps)
    set_grads(ps)
    torch_opt.step()
    state = torch_opt.state[data.draw(st.sampled_from(ps))]
    k = data.draw(st.sampled_from(sorted(state)))
    if data.draw(st.booleans()): del state[k]
    else: state[k] = data.draw(st.one_of(junk, tensors))
    try: opt = from_torch(torch_opt)
    except (TypeError, ValueError): return
    set_grads(ps)
    opt.step()

# The command line

class Trains(Exception): pass

junk = st.one_of(st.text(max_size=20), st.integers().map(str), st.floats().map(str),
    st.sampled_from(['digits', 'NAdam', '64', '1e-3', '', '-', '--', '~', '/', '.', '\0', 'a\nb']))

options = st.sampled_from([f'--{k}' for k in inspect.signature(train.train).parameters])

@fuzz(80, args=st.lists(st.one_of(st.tuples(options, junk), st.tuples(junk)), max_size=4))
def test_command_line(tmp_path, monkeypatch, args):
    "Whatever is typed, it trains, or one line says what is wrong and nothing is written"
    monkeypatch.chdir(tmp_path)
    def trains(*args): raise Trains
    for f in ('data_path', 'suggest_lr', 'new_learner'): monkeypatch.setattr(train, f, trains)
    args, out, err = [o for pair in args for o in pair if o not in ('-h', '--help')], StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try: code = train.main(args)
        except SystemExit as e: code = e.code
        except Trains: code = None
    assert not list(tmp_path.iterdir())
    if code is None: return
    out, err = out.getvalue(), err.getvalue()
    assert code == 2 and err.startswith('nadam-train: ') and err.count('\n') == 1 and not out, (args, err)

# Files

def test_no_untrusted_pickle_is_read():
    "Every `torch.load` of the package is in torch's safe mode, and nothing else unpickles"
    for f in (Path(__file__).parent.parent/'fastai_nadam').rglob('*.py'):
        tree = ast.parse(f.read_text(encoding='utf-8'))
        for o in ast.walk(tree):
            if not isinstance(o, ast.Call): continue
            name, where = ast.unparse(o.func), f'{f.name}:{o.lineno}: {ast.unparse(o)}'
            if name == 'torch.load':
                assert any(k.arg == 'weights_only' and ast.unparse(k.value) == 'True' for k in o.keywords), where
            assert not re.search(r'(pickle|dill|joblib)\.(load|loads|Unpickler)$|\bload_learner$|\bload_model$',
                name), where

@pytest.mark.parametrize('name', ['results.csv', '.results.csv.part', 'settings.json', '.settings.json.part',
    'results.png', '.results.png.part'])
def test_compare_in_a_hostile_folder(name, tmp_path, capsys):
    "A link in place of any file that it writes is refused before anything is trained"
    (tmp_path/'victim').write_text('precious')
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/name).symlink_to('../victim')
    args = '--task=tabular --opts=Adam --lrs=1e-2 --epochs=1 --seeds=2 --n_workers=0'.split()
    assert compare.main([*args, f"--out={tmp_path/'out'}"]) == 2
    out, err = capsys.readouterr()
    assert err.count('\n') == 1 and f"out/{name}' is a link" in err
    assert [o.name for o in (tmp_path/'out').iterdir()] == [name] and (tmp_path/'victim').read_text() == 'precious'

@pytest.mark.parametrize('option,name', [('json', 'a.json'), ('plot', 'a.png')])
def test_bench_writes_through_no_link(option, name, tmp_path, capsys, monkeypatch):
    (tmp_path/'victim').write_text('precious')
    (tmp_path/name).symlink_to('victim')
    monkeypatch.setattr(bench, 'find_peers', lambda *args: pytest.fail('it measures'))
    assert bench.main([f'--{option}={tmp_path/name}']) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and f"{name}' is a link" in err and (tmp_path/'victim').read_text() == 'precious'
