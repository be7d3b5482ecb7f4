"What the commands share: options, errors on one line, files that are whole, a lock on a folder"
import io, json, math, os, random, signal, subprocess, sys, time

import matplotlib.pyplot as plt, pytest, torch
from fastai.vision.all import Callback

from fastai_nadam.tools import cli as module, open_streams
from fastai_nadam.checks import each, entries, number, one_of, optional, sequence, text, values, whole
from fastai_nadam.tools.cli import (append_text, atomic_save, cli, did_you_mean, lock_folder, read_json, read_text,
    save_fig, save_json)
from runs import Forked

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

def test_a_message_is_printable(capsys):
    "A name from a file may hold what a terminal obeys"
    assert cli(raises(ValueError('no \x1b[2J\x07 class\u202e é')), 'x', []) == 2
    assert capsys.readouterr().err == r'x: no \x1b[2J\x07 class\u202e é' + '\n'

@pytest.mark.parametrize('given,names,hint', [('Nadam', ['Adam', 'NAdam'], 'NAdam'),
    ('adam', ['Adam', 'NAdam'], 'Adam'), ('NADAM', ['Adam', 'NAdam'], 'NAdam'),
    ('xresnet35', ['resnet18', 'xresnet34'], 'xresnet34'), ('--mom', ['--moms'], '--moms'), ('zzz', ['Adam'], None)])
def test_did_you_mean(given, names, hint):
    assert did_you_mean(given, names) == (f'; did you mean {hint}?' if hint else '')

def test_a_bug_is_not_hidden():
    with pytest.raises(RuntimeError, match='bug'): cli(raises(RuntimeError('bug')), 'x', [])
    with pytest.raises(KeyError): cli(raises(KeyError('bug')), 'x', [])

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

# Links

def made_by(kind, place, victim):
    "Something at `place` that is no file of ours"
    if kind == 'link': place.symlink_to(victim)
    elif kind == 'dangling link': place.symlink_to(victim.with_name('new'))
    elif kind == 'link to itself': place.symlink_to(place)
    elif kind == 'hard link': os.link(victim, place)
    elif kind == 'pipe': os.mkfifo(place)
    elif kind == 'folder': place.mkdir()

def write_json(file): save_json(dict(a=1), file)
def write_fig(file): save_fig(plt.figure(), file.with_suffix('.png'))

links = pytest.mark.parametrize('kind', ['link', 'dangling link', 'link to itself'])

@pytest.mark.parametrize('write,where', [(w, o) for w in (write_json, write_fig) for o in ('a.png', '.a.png.part')]
    + [(lambda f: append_text(f, 'more'), 'a.png')])
@links
def test_nothing_is_written_through_a_link(kind, write, where, tmp_path):
    victim, place = tmp_path/'victim', tmp_path/'out'/where
    victim.write_text('precious')
    place.parent.mkdir()
    made_by(kind, place, victim)
    with pytest.raises(OSError, match=f"^cannot write '.*/out/a.png': '.*/out/{where}' is a link$"):
        write(tmp_path/'out'/'a.png')
    assert list(place.parent.iterdir()) == [place] and place.is_symlink()
    assert victim.read_text() == 'precious' and not (tmp_path/'new').exists()

@pytest.mark.parametrize('where', ['{}', '.{}.part'])
def test_a_hard_link_is_replaced(where, tmp_path):
    file, victim = tmp_path/'out'/'a.json', tmp_path/'victim'
    victim.write_text('precious')
    file.parent.mkdir()
    made_by('hard link', file.with_name(where.format(file.name)), victim)
    save_json(dict(a=1), file)
    assert victim.read_text() == 'precious' and json.loads(file.read_text()) == dict(a=1)

def test_a_link_that_is_made_in_between(tmp_path, monkeypatch):
    "After it was looked for, and before the file is opened"
    victim = tmp_path/'victim'
    victim.write_text('precious')
    monkeypatch.setattr(module.Path, 'unlink', lambda file, **kwargs: file.symlink_to(victim))
    with pytest.raises(OSError, match="^cannot write '.*/a.json': File exists$"):
        save_json(dict(a=1), tmp_path/'a.json')
    assert victim.read_text() == 'precious'

@pytest.mark.parametrize('where', ['{}', '.{}.part'])
def test_a_folder_in_the_way(where, tmp_path):
    made_by('folder', tmp_path/where.format('a.json'), None)
    with pytest.raises(OSError, match="^cannot write '.*/a.json': "): save_json(dict(a=1), tmp_path/'a.json')
    assert [o.name for o in tmp_path.iterdir()] == [where.format('a.json')]

def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path/'.a.json.part').write_text('half of')
    save_json(dict(a=1), tmp_path/'a.json')
    assert [o.name for o in tmp_path.iterdir()] == ['a.json']

# What is read

@pytest.mark.parametrize('data,message', [(b'\xff', 'is invalid: .utf-8'), (b'a\0b', 'is invalid: it has a zero byte'),
    (b'a'*101, 'is invalid: longer than 100 bytes')])
def test_text_refused(data, message, tmp_path):
    (tmp_path/'f').write_bytes(data)
    with pytest.raises(ValueError, match=f"^'.*/f' {message}"): read_text(tmp_path/'f', limit=100)

@pytest.mark.parametrize('kind', ['pipe', 'folder', 'dangling link', 'link to itself', 'none'])
def test_only_files_are_read(kind, tmp_path):
    made_by(kind, tmp_path/'f', tmp_path/'victim')
    with pytest.raises(ValueError, match="^no such file: '.*/f'"): read_text(tmp_path/'f')

bad_numbers = [None, 'x', '1', True, [1], {}, math.nan, math.inf, -math.inf, 10**400, -10**400, 1j]

@pytest.mark.parametrize('check,good,bad', [
    (whole(1, 9), [1, 9], [0, 10, 1.0, *bad_numbers]),
    (number(0, 1), [0, 1, 0.5], [-1e-9, 1.1, *bad_numbers]),
    (text, ['', 'a b', 'é'], [None, 3, b'a', ['a'], 'a\x1b', 'a\nb', '\u202e', 'a'*10**5]),
    (one_of('a', 1), ['a', 1], ['b', 2, True, 1.0, None, [], {}]),
    (optional(whole()), [None, 0], [False, '', -1]),
    (each(whole(0)), [[], [1, 2], (3,)], [None, 'ab', {}, [None], [1, -1], [[1]]]),
    (each(whole(0), 2), [[1, 2]], [[], [1], [1, 2, 3]]),
    (sequence(whole(0), text), [[1, 'a'], (1, 'a')], [[], [1], ['a', 1], [1, 'a', 'b'], 'ab']),
    (values(whole(0)), [{}, dict(a=1)], [[], None, {1: 1}, dict(a=-1), {'\x1b': 1}]),
    (entries(dict(a=whole(0)), dict(b=optional(text))), [dict(a=1), dict(a=1, b=None), dict(a=1, b='c')],
        [{}, dict(b=None), dict(a=1, b=None, c=1), dict(a='1', b=None), dict(a=1, b=3), [], None, {3: 3}])])
def test_checks(check, good, bad):
    for v in good: check('x', v)
    for v in bad:
        with pytest.raises(ValueError, match=r'x\S* must (be|have) |^x: no such entry: ') as e: check('x', v)
        assert len(str(e.value)) < 300 and str(e.value).isprintable()

def test_the_entry_is_named():
    check = entries(dict(rows=each(sequence(whole(0), number())), note=optional(text)))
    for v,says in ((dict(rows=[[1, 2.], [1, 'x']], note=None), r"rows\[1\]\[1\] must be a finite number, got 'x'$"),
            (dict(rows=[], note=3), 'note must be '), (dict(rows=[]), "must have 'note'"),
            (dict(rows=[], note=None, more=1), "no such entry: more$")):
        with pytest.raises(ValueError, match=f'^(it )?{says}'): check('', v)

@pytest.mark.parametrize('content,message', [(b'', 'Expecting value'), (b'{"a": 1', 'Expecting'), (b'[]', 'it must be'),
    (b'['*100_000, 'too deep'), (b'{"a":'*100_000, 'too deep'), (b'{"a": ' + b'9'*5000 + b'}', ''),
    (b'\xff', 'utf-8'), (b'{"a": NaN}', 'a must be a whole number'), (b'null', 'it must be'),
    (b'{"a": 1e400}', 'a must be a whole number')])
def test_json_refused(content, message, tmp_path):
    (tmp_path/'f').write_bytes(content)
    with pytest.raises(ValueError, match=f"^'.*/f'.*{message}") as e: read_json(tmp_path/'f', entries(dict(a=whole())))
    assert len(str(e.value)) < 400

# The lock

def hold(path, seconds=60):
    with lock_folder(path):
        print('locked')
        time.sleep(seconds)

def refused_lock(path): return pytest.raises(ValueError, match=f"another run is at work in '{path}'")

def test_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    p = Forked(hold, tmp_path)
    p.until(lambda: p.out)
    p.send_signal(signal.SIGSTOP)  # stopped is not dead
    with refused_lock(tmp_path), lock_folder(tmp_path): pytest.fail('two in one folder')
    p.ended(0)
    with lock_folder(tmp_path):
        with refused_lock(tmp_path), lock_folder(tmp_path): pytest.fail('twice')
        late = Forked(hold, tmp_path, 0)
        assert late.ended() and 'another run is at work in' in late.err
    with lock_folder(tmp_path): assert list(tmp_path.iterdir()) == []

def leave_a_worker(path):
    with lock_folder(path):
        if os.fork(): os.kill(os.getpid(), signal.SIGKILL)
        print(os.getpid())
        time.sleep(60)

def test_a_lock_does_not_live_on_in_workers(tmp_path):
    "A killed run can be resumed at once, while the workers that it forked are still there"
    p = Forked(leave_a_worker, tmp_path)
    assert p.ended() == -signal.SIGKILL
    while not p.out: time.sleep(0.01)
    try:
        with lock_folder(tmp_path): pass
    finally: os.kill(int(p.out), signal.SIGKILL)

def test_lock_where_there_are_none(tmp_path, monkeypatch):
    def no_locks(*args): raise OSError(38, 'Function not implemented')
    monkeypatch.setattr(module.fcntl, 'flock', no_locks)
    with lock_folder(tmp_path): pass
    with pytest.raises(OSError), lock_folder(tmp_path/'nowhere'): pass

@pytest.mark.parametrize('kind', ['link', 'dangling link', 'link to itself', 'pipe'])
@pytest.mark.parametrize('name', ['.checkpoint.pth.part', 'results.csv', '.lock', 'anything'])
def test_a_folder_of_results_has_files_alone(kind, name, tmp_path):
    victim = tmp_path/'victim'
    victim.write_text('precious')
    (tmp_path/'out').mkdir()
    made_by(kind, tmp_path/'out'/name, victim)
    with pytest.raises(ValueError, match=f"^'.*/out/{name}' is a {kind.split()[-1] if kind == 'pipe' else 'link'}"):
        with lock_folder(tmp_path/'out'): pytest.fail('it goes on')
    (tmp_path/'out'/name).unlink()
    with lock_folder(tmp_path/'out'): pass
    assert victim.read_text() == 'precious'

# A command starts and ends

commands = ['train', 'compare', 'bench']

def command_line(name): return [sys.executable, '-m', f'fastai_nadam.tools.{name}']

def script(name):
    "What pip makes of the entry point in settings.ini"
    settings = open(os.path.join(os.path.dirname(__file__), '..', 'settings.ini')).read()
    module, func = next(l for l in settings.splitlines() if l.startswith(f'nadam-{name} = ')).split(' = ')[1].split(':')
    return [sys.executable, '-c', f'import sys\nfrom {module} import {func}\nsys.exit({func}())']

@pytest.mark.parametrize('way', [command_line, script])
@pytest.mark.parametrize('name', commands)
def test_ctrl_c_while_it_starts(name, way, tmp_path):
    def as_in_a_terminal(): signal.signal(signal.SIGINT, signal.SIG_DFL)
    p = subprocess.Popen(way(name), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=as_in_a_terminal)
    try:
        end = time.time() + 60 # until torch is being loaded
        while time.time() < end and 'libtorch' not in open(f'/proc/{p.pid}/maps').read(): time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=60)
    finally: p.kill()
    assert (p.returncode, out, err) == (130, '', f'nadam-{name}: interrupted\n')
    assert not list(tmp_path.iterdir())

def test_ctrl_c_is_pythons_own_once_a_command_runs():
    def interrupted(*_): "As `start` sets it"
    def look(): seen.append(signal.getsignal(signal.SIGINT))
    seen, before = [], signal.signal(signal.SIGINT, interrupted)
    try: assert cli(look, 'x', []) == 0
    finally: signal.signal(signal.SIGINT, before)
    assert seen == [signal.default_int_handler]

def test_closed_streams(tmp_path):
    command = f'{" ".join(command_line("train"))} --data nowhere <&- >&-'
    p = subprocess.run(['sh', '-c', command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert p.returncode == 2 and p.stderr.startswith('nadam-train: no such folder') and p.stderr.count('\n') == 1
    assert not list(tmp_path.iterdir())

def test_a_command_that_has_no_standard_output(monkeypatch):
    def speak(): print('lost')
    monkeypatch.setattr(sys, 'stdout', None)
    assert cli(speak, 'x', []) == 0

def write_without_streams():
    sys.stdout = sys.stderr = None
    for fd in range(3): os.close(fd)
    open_streams()
    print('lost')
    with open('file', 'w') as f: f.write(str(f.fileno()))

def test_streams_are_opened(tmp_path):
    "Nothing is shown, and no file gets the number of a stream"
    p = Forked(write_without_streams, cwd=tmp_path)
    assert p.ended() == 0 and p.out == '' and int((tmp_path/'file').read_text()) > 2

class Broken(io.StringIO):
    "Standard output that fails when it is flushed, or at once"
    def __init__(self, error, at_once): self.error, self.at_once, self.file = error, at_once, open(os.devnull, 'w')
    def fileno(self): return self.file.fileno()
    def write(self, s):
        if self.at_once: raise self.error
    def flush(self): raise self.error

@pytest.mark.parametrize('argv', [['--help'], []])
@pytest.mark.parametrize('at_once', [True, False])
def test_output_that_cannot_be_written(argv, at_once, capsys, monkeypatch):
    def speak():
        "Say something"
        print('something')
    for error,code,err in ((OSError(28, 'No space left on device'), 2, 'x: [Errno 28] No space left on device\n'),
            (BrokenPipeError(32, 'Broken pipe'), 141, '')):
        monkeypatch.setattr(sys, 'stdout', Broken(error, at_once))
        monkeypatch.setattr(module, 'docments', lambda *args, **kwargs: {})
        assert cli(speak, 'x', argv) == code
        assert capsys.readouterr().err == err
