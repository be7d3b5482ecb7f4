"""Random lives of an optimizer: whatever is done to its tensors between steps, each is that of the steppers in float64

For a long search: python tests/test_fuzz.py SECONDS, with NADAM_FUZZ_EXCHANGE=0 as with a PyTorch before 2.10.
One life again: python tests/test_fuzz.py --seed SEED"""
import gc, os, pickle, random, sys, time, traceback, warnings
from collections import defaultdict
from copy import deepcopy
from functools import partial
from itertools import pairwise, permutations

import numpy as np, pytest, torch
from torch import nn
from fastai_nadam import DozatNAdam, NAdam, multi_tensor
from fastai_nadam.optimizer import NAdamOptimizer
from helpers import all_params, snapshot

opt_funcs = [NAdam, partial(NAdam, nesterov=False), partial(NAdam, decouple_wd=False),
    partial(NAdam, nesterov=False, decouple_wd=False),
    DozatNAdam, partial(DozatNAdam, decouple_wd=False), partial(DozatNAdam, mom_decay=None)]
impls = dict(default={}, foreach=dict(foreach=True), fused=dict(fused=True), pytorch=dict(fused=True),
    steppers=dict(foreach=False, fused=False), no_exchange={}) # the last without DLPack's exchange API
kernel = multi_tensor._kernel # None where it was not built; 'pytorch' is the fused kernel of PyTorch where it was
if not multi_tensor._has_fused('cpu', torch.bfloat16): del impls['fused'], impls['pytorch'] # in an older PyTorch
shapes = [(), (1,), (3,), (7,), (2, 3), (4, 4), (0, 2), (2, 1, 3), (3, 2, 2, 2), (50, 9), (70, 1001)]
ulps = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 0.03, torch.float16: 4e-3}
avgs = 'grad_avg', 'sqr_avg'

exchange_api = None if os.environ.get('NADAM_FUZZ_EXCHANGE') == '0' else multi_tensor.exchange_api

def use(has_kernel=True, has_exchange=True):
    multi_tensor._kernel = kernel if has_kernel else None
    multi_tensor.exchange_api = exchange_api if has_exchange else None
    multi_tensor.pick_impl.cache_clear()

class Life:
    "An optimizer, its parameters, and memory that is no longer theirs"
    def __init__(self, seed, impl=None):
        self.rng, self.left = random.Random(seed), []
        torch.manual_seed(seed)
        self.name = impl or self.rng.choice(list(impls))
        self.impl = impls[self.name]
        use(self.name != 'pytorch', self.name != 'no_exchange')
        self.opt_func = self.rng.choice(opt_funcs)
        f32, f64 = torch.float32, torch.float64
        dtypes = self.rng.choice([*[[f32]]*4, [f64], [f32, f64], [f32, *ulps]])
        one = self.rng.choice(shapes[:-1])
        sizes = shapes if self.rng.random() < 0.1 else shapes[:-1]
        def size(): return one if self.rng.random() < 0.5 else self.rng.choice(sizes)
        ps = [nn.Parameter(torch.randn(size()).to(self.rng.choice(dtypes))) for _ in range(self.rng.randint(1, 6))]
        i = self.rng.randint(1, len(ps))
        self.opt = self.opt_func([ps[:i], ps[i:]], 0.01, wd=0.1, **self.impl)
        self.sds = []

    def pick(self, grad=False, like=None):
        "A parameter, with a gradient, or of the shape and dtype of another"
        ps = [p for p in all_params(self.opt) if not grad or p.grad is not None]
        if like is not None: ps = [p for p in ps if p is not like and p.shape == like.shape and p.dtype == like.dtype]
        return self.rng.choice(ps) if ps else None

    def leave(self, t): self.left = [*self.left[-7:], t.detach()]

    def new(self, t):
        "The values of `t` in other memory, in some layout"
        how = self.rng.randrange(7)
        if how == 1 and t.ndim > 1: return t.mT.contiguous().mT
        if how == 2 and t.ndim: return t.repeat_interleave(2, -1)[..., ::2]
        if how == 3 and t.ndim == 4: return t.to(memory_format=torch.channels_last, copy=True)
        if how == 4: return torch.stack([torch.zeros_like(t), t])[1] # in the middle of other memory
        if how == 5 and t.ndim > 1: return t.transpose(0, 1).contiguous().transpose(0, 1)
        return t.clone(memory_format=torch.contiguous_format)

# What may happen between two steps

def data_moves(life, p):
    life.leave(p.data)
    p.data = life.new(p.data)
def data_exchanged(life, p):
    q = life.pick(like=p)
    if q is not None: p.data, q.data = q.data, p.data
def data_reread(life, p):
    "The same memory in another order, or more or less of it"
    n, room = p.numel(), p.data.untyped_storage().nbytes() // p.element_size() - p.storage_offset()
    layouts = [((n,), (1,)), ((1, n), (1, 1)), ((n, 1), (1, 1)), ((2,), (1,)), ((), ()),
        (tuple(p.shape)[::-1], tuple(p.stride())[::-1])]
    for size,stride in life.rng.sample(layouts, len(layouts)):
        if sum((a-1)*b for a,b in zip(size, stride)) < room and (size, stride) != (tuple(p.shape), p.stride()): break
    else: return # nothing fits
    p.data = p.data.as_strided(size, stride, p.data.storage_offset())
def dtype_changes(life, p):
    p.data, p.grad = p.data.to(life.rng.choice(list(ulps))), None
def shape_changes(life, p):
    p.data, p.grad, life.opt.state[p] = torch.randn(life.rng.choice(shapes[:-1])).to(p.dtype), None, {}
def expanded(life, p):
    if p.ndim and len(p): p.data = p.data[:1].expand(p.shape)

def give(p, g):
    if g.shape == p.shape and g.dtype == p.dtype: p.grad = g # PyTorch takes no other
def grad_moves(life, p): give(p, life.new(p.grad.detach()))
def grad_data_moves(life, p): p.grad.data = life.new(p.grad.data)
def grad_is_shared(life, p):
    q = life.pick(like=p)
    if q is not None and not p.grad.is_neg(): give(q, p.grad) # of a negative view, deepcopy makes two
def grads_are_exchanged(life, p):
    q = life.pick(grad=True, like=p)
    if q is not None:
        g = p.grad
        give(p, q.grad)
        give(q, g)
def grad_is_expanded(life, p):
    if p.ndim and len(p): p.grad = torch.randn_like(p.data[:1]).expand(p.shape)
def grad_overlaps(life, p):
    "With the parameter, or with the average"
    give(p, life.rng.choice([p.data, life.opt.state[p].get('grad_avg', p.data)]))
def grad_is_negative(life, p):
    if p.dtype in (torch.float32, torch.float64):
        give(p, torch.complex(torch.zeros_like(p.grad), p.grad.detach()).conj().imag)
def grad_resized(life, p): p.grad.data = torch.randn(life.rng.choice(shapes[:-1])).to(p.dtype)
def grad_has_history(life, p): p.grad = torch.randn_like(p.data).requires_grad_() * 2

def avg_of(life, p):
    state = life.opt.state[p]
    k = life.rng.choice(avgs)
    return state, k if k in state else None
def average_moves(life, p):
    "As when an optimizer is taken off a GPU and brought back"
    state, k = avg_of(life, p)
    if k:
        life.leave(state[k].data)
        state[k].data = life.new(state[k].data)
def average_is_replaced(life, p):
    state, k = avg_of(life, p)
    if k: state[k] = life.new(state[k])
def average_changes_dtype(life, p):
    state, k = avg_of(life, p)
    if not k or any(q.grad is state[k] for q in all_params(life.opt)): return
    state[k].data = state[k].data.to(life.rng.choice(list(ulps)))
def averages_are_exchanged(life, p):
    q = life.pick(like=p)
    state, k = avg_of(life, p)
    if q is not None and k and k in life.opt.state[q]: state[k], life.opt.state[q][k] = life.opt.state[q][k], state[k]
def average_is_shared(life, p):
    q = life.pick(like=p)
    state, k = avg_of(life, p)
    if q is not None and k in life.opt.state[q]: life.opt.state[q][k] = state[k]
def average_resized(life, p):
    state, k = avg_of(life, p)
    if k: state[k].data = torch.zeros(life.rng.choice(shapes[:-1]), dtype=state[k].dtype)
def state_is_exchanged(life, p):
    q = life.pick(like=p)
    if q is not None: life.opt.state[p], life.opt.state[q] = life.opt.state[q], life.opt.state[p]
def state_is_copied(life, p): life.opt.state[p] = deepcopy(life.opt.state[p])
def state_is_cleared(life, p): life.opt.state[p] = {}
def numbers_are_edited(life, p):
    state = life.opt.state[p]
    k = life.rng.choice(['step', 'mom_prod', 'mu_prod', 'sqr_mom_prod'])
    if k not in state: return
    if k == 'step': state[k] += life.rng.randint(1, 3)
    elif life.rng.random() < 0.5: state[k] *= 0.5
    else: del state[k]
def do_wd_changes(life, p): life.opt.state[p]['do_wd'] = not life.opt.state[p].get('do_wd', True)

def freezes(life, p):
    life.opt.state[p]['force_train'] = life.rng.random() < 0.5
    life.opt.freeze()
def thaws(life, p): life.opt.unfreeze()
def one_freezes(life, p): p.requires_grad_(not p.requires_grad)
def clears(life, p): life.opt.clear_state()
def saves(life, p): life.sds.append(deepcopy(life.opt.state_dict()))
def loads(life, p):
    sd = life.rng.choice([life.opt.state_dict(), *life.sds])
    try: life.opt.load_state_dict(sd)
    except ValueError: pass # shapes have changed since
def is_copied(life, p): life.opt = deepcopy(life.opt)
def is_pickled(life, p): life.opt = pickle.loads(pickle.dumps(life.opt))
def becomes_another(life, p):
    opt = life.opt_func(list(map(list, life.opt.param_lists)), 0.02, **life.rng.choice(list(impls.values())))
    try: opt.load_state_dict(life.opt.state_dict())
    except ValueError: pass
    life.opt = opt
def groups_change(life, p):
    ps = all_params(life.opt)
    life.rng.shuffle(ps)
    i = life.rng.randint(0, len(ps))
    life.opt.param_lists = [ps[:i], ps[i:]]
def same_memory(life, p):
    "Other parameters, without state, that have the memory of those before"
    life.opt.param_lists = [[nn.Parameter(p.detach(), p.requires_grad) for p in pg] for pg in life.opt.param_lists]
def converted(life, p):
    "As `model.to(dtype)` with swapped parameters"
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().double().to(p.dtype)))
def flags_change(life, p):
    def flag(k): return life.rng.choice(list(impls.values())).get(k)
    life.opt.foreach, life.opt.fused = flag('foreach'), flag('fused')
def hypers_change(life, p):
    r = life.rng.random
    life.opt.set_hypers(lr=[0.1*r(), np.float64(0.01)], mom=0.99*r(), sqr_mom=[0.999*r(), 0.99],
        wd=life.rng.choice([0, 0.3])*r())
def hypers_are_written(life, p): life.opt.hypers[0].update(mom=life.rng.choice([0., 0.5, 0.95]), eps=1e-6)
def zero_grad(life, p): life.opt.zero_grad()
def grads_are_none(life, p):
    for q in all_params(life.opt): q.grad = None
def collected(life, p): gc.collect()

on_params = [data_moves, data_exchanged, data_reread, dtype_changes, shape_changes, expanded,
    average_moves, average_is_replaced, average_changes_dtype, averages_are_exchanged, average_is_shared,
    average_resized, state_is_exchanged, state_is_copied, state_is_cleared, numbers_are_edited, do_wd_changes,
    freezes, thaws, one_freezes, clears, saves, loads, is_copied, is_pickled, becomes_another, groups_change,
    same_memory, converted, flags_change, hypers_change, hypers_are_written, zero_grad, grads_are_none, collected]
on_grads = [grad_moves, grad_data_moves, grad_is_shared, grads_are_exchanged, grad_is_expanded, grad_overlaps,
    grad_is_negative, grad_resized, grad_has_history]

# What a step must do

def stepped(opt): return [p for p in all_params(opt) if p.grad is not None and p.requires_grad]

def is_partly_over(t, u):
    "Does PyTorch take them for that? Tried on a copy of their memory"
    if t.dtype != u.dtype or not t.numel(): return False
    if t.untyped_storage().data_ptr() != u.untyped_storage().data_ptr(): return False
    mem = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage().clone())
    a, b = (mem.as_strided(o.shape, o.stride(), o.storage_offset()) for o in (t.detach(), u.detach()))
    try: a.add_(b)
    except RuntimeError: return True
    return False

def extent(t):
    "Elements of memory from the first to the last of `t`"
    return 1 + sum((n-1)*s for n,s in zip(t.shape, t.stride()) if n)

def steppable(opt):
    "Written without a look at what the optimizer checks"
    for p in stepped(opt):
        ts = [p, p.grad, *(opt.state[p][k] for k in avgs if k in opt.state[p])]
        if any(t.shape != p.shape for t in ts): return False
        for t in (ts[0], *ts[2:]): # is each element one of its own?
            if len(torch.arange(extent(t)).as_strided(t.shape, t.stride()).unique()) < t.numel(): return False
        if any(is_partly_over(*o) for o in permutations(ts, 2)): return False
    return True

def tensors(opt):
    every = (t for p in all_params(opt) for t in (p, p.grad, *(opt.state[p].get(k) for k in avgs)))
    return [t for t in every if t is not None and t.numel()]

def span(t): return t.data_ptr(), t.data_ptr() + t.element_size()*extent(t)

def overlaps(opt):
    "Does any memory overlap other memory? Then the reference cannot be taken apart and made float64"
    return any(a[1] > b[0] for a,b in pairwise(sorted(map(span, tensors(opt)))))

def reference(opt):
    "The same in other memory, in float64 where that means the same; with the steppers, and nothing kept from before"
    ps, steps = all_params(opt), {id(p) for p in stepped(opt)}
    def parts(p): return p.detach(), p.grad.detach() if id(p) in steps else None, opt.state[p]
    copies = deepcopy([parts(p) for p in ps])
    # L2 decay rounds the gradient itself
    rounds = not opt.decouple_wd and any(p.dtype in (torch.float16, torch.bfloat16) for p in ps)
    alone, qs = not (overlaps(opt) or rounds), []
    for p,(t,g,state) in zip(ps, copies):
        if alone and id(p) in steps:
            t, g = t.double(), g.double()
            state.update({k: state[k].double() for k in avgs if k in state})
        qs.append(nn.Parameter(t, p.requires_grad))
        qs[-1].grad = g
    n = len(opt.param_lists[0])
    ref = NAdamOptimizer([qs[:n], qs[n:]], opt.rule, opt.decouple_wd, foreach=False, fused=False)
    ref.hypers, ref.state = deepcopy(opt.hypers), defaultdict(dict, {q: c[2] for q,c in zip(qs, copies)})
    return ref

def close(got, want, dtype, msg, slack=1):
    got, want = got.detach().double(), want.detach().double()
    size = want.nan_to_num(0, 0, 0).abs().max().item() if want.numel() else 0.
    tol = dict(rtol=slack*ulps[dtype], atol=slack*ulps[dtype]*max(0.1, size), equal_nan=True)
    if not torch.allclose(got, want, **tol): torch.testing.assert_close(got, want, msg=lambda m: f'{msg}: {m}', **tol)

def check_step(life):
    opt = life.opt
    if not steppable(opt):
        before = snapshot(opt)
        with pytest.raises(ValueError, match='shape'): opt.step()
        torch.testing.assert_close(snapshot(opt), before, rtol=0, atol=0, equal_nan=True)
        for p in stepped(opt): # so that life can go on
            p.data, p.grad, opt.state[p] = torch.randn(life.rng.choice(shapes[:-1])).to(p.dtype), None, {}
        return
    ref = reference(opt)
    steps, in_use = {id(p) for p in stepped(opt)}, [span(t) for t in tensors(opt)]
    left = [(t, t.clone()) for t in life.left if all(a >= span(t)[1] or b <= span(t)[0] for a,b in in_use)]
    ref.step()
    opt.step()
    for i,(p,q) in enumerate(zip(all_params(opt), all_params(ref), strict=True)):
        # Of L2 decay, rounding is seen where wd·p and the gradient cancel
        l2 = not opt.decouple_wd and p.dtype in (torch.float32, torch.float64)
        close(p, q, p.dtype, f'parameter {i}', slack=100 if l2 else 1)
        if q.grad is not None: close(p.grad, q.grad, p.dtype, f'gradient {i}')
        s, s2 = opt.state[p], ref.state[q]
        assert s.keys() == s2.keys(), (s.keys(), s2.keys())
        for k,v in s.items():
            if k in avgs:
                assert v.dtype == p.dtype or id(p) not in steps
                close(v, s2[k], min(p.dtype, v.dtype, key=lambda o: -ulps[o]), f'{k} {i}')
            else: assert v == pytest.approx(s2[k], rel=1e-12), k
    for t,was in left: assert torch.equal(t.nan_to_num(), was.nan_to_num()), 'memory that was left has changed'

def live(seed, impl=None, n_steps=25):
    life = Life(seed, impl)
    log = [f'{life.opt_func}, {life.name}, {[(tuple(p.shape), p.dtype) for p in all_params(life.opt)]}']
    try:
        for _ in range(n_steps):
            for p in all_params(life.opt):
                g = p.grad
                if g is None:
                    if life.rng.random() < 0.9: p.grad = torch.randn_like(p.data)
                elif life.rng.random() < 0.5 and g.grad_fn is None and g.shape == p.shape and 0 not in g.stride():
                    g.mul_(0.5).add_(torch.randn_like(g))
            for _ in range(life.rng.choice([0, 0, 0, 1, 1, 2, 3])):
                grads = life.rng.random() < 0.3
                p = life.pick(grad=grads)
                if p is None: continue
                event = life.rng.choice(on_grads if grads else on_params)
                log.append(event.__name__)
                event(life, p)
            log.append('step')
            check_step(life)
    except BaseException as e:
        e.add_note(f'seed {seed}: {"; ".join(log)}') if hasattr(e, 'add_note') else print(seed, log)
        raise
    finally: use()

@pytest.mark.parametrize('impl', impls)
def test_lives(impl):
    warnings.simplefilter('ignore') # of fastai, that all groups are frozen
    for _ in range(int(os.environ.get('NADAM_FUZZ_LIVES', 6))): live(random.randrange(2**32), impl)

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    if sys.argv[1] == '--seed':
        live(int(sys.argv[2]))
        sys.exit()
    end, n, rng, found = time.time() + float(sys.argv[1]), 0, random.SystemRandom(), 0
    while time.time() < end:
        try: live(rng.randrange(2**32))
        except Exception:
            traceback.print_exc()
            found += 1
        n += 1
        if n % 1000 == 0: print(f'{n} lives, {found} findings', flush=True)
    print(f'{n} lives, {found} findings', flush=True)
    sys.exit(found > 0)
