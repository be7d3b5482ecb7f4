"What the tests of nadam-train share: a folder of a few images, tiny options, commands, and runs that are stopped"
import signal, subprocess, sys
from functools import partial

import pandas as pd, pytest, torch
from fastai.vision.all import Callback, Image

from fastai_nadam.tools import train as room
from fastai_nadam.tools.data import digits_path
from fastai_nadam.tools.train import main, new_learner
from helpers import same

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

def start(args, cwd, **kw):
    "`nadam-train` in a process of its own"
    before = kw.get('before', partial(signal.signal, signal.SIGINT, signal.SIG_DFL)) # a shell's `&` has it ignored
    return subprocess.Popen([sys.executable, '-m', 'fastai_nadam.tools.train', *map(str, args)], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=before)

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

@pytest.fixture
def stop(monkeypatch):
    "A function that runs `main`, which is stopped"
    def f(error, args, at=1):
        with monkeypatch.context() as m:
            m.setattr(room, 'new_learner', lambda *args: new_learner(*args).add_cb(Stop(error, at)))
            return main(args)
    return f
