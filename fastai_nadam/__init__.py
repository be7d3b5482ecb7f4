import warnings

__version__ = "0.1.0"
__all__ = ['NAdam', 'DozatNAdam']

def __getattr__(name):
    "Load the optimizer when it is first asked for. A command of `tools` starts before torch and fastai are loaded"
    if name not in __all__: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():
        # From fastai's own import, beside newer versions of torch
        warnings.filterwarnings('ignore', '.*torch.jit.script.*', FutureWarning)
        from . import optimizer
    return getattr(optimizer, name)

def __dir__(): return [*globals(), *__all__]
