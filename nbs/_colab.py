"Put the address in pyproject.toml into tutorial.imagenette, as a badge and an install line: `python nbs/_colab.py`"
import json, re
from pathlib import Path

nbs = Path(__file__).resolve().parent
page = nbs/'tutorial.imagenette.ipynb'

def address(toml=nbs.parent/'pyproject.toml'):
    "The project's public address, or None"
    m = re.search(r'^Repository = "(.+?)/?"', toml.read_text(encoding='utf-8'), re.M)
    return m and m[1]

def cell(id, source, old):
    code = dict(execution_count=None, outputs=[]) if old['cell_type'] == 'code' else {}
    return dict(cell_type=old['cell_type'], id=id, metadata={}, source=source.splitlines(keepends=True), **code)

def colab(nb, url):
    "The notebook `nb` with a badge and an install line for `url`, or without a badge"
    md = dict(cell_type='markdown')
    what = 'fastai /content/fastai_nadam-*.tar.gz' if url is None else f'git+{url}'
    badge = 'https://colab.research.google.com/assets/colab-badge.svg'
    cells = [c for c in nb['cells'] if c['id'] != '00bd' and not (url and c['id'] == '02up')]
    for i,c in enumerate(cells):
        if c['id'] != '02in': continue
        cells[i] = cell('02in', f'#| eval: false\n! [ -e /content ] && pip install -Uqq {what}  # on Colab', c)
    if url:
        repo = url.removeprefix('https://').replace('github.com', 'github', 1)
        there = f'https://colab.research.google.com/{repo}/blob/main/nbs/{page.name}'
        cells.insert(1, cell('00bd', f'[![Open in Colab]({badge})]({there})', md))
    return {**nb, 'cells': cells}

def write(nb): return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'

if __name__ == '__main__':
    nb = json.loads(page.read_text(encoding='utf-8'))
    page.write_text(write(colab(nb, address())), encoding='utf-8')
