from .rules import *
from .steppers import *
from .optimizer import *
from .interop import *
from .insight import *
from .data import *
from .checkpoint import *
from .train import *
from .tasks import find_task
from .results import Comparison, confidence_interval
from .compare import compare_opts, search_opts
from .bench import bench_step
