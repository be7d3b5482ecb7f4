"nadam-train: what it takes and what comes out"
import inspect, json, math, os, re
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import Callback, Image, Learner, Path

from fastai_nadam.tools import train as room
from fastai_nadam.tools.checkpoint import read_args
from fastai_nadam.tools.data import list_images
from fastai_nadam.tools.train import archs, check_model, main, new_config, new_learner, opt_funcs, options, train
from helpers import same
from runs import Forked, argv, folder, here, history, names, refused, stop, tiny, weights

# What comes out

@pytest.fixture(scope='module')
def run(tiny, tmp_path_factory):
    "One run, with what it printed"
    path = tmp_path_factory.mktemp('run')
    p = Forked(main, argv(**tiny, seed=7, out=path/'out'))
    return SimpleNamespace(path=path/'out', code=p.ended(), out=p.out, err=p.err)

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
    scores = ', '.join(f'{k} {last[k]:.4f}' for k in ('accuracy', 'valid_loss', 'train_loss'))
    assert re.fullmatch(rf'{scores} in \d+ s; see .*out', lines[-1])

def test_files(run, tmp_path):
    assert names(run.path) == ['args.json', 'history.csv', 'history.png', 'model.pth']
    assert list(pd.read_csv(run.path/'history.csv')) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    img = np.asarray(Image.open(run.path/'history.png').convert('L'))
    assert min(img.shape) > 500 and img.std() > 10
    saved = json.loads((run.path/'args.json').read_text())
    assert saved['args'] | dict(wd=0.01, sqr_mom=0.99, eps=1e-8, lr=1e-3, moms=None, seed=7) == saved['args']
    assert saved['versions']['torch'] == torch.__version__.split('+')[0]
    (tmp_path/'new').mkdir()
    assert run.path.stat().st_mode == (tmp_path/'new').stat().st_mode

def test_model_loads(run, tiny):
    sd = torch.load(run.path/'model.pth', weights_only=True)
    assert set(sd) == {'model', 'opt'} and [s['step'] for s in sd['opt']['state']] == [8]*len(sd['opt']['state'])
    learn = new_learner(new_config(**tiny, seed=1), list_images(tiny['data']), run.path)
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

def test_find_lr(tiny, folder, tmp_path, capsys, monkeypatch):
    "A run with the rate that it suggests. The folder is listed once"
    scandir, seen = os.scandir, []
    def noted(path='.'):
        if not isinstance(path, int): seen.append(Path(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', noted)
    assert main(argv('--find_lr', **tiny, out='found')) == 0
    seen = [p for p in seen if folder in p.parents]
    assert sorted(seen) == sorted({*seen}) and {folder/'train', folder/'val'} < {*seen}
    saved = json.loads((tmp_path/'found'/'args.json').read_text())['args']
    assert saved['lr'] != 1e-3 and 1e-7 < saved['lr'] < 10
    assert f"lr_find suggests a learning rate of {saved['lr']:.3g}" in capsys.readouterr().out
    assert names(tmp_path/'found') == ['args.json', 'history.csv', 'history.png', 'lr_find.png', 'model.pth']
    assert np.asarray(Image.open(tmp_path/'found'/'lr_find.png').convert('L')).std() > 10
    assert main(argv(**tiny, lr=saved['lr'], out='given')) == 0
    assert same(weights(tmp_path/'found'), weights(tmp_path/'given'))

class Hypers(Callback):
    "Keep the hypers of every step"
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append(dict(self.opt.hypers[-1]))

@pytest.mark.parametrize('opt', opt_funcs)
def test_hypers_reach_every_optimizer(opt, tiny, tmp_path, monkeypatch):
    given = dict(sqr_mom=0.95, eps=1e-3, wd=0.3)
    monkeypatch.setattr(room, 'new_learner', lambda *args: new_learner(*args).add_cb(Hypers()))
    learn = train(**{**tiny, 'epochs': 1}, opt=opt, lr=2e-3, moms='.7', **given, out='out')
    assert len(learn.hypers.seen) == 4
    for h in learn.hypers.seen: assert {k: h[k] for k in ('mom', *given)} == pytest.approx(dict(mom=0.7, **given))
    assert max(h['lr'] for h in learn.hypers.seen) == pytest.approx(2e-3, rel=0.01)
    assert type(learn.opt) is type(opt_funcs[opt]([torch.nn.Parameter(torch.zeros(1))], lr=1))
    sd = torch.load('out/model.pth', weights_only=True)['opt']
    assert sd['hypers'][0]['wd'] == 0.3 and sd['state'][0]['step'] == 4

@pytest.mark.parametrize('moms,want', [(None, (.95, .85, .95)), ('.8, .6,.7', (.8, .6, .7)),
    ((.5, .4, .3), (.5, .4, .3)), (.9, (.9,)*3)])
def test_momentum_follows_the_cycle(moms, want, tiny):
    learn = train(**{**tiny, 'bs': 2, 'epochs': 1}, moms=moms)
    seen = learn.recorder.hps['mom']
    assert (seen[0], min(seen), seen[-1]) == pytest.approx((want[0], min(want), want[2]), abs=0.01)
    assert json.loads((learn.path/'args.json').read_text())['args']['moms'] == (None if moms is None else list(want))
    assert new_config(**read_args(learn.path/'args.json')).moms == (None if moms is None else want)

def test_the_implementation_is_told(tiny, monkeypatch, capsys):
    monkeypatch.setitem(opt_funcs, 'NAdam', room.partial(opt_funcs['NAdam'], foreach=False, fused=False))
    for opt,impl in (('NAdam', ', impl steppers'), ('Adam', '')):
        assert stop(KeyboardInterrupt(), argv(**tiny, opt=opt), at=None) == 130
        line = capsys.readouterr().out.splitlines()[2]
        assert re.fullmatch(rf'optimizer  {opt}, eps .*, sqr_mom 0.99, wd 0.01{impl}', line), line

def test_article():
    want = dict(data='imagenette', arch='xresnet34', opt='NAdam', epochs=10, lr=1e-3, bs=64, size=224, eps=1e-8,
        wd=0.01, moms=None)
    assert new_config(article=True) | want == new_config(article=True)
    want |= dict(epochs=5, eps=1e-6)
    assert new_config(article=True, epochs=5, eps=1e-6) | want == new_config(article=True, epochs=5, eps=1e-6)

# What is refused

@pytest.mark.parametrize('args,message', [
    ('--data nowhere', "no such folder: '{}/nowhere'"),
    ('--data {folder}/train', "has no folder 'train'"),
    ('--opt Nadam', "opt must be one of NAdam, DozatNAdam, Adam, RAdam, ranger, got 'Nadam'; did you mean NAdam?"),
    ('--opt adam', "got 'adam'; did you mean Adam?"), ('--opt sgd', "got 'sgd'"),
    ('--arch xresnet35', "xresnet34, "),
    ('--num_workers 1000000', 'num_workers must be at most 256, got 1000000'),
    ('--arch alexnet --size 8', 'alexnet cannot train on batches of 64 images of 8 x 8 pixels'),
    ('--arch googlenet --size 224', 'googlenet cannot train on'),
    ('--arch xsenet154', 'xsenet154 cannot train on'),
    ('--size 0', 'size must be a whole number from 1, got 0'),
    ('--bs 0', 'bs must be a whole number from 1, got 0'),
    ('--bs 1', 'batches of 1 images'),
    ('--data {folder} --arch squeezenet1_1 --size 24 --num_workers 0',
        'bs must be at most the number of training images, 16, got 64'),
    ('--epochs 0', 'epochs must be'), ('--seed -1', 'seed must be'), ('--num_workers -1', 'num_workers must be'),
    ('--lr nan', 'lr must be a finite number'), ('--wd -1', 'wd must be'), ('--eps -1', 'eps must be'),
    ('--moms 1', "moms must be numbers in [0, 1), got '1'"),
    ('--moms .9,.8', 'moms must be three numbers, or one'), ('--moms 1,2', 'moms must be three numbers, or one'),
    ('--moms .9,,.8', 'moms must be numbers in [0, 1)'),
    ('--moms fast', "moms must be numbers in [0, 1), got 'fast'"),
    ('--mom .9', 'unrecognized arguments: --mom .9; did you mean --moms?'),
    ('--sqr_mom 1.5', 'sqr_mom must be in [0, 1)'),
    ('--find_lr --lr 1', 'give lr or find_lr, not both'),
    ('--article --args a.json', 'give args or article, not both'),
    ('--args a.json', "args: no such file: 'a.json'"),
    ('--args {folder}/train/4/0004.png', 'is no args.json of a run'),
    ('--out {folder}', 'has files in it'),
    ('--out {folder}/train/4/0004.png', "0004.png' is a file"),
    ('--out {folder}/train/4/0004.png/out', "out: cannot make"),
    ('--out /proc/out', "out: cannot make '/proc/out'"),
])
def test_refused(args, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Learner, 'fit', lambda *a, **k: pytest.fail('it trains'))
    assert message.format(tmp_path) in refused(capsys, args.format(folder=folder).split())
    assert not names(tmp_path) and len(list(folder.rglob('*'))) == 4 + 2 + 24

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_fp16_without_gpu(capsys): assert 'fp16 needs a CUDA GPU' in refused(capsys, ['--fp16'])

@pytest.mark.parametrize('text,message', [('{"args": 3}', 'no args.json'), ('{"args": {}}', 'no args.json'),
    ('[]', 'no args.json'), ('{', 'no args.json'),
    ('{"args": {"depth": 3}, "versions": {}}', 'no such option: depth'),
    ('['*100_000, 'nested too deeply'),
    ('{"args": {}, "versions": {"torch": "\\u001b[2J"}}', 'versions.torch must be'),
    ('{"args": {}, "versions": {"\\u001b[2J": "1"}}', 'a name in versions must be'),
    ('{"args": {}, "versions": {"torch": 2}}', 'versions.torch must be'),
    ('{"args": {}, "versions": []}', 'versions must be'),
    ('{"args": {}, "versions": {}, "device": "\\u009b2J"}', 'device must be'),
    ('{"args": {}, "versions": {}, "more": 1}', 'no such entry: more'), ('\0', 'zero byte'), ('null', 'must be')])
def test_args_refused(text, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Learner, 'fit', lambda *a, **k: pytest.fail('it trains'))
    (tmp_path/'args.json').write_text(text)
    err = refused(capsys, ['--args', 'args.json'])
    assert message in err and err[:-1].isprintable()
    assert err.startswith("nadam-train: args: 'args.json' is no args.json of a run: ")

bad = dict.fromkeys(['size', 'bs', 'epochs'], [None, 0, -1, 1.5, '3', True, [3], {}, 10**400, math.nan])
bad |= dict.fromkeys(['num_workers', 'seed'], [None, -1, 1.5, '3', False, [3], 10**6*10**6, -math.inf])
bad |= dict.fromkeys(['lr'], [None, -1, '0.1', True, [1], math.nan, math.inf, 10**400])
bad |= dict.fromkeys(['wd', 'eps'], [-1, '0.1', True, [1], math.nan, math.inf, {}])
bad |= dict(sqr_mom=[1, -1, '0.1', True, math.nan])
bad |= dict(moms=[True, [1], [.9, .8], ['.9']*2, [.9, .8, math.nan], {}, 1, [[.9]*3]])
bad |= dict.fromkeys(['opt', 'arch', 'data'], [None, 3, True, ['x'], {}, '\x1b[2J', 'x\ny'])
bad |= dict.fromkeys(['fp16', 'channels_last'], [None, 0, 1, 'yes', []])

@pytest.mark.parametrize('k', bad)
def test_each_option_in_a_file_is_checked(k, tmp_path):
    "Everything that JSON can hold, before any of it is used"
    assert {*bad} == {*options}
    for v in bad[k]:
        (tmp_path/'args.json').write_text(json.dumps(dict(args={k: v}, versions={})))
        with pytest.raises(ValueError, match=f"^args: 'args.json' is no args.json of a run: args.{k}") as e:
            train(args='args.json')
        assert len(str(e.value)) < 400 and str(e.value).isprintable()

def test_a_flag_is_true_or_false():
    with pytest.raises(ValueError, match="find_lr must be True or False, got 'photos'"): train('photos')

@pytest.mark.parametrize('make', [lambda p: os.mkfifo(p), lambda p: p.symlink_to('/dev/zero'), lambda p: p.mkdir()])
def test_args_that_are_no_file(make, tmp_path, capsys):
    make(tmp_path/'args.json')
    assert "args: no such file: 'args.json'" in refused(capsys, ['--args', 'args.json'])

def test_damaged_folder(tiny, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Learner, 'fit', lambda *a, **k: pytest.fail('it trains'))
    bad = folder/'val'/'4'/'bad.png'
    try:
        bad.write_bytes(b'no image')
        assert f"cannot read the image '{bad}'" in refused(capsys, argv(**tiny, out='a/b/out'))
    finally: bad.unlink()
    assert not names(tmp_path)

def test_no_network(capsys, monkeypatch, tmp_path):
    from fastai.data.external import URLs, fastai_cfg
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(URLs, 'IMAGENETTE_320', 'http://127.0.0.1:9/imagenette2-320.tgz')
    fastai_cfg.cache_clear()
    try: err = refused(capsys, ['--article', '--num_workers', '0'])
    finally: fastai_cfg.cache_clear()
    assert 'cannot download imagenette from http://127.0.0.1:9/' in err and not (tmp_path/'runs').exists()

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

def test_find_lr_where_the_loss_is_not_a_number(tiny, tmp_path, capsys):
    err = refused(capsys, argv('--find_lr', **tiny, eps=1e-300))
    assert 'find_lr: the loss was nan after 2 batches, too early' in err and not (tmp_path/'runs').exists()

def test_find_lr_in_several_processes(two_processes, capsys):
    assert 'find_lr works in one process only' in refused(capsys, ['--find_lr'])

def test_every_arch_is_known():
    for arch in ('xresnet18', 'xresnet50_deeper', 'xse_resnext34', 'resnet18', 'regnet_y_400mf', 'vit_b_16',
        'efficientnet_b0'): check_model(arch, 224, 2)
    assert not {'noop', 'flatten', 'list_models', 'get_model'} & set(archs) and len(set(archs)) == len(archs) > 100

def test_help_has_every_option_and_default(capsys):
    with pytest.raises(SystemExit) as e: main(['--help'])
    text = re.sub(r'\s+', ' ', capsys.readouterr().out)
    assert e.value.code == 0
    for k in inspect.signature(train).parameters: assert f' --{k} ' in text
    for o in options.values():
        if o.digits is None or o.digits is False: continue
        default = f'{o.digits}' if o.digits == o.photos else f'{o.digits} for the digits, {o.photos} otherwise'
        assert f'{o.help} (default: {default})' in text

# The main job

def test_main_job(tmp_path):
    "On the digits, into the folder that it chooses. With all its defaults it runs in the notebook 13_train"
    p = Forked(main, argv(arch='xresnet18', size=8, epochs=1), cwd=tmp_path)
    assert p.ended() == 0, p.err
    out = tmp_path/'runs'/'digits-NAdam'
    assert names(out) == ['args.json', 'history.csv', 'history.png', 'model.pth']
    hist = pd.read_csv(out/'history.csv')
    assert hist.accuracy.iloc[-1] > 0.6 and 'xresnet18, 11.2 million parameters' in p.out
    assert p.out.splitlines()[-1].startswith(f'accuracy {hist.accuracy.iloc[-1]:.4f}, ')
