"Every implementation gives the same parameters and the same state as the steppers, whatever happens between two steps"
import gc, itertools, pickle, random
from copy import deepcopy
from functools import partial
from pathlib import Path
from weakref import ref

import pytest, torch
from fastcore.docments import docments
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from fastai_nadam import DozatNAdam, NAdam
from fastai_nadam.multi_tensor import cut_blocks, kernel_tensors
from helpers import all_params, assert_same, copies, gaps, layouts, tols
from impls import KernelOff, NoExchange, each_impl, loop, with_impl
from runs import Forked

fast_impls = pytest.mark.parametrize('impl', [dict(), KernelOff(), dict(foreach=True), NoExchange()],
    ids=['default', 'kernel off', 'foreach', 'no exchange API'])

def make_params(specs):
    "Parameters of the given (shape, dtype, layout)"
    ps = [nn.Parameter(layouts[layout](torch.randn(shape).to(dtype)))
        for shape,dtype,layout in specs if layout != 'expanded']
    assert all(p.is_leaf for p in ps)
    return ps

def set_both(ps, qs, grad_layout='plain', skip=()):
    for i,(p,q) in enumerate(zip(ps, qs)):
        g = layouts[grad_layout](torch.randn(p.shape).to(p.dtype))
        p.grad, q.grad = (None, None) if i in skip else (g.clone(), g.clone(memory_format=torch.preserve_format))
        if i not in skip and grad_layout == 'expanded': p.grad = g
        if i not in skip and grad_layout == 'gaps' and g.ndim: p.grad = gaps(g)

@fast_impls
def test_ordinary_tensors_are_not_looked_at_one_by_one(impl, monkeypatch):
    "Which would take ten times as long as the step of a small tensor"
    ps = [nn.Parameter(layout(torch.randn(2, 3, 4, 5))) for layout in (torch.clone, layouts['channels_last'])]
    opt = NAdam(ps, 0.1, **impl)
    set_both(ps, ps)
    for p in ps: p.grad = layouts['channels_last'](p.grad) if p is ps[1] else p.grad
    opt.step()
    monkeypatch.setattr('fastai_nadam.optimizer.check_tensors', lambda *args: pytest.fail('looked at one by one'))
    opt.step()

specs = st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.sampled_from(list(tols)),
    st.sampled_from(['plain', 'plain', 'transposed', 'gaps', 'channels_last'])), min_size=1, max_size=6)

@fast_impls
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=specs, opt_func=st.sampled_from([NAdam, DozatNAdam, partial(NAdam, nesterov=False)]),
    decouple_wd=st.booleans(), wds=st.tuples(*[st.sampled_from([0., 0.1])]*2), split=st.integers(0, 6),
    grad_layout=st.sampled_from(list(layouts)), seed=st.integers(0, 2**32))
def test_any_tensors(impl, specs, opt_func, decouple_wd, wds, split, grad_layout, seed):
    "50 steps of random gradients on random tensors in two groups; schedules, skipped parameters, do_wd here and there"
    torch.manual_seed(seed)
    rng = random.Random(seed)
    ps = make_params(specs)
    qs = copies(ps)
    split = min(split, len(ps))
    def opt(ps, impl): return opt_func([ps[:split], ps[split:]], 1e-2, wd=0., eps=1e-4, decouple_wd=decouple_wd, **impl)
    fast, slow = opt(ps, impl), opt(qs, loop)
    for o,xs in ((fast, ps), (slow, qs)):
        o.set_hypers(wd=list(wds), lr=[1e-2, 1e-3])
        for i,p in enumerate(xs):
            if i%3 == 0: o.state[p]['do_wd'] = False
    for t in range(50):
        set_both(ps, qs, grad_layout, skip={i for i in range(len(ps)) if rng.random() < 0.1})
        for o in (fast, slow): o.set_hypers(mom=0.85+0.002*t, sqr_mom=0.9+0.001*t)
        fast.step(); slow.step()
        if not decouple_wd:
            for p,q in zip(ps, qs):
                if p.grad is not None:
                    torch.testing.assert_close(p.grad, q.grad, rtol=tols[p.dtype], atol=tols[p.dtype])
    assert_same(fast, slow)

@fast_impls
@pytest.mark.parametrize('opt_func', [NAdam, DozatNAdam])
@pytest.mark.parametrize('layout', ['plain', 'transposed', 'channels_last'])
def test_large_tensors_are_cut(impl, opt_func, layout):
    sizes = [(300, 1000), (3, 20, 100, 50), (1000,), (2**18,), (2**18+1,)]
    ps = make_params([(s, torch.float32, layout) for s in sizes])
    qs = copies(ps)
    fast, slow = opt_func(ps, 1e-2, **impl), opt_func(qs, 1e-2, **loop)
    for _ in range(4):
        set_both(ps, qs, layout)
        fast.step(); slow.step()
    assert_same(fast, slow)

@pytest.mark.parametrize('layout', ['gaps', 'transposed', 'channels_last'])
def test_layouts_differ_from_plain(layout):
    "The layouts above are what they say, so that the tests with them test something"
    p, = make_params([((2, 3, 4, 5), torch.float32, layout)])
    assert not p.is_contiguous() and (kernel_tensors(p, p, p, p) is None) == (layout == 'gaps')

def test_blocks_have_a_size_for_each_thread(monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    t = torch.zeros(2**20 + 1)
    (js, blocks), = cut_blocks([t], [t], [t], [t])
    assert js == [0] and [p.numel() for (p,),*_ in blocks] == [2**19, 2**19, 1]

def test_blocks_hold_every_element_once():
    sizes = [(3,), (0,), (10, 10), (), (7, 1), (64,)]
    ps = [torch.zeros(s) for s in sizes]
    for size in (1, 5, 64, 1000):
        cut = cut_blocks(ps, ps, ps, ps, size)
        assert sorted(j for js,_ in cut for j in js) == [*range(len(ps))]
        blocks = [block for _,blocks in cut for block in blocks]
        assert all(sum(t.numel() for t in p) <= size for p,*_ in blocks)
        for p,*_ in blocks:
            for t in p: t.add_(1)
    assert all((p == 4).all() for p in ps)
    assert sum(t.numel() for p,*_ in blocks for t in p) == sum(p.numel() for p in ps)

# What happens to an optimizer between two steps. Each takes and returns (optimizer, parameters).

def toggle_do_wd(opt, ps):
    opt.state[ps[0]]['do_wd'] = not opt.state[ps[0]].get('do_wd', True)
    return opt, ps

def freeze(opt, ps):
    opt.state[ps[0]]['force_train'] = True
    opt.freeze()
    return opt, ps

def unfreeze(opt, ps):
    opt.unfreeze()
    return opt, ps

def clear_state(opt, ps):
    opt.clear_state()
    return opt, ps

def load(opt, ps):
    opt.load_state_dict(deepcopy(opt.state_dict()))
    return opt, ps

def load_older(opt, ps):
    sd = deepcopy(opt.state_dict())
    for p in ps: p.grad = torch.ones_like(p)
    opt.step()
    opt.load_state_dict(sd)
    return opt, ps

def new_hypers(opt, ps):
    opt.set_hypers(lr=slice(1e-3, 1e-2), wd=[0.3, 0.], eps=1e-5)
    return opt, ps

def write_hypers(opt, ps):
    opt.hypers[1]['lr'], opt.hypers[0]['mom'] = 0.05, 0.7
    return opt, ps

def new_data(opt, ps):
    for p in ps: p.data = p.data*1.5
    return opt, ps

def other_layout(opt, ps):
    ps[1].data = ps[1].data.mT.contiguous().mT
    return opt, ps

def transpose_in_place(opt, ps):
    "The same memory read in another order: nothing but the strides tell"
    ps[2].data = ps[2].data.mT
    return opt, ps

def new_dtype(opt, ps):
    for p in ps[:2]: p.data, p.grad = p.data.double(), None
    return opt, ps

def copy(opt, ps):
    opt = deepcopy(opt)
    return opt, all_params(opt)

def repickle(opt, ps):
    opt = pickle.loads(pickle.dumps(opt))
    return opt, all_params(opt)

def retensor(opt, ps):
    "What fastai's NonNativeMixedPrecision does: other parameters, with copies of the state"
    old, opt.param_lists = opt.param_lists, [[nn.Parameter(p.detach().clone()) for p in pg] for pg in opt.param_lists]
    for pg,pg2 in zip(old, opt.param_lists):
        for p,p2 in zip(pg, pg2): opt.state[p2] = {k: deepcopy(v) for k,v in opt.state.pop(p, {}).items()}
    return opt, all_params(opt)

def same_memory(opt, ps):
    "Other parameters, without state, that share memory and gradients with those before"
    opt.param_lists = [[nn.Parameter(p.detach(), p.requires_grad) for p in pg] for pg in opt.param_lists]
    new = all_params(opt)
    for p,p2 in zip(ps, new): p2.grad = p.grad
    return opt, new

def replace_state(opt, ps):
    opt.state[ps[1]] = {k: v.clone() if torch.is_tensor(v) else v for k,v in opt.state[ps[1]].items()}
    return opt, ps

def replace_average(opt, ps):
    opt.state[ps[1]]['grad_avg'] = opt.state[ps[1]]['grad_avg']*2
    return opt, ps

def edit_step(opt, ps):
    opt.state[ps[0]]['step'] += 3
    opt.state[ps[1]]['mom_prod' if 'mom_prod' in opt.state[ps[1]] else 'mu_prod'] *= 0.5
    return opt, ps

def forget_products(opt, ps):
    for p in ps[:2]:
        for k in ('mom_prod', 'mu_prod', 'sqr_mom_prod'): opt.state[p].pop(k, None)
    return opt, ps

events = [toggle_do_wd, freeze, unfreeze, clear_state, load, load_older, new_hypers, write_hypers, new_data,
    other_layout, transpose_in_place, new_dtype, copy, repickle, retensor, same_memory, replace_state, replace_average,
    edit_step, forget_products]

def steps(opt, ps, grads):
    "A few steps of a training loop that zeroes its gradients in place, so that they stay the same tensors"
    for gs in grads:
        for p,g in zip(ps, gs):
            if not p.requires_grad: continue
            if p.grad is None: p.grad = torch.zeros_like(p)
            p.grad.add_(g.to(p.dtype))
        opt.step()
        opt.zero_grad()

def new_case(opt_func, impl, ps): return opt_func([ps[:2], ps[2:]], 1e-2, wd=0.1, **impl), ps

@fast_impls
@pytest.mark.parametrize('opt_func', [NAdam, DozatNAdam])
@pytest.mark.parametrize('event', events, ids=lambda o: o.__name__)
def test_notices(impl, opt_func, event):
    ps = make_params([(s, torch.float32, 'plain') for s in ((4, 3), (4, 4), (5, 5), (2,), (100, 700))])
    cases = [new_case(opt_func, impl, ps), new_case(opt_func, loop, copies(ps))]
    for e in (None, event, unfreeze, random.choice(events)):
        if e: cases = [e(*o) for o in cases]
        grads = [[torch.randn(p.shape) for p in ps] for _ in range(4)]
        for opt,xs in cases: steps(opt, xs, grads)
    assert_same(cases[0][0], cases[1][0], tols[torch.float32])  # some began in float32

@fast_impls
def test_change_of_impl(impl):
    "A run can change its implementation, in the same optimizer or through a checkpoint"
    ps = make_params([((4, 3), torch.float32, 'plain'), ((6,), torch.float32, 'plain')])
    qs = copies(ps)
    a, b = NAdam(ps, 1e-2, **impl), NAdam(qs, 1e-2, **loop)
    for kw in (impl, loop, impl):
        a.foreach, a.fused = kw.get('foreach'), kw.get('fused')
        for o,xs in ((a, ps), (b, qs)): steps(o, xs, [[torch.ones(p.shape) for p in ps]]*3)
    assert_same(a, b)
    c = NAdam(ps, 1., **loop)
    c.load_state_dict(a.state_dict())
    set_both(ps, qs)
    c.step(); b.step()
    assert_same(c, b)

@pytest.mark.parametrize('opt_func', [NAdam, DozatNAdam])
def test_what_the_arguments_say(opt_func):
    "One of the two False and the other not True gives the steppers, as in `torch.optim`; the words say so"
    doc = docments(opt_func)
    assert doc['foreach'] == 'Use foreach functions? Both None: the fastest that the tensors allow'
    assert doc['fused'] == 'Use a fused kernel? One of the two False and the other not True: the steppers'
    for foreach,fused in itertools.product((None, True, False), repeat=2):
        try: impl = opt_func([torch.zeros(2)], 0.1, foreach=foreach, fused=fused).impl
        except ValueError: continue # no fused kernel in an older PyTorch
        assert (impl == 'steppers') == (False in (foreach, fused) and True not in (foreach, fused))

def test_without_the_kernel(monkeypatch, without_kernel):
    "On a PyTorch that has no such kernel, the default is foreach, and fused=True an error"
    from fastai_nadam import multi_tensor
    monkeypatch.delattr(torch, '_fused_adamw_')
    for f in (multi_tensor.pick_impl, multi_tensor._has_fused): f.cache_clear()
    try:
        ps = make_params([((4, 3), torch.float32, 'plain')])
        qs = copies(ps)
        a, b = NAdam(ps, 1e-2), NAdam(qs, 1e-2, **loop)
        assert a.impl == 'foreach'
        with pytest.raises(ValueError, match='fused=True'): NAdam(ps, 1., fused=True)
        for _ in range(5):
            set_both(ps, qs)
            a.step(); b.step()
        assert_same(a, b)
    finally:
        for f in (multi_tensor.pick_impl, multi_tensor._has_fused): f.cache_clear()

def test_gradients_can_be_freed():
    "A loop that sets its gradients to None gets their memory back at once"
    p = nn.Parameter(torch.randn(1000, 1000))
    opt = NAdam([p], 1e-3)
    for _ in range(6):
        p.grad = torch.ones(1000, 1000)
        r = ref(p.grad)
        opt.step()
        p.grad = None
        gc.collect()
        assert r() is None

def test_zero_grad():
    "In place, also gradients with a history, sparse ones, and those of frozen parameters"
    ps = [nn.Parameter(torch.randn(3)) for _ in range(3)] + [nn.Embedding(4, 2, sparse=True).weight]
    ps[0].grad = torch.ones(3)
    ps[1].grad = torch.ones(3, requires_grad=True)*2
    ps[3].grad = torch.sparse_coo_tensor([[1]], [[1., 2.]], (4, 2))
    ps[0].requires_grad_(False)
    g = [p.grad for p in ps]
    NAdam(ps, 1.).zero_grad()
    assert all(p.grad is o for p,o in zip(ps, g)) and ps[2].grad is None
    assert not any(ps[i].grad.to_dense().any() for i in (0, 1, 3)) and ps[1].grad.grad_fn is None

@each_impl
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
# L2 decay rounds the gradient itself
@pytest.mark.parametrize('opt_func', [NAdam, DozatNAdam, partial(NAdam, nesterov=False)])
def test_half_precision_at_the_defaults(impl, dtype, opt_func):
    "Averages are used before they are rounded: 0.01·g² is 0 in float16, and the step would be divided by ε = 1e-8"
    ps = [nn.Parameter(torch.randn(s).to(dtype)) for s in ((7, 3), (50,))]
    qs = [nn.Parameter(p.detach().double()) for p in ps]
    fast, slow = with_impl(opt_func, ps, impl, lr=0.1), opt_func(qs, 0.1, **loop)
    for t in range(3):
        for p,q in zip(ps, qs):
            p.grad = (torch.randn(p.shape).sign() * 10**torch.empty(p.shape).uniform_(-4, -2)).to(dtype)
            q.grad = p.grad.double()
            for k in ('grad_avg', 'sqr_avg'): # each step begins with the same state
                if t: slow.state[q][k].copy_(fast.state[p][k])
            q.data.copy_(p.data)
        fast.step(); slow.step()
        for p,q in zip(ps, qs):
            ulp = torch.finfo(dtype).eps
            torch.testing.assert_close(p.detach().double(), q.detach(), rtol=4*ulp, atol=4*ulp)
            for k in ('grad_avg', 'sqr_avg'):
                torch.testing.assert_close(fast.state[p][k].double(), slow.state[q][k].to(dtype).double(), rtol=2*ulp,
                    atol=1e-7)

def test_infinity_is_float32_for_the_kernels():
    "Under another default dtype too: the CUDA kernel reads the step as float32"
    from fastai_nadam.multi_tensor import _inf
    torch.set_default_dtype(torch.float64)
    try: assert _inf.__wrapped__('cpu').dtype == torch.float32
    finally: torch.set_default_dtype(torch.float32)

def test_the_device_option_arrives(request):
    assert torch.randn(2).device.type == nn.Linear(2, 2).weight.device.type == request.config.getoption('--device')

def test_one_option_says_where_tensors_are():
    "`pytest tests/test_impls.py --device cuda` runs this list on a GPU; here another device stands in for it"
    test = f'{__file__}::test_the_device_option_arrives'
    p = Forked(pytest.main, ['-q', '-p', 'no:cacheprovider', test, '--device', 'meta'], cwd=Path(__file__).parent)
    assert p.ended() == 0 and '1 passed' in p.out, p.out
