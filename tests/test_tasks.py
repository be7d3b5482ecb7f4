"Tasks by name, from a folder and from a file"
import sys

import pytest
from fastai_nadam import NAdam
from fastai_nadam.tools.compare import compare_opts, main
from fastai_nadam.tools.data import digits_path
from fastai_nadam.tools.results import Comparison
from fastai_nadam.tools.tasks import find_task, tasks

@pytest.mark.parametrize('task', tasks)
def test_tasks_train(task):
    "Better than always giving the most frequent answer, on the test data too"
    f, name, lrs, epochs = find_task(task)
    last = compare_opts(f, ['NAdam'], [lrs[1]], epochs, [0], metric='accuracy').results.iloc[-1]
    assert min(last.metric, last.test_metric) > dict(digits=0.8, tabular=0.9, text=0.2)[task]
    learn = f(NAdam)
    def items(dl): return {str(o) for x,_ in dl.new(shuffle=False, drop_last=False) for o in x.tolist()}
    train, valid, test = map(items, learn.dls.loaders)
    assert train and valid and test and (task == 'text' or not (train & valid or train & test or valid & test))

def test_a_folder_of_images(tmp_path):
    for f in digits_path().glob('*/[38]/*0.png'):
        to = tmp_path/'images'/f.relative_to(digits_path())
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(f.read_bytes())
    args = '--size 8 --bs 16 --opts NAdam,Adam --lrs 1e-2 --epochs 1 --seeds 2 --n_workers 0'.split()
    assert main(['--task', str(tmp_path/'images'), *args, '--out', str(tmp_path/'out')]) == 0
    c = Comparison.load(tmp_path/'out')
    assert c.settings['task'] == f"{tmp_path/'images'}, size 8, bs 16" and len(c.results) == 4

@pytest.fixture(autouse=True)
def path(monkeypatch): monkeypatch.setattr(sys, 'path', [*sys.path])

def test_a_function_of_a_file(tmp_path):
    (tmp_path/'helper_of_mine.py').write_text('lrs = 1, 2')
    (tmp_path/'tasks_of_mine.py').write_text('''import helper_of_mine
def mine(opt_func): pass
mine.lrs, mine.epochs = helper_of_mine.lrs, 7
other = mine
''')
    f, name, lrs, epochs = find_task(f'{tmp_path}/tasks_of_mine.py:mine')
    assert (f.__name__, name, lrs, epochs) == ('mine', 'mine', (1, 2), 7) and sys.modules[f.__module__].mine is f
    assert find_task(f'{tmp_path}/tasks_of_mine.py:other')[0] is f

@pytest.mark.parametrize('task, msg', [
    ('nothing.py:f', 'there is no file'),
    ('json.py:f', 'another module is called json'),
    ('bad.py:f', 'cannot be imported: ZeroDivisionError'),
    ('good.py:g', "has no function 'g'"),
    ('fine.py:n', "has no function 'n'")])
def test_an_invalid_file(task, msg, tmp_path):
    (tmp_path/'json.py').write_text('def f(opt_func): pass')
    (tmp_path/'bad.py').write_text('1/0')
    for o in ('good.py', 'fine.py'): (tmp_path/o).write_text('n = 1')
    for o in ('good', 'fine'): sys.modules.pop(o, None) # those of another tmp_path
    with pytest.raises(ValueError, match=msg): find_task(f'{tmp_path}/{task}')
