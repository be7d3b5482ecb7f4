from .rules import *
from .steppers import *
from .optimizer import *
from .interop import *
from .insight import *
from .data import data_path, digits_path, get_dls, image_dls
from .train import make_learner, train
from .tasks import find_task
from .results import Comparison, confidence_interval
from .compare import compare_opts, search_opts
from .bench import bench_step
