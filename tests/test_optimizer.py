"The contracts of the factories, of hypers and of state, in every implementation"
import io
from collections import defaultdict
from copy import deepcopy
from functools import partial

import numpy as np, pytest, torch
from fastai.optimizer import Adam, Lookahead, RAdam
from fastcore.foundation import L
from torch import nn
from fastai_nadam import DozatNAdam, NAdam
from helpers import same, snapshot
from impls import each_impl, with_impl

def model(): return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))

def groups(m): return [list(m[0].parameters()), list(m[1].parameters()), list(m[2].parameters())]

def train(m, opt, n=3):
    for _ in range(n):
        m(torch.randn(8, 4)).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()

def values(m): return [p.detach().clone() for p in m.parameters()]

both = pytest.mark.parametrize('opt_func', [NAdam, DozatNAdam])

# hypers

@both
@pytest.mark.parametrize('k,v', [('mom', 1.0), ('mom', -1e-08), ('sqr_mom', 1.5), ('sqr_mom', float('nan')),
    ('lr', -0.1), ('eps', -1e-08), ('wd', -2.0), ('lr', float('inf')), ('lr', 'big')])
def test_bad_hypers(opt_func, k, v):
    m = model()
    with pytest.raises(ValueError, match=k) as e: opt_func(m.parameters(), **{'lr': 0.1, k: v})
    assert repr(v) in str(e.value)

def test_bad_mom_decay():
    with pytest.raises(ValueError, match='mom_decay.*-1.0'): DozatNAdam(model().parameters(), 0.1, mom_decay=-1)
    opt = DozatNAdam(model().parameters(), 0.1, mom_decay=None)
    assert opt.hypers[0]['mom_decay'] == float('inf')

def test_set_hypers_forms():
    opt = NAdam(groups(model()), slice(1e-4, 1e-2))
    assert list(opt.hypers.itemgot('lr')) == pytest.approx([1e-4, 1e-3, 1e-2])
    opt.set_hypers(lr=slice(1.), wd=[0, np.float64(0.1), torch.tensor(0.5)], mom=np.float32(0.5))
    want = dict(lr=[0.1, 0.1, 1.], mom=[0.5]*3, wd=[0, 0.1, 0.5])
    assert {k: list(opt.hypers.itemgot(k)) for k in want} == want
    assert all(type(v) is float for h in opt.hypers for v in h.values())

@both
@pytest.mark.parametrize('value', [1e-2, np.array(1e-2), np.float32(1e-2), torch.tensor(1e-2), np.array([1e-2])],
    ids=repr)
def test_hypers_that_are_scalars_of_any_kind(opt_func, value):
    "Without a dimension, or with one"
    for ps in (groups(model()), list(model().parameters())):
        opt = opt_func(ps, value)
        opt.set_hypers(wd=value)
        opt.set_hypers(eps=value)
        hypers = [dict(h, wd=value) for h in opt.hypers]
        if not np.ndim(value): opt.load_state_dict(dict(opt.state_dict(), hypers=hypers))
        for h in opt.hypers:
            for k in ('lr', 'wd', 'eps'): assert type(h[k]) is float and h[k] == pytest.approx(1e-2)

def test_hypers_of_other_shapes_are_refused():
    for value in (np.ones(2), np.ones((1, 2)), torch.ones(2)):
        with pytest.raises((AssertionError, ValueError)): NAdam(groups(model()), value)

@both
@each_impl
def test_printed(impl, opt_func):
    "Rule, implementation, groups and hypers; in any state, also with lazy parameters and hypers of other kinds"
    opt = with_impl(opt_func, groups(model()), impl, lr=slice(1e-3, 1e-2))
    opt.freeze()
    opt.hypers[0]['note'] = 'x'
    lines = str(opt).splitlines()
    assert len(lines) == 4 and opt.rule.__name__ in lines[0] and f'stepped by {opt.impl}' in lines[0]
    assert 'decoupled' in lines[0] and '2 tensors, 30 elements, frozen' in lines[1] and 'lr 0.01' in lines[3]
    assert 'frozen' not in lines[3] and 'note x' in lines[1]
    assert 'L2' in repr(NAdam(nn.LazyLinear(3).parameters(), 0.1, decouple_wd=False))

# parameters and gradients

@pytest.mark.parametrize('params,error,says',
    [([], ValueError, 'empty'), ([[], []], ValueError, 'empty'), (iter([]), ValueError, 'empty'),
    (dict(model().named_parameters()).items(), TypeError, 'model.parameters'),
    (list(model().named_parameters()), TypeError, 'model.parameters'),
    ([{'params': list(model().parameters())}], TypeError, 'model.parameters'), ({'params': []}, TypeError, 'dict'),
    (model(), TypeError, 'model.parameters'),
    (None, TypeError, 'NoneType'), ([1.], TypeError, 'float'), ([torch.zeros(2), [torch.zeros(2)]], TypeError, 'list'),
    ([torch.zeros(2, 3, dtype=torch.complex64)], ValueError, r'complex.*\(2, 3\)'),
    ([[nn.Parameter(torch.zeros(2))]*2], ValueError, 'twice')])
@both
def test_bad_params(opt_func, params, error, says):
    with pytest.raises(error, match=says): opt_func(params, 0.1)

def test_forms_of_params():
    m = model()
    n = lambda ps: [len(pg) for pg in NAdam(ps, 0.1).param_lists]
    assert n(m.parameters()) == n(L(m.parameters())) == n(list(m.parameters())) == [6]
    assert n(groups(m)) == n(L(L(o) for o in groups(m))) == [2, 2, 2]
    assert n(map(tuple, groups(m))) == n([o.parameters() for o in m]) == [2, 2, 2]
    assert n(m[0].weight) == [1] and n([[m[0].weight], []]) == [1, 0]

@each_impl
@both
def test_sparse_gradient(impl, opt_func):
    dense, emb = nn.Linear(3, 2), nn.Embedding(10, 3, sparse=True)
    opt = with_impl(opt_func, [*dense.parameters(), *emb.parameters()], impl, lr=0.1, wd=0.1)
    for p in dense.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    emb(torch.tensor([1, 2])).sum().backward()
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r'\(10, 3\).*torch.sparse_coo: sparse gradients are not supported'): opt.step()
    assert same(before, snapshot(opt))

# freezing and weight decay

@each_impl
@both
@pytest.mark.parametrize('wrap', [lambda o: o, partial(Lookahead, k=2)])
def test_frozen_does_not_move(impl, opt_func, wrap):
    m = model()
    opt = wrap(with_impl(opt_func, groups(m), impl, lr=0.1, wd=0.1))
    train(m, opt)
    opt.freeze()
    opt.clear_state()  # as Learner.freeze does; Lookahead's slow weights begin anew
    before = values(m)
    train(m, opt)
    moved = [not torch.equal(a, b) for a,b in zip(before, values(m))]
    assert moved == [False]*4 + [True]*2
    assert m[0].weight.grad is not None  # the trap: its gradient is still there
    opt.unfreeze()
    train(m, opt)
    assert all(not torch.equal(a, b) for a,b in zip(before, values(m)))

@each_impl
def test_force_train(impl):
    m = model()
    opt = with_impl(NAdam, groups(m), impl, lr=0.1, wd=0.1)
    for p in m[1].parameters(): opt.state[p]['force_train'] = True
    opt.freeze()
    before = values(m)
    train(m, opt)
    assert [not torch.equal(a, b) for a,b in zip(before, values(m))] == [False]*2 + [True]*4
    opt.clear_state()
    assert all(opt.state[p] == {'force_train': True} for p in m[1].parameters())

@each_impl
@pytest.mark.parametrize('decouple_wd', [True, False])
def test_do_wd(impl, decouple_wd):
    "Where it is False nothing decays, decoupled or L2, also when it changes; L2 stands in the gradient, as in fastai"
    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    opt = with_impl(NAdam, [p, q], impl, lr=0.1, wd=0.5, decouple_wd=decouple_wd)
    opt.state[p]['do_wd'] = False
    for i in range(8):
        if i == 4: opt.state[p]['do_wd'], opt.state[q]['do_wd'] = True, False
        a, b = (o.detach().clone() for o in (p, q))
        p.grad, q.grad = torch.zeros(4), torch.zeros(4)
        opt.step()
        exempt, decayed = ((p, q), (q, p))[i >= 4]
        assert not exempt.grad.any()
        if decouple_wd:
            torch.testing.assert_close(decayed.detach(), (b, a)[i >= 4]*(1-0.1*0.5))
            if i < 4: assert torch.equal(p, a)
        else: torch.testing.assert_close(decayed.grad, 0.5*(b, a)[i >= 4])

# saving and loading

@each_impl
@both
def test_resumes_exactly(impl, opt_func):
    m = model()
    opt = with_impl(opt_func, groups(m), impl, lr=0.1, wd=0.1)
    opt.state[m[0].bias]['do_wd'] = False
    train(m, opt)
    opt.set_hypers(mom=np.float64(0.8), lr=slice(np.float64(0.01), 0.1))
    buf = io.BytesIO()
    torch.save(opt.state_dict(), buf)
    buf.seek(0)
    sd = torch.load(buf, weights_only=True)
    m2 = deepcopy(m)
    opt2 = with_impl(opt_func, groups(m2), impl, lr=9., wd=0.)
    opt2.load_state_dict(sd)
    assert isinstance(opt2.state, defaultdict) and isinstance(opt2.hypers, L)
    for x,o in ((m, opt), (m2, opt2)):
        torch.manual_seed(0)
        train(x, o)
    for a,b in zip(values(m), values(m2)): assert torch.equal(a, b)

@each_impl
@pytest.mark.parametrize('source', [Adam, RAdam])
@both
def test_loads_fastai_checkpoints(impl, opt_func, source):
    "The running products are taken as powers, hypers that are missing stay, and flags come along"
    m = model()
    other = source(groups(m), 0.1, mom=0.8, sqr_mom=0.95)
    other.state[m[0].bias]['do_wd'] = False
    train(m, other, 4)
    sd = other.state_dict()
    for h in sd['hypers']: h.pop('wd')
    opt = with_impl(opt_func, groups(m), impl, lr=9., wd=0.3)
    opt.load_state_dict(sd)
    s, h = opt.state[m[0].bias], opt.hypers[0]
    assert h['lr'] == 0.1 and h['mom'] == 0.8 and h['wd'] == 0.3 and s['do_wd'] is False and s['step'] == 4
    assert s['sqr_mom_prod'] == pytest.approx(0.95**4)
    mu = np.prod([0.8*(1 - 0.5*0.96**(t*0.004)) for t in range(1, 5)])
    assert s['mom_prod' if opt_func is NAdam else 'mu_prod'] == pytest.approx(0.8**4 if opt_func is NAdam else mu)
    torch.testing.assert_close(s['grad_avg'], other.state[m[0].bias]['grad_avg'])
    train(m, opt)

@both
def test_a_step_beyond_counting_loads_at_once(opt_func):
    p = nn.Parameter(torch.randn(2))
    for psi in ((4e-3, 0., 1e-9, 0.02, 3., None) if opt_func is DozatNAdam else (None,)):
        opt = opt_func([p], 0.1, **(dict(mom_decay=psi) if opt_func is DozatNAdam else {}))
        opt.load_state_dict(dict(hypers=[dict(mom=1-1e-12)],
            state=[dict(grad_avg=torch.ones(2), sqr_avg=torch.ones(2), step=10**15)]))
        assert opt.state[p]['mom_prod' if opt_func is NAdam else 'mu_prod'] == 0

def test_from_one_rule_to_the_other():
    m = model()
    a, b = NAdam(m.parameters(), 0.1), DozatNAdam(m.parameters(), 0.1)
    train(m, a)
    b.load_state_dict(a.state_dict())
    s = b.state[m[0].weight]
    mus = [0.9*(1 - 0.5*0.96**(t*0.004)) for t in range(1, 4)]
    assert 'mom_prod' not in s and s['mu_prod'] == pytest.approx(np.prod(mus))

def test_loading_casts_to_the_parameters():
    m = model()
    opt = NAdam(m.parameters(), 0.1)
    train(m, opt)
    m2 = deepcopy(m).double()
    opt2 = NAdam(m2.parameters(), 0.1)
    opt2.load_state_dict(opt.state_dict())
    assert all(opt2.state[p]['grad_avg'].dtype == torch.float64 for p in m2.parameters())
    half = opt2.state_dict()
    half['state'] = [{k: v.half() if torch.is_tensor(v) else v for k,v in s.items()} for s in half['state']]
    opt.load_state_dict(half)
    assert all(opt.state[p]['sqr_avg'].dtype == torch.float32 for p in m.parameters())

def broken(sd, i, **kwargs):
    sd = deepcopy(sd)
    for k,v in kwargs.items():
        if v is None: del sd['state'][i][k]
        else: sd['state'][i][k] = v
    return sd

@each_impl
@both
def test_refused_checkpoints(impl, opt_func):
    m = model()
    opt = with_impl(opt_func, groups(m), impl, lr=0.1)
    train(m, opt)
    sd, before = opt.state_dict(), snapshot(opt)
    cases = [({}, 'hypers'), ([], 'list'), (dict(sd, state=sd['state'][:-1]), '5 parameters.*6'),
        (dict(hypers=sd['hypers']), r"state_dict must have 'state' and 'hypers', got \['hypers'\]"),
        (dict(sd, hypers=sd['hypers'][:2]), '2 parameter groups.*3'),
        (dict(sd, state={0: 1}), 'state'),
        (broken(sd, 2, grad_avg=torch.zeros(9)), r'parameter 2.*\(6,\).*grad_avg.*\(9,\)'),
        (broken(sd, 5, sqr_avg=None), r"parameter 5, of shape \(1,\): missing \['sqr_avg'\]"),
        (broken(sd, 5, step=None), r"parameter 5, of shape \(1,\): missing \['step'\]"),
        (broken(sd, 1, grad_avg=None, sqr_avg=None, step=None), r"missing \['grad_avg', 'sqr_avg', 'step'\]"),
        (broken(sd, 1, step=-1), 'step.*-1'),
        (broken(sd, 1, step=2.5), 'step.*2.5'), (broken(sd, 1, step='x'), 'step.*x'),
        (broken(sd, 1, step=float('inf')), 'step.*inf'), (broken(sd, 1, step=torch.ones(2)), 'step'),
        (broken(sd, 1, sqr_mom_prod='y'), 'sqr_mom_prod.*y'), (broken(sd, 1, step=10**400), 'step'),
        (broken(sd, 0, grad_avg=torch.zeros(6, 4).int()),
            r'parameter 0, of shape .*: grad_avg must be a floating-point tensor, got torch.int32'),
        (broken(sd, 0, sqr_avg=3.), 'parameter 0.*sqr_avg'), (broken(sd, 0, sqr_mom_prod=7.), 'sqr_mom_prod.*7.0'),
        (dict(sd, hypers=[dict(h, mom=1.) for h in sd['hypers']]), 'mom.*1.0'),
        (torch.optim.NAdam(m.parameters()).state_dict(), 'param_groups')]
    for bad,says in cases:
        with pytest.raises(ValueError, match=says): opt.load_state_dict(bad)
        assert same(before, snapshot(opt))
