"What the tests of the commands share: processes, a folder of a few images, tiny options, and runs that are stopped"
import atexit, multiprocessing, os, signal, sys, tempfile, time
from pathlib import Path

import pandas as pd, pytest, torch
from fastai.vision.all import Callback, Image

from fastai_nadam.tools import train as room
from fastai_nadam.tools.data import digits_path
from fastai_nadam.tools.train import main, new_learner
from helpers import same

processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['pytest', 'fastai.vision.all', 'fastai_nadam.tools.compare', 'nbdev.test'])
streams = tempfile.TemporaryDirectory(prefix='streams-')

class Forked(processes.Process):
    "`f(*args)` as a command in a shell, but with everything imported already. `f` gives its exit code"
    def __init__(self, f, *args, cwd='.', before=None):
        super().__init__()
        self.f, self.args, self.cwd, self.before = f, args, Path(cwd).absolute(), before
        self.files = [Path(streams.name)/f'{self.name}.{o}' for o in ('out', 'err')]
        self.start()
        atexit.register(self.kill) # if its test fails

    def run(self):
        for fd,file in enumerate(self.files, 1): os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600), fd)
        sys.stdout, sys.stderr = (open(fd, 'w', buffering=1, closefd=False) for fd in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler) # a shell's `&` has it ignored
        os.chdir(self.cwd)
        if self.before: self.before()
        sys.exit(self.f(*self.args))

    def said(self, i): return self.files[i].read_text() if self.files[i].exists() else ''
    out, err = (property(lambda self, i=i: self.said(i)) for i in (0, 1))

    def until(self, condition):
        "Wait until `condition()`, or for the end"
        end = time.time() + 120
        while time.time() < end and self.is_alive() and not condition(): time.sleep(0.02)

    def send_signal(self, s): os.kill(self.pid, s)

    def ended(self, timeout=120):
        "Its exit code, once it has ended; after `timeout` seconds it is killed"
        self.join(timeout)
        self.kill()
        self.join()
        return self.exitcode

def printed(f, *args):
    "The words that `f(*args)` prints in a process of its own"
    p = Forked(f, *args)
    assert p.ended() == 0, p.err
    return p.out.split()

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

def refused(capsys, args):
    "Run `main`, which must exit with 2 and one line"
    try: code = main(args)
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith('nadam-train: ') and err.endswith('\n') and err.count('\n') == 1, err
    return err

def weights(path): return torch.load(path/'model.pth', weights_only=True)['model']

def history(path): return pd.read_csv(path/'history.csv').drop(columns='time')

def names(path): return sorted(o.name for o in path.iterdir())

def same_run(a, b):
    "The same files, with the same weights and the same state of the optimizer to the last bit"
    assert names(a) == names(b) == ['args.json', 'history.csv', 'history.png', 'model.pth']
    assert same(*(torch.load(p/'model.pth', weights_only=True) for p in (a, b)))
    assert history(a).equals(history(b)) and (a/'args.json').read_text() == (b/'args.json').read_text()

class Stop(Callback):
    "Stop in the middle of an epoch, or, with `at` None, before the first"
    def __init__(self, error, at): self.error, self.at = error, at
    def before_fit(self):
        if self.at is None: raise self.error
    def after_batch(self):
        if self.epoch == self.at: raise self.error

def stop(error, args, at=1):
    "Run `main`, which is stopped"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(room, 'new_learner', lambda *args: new_learner(*args).add_cb(Stop(error, at)))
        return main(args)
