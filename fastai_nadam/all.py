from .rules import *
from .steppers import *
from .optimizer import *
from .interop import *
from .insight import *
from .data import *
from .checkpoint import *
from .train import *
from .compare import compare_opts, plot_results, read_results, sentence, show_summary, summarize
from .bench import bench_step
