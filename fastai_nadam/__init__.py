__version__ = "0.1.0"

from .optimizer import NAdam, DozatNAdam
