"What the commands share: options, errors on one line, files that are whole, a lock on a folder"
import os, random, signal, subprocess, sys

import matplotlib.pyplot as plt, pytest, torch
from fastai.vision.all import Callback

from fastai_nadam.tools import cli as room
from fastai_nadam.checks import check_int
from fastai_nadam.tools.cli import atomic_save, cli, lock_folder, save_fig, save_json, versions

def command(
    num_workers:int=3, # How many, 100 % of them
    lr:float=None, # How fast
    fp16:bool=None, # In half precision
    data:str='digits' # What
):
    "Do it"
    command.given = dict(num_workers=num_workers, lr=lr, fp16=fp16, data=data)

def code(argv):
    try: return cli(command, 'do-it', argv, dict(lr='fast'))
    except SystemExit as e: return e.code

def test_options_are_named_as_the_arguments(capsys):
    assert code(['--num_workers=4', '--lr', '1e-3', '--fp16']) == 0
    assert command.given == dict(num_workers=4, lr=1e-3, fp16=True, data='digits')
    assert code(['--help']) == 0
    text = ' '.join(capsys.readouterr().out.split())
    for o in ('--num_workers NUM_WORKERS How many, 100 % of them (default: 3)', '--lr LR How fast (default: fast)',
            '--fp16 In half precision --data'):
        assert o in text

@pytest.mark.parametrize('argv,message', [('--lr=much', "do-it: argument --lr: invalid float value: 'much'\n"),
    ('--num_worker 3', 'unrecognized arguments: --num_worker 3; did you mean --num_workers?\n'),
    ('--fp16=no', "do-it: argument --fp16: ignored explicit argument 'no'\n"),
    ('digits', 'do-it: unrecognized arguments: digits\n')])
def test_a_mistake_is_one_line(argv, message, capsys):
    assert code(argv.split()) == 2
    err = capsys.readouterr().err
    assert err.endswith(message) and err.startswith('do-it: ') and err.count('\n') == 1

def too_much(): torch.empty(2**55)

def in_a_callback():
    class Bad(Callback):
        def before_fit(self): raise ValueError('no such\n thing')
    Bad()('before_fit')

def no_memory(): raise MemoryError

def raises(error):
    def f(): raise error
    return f

@pytest.mark.parametrize('func,rc,message', [
    (raises(ValueError('lr must\n  be  positive')), 2, 'x: lr must be positive\n'),
    (raises(OSError(28, 'No space left on device', 'a/b')), 2, "No space left on device: 'a/b'"),
    (raises(KeyboardInterrupt()), 130, 'x: interrupted\n'), (no_memory, 2, 'x: MemoryError\n'),
    (in_a_callback, 2, 'x: no such thing\n'),
    (too_much, 2, "x: can't allocate memory: you tried to allocate")])
def test_errors_of_the_function(func, rc, message, capsys, monkeypatch):
    assert cli(func, 'x', []) == rc
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1
    monkeypatch.setenv('RANK', '1')
    assert cli(func, 'x', []) == rc and capsys.readouterr().err == ''  # only the first process speaks

def test_a_bug_is_not_hidden():
    with pytest.raises(RuntimeError, match='bug'): cli(raises(RuntimeError('bug')), 'x', [])
    with pytest.raises(KeyError): cli(raises(KeyError('bug')), 'x', [])

@pytest.mark.parametrize('v', [0, -1, 1.0, '1', True, None])
def test_check_int(v):
    with pytest.raises(ValueError, match=f'n must be a whole number from 1, got {v!r}'): check_int('n', v)
    check_int('n', random.randint(1, 9))
    check_int('n', 0, low=0)

# Files

def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path/'file'
    for data in (b'one', b'two'):
        with atomic_save(file) as f: f.write(data)
    for error in (OSError(), RuntimeError(), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_save(file) as f:
            f.write(b'thr')
            raise error
        assert file.read_bytes() == b'two' and list(tmp_path.iterdir()) == [file]

def test_ctrl_c_while_torch_writes(tmp_path):
    "torch.save makes a RuntimeError of it, wherever it comes but at the end"
    class Interrupted:
        def __init__(self, f, n): self.f, self.n = f, n
        def write(self, b):
            if not self.n: raise KeyboardInterrupt
            self.n -= 1
            return self.f.write(b)
    for n in range(30):
        with pytest.raises(KeyboardInterrupt), atomic_save(tmp_path/'file') as f:
            torch.save(dict(a=torch.randn(1000), b=torch.randn(3)), Interrupted(f, n))
    assert not list(tmp_path.iterdir())

@pytest.fixture
def small_disk():
    "No file may be longer than 100 kB"
    resource = pytest.importorskip('resource')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)

@pytest.mark.parametrize('write', [lambda f: torch.save(dict(model={'w': torch.randn(10**5)}), f),
    lambda f: f.write(os.urandom(10**6))])
def test_a_full_disk_is_an_os_error_that_names_the_file(write, small_disk, tmp_path):
    file = tmp_path/'model.pth'
    file.write_bytes(b'old')
    with pytest.raises(OSError, match=r"^cannot write '.*/model.pth': File too large$"), atomic_save(file) as f:
        write(f)
    assert file.read_bytes() == b'old' and list(tmp_path.iterdir()) == [file]

def test_json_and_figure(tmp_path):
    save_json(dict(a=[1, None]), tmp_path/'a.json')
    assert (tmp_path/'a.json').read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
    for name,start in {'a.png': b'\x89PNG', 'a.svg': b'<?xml'}.items():
        fig = plt.figure()
        save_fig(fig, tmp_path/name)
        assert (tmp_path/name).read_bytes().startswith(start) and not plt.fignum_exists(fig.number)

def test_versions(): assert versions()['torch'] == torch.__version__.split('+')[0]

# The lock

hold = """import sys, time; from fastai_nadam.tools.cli import lock_folder
with lock_folder(sys.argv[1]): print('locked', flush=True); time.sleep(60)"""

def other(path):
    p = subprocess.Popen([sys.executable, '-c', hold, path], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'locked\n'
    return p

def test_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    p = other(tmp_path)
    try:
        p.send_signal(signal.SIGSTOP)  # stopped is not dead
        with pytest.raises(ValueError, match='another run is at work in'), lock_folder(tmp_path):
            pytest.fail('two in one folder')
    finally: p.kill()
    p.wait()
    with lock_folder(tmp_path):
        with pytest.raises(ValueError, match='another run is at work in'), lock_folder(tmp_path): pytest.fail('twice')
        code = 'import sys; from fastai_nadam.tools.cli import lock_folder\nwith lock_folder(sys.argv[1]): pass'
        assert 'another run is at work in' in subprocess.run([sys.executable, '-c', code, tmp_path],
            capture_output=True, text=True).stderr
    assert list(tmp_path.iterdir()) == []

def test_lock_that_was_deleted_meanwhile(tmp_path, monkeypatch):
    "The one that had the lock deletes the file just after we opened it: that file's lock would keep nobody out"
    lock, files = room._lock, []
    def once(f):
        files.append(f)
        if len(files) == 1: (tmp_path/'.lock').unlink()
        return lock(f)
    monkeypatch.setattr(room, '_lock', once)
    with lock_folder(tmp_path):
        assert len(files) == 2 and os.path.samestat(os.fstat(files[1].fileno()), (tmp_path/'.lock').stat())

def test_lock_where_there_are_none(tmp_path, monkeypatch):
    def no_locks(f): raise OSError(38, 'Function not implemented')
    monkeypatch.setattr(room, '_lock', no_locks)
    with lock_folder(tmp_path): pass
    with pytest.raises(OSError), lock_folder(tmp_path/'nowhere'): pass
