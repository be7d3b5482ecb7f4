"What the tests of the optimizer share: parameters and their copies, gradients, comparisons, and low precision on a CPU"
import importlib
from copy import deepcopy
from pathlib import Path

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from torch import nn
from fastai_nadam.optimizer import NAdamOptimizer
from impls import with_impl

tols = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.02}

def gaps(t): return t.repeat_interleave(2, -1)[..., ::2] if t.ndim else t
layouts = dict(plain=lambda t: t, transposed=lambda t: t.mT.contiguous().mT if t.ndim > 1 else t, gaps=gaps,
    channels_last=lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t,
    expanded=lambda t: t[:1].expand(t.shape) if t.ndim and len(t) else t)

def all_params(opt): return [p for pg in opt.param_lists for p in pg]

def through_steppers(opt, monkeypatch):
    "A list to which each step appends the parameters that go through the steppers"
    res, cbs = [], opt.cbs
    monkeypatch.setattr(opt, 'cbs', [lambda p, **kwargs: res.append(p), *cbs])
    return res

def copies(ps, dtype=None):
    "New parameters with the values and the layouts of `ps`"
    qs = [nn.Parameter(torch.empty_strided(p.shape, p.stride(), dtype=dtype or p.dtype)) for p in ps]
    for p,q in zip(ps, qs): q.data.copy_(p.data)
    return qs

def twin(opt, impl):
    "Another optimizer like `opt`, with copies of its parameters, gradients and state"
    other = with_impl(NAdamOptimizer, [copies(pg) for pg in opt.param_lists], impl, rule=opt.rule,
        decouple_wd=opt.decouple_wd, **opt.hypers[0])
    for p,q in zip(all_params(opt), all_params(other)): q.grad = None if p.grad is None else p.grad.clone()
    other.load_state_dict(deepcopy(opt.state_dict()))
    return other

def set_grads(ps, scale=1., seed=None):
    "Random gradients; with a `seed`, the same for all parameters of the same shapes"
    g = None if seed is None else torch.Generator(ps[0].device).manual_seed(seed)
    for p in ps: p.grad = scale*torch.randn(p.shape, generator=g, device=p.device).to(p.dtype)

def train(opt, ps, grads, before=None):
    "A step with each of the lists of gradients; `before` is called before it, with its number"
    for i,gs in enumerate(grads):
        for p,g in zip(ps, gs): p.grad = None if g is None else g.to(p.dtype, copy=True)
        if before: before(opt, i)
        opt.step()

def snapshot(opt):
    "Copies of all that a refused call must leave as it was: parameters, dense gradients, state and hypers"
    ps = all_params(opt)
    grads = [p.grad.detach() if p.grad is not None and p.grad.layout == torch.strided else None for p in ps]
    return deepcopy(([p.detach() for p in ps], grads, [dict(opt.state[p]) for p in ps], [dict(h) for h in opt.hypers]))

class ReadOnly(dict):
    "A dictionary that cannot change"
    def refuse(self, *args, **kwargs): raise AssertionError('this was to be read only')
    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = refuse

def evidence(name):
    "A module of nbs/evidence"
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(Path(__file__).parent.parent/'nbs'/'evidence')
        return importlib.import_module(name)

def same(a, b):
    "Equal to the bit, in type and layout too; NaN is NaN"
    if torch.is_tensor(a):
        if not torch.is_tensor(b) or (a.dtype, a.layout, a.shape) != (b.dtype, b.layout, b.shape): return False
        if a.layout != torch.strided: a, b = a.to_dense(), b.to_dense()
        return a.stride() == b.stride() and (torch.equal(a, b) or torch.allclose(a, b, 0, 0, equal_nan=True))
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))

def assert_close(ps, qs, tol=1e-5):
    "The same values, in whatever precision"
    for p,q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach().double(), rtol=tol, atol=tol)

def assert_same(opt, other, tol=None):
    "The same parameters and the same state, up to rounding; averages have the dtype and device of their parameter"
    for p,q in zip(all_params(opt), all_params(other), strict=True):
        eps = dict(rtol=tol or tols[p.dtype], atol=tol or tols[p.dtype])
        torch.testing.assert_close(p.detach(), q.detach(), **eps)
        s, s2 = opt.state[p], other.state[q]
        assert s.keys() == s2.keys()
        for k,v in s.items():
            if torch.is_tensor(v):
                assert v.dtype == p.dtype and v.device == p.device
                torch.testing.assert_close(v, s2[k], **eps)
            else: assert v == pytest.approx(s2[k], rel=1e-12)

class CPUPrecision(MixedPrecision):
    "fastai's callback, with the autocast and the scaler of the CPU"
    name = 'mixed_precision'
    def __init__(self, dtype=torch.bfloat16, **kwargs):
        super().__init__(**kwargs)
        self.dtype = dtype
    def before_fit(self):
        self.autocast,self.scales = torch.autocast('cpu', self.dtype),[]
        self.learn.scaler = torch.amp.GradScaler('cpu', **self.kwargs)

class ToBFloat16(Callback):
    "For a model all in bfloat16"
    def before_batch(self): self.learn.xb = (self.xb[0].bfloat16(),)
    def after_pred(self): self.learn.pred = self.pred.float()
