"The ways in which an optimizer can step, as arguments of the factories"
import pytest, torch
from packaging.version import Version

needs_kernel = pytest.mark.skipif(Version(torch.__version__) < Version('2.4'), reason='this PyTorch has no fused AdamW on a CPU')

each_path = pytest.mark.parametrize('path', [dict(), dict(foreach=False, fused=False), dict(foreach=True), dict(fused=True)],
    ids=['default', 'loop', 'foreach', 'fused'])

def on_path(opt_func, params, path, **kwargs):
    "`opt_func(params, **path, **kwargs)`; skips the test where this version has no such path"
    try: return opt_func(params, **path, **kwargs)
    except ValueError as e:
        if 'there is no such kernel' in str(e): pytest.skip(str(e))
        raise
