from configparser import ConfigParser
from setuptools import setup

cfg = ConfigParser(delimiters=['='], interpolation=None)
with open('settings.ini', encoding='utf-8') as f: cfg.read_file(f)
pkg = cfg['package']

def lines(s): return s.strip().splitlines()

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
)
