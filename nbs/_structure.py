"Draw the two pictures in CONTRIBUTING.md from the code: `python nbs/_structure.py`"
import ast, re, sys
from itertools import product
from pathlib import Path

root = Path(__file__).resolve().parent.parent
lib, page = root/'fastai_nadam', root/'CONTRIBUTING.md'

def imports(file):
    "The modules of this package that `file` imports"
    res = set()
    for o in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if not isinstance(o, ast.ImportFrom) or not (o.level or o.module.split('.')[0] == 'fastai_nadam'): continue
        mod = (o.module or '').removeprefix('fastai_nadam').strip('.')
        res |= {mod} if mod else {a.name for a in o.names}
    return res

def module_graph():
    "Each module with those that it imports, without what follows from the others"
    graph = {f.stem: imports(f) for f in lib.glob('*.py') if f.stem not in ('__init__', '_modidx', 'all')}
    graph = {k: v & graph.keys() for k,v in graph.items()}
    def below(k): return graph[k].union(*map(below, graph[k]))
    return {k: sorted(v - set().union(*map(below, v))) for k,v in graph.items()}

def draw_modules():
    return ['flowchart BT', *(f'  {k} --> {o}' for k,v in sorted(module_graph().items()) for o in v)]

def calls_of_a_step():
    "Calls between functions of this package in three steps with each implementation, in order, as (caller, callee)"
    import torch
    from fastai_nadam import NAdam
    edges, stack = {}, []
    def name(frame):
        file, func = Path(frame.f_code.co_filename), frame.f_code.co_name
        if func == '__init__': func = type(frame.f_locals['self']).__name__
        if file.parent == lib and not func.startswith(('<', '__')): return f'{file.stem}.{func}'
    def profile(frame, event, arg):
        if event == 'call':
            n, caller = name(frame), next((o for o in reversed(stack) if o), None)
            if n and caller and n != caller: edges[caller, n] = True
            stack.append(n)
        elif event == 'return' and stack: stack.pop()
    impls = dict(fused=True), dict(foreach=True), dict(foreach=False, fused=False)
    for kw, dtype in product(impls, (torch.float32, torch.bfloat16)):
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype)) # in bfloat16 the fused kernel is PyTorch's
        p.grad, opt = torch.ones_like(p), NAdam([p], 0.1, **kw)
        for _ in range(3):
            sys.setprofile(profile)
            try: opt.step()
            finally: sys.setprofile(None); stack.clear()
    return list(edges)

def draw_step():
    edges = calls_of_a_step()
    callers = {a for a,_ in edges}
    edges = [(a, b) for a,b in edges if b in callers or '._' not in b] # without private functions that call no other
    nodes = list(dict.fromkeys(o for e in edges for o in e))
    res = ['flowchart LR', *(f'  {o}["{o.removeprefix("optimizer.")}"]' for o in nodes)]
    return res + [f'  {a} --> {b}' for a,b in edges]

def drawn(text):
    "`text` with both pictures drawn again"
    for mark,draw in dict(modules=draw_modules, step=draw_step).items():
        fence = '\n'.join(['``` mermaid', *draw(), '```\n'])
        between = rf'(?s)(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)'
        text, n = re.subn(between, lambda m: m[1] + fence + m[2], text)
        assert n == 1, mark
    return text

if __name__ == '__main__': page.write_text(drawn(page.read_text(encoding='utf-8')), encoding='utf-8')
