"Every notebook runs from top to bottom, and shows the reader what it shows when it runs"
import json, os
from pathlib import Path

import pytest
from runs import Forked

pytestmark = pytest.mark.nbdev
root = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def project(copy_project, tmp_path_factory): return copy_project(tmp_path_factory.mktemp('notebooks')/'project')

def code(nb): return [c for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']

def shows(cell): return any(o.get('name') != 'stderr' for o in cell['outputs'])

def execute(nb, home):
    from nbdev.test import nbdev_test
    os.environ['IPYTHONDIR'] = str(home)
    nbdev_test(str(nb), n_workers=0, save=True)

@pytest.mark.parametrize('name', [f.name for f in sorted((root/'nbs').glob('*.ipynb'))])
def test_notebook(project, tmp_path, name):
    nb = project/'nbs'/name
    stored = code(nb)
    p = Forked(execute, nb, tmp_path, cwd=project)
    assert p.ended(1200) == 0, p.out + p.err
    for old,new in zip(stored, code(nb), strict=True):
        assert shows(old) == shows(new), (f"run {name} again and store its outputs; this cell's are not those of its "
            f"code:\n{''.join(old['source'])}")
