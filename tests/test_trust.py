"Whatever happens to tensors between two steps, nothing is corrupted and nothing kept alive"
import weakref
from copy import deepcopy

import numpy as np, pytest, torch
from torch import nn
from fastai_nadam import DozatNAdam, NAdam
from fastai_nadam.rules import dozat_rule
from helpers import assert_same, layouts, same, snapshot, twin
from impls import each_impl, loop, with_impl

def warm(ps, impl, opt_func=NAdam, n=3):
    "An optimizer after some steps with gradients that stay the same tensors"
    opt = with_impl(opt_func, ps, impl, lr=0.1)
    for p in ps: p.grad = torch.randn_like(p)
    for _ in range(n): opt.step()
    return opt

def assert_refused(opt, match):
    "The step is refused and has changed nothing"
    before = snapshot(opt)
    with pytest.raises(ValueError, match=match): opt.step()
    assert same(before, snapshot(opt))

# Shapes

def view_of_more(p): p.data = p.data.as_strided((20000, 3), (3, 1))
def view_of_less(p): p.data = p.data[:1]
def reshaped(p): p.data = p.data.as_strided((3, 2), (1, 3))
def less_gradient(p): p.grad.data = p.grad.data[:1]
def more_gradient(p): p.grad.data = torch.zeros(4, 3)
def expanded(p): p.data = p.data[:1].expand(2, 3)

@each_impl
@pytest.mark.parametrize('harm', [view_of_more, view_of_less, reshaped, less_gradient, more_gradient, expanded],
    ids=lambda o: o.__name__)
def test_another_shape_at_the_same_address(impl, harm):
    "Address and strides are as before, so only the shape tells"
    p = nn.Parameter(torch.zeros(40000, 3)[:2])
    q = nn.Parameter(torch.randn(5))
    opt = warm([q, p], impl)
    harm(p)
    assert_refused(opt, 'shape')

@each_impl
@pytest.mark.parametrize('k', ['grad_avg', 'sqr_avg'])
def test_an_average_of_another_size(impl, k):
    ps = [nn.Parameter(torch.randn(5)) for _ in range(3)]
    opt = warm(ps, impl)
    opt.state[ps[1]][k].data = torch.zeros(7)
    assert_refused(opt, rf'shape \(5,\).*{k} of shape \(7,\).*clear_state')

@each_impl
@pytest.mark.parametrize('which', ['data', 'gradient', 'grad_avg', 'sqr_avg'])
def test_memory_that_was_taken_away(impl, which):
    "As sharded training does between two uses; PyTorch's own operations would crash"
    ps = [nn.Parameter(torch.randn(5)) for _ in range(2)]
    opt = warm(ps, impl)
    t = dict(data=ps[1], gradient=ps[1].grad, **{k: opt.state[ps[1]][k] for k in ('grad_avg', 'sqr_avg')})[which]
    kept = t.detach().clone()
    t.data.untyped_storage().resize_(0)
    before = ps[0].detach().clone()
    with pytest.raises(ValueError, match=rf'shape \(5,\).*{which} whose memory was taken away'): opt.step()
    assert torch.equal(ps[0], before) and opt.state[ps[0]]['step'] == 3
    t.data.untyped_storage().resize_(20)
    t.data.copy_(kept)
    opt.step()
    assert opt.state[ps[1]]['step'] == 4

# State that moves

def offloaded(v): return v.clone()
def other_dtype(v): return v.double()

@each_impl
@pytest.mark.parametrize('opt_func', [NAdam, DozatNAdam])
@pytest.mark.parametrize('move', [offloaded, other_dtype, layouts['transposed'], layouts['gaps']],
    ids=['offloaded', 'other_dtype', 'transposed', 'gaps'])
def test_averages_that_were_moved(impl, opt_func, move):
    "The way to take an optimizer's state off the GPU and back: `.data` of the same tensors"
    ps = [nn.Parameter(torch.randn(4, 5)) for _ in range(3)]
    opt = warm(ps, impl, opt_func)
    other = twin(opt, loop)
    old = [v.data for v in opt.state[ps[1]].values() if torch.is_tensor(v)]
    kept = deepcopy(old)
    for v in opt.state[ps[1]].values():
        if torch.is_tensor(v): v.data = move(v.data)
    for _ in range(3): opt.step(); other.step()
    assert_same(opt, other, 1e-5)
    torch.testing.assert_close(old, kept, rtol=0, atol=0) # the memory that was left is left alone

@each_impl
def test_averages_follow_the_layout_of_their_parameter(impl):
    "A checkpoint loaded before `ChannelsLast` goes on as one loaded after it, to the bit, and in no slower way"
    def model(): return nn.Conv2d(8, 4, 3)
    m = model()
    opt = warm(list(m.parameters()), impl)
    sd, runs = deepcopy(opt.state_dict()), []
    for late in (True, False):
        m2 = model()
        m2.load_state_dict(m.state_dict())
        opt2 = with_impl(NAdam, m2.parameters(), impl, lr=0.1)
        if late: opt2.load_state_dict(sd)
        m2.to(memory_format=torch.channels_last)
        if not late: opt2.load_state_dict(sd)
        for _ in range(3):
            for p,q in zip(m2.parameters(), m.parameters()): p.grad = torch.empty_like(p).copy_(q.grad)
            opt2.step()
        for p in m2.parameters():
            for k in ('grad_avg', 'sqr_avg'): assert opt2.state[p][k].stride() == p.stride()
        if impl != loop: assert all(b.impl for b in opt2._last[1])
        runs.append(list(m2.parameters()))
    for p,q in zip(*runs): assert torch.equal(p, q)

# Memory

class Freed:
    "Tensors whose memory tells when it is freed"
    def __init__(self): self.refs = []
    def __call__(self, *shape):
        a = np.random.randn(*shape).astype(np.float32)
        self.refs.append(weakref.ref(a))
        return torch.from_numpy(a)
    def __bool__(self): return all(r() is None for r in self.refs)

@each_impl
def test_freed_gradients_and_parameters_are_freed(impl):
    ps, grads, datas = [nn.Parameter(torch.empty(0)) for _ in range(2)], Freed(), Freed()
    for p in ps: p.data = datas(300, 1000)
    opt = with_impl(NAdam, ps, impl, lr=0.1)
    for p in ps: p.grad = grads(300, 1000)
    for _ in range(3): opt.step()
    assert not grads and not datas
    for p in ps: p.grad = None
    assert grads
    for p in ps: p.data = torch.empty(0)
    assert datas

@each_impl
def test_state_that_was_cleared_is_freed(impl):
    p = nn.Parameter(torch.randn(300, 1000))
    opt = warm([p], impl)
    avgs = Freed()
    opt.state[p].update(grad_avg=avgs(300, 1000), sqr_avg=avgs(300, 1000).abs_())
    for _ in range(3): opt.step()
    opt.clear_state()
    assert avgs

@each_impl
def test_parameters_may_be_swapped_when_they_are_converted(impl):
    "set_swap_module_params_on_conversion fails where anyone holds a weak reference to a parameter or gradient"
    m = nn.Linear(3, 2)
    opt = warm(list(m.parameters()), impl)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try: m.to(torch.float64)
    finally: torch.__future__.set_swap_module_params_on_conversion(False)
    other = twin(opt, loop)
    opt.step(); other.step()
    assert_same(opt, other, 1e-5)

# Kept state dicts

@each_impl
def test_a_state_dict_is_live_in_all_its_parts(impl):
    "As fastai's: it always is the optimizer's present state; a copy of it stays what it was"
    ps = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    opt = warm(ps, impl)
    sd, kept = opt.state_dict(), deepcopy(opt.state_dict())
    before = deepcopy(kept)
    opt.step()
    opt.set_hypers(lr=np.float64(0.5))
    s = sd['state'][0]
    assert s['step'] == 4 and s['mom_prod'] == pytest.approx(0.9**4) and sd['hypers'][0]['lr'] == 0.5
    for k in ('grad_avg', 'sqr_avg'): assert torch.equal(sd['state'][0][k], opt.state[ps[0]][k])
    torch.testing.assert_close(kept, before, rtol=0, atol=0)
    opt.load_state_dict(kept)
    opt.step()
    assert kept['state'][0]['step'] == 3 and sd['state'][0]['step'] == 4

# Flags

@pytest.mark.parametrize('k', ['decouple_wd', 'nesterov', 'foreach', 'fused'])
@pytest.mark.parametrize('v', [2, 1, 0, 'False', [True], {}, 1., None, np.array([True])], ids=repr)
def test_flags_are_true_or_false(k, v):
    p = nn.Parameter(torch.zeros(2))
    if v is None and k in ('foreach', 'fused'): return
    with pytest.raises(ValueError, match=rf'{k} must be (None, )?True or False, got'): NAdam([p], 0.1, **{k: v})
    if k == 'nesterov': return
    with pytest.raises(ValueError, match=k): DozatNAdam([p], 0.1, **{k: v})

def test_what_is_fixed_says_so():
    p = nn.Parameter(torch.zeros(2))
    opt = NAdam([p], 0.1)
    for k,v in dict(decouple_wd=False, rule=dozat_rule, cbs=[]).items():
        with pytest.raises(AttributeError, match=f'{k} cannot be changed; load the state_dict'): setattr(opt, k, v)
    with pytest.raises((AttributeError, TypeError)): opt.cbs[0] = opt.cbs[1]
    for k in ('foreach', 'fused'):
        with pytest.raises(ValueError, match=f'{k} must be None, True or False'): setattr(opt, k, 'yes')
    opt.foreach = True
    assert opt.impl == 'foreach'
    deepcopy(opt).fused = True

# Memory that is shared

def one_gradient(ps): ps[2].grad = ps[0].grad
def overlapping_gradients(ps):
    g = torch.randn(11)
    ps[0].grad, ps[2].grad = g[:10], g[1:]
def gradient_is_the_parameter(ps): ps[0].grad = ps[0].data
def another_parameter_is_the_gradient(ps): ps[1].grad = ps[0].data
def overlapping_parameters(ps):
    x = torch.randn(15)
    ps[0].data, ps[2].data = x[:10], x[5:]
def one_average(ps): pass # below

@each_impl
@pytest.mark.parametrize('decouple_wd', [True, False])
@pytest.mark.parametrize('share', [one_gradient, overlapping_gradients, gradient_is_the_parameter,
    another_parameter_is_the_gradient, overlapping_parameters, one_average], ids=lambda o: o.__name__)
def test_shared_memory_is_stepped_in_order(impl, decouple_wd, share):
    "As the steppers do it, one parameter after the other; what shares nothing keeps its implementation"
    start, grads = [[torch.randn(10) for _ in range(4)] for _ in range(2)]
    runs = []
    seed = torch.randint(2**31, ()).item()
    for how in (impl, loop):
        ps = [nn.Parameter(p.clone()) for p in start]
        opt = with_impl(NAdam, ps, how, lr=0.1, wd=0.5, decouple_wd=decouple_wd)
        for p,g in zip(ps, grads): p.grad = g.clone()
        torch.manual_seed(seed)
        share(ps)
        if share is one_average:
            opt.step()
            opt.state[ps[2]]['grad_avg'] = opt.state[ps[0]]['grad_avg']
        for _ in range(4): opt.step()
        runs.append((opt, ps))
    (opt, ps), (other, qs) = runs
    assert_same(opt, other, 1e-5)
    for p,q in zip(ps, qs): torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)
    if impl != loop: assert any(b.impl and 3 in b.idxs for b in opt._last[1])

@each_impl
@pytest.mark.parametrize('decouple_wd', [True, False])
@pytest.mark.parametrize('pair', ['gradient over its data', 'grad_avg over its gradient', 'grad_avg over its data',
    'sqr_avg over its grad_avg'])
def test_a_parameter_that_lies_partly_over_its_own_tensors(impl, decouple_wd, pair):
    "PyTorch's operations raise an error then, some of them in the middle of a step"
    ps = [nn.Parameter(torch.randn(10)) for _ in range(3)]
    opt = with_impl(NAdam, ps, impl, lr=0.1, decouple_wd=decouple_wd)
    for p in ps: p.grad = torch.randn(10)
    for _ in range(3): opt.step()
    x = torch.randn(12).abs()
    for o,t in zip(pair.split(' over its '), (x[2:], x[:10])):
        if o == 'data': ps[1].data = t
        elif o == 'gradient': ps[1].grad = t
        else: opt.state[ps[1]][o] = t
    assert_refused(opt, 'lies partly over its')

@each_impl
def test_a_gradient_with_the_negative_bit(impl):
    "`z.conj().imag` has the memory of `z.imag`, and a bit that says: with the other sign. Nothing else tells"
    z = torch.randn(1, dtype=torch.complex64)
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    opt, other = with_impl(NAdam, [p], impl, lr=0.1), with_impl(NAdam, [q], loop, lr=0.1)
    for g in (z.imag, z.imag, z.conj().imag, z.imag, z.conj().imag):
        p.grad, q.grad = g, g.clone()
        opt.step(); other.step()
    assert p.grad.is_neg() and not q.grad.is_neg()
    assert_same(opt, other, 1e-5)
    opt.zero_grad()
    assert not p.grad.any()

@each_impl
def test_autograd_notices_a_step(impl):
    "A backward through weights that have been stepped since is an error, as with PyTorch's optimizers"
    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    opt = with_impl(NAdam, m.parameters(), impl, lr=0.1)
    loss = m(torch.randn(2, 3)).sum()
    for _ in range(3): # the step after the last has its addresses kept
        loss.backward(retain_graph=True)
        opt.step()
        opt.zero_grad()
        if impl == loop: return # fastai's steppers write to `.data`, of which autograd knows nothing
        with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()
        loss = m(torch.randn(2, 3)).sum()
