import os, sysconfig
from configparser import ConfigParser
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

cfg = ConfigParser(delimiters=['='], interpolation=None)
with open('settings.ini', encoding='utf-8') as f: cfg.read_file(f)
pkg = cfg['package']

def lines(s): return s.strip().splitlines()

# The kernel in C is optional: where it cannot be built, PyTorch's own kernels do its work. One binary serves every
# Python, except those without a GIL.
abi3 = not sysconfig.get_config_var('Py_GIL_DISABLED')
kernel = Extension('fastai_nadam._kernel', ['fastai_nadam/kernel.c'], py_limited_api=True, optional=True)

class BuildKernel(build_ext):
    "Build with the first of four lists of flags that the compiler takes"
    def build_extension(self, ext):
        msvc = self.compiler.compiler_type == 'msvc'
        same = ['/fp:precise'] if msvc else ['-ffp-contract=off'] # no FMA: the same bits on every processor
        fast = ['/O2', '/utf-8', *same] if msvc else ['-O3', '-fno-math-errno', '-fno-trapping-math', *same]
        openmp = '/openmp' if msvc else '-fopenmp'
        for flags in ([*fast, openmp], [*fast, openmp, '-DNO_CLONES'], [*fast, '-DNO_CLONES'], [*same, '-DNO_CLONES']):
            ext.extra_compile_args, ext.extra_link_args = flags, [o for o in flags if o == '-fopenmp']
            try: return super().build_extension(ext)
            except Exception as e: error = e
        raise CompileError(error)

class Wheel(bdist_wheel):
    "A wheel for this platform where the kernel was built, otherwise for any"
    def run(self):
        self.run_command('build_ext')
        if not all(map(os.path.exists, self.get_finalized_command('build_ext').get_outputs())):
            self.distribution.ext_modules, self.root_is_pure = [], True
        super().run()

setup(
    license_expression=pkg['license'],
    author=pkg['author'],
    python_requires=f">={pkg['min_python']}",
    keywords=pkg['keywords'],
    classifiers=lines(pkg['classifiers']),
    install_requires=lines(pkg['requirements']),
    extras_require={k: lines(v) for k,v in cfg['extras'].items()},
    entry_points=dict(
        console_scripts=[f'{k} = {v}' for k,v in cfg['console_scripts'].items()],
        nbdev=['fastai_nadam = fastai_nadam._modidx:d'],  # how nbdev's docs of this and other projects find our symbols
    ),
    ext_modules=[kernel] if abi3 else [],
    cmdclass=dict(build_ext=BuildKernel, bdist_wheel=Wheel),
    options=dict(bdist_wheel=dict(py_limited_api='cp310')) if abi3 else {},
)
