import warnings

__version__ = "0.1.0"

with warnings.catch_warnings():
    # From fastai's own import, beside newer versions of torch
    warnings.filterwarnings('ignore', '.*torch.jit.script.*', FutureWarning)
    from .optimizer import NAdam, DozatNAdam
