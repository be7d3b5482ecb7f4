"nadam-train, stopped and killed: what is deleted, what is kept, and that a resumed run is the same run"
import json, math, os, random, shutil, signal, time
from functools import partial

import pytest, torch
from fastai.vision.all import Learner, Path

from fastai_nadam.tools import checkpoint as room, train as train_room
from fastai_nadam.tools.checkpoint import Checkpoint, check_lengths, read_checkpoint, run_folder
from fastai_nadam.tools.train import main, train
from runs import Forked, Stop, argv, folder, here, names, refused, same_run, stop, tiny

@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory):
    "The folder of a run that nobody stopped"
    path = tmp_path_factory.mktemp('whole')/'out'
    assert main(argv(**tiny, seed=7, out=path)) == 0
    return path

# What is stopped

stops = pytest.mark.parametrize('error,code', [(KeyboardInterrupt(), 130), (OSError('no space left on device'), 2),
    (BrokenPipeError(32, 'Broken pipe'), 141)])

@stops
def test_stopped_before_the_first_checkpoint(error, code, tiny, tmp_path, capfd):
    (tmp_path/'empty').mkdir()
    for out in ('a/b/new', 'empty'): assert stop(error, argv(**tiny, out=out), at=None) == code
    assert names(tmp_path) == ['empty'] and not names(tmp_path/'empty')
    assert capfd.readouterr().err.count('\n') == (0 if code == 141 else 2)

@stops
def test_stopped_after_it(error, code, tiny, whole, tmp_path, capfd):
    assert stop(error, argv(**tiny, seed=7, out='my run')) == code
    assert names(tmp_path/'my run') == ['args.json', 'checkpoint.pth', 'history.csv']
    out, err = capfd.readouterr()
    assert code == 141 or (out.endswith("nadam-train --resume 'my run'\n") and err.count('\n') == 1)
    assert main(['--resume', 'my run']) == 0
    same_run(tmp_path/'my run', whole)
    out = capfd.readouterr().out
    assert code == 141 or 'resumes after 1 of 2 epochs' in out and out.count('\n0  ') == out.count('\n1  ') == 1

def test_stopped_again_and_again(tiny, whole, tmp_path):
    assert stop(KeyboardInterrupt(), argv(**tiny, seed=7, out='out'), at=0) == 130
    for at in (None, 0, 1, 1): assert stop(KeyboardInterrupt(), ['--resume=out'], at) == 130
    assert main(['--resume', 'out']) == 0
    same_run(tmp_path/'out', whole)

@pytest.fixture
def training(tiny, tmp_path):
    "A run that has ended two of many epochs"
    p = Forked(main, argv(**{**tiny, 'epochs': 1000}, out='out'), cwd=tmp_path)
    p.until(lambda: '\n1 ' in p.out)
    yield p
    p.ended(0)

# What is deleted, and by whom

def test_one_run_at_a_time_in_a_folder(training, tiny, tmp_path, capsys):
    "Ctrl-Z after an epoch; another process wants the folder; fg, and Ctrl-C, after which the run can be resumed"
    training.send_signal(signal.SIGSTOP)
    before = {f: f.read_bytes() for f in (tmp_path/'out').iterdir()}
    for args in (['--resume=out'], argv(**tiny, out='out')):
        assert "another run is at work in" in refused(capsys, args)
        assert capsys.readouterr().out == ''  # no advice about the other's run
    assert {f: f.read_bytes() for f in (tmp_path/'out').iterdir()} == before
    for s in (signal.SIGCONT, signal.SIGINT): training.send_signal(s)
    assert training.ended() == 130 and training.err == 'nadam-train: interrupted\n'
    assert training.out.rstrip().endswith('nadam-train --resume out')
    assert names(tmp_path/'out') == ['args.json', 'checkpoint.pth', 'history.csv']

def resumed_elsewhere(path):
    "As if the run had been resumed on a machine that sees no lock of ours, and had ended there"
    (path/'checkpoint.pth').unlink(missing_ok=True)
    for f in ('model.pth', 'history.png', 'history.csv'): (path/f).write_text('results')

def wrote_notes(path): (path/'notes.txt').write_text('of the user')

@pytest.mark.parametrize('event,left', [(wrote_notes, ['notes.txt']),
    (resumed_elsewhere, ['args.json', 'history.csv', 'history.png', 'model.pth'])])
def test_a_run_deletes_only_what_it_wrote(event, left, tmp_path):
    with pytest.raises(KeyboardInterrupt), run_folder('a/out') as path:
        (path/'args.json').write_text('{}')
        event(path)
        raise KeyboardInterrupt
    assert names(tmp_path/'a'/'out') == left

@pytest.mark.parametrize('rc', [0, 130])
def test_fg_after_the_run_has_ended_elsewhere(rc, tiny, tmp_path, monkeypatch):
    "With a lock that keeps nobody out: finished results stay, whatever the first process does next"
    monkeypatch.setattr(room, 'lock_folder', lambda path: room.suppress())
    after_epoch = Checkpoint.after_epoch
    def elsewhere(self):
        after_epoch(self)
        if self.epoch == 0:
            with monkeypatch.context() as m:
                m.setattr(Checkpoint, 'after_epoch', after_epoch)
                assert main(['--resume', 'out']) == 0
            shutil.copytree('out', 'copy')
            if rc: raise KeyboardInterrupt
    monkeypatch.setattr(Checkpoint, 'after_epoch', elsewhere)
    assert main(argv(**tiny, out='out')) == rc
    def contents(path): return {f.name: f.read_bytes() for f in Path(path).iterdir()}
    if rc: assert contents('out') == contents('copy')
    else: assert names(tmp_path/'out') == ['args.json', 'history.csv', 'history.png', 'model.pth']

def test_a_full_disk(tiny, whole, tmp_path):
    "The first checkpoint has no state of the optimizer and fits; the second does not"
    resource = pytest.importorskip('resource')
    size = (whole/'model.pth').stat().st_size*2//3
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    p = Forked(main, argv(**tiny, seed=7, out='out'), cwd=tmp_path, before=limit)
    assert p.ended() == 2 and p.err.startswith("nadam-train: cannot write '") and p.err.count('\n') == 1
    assert p.err.endswith("out/checkpoint.pth': File too large\n")
    assert p.out.endswith('nadam-train --resume out\n')
    assert names(tmp_path/'out') == ['args.json', 'checkpoint.pth', 'history.csv']
    assert main(['--resume', 'out']) == 0
    same_run(tmp_path/'out', whole)

def test_a_disk_that_is_full_at_the_end(tiny, whole, tmp_path, capfd, monkeypatch):
    def full(fig, file): raise OSError(28, 'No space left on device', str(file))
    with monkeypatch.context() as m:
        m.setattr(train_room, 'save_fig', full)
        assert main(argv(**tiny, seed=7, out='out')) == 2
    assert capfd.readouterr().err.count('\n') == 1
    assert main(['--resume', 'out']) == 0
    same_run(tmp_path/'out', whole)

# What resumes

@pytest.mark.parametrize('opt', ['NAdam', 'ranger'])
def test_killed_at_any_moment(opt, tiny, tmp_path):
    "Again and again, from its start to its end"
    args = argv(**{**tiny, 'arch': 'shufflenet_v2_x0_5', 'epochs': 3}, opt=opt)
    begun = time.time()
    assert main([*args, '--out=whole']) == 0
    seconds, part = time.time() - begun, tmp_path/'part'
    for i in range(3):
        resumable = (part/'args.json').exists()
        if not resumable: shutil.rmtree(part, ignore_errors=True)
        Forked(main, ['--resume=part'] if resumable else ['--out=part', *args]).ended(random.uniform(0, seconds))
    if not (part/'args.json').exists():
        shutil.rmtree(part, ignore_errors=True)
        p = Forked(main, ['--out=part', *args])
        p.until((part/'args.json').exists)
        p.ended(seconds/4)
    assert main(['--resume', 'part']) == 0 or not (part/'checkpoint.pth').exists()
    same_run(part, tmp_path/'whole')

def test_killed_before_the_first_checkpoint(whole, tmp_path, capsys):
    for f in ('args.json', '.checkpoint.pth.part'):
        (tmp_path/'out').mkdir(exist_ok=True)
        (tmp_path/'out'/f).write_text((whole/f).read_text() if (whole/f).exists() else '')
    assert main(['--resume', 'out']) == 0
    same_run(tmp_path/'out', whole)
    assert 'resumes after 0 of 2 epochs' in capsys.readouterr().out

def test_channels_last(tiny, tmp_path):
    args = argv('--channels_last', **tiny)
    assert main([*args, '--out=whole']) == 0 and stop(KeyboardInterrupt(), [*args, '--out=part']) == 130
    learn = train(resume='part')
    same_run(tmp_path/'part', tmp_path/'whole')  # strides too
    w = learn.model.features[0].weight
    assert w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous()

def test_in_any_learner(tmp_path):
    "Without classes, with a loss alone"
    from fastai.vision.all import DataLoader, DataLoaders, MSELossFlat, nn, set_seed, tensor
    def fit(cbs, stop=False):
        set_seed(3)
        items = [(tensor([i/8]), tensor([i*.3])) for i in range(8)]
        dls = DataLoaders(*(DataLoader(items, bs=4, shuffle=True) for _ in range(2)))
        learn = Learner(dls, nn.Linear(1, 1), loss_func=MSELossFlat(), lr=0.1)
        with learn.no_bar(), learn.no_logging():
            if stop: learn.add_cb(Stop(KeyboardInterrupt(), 2))
            learn.fit_one_cycle(4, cbs=cbs)
        return learn
    whole = fit(None)
    with pytest.raises(KeyboardInterrupt): fit(Checkpoint(tmp_path/'c.pth'), stop=True)
    resumed = fit(Checkpoint(tmp_path/'c.pth', resume=True))
    assert torch.equal(whole.model.weight, resumed.model.weight) and whole.recorder.values == resumed.recorder.values
    assert whole.recorder.iters == resumed.recorder.iters and whole.recorder.lrs == resumed.recorder.lrs

@pytest.fixture(scope='module')
def stopped_once(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp('once')/'out'
    assert stop(KeyboardInterrupt(), argv(**tiny, seed=7, out=path)) == 130
    return path

@pytest.fixture
def stopped(stopped_once, tmp_path):
    "A folder with the checkpoint of a run that was stopped"
    return Path(shutil.copytree(stopped_once, tmp_path/'stopped'))

@pytest.fixture
def no_training(monkeypatch): monkeypatch.setattr(Learner, '_do_fit', lambda *a, **k: pytest.fail('it trains'))

class Evil:
    def __reduce__(self): return exec, ("open('evil', 'w')",)

def rewrite(file, **changed): torch.save({**torch.load(file, weights_only=True), **changed}, file)

def other_args(file, **changed):
    file = file.with_name('args.json')
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, 'args': {**saved['args'], **changed}}))

@pytest.mark.parametrize('damage,message', [
    (lambda f: f.write_bytes(f.read_bytes()[:random.randrange(f.stat().st_size)]), 'is damaged, or no checkpoint'),
    (lambda f: torch.save({'model': {}}, f), 'is damaged, or no checkpoint'),
    (lambda f: torch.save(Evil(), f), 'is damaged, or no checkpoint'),
    (lambda f: rewrite(f, format=0), 'its format is 0'),
    (lambda f: rewrite(f, rng=[{}]*3),
        'trained by 3 processes, now 1: start torchrun --nproc_per_node 3 -m fastai_nadam.tools.train'),
    (lambda f: rewrite(f, data=[9, 9, 'a', 'b']),
        'the data has changed: 16 training and 8 validation items in 2 classes, it was 9'),
    (partial(other_args, arch='squeezenet1_0'), 'does not fit'),
    (partial(other_args, depth=3), 'no such option: depth'),
    (lambda f: f.with_name('args.json').write_text('{'), 'is no args.json of a run'),
    (partial(other_args, epochs=1), 'rows has 1 epochs, the run is of 1'),
    (partial(other_args, lr=None), "resume: 'stopped/args.json' is no args.json of a run: args.lr must be"),
    (lambda f: f.with_name('args.json').unlink(), "resume: no such file: 'stopped/args.json'")])
def test_resume_refused(damage, message, stopped, capsys, no_training):
    damage(stopped/'checkpoint.pth')
    before = {f: f.read_bytes() for f in stopped.iterdir()}
    capsys.readouterr()
    assert message in refused(capsys, ['--resume', 'stopped'])
    assert {f: f.read_bytes() for f in stopped.iterdir()} == before and not Path('evil').exists()

python_state = [3, [0]*625, None]

def forged(state):
    "Entry of a checkpoint → values that it must not have"
    rng, rows, n = state['rng'][0], state['rows'], len(state['losses'])
    weight = next(iter(state['model']))
    p = state['opt']['state'][0]
    def other(d, **kw): return {**d, **kw}
    def opt(**kw): return other(state['opt'], state=[other(p, **kw), *state['opt']['state'][1:]])
    def row(i, v): return [[*rows[0][:i], v, *rows[0][i+1:]], *rows[1:]]
    def model(v): return other(state['model'], **{weight: v})
    def rngs(**kw): return [other(rng, **kw)]
    w, numpy, groups, nan = state['model'][weight], rng['numpy'], state['opt']['hypers'], math.nan
    return dict(
        data=[None, [], [16], [16, -8], [16, True], ['16', 8], [16, 8, 3, 4], 'ab', {}],
        seconds=[None, 'x', -1, nan, math.inf, True, [1], 10**400, 1e300],
        rng=[None, [], [None], [3], 'a', {}, [{k: v for k,v in rng.items() if k != 'python'}], rngs(more=1),
            rngs(cuda=1), rngs(python=python_state[:2]), rngs(python=[3, [2**40]*625, None]),
            rngs(python=[3, [0]*624 + [10**6], None]),
            rngs(dls=[]), rngs(dls=[[3, [0]*624, None]]*2), rngs(torch=torch.zeros(3)), rngs(torch='x'),
            rngs(torch=torch.zeros(7, dtype=torch.uint8)), rngs(numpy=numpy[:3]), rngs(numpy=['PCG64', *numpy[1:]]),
            rngs(numpy=[*numpy[:2], 10**6, 0, 0.]), rngs(numpy=[*numpy[:2], -5, 0, 0.])],
        rows=[None, [3], 'x', {}, [], [[]], [[4]], [[4, 1.]], row(0, 'x'), row(0, -1), row(0, 3.5), row(0, 3),
            row(1, 'x'), row(1, -1.), row(1, nan), row(2, 'text'), row(3, None), row(4, torch.zeros(2)),
            row(4, [1]), row(4, True),
            [rows[0][:-1]], [[*rows[0], 1.]], [*rows, rows[0]], [*rows, [10**6, *rows[0][1:]]]],
        model=[None, [], {}, 'x', {3: 1}, other(state['model'], more=torch.zeros(1)), model(None),
            model(torch.zeros(0)), model(torch.zeros(1)),
            model(torch.zeros_like(w, dtype=torch.int32)), model(w.to_sparse())],
        opt=[None, [], {}, dict(state=[], hypers=[]), opt(grad_avg=3), opt(grad_avg=torch.zeros(1)), opt(sqr_avg='x'),
            opt(step=-1), opt(step=1.5), opt(step=None), opt(step=True), opt(do_wd=2), opt(more=torch.zeros(2)),
            other(state['opt'], hypers=[dict(lr='x')]), other(state['opt'], hypers=[{}]), other(state['opt'], more=1),
            other(state['opt'], hypers=[other(groups[0], lr=None)]), other(state['opt'], state=[p]),
            other(state['opt'], count='x'), other(state['opt'], slow_weights=[[torch.zeros(1)]])],
        scaler=[None, [], 'x', dict(scale='x'), dict(scale=None), {3: 3}],
        losses=[None, 3, [1.]*n, torch.zeros(n, dtype=torch.int64), torch.zeros(n-1), torch.zeros(n, 1)],
        lrs=[None, 3, 'x', [], ['x']*n, [None]*n, [1.]*(n+1), {}, torch.zeros(n)],
        hps=[None, [], {}, dict(lr=[], mom=[]), dict(lr=[1.]*n), other(state['hps'], lr=['x']*n),
            other(state['hps'], more=[1.]*n), other(state['hps'], mom=3)],
        smooth_loss=[None, 3., 'x', torch.zeros(1), torch.zeros((), dtype=torch.int64)],
        format=[None, 0, 2, '1', 1.5, [], {}, torch.zeros(2)])

@pytest.mark.parametrize('opt', ['NAdam', 'ranger'])
def test_every_entry_of_a_checkpoint_is_checked(opt, tiny, tmp_path, capsys, monkeypatch):
    """Left out, or of another type, value, length or nesting: one line names file and entry, and nothing is trained.
    What reading refuses is not tried with the command again, but for entries that are left out"""
    assert stop(KeyboardInterrupt(), argv(**tiny, opt=opt, out='stopped')) == 130
    monkeypatch.setattr(Learner, '_do_fit', lambda *a, **k: pytest.fail('it trains'))
    monkeypatch.setattr(train_room, 'check_images', lambda files: None) # they are always the same
    file = tmp_path/'stopped'/'checkpoint.pth'
    state = torch.load(file, weights_only=True)
    bad = forged(state)
    assert {*bad} == {*state}
    def check_message(k, v, err): assert 'stopped/checkpoint.pth' in err and k in err and len(err) < 600, (k, v, err)
    def refused_with(changed, k, v, by_command=True):
        if not by_command:
            try:
                with monkeypatch.context() as m:
                    m.setattr(torch, 'load', lambda *args, **kwargs: changed)
                    read_checkpoint(file)
            except ValueError as e: return check_message(k, v, str(e))
        torch.save(changed, file)
        capsys.readouterr()
        assert main(['--resume', 'stopped']) == 2, (k, v)
        out, err = capsys.readouterr()
        check_message(k, v, err)
        assert err.count('\n') == 1
        assert not [o for o in ('to resume', 'resumes after', 'accuracy') if o in out], (k, v, out)
    for k in state:
        refused_with({o: v for o,v in state.items() if o != k}, k, 'left out')
        # all of them for one optimizer, a few for the other
        some = bad[k] if opt == 'NAdam' else random.sample(bad[k], min(3, len(bad[k])))
        for v in some: refused_with({**state, k: v}, k, v, by_command=False)
    refused_with({**state, 'more': 1}, 'more', 'added')

@pytest.mark.parametrize('change', [lambda row: row[:-1], lambda row: [*row, 1.], lambda row: [*row[:-1], 'text']],
    ids=['short', 'long', 'text'])
def test_rows_of_any_learner_are_checked(change, stopped, capsys, monkeypatch, no_training):
    "Not only in nadam-train, which knows more of its rows"
    monkeypatch.setattr(train_room, 'check_rows', lambda checkpoint: None)
    rows = read_checkpoint(stopped/'checkpoint.pth')['rows']
    rewrite(stopped/'checkpoint.pth', rows=[change(o) for o in rows])
    assert 'rows[0]' in refused(capsys, ['--resume', 'stopped'])

def test_rows_count_batches_in_order():
    with pytest.raises(ValueError, match='rows must count the batches'):
        check_lengths(dict(losses=[1.]*4, rows=[[8], [4]], lrs=[], hps={}))

@pytest.mark.parametrize('make', [os.mkfifo, lambda f: f.symlink_to('/dev/zero'), lambda f: f.symlink_to(f),
    lambda f: f.symlink_to('../victim')], ids=['pipe', 'endless', 'link to itself', 'link'])
@pytest.mark.parametrize('name', ['checkpoint.pth', '.history.csv.part', 'anything'])
def test_resume_in_a_hostile_folder(name, make, stopped, tmp_path, capsys, no_training):
    "A link or a pipe in place of any file: one line, nothing is trained, and nothing outside has changed"
    (tmp_path/'victim').write_text('precious')
    (stopped/name).unlink(missing_ok=True)
    make(stopped/name)
    assert f'stopped/{name}' in refused(capsys, ['--resume', 'stopped'])
    assert (tmp_path/'victim').read_text() == 'precious'

def test_nothing_is_written_through_a_hard_link(stopped, whole, tmp_path):
    "In place of each file that a resumed run writes or deletes, and of each that it begins to write"
    written = ['history.csv', 'history.png', 'model.pth']
    places = ['checkpoint.pth', *written, *(f'.{o}.part' for o in written)]
    victims = {name: tmp_path/f'victim {name}' for name in places}
    for name,victim in victims.items():
        if (stopped/name).exists(): (stopped/name).rename(victim)
        else: victim.write_bytes(b'precious')
        os.link(victim, stopped/name)
    before = {o: o.read_bytes() for o in victims.values()}
    assert main(['--resume', 'stopped']) == 0
    assert {o: o.read_bytes() for o in before} == before
    same_run(stopped, whole)

@pytest.mark.parametrize('args,message', [
    ('--resume nowhere', "resume: no such folder: 'nowhere'"),
    ('--resume {run}', 'holds a run that is finished'),
    ('--resume {run} --epochs 9', 'give resume alone, without epochs'),
    ('--resume {run} --out other', 'give resume alone, without out'),
    ('--resume {run} --args a.json', 'give resume alone, without args'),
    ('--resume {run} --find_lr', 'give resume alone, without find_lr')])
def test_resume_of_nothing(args, message, whole, tmp_path, capsys):
    before = {f: f.read_bytes() for f in whole.iterdir()}
    assert message in refused(capsys, args.format(run=whole).split())
    assert not names(tmp_path) and {f: f.read_bytes() for f in whole.iterdir()} == before
