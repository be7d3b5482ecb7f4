"Measurements measure what they say, and the command refuses what it cannot do"
import itertools, json, math, random, time
from types import SimpleNamespace

import pandas as pd, pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, Optimizer
from torch import nn

from fastai_nadam import NAdam
from fastai_nadam.tools import bench as b
from fastai_nadam.tools.bench import (bench_cases, bench_step, find_peers, interleave, load_figures, main, new_params,
    reference, save_figures, saving, sentence, show_table, time_batches, times)
from fastai_nadam.multi_tensor import _kernel
from impls import needs_kernel
from runs import here

pytestmark = needs_kernel

def test_turns_are_fair():
    calls = []
    fs = {k: lambda k=k: (calls.append(k), time.sleep(0.006)) for k in 'abc'}
    df = interleave(fs, rounds=30)
    turns = [tuple(calls[i:i+3]) for i in range(9, len(calls), 3)] # after three calls of each
    assert df.shape == (30, 3) and len(turns) == 30
    assert all(sorted(o) == list('abc') for o in turns) and len(set(turns)) > 2
    assert (df >= 0.006).all(axis=None)

def test_what_prepares_a_call_is_not_timed(monkeypatch):
    clock = [0.]
    def pass_time(s): clock[0] += s
    monkeypatch.setattr(b, 'time', SimpleNamespace(perf_counter=lambda: clock[0]))
    df = interleave({'a': lambda: pass_time(1), 'b': lambda: pass_time(2)}, rounds=3, before=lambda: pass_time(100))
    assert (df.a == 1).all() and (df.b == 2).all()

@pytest.mark.parametrize('x,said', [
    ([2.]*20, '2.00 times as long'), ([.5]*20, '0.50 times as long'), ([.9]*10 + [1.2]*10, 'about as long'),
    ([.99]*6 + [1.1]*14, 'about as long'), ([.99]*5 + [1.1]*15, '1.10 times as long'), ([2.]*3, 'too few rounds')])
def test_a_difference_that_may_be_noise_is_none(x, said):
    random.shuffle(x)
    df = pd.DataFrame({reference: [1.]*len(x), 'x': x})
    assert said in sentence(df, 'x')
    assert ('% less time' in saving(df, 'x', reference)) == (said[:2] == '0.')

def test_saving():
    df = pd.DataFrame({'a': [10.]*20, 'b': [8.]*5 + [9.]*10 + [9.4]*5})
    assert saving(df, 'b', 'a') == '10 % less time (95 % interval 10 to 10)'
    df['b'] = [8.]*6 + [9.]*8 + [9.4]*6
    assert saving(df, 'b', 'a') == '10 % less time (95 % interval 6 to 20)'

def test_table():
    steps = pd.DataFrame([dict(opt=reference, step=[1.]*6, both=[2.]*6, limit=.5, extra_mib=0., first_s=1.),
        dict(opt='fastai Adam', step=[3., 1, 2, 2, 2, 2], both=[1234.]*6, limit=.5, extra_mib=150., first_s=2.)])
    t = show_table(steps)
    assert t['step'].loc['fastai Adam'].to_dict() == {'ms': '2.00', '× fused AdamW': '2.00 (1.00 to 3.00)',
        '× memory limit': '4.00', 'extra MiB': '150', 'first 5 steps, s': '2.00'}
    assert t['step and zero_grad'].loc['fastai Adam'].to_dict() == {'ms': '1,234', '× fused AdamW': '617'}
    batch = dict(opt=reference, batch=[8.]*6, in_batch=[2.]*6)
    both = show_table(steps.merge(pd.DataFrame([batch]), how='left'))  # the other has no batch
    assert both['whole batch'].to_dict('list') == {
        'ms': ['8.00', ''], '× fused AdamW': ['1.00', ''], 'of it step and zero_grad, %': ['25.00', '']}
    assert both[['step', 'step and zero_grad']].equals(t)
    faster = show_table(pd.DataFrame([{**batch, 'opt': 'fastai Adam', 'batch': [10.]*6}, batch]))
    assert faster['whole batch', '× fastai Adam'].tolist() == ['1.00', '0.80']

def test_figures_are_stored(tmp_path):
    df = pd.DataFrame([dict(opt='a', step=[random.random() for _ in range(5)], tensors=3, parameters=10**9)])
    save_figures(dict(device='cpu "x"', rounds=5, steps=df), tmp_path/'x.json')
    back = load_figures(tmp_path/'x.json')
    assert back['device'] == 'cpu "x"' and back['rounds'] == 5
    assert back['steps'].step[0] == pytest.approx(df.step[0], rel=1e-3)
    assert back['steps'].drop(columns='step').equals(df.drop(columns='step'))
    assert len((tmp_path/'x.json').read_text().splitlines()) == 7

def test_short_calls_are_repeated():
    calls = []
    assert len(interleave({'a': lambda: calls.append(1)}, rounds=2)) == 2 and len(calls) > 100

def test_steps_and_columns():
    seen = []
    class Thief:
        "Takes the gradients away, as HeavyBall's optimizers do"
        def __init__(self, ps, lr): self.ps = ps
        def step(self):
            for p in self.ps: p.grad = None
        zero_grad = step
    class Counted:
        def __init__(self, ps, lr): self.opt, self.ps, self.n = NAdam(ps, lr), ps, 0
        def step(self):
            assert all(p.grad is not None and p.grad.any() for p in self.ps) # a zeroed gradient would make another step
            self.n += 1
            self.opt.step()
        def zero_grad(self):
            assert all(p.grad is not None for p in self.ps)
            seen.append(self.n)
            self.opt.zero_grad()
            time.sleep(0.006)
    peers = {reference: find_peers()[reference], 'thief': Thief, 'counted': Counted}
    df = bench_step([(3, 4), (5,)], peers, rounds=6)
    assert list(df.opt) == list(peers)
    assert list(df) == 'opt step both limit extra_mib first_s'.split()
    step, both = times(df, 'step'), times(df, 'both')
    assert step.shape == both.shape == (6, 3) and (step < both).all(axis=None)
    assert (both.counted - step.counted > 6).all()
    assert len(seen) == 3+6 and len(set(seen)) == 1 and seen[0] > 5  # after all steps
    assert show_table(df).shape == (3, 7) and show_table(df)['step', '× fused AdamW'].iloc[0] == '1.00'

def test_a_slow_optimizer_is_seen_to_be_slow():
    class Slow:
        def __init__(self, ps, lr): pass
        def step(self): time.sleep(0.02); torch.empty(2**20)
        def zero_grad(self): time.sleep(0.01)
    df = bench_step([(3,)], {reference: find_peers()[reference], 'slow': Slow}, rounds=3)
    slow = df.set_index('opt').loc['slow']
    assert min(slow.step) >= 20 and min(slow.both) >= 30 and slow.first_s >= 0.1 and slow.extra_mib == pytest.approx(4)

@pytest.mark.parametrize('name', ['NAdam', 'DozatNAdam'])
def test_ours_need_no_memory(name):
    "Beyond parameters, gradients and state; at most 8 MiB without the kernel in C. (Figures of memory are no timings)"
    df = bench_step([(4_000_000,), (300, 300), *[(64,)]*50], {k: find_peers()[k] for k in (reference, name)}, rounds=1)
    assert df.set_index('opt').extra_mib[name] < (0.01 if _kernel else 8)

def test_every_peer_steps():
    peers = find_peers()
    ours, theirs = ('NAdam', 'DozatNAdam', 'NAdam(steppers)'), ('torch NAdam', 'torch NAdam(foreach)', 'timm NAdamW')
    assert set(peers) == {reference, 'fastai Adam', *ours, *theirs}
    for f in peers.values():
        ps = new_params([(3, 4), (5,)])
        before = [p.detach().clone() for p in ps]
        f(ps, lr=0.1).step()
        assert not any(torch.equal(p, q) for p,q in zip(ps, before))

def test_large_cases_have_two_optimizers(monkeypatch):
    asked = []
    def fake(shapes, peers, **kwargs):
        asked.append(list(peers))
        return bench_step([(2,)], {reference: peers[reference]}, rounds=1)
    monkeypatch.setattr(b, 'bench_step', fake)
    df = bench_cases({'small': [(10,)], 'large': [(200_000_000,)]})
    assert asked == [list(find_peers()), [reference, 'NAdam']] and df.parameters.tolist() == [10, 200_000_000]
    sizes = [(len(s), sum(map(math.prod, s))) for s in b.growing().values()]
    assert {(10, 1000), (100, 1_000_000), (100, 300_000_000), (10_000, 1_000_000)} <= set(sizes)

def test_batches_differ_in_nothing_but_the_optimizer():
    "A slow optimizer makes slow batches, not those of the others; each keeps its state, and has fastai's `do_wd`"
    class Slow(Optimizer):
        def __init__(self, params, lr): super().__init__(params, [], lr=lr)
        def step(self): time.sleep(0.05)
    made = []
    def noted(params, lr):
        made.append(NAdam(params, lr))
        return made[-1]
    n = [0]
    def count(*args): n[0] += 1
    dls = DataLoaders.from_dsets([(torch.rand(3), 0)]*64, [(torch.rand(3), 0)], bs=4, num_workers=0, device='cpu')
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.register_forward_hook(count)
    learn = Learner(dls, model, CrossEntropyLossFlat(), cbs=b.BatchTimer())
    df = time_batches(learn, {'noted': noted, 'slow': Slow}, rounds=6)
    assert n[0] == 3*2*(1+6)  # three batches, two optimizers, once more to warm up
    assert df.slow.map(lambda o: 0.05 <= o[1] <= o[0]).all() and df.noted.map(lambda o: o[1] < 0.05).mean() > 0.5
    assert len(made) == 1 and {made[0].state[p]['step'] for p in model.parameters()} == {3*7}
    assert [made[0].state[p].get('do_wd', True) for p in model.parameters()] == [True, False, False, False, True, False]

def test_command(tmp_path, capsys):
    args = '--nets mlp,squeezenet1_1 --opts DozatNAdam --rounds 2 --json figures.json --plot plot.png'
    assert main(args.split()) == 0
    out = capsys.readouterr().out
    assert 'mlp, 10 tensors, 31,722 parameters: step' in out and 'memory limit' in out and 'torch NAdam' not in out
    figures = json.loads((tmp_path/'figures.json').read_text())
    steps = list(itertools.product(('mlp', 'squeezenet1_1'), (reference, 'DozatNAdam')))
    assert [(o['case'], o['opt']) for o in figures['steps']] == steps
    assert figures['versions']['torch'] and figures['rounds'] == 2 == len(figures['steps'][0]['step'])
    assert (tmp_path/'plot.png').stat().st_size > 5000
    assert main('--tensors 7 --numel 3 --opts NAdam --rounds 1 --dtype bfloat16'.split()) == 0
    assert '7 x 3, 7 tensors, 21 parameters' in capsys.readouterr().out

@pytest.mark.parametrize('args,message', [
    ('--opts SGD', 'opts must be among AdamW(fused), NAdam, '), ('--opts HeavyBall', 'opts must be among'),
    ('--opts ,', "got ''"), ('--nets mlp,resnet35', "got 'resnet35'"),
    ('--rounds 0', 'rounds must be'), ('--round 3', 'unrecognized arguments'),
    ('--tensors 0', 'tensors must be'), ('--tensors 3 --numel 0', 'numel must be'),
    ('--dtype int8', 'dtype must be one of float32'), ('--device tpu', "device must be cpu or cuda, got 'tpu'"),
    ('--json .', "json must be a file in a folder that exists, got '.'"),
    ('--json no/figures.json', 'json must be a file in a folder'),
    ('--plot fig.xyz', "plot must be a .png file in a folder that exists, got 'fig.xyz'"),
    ('--plot no/plot.png', 'plot must be a .png file in a folder')])
def test_refused(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(b, 'bench_step', lambda *a, **k: pytest.fail('it measures'))
    try: code = main(args.split())
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    assert code == 2 and message in err and err.startswith('nadam-bench: ') and err.count('\n') == 1 and not out
    assert not list(tmp_path.iterdir())

def test_too_large_for_memory(capsys):
    "4 PB are more than an address can reach"
    assert main(['--tensors', '2', '--numel', str(10**15), '--rounds', '1']) == 2
    assert 'allocate' in (err := capsys.readouterr().err) and err.count('\n') == 1

compiled = ['torch NAdam(compiled)', 'HeavyBall NAdam']

@pytest.mark.parametrize('name', compiled)
def test_a_compiled_peer_makes_the_same_steps(name, monkeypatch):
    "As PyTorch's NAdam; here without compiling, which takes long"
    if name not in find_peers(compiled=True): pytest.skip("HeavyBall is not installed")
    assert find_peers(compiled=True).keys() - find_peers().keys() <= {*compiled}
    monkeypatch.setattr(torch, 'compile', lambda f: f)
    if name == 'HeavyBall NAdam': monkeypatch.setattr('heavyball.utils.compile_mode', None)
    params = [new_params([(3, 4), (5,)])]
    params.append([nn.Parameter(p.detach().clone()) for p in params[0]])
    opts = find_peers(compiled=True)[name](params[0], lr=0.01), torch.optim.NAdam(params[1], lr=0.01)
    for _ in range(5):
        for p,q in zip(*params):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for o in opts: o.step()
    for p,q in zip(*params): torch.testing.assert_close(p, q)

def test_plots_show_every_optimizer_and_cut_a_long_bar():
    cases, opts = {'1 M': 1e6, '5 M': 5e6}, {reference: 1., 'NAdam': 0.9, 'torch NAdam': 4., 'timm NAdamW': 40.}
    rows = [dict(opt=o, step=[r]*6, case=c, tensors=100, parameters=n)
        for c,n in cases.items() for o,r in opts.items()]
    axs = b.plot_steps(pd.DataFrame(rows)).axes
    assert len(axs) == 2 and [o.get_width() for o in axs[0].patches] == pytest.approx([1, 0.9, 4, 5.6])
    assert '//' in [o.get_text() for o in axs[0].texts]

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu(capsys): assert main(['--device', 'cuda']) == 2 and 'there is no CUDA GPU' in capsys.readouterr().err

def test_no_reference(capsys, monkeypatch):
    monkeypatch.setattr(b, 'pick_impl', lambda *args: None)
    assert main([]) == 2 and 'has no fused AdamW for float32 on cpu, to compare with' in capsys.readouterr().err
