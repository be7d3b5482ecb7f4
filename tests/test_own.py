"What tutorial.own says of the commands: a short script gives them an optimizer of one's own"
import json, re, runpy, sys
from pathlib import Path

from runs import Forked

def run_script(*argv):
    sys.argv, sys.path = list(argv), ['', *sys.path]
    runpy.run_path(argv[0], run_name='__main__')

page = Path(__file__).parent.parent/'nbs/tutorial.own.ipynb'

def test_the_commands_take_an_optimizer_of_ones_own(tmp_path):
    cells = [(c['cell_type'], ''.join(c['source'])) for c in json.loads(page.read_text(encoding='utf-8'))['cells']]
    rule, = (s for t,s in cells if t == 'code' and 'def FastQHAdam' in s)
    script, = (o for _,s in cells for o in re.findall(r'```python\n(# my_compare.*?)```', s, re.S))
    imports = 'from fastai_nadam.optimizer import NAdamOptimizer\nfrom fastai_nadam.rules import running_prod\n\n'
    (tmp_path/'my_optimizers.py').write_text(imports + rule.split('\nsame_steps')[0], encoding='utf-8')
    (tmp_path/'my_compare.py').write_text(script, encoding='utf-8')
    options = '--opts NAdam,FastQHAdam --task tabular --quick --seeds 2 --epochs 1 --out out'.split()
    p = Forked(run_script, 'my_compare.py', *options, cwd=tmp_path)
    assert p.ended() == 0, p.err
    assert 'FastQHAdam' in p.out and len(list((tmp_path/'out').iterdir())) > 1
