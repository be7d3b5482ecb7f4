"The kernel in C computes the formula, touches nothing beside its tensors, and has PyTorch's threads"
import itertools, math, os, random, subprocess, sys
from functools import partial
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest, torch
from packaging.version import Version
from torch import nn
from fastai_nadam import DozatNAdam, NAdam, multi_tensor
from fastai_nadam.multi_tensor import _kernel, foreach_step, fused_step, kernel_rows, kernel_step, pick_impl
from fastai_nadam.rules import adam_rule, dozat_rule, ruder_rule
from runs import printed

built = pytest.mark.skipif(_kernel is None, reason='the kernel in C was not built, or is switched off')
threaded = pytest.mark.skipif(not (_kernel and _kernel.openmp),
    reason='a kernel in C without OpenMP is no first choice')
tols = {torch.float64: 1e-12, torch.float32: 2e-5}
one_step = dict(lr=0.1, mom=0.9, sqr_mom=0.99, eps=1e-8, wd=0.1, l2=0.1, a=0.97, b=0.31, debias2=0.5)
sizes = [0, 1, 2, 7, 15, 16, 17, 63, 100, 1001, 2**16, 2**17+5]

@pytest.fixture
def threads():
    n = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(n)

def guarded(n, dtype):
    "A tensor of `n` random elements at an odd place in a larger one, and what lies before and after it"
    at = random.randrange(20)
    base = torch.randn(n + at + 20, dtype=dtype)
    return base[at:at+n], base[:at], base[at+n:]

def formula(p, g, m, v, lr, mom, sqr_mom, eps, wd, l2, a, b, debias2):
    "One step in float64"
    g = g + l2*p
    m, v = mom*m + (1-mom)*g, sqr_mom*v + (1-sqr_mom)*g*g
    return (1-lr*wd)*p - lr*(a*m + b*g)/((v/debias2).sqrt() + eps), g, m, v

@built
@pytest.mark.parametrize('rule', [ruder_rule, partial(dozat_rule, mom_decay=4e-3), adam_rule],
    ids=['ruder', 'dozat', 'adam'])
@pytest.mark.parametrize('decay', ['wd', 'l2'])
@pytest.mark.parametrize('dtype', tols, ids=str)
def test_fifty_steps(rule, decay, dtype, threads):
    "Against the formula in float64, with other hypers in each step, on tensors of many lengths at odd places in memory"
    lengths = random.sample(sizes, len(sizes))
    lists = [[guarded(n, dtype) for n in lengths] for _ in range(4)]
    raw = [[t for t,*_ in row] for row in lists]
    around = [(o, o.clone()) for row in lists for _,*os in row for o in os]
    for v in raw[3]: v.abs_()
    exact = [[t.to(torch.float64, copy=True) for t in ts] for ts in raw]
    rows, prods, sqr_prod = kernel_rows(*raw), {}, 1.
    for step in range(1, 51):
        mom, sqr_mom = random.uniform(0.5, 0.99), random.uniform(0.9, 0.999)
        sqr_prod *= sqr_mom
        a, b, prods = rule(mom=mom, step=step, **prods)
        kw = dict(lr=random.uniform(0, 0.1), mom=mom, sqr_mom=sqr_mom, eps=1e-3, wd=0., l2=0., a=a, b=b,
            debias2=1-sqr_prod)
        kw[decay] = random.choice([0., 0.1])
        for g,x in zip(raw[1], exact[1]): x.copy_(g.normal_())
        threads(1 + (step%10 == 0))
        kernel_step(rows, **kw)
        threads(1)
        exact = list(zip(*(formula(*ts, **kw) for ts in zip(*exact))))
    for ts,xs in zip(raw, exact):
        for t,x in zip(ts, xs): torch.testing.assert_close(t.double(), x, rtol=tols[dtype], atol=tols[dtype])
    assert all(torch.equal(o, before) for o,before in around), 'something beside the tensors has changed'

@threaded
@pytest.mark.parametrize('dtype', tols, ids=str)
@pytest.mark.parametrize('opt_func', [NAdam, DozatNAdam, partial(NAdam, nesterov=False)],
    ids=['NAdam', 'DozatNAdam', 'Adam'])
@pytest.mark.parametrize('decouple_wd', [True, False])
def test_nan_and_infinity_go_where_the_steppers_send_them(dtype, opt_func, decouple_wd):
    n = 500
    ps = [nn.Parameter(torch.randn(n, dtype=dtype)) for _ in range(2)]
    ps[1].data.copy_(ps[0].data)
    opts = [opt_func([p], 0.1, wd=0.1, decouple_wd=decouple_wd, **kw)
        for p,kw in zip(ps, (dict(), dict(foreach=False, fused=False)))]
    assert [o.impl for o in opts] == ['kernel', 'steppers']
    for t in range(6):
        g = torch.randn(n, dtype=dtype)
        odd = torch.tensor([math.nan, math.inf, -math.inf, 1e-38, 1e30, 0.], dtype=dtype)
        for x in (g, ps[0].data): x[torch.randperm(n)[:6]] = odd
        ps[1].data.copy_(ps[0].data)
        for p,o in zip(ps, opts):
            p.grad = g.clone()
            o.step()
        ours, theirs = ((p.data, p.grad, o.state[p]['grad_avg'], o.state[p]['sqr_avg']) for p,o in zip(ps, opts))
        torch.testing.assert_close(ours, theirs, rtol=tols[dtype], atol=tols[dtype], equal_nan=True)
    assert 0 < ps[0].data.isfinite().sum() < n and ps[0].data.isnan().any()

@built
def test_any_number_of_threads_gives_the_same_bits(threads):
    start = [[torch.rand(n) for n in (*sizes, 200_000)] for _ in range(4)]
    res = []
    for n in (1, 2, 5):
        threads(n)
        lists = [[t.clone() for t in ts] for ts in start]
        kernel_step(kernel_rows(*lists), lr=0.1, mom=0.9, sqr_mom=0.99, eps=1e-8, wd=0.1, l2=0.1, a=1., b=0.5,
            debias2=0.5)
        res.append(sum(lists, []))
    assert all(torch.equal(x, y) for other in res[1:] for x,y in zip(res[0], other))

@threaded
@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
@pytest.mark.parametrize('first,second', [('torch_op', 'step'), ('step', 'torch_op')])
def test_threads_are_pytorchs(first, second, tmp_path):
    "No others are started, `set_num_threads` holds for both, and a child of a fork that has one thread can step"
    code = f"""
import os, torch
from fastai_nadam.multi_tensor import kernel_rows, kernel_step
lists = [[torch.ones(2_000_000)] for _ in range(4)]
def torch_op(): return lists[0][0] + lists[1][0]
hypers = dict(lr=0.1, mom=0.9, sqr_mom=0.99, eps=1e-8, wd=0., l2=0., a=1., b=1., debias2=1.)
def step(): kernel_step(kernel_rows(*lists), **hypers)
def running(): print(len(os.listdir('/proc/self/task')), flush=True)
print(len({{l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libomp' in l}}))
step(); running()
torch.set_num_threads(3); running() # this starts threads too, of another kind
{first}(); running()
{second}(); running()
if not (pid := os.fork()):
    torch.set_num_threads(1)
    step()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"""
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, # nothing else loaded
        cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert p.returncode == 0, p.stderr
    gomp, one, before, *n, child = map(int, p.stdout.split())
    assert child == 7 and one == 1
    if gomp != 1: pytest.skip('PyTorch and the kernel in C have two libraries for threads')
    assert n == [before+2]*2

def impl_if(value):
    "Print whether the kernel is off, and what steps, if the package is imported with `FASTAI_NADAM_KERNEL=value`"
    os.environ['FASTAI_NADAM_KERNEL'] = value
    for k in [*sys.modules]:
        if k.split('.')[0] == 'fastai_nadam': del sys.modules[k]
    from fastai_nadam import NAdam, multi_tensor
    print(multi_tensor._kernel is None, NAdam([torch.ones(2)], 1.).impl)

def test_switched_off_by_the_environment():
    off = ['True', 'fused' if multi_tensor._has_fused('cpu', torch.float32) else 'foreach']
    assert printed(impl_if, 'off') == off
    on = ['False', 'kernel' if _kernel.openmp else off[1]] if _kernel else off
    assert printed(impl_if, random.choice(['1', ''])) == on
    for v in ('0', '00', 'false', 'False', 'no', 'NO', 'off', ' off '): assert not multi_tensor._is_on(v)
    for v in ('', '1', 'true', 'Yes', 'on'): assert multi_tensor._is_on(v)
    for v in ('2', 'nein', '0.0'):
        with pytest.raises(ValueError, match=f'FASTAI_NADAM_KERNEL must be 1 or 0.*got .{v}'): multi_tensor._is_on(v)

def test_pick_impl(monkeypatch):
    "With a kernel that has threads, with one that has none, and without one"
    has = multi_tensor._has_fused('cpu', torch.float32)
    theirs = fused_step if has else foreach_step
    for kernel,first in ((SimpleNamespace(openmp=1), kernel_step),
        (SimpleNamespace(openmp=0), theirs if has else kernel_step), (None, theirs)):
        monkeypatch.setattr(multi_tensor, '_kernel', kernel)
        pick_impl.cache_clear()
        for dtype in tols:
            assert pick_impl('cpu', dtype) is first and pick_impl('cpu', dtype, foreach=True) is foreach_step
            assert pick_impl('cpu', dtype, False, False) is None and pick_impl('cpu', dtype, fused=False) is None
            if kernel or has:
                assert pick_impl('cpu', dtype, fused=True) is first and pick_impl('cpu', dtype, True, True) is first
        assert pick_impl('cpu', torch.bfloat16) is theirs and pick_impl('meta', torch.float32) is foreach_step
        int64 = 'cpu', torch.int64
        for *args,k in (('meta', torch.float32, 'fused'), (*int64, 'fused'), (*int64, 'foreach')):
            with pytest.raises(ValueError, match=f'{k}=True: there is no such kernel for'):
                pick_impl(*args, **{k: True})
    pick_impl.cache_clear()

# The same bits everywhere

def bits(lists): return [t.clone() for ts in lists for t in ts]

@built
@pytest.mark.parametrize('dtype', tols, ids=str)
def test_equal_values_stay_equal_at_every_place(dtype):
    "In the middle of a tensor, where many elements are computed at once, and at its ends"
    for _ in range(20):
        n = random.choice([1, 3, 17, 100, 1001])
        values = torch.randn(4, dtype=dtype).abs()
        lists = [[torch.full((n,), v, dtype=dtype)] for v in values]
        for _ in range(5): kernel_step(kernel_rows(*lists), **one_step)
        for (t,) in lists: assert (t == t[0]).all()

@built
@pytest.mark.parametrize('dtype', tols, ids=str)
def test_the_same_bits_at_every_address(dtype):
    start, res = [torch.rand(1001, dtype=dtype) for _ in range(4)], []
    for at in (0, 1, 2, 3, 5, 8, 13):
        places = at, 0, random.randrange(20), at
        lists = [[torch.empty(1021, dtype=dtype)[a:a+1001].copy_(t)] for a,t in zip(places, start)]
        for _ in range(3): kernel_step(kernel_rows(*lists), **one_step)
        res.append(bits(lists))
    for other in res[1:]: assert all(torch.equal(x, y) for x,y in zip(res[0], other))

def load_kernel(file):
    loader = ExtensionFileLoader('_kernel', str(file))
    kernel = module_from_spec(spec_from_file_location('_kernel', file, loader=loader))
    loader.exec_module(kernel)
    return kernel

@built
def test_the_same_bits_on_every_processor(tmp_path, copy_project, monkeypatch):
    "The version for the processor at hand, and the one for all others"
    copy_project(tmp_path/'p')
    build = [sys.executable, 'setup.py', '-q', 'build_ext', '--inplace', '--force']
    start = [[torch.rand(n, dtype=d) for n in (1, 7, 1000, 70_001)] for d in tols for _ in range(4)]
    res = []
    for flag in ('', '-DNO_CLONES'):
        subprocess.run(build, cwd=tmp_path/'p', env={**os.environ, 'CFLAGS': flag}, check=True, capture_output=True)
        so, = (tmp_path/'p'/'fastai_nadam').glob('_kernel*')
        monkeypatch.setattr(multi_tensor, '_kernel', load_kernel(so.rename(tmp_path/f'kernel{flag}.so')))
        lists = [[t.clone() for t in ts] for ts in start]
        for _ in range(20):
            for four in (lists[:4], lists[4:]): kernel_step(kernel_rows(*four), **one_step)
        res.append(bits(lists))
    assert all(torch.equal(x, y) for x,y in zip(*res))

# What PyTorch tells

@built
def test_the_newest_pytorch_has_the_exchange_api():
    "If this fails, PyTorch has changed, and many small tensors take two to three times as long as they should"
    if Version(torch.__version__) < Version('2.10'): pytest.skip('this PyTorch has none yet')
    ts = [torch.randn(s) for _ in range(4) for s in ((), (3,), (2, 3), (0, 2))]
    storages = [t.untyped_storage() for t in ts]
    args = ts, [s.data_ptr() for s in storages], [s.nbytes() for s in storages]
    rows = _kernel.rows(multi_tensor.exchange_api, *args)
    assert rows and rows == multi_tensor.read_rows(*args)

readers = pytest.mark.parametrize('reader', ['kernel.c', 'python'])

def rows_by(reader, ts, monkeypatch):
    "Rows of four lists of tensors, read by the kernel in C or by Python"
    if reader == 'python': monkeypatch.setattr(multi_tensor, 'exchange_api', None)
    elif not (multi_tensor.exchange_api and _kernel): pytest.skip('no kernel, or this PyTorch has no exchange API')
    else: monkeypatch.setattr(multi_tensor, 'read_rows', lambda *args: None)
    return multi_tensor.ordinary_rows(*ts)

@readers
@pytest.mark.parametrize('harm', ['dtype', 'shape', 'strides', 'gaps', 'expanded', 'negative', 'class', 'shared',
    'overlap', 'sparse', 'meta', 'empty storage', 'shrunk storage', 'not aligned', 'none', 'number'])
def test_rows_out_of_the_ordinary(reader, harm, monkeypatch):
    "In any place of any row"
    ts = [[torch.randn(4, 4) for _ in range(3)] for _ in range(4)]
    assert rows_by(reader, ts, monkeypatch)
    def shrunk():
        x = torch.randn(100)[50:66].view(4, 4)
        x.untyped_storage().resize_(4*65)
        return x
    def emptied():
        x = torch.randn(4, 4)
        x.untyped_storage().resize_(0)
        return x
    class Other(torch.Tensor): pass
    for k,j in itertools.product(range(4), range(3)):
        t, other = ts[k][j], ts[(k+1) % 4][(j+1) % 3]
        ts[k][j] = {'dtype': lambda: t.double(), 'shape': lambda: t[:2], 'strides': lambda: t.t().contiguous().t(),
            'gaps': lambda: torch.randn(4, 8)[:, ::2],
            'expanded': lambda: t[:1].expand(4, 4), 'class': lambda: t.as_subclass(Other), 'shared': lambda: other,
            'negative': lambda: torch.randn(16, dtype=torch.complex64).conj().imag.as_strided((4, 4), (4, 1)),
            'overlap': lambda: other.view(-1).as_strided((4, 4), (4, 1)), 'sparse': lambda: t.to_sparse(),
            'meta': lambda: t.to('meta'), 'empty storage': emptied, 'shrunk storage': shrunk, 'none': lambda: None,
            'not aligned': lambda: torch.frombuffer(bytearray(65), dtype=torch.float32, offset=1).view(4, 4),
            'number': lambda: 3.}[harm]()
        assert rows_by(reader, ts, monkeypatch) is None
        ts[k][j] = t

@readers
@pytest.mark.parametrize('harm', ['gaps', 'expanded', 'two dtypes', 'integers', 'meta'])
def test_a_row_out_of_the_ordinary(reader, harm, monkeypatch):
    "Whose four tensors are alike"
    new = {'gaps': lambda: torch.randn(4, 8)[:, ::2], 'expanded': lambda: torch.randn(1, 4).expand(4, 4),
        'two dtypes': lambda: torch.randn(4, 4).double(), 'integers': lambda: torch.ones(4, 4, dtype=torch.int32),
        'meta': lambda: torch.ones(4, 4, device='meta')}[harm]
    for others in (lambda: torch.randn(4, 4), new)[:1 + (harm != 'two dtypes')]:
        assert rows_by(reader, [[others(), new(), others()] for _ in range(4)], monkeypatch) is None

@readers
def test_dense_layouts_are_ordinary(reader, monkeypatch):
    for shape in ((2, 3, 4, 5), (1, 3, 1, 2), (5, 1), (1,)):
        order = random.sample(range(len(shape)), len(shape))
        back = [order.index(i) for i in range(len(shape))]
        ts = [[torch.randn([shape[i] for i in order]).permute(back)] for _ in range(4)]
        assert ts[0][0].shape == shape and rows_by(reader, ts, monkeypatch)

@built
def test_step_takes_nothing_else():
    "As the function of the C module is called, with arguments that are no good"
    rows = kernel_rows(*[[torch.ones(3)] for _ in range(4)])
    numbers = 0, 1, *[1.]*9
    for bad in ((), (rows.bytes,), (rows.bytes, (), {}), (rows.bytes, [{}], [], *numbers), (3, [], {}, *numbers)):
        with pytest.raises(TypeError): _kernel.step(*bad)
    for bad in ((), (None, [], [], []), (object(), [1]*4, [0]*4, [0]*4)):
        try: assert _kernel.rows(*bad) is None
        except TypeError: pass
