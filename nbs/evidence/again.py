"""Searches again, each with the next 32 points of the same sequence: `python again.py [OUT]`. Run it again to go on"""
import sys, warnings
from functools import partial
from pathlib import Path

from fastai_nadam import NAdam
from fastai_nadam.tools import compare
import tasks
from analysis import names

lengths = dict(short=2, middle=8)
draw = compare.search_points

def next_points(k, search, lrs, n): return draw(search, lrs, (k+1)*n)[k*n:]

if __name__ == '__main__':
    warnings.simplefilter('ignore')
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    for k in (1, 2, 3):
        compare.search_points = partial(next_points, k)
        for length,epochs in lengths.items():
            for name in names:
                make = getattr(tasks, name)
                opts = NAdam, partial(NAdam, nesterov=False)
                compare.search_opts(make, opts, make.lrs, epochs, seeds=30, trials=32, trial_seeds=2, grow=0,
                    task=name, out=out/f'{length}-{k}'/name, n_workers=2)
