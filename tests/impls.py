"The ways in which an optimizer can step, as arguments of the factories"
import pytest, torch
from packaging.version import Version

needs_kernel = pytest.mark.skipif(Version(torch.__version__) < Version('2.4'),
    reason='this PyTorch has no fused AdamW on a CPU')

loop = dict(foreach=False, fused=False)

class KernelOff(dict):
    "No arguments, in a test for which the kernel in C is switched off (see conftest), so that PyTorch's are tested too"

class NoExchange(dict):
    "No arguments, in a test for which PyTorch has no DLPack exchange API, as before 2.10"

each_impl = pytest.mark.parametrize('impl', [dict(), KernelOff(), loop, dict(foreach=True), dict(fused=True)],
    ids=['default', 'kernel off', 'loop', 'foreach', 'fused'])

with_checks = pytest.mark.parametrize('impl', [*each_impl.args[1], NoExchange()],
    ids=[*each_impl.kwargs['ids'], 'no exchange API'])

def with_impl(opt_func, params, impl, **kwargs):
    "`opt_func(params, **impl, **kwargs)`; skips the test where this version has no such implementation"
    try: return opt_func(params, **impl, **kwargs)
    except ValueError as e:
        if 'there is no such kernel' in str(e): pytest.skip(str(e))
        raise
