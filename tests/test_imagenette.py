"The Imagenette tutorial needs a GPU and a download: its cells are compiled, and run on small images instead"
import json, re, runpy, sys
from pathlib import Path
from types import ModuleType

import numpy as np, pytest
from fastai.vision.all import Image

root = Path(__file__).parent.parent
page = root/'nbs/tutorial.imagenette.ipynb'
tools = runpy.run_path(str(root/'nbs/_colab.py'))

def cells(nb=None):
    "Code of each cell, in plain Python"
    manager = pytest.importorskip('IPython.core.inputtransformer2').TransformerManager()
    nb = nb or json.loads(page.read_text(encoding='utf-8'))
    return [manager.transform_cell(''.join(c['source'])) for c in nb['cells'] if c['cell_type'] == 'code']

def test_cells_compile():
    for c in cells(): compile(c, page.name, 'exec')

def test_cells_run(tmp_path, monkeypatch):
    "As they are, but for fewer and smaller images, a smaller network and two epochs"
    code = '\n'.join(c for c in cells() if 'get_ipython' not in c)
    classes = re.findall(r"(n\d{8})=", code)
    assert len(classes) == 10
    for split,n in dict(train=2, val=1).items():
        for c in classes:
            (tmp_path/'data'/split/c).mkdir(parents=True)
            for i in range(n):
                img = Image.fromarray(np.random.randint(0, 256, (40, 50, 3), dtype=np.uint8))
                img.save(tmp_path/'data'/split/c/f'{i}.png')
    smaller = {'untar_data(URLs.IMAGENETTE_320)': f"Path({str(tmp_path/'data')!r})", '(224': '(32',
        'bs=64': 'bs=4, num_workers=0', 'fit_one_cycle(10': 'fit_one_cycle(2', 'xresnet34(': 'xresnet18(',
        'lr_find()': 'lr_find(num_it=20)'}
    for a,b in smaller.items():
        assert a in code
        code = code.replace(a, b)
    monkeypatch.chdir(tmp_path)
    module = ModuleType('page')
    monkeypatch.setitem(sys.modules, 'page', module)  # where pickle looks for class_name
    exec(code, env := vars(module))
    env['plt'].close('all')
    files = sorted(o.name for o in (tmp_path/'imagenette_run').iterdir())
    assert files == ['checkpoint.pth', 'models', 'xresnet34.pkl']
    assert len(env['accuracies']) == 2 and env['cls'] in env['names'].values()

def test_cells_for_a_gpu_are_not_run_here():
    for c in json.loads(page.read_text(encoding='utf-8'))['cells']:
        source = ''.join(c['source'])
        needs = re.search(r'\b(learn|dls|interp|out)\b', source)
        if c['cell_type'] == 'code':
            assert bool(needs or '! [' in source) == source.startswith('#| eval: false\n'), source

# Colab

def test_the_page_has_the_address_of_pyproject():
    nb = json.loads(page.read_text(encoding='utf-8'))
    page_now = tools['write'](tools['colab'](nb, tools['address']()))
    assert page_now == page.read_text(encoding='utf-8'), 'run python nbs/_colab.py'

def test_a_badge_appears_with_an_address(tmp_path):
    toml = (root/'pyproject.toml').read_text(encoding='utf-8')
    repo = 'Repository = "https://github.com/someone/fastai_nadam/"\n'
    toml = re.sub(r'^Repository = .*\n', '', toml, flags=re.M).replace('[project.urls]\n', f'[project.urls]\n{repo}')
    (tmp_path/'pyproject.toml').write_text(toml)
    url = tools['address'](tmp_path/'pyproject.toml')
    before = json.loads(page.read_text(encoding='utf-8'))
    after = tools['colab'](before, url)
    badge = ''.join(after['cells'][1]['source'])
    assert 'colab.research.google.com/github/someone/fastai_nadam/blob/main/nbs/tutorial.imagenette.ipynb' in badge
    text = json.dumps(after)
    assert 'pip install -Uqq git+https://github.com/someone/fastai_nadam  # on Colab' in text
    assert 'no public address' not in text
    assert tools['colab'](after, url) == after
    assert 'colab-badge' not in json.dumps(tools['colab'](after, None))
