"nadam-train: what it refuses, what it leaves behind, and that it does the same again"
import inspect, json, os, random, re, signal, subprocess, sys, time
from functools import partial
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import Callback, Image, Learner, Path

from fastai_nadam import train as room
from fastai_nadam.data import digits_path
from fastai_nadam.train import archs, check_model, fill_opts, fit_run, main, opts, read_args, run_learner, train

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder of photographs' layout: some fours and sevens, 16 to train on and 8 to validate with"
    path = tmp_path_factory.mktemp('data')/'four_seven'
    for split,n in dict(train=8, val=4).items():
        for c in '47':
            (path/split/c).mkdir(parents=True)
            for f in sorted((digits_path()/split/c).iterdir())[:n]: Image.open(f).save(path/split/c/f.name)
    return path

@pytest.fixture(scope='module')
def tiny(folder): return dict(data=str(folder), arch='squeezenet1_1', size=24, bs=4, epochs=2, num_workers=0)

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def argv(*flags, **kw): return [*flags, *(f'--{k}={v}' for k,v in kw.items())]

def weights(path): return torch.load(path/'model.pth', weights_only=True)['model']

def same(a, b): return all(torch.equal(a[k], b[k]) for k in {**a, **b})

def history(path): return pd.read_csv(path/'history.csv').drop(columns='time')

def nothing_left(path): return [o.name for o in path.iterdir()] == []

# What comes out

@pytest.fixture(scope='module')
def run(tiny, tmp_path_factory):
    "One run, with what it printed"
    path = tmp_path_factory.mktemp('run')
    p = subprocess.run([sys.executable, '-m', 'fastai_nadam.train', *argv(**tiny, seed=7, out=path/'out')], cwd=path, capture_output=True, text=True)
    return SimpleNamespace(path=path/'out', out=p.stdout, err=p.stderr, code=p.returncode)

def test_plain_lines_in_a_pipe(run, tiny):
    assert run.code == 0, run.err
    assert run.out.isascii() and not set(run.out) & set('\r\x1b\b')
    lines = run.out.splitlines()
    assert [l.split()[0] for l in lines[:7]] == ['data', 'model', 'optimizer', 'schedule', 'epoch', '0', '1']
    assert f"{tiny['data']}: 16 training and 8 validation images in 2 classes, at 24 x 24 pixels" in lines[0]
    assert 'squeezenet1_1, 0.7 million parameters, on 1 x cpu' in lines[1]
    assert 'NAdam, eps 1e-08, sqr_mom 0.99, wd 0.01' in lines[2]
    assert '2 epochs of 4 batches of 4, lr up to 0.001, mom 0.95 -> 0.85 -> 0.95, seed 7' in lines[3]
    hist = pd.read_csv(run.path/'history.csv')
    for line,row in zip(lines[5:7], hist.itertuples(index=False), strict=True):
        assert line.split() == [str(row.epoch), *(f'{v:.6f}' for v in row[1:-1]), row.time]
    last = hist.iloc[-1]
    assert re.fullmatch(rf'accuracy {last.accuracy:.4f}, valid_loss {last.valid_loss:.4f}, train_loss {last.train_loss:.4f} in \d+ s; see .*out', lines[-1])

def test_files(run, tmp_path):
    assert sorted(o.name for o in run.path.iterdir()) == ['args.json', 'history.csv', 'history.png', 'model.pth']
    assert list(pd.read_csv(run.path/'history.csv')) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    img = np.asarray(Image.open(run.path/'history.png').convert('L'))
    assert min(img.shape) > 500 and img.std() > 10
    saved = json.loads((run.path/'args.json').read_text())
    assert saved['args'] | dict(wd=0.01, sqr_mom=0.99, eps=1e-8, lr=1e-3, mom=None, seed=7, runs=1) == saved['args']
    assert saved['versions']['torch'] == torch.__version__.split('+')[0]
    (tmp_path/'new').mkdir()
    assert run.path.stat().st_mode == (tmp_path/'new').stat().st_mode

def test_model_loads(run, tiny):
    sd = torch.load(run.path/'model.pth', weights_only=True)
    assert set(sd) == {'model', 'opt'} and [s['step'] for s in sd['opt']['state']] == [8]*len(sd['opt']['state'])
    learn = run_learner(fill_opts(**tiny), seed=1, path=run.path)
    learn.load('model')
    assert same(learn.model.state_dict(), sd['model'])
    last = history(run.path).iloc[-1]
    with learn.no_bar(): assert np.allclose(learn.validate(), [last.valid_loss, last.accuracy], atol=1e-6)

def test_same_seed_same_result(run, tiny, tmp_path):
    assert main(argv(**tiny, seed=7)) == 0
    out = tmp_path/'runs'/'four_seven-NAdam'
    assert same(weights(run.path), weights(out)) and history(run.path).equals(history(out))
    assert main(argv(**tiny, seed=8)) == 0
    assert not same(weights(run.path), weights(tmp_path/'runs'/'four_seven-NAdam-2'))

def test_args_repeat_a_run(run, tmp_path, capsys):
    assert main(argv(args=run.path/'args.json', out='again')) == 0
    assert same(weights(run.path), weights(tmp_path/'again')) and history(run.path).equals(history(tmp_path/'again'))
    one, two = (json.loads((p/'args.json').read_text()) for p in (run.path, tmp_path/'again'))
    assert one == two
    assert 'may differ' not in capsys.readouterr().out
    assert main(argv(args=run.path/'args.json', epochs=1, seed=3, out='other')) == 0
    changed = json.loads((tmp_path/'other'/'args.json').read_text())['args']
    assert changed == one['args'] | dict(epochs=1, seed=3)

def test_args_of_other_versions(run, tmp_path, capsys):
    saved = json.loads((run.path/'args.json').read_text())
    (tmp_path/'old.json').write_text(json.dumps(saved | dict(versions=saved['versions'] | dict(torch='1.0'))))
    assert read_args(tmp_path/'old.json') == saved['args']
    assert 'was made with torch 1.0: the numbers may differ' in capsys.readouterr().out

def test_several_runs(tiny, run, tmp_path, capsys):
    assert main(argv(**tiny, seed=6, runs=2, out='two')) == 0
    path = tmp_path/'two'
    assert sorted(o.name for o in path.iterdir()) == ['args.json', 'history.csv', 'history.png', 'seed6', 'seed7']
    assert same(weights(path/'seed7'), weights(run.path)) and history(path/'seed7').equals(history(run.path))
    hist = pd.read_csv(path/'history.csv')
    assert list(hist) == ['seed', 'epoch', 'train_loss', 'valid_loss', 'accuracy', 'time'] and list(hist.seed) == [6, 6, 7, 7]
    last = hist[hist.epoch == 1].valid_loss.to_numpy()
    line = capsys.readouterr().out.splitlines()[-1]
    assert f'valid_loss {last.mean():.4f} +/- {abs(last[0]-last[1])/2**0.5:.4f}' in line and 'standard deviation of 2 runs' in line

def test_find_lr(tiny, tmp_path, capsys):
    assert main(argv('--find_lr', **tiny, out='found')) == 0
    saved = json.loads((tmp_path/'found'/'args.json').read_text())['args']
    assert saved['lr'] != 1e-3 and 1e-7 < saved['lr'] < 10
    assert f"lr_find suggests a learning rate of {saved['lr']:.3g}" in capsys.readouterr().out
    assert sorted(o.name for o in (tmp_path/'found').iterdir()) == ['args.json', 'history.csv', 'history.png', 'lr_find.png', 'model.pth']
    assert np.asarray(Image.open(tmp_path/'found'/'lr_find.png').convert('L')).std() > 10
    assert main(argv(**tiny, lr=saved['lr'], out='given')) == 0
    assert same(weights(tmp_path/'found'), weights(tmp_path/'given'))

class Hypers(Callback):
    "Keep the hypers of every step"
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append(dict(self.opt.hypers[-1]))

@pytest.mark.parametrize('opt', opts)
def test_hypers_reach_every_optimizer(opt, tiny, tmp_path):
    given = dict(mom=0.7, sqr_mom=0.95, eps=1e-3, wd=0.3)
    o = fill_opts(**{**tiny, 'epochs': 1}, opt=opt, lr=2e-3, **given)
    learn = run_learner(o, 0, tmp_path)
    learn.add_cb(Hypers())
    fit_run(learn, o)
    assert len(learn.hypers.seen) == 4
    for h in learn.hypers.seen: assert {k: h[k] for k in given} == pytest.approx(given)
    assert max(h['lr'] for h in learn.hypers.seen) == pytest.approx(2e-3, rel=0.01)
    assert type(learn.opt) is type(opts[opt]([torch.nn.Parameter(torch.zeros(1))], lr=1))
    sd = torch.load(tmp_path/'model.pth', weights_only=True)['opt']
    assert sd['hypers'][0]['wd'] == 0.3 and sd['state'][0]['step'] == 4

def test_momentum_follows_the_cycle(tiny, tmp_path):
    o = fill_opts(**tiny)
    learn = run_learner(o, 0, tmp_path)
    moms = fit_run(learn, o)['mom']
    assert moms[0] == pytest.approx(0.95) and min(moms) == pytest.approx(0.85, abs=0.01) and moms[-1] > 0.93

def test_channels_last(tiny):
    learn = train(**{**tiny, 'epochs': 1, 'arch': 'resnet18'}, channels_last=True)
    assert learn.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not learn.model.conv1.weight.is_contiguous()

def test_from_python(tiny, tmp_path):
    learn = train(**{**tiny, 'epochs': 1}, out='here')
    assert isinstance(learn, Learner) and learn.path == Path('here') and (learn.path/'model.pth').exists()

def test_article():
    want = dict(data='imagenette', arch='xresnet34', opt='NAdam', epochs=10, lr=1e-3, bs=64, size=224, eps=1e-8, wd=0.01, mom=None)
    assert fill_opts(article=True) | want == fill_opts(article=True)
    assert fill_opts(article=True, epochs=5, eps=1e-6) | want | dict(epochs=5, eps=1e-6) == fill_opts(article=True, epochs=5, eps=1e-6)

# What is refused

def refused(capsys, args):
    "Run `main`, which must exit with 2 and one line"
    try: code = main(args)
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith('nadam-train: ') and err.endswith('\n') and err.count('\n') == 1, err
    return err

@pytest.mark.parametrize('args,message', [
    ('--data nowhere', "no such folder: '{}/nowhere'"),
    ('--data {folder}/train', "has no folder 'train'"),
    ('--opt Nadam', "opt must be one of NAdam, DozatNAdam, Adam, RAdam, ranger, got 'Nadam'"),
    ('--arch xresnet35', "xresnet34, "),
    ('--arch alexnet --size 8', 'alexnet cannot train on batches of 64 images of 8 x 8 pixels'),
    ('--arch googlenet --size 224', 'googlenet cannot train on'),
    ('--arch xsenet154', 'xsenet154 cannot train on'),
    ('--size 0', 'size must be a whole number from 1, got 0'),
    ('--size 2.5', "argument --size: invalid int value: '2.5'"),
    ('--bs 0', 'bs must be a whole number from 1, got 0'),
    ('--bs 1', 'batches of 1 images'),
    ('--data {folder} --arch squeezenet1_1 --size 24 --num_workers 0', 'bs must be at most the number of training images, 16, got 64'),
    ('--epochs 0', 'epochs must be'), ('--epochs -1', 'epochs must be'), ('--runs 0', 'runs must be'), ('--seed -1', 'seed must be'),
    ('--seed 18446744073709551616', 'seed must be'), ('--num_workers -1', 'num_workers must be'),
    ('--lr -0.1', 'lr must be a finite number'), ('--lr nan', 'lr must be a finite number'), ('--lr inf', 'lr must be'),
    ('--wd -1', 'wd must be'), ('--eps -1', 'eps must be'), ('--mom 1', 'mom must be in [0, 1), got 1.0'), ('--sqr_mom 1.5', 'sqr_mom must be in [0, 1)'),
    ('--find_lr --lr 1', 'give lr or find_lr, not both'),
    ('--article --args a.json', 'give args or article, not both'),
    ('--args a.json', 'No such file'),
    ('--args {folder}/train/4/0004.png', 'is no args.json of a run'),
    ('--out {folder}', 'has files in it'),
    ('--out {folder}/train/4/0004.png', "0004.png' is a file"),
    ('--out {folder}/train/4/0004.png/out', "out: cannot make"),
    ('--out /proc/out', "out: cannot make '/proc/out'"),
    ('--sqr_mo 0.9', 'unrecognized arguments: --sqr_mo'),
    ('digits', 'unrecognized arguments: digits'),
    ('--lr', 'argument --lr: expected one argument'),
])
def test_refused(args, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Learner, 'fit', lambda *a, **k: pytest.fail('it trains'))
    assert message.format(tmp_path) in refused(capsys, args.format(folder=folder).split())
    assert nothing_left(tmp_path) and len(list(folder.rglob('*'))) == 4 + 2 + 24

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_fp16_without_gpu(capsys): assert 'fp16 needs a CUDA GPU' in refused(capsys, ['--fp16'])

@pytest.mark.parametrize('text,message', [('{"args": 3}', 'no args.json'), ('{"args": {}}', 'no args.json'), ('[]', 'no args.json'), ('{', 'no args.json'),
    ('{"args": {"depth": 3}, "versions": {}}', 'options that do not exist: depth'), ('{"args": {"bs": "many"}, "versions": {}}', "bs must be a whole number from 1, got 'many'"),
    ('{"args": {"opt": ["NAdam"]}, "versions": {}}', 'opt must be a name'), ('{"args": {"data": 3}, "versions": {}}', 'data must be')])
def test_args_refused(text, message, tmp_path, capsys):
    (tmp_path/'args.json').write_text(text)
    assert message in refused(capsys, ['--args', 'args.json'])

def test_damaged_folder(tiny, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Learner, 'fit', lambda *a, **k: pytest.fail('it trains'))
    bad = folder/'val'/'4'/'bad.png'
    try:
        bad.write_bytes(b'no image')
        assert f"cannot read the image '{bad}'" in refused(capsys, argv(**tiny, out='a/b/out'))
    finally: bad.unlink()
    assert nothing_left(tmp_path)

def test_no_network(capsys, monkeypatch, tmp_path):
    from fastai.data.external import URLs, fastai_cfg
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(URLs, 'IMAGENETTE_320', 'http://127.0.0.1:9/imagenette2-320.tgz')
    fastai_cfg.cache_clear()
    try: assert 'cannot download imagenette from http://127.0.0.1:9/' in refused(capsys, ['--article', '--num_workers', '0'])
    finally: fastai_cfg.cache_clear()
    assert not (tmp_path/'runs').exists()

@pytest.fixture
def two_processes(monkeypatch):
    "As torchrun starts the first of two processes, on a machine with two GPUs"
    for k,v in dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0).items(): monkeypatch.setenv(k, str(v))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)

def test_several_processes_need_gpus(two_processes, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert 'each of the 2 processes needs a CUDA GPU of its own, found 0' in refused(capsys, [])
    monkeypatch.setenv('RANK', '1')
    assert main([]) == 2 and capsys.readouterr().err == ''  # only the first process speaks

def test_several_processes_need_accelerate(two_processes, capsys, monkeypatch):
    monkeypatch.setattr(room, 'find_spec', lambda name: None)
    assert 'training in several processes needs accelerate' in refused(capsys, [])

def test_find_lr_in_several_processes(two_processes, capsys): assert 'find_lr works in one process only' in refused(capsys, ['--find_lr'])

def test_every_arch_is_known():
    for arch in ('xresnet18', 'xresnet50_deeper', 'xse_resnext34', 'resnet18', 'regnet_y_400mf', 'vit_b_16', 'efficientnet_b0'): check_model(arch, 224, 2)
    assert not {'noop', 'flatten', 'list_models', 'get_model'} & archs.keys()

def test_help_has_every_option_and_default(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    text = re.sub(r'\s+', ' ', capsys.readouterr().out)
    assert e.value.code == 0
    for k in inspect.signature(train).parameters: assert f' --{k} ' in text
    for k,v in room.recipes['digits'].items():
        other = room.recipes['photos'][k]
        assert f'(default: {v} for the digits, {other} otherwise)' in text if v != other else f'(default: {v})' in text

# What is stopped

class Stop(Callback):
    "Stop in the middle of an epoch, or, with `at` None, before the first"
    def __init__(self, error, at): self.error, self.at = error, at
    def before_fit(self):
        if self.at is None: raise self.error
    def after_batch(self):
        if self.epoch == self.at: raise self.error

@pytest.fixture
def stop(monkeypatch):
    "A function that runs `main`, which is stopped"
    def f(error, args, at=1):
        with monkeypatch.context() as m:
            m.setattr(room, 'run_learner', lambda *args: run_learner(*args).add_cb(Stop(error, at)))
            return main(args)
    return f

stops = pytest.mark.parametrize('error,code', [(KeyboardInterrupt(), 130), (OSError('no space left on device'), 2), (BrokenPipeError(32, 'Broken pipe'), 141)])

@stops
def test_stopped_before_the_first_checkpoint(error, code, tiny, tmp_path, capfd, stop):
    (tmp_path/'empty').mkdir()
    for out in ('a/b/new', 'empty'): assert stop(error, argv(**tiny, out=out), at=None) == code
    assert [o.name for o in tmp_path.iterdir()] == ['empty'] and nothing_left(tmp_path/'empty')
    assert capfd.readouterr().err.count('\n') == (0 if code == 141 else 2)

@pytest.mark.parametrize('at', [0, 1])
@stops
def test_stopped_after_it(error, code, at, tiny, run, tmp_path, capfd, stop):
    assert stop(error, argv(**tiny, seed=7, out='my run'), at) == code
    assert sorted(o.name for o in (tmp_path/'my run').iterdir()) == ['checkpoint.pth', 'history.csv']
    out, err = capfd.readouterr()
    assert code == 141 or (out.endswith("nadam-train --resume 'my run'\n") and err.count('\n') == 1)
    assert main(['--resume', 'my run']) == 0
    same_run(tmp_path/'my run', run.path)
    out = capfd.readouterr().out
    assert code == 141 or f'goes on after {at} of 2 epochs' in out and out.count('\n0  ') == out.count('\n1  ') == 1

def test_stopped_in_the_only_epoch(tiny, tmp_path, stop):
    args = argv(**{**tiny, 'epochs': 1}, runs=2)
    assert stop(KeyboardInterrupt(), [*args, '--out=part'], at=0) == 130
    assert main(['--resume', 'part']) == main([*args, '--out=whole']) == 0
    same_run(tmp_path/'part', tmp_path/'whole')

def test_bug_is_not_hidden(tiny, tmp_path, stop):
    with pytest.raises(RuntimeError, match='bug'): stop(RuntimeError('bug'), argv(**tiny), at=None)
    assert nothing_left(tmp_path)

def start(args, cwd):
    return subprocess.Popen([sys.executable, '-m', 'fastai_nadam.train', *args], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL)) # a shell's `&` has it ignored

def test_ctrl_c(tiny, tmp_path):
    p = start(argv(**{**tiny, 'epochs': 1000}, out='out'), tmp_path)
    try:
        for line in p.stdout:
            if line.startswith('1 '): break
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=60)
    finally: p.kill()
    assert p.returncode == 130 and err.splitlines()[-1] == 'nadam-train: interrupted' and 'Traceback' not in err
    assert out.rstrip().endswith('nadam-train --resume out') and (tmp_path/'out'/'checkpoint.pth').exists()

# What goes on

def equal(a, b):
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, list) else a == b

def same_run(a, b):
    "The same files, with the same weights and the same state of the optimizer to the last bit"
    assert [o.relative_to(a) for o in sorted(a.rglob('*'))] == [o.relative_to(b) for o in sorted(b.rglob('*'))]
    for f in a.rglob('model.pth'): assert equal(*(torch.load(p/f.relative_to(a), weights_only=True) for p in (a, b)))
    for f in a.rglob('history.csv'): assert history(f.parent).equals(history((b/f.relative_to(a)).parent))
    assert (a/'args.json').read_text() == (b/'args.json').read_text()

@pytest.mark.parametrize('opt', ['NAdam', 'ranger'])
def test_killed_at_any_moment(opt, tiny, tmp_path):
    "Killed for good in the first epoch, then anywhere in the first or the second of two runs"
    args = argv(**{**tiny, 'arch': 'shufflenet_v2_x0_5', 'epochs': 8}, opt=opt, runs=2)
    file, last = tmp_path/'part'/'checkpoint.pth', None
    for more,wait in ((['--out=part', *args], 0), (['--resume=part'], 1.5)):
        p = start(more, tmp_path)
        try:
            end = time.time() + 120
            while (not file.exists() or file.stat().st_mtime_ns == last) and p.poll() is None and time.time() < end: time.sleep(0.01)
            time.sleep(random.uniform(0, wait))
            assert p.poll() is None, p.communicate()
        finally: p.kill()
        p.communicate()
        last = file.stat().st_mtime_ns
    assert main(['--resume', 'part']) == main([*args, '--out=whole']) == 0
    same_run(tmp_path/'part', tmp_path/'whole')

@pytest.fixture
def stopped(tiny, tmp_path, stop):
    "A folder with the checkpoint of a run that was stopped"
    assert stop(KeyboardInterrupt(), argv(**tiny, out='stopped')) == 130
    return tmp_path/'stopped'

class Evil:
    def __reduce__(self): return exec, ("open('evil', 'w')",)

def reshaped(opt): return {**opt, 'state': [{**s, 'grad_avg': s['grad_avg'].flatten()} for s in opt['state']]}

def rewrite(file, **changed): torch.save({**torch.load(file, weights_only=True), **changed}, file)

@pytest.mark.parametrize('damage,message', [
    (lambda f: f.write_bytes(f.read_bytes()[:random.randrange(f.stat().st_size)]), 'is damaged, or no checkpoint'),
    (lambda f: f.write_bytes(b''), 'is damaged, or no checkpoint'), (lambda f: torch.save({'model': {}}, f), 'is no checkpoint of nadam-train'),
    (lambda f: torch.save([1], f), 'is no checkpoint of nadam-train'), (lambda f: torch.save(Evil(), f), 'is damaged, or no checkpoint'),
    (lambda f: rewrite(f, rng=3), 'is no checkpoint of nadam-train'), (lambda f: rewrite(f, args={'depth': 3}), 'is no checkpoint of nadam-train'),
    (lambda f: rewrite(f, rng=[{}]), 'does not fit'), (lambda f: rewrite(f, rng=[{}]*3), 'was trained by 3 processes, now there is 1: start torchrun --nproc_per_node 3 -m fastai_nadam.train'),
    *((lambda f, o=o: rewrite(f, **o), 'is no checkpoint of nadam-train') for o in (dict(data=[]), dict(curves={'seed42': 3}), dict(rows=[3]), dict(rows=[['a']]), dict(smooth_loss=[]),
        dict(hps={}), dict(lrs=[]), dict(iters=[]), dict(losses=torch.zeros(1)), dict(more=1))),
    (lambda f: rewrite(f, opt=reshaped(torch.load(f, weights_only=True)['opt'])), "optimizer's state is that of another network"),
    (lambda f: rewrite(f, rows=[[0]]*2, iters=[0]*2), 'all epochs are done'), (lambda f: rewrite(f, model={}), 'those of another network'),
    (lambda f: rewrite(f, args={**torch.load(f, weights_only=True)['args'], 'arch': 'squeezenet1_0'}), 'those of another network'),
    (lambda f: rewrite(f, opt={'hypers': [], 'state': []}), 'does not fit'), (lambda f: rewrite(f, data=[9, 9, 'a', 'b']), 'the data has changed: 16 training images'),
    (Path.unlink, 'has no checkpoint.pth')])
def test_resume_refused(damage, message, stopped, capsys, monkeypatch):
    monkeypatch.setattr(Learner, 'fit', lambda *a, **k: pytest.fail('it trains'))
    damage(stopped/'checkpoint.pth')
    before = {f: f.read_bytes() for f in stopped.iterdir()}
    capsys.readouterr()
    assert message in refused(capsys, ['--resume', 'stopped'])
    assert {f: f.read_bytes() for f in stopped.iterdir()} == before and not Path('evil').exists()

@pytest.mark.parametrize('args,message', [('--resume nowhere', 'has no checkpoint.pth'), ('--resume {run}', 'holds a run that is finished'),
    ('--resume {run} --epochs 9', 'give resume alone, without epochs'), ('--resume {run} --out other', 'give resume alone, without out'),
    ('--resume {run} --args a.json', 'give resume alone, without args')])
def test_resume_of_nothing(args, message, run, tmp_path, capsys):
    before = {f: f.read_bytes() for f in run.path.iterdir()}
    assert message in refused(capsys, args.format(run=run.path).split())
    assert nothing_left(tmp_path) and {f: f.read_bytes() for f in run.path.iterdir()} == before

# The main job

def test_main_job(tmp_path):
    p = subprocess.run([sys.executable, '-m', 'fastai_nadam.train'], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': str(os.cpu_count())})
    assert p.returncode == 0, p.stderr
    out = tmp_path/'runs'/'digits-NAdam'
    assert sorted(o.name for o in out.iterdir()) == ['args.json', 'history.csv', 'history.png', 'model.pth']
    hist = pd.read_csv(out/'history.csv')
    assert hist.accuracy.iloc[-1] > 0.98 and 'xresnet34, 21.3 million parameters' in p.stdout
    assert p.stdout.splitlines()[-1].startswith(f'accuracy {hist.accuracy.iloc[-1]:.4f}, ')
