"Whatever happens to tensors between two steps, nothing is corrupted and nothing kept alive"
import pickle, random, signal, sys, threading, time, weakref
from array import array
from collections import UserDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path

import fastai_nadam, numpy as np, pytest, torch
from fastai.learner import save_model
from torch import nn
from torch._subclasses import FakeTensorMode
from fastai_nadam import DozatNAdam, NAdam, multi_tensor
from fastai_nadam.insight import StepTrace, opt_table
from fastai_nadam.interop import to_torch
from fastai_nadam.multi_tensor import avgs
from fastai_nadam.optimizer import NAdamOptimizer, ctrl_c_waits
from fastai_nadam.rules import ruder_rule
from helpers import ReadOnly, all_params, assert_same, layouts, same, snapshot, through_steppers, twin
from impls import KernelOff, loop, with_checks, with_impl
from runs import Forked

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

@with_checks
@pytest.mark.parametrize('harm', [view_of_more, view_of_less, reshaped, less_gradient, more_gradient, expanded],
    ids=lambda o: o.__name__)
def test_another_shape_at_the_same_address(impl, harm):
    "Address and strides are as before, so only the shape tells"
    p = nn.Parameter(torch.zeros(40000, 3)[:2])
    q = nn.Parameter(torch.randn(5))
    opt = warm([q, p], impl)
    harm(p)
    assert_refused(opt, 'shape')

@with_checks
@pytest.mark.parametrize('k', ['grad_avg', 'sqr_avg'])
def test_an_average_of_another_size(impl, k):
    ps = [nn.Parameter(torch.randn(5)) for _ in range(3)]
    opt = warm(ps, impl)
    opt.state[ps[1]][k].data = torch.zeros(7)
    assert_refused(opt, rf'shape \(5,\).*{k} of shape \(7,\).*clear_state')
    opt.clear_state()
    opt.step()

@with_checks
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

@with_checks
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

@with_checks
def test_averages_follow_the_layout_of_their_parameter(impl, monkeypatch):
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
        slow = through_steppers(opt2, monkeypatch)
        for _ in range(3):
            for p,q in zip(m2.parameters(), m.parameters()): p.grad = torch.empty_like(p).copy_(q.grad)
            opt2.step()
        for p in m2.parameters():
            for k in ('grad_avg', 'sqr_avg'): assert opt2.state[p][k].stride() == p.stride()
        assert impl == loop or not slow
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

@with_checks
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

@with_checks
def test_state_that_was_cleared_is_freed(impl):
    p = nn.Parameter(torch.randn(300, 1000))
    opt = warm([p], impl)
    avgs = Freed()
    opt.state[p].update(grad_avg=avgs(300, 1000), sqr_avg=avgs(300, 1000).abs_())
    for _ in range(3): opt.step()
    opt.clear_state()
    assert avgs

@with_checks
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

@with_checks
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
    opt.load_state_dict(kept)
    opt.step()
    torch.testing.assert_close(kept, before, rtol=0, atol=0)
    assert sd['state'][0]['step'] == 4

# Flags

@pytest.mark.parametrize('k', ['decouple_wd', 'nesterov', 'foreach', 'fused'])
@pytest.mark.parametrize('v', [2, 1, 0, 'False', [True], {}, 1., None, np.array([True])], ids=repr)
def test_flags_are_true_or_false(k, v):
    p = nn.Parameter(torch.zeros(2))
    if v is None and k in ('foreach', 'fused'): return
    with pytest.raises(ValueError, match=rf'{k} must be (None, )?True or False, got'): NAdam([p], 0.1, **{k: v})
    if k == 'nesterov': return
    with pytest.raises(ValueError, match=k): DozatNAdam([p], 0.1, **{k: v})

def test_flags_may_change():
    opt = NAdam([nn.Parameter(torch.zeros(2))], 0.1)
    for k in ('foreach', 'fused'):
        with pytest.raises(ValueError, match=f'{k} must be None, True or False'): setattr(opt, k, 'yes')
    with pytest.raises(ValueError, match='decouple_wd must be True or False'): opt.decouple_wd = None
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

@with_checks
@pytest.mark.parametrize('decouple_wd', [True, False])
@pytest.mark.parametrize('share', [one_gradient, overlapping_gradients, gradient_is_the_parameter,
    another_parameter_is_the_gradient, overlapping_parameters, one_average], ids=lambda o: o.__name__)
def test_shared_memory_is_stepped_in_order(impl, decouple_wd, share, monkeypatch):
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
        slow = through_steppers(opt, monkeypatch)
        for _ in range(4): opt.step()
        assert how == loop or not any(p is ps[3] for p in slow)
        runs.append((opt, ps))
    (opt, ps), (other, qs) = runs
    assert_same(opt, other, 1e-5)
    for p,q in zip(ps, qs): torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)

@with_checks
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

@with_checks
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

@with_checks
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

# Interrupted steps

def numbers_and_averages(opt): return [{k: v for k,v in opt.state[p].items() if k != 'do_wd'} for p in all_params(opt)]

def copied(opt):
    "A copy of an optimizer, with gradients"
    res = deepcopy(opt)
    for p,q in zip(all_params(opt), all_params(res)): q.grad = p.grad.clone()
    return res

def twins(impl, opt_func=NAdam, n=3, decouple_wd=True):
    "Two optimizers with equal parameters, gradients and state; half precision and shared gradients are among them"
    shapes = [(4, 3), (5,), (0, 2), (3,), (7,)]
    ps = [nn.Parameter(torch.randn(s)) for s in shapes] + [nn.Parameter(torch.randn(6).bfloat16())]
    opt = with_impl(opt_func, [ps[:2], ps[2:]], impl, lr=0.1, wd=0.1, decouple_wd=decouple_wd)
    opt.state[ps[0]]['do_wd'] = False
    for p in ps: p.grad = torch.randn_like(p)
    for _ in range(n): opt.step()
    copied(opt).step() # what PyTorch is asked once has been asked
    return copied(opt), copied(opt)

def assert_whole(opt, before, after, may_be_cleared=False):
    "The state of each parameter is that before the step or that after it, and loads"
    for s,*others in zip(numbers_and_averages(opt), before, after, strict=True):
        fresh = {**s, **{k: 0*s[k] for k in avgs if k in s}}
        ok = any(same(s, o) for o in others) or (not others[0] and same(s, fresh) and s.get('step', 0) == 0)
        assert ok or (may_be_cleared and not {*s} - {'do_wd'}), f'state {s}\nbefore {others[0]}\nafter {others[1]}'
    NAdam([p.detach() for p in all_params(opt)], 0.1).load_state_dict(
        dict(opt.state_dict(), hypers=opt.state_dict()['hypers'][:1]))

def traced(opt, n=-1, do=None):
    "A step that calls `do` at the `n`-th line of Python that it runs. Returns these lines, as (function, number)"
    here, lines, old = str(Path(fastai_nadam.__file__).parent), [], sys.gettrace()
    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(here) and 'fastai/optimizer' not in frame.f_code.co_filename: return
        if event == 'line':
            lines.append((frame.f_code.co_name, frame.f_lineno))
            if len(lines) == n: do()
        return trace
    sys.settrace(trace)
    try: opt.step()
    finally: sys.settrace(old)
    return lines

changing = ('_init_state', '_step_batch', '_step_one_by_one', '_together', 'foreach_step', 'fused_step', 'kernel_step',
    'ctrl_c_waits', 'step')

def places(lines):
    "Where to stop a step: at many lines of the functions that change something, and at some others"
    times = defaultdict(list)
    for n,line in enumerate(lines, 1): times[line].append(n)
    there = [random.choice(ns) for (f,_),ns in times.items() if f in changing]
    return random.sample(there, min(len(there), 25)) + random.sample(range(1, len(lines)+1), 3)

@with_checks
@pytest.mark.parametrize('warm_up', [0, 3])
def test_ctrl_c_at_any_line(impl, warm_up):
    "Also in a first step, which starts the averages. Parameters and state are whole"
    opt, other = twins(impl, random.choice([NAdam, DozatNAdam]), warm_up)
    before, start = deepcopy((numbers_and_averages(opt), all_params(opt)))
    lines = traced(other)
    after, end = deepcopy((numbers_and_averages(other), all_params(other)))
    for n in places(lines):
        o = copied(opt)
        with pytest.raises(KeyboardInterrupt): traced(o, n, lambda: signal.raise_signal(signal.SIGINT))
        assert_whole(o, before, after)
        for p,a,b,s,s2 in zip(all_params(o), start, end, numbers_and_averages(o), after):
            assert same(p.data, (b if s.get('step') == s2.get('step') else a).data)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

@with_checks
@pytest.mark.parametrize('warm_up', [0, 3])
def test_an_error_at_any_line(impl, warm_up):
    opt, other = twins(impl, n=warm_up)
    before, lines = deepcopy(numbers_and_averages(opt)), traced(other)
    after = deepcopy(numbers_and_averages(other))
    def fail(): raise MemoryError
    for n in places(lines):
        o = copied(opt)
        with pytest.raises(MemoryError): traced(o, n, fail)
        signal.signal(signal.SIGINT, signal.default_int_handler) # it may have failed where the handler is put back
        assert_whole(o, before, after, may_be_cleared=True)

def test_an_error_at_any_line_around_the_kernel():
    "Which changes averages and numbers in one call, so that nothing begins anew"
    if not multi_tensor._kernel: pytest.skip('the kernel in C was not built')
    ps = [nn.Parameter(torch.randn(s)) for s in (3, 5)]
    opt = NAdam([ps[:1], ps[1:]], 0.1, fused=True)
    for p in ps: p.grad = torch.randn_like(p)
    opt.step()
    other = copied(opt)
    before, lines = deepcopy(numbers_and_averages(opt)), traced(other)
    def fail(): raise MemoryError
    for n in range(1, len(lines)+1):
        o = copied(opt)
        with pytest.raises(MemoryError): traced(o, n, fail)
        assert_whole(o, before, numbers_and_averages(other))

torch_ops = [k for k in dir(torch) if k.startswith('_foreach') or k in ('_fused_adamw_', '_fused_sgd_')]

@with_checks
@pytest.mark.parametrize('when', ['before', 'after'])
@pytest.mark.parametrize('decouple_wd,size', [(True, None), (False, None), (True, 8)])
def test_an_operation_that_fails(impl, when, decouple_wd, size, monkeypatch):
    "Each call of a foreach or fused function in a step, in turn. What could not be finished begins anew"
    monkeypatch.setattr('fastai_nadam.optimizer.cut_blocks', partial(multi_tensor.cut_blocks, size=size))
    opt, other = twins(impl, decouple_wd=decouple_wd)
    before, calls, fail_at, failed = deepcopy(numbers_and_averages(opt)), 0, 0, None
    def wrap(k, f):
        def g(*args, **kwargs):
            nonlocal calls, failed
            calls += 1
            if calls == fail_at: failed = k
            if calls == fail_at and when == 'before': raise MemoryError
            res = f(*args, **kwargs)
            if calls == fail_at: raise MemoryError
            return res
        return g
    for k in torch_ops: monkeypatch.setattr(torch, k, wrap(k, getattr(torch, k)))
    other.step()
    n_calls, after = calls, deepcopy(numbers_and_averages(other))
    assert n_calls or impl == loop
    for fail_at in range(1, n_calls+1):
        o, calls = copied(opt), 0
        with pytest.raises(MemoryError): o.step()
        # foreach computes everything first, so running out of memory changes nothing, but for a tensor in pieces
        assert_whole(o, before, after, may_be_cleared=impl != dict(foreach=True) or failed == '_foreach_copy_' or size)

@with_checks
def test_a_stepper_that_fails(impl, monkeypatch):
    opt, other = twins(loop)
    before = deepcopy(numbers_and_averages(opt))
    other.step()
    after = deepcopy(numbers_and_averages(other))
    for i in range(len(opt.cbs)):
        for j in range(6):
            o, calls = copied(opt), 0
            def fail(p, **kwargs):
                nonlocal calls
                calls += 1
                if calls == j+1: raise MemoryError
            o.cbs = [*o.cbs[:i+1], fail, *o.cbs[i+1:]]
            with pytest.raises(MemoryError): o.step()
            assert_whole(o, before, after)

@pytest.mark.skipif(sys.platform == 'win32', reason='has no such signals')
@pytest.mark.parametrize('impl', [dict(), KernelOff(), dict(foreach=True), loop],
    ids=['default', 'kernel off', 'foreach', 'loop'])
@pytest.mark.parametrize('first', [True, False])
def test_ctrl_c_in_the_middle_of_a_large_tensor(impl, first):
    "As a user does it, at 30, 50 and 70 % of a step of a few million elements"
    for at in (0.3, 0.5, 0.7):
        p = nn.Parameter(torch.randn(3_000_000))
        opt = warm([p], impl, n=0 if first else 1)
        ref = copied(opt)
        before = deepcopy(opt.state[p])
        start = time.perf_counter()
        ref.step()
        timer = threading.Timer(at*(time.perf_counter() - start), signal.raise_signal, [signal.SIGINT])
        try:
            timer.start()
            opt.step()
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt: pass
        assert_whole(opt, [before], numbers_and_averages(ref))

def test_a_second_ctrl_c_does_not_wait():
    "For a step that hangs"
    done = []
    with pytest.raises(KeyboardInterrupt), ctrl_c_waits():
        for i in range(3):
            signal.raise_signal(signal.SIGINT)
            done.append(i)
    assert done == [0] and signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_ctrl_c_that_is_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ctrl_c_waits(): signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally: signal.signal(signal.SIGINT, before)

@with_checks
def test_a_step_in_another_thread(impl):
    "Which gets no Ctrl-C, and may not say what happens with one"
    opt, other = twins(impl)
    with ThreadPoolExecutor(1) as pool: pool.submit(opt.step).result()
    other.step()
    assert_same(opt, other)

@with_checks
def test_a_state_of_another_kind(impl):
    "Is written to by its own method"
    opt, other = twins(impl)
    for p,s in opt.state.items(): opt.state[p] = UserDict(s)
    opt.step(); other.step()
    for p,q in zip(all_params(opt), all_params(other)): assert same(dict(opt.state[p]), other.state[q])

# Reading changes nothing

@with_checks
def test_reading_writes_nothing(impl):
    ps = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    opt = warm(ps, impl)
    opt.hypers[0]['lr'] = np.float64(0.1)
    state = {p: ReadOnly(s) for p,s in opt.state.items()}
    opt.state, opt.hypers = ReadOnly(state), type(opt.hypers)([ReadOnly(h) for h in opt.hypers])
    sd = opt.state_dict()
    opt.impl, repr(opt), str(opt), deepcopy(sd)
    assert type(sd['hypers'][0]['lr']) is float and type(opt.hypers[0]['lr']) is np.float64

@pytest.mark.parametrize('opt_func', [NAdam, DozatNAdam])
def test_reading_makes_no_state(opt_func, tmp_path):
    "Of parameters that have not stepped there is none"
    m = nn.Linear(3, 2)
    opt = opt_func(m.parameters(), 0.1)
    m.bias.grad = torch.ones(2)
    for stepped in ([], [m.bias]):
        if stepped: opt.step()
        sd = opt.state_dict()
        opt.impl, repr(opt), deepcopy(opt), pickle.dumps(opt), opt_table(opt)
        save_model(tmp_path/'model.pth', m, opt)
        with pytest.warns(UserWarning, match='recorded nothing'), StepTrace(opt): pass
        if opt_func is DozatNAdam: to_torch(opt)
        assert [*opt.state] == stepped and [*map(bool, sd['state'])] == [False, bool(stepped)]

# Other threads

def step_while_replaced(kernel, mixed):
    if not kernel: multi_tensor._kernel = None
    sys.setswitchinterval(1e-6)
    n = 300_000
    ps = [nn.Parameter(torch.zeros(n)) for _ in range(2)]
    opt = NAdam([*ps, nn.Parameter(torch.zeros(2).double())] if mixed else ps, 0.1)
    for p in all_params(opt): p.grad = torch.ones_like(p)
    opt.step()
    changes = [lambda s, k, p: s.update({k: torch.zeros(n)}), lambda s, k, p: setattr(s[k], 'data', torch.zeros(n)),
        lambda s, k, p: setattr(p, 'grad', torch.zeros(n)), lambda s, k, p: setattr(p.grad, 'data', torch.zeros(n)),
        lambda s, k, p: setattr(p, 'data', torch.zeros(n))]
    end = time.time() + 2
    def change():
        while time.time() < end:
            for p in ps:
                for k in avgs: random.choice(changes)(opt.state[p], k, p)
            time.sleep(random.random()*2e-4)
    t = threading.Thread(target=change)
    t.start()
    while t.is_alive():
        try: opt.step()
        except RuntimeError as e: assert 'another thread has changed a tensor' in str(e)

@pytest.mark.parametrize('kernel,mixed', [(True, False), (True, True), (False, False)])
def test_a_thread_that_replaces_tensors(kernel, mixed):
    "What is stepped is held, also of parameters of two dtypes. Large tensors are gone at once when they are freed"
    p = Forked(step_while_replaced, kernel, mixed)
    assert p.ended() == 0, p.err

def test_a_tensor_that_is_replaced_while_it_is_looked_at(without_exchange, monkeypatch):
    "Also of parameters of two dtypes, addresses are read when the memory is held, and lie in it"
    opt = warm([nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3).double())], {})
    if opt.impl != 'kernel': pytest.skip('the kernel in C was not built with OpenMP')
    read = multi_tensor.read_rows
    def replaced(ts, *args):
        if len(ts) == 4: ts[0].data = ts[0].data.clone() # of one parameter
        return read(ts, *args)
    monkeypatch.setattr(multi_tensor, 'read_rows', replaced)
    with pytest.raises(RuntimeError, match='another thread has changed a tensor'): opt.step()

def test_tensors_that_are_moved_while_they_are_compared_do_not_overlap(monkeypatch):
    "The memory that one has left may be what the next one gets"
    base, span = torch.zeros(20), multi_tensor._span
    ts = [base[i:i+5] for i in range(0, 20, 5)]
    def then_moved(t):
        found = span(t)
        for o in ts: o.data = base[1:6]
        return found
    monkeypatch.setattr(multi_tensor, '_span', then_moved)
    multi_tensor.check_tensors(ts[1], ts[0], dict(zip(avgs, ts[2:])))

def test_the_memory_that_is_held_is_what_the_addresses_point_to(without_exchange, monkeypatch):
    "Also where a tensor is replaced just after its address was read"
    lists, read = [[torch.randn(3)] for _ in range(4)], multi_tensor.read_rows
    def then_replaced(*args):
        rows = read(*args)
        for (t,) in lists: t.data = t.data.clone()
        return rows
    monkeypatch.setattr(multi_tensor, 'read_rows', then_replaced)
    rows = multi_tensor.kernel_rows(*lists)
    assert [s.data_ptr() for s in rows.storages] == list(array('Q', rows.bytes)[:4])

# Memory that is not what it was

@with_checks
@pytest.mark.parametrize('which', ['data', 'gradient', *avgs])
@pytest.mark.parametrize('offset', [0, 3])
def test_a_storage_that_has_shrunk(impl, which, offset):
    "Under the same tensor, and mostly at its old address, where nothing else tells"
    ps = [nn.Parameter(torch.randn(160)) for _ in range(2)]
    opt = warm(ps, impl)
    x = torch.rand(160 + offset)[offset:]
    if which == 'data': ps[1].data = x
    elif which == 'gradient': ps[1].grad = x
    else: opt.state[ps[1]][which] = x
    opt.step()
    address, storage = x.data_ptr(), x.untyped_storage()
    for _ in range(300):
        storage.resize_(0)
        storage.resize_(4*(159 + offset))
        if x.data_ptr() == address: break
    before = ps[0].detach().clone()
    with pytest.raises(ValueError, match=f'{which} whose memory was taken away'): opt.step()
    assert torch.equal(ps[0], before) and [opt.state[p]['step'] for p in ps] == [4, 4]

@with_checks
def test_memory_that_is_not_aligned(impl):
    "As `torch.frombuffer` gives it at an odd place"
    ps = [nn.Parameter(torch.randn(5)) for _ in range(2)]
    opt = with_impl(NAdam, ps, impl, lr=0.1)
    for p in ps: p.grad = torch.randn(5)
    ps[1].grad = torch.frombuffer(bytearray(21), dtype=torch.float32, offset=1).copy_(ps[1].grad)
    assert ps[1].grad.data_ptr() % 4
    other = twin(opt, loop)
    for _ in range(3): opt.step(); other.step()
    assert_same(opt, other, 1e-5)

# Modes of PyTorch

def forget_what_was_tried():
    for k in ('pick_impl', '_has_fused', '_has_sgd', '_inf'): getattr(multi_tensor, k).cache_clear()

def in_vmap(f):
    def g(x):
        f()
        return x
    torch.func.vmap(g)(torch.ones(2))

def under(mode):
    def call(f):
        with mode(): f()
    return call

modes = dict(fake=under(FakeTensorMode), meta=under(lambda: torch.device('meta')),
    inference=under(torch.inference_mode), vmap=in_vmap)

@pytest.mark.parametrize('mode', modes)
@pytest.mark.parametrize('impl', [dict(), KernelOff()], ids=['default', 'kernel off'])
def test_what_is_tried_in_a_mode_of_pytorch(impl, mode):
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    def tried(): return [multi_tensor._has_sgd(torch.float32), type(multi_tensor._inf(p.device))] + [
        multi_tensor.pick_impl('cpu', d, **kw) for d in (torch.float32, torch.bfloat16, torch.int32)
        for kw in (dict(), dict(foreach=False, fused=None))]
    want = tried()
    forget_what_was_tried()
    modes[mode](tried)
    assert tried() == want and not multi_tensor._inf(p.device).is_inference()
    NAdam([p], 0.1).step()
    assert p.isfinite().all()

@with_checks
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('what', ['load', 'first step', 'moved state'])
def test_inference_mode(impl, dtype, what):
    "What is made there can be stepped outside of it"
    p, q = (nn.Parameter(torch.ones(4, 3, dtype=dtype)) for _ in range(2))
    opt, other = with_impl(NAdam, [p], impl, lr=0.1), with_impl(NAdam, [q], loop, lr=0.1)
    for o in (p, q): o.grad = torch.ones_like(o)
    if what != 'first step': opt.step(); other.step()
    with torch.inference_mode():
        if what == 'load':
            opt.load_state_dict(deepcopy(opt.state_dict()))
            opt.load_state_dict(dict(opt.state_dict(), state=[{k: torch.ones(4, 3) if k in avgs else v
                for k,v in opt.state[p].items()}]))
        else:
            if what == 'moved state': p.data = p.data.T.contiguous().T
            opt.step()
    if what == 'load': other.load_state_dict(deepcopy(opt.state_dict()))
    else: other.step()
    assert not any(opt.state[p][k].is_inference() for k in avgs)
    opt.step(); other.step()
    assert_same(opt, other)

@pytest.mark.parametrize('impl', [dict(), KernelOff(), loop], ids=['default', 'kernel off', 'loop'])
def test_a_training_step_under_compile(impl):
    "The step of the optimizer in it is not traced"
    traced = []
    def rule(**kwargs):
        traced.append(torch.compiler.is_compiling())
        return ruder_rule(**kwargs)
    m = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))
    m2 = deepcopy(m)
    xs, losses = torch.randn(5, 3, 4), []
    for net,wrap in ((m, torch.compile(backend='eager')), (m2, lambda f: f)):
        opt = NAdamOptimizer(net.parameters(), rule, lr=0.1, mom=0.9, sqr_mom=0.99, eps=1e-8, wd=0.01, **impl)
        def train(x):
            loss = net(x).pow(2).mean()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss.detach()
        train = wrap(train)
        losses.append([train(x) for x in xs])
    torch.testing.assert_close(*losses)
    assert traced and not any(traced)
