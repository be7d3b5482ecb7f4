"Two processes on one machine, with gloo: sharded parameters, and data-parallel training through fastai's distrib_ctx"
import os, socket, subprocess, sys
from pathlib import Path

import pytest, torch

def launch(job, folder, n=2):
    "Run `job` of distributed_worker.py in `n` processes; what they print if one fails"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    worker, top = Path(__file__).with_name('distributed_worker.py'), Path(__file__).parent.parent
    def env(rank):
        dist = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        if n == 1: dist = {}
        path = os.pathsep.join(filter(None, [str(top), os.environ.get('PYTHONPATH')]))
        return {**os.environ, **{k: str(v) for k,v in dist.items()}, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path,
            'PYTHONWARNINGS': 'ignore'}
    ps = [subprocess.Popen([sys.executable, worker, job, folder], env=env(i), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
        for i in range(n)]
    try: outs = [p.communicate(timeout=300)[0] for p in ps]
    finally:
        for p in ps: p.kill()
    for p,out in zip(ps, outs): assert p.returncode == 0 and 'done' in out, out[-4000:]

def test_sharded_parameters(tmp_path):
    if not hasattr(pytest.importorskip('torch.distributed.fsdp'), 'fully_shard'):
        pytest.skip('this PyTorch has no fully_shard')
    launch('shard', tmp_path)

def test_data_parallel_is_one_process_with_twice_the_batch(tmp_path):
    pytest.importorskip('accelerate')
    launch('data_parallel', tmp_path)
    launch('data_parallel', tmp_path, n=1)
    a, b, alone = (torch.load(tmp_path/f'{o}.pth', weights_only=True) for o in (0, 1, 'alone'))
    torch.testing.assert_close(a, b, rtol=0, atol=0)  # the ranks are bit-equal
    torch.testing.assert_close(a['model'], alone['model'], rtol=1e-5, atol=1e-6)
    for s,t in zip(a['opt']['state'], alone['opt']['state'], strict=True):
        torch.testing.assert_close(s, t, rtol=1e-4, atol=1e-6)

def test_nadam_train_goes_on_in_both_processes(tmp_path):
    pytest.importorskip('accelerate')
    launch('resume', tmp_path)
    # rank 1 has written nothing
    assert sorted(o.name for o in tmp_path.iterdir()) == ['0.pth', '1.pth', 'part', 'whole']
    a, b, part, whole = (torch.load(tmp_path/o, weights_only=True)
        for o in ('0.pth', '1.pth', 'part/model.pth', 'whole/model.pth'))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(part, whole, rtol=0, atol=0)
    assert sorted(o.name for o in (tmp_path/'part').iterdir()) == sorted(o.name for o in (tmp_path/'whole').iterdir())
