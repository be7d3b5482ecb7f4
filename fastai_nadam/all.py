from . import *
from .rules import *
from .steppers import *
from .optimizer import *
from .interop import *
from .insight import *
from .tools.data import get_dls
from .tools.train import make_learner
from .tools.checkpoint import Checkpoint
from .tools.results import Comparison
from .tools.compare import compare_opts, search_opts
