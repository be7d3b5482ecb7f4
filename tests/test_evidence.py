"""The tasks of tutorial.compare, and the results stored beside them"""
import random
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest, torch
from fastai.torch_core import set_seed
from fastai_nadam.optimizer import NAdam

evidence = Path(__file__).parent.parent/'nbs'/'evidence'
pytestmark = pytest.mark.skipif(not all(map(find_spec, ('mlxtend', 'mnist1d', 'plotnine'))), reason="needs the extra dev")
names = 'digits mnist autoencoder mnist1d text_gru text_transformer diamonds photo houses code_conv digits_vit'.split()

@pytest.fixture(scope='module')
def tasks():
    spec = spec_from_file_location('tasks', evidence/'tasks.py')
    spec.loader.exec_module(module := module_from_spec(spec))
    return module

def make(tasks, name, seed):
    set_seed(seed, reproducible=True)
    try: learn = getattr(tasks, name)(NAdam)
    except ValueError as e:
        if 'SHA-256' in str(e): pytest.skip("another Python has other texts")
        raise
    for dl in learn.dls.loaders: dl.rng = random.Random(seed)
    return learn

def items(dl): return {tuple(torch.cat([t.flatten().float() for t in o]).tolist()) for o in zip(*dl.tensors)}

@pytest.mark.parametrize('name', names)
def test_a_task_learns(tasks, name):
    learn = make(tasks, name, random.randrange(10**6))
    with learn.no_bar(), learn.no_logging():
        before = learn.validate(ds_idx=2)[0]
        learn.fit_one_cycle(2, getattr(tasks, name).lrs[0]*3)
        assert learn.validate(ds_idx=2)[0] < before

@pytest.mark.parametrize('name', names)
def test_the_seed_splits_the_data(tasks, name):
    seed = random.randrange(10**6)
    learns = [make(tasks, name, o) for o in (seed, seed, seed+1)]
    a, b, c = ([dl.tensors for dl in learn.dls.loaders] for learn in learns)
    assert len(a) == 3
    assert all(torch.equal(t, u) for x,y in zip(a, b) for t,u in zip(x, y))
    assert not any(torch.equal(x[0], y[0]) for x,y in zip(a, c))
    train, tune, test = map(items, learns[0].dls.loaders)
    for x,y in ((train, tune), (train, test), (tune, test)): # a text repeats itself, and some items are twice in their data
        assert len(x & y) <= 0.1*min(len(x), len(y))
    p, q = (next(learn.model.parameters()) for learn in learns[:2])
    assert torch.equal(p, q)

def test_another_text_is_refused(tasks):
    with pytest.raises(ValueError, match="SHA-256"): tasks.char_data('other'*100, '0'*16, 2)
