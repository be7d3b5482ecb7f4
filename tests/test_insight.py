"The table, the trace and the update statistics say what optimizers really do, on every path, fastai's and torch's too"
import copy, math, pickle, random, sys, types
from functools import partial

import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, params
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.schedule import combined_cos, fit_one_cycle, lr_find
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import (Adam, Lamb, Larc, Lookahead, Optimizer, OptimWrapper, QHAdam, RAdam, RMSProp, SGD,
    average_grad, average_sqr_grad, ranger, step_stat)
from fastai_nadam.insight import StepTrace, UpdateStats, opt_table, plot_rule
from fastai_nadam.optimizer import DozatNAdam, NAdam, NAdamOptimizer
from fastai_nadam.rules import adam_rule, dozat_rule, ruder_rule
from fastai_nadam.steppers import dozat_step, nadam_step
from helpers import CPUPrecision, ReadOnly, ToBFloat16, set_grads
from impls import each_impl, with_impl

HYPERS = ['lr', 'mom', 'sqr_mom', 'eps', 'wd']
TRACE = 'step param lr mom sqr_mom mom_prod debias1 debias2 a b grad grad_avg sqr_avg num p_before p_wd p'.split()
STATS = ['step', 'param', 'update_ratio', 'grad_norm', 'cosine', 'wd_share']

def no_nesterov(p, **kwargs): return NAdam(p, nesterov=False, **kwargs)

def wrapped(torch_opt, **kw): return lambda p, **kwargs: OptimWrapper(p, partial(torch_opt, **kw), **kwargs)

FASTAI = dict(NAdam=NAdam, DozatNAdam=DozatNAdam, no_nesterov=no_nesterov, Adam=Adam, SGD=SGD,
    SGD_mom=partial(SGD, mom=0.9), RMSProp=RMSProp,
    RMSProp_mom=partial(RMSProp, mom=0.9), RAdam=RAdam, QHAdam=QHAdam, Larc=Larc, Lamb=Lamb, ranger=ranger,
    Lookahead=lambda p, **kw: Lookahead(NAdam(p, **kw)))
TORCH = {o.__name__: wrapped(o) for o in (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax)}
TORCH |= dict(SGD_mom=wrapped(torch.optim.SGD, momentum=0.9), RMSprop_mom=wrapped(torch.optim.RMSprop, momentum=0.9))
ALL = {**{f'fastai_{k}': v for k,v in FASTAI.items()}, **{f'torch_{k}': v for k,v in TORCH.items()}}
every_opt = pytest.mark.parametrize('opt_func', ALL.values(), ids=ALL.keys())

def net(): return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

def learner(opt_func=NAdam, bs=8, n=32, model=None, **kwargs):
    x = torch.randn(n, 4)
    ds = [*zip(x, x[:,:3].argmax(1))]
    res = Learner(DataLoaders.from_dsets(ds, ds[:bs], bs=bs, device='cpu', num_workers=0), model or net(),
        loss_func=CrossEntropyLossFlat(), opt_func=opt_func,
        splitter=kwargs.pop('splitter', lambda m: [params(m[:2]), params(m[2:])]), **kwargs)
    res.create_mbar,res.logger = False,lambda *a: None
    return res

def fit(learn, n=1, lr=1e-2, **kwargs):
    with learn.no_bar(): learn.fit(n, lr, **kwargs)
    return learn

def close(a, b, rtol=1e-5, atol=1e-7):
    np.testing.assert_allclose(*(np.asarray(o.detach().double() if isinstance(o, torch.Tensor) else o) for o in (a, b)),
        rtol=rtol, atol=atol)

# opt_table

def test_table_of_a_learner():
    learn = learner()
    t = opt_table(learn)
    assert learn.opt is None, "the table must not choose the optimizer of the next fit"
    assert list(t.columns) == ['group', 'shape', 'numel', *HYPERS, 'do_wd', 'force_train', 'trainable', 'step',
        'grad_avg', 'sqr_avg']
    assert list(t.index) == [n for n,_ in learn.model.named_parameters()]
    ps = list(learn.model.parameters())
    assert list(t['shape']) == [tuple(p.shape) for p in ps] and list(t.numel) == [p.numel() for p in ps]
    assert t[['step', 'grad_avg', 'sqr_avg']].isna().all(axis=None)
    assert list(t.group) == [0]*4 + [1]*2
    assert t.index[~t.do_wd].to_list() == ['0.bias', '1.weight', '1.bias', '3.bias']
    assert t.index[t.force_train].to_list() == ['1.weight', '1.bias'] and t.trainable.all()
    learn.freeze()
    frozen = learn.opt_table()
    assert frozen.index[~frozen.trainable].to_list() == ['0.weight', '0.bias']
    learn.unfreeze()
    fit(learn, lr=slice(1e-4, 1e-2))
    t = learn.opt_table()
    close(t.lr.to_numpy(), [1e-4]*4 + [1e-2]*2)
    assert (t.step == 4).all()
    for n,p in learn.model.named_parameters():
        for k in ('grad_avg', 'sqr_avg'): close(t[k][n], learn.opt.state[p][k].double().norm())
    pd.testing.assert_frame_equal(opt_table(learn.opt).reset_index(drop=True), t.reset_index(drop=True))
    assert list(opt_table(learn.opt).index) == [*range(6)]

@every_opt
def test_table_of_every_optimizer(opt_func):
    "Before the first step and after it. It reads only: also where state and hypers cannot change"
    learn = learner(opt_func)
    before = dict(vars(learn))
    never = opt_table(learn)
    assert vars(learn) == before and learn.opt is None
    assert len(never) == 6 and (never.step.fillna(0) == 0).all()
    assert never[['grad_avg', 'sqr_avg']].isna().all(axis=None)
    learn.create_opt()
    opt = learn.opt.opt if isinstance(learn.opt, Lookahead) else learn.opt
    both = (opt, opt.opt) if isinstance(opt, OptimWrapper) else (opt,)
    def states(): return [{p: dict(s) for p,s in o.state.items()} for o in both]
    before = states()
    pd.testing.assert_frame_equal(opt_table(learn), never)
    assert states() == before
    fit(learn)
    for o in both: o.state = ReadOnly({p: ReadOnly(s) for p,s in o.state.items()})
    if len(both) == 1: opt.hypers = [ReadOnly(h) for h in opt.hypers]
    t = opt_table(learn)
    assert [c for c in HYPERS if c in t] == [k for k in HYPERS if k in opt.hypers[0]]
    for (_,row),p in zip(t.iterrows(), learn.model.parameters()):
        s = both[-1].state.get(p, {})
        for col,keys in dict(grad_avg=('grad_avg', 'exp_avg'), sqr_avg=('sqr_avg', 'exp_avg_sq', 'square_avg')).items():
            v = next((s[k] for k in keys if k in s), None)
            if v is not None: close(row[col], v.double().norm())
            elif 'momentum_buffer' not in s: assert math.isnan(row[col])
        assert pd.isna(row.step) if 'step' not in s else row.step == 4
    assert t.force_train.sum() == 2

def test_torch_ignores_do_wd_and_the_table_says_so():
    "`do_wd=False` that Learner leaves in an OptimWrapper has no effect"
    learn = learner(wrapped(torch.optim.SGD, weight_decay=0.5))
    learn.create_opt()
    b = learn.model[3].bias
    assert learn.opt.state[b]['do_wd'] is False
    b.grad,before = torch.zeros_like(b),b.detach().clone()
    learn.opt.set_hypers(lr=0.1, wd=0.5)
    learn.opt.step()
    close(b, 0.95*before)
    assert learn.opt_table().do_wd.all()

def test_the_table_leaves_a_built_optimizer_its_state():
    m = net()
    built = torch.optim.AdamW(m.parameters(), lr=0.1)
    set_grads(m.parameters())
    built.step()
    learn = learner(OptimWrapper(opt=built), model=m)
    t = opt_table(learn)
    assert learn.opt is None and (t.step == 1).all() and list(t.index) == [n for n,_ in m.named_parameters()]
    assert all(built.state[p]['step'] == 1 for p in m.parameters())

def lazy_net(): return nn.Sequential(nn.LazyLinear(6), nn.BatchNorm1d(6), nn.ReLU(), nn.LazyLinear(3))

@every_opt
def test_lazy_layers(opt_func):
    "Layers that get their shapes with the first batch: in the table, a trace and the statistics"
    if opt_func is TORCH['Adagrad']: pytest.skip('starts its state when it is made, and needs shapes for that')
    learn,stats = learner(opt_func, model=lazy_net()),UpdateStats(every=1)
    t = opt_table(learn)
    assert t['shape'].isna().to_list() == t.numel.isna().to_list() == [True, True, False, False, True, True]
    assert t.numel.sum() == 12
    with StepTrace(learn) as trace: fit(learn, cbs=stats)
    t = opt_table(learn)
    assert t['shape'].to_list() == [tuple(p.shape) for p in learn.model.parameters()]
    assert t.numel.to_list() == [p.numel() for p in learn.model.parameters()]
    assert len(trace.table()) == len(stats.table()) == 4*6
    assert stats.weights == {'0.weight', '3.weight'}

@pytest.mark.parametrize('f', [opt_table, StepTrace])
@pytest.mark.parametrize('o', [3, None, 'opt', net(), torch.optim.SGD(net().parameters(), lr=1.)],
    ids=lambda o: type(o).__name__)
def test_no_optimizer(f, o):
    says = rf'opt must be a Learner, a fastai Optimizer, Lookahead or OptimWrapper, got {type(o).__name__}'
    with pytest.raises(TypeError, match=says): f(o)

# StepTrace

def composed(stepper):
    return lambda p, **kw: Optimizer(p, [partial(average_grad, dampening=True), average_sqr_grad, step_stat, stepper],
        eps=1e-8, wd=0., **kw)

# Optimizers of the family, in which the step can be computed from the columns
FAMILY = dict(Adam=Adam, Adam_L2=partial(Adam, decouple_wd=False), composed=composed(nadam_step),
    composed_dozat=composed(dozat_step), composed_rule=composed(partial(nadam_step, rule=dozat_rule, mom_decay=1.)),
    composed_adam=composed(partial(nadam_step, rule=adam_rule)),
    torch_Adam=wrapped(torch.optim.Adam), torch_AdamW=wrapped(torch.optim.AdamW),
    torch_AdamW_foreach=wrapped(torch.optim.AdamW, foreach=True),
    torch_NAdam=wrapped(torch.optim.NAdam), torch_NAdamW=wrapped(torch.optim.NAdam, decoupled_weight_decay=True,
        momentum_decay=1.))

def check_columns(opt_func):
    "p = p_wd − lr·(a·grad_avg + b·grad)/(√(sqr_avg/debias2) + eps) in every row: schedules, L2, do_wd=False"
    ps = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 4), (5,), ())]
    opt = opt_func([ps[:2], ps[2:]], lr=0.1)
    opt.state[ps[1]]['do_wd'] = False
    with StepTrace(opt) as trace:
        for i in range(5):
            opt.set_hypers(lr=[0.1, 0.1*(i+1)], mom=[0.9 - 0.1*i, 0.8], sqr_mom=[0.99, 0.9 + 0.01*i], wd=[0.1, 0.2])
            set_grads(ps)
            before,grads = [p.detach().clone() for p in ps],[p.grad.clone() for p in ps]
            opt.step()
            for (_,row),p,b in zip(trace.table().tail(3).iterrows(), ps, before):
                close(row.p_before, b, rtol=0, atol=0)
                close(row.p, p, rtol=0, atol=0)
    t = trace.table()
    assert t.step.to_list() == [s for s in range(1, 6) for _ in ps] and t.param.to_list() == [0, 1, 2]*5
    eps = opt.hypers[0]['eps']
    for r in t.itertuples():
        close(r.p, r.p_wd - r.lr*(r.a*r.grad_avg + r.b*r.grad)/((r.sqr_avg/r.debias2).sqrt() + eps), rtol=1e-5,
            atol=1e-6)
        close(r.num, r.mom*r.grad_avg + (1-r.mom)*r.grad, rtol=1e-9)
        close(r.debias1, 1 - r.mom_prod)

@pytest.mark.parametrize('opt_func', FAMILY.values(), ids=FAMILY.keys())
def test_the_step_follows_from_the_columns(opt_func): check_columns(opt_func)

@each_impl
@pytest.mark.parametrize('decouple_wd', [True, False], ids=['decoupled', 'L2'])
@pytest.mark.parametrize('opt_func', [NAdam, partial(DozatNAdam, mom_decay=1.), no_nesterov],
    ids=['NAdam', 'DozatNAdam', 'no_nesterov'])
def test_the_step_follows_from_the_columns_on_every_path(opt_func, decouple_wd, impl):
    check_columns(lambda p, lr: with_impl(opt_func, p, impl, lr=lr, decouple_wd=decouple_wd))

@every_opt
def test_trace_every_optimizer(opt_func):
    "Every optimizer gets all rows and the values that every optimizer has; what it does not have is NaN"
    learn = learner(opt_func)
    with StepTrace(learn) as trace: fit(learn)
    t = trace.table()
    assert list(t.columns) == TRACE and len(t) == 4*6
    assert t.param.to_list() == [n for n,_ in learn.model.named_parameters()]*4
    assert t.step.to_list() == [s for s in range(1, 5) for _ in range(6)]
    assert t[['lr', 'grad', 'p_before', 'p']].notna().all(axis=None)
    for (_,r),p in zip(t.tail(6).iterrows(), learn.model.parameters()):
        close(r.p, p, rtol=0, atol=0) if learn.opt.__class__ is not Lookahead else None
    has_avg = t.grad_avg.notna()
    assert (has_avg == t.num.notna()).all()
    assert (t.a.notna() == t.mom_prod.notna()).all()

def test_the_gradient_is_the_one_that_enters_the_averages():
    "With L2 decay, `grad` has wd·p in it, in fastai's optimizers, which add it in place, and in torch's, which do not"
    g,p0 = torch.tensor([0.3, -0.2]), torch.tensor([1., 2.])
    for f in (partial(NAdam, decouple_wd=False), partial(SGD, decouple_wd=False), wrapped(torch.optim.SGD),
        wrapped(torch.optim.Adam)):
        p = nn.Parameter(p0.clone())
        p.grad = g.clone()
        opt = f([p], lr=0.1)
        opt.set_hypers(wd=0.1)
        with StepTrace(opt) as trace: opt.step()
        r = trace.table().iloc[0]
        close(r.grad, g + 0.1*p0)
        close(r.p_wd, p0)

def test_unknown_decay_is_not_guessed():
    p = nn.Parameter(torch.ones(2))
    opt = OptimWrapper([p], torch.optim.Adagrad, lr=0.1, weight_decay=0.1)
    set_grads([p])
    with StepTrace(opt) as trace: opt.step()
    r = trace.table().iloc[0]
    assert torch.as_tensor(r.p_wd).isnan().all() and math.isnan(r.a) and r.step == 1

@each_impl
def test_what_is_not_stepped_has_no_row(impl):
    m = net()
    opt = with_impl(NAdam, [params(m[:2]), params(m[2:])], impl, lr=0.1)
    set_grads(m.parameters())
    opt.freeze()
    m[3].bias.grad = None
    with StepTrace(opt) as trace:
        opt.step()
        opt.unfreeze()
        opt.step()
    t = trace.table()
    assert t.param.to_list() == [4, 0, 1, 2, 3, 4] and t.step.to_list() == [1, 1, 1, 1, 1, 2]

@each_impl
def test_large_tensors_are_kept_as_norms(impl):
    ps = [nn.Parameter(torch.randn(1000, 1000)), nn.Parameter(torch.randn(101)), nn.Parameter(torch.randn(100))]
    opt = with_impl(NAdam, ps, impl, lr=10., wd=0.5) # 1 - lr*wd is negative: a norm is not
    set_grads(ps)
    with StepTrace(opt) as trace:
        for _ in range(3): opt.step()
    t = trace.table()
    tensors = 'grad grad_avg sqr_avg num p_before p_wd p'.split()
    for k in tensors: assert [isinstance(v, float) for v in t[k]] == [True, True, False]*3, k
    close(t.grad[0], ps[0].grad.double().norm(), rtol=1e-4)
    close(t.p.iloc[-3], ps[0].double().norm(), rtol=1e-4)
    close(t.p_wd[0], 4*t.p_before[0])
    m,g = (o.double() for o in (opt.state[ps[0]]['grad_avg'], ps[0].grad))
    close(t.num.iloc[-3], (0.9*m + 0.1*g).norm(), rtol=1e-4)
    with StepTrace(opt, max_numel=1000) as trace: opt.step()
    assert [isinstance(v, float) for v in trace.table().p] == [True, False, False]

def test_memory_is_bounded():
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    opt = SGD([p], lr=0.1)
    with StepTrace(opt, max_steps=5) as trace:
        for _ in range(12): opt.step()
    assert trace.table().step.to_list() == [8, 9, 10, 11, 12]
    for kw in (dict(max_steps=0), dict(max_numel=2.5)):
        with pytest.raises(ValueError, match=f"{[*kw][0]} must be a whole number from 1, got {[*kw.values()][0]}"):
            StepTrace(opt, **kw)

@pytest.mark.parametrize('make', [lambda p: NAdam(p, lr=0.1), lambda p: Lookahead(NAdam(p, lr=0.1)),
    lambda p: OptimWrapper(p, torch.optim.AdamW, lr=0.1),
    lambda p: OptimWrapper(opt=torch.optim.AdamW(p, lr=0.1))], ids=['NAdam', 'Lookahead', 'OptimWrapper', 'built'])
def test_the_optimizer_is_left_as_it_was(make):
    def inner(o):
        while not isinstance(o, torch.optim.Optimizer) and 'opt' in vars(o): o = o.opt
        return o
    p = nn.Parameter(torch.randn(3))
    opt = make([p])
    set_grads([p])
    trace = StepTrace(opt)
    assert trace.table().empty and list(trace.table().columns) == TRACE
    with trace:
        opt.step()
        with StepTrace(opt) as second:
            opt.step()
            with StepTrace(opt) as third: opt.step()
        opt.step()
        with pytest.raises(RuntimeError, match='recording already'): trace.__enter__()
    opt.step()
    assert 'step' not in vars(inner(opt))
    assert [o.table().step.to_list() for o in (trace, second, third)] == [[1, 2, 3, 4], [2, 3], [3]]
    with pytest.raises(ZeroDivisionError), trace: 1/0
    assert 'step' not in vars(inner(opt))
    with trace: opt.step()
    assert trace.table().step.to_list() == [1, 2, 3, 4, 6]
    # copies and pickles made inside step themselves, and are not recorded
    with StepTrace(opt) as trace:
        c,loaded = copy.deepcopy(opt),pickle.loads(pickle.dumps(inner(opt)))
        before = p.detach().clone()
        for o in (c, loaded):
            q = o.param_groups[0]['params'][0]
            assert q is not p
            q.grad,was = torch.ones(3),q.detach().clone()
            o.step()
            assert not torch.equal(q, was)
        assert torch.equal(p, before) and trace.table().empty
        c2 = copy.deepcopy(c)
        set_grads(inner(c2).param_groups[0]['params'])
        with StepTrace(c2) as of_copy: c2.step()
        assert torch.equal(p, before)
        opt.step()
    assert len(trace.table()) == len(of_copy.table()) == 1

def test_a_step_that_was_there_before_the_trace_stays():
    "as `torch.optim.lr_scheduler` leaves one"
    p = nn.Parameter(torch.randn(3))
    opt = OptimWrapper([p], torch.optim.AdamW, lr=0.1)
    set_grads([p])
    torch.optim.lr_scheduler.ConstantLR(opt.opt, factor=1.)
    before = opt.opt.step
    with StepTrace(opt) as trace: opt.step()
    assert opt.opt.step == before
    opt.step()
    assert trace.table().step.to_list() == [1]

@pytest.mark.parametrize('opt_func', [NAdam, SGD, ranger, wrapped(torch.optim.SGD)],
    ids=['NAdam', 'SGD', 'ranger', 'torch_SGD'])
def test_a_new_optimizer_of_the_learner_is_traced_too(opt_func):
    learn = learner(opt_func)
    cbs = {*map(type, learn.cbs)}
    with StepTrace(learn) as trace:
        first = learn.opt
        fit(learn)
        fit(learn, reset_opt=True)
        second = learn.opt
        learn.opt = opt_func(learn.splitter(learn.model), lr=0.1)
        fit(learn)
    assert trace.table().step.to_list() == [s for s in range(1, 5) for _ in range(6)]*3
    for o in (first, second, learn.opt):
        while 'opt' in vars(o): assert 'step' not in vars(o); o = o.opt
        assert 'step' not in vars(o)
    assert {*map(type, learn.cbs)} == cbs
    fit(learn)
    assert len(trace.table()) == 3*4*6

def test_a_trace_that_saw_no_step_says_so():
    learn = learner()
    learn.create_opt()
    with pytest.warns(UserWarning, match=r'no step.*pass the Learner'), StepTrace(learn.opt): fit(learn, reset_opt=True)

def test_a_refused_step_is_not_recorded():
    ps = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    set_grads(ps)
    opt = NAdam(ps, lr=0.1)
    with StepTrace(opt) as trace:
        opt.hypers[0]['mom'] = 1.
        with pytest.raises(ValueError, match='mom'): opt.step()
        with pytest.raises(NotImplementedError): opt.step(lambda: 0)
        assert trace.table().empty
        opt.hypers[0]['mom'] = 0.9
        opt.step()
    assert trace.table().step.to_list() == [1, 1]

# UpdateStats

class Record(Callback):
    "What the statistics are computed from, for every step: parameters before and after, and the gradient"
    order = 101
    def before_fit(self): self.seen = []
    def before_step(self): self.before = [p.detach().clone() for p in self.model.parameters()]
    def after_step(self):
        self.seen.append([(b.double(), p.detach().double().clone(), p.grad.double().clone())
            for b,p in zip(self.before, self.model.parameters())])

@every_opt
def test_stats_of_every_optimizer(opt_func):
    learn = learner(opt_func)
    stats,rec = UpdateStats(every=1),Record()
    fit(learn, cbs=[stats, rec])
    t = stats.table()
    assert list(t.columns) == STATS and len(t) == 4*6
    assert t.param.to_list() == [n for n,_ in learn.model.named_parameters()]*4
    assert t.step.to_list() == [s for s in range(1, 5) for _ in range(6)]
    for r,(b,p,g) in zip(t.itertuples(), [o for step in rec.seen for o in step]):
        d = p - b
        if b.norm() == 0: assert r.update_ratio == math.inf
        else: close(r.update_ratio, d.norm()/b.norm(), rtol=1e-3)
        close(r.grad_norm, g.norm(), rtol=1e-4)
        if d.norm()*g.norm() > 0: close(r.cosine, (d*g).sum()/(d.norm()*g.norm()), rtol=1e-3, atol=1e-3)

def test_share_of_weight_decay():
    class Zero(Callback):
        order = 50
        def before_step(self):
            for p in self.model[0].parameters(): p.grad.zero_()
    learn,stats = learner(NAdam, wd=0.1),UpdateStats(every=1)
    fit(learn, lr=0.1, cbs=[stats, Zero()])
    t = stats.table().set_index('param')
    close(t.wd_share['0.weight'], 1, rtol=1e-4)
    close(t.update_ratio['0.weight'], 0.01, rtol=1e-3)
    assert (t.wd_share[['1.weight', '3.bias']] == 0).all(), "no decay where do_wd is False"
    assert t.wd_share['3.weight'].between(0.001, 0.2).all()
    # no part of its own
    for f in (partial(NAdam, decouple_wd=False), wrapped(torch.optim.Adam), wrapped(torch.optim.Adagrad)):
        stats = UpdateStats()
        fit(learner(f, wd=0.1), cbs=stats)
        assert math.isnan(stats.table().set_index('param').wd_share['3.weight'])

@pytest.mark.parametrize('every,steps', [(1, [*range(1, 21)]), (3, [1, 4, 7, 10, 13, 16, 19]), (10, [1, 11]),
    (50, [1])])
def test_every(every, steps):
    stats = UpdateStats(every=every)
    fit(learner(n=80), 2, cbs=stats)
    assert stats.table().step.unique().tolist() == steps

def test_records_are_thinned_out():
    stats = UpdateStats(every=1, max_records=8)
    fit(learner(n=8*100), cbs=stats)
    steps = stats.table().step.unique()
    (every,) = set(np.diff(steps))
    assert steps[0] == 1 and 4 <= len(steps) <= 8 and steps[-1] > 100 - every

def test_gradient_accumulation():
    "Only steps count, and at most one is recorded every `every` batches"
    learn = learner(n=8*12)
    stats,rec = UpdateStats(every=1),Record()
    fit(learn, cbs=[GradientAccumulation(24), stats, rec])
    assert stats.table().step.unique().tolist() == [1, 2, 3, 4] == [*range(1, len(rec.seen)+1)]
    stats = UpdateStats(every=5)
    fit(learn, cbs=[GradientAccumulation(24), stats])
    assert stats.table().step.unique().tolist() == [1, 3]

def test_clipping():
    "The gradient is the clipped one"
    stats = UpdateStats(every=1)
    fit(learner(SGD), lr=1., cbs=[GradientClip(0.01), stats])
    total = stats.table().groupby('step').grad_norm.apply(lambda o: o.pow(2).sum()**0.5)
    assert (total < 0.0101).all() and (total > 0.0099).all()

class Skip(Callback):
    "Skip all steps but every third"
    def __init__(self, order): self.order = order
    def before_step(self):
        if self.train_iter % 3 != 2: raise CancelStepException

@pytest.mark.parametrize('order', [20, 200])
def test_skipped_steps(order):
    learn = learner(n=8*9)
    stats,rec = UpdateStats(every=1),Record()
    fit(learn, cbs=[Skip(order), stats])
    t = stats.table()
    assert t.step.unique().tolist() == [1, 2, 3]
    assert all(learn.opt.state[p]['step'] == 3 for p in learn.model.parameters())
    assert stats.copies is None and (t.update_ratio > 0).all()

def test_mixed_precision():
    "Gradients are unscaled, and a step that overflowed is no step"
    class Overflow(Callback):
        order = 9
        def before_step(self):
            if self.train_iter in (0, 2): next(self.model.parameters()).grad.fill_(math.inf)
    learn = learner()
    stats = UpdateStats(every=1)
    fit(learn, cbs=[CPUPrecision(init_scale=2.**16), Overflow(), stats])
    t = stats.table()
    assert t.step.unique().tolist() == [1, 2]
    assert np.isfinite(t.grad_norm).all() and (t.grad_norm < 10).all() and (t.update_ratio > 0).all()

def test_half_precision_parameters():
    m = net().bfloat16()
    p0 = m[0].weight.detach().clone()
    stats = UpdateStats()
    learn = fit(learner(model=m), cbs=[ToBFloat16(), stats])
    t = stats.table().set_index('param')
    assert t.update_ratio.dtype == float and np.isfinite(t.update_ratio['0.weight'])
    set_grads(m.parameters())
    with StepTrace(learn) as trace: learn.opt.step()
    assert trace.table().p[0].dtype == torch.bfloat16

def test_frozen_layers_have_no_update():
    learn,stats = learner(),UpdateStats(every=1)
    learn.freeze()
    fit(learn, cbs=stats)
    assert stats.table().param.unique().tolist() == ['1.weight', '1.bias', '3.weight', '3.bias']
    stats.plot()

def test_stats_outlive_the_fit_and_the_next_fit_starts_anew():
    stats = UpdateStats(every=2)
    learn = learner(cbs=stats)
    fit(learn)
    t = stats.table()
    plt.close('all')
    with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    pd.testing.assert_frame_equal(stats.table(), t)
    fit(learn)
    assert stats.table().step.to_list() == t.step.to_list() and not stats.table().equals(t)
    learn.remove_cb(stats)
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(stats)).table(), stats.table())
    assert len(stats.table()) == 2*6
    stats.plot()
    with pytest.raises(ValueError, match='nothing to plot'): UpdateStats().plot()
    assert UpdateStats().table().empty and list(UpdateStats().table().columns) == STATS

def test_stats_do_not_change_training():
    res = []
    for cbs in ([], [UpdateStats(every=1)]):
        random.seed(1), torch.manual_seed(1)
        learn = learner()
        with learn.no_bar(): learn.fit_one_cycle(2, 0.1, cbs=cbs)
        res.append([p.detach().clone() for p in learn.model.parameters()])
    for a,b in zip(*res): assert torch.equal(a, b)

@pytest.mark.parametrize('kw', [dict(every=0), dict(every=1.5), dict(max_records=-1), dict(every='2')])
def test_bad_counts(kw):
    (k,v), = kw.items()
    with pytest.raises(ValueError, match=f"{k} must be a whole number from 1, got {v!r}"): UpdateStats(**kw)

def test_the_plot_shows_the_table():
    stats = UpdateStats(every=1)
    fit(learner(model=net()), cbs=stats)
    for all_params,rows in ((False, ['0.weight', '3.weight']), (True, [n for n,_ in net().named_parameters()])):
        plt.close('all')
        stats.plot(all_params=all_params, title='a run')
        ax,_ = plt.gcf().axes
        r = stats.table().pivot(index='param', columns='step', values='update_ratio').loc[rows]
        close(ax.images[0].get_array().filled(np.nan), r.clip(1e-5, 1e-1).to_numpy())
        assert ax.images[0].get_extent() == [0.5, 4.5, -0.5, len(rows)-0.5]
        assert [o.get_text() for o in ax.get_yticklabels()] == rows and list(ax.get_yticks()) == [*range(len(rows))]
    plt.close('all')

# Writers

class Writer:
    "Keeps what TensorBoard's writer would write"
    def __init__(self, **kwargs): self.scalars, self.closed = {}, False
    def add_scalar(self, name, value, step):
        assert not self.closed and isinstance(value, (float, torch.Tensor, np.floating))
        self.scalars.setdefault(name, {})[step] = float(value)
    def close(self): self.closed = True

@pytest.fixture
def TensorBoardCallback(monkeypatch):
    "fastai's callback, with `Writer` in the place of TensorBoard"
    fake = types.ModuleType('torch.utils.tensorboard')
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, 'tensorboard', types.ModuleType('tensorboard'))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', fake)
    monkeypatch.delitem(sys.modules, 'fastai.callback.tensorboard', raising=False)
    from fastai.callback.tensorboard import TensorBoardCallback
    yield partial(TensorBoardCallback, trace_model=False, log_preds=False)
    sys.modules.pop('fastai.callback.tensorboard', None)

@pytest.mark.parametrize('opt_func', [NAdam, DozatNAdam, no_nesterov, lambda p, **kw: Lookahead(NAdam(p, **kw))])
def test_tensorboard_logs_every_hyper(TensorBoardCallback, opt_func):
    "At every batch, for each group, and with the values of the schedule; W&B's and Comet's callbacks read the same"
    learn, board = learner(opt_func), TensorBoardCallback()
    with learn.no_bar(): learn.fit_one_cycle(2, slice(1e-3, 1e-2), cbs=board)
    scalars = board.writer.scalars
    for i,h in enumerate(learn.opt.hypers):
        for k,v in h.items():
            assert list(scalars[f'{k}_{i}']) == [*range(1, 9)], k
            close(scalars[f'{k}_{i}'][8], v)
    close([*scalars['lr_1'].values()], learn.recorder.hps['lr'])
    close([*scalars['mom_1'].values()], learn.recorder.hps['mom'])

def check_scalars(scalars, t, every):
    "What was written is the table, at the batches where TensorBoard writes, without what is not finite"
    for k in STATS[2:]:
        for name,rows in t.groupby('param'):
            want = {1 + every*i: v for i,v in enumerate(rows[k]) if math.isfinite(v)}
            assert scalars.get(f'{k}/{name}', {}) == want, (k, name)

@pytest.mark.parametrize('first', [True, False], ids=['after it', 'before it'])
def test_stats_are_written_to_tensorboard(TensorBoardCallback, first):
    stats, board = UpdateStats(every=2), TensorBoardCallback()
    learn = fit(learner(n=8*7), cbs=[board, stats] if first else [stats, board])
    scalars = board.writer.scalars
    check_scalars(scalars, stats.table(), 2)
    assert list(scalars['cosine/3.weight']) == [1, 3, 5, 7] and list(scalars['lr_0']) == [*range(1, 8)]
    assert board.writer.closed
    fit(learn, cbs=stats)
    assert board.writer.scalars is scalars

def test_stats_are_written_to_a_writer():
    writer = Writer()
    stats = UpdateStats(every=1, writer=writer)
    learn = learner(cbs=stats)
    fit(learn)
    check_scalars(writer.scalars, stats.table(), 1)
    with learn.no_bar(): learn.lr_find(num_it=5, show_plot=False)
    check_scalars(writer.scalars, stats.table(), 1)
    assert len(writer.scalars['grad_norm/3.weight']) == 4

def test_an_open_writer_is_not_pickled(tmp_path):
    with open(tmp_path/'log', 'w') as log:
        stats = UpdateStats(writer=log)
        assert pickle.loads(pickle.dumps(stats)).writer is None and stats.writer is log

# Rules of one's own

@pytest.mark.parametrize('kept', [dict(), dict(mom_prod=0.25), dict(mine=0.5)], ids=lambda o: f'keeps {[*o]}')
def test_tools_with_a_rule_of_ones_own(kept):
    "It may keep a running product, none, or another number"
    def rule(mom, step, **kwargs): return 2., 0.5, dict(kept)
    p, g = nn.Parameter(torch.ones(3)), torch.randn(3)
    opt = NAdamOptimizer([p], rule, lr=0.1, mom=0.5, sqr_mom=0.5, eps=0., wd=0.)
    p.grad = g
    with StepTrace(opt) as trace: opt.step()
    r = trace.table().iloc[0]
    assert (r.a, r.b) == (2., 0.5)
    close(r.mom_prod, kept.get('mom_prod', math.nan))
    close(r.debias1, 1 - kept.get('mom_prod', math.nan))
    close(r.p, 1 - 0.1*1.5*g.sign(), atol=1e-6)
    assert opt_table(opt).step.to_list() == [1]
    plot_rule(rules=dict(mine=rule))
    plt.close('all')

# plot_rule

def test_plot_rule():
    sched = combined_cos(0.25, 0.95, 0.85, 0.95)
    for mom,moms in ((0.8, [0.8]*30), (sched, [sched(i/30) for i in range(30)]),
        ([0.9]*20 + [0.5]*10, [0.9]*20 + [0.5]*10)):
        plt.close('all')
        plot_rule(mom, n=30)
        axs = np.array(plt.gcf().axes).reshape(2, -1)
        rules = [ruder_rule, dozat_rule, partial(dozat_rule, mom_decay=1.), partial(dozat_rule, mom_decay=math.inf),
            adam_rule]
        assert axs.shape[1] == len(rules)
        for (ax_a,ax_b),rule in zip(axs.T, rules):
            state = {}
            for i,m in enumerate(moms):
                a,b,state = rule(mom=m, step=i+1, **state)
                a_pow,b_pow,_ = rule(mom=m, step=i+1)
                for ax,*want in ((ax_a, a, a_pow), (ax_b, b, b_pow)): close([l.get_ydata()[i] for l in ax.lines], want)
    plt.close('all')
    plot_rule(rules={'mine': lambda mom, step, **kwargs: (1., 0., {})})
    assert len(plt.gcf().axes) == 2
    plt.close('all')
    with pytest.raises(ValueError, match=r'mom must be in \[0, 1\), got 1.0'): plot_rule([0.9, 1.0])
    with pytest.raises(ValueError, match='n must be a whole number'): plot_rule(n=0)
