"The programs around the optimizer. A command starts here, before the seconds in which torch and fastai are loaded"
import os, signal, sys, warnings
from importlib import import_module

def open_streams():
    "Send what is written to standard streams that the shell has closed nowhere, and to no file opened later"
    for fd in range(3):
        try: os.fstat(fd)
        except OSError: os.open(os.devnull, os.O_RDWR) # gets the lowest number that is free
    if sys.stdout is None: sys.stdout = open(os.devnull, 'w')
    if sys.stderr is None: sys.stderr = open(os.devnull, 'w')

def start(prog):
    "Until `cli` takes over, end at once on Ctrl-C, with the usual exit code"
    def interrupted(*_):
        os.write(2, f'{prog}: interrupted\n'.encode())
        os._exit(130)
    open_streams()
    warnings.simplefilter('ignore')
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler: signal.signal(signal.SIGINT, interrupted)

def command(name):
    start(f'nadam-{name}')
    return import_module(f'.{name}', __name__).main()

def nadam_train(): return command('train')
def nadam_compare(): return command('compare')
def nadam_bench(): return command('bench')

# `python -m fastai_nadam.tools.train`: argv[0] is -m only while Python looks for the program's module
if sys.argv[:1] == ['-m']:
    for o in sys.orig_argv:
        if o.startswith(f'{__name__}.'): start(o.replace(f'{__name__}.', 'nadam-'))
