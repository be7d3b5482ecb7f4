"The package, the notebooks it is exported from, the README and the site agree, and what is built installs"
import ast, email, importlib.util, json, os, re, runpy, shutil, subprocess, sys, sysconfig, tarfile, venv, zipfile
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import pytest, yaml
from packaging.requirements import Requirement
from runs import Forked

root = Path(__file__).parent.parent
nbs = sorted((root/'nbs').glob('*.ipynb'))
needs_nbdev = pytest.mark.nbdev

settings = ConfigParser(delimiters=['='])
settings.read(root/'settings.ini', encoding='utf-8')

def run(*args, **kw):
    "Output of a command, which must succeed"
    p = subprocess.run([str(o) for o in args], capture_output=True, text=True, stdin=subprocess.DEVNULL, **kw)
    assert p.returncode == 0, f'{p.args} failed:\n{p.stdout}\n{p.stderr}'
    return p.stdout

def call(module, func, kwargs): getattr(importlib.import_module(module), func)(**kwargs)

def nbdev(module, func, project, **kwargs):
    p = Forked(call, f'nbdev.{module}', func, kwargs, cwd=project)
    assert p.ended() == 0, p.out + p.err
    return p.out + p.err

@pytest.fixture
def project(copy_project, tmp_path): return copy_project(tmp_path/'project')

def contents(path, pattern='*'):
    return {f.name: f.read_bytes() for f in path.glob(pattern) if f.is_file()}

def cells(nb, kind):
    for c in json.loads(nb.read_text(encoding='utf-8'))['cells']:
        if c['cell_type'] == kind: yield ''.join(c['source'])

# Notebooks -> modules

def exports():
    "{module: notebook}, in the order of the notebooks"
    found = [(re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(cells(nb, 'code')), re.M), nb) for nb in nbs]
    return {m[1]: nb for m,nb in found if m}

def imports(path):
    "The dotted name of each import in a file, and whether it is at the top of the file"
    package = '.'.join(path.relative_to(root).parent.parts)
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
        names = [o.name for o in node.names]
        if isinstance(node, ast.ImportFrom):
            mod = importlib.util.resolve_name('.'*node.level + (node.module or ''), package)
            names = [f'{mod}.{o}' for o in names] if mod == 'fastai_nadam' else [mod]
        yield from ((o, node in tree.body) for o in names)

def imported(path):
    "The modules of this package that a file imports"
    names = [o.removeprefix('fastai_nadam.') for o,_ in imports(path) if o.startswith('fastai_nadam.')]
    return [o for o in names if o != '__version__']

@needs_nbdev
def test_modules_are_exported_from_the_notebooks(project):
    lib = project/'fastai_nadam'
    for mod in lib.rglob('*.py'):
        if mod.name not in ('__init__.py', 'all.py'): mod.unlink()
    toml = (project/'pyproject.toml').read_bytes()
    nbdev('doclinks', 'nbdev_export', project)
    for wing in ('.', 'tools'):
        assert contents(lib/wing, '*.py') == contents(root/'fastai_nadam'/wing, '*.py'), 'run nbdev-export'
    assert (project/'pyproject.toml').read_bytes() == toml
    assert contents(project/'nbs').keys() == contents(root/'nbs').keys()

def modules():
    "The files of the package that people write, by the names under which they are exported"
    files = {f.relative_to(root/'fastai_nadam').with_suffix('').as_posix().replace('/', '.'): f
        for f in (root/'fastai_nadam').rglob('*.py')}
    return {k: f for k,f in files.items() if not k.endswith('__init__')}

def test_a_module_imports_only_from_rows_above_it():
    order, files = list(exports()), modules()
    assert {*files} == {*order, '_modidx', 'all'}
    for i,mod in enumerate(order):
        above = {*order[:i], *['_kernel']*(mod == 'multi_tensor'), *['tools']*mod.startswith('tools.')}
        assert set(imported(files[mod])) <= above, f'{mod} may import only {above}'
    assert imported(root/'fastai_nadam/__init__.py') == ['optimizer']

def test_no_private_name_is_imported_from_another_module():
    for f in modules().values():
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.ImportFrom) or not (node.level or node.module.startswith('fastai_nadam')):
                continue
            private = {o.name for o in node.names if o.name.startswith('_')} - {'__version__', '_kernel'}
            assert not private, f'{f.name} imports {private}'

def test_all_is_what_a_notebook_user_calls():
    """All that the optimizer's modules make public, a few tools, no command and no name of a module; and nothing that
    hides a name of fastai's"""
    names, theirs = {}, {}
    exec('from fastai_nadam.all import *', names)
    exec('from fastai.vision.all import *', theirs)
    names.pop('__builtins__')
    optimizer = [importlib.import_module(f'fastai_nadam.{o}') for o in
        ('rules', 'steppers', 'optimizer', 'interop', 'insight')]
    public = [n for mod in optimizer for n in mod.__all__]
    tools = ['get_dls', 'make_learner', 'Checkpoint', 'Comparison', 'compare_opts', 'search_opts']
    assert sorted(names) == sorted([*public, *tools])
    assert not {*names} & {'main', 'train', *(o.split('.')[-1] for o in modules())}
    assert not [n for n in names if n in theirs and names[n] is not theirs[n]]

@pytest.mark.parametrize('nb', nbs, ids=lambda f: f.name)
def test_cells_fit_the_screen(nb):
    for src in cells(nb, 'code'):
        exported, lines = re.match(r'#\|\s*export', src), src.splitlines()
        wide = [o for o in lines if len(o) > (120 if exported else 100) and not o.startswith('#|')]
        assert not wide, wide

@pytest.mark.parametrize('folder', ['.', 'fastai_nadam', 'fastai_nadam/tools', 'nbs', 'nbs/evidence', 'tests'])
def test_code_fits_the_screen(folder):
    files = [f for pattern in ('*.py', '*.c') for f in (root/folder).glob(pattern) if f.name != '_modidx.py']
    wide = [f'{f.name}:{i}' for f in files
        for i,line in enumerate(f.read_text(encoding='utf-8').splitlines(), 1) if len(line) > 120]
    assert files and not wide, wide

def test_what_an_import_does():
    """The package's own leaves the tools out, and none asks for a GPU: else a process that forks later cannot use it,
    and each process of torchrun has a context on the first one"""
    run(sys.executable, '-W', 'ignore', '-c', """
import sys, torch
def asked(*args, **kwargs): raise AssertionError('an import asked for a GPU')
names = 'is_available', 'current_device', 'device_count', 'init', '_lazy_init', 'get_device_name'
theirs = {k: getattr(torch.cuda, k) for k in names}
def put(**funcs):
    for k,f in funcs.items(): setattr(torch.cuda, k, f)
put(**dict.fromkeys(names, asked))
import fastai_nadam
assert fastai_nadam.NAdam and fastai_nadam.DozatNAdam
tools = 'fastai.vision', 'fastai.learner', 'fastai.data', 'fastai_nadam.tools'
assert not [m for m in sys.modules if m.startswith(tools)]
put(**theirs) # an old fastai asks
import fastai.vision.all
put(**dict.fromkeys(names, asked))
import pkgutil, importlib, fastai_nadam.all, fastai_nadam.tools as tools
for m in pkgutil.iter_modules(tools.__path__): importlib.import_module(f'fastai_nadam.tools.{m.name}')
""", cwd=root)

def test_modules_import_only_what_is_required():
    "Declared in settings.ini, or brought by what is declared there"
    todo, dists = [Requirement(o) for o in settings['package']['requirements'].split()], {}
    while todo:
        r = todo.pop()
        if r.name in dists or (r.marker and not r.marker.evaluate({'extra': ''})): continue
        dists[r.name] = distribution(r.name)
        todo += map(Requirement, dists[r.name].requires or [])
    have = {f.parts[0] for d in dists.values() for f in d.files}
    for f in modules().values():
        for mod,top in imports(f):
            pkg = mod.split('.')[0]
            if not top or pkg == 'fastai_nadam' or pkg in sys.stdlib_module_names: continue
            assert have & {pkg, f'{pkg}.py'}, f'{f.name} imports {pkg}, which nothing in settings.ini brings'

# Notebooks, README and site

@needs_nbdev
def test_notebooks_are_clean(project):
    nbdev('clean', 'nbdev_clean', project)
    assert contents(project/'nbs', '*.ipynb') == contents(root/'nbs', '*.ipynb'), 'run nbdev-clean'

@pytest.mark.parametrize('nb', nbs, ids=lambda f: f.name)
def test_outputs_say_nothing_about_the_machine(nb):
    text = nb.read_text(encoding='utf-8')
    assert not [o for o in ('site-packages', str(Path.home()), 'FutureWarning') if o in text]

@pytest.mark.parametrize('nb', nbs, ids=lambda f: f.name)
def test_the_site_shows_what_github_shows(nb):
    "The site leaves a hidden cell out together with its output; what a cell shows without its code is `echo: false`"
    lost = [c['id'] for c in json.loads(nb.read_text(encoding='utf-8'))['cells']
        if re.search(r'^#\|\s*hide\b', ''.join(c['source']), re.M) and any('data' in o for o in c.get('outputs', ()))]
    assert not lost

@needs_nbdev
def test_readme_is_made_from_the_index():
    files = runpy.run_path(str(root/'nbs/_readme.py'))['readme']()
    for f,b in files.items(): assert f.read_bytes() == b, 'run python nbs/_readme.py'
    assert set((root/'nbs/images').glob('index-*')) == {f for f in files if f.suffix == '.png'}

def links(md): return re.findall(r'\]\(([^)\s]+)', re.sub(r'```.*?```|`[^`\n]+`', '', md, flags=re.S))

def anchors(md):
    headings = re.findall(r'^#+ +(.*?) *$', re.sub(r'```.*?```', '', md, flags=re.S), re.M)
    return {re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings}

def prose(f): return f.read_text(encoding='utf-8') if f.suffix == '.md' else '\n\n'.join(cells(f, 'markdown'))

@pytest.mark.parametrize('page', [*nbs, *sorted(root.glob('*.md'))], ids=lambda f: f.name)
def test_links_resolve(page):
    for link in links(prose(page)):
        if re.match(r'https?:|mailto:', link): continue
        path, _, anchor = link.partition('#')
        target = (page.parent/path).resolve() if path else page
        assert target.exists() and root in target.parents, link
        if anchor: assert anchor in anchors(prose(target)), link

def sidebar():
    "The notebooks in the order in which the site has them"
    pages = yaml.safe_load((root/'nbs/sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    return [o for page in pages for o in ([page] if isinstance(page, str) else page['contents'])]

def test_readme_and_site_have_one_order():
    rows = re.findall(r'^\| \[.*?\]\(([\w.]+\.ipynb)\) \|', prose(root/'nbs/index.ipynb'), re.M)
    assert ['index.ipynb', *rows] == sidebar()

@needs_nbdev
def test_site_has_every_notebook(project):
    "All that `nbdev-docs` does before it calls Quarto"
    for f in ('refresh_quarto_yml', 'nbdev_sidebar'): nbdev('quarto', f, project)
    made = {f: (project/'nbs'/f).read_text(encoding='utf-8') for f in ('_quarto.yml', 'nbdev.yml', 'sidebar.yml')}
    for f in ('_quarto.yml', 'nbdev.yml'):
        assert made[f] == (root/'nbs'/f).read_text(encoding='utf-8'), f'nbdev would rewrite {f}'
    pages = sidebar()
    assert pages[0] == 'index.ipynb' and sorted(pages) == [nb.name for nb in nbs]
    for f in yaml.safe_load(made['_quarto.yml'])['metadata-files']: assert f in made
    said = nbdev('serve', 'proc_nbs', project, n_workers=0)
    assert 'cells containing imports' not in said, f'nbdev would run what stands beside imports:\n{said}'
    for nb in nbs:
        page = json.loads((project/'_proc'/nb.name).read_text(encoding='utf-8'))
        top = ''.join(page['cells'][0]['source'])
        assert top.startswith('---\n'), f'{nb.name} should begin with "# title" and "> description"'
        nested = re.findall(r'\[\[`.*?\)\]\(.*?\)', '\n'.join(''.join(c['source']) for c in page['cells']))
        assert not nested, f'{nb.name}: nbdev links names in backticks itself, so others are not put around: {nested}'
    shown = json.dumps(json.loads((project/'_proc/03_optimizer.ipynb').read_text(encoding='utf-8')))
    assert 'Gradient moving average coefficient' in shown

# What is built and installed

# Without a GIL, Python has no stable ABI to build the kernel for
compiler = (os.environ.get('CC') or sysconfig.get_config_var('CC') or 'cl').split()[0]
has_compiler = bool(shutil.which(compiler)
    and subprocess.run([compiler, '--version'], capture_output=True).returncode == 0
    and Path(sysconfig.get_path('include'), 'Python.h').exists() and not sysconfig.get_config_var('Py_GIL_DISABLED'))

@pytest.fixture(scope='session')
def dist(copy_project, tmp_path_factory):
    "The folder of the sdist, and of the wheel built from it"
    tmp = tmp_path_factory.mktemp('dist')
    log = run(sys.executable, '-m', 'build', '--no-isolation', '-o', tmp/'dist', copy_project(tmp/'project'))
    assert 'outside of `pyproject.toml`' not in log
    return tmp/'dist'

def test_wheel_has_the_facts_of_settings_ini(dist):
    wheel, sdist = next(dist.glob('*.whl')), next(dist.glob('*.tar.gz'))
    with zipfile.ZipFile(wheel) as z:
        def read(name): return z.read(next(o for o in z.namelist() if o.endswith(f'.dist-info/{name}'))).decode()
        meta, scripts = email.message_from_string(read('METADATA')), read('entry_points.txt')
        files = {o for o in z.namelist() if o.startswith('fastai_nadam/')}
    version = re.search('__version__ = "(.*)"', (root/'fastai_nadam/__init__.py').read_text())[1]
    pkg = settings['package']
    expected = {Requirement(o) for o in pkg['requirements'].split('\n') if o}
    assert {o.name for o in expected} == {'fastai', 'torch', 'fastcore'}
    for extra,reqs in settings['extras'].items():
        expected |= {Requirement(f'{o}; extra == "{extra}"') for o in reqs.split('\n') if o}
    assert {Requirement(o) for o in meta.get_all('Requires-Dist')} == expected
    assert set(meta.get_all('Provides-Extra')) == set(settings['extras'])
    built = [o for o in files if o.startswith('fastai_nadam/_kernel.')]
    assert len(built) == has_compiler, built
    tag = 'cp310-abi3' if built else 'py3-none-any'
    assert wheel.name.startswith(f'fastai_nadam-{version}-{tag}') and sdist.name == f'fastai_nadam-{version}.tar.gz'
    facts = {'Version': version, 'Requires-Python': f">={pkg['min_python']}", 'License-Expression': pkg['license'],
        'Author': pkg['author']}
    assert {k: meta[k] for k in facts} == facts
    assert meta['Keywords'].split(',') == pkg['keywords'].split(', ')
    assert meta.get_all('Classifier') == pkg['classifiers'].strip().split('\n')
    assert meta.get_payload().strip() == (root/'README.md').read_text(encoding='utf-8').strip()
    for k,v in settings['console_scripts'].items(): assert f'{k} = {v}' in scripts
    assert files == {f.relative_to(root).as_posix() for f in (root/'fastai_nadam').rglob('*.py')} | set(built)
    with tarfile.open(sdist) as t: assert f'{t.getnames()[0]}/fastai_nadam/kernel.c' in t.getnames()

def test_wheel_runs_in_an_empty_environment(dist, tmp_path):
    "Empty but for what the requirements bring, which is borrowed from the environment of the tests"
    env = tmp_path/'env'
    venv.create(env)
    bin = env/('Scripts' if os.name == 'nt' else 'bin')
    run(sys.executable, '-m', 'pip', '--python', bin/'python', 'install', '--no-deps', '--no-index',
        next(dist.glob('*.whl')))
    site = Path(run(bin/'python', '-c', "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    borrowed = [o for o in sys.path if Path(o).name in ('site-packages', 'dist-packages')]
    (site/'borrowed.pth').write_text('\n'.join(borrowed))
    alone = dict(cwd=tmp_path, env={k: v for k,v in os.environ.items()
        if k not in ('PYTHONPATH', 'FASTAI_NADAM_KERNEL')})
    code = """import runpy, sys, fastai_nadam.all as f, fastai_nadam.multi_tensor as m
print(f.__file__, bool(m._kernel))
for script in sys.argv[1:]:
    sys.argv = [script, '--help']
    try: runpy.run_path(script, run_name='__main__')
    except SystemExit as e: assert not e.code"""
    said = run(bin/'python', '-c', code, *(bin/name for name in settings['console_scripts']), **alone)
    where, built = said.split()[:2]
    assert Path(where) == site/'fastai_nadam/all.py' and built == str(has_compiler)
    for name in settings['console_scripts']: assert f'\nusage: {name}' in said

@pytest.mark.skipif(os.name == 'nt', reason='has no CC')
def test_installs_without_a_compiler(project, tmp_path):
    pip = [sys.executable, '-m', 'pip', 'install', '-v', '--no-deps', '--no-build-isolation']
    p = subprocess.run([*pip, '--target', tmp_path/'site', project],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'CC': '/bin/false'})
    assert p.returncode == 0 and 'Traceback' not in p.stdout, p.stdout
    assert 'building extension "fastai_nadam._kernel" failed' in p.stdout, p.stdout
    # An editable install of this project would lend its kernel
    code = """import sys; sys.meta_path = [o for o in sys.meta_path if 'Editable' not in getattr(o, '__name__', '')]
import torch; from fastai_nadam import NAdam
p = torch.ones(3); p.grad = p.clone(); o = NAdam([p], 0.1); o.step(); print(o.impl, (p != 1).all().item())"""
    impl = run(sys.executable, '-c', code, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(tmp_path/'site')})
    assert impl.split() in (['fused', 'True'], ['foreach', 'True'])

# .ci/run

@pytest.mark.skipif(os.name == 'nt', reason='a bash script')
@pytest.mark.parametrize('status', [0, 1, 5])
def test_ci_tests_the_checkout_as_it_is_and_leaves_it_alone(tmp_path, status):
    "With a README whose command has a stand-in for pytest, which looks at what it is given"
    here = tmp_path/'a checkout'
    for name in ('.ci/run', 'code.py', '.venv/mine', 'fastai_nadam/_kernel.so', '.git/config'):
        (here/name).parent.mkdir(parents=True, exist_ok=True)
        (here/name).touch()
    shutil.copy(root/'.ci/run', here/'.ci/run')
    (here/'code.py').write_text('changed')
    found = "find . -type f | sort; cat code.py; echo; exit"
    make_pytest = f"mkdir .venv && echo '{found} {status}' > .venv/pytest"
    (here/'README.md').write_text(f'# Title\npython3 -m venv -h > /dev/null && {make_pytest} && sh .venv/pytest\n')
    before = sorted(here.rglob('*'))
    p = subprocess.run(['bash', '.ci/run'], cwd=here, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert p.returncode == status, p.stderr
    assert p.stdout.splitlines()[1:] == ['./.ci/run', './.venv/pytest', './README.md', './code.py', 'changed']
    assert sorted(here.rglob('*')) == before
