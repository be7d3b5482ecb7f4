"Measurements measure what they say, and the command refuses what it cannot do"
import json, math, time

import pytest, torch
from torch import nn

from fastai_nadam import NAdam, bench as b
from fastai_nadam.bench import bench_cases, bench_step, extra_memory, find_peers, interleave, main, net_shapes, new_params, reference
from impls import needs_kernel

pytestmark = needs_kernel

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def test_turns_are_fair():
    calls = []
    fs = {k: lambda k=k: (calls.append(k), time.sleep(0.006)) for k in 'abc'}
    df = interleave(fs, rounds=30)
    turns = [tuple(calls[i:i+3]) for i in range(9, len(calls), 3)] # after three calls of each
    assert df.shape == (30, 3) and len(turns) == 30 and all(sorted(o) == list('abc') for o in turns) and len(set(turns)) > 2
    assert (df >= 0.006).all(axis=None)

def test_short_calls_are_repeated():
    calls = []
    assert len(interleave({'a': lambda: calls.append(1)}, rounds=2)) == 2 and len(calls) > 100

@pytest.mark.parametrize('n', [10_000, 300_000])
def test_extra_memory(n):
    x = torch.rand(n)
    def two_at_a_time():
        for _ in range(3): y = (x+1)*2
    assert extra_memory(two_at_a_time) == pytest.approx(3*4*n, rel=0.01) # and the y of the round before
    assert extra_memory(lambda: x.add_(x)) < 100
    y = x.clone()
    assert extra_memory(lambda: (x+y).sum()) == pytest.approx(4*n, rel=0.01)

def test_steps_and_columns():
    seen = []
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
    df = bench_step([(3, 4), (5,)], {reference: find_peers()[reference], 'counted': Counted}, rounds=4)
    assert list(df.index) == [reference, 'counted'] and list(df) == ['step_ms', 'low_ms', 'high_ms', 'ratio', 'over_best', 'zero_ms', 'extra_mib']
    assert (df.low_ms <= df.step_ms).all() and (df.step_ms <= df.high_ms).all() and df.ratio[reference] == 1
    assert df.ratio['counted'] == pytest.approx(df.step_ms['counted']/df.step_ms[reference])
    assert len(seen) == 4 and len(set(seen)) == 1 and seen[0] > 4

def test_a_slow_optimizer_is_seen_to_be_slow():
    class Slow:
        def __init__(self, ps, lr): pass
        def step(self): time.sleep(0.02); torch.empty(2**20)
        def zero_grad(self): time.sleep(0.01)
    df = bench_step([(3,)], {reference: find_peers()[reference], 'slow': Slow}, rounds=3)
    assert df.step_ms['slow'] >= 20 and df.zero_ms['slow'] >= 10 and df.extra_mib['slow'] == pytest.approx(4)

@pytest.mark.parametrize('name', ['NAdam', 'DozatNAdam'])
def test_ours_need_no_memory(name):
    "Figures of memory are no timings: at most 8 MiB beyond parameters, gradients and state, whatever the size"
    df = bench_step([(4_000_000,), (300, 300), *[(64,)]*50], {k: find_peers()[k] for k in (reference, name)}, rounds=1)
    assert df.extra_mib[name] < 8

def test_every_peer_steps():
    peers = find_peers()
    assert {'NAdam', 'DozatNAdam', 'NAdam(steppers)', 'fastai Adam', 'torch NAdam', 'torch NAdam(foreach)', 'timm NAdamW', reference} == set(peers)
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
    assert (100, 1_000_000) in sizes and (100, 500_000_000) in sizes and (10, 1000) in sizes and (10_000, 1_000_000) in sizes

def test_shapes():
    s = net_shapes('xresnet34')
    assert len(s) == 116 and s[0] == (32, 3, 3, 3) and sum(map(math.prod, s)) == 21_816_904
    assert sum(map(math.prod, net_shapes('vit_b_16'))) == 86_567_656 # torchvision's own figure

def test_parts_add_up():
    parts = b.step_parts(NAdam(new_params([(1000, 1000)]), lr=1e-3), n=5)
    assert (parts >= 0).all() and parts['fused_adamw'] > parts['other operations']
    b.plot_parts({'NAdam': parts})

def test_epoch():
    df = b.bench_epoch({k: find_peers()[k] for k in (reference, 'NAdam')}, rounds=1, arch='squeezenet1_1')
    assert (df.opt_s > 0).all() and (df.share < 1).all() and df.ratio[reference] == 1

def test_command(tmp_path, capsys):
    args = ['--nets', 'mlp,squeezenet1_1', '--opts', 'DozatNAdam', '--rounds', '2', '--json', 'figures.json', '--plot', 'plot.png']
    assert main(args) == 0
    out = capsys.readouterr().out
    assert 'mlp: 10 tensors, 31,722 parameters' in out and 'over_best' in out and 'torch NAdam' not in out
    figures = json.loads((tmp_path/'figures.json').read_text())
    assert [(o['case'], o['opt']) for o in figures['steps']] == [(c, o) for c in ('mlp', 'squeezenet1_1') for o in (reference, 'DozatNAdam')]
    assert figures['versions']['torch'] and figures['rounds'] == 2 and (tmp_path/'plot.png').stat().st_size > 5000
    assert main(['--tensors', '7', '--numel', '3', '--opts', 'NAdam', '--rounds', '1', '--dtype', 'bfloat16']) == 0
    assert '7 x 3: 7 tensors, 21 parameters' in capsys.readouterr().out

@pytest.mark.parametrize('args,message', [('--opts SGD', "opts must be among AdamW(fused), NAdam, "), ('--nets mlp,resnet35', "got 'resnet35'"), ('--rounds 0', 'rounds must be'),
    ('--tensors 0', 'tensors must be'), ('--tensors 3 --numel 0', 'numel must be'), ('--dtype int8', "dtype must be one of float32"), ('--device tpu', "device must be cpu or cuda, got 'tpu'"),
    ('--json .', "json must be a file, got '.'"), ('--plot fig.xyz', "plot must be a file whose name ends in .png, got 'fig.xyz'"), ('--epoch --dtype bfloat16', 'epoch is for float32'),
    ('--json no/figures.json', "json: no such folder: 'no'"), ('--plot no/plot.png', "plot: no such folder: 'no'"), ('--round 3', 'unrecognized arguments')])
def test_refused(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(b, 'bench_step', lambda *a, **k: pytest.fail('it measures'))
    try: code = main(args.split())
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    assert code == 2 and message in err and err.startswith('nadam-bench: ') and err.count('\n') == 1 and not out
    assert not list(tmp_path.iterdir())

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu(capsys): assert main(['--device', 'cuda']) == 2 and 'there is no CUDA GPU' in capsys.readouterr().err

def test_no_reference(capsys, monkeypatch):
    monkeypatch.setattr(b, 'pick_impl', lambda *args: None)
    assert main([]) == 2 and 'has no fused AdamW for float32 on cpu, to compare with' in capsys.readouterr().err
