"Two processes on one machine, with gloo: sharded parameters, and data-parallel training through fastai's distrib_ctx"
import socket

import distributed_worker, pytest, torch
from runs import Forked, folder

def launch(job, folder, n=2):
    "Run `job` of distributed_worker.py in `n` processes; what they print if one fails"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    def env(rank):
        dist = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        return {k: str(v) for k,v in dist.items()} if n > 1 else {}
    ps = [Forked(distributed_worker.work, job, folder, env(i)) for i in range(n)]
    for p in ps: assert p.ended(300) == 0 and 'done' in p.out, p.out + p.err[-4000:]

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

def test_nadam_train_goes_on_in_both_processes(tmp_path, folder):
    pytest.importorskip('accelerate')
    (tmp_path/'four_seven').symlink_to(folder)
    launch('resume', tmp_path)
    # rank 1 has written nothing
    assert sorted(o.name for o in tmp_path.iterdir()) == ['0.pth', '1.pth', 'four_seven', 'part', 'whole']
    a, b, part, whole = (torch.load(tmp_path/o, weights_only=True)
        for o in ('0.pth', '1.pth', 'part/model.pth', 'whole/model.pth'))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(part, whole, rtol=0, atol=0)
    assert sorted(o.name for o in (tmp_path/'part').iterdir()) == sorted(o.name for o in (tmp_path/'whole').iterdir())
