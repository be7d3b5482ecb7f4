"Write README.md, and the pictures it shows, from index.ipynb: `python nbs/_readme.py`"
import posixpath, re
from base64 import b64decode
from pathlib import Path

from nbdev.process import NBProcessor
from nbdev.processors import filter_stream_, hide_line, insert_warning, rm_export, strip_ansi

nbs = Path(__file__).resolve().parent
images = nbs/'images'

def _fence(s, lang=''): return f'``` {lang}'.rstrip() + f'\n{s.rstrip()}\n```'

def _relink(m):
    "Make a link relative to nbs/ relative to the top folder"
    link = m['link']
    if link is None or re.match(r'[a-z]+:|[#/]', link): return m[0]
    return f"]({posixpath.normpath(f'nbs/{link}')}"

def relink(md): return re.sub(r'```.*?```|`[^`\n]+`|\]\((?P<link>[^)\s]+)', _relink, md, flags=re.S)

def table(html):
    "A table in HTML as Markdown"
    def cells(row): return [o.replace('|', r'\|') for o in re.findall(r'(?s)<t[hd].*?>(.*?)</t[hd]>', row)]
    rows = [cells(o) for o in re.findall(r'(?s)<tr.*?</tr>', html)]
    rows.insert(1, ['---']*len(rows[0]))
    return '\n'.join(f"| {' | '.join(o)} |" for o in rows)

def shown(outputs):
    "Outputs without what fastai's progress bar leaves behind: of HTML only the last is of interest"
    html = [o for o in outputs if 'text/html' in o.get('data', {})]
    return [o for o in outputs if o not in html[:-1]]

def output(o, name, alt):
    "Markdown for one stored output, and the picture it needs, as {path: bytes}"
    data = o.get('data', {})
    if 'image/png' in data:
        path = images/f'{name}.png'
        return f'![{alt}]({path.relative_to(nbs.parent).as_posix()})', {path: b64decode(data['image/png'])}
    if '<table' in (html := ''.join(data.get('text/html', ''))): return table(html), {}
    if 'text/markdown' in data: return relink(''.join(data['text/markdown'])), {}
    text = ''.join(o.get('text') or data.get('text/plain', ''))
    return (_fence(text) if text and o.get('name') != 'stderr' else ''), {}

def readme(nb=nbs/'index.ipynb'):
    "What the README made from `nb` consists of, as {path: bytes}"
    procs = [insert_warning, strip_ansi, hide_line, filter_stream_, rm_export]
    parts, files = [], {}
    for c in NBProcessor(nb, procs, process=True).nb.cells:
        if c.cell_type == 'markdown': parts.append(relink(c.source))
        if c.cell_type != 'code': continue
        if c.source and c.directives_.get('echo') != 'false': parts.append(_fence(c.source, 'python'))
        for o in shown(c.outputs):
            md, pics = output(o, f'index-{len(files)+1}', c.directives_.get('fig-cap', ''))
            parts.append(md)
            files.update(pics)
    return {nbs.parent/'README.md': '\n\n'.join(filter(None, parts)).encode() + b'\n', **files}

if __name__ == '__main__':
    files = readme()
    for f in images.glob('index-*.png'): f.unlink()
    for f,b in files.items():
        f.parent.mkdir(exist_ok=True)
        f.write_bytes(b)
