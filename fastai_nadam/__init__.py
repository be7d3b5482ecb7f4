import warnings

__version__ = "0.1.0"

with warnings.catch_warnings():
    warnings.filterwarnings('ignore', '.*torch.jit.script.*', FutureWarning)  # of fastai's own import, beside newer versions of torch
    from .optimizer import NAdam, DozatNAdam
