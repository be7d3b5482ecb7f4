"What all tests share: random inputs drawn anew in each run, few threads, no windows, a copy of the project to change"
import os, random, shutil, signal
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')  # read when torch starts, here and in the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored

import fastcore.test, numpy as np, pytest, torch
from impls import KernelOff, NoExchange

for k,o in vars(fastcore.test).items():
    if k.startswith('test'): o.__test__ = False  # an old fastai's `import *` brings them along; they are no tests

seed = int(os.environ.get('NADAM_TEST_SEED', random.SystemRandom().randrange(2**32)))

def pytest_addoption(parser):
    parser.addoption('--device', default='cpu', help='where tensors are made: pytest tests/test_impls.py --device cuda')

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A worker that has nothing left takes tests from another, so none waits long at the end"
    from xdist.scheduler import WorkStealingScheduling
    return WorkStealingScheduling(config, log)

def pytest_collection_modifyitems(items):
    "Each of two workers begins with half of the notebooks, which take longest"
    notebooks = [o for o in items if 'test_notebooks.py' in o.nodeid]
    others = [o for o in items if o not in notebooks]
    half = len(items)//2 - len(notebooks[::2])
    items[:] = notebooks[::2] + others[:half] + notebooks[1::2] + others[half:]

@pytest.fixture(autouse=True)
def on_device(request):
    "Have tensors made where the option says"
    device = request.config.getoption('--device')
    if device == 'cpu': yield
    else:
        torch.set_default_device(device)
        yield
        torch.set_default_device(None)

@pytest.fixture(autouse=True)
def seeded(request):
    "Seed every generator from the run's seed and the test's name: a test draws alone what it drew among the others"
    s = random.Random(f'{seed} {request.node.nodeid}').randrange(2**32)
    random.seed(s)
    np.random.seed(s)
    torch.manual_seed(s)

@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    rep = (yield).get_result()
    if rep.failed:
        rep.sections.append(('Random inputs', f"to draw the same again: NADAM_TEST_SEED={seed} pytest '{item.nodeid}'"))

@pytest.fixture(scope='session')
def copy_project():
    "A function that copies what the project is made of to a new folder, where a test may change it"
    skip = shutil.ignore_patterns('.*', '_docs', '_proc', 'build', 'dist', 'runs', '*.egg-info', '__pycache__')
    return lambda dest: shutil.copytree(Path(__file__).parent.parent, dest, ignore=skip)

@pytest.fixture
def without_kernel(monkeypatch):
    "As with `FASTAI_NADAM_KERNEL=0`, or where no kernel in C was built"
    from fastai_nadam import multi_tensor
    monkeypatch.setattr(multi_tensor, '_kernel', None)
    multi_tensor.pick_impl.cache_clear()
    yield
    multi_tensor.pick_impl.cache_clear()

@pytest.fixture
def without_exchange(monkeypatch):
    "As with a PyTorch before 2.10"
    from fastai_nadam import multi_tensor
    monkeypatch.setattr(multi_tensor, 'exchange_api', None)

@pytest.fixture(autouse=True)
def kernel_off(request):
    "Switch the kernel in C, or PyTorch's exchange API, off where the parameter `impl` of a test says so"
    impl = getattr(getattr(request.node, 'callspec', None), 'params', {}).get('impl')
    if isinstance(impl, KernelOff): request.getfixturevalue('without_kernel')
    if isinstance(impl, NoExchange): request.getfixturevalue('without_exchange')
