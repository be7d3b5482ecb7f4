"What test_distributed.py runs in each of its processes"
import os
from functools import partial
from pathlib import Path

import torch, torch.distributed as dist
from torch import nn
from fastai_nadam import DozatNAdam, NAdam

paths = dict(default=dict(), loop=dict(foreach=False, fused=False), foreach=dict(foreach=True))

def model():
    torch.manual_seed(0)
    # seven rows for two ranks, and a bias of one element
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))

def grads(m, i):
    for p in m.parameters(): p.grad = None
    gen = torch.Generator().manual_seed(i)
    m(torch.randn(16, 5, generator=gen)).pow(2).mean().backward()

def groups(m): return [list(m[0].parameters()), list(m[2].parameters())]

def shard(folder):
    "`fully_shard` on every path beside one process with the steppers, and its state through a checkpoint"
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    full = lambda t: t.full_tensor() if isinstance(t, DTensor) else t
    for opt_func in (NAdam, DozatNAdam, partial(NAdam, decouple_wd=False)):
        for name,path in paths.items():
            def new(m, **kwargs):
                opt = opt_func(groups(m), 0.05, wd=0.1, **kwargs)
                opt.set_hypers(lr=slice(0.01, 0.05))
                opt.state[m[0].bias]['do_wd'] = False
                return opt
            m, whole = fully_shard(model(), mesh=mesh), model()
            opt, ref = new(m, **path), new(whole, **paths['loop'])
            def train(opt, m, n=5):
                for i in range(n):
                    opt.set_hypers(mom=0.85+0.02*i)
                    grads(m, i)
                    opt.step()
            train(opt, m); train(ref, whole)
            def check():
                for p,q in zip(m.parameters(), whole.parameters(), strict=True):
                    assert isinstance(p, DTensor)
                    torch.testing.assert_close(full(p.detach()), q.detach(), rtol=1e-5, atol=1e-6)
                    for k,v in ref.state[q].items():
                        torch.testing.assert_close(full(opt.state[p][k]), v, rtol=1e-5, atol=1e-6)
            check()
            dcp.save({'model': m.state_dict(), 'opt': opt.state_dict()}, checkpoint_id=f'{folder}/{name}')
            m = fully_shard(model(), mesh=mesh)
            opt = new(m, **path)
            for p in m.parameters():  # dcp loads into tensors that are there: start the state before loading
                opt.state[p].update(grad_avg=torch.zeros_like(p.data), sqr_avg=torch.zeros_like(p.data), step=0)
            grads(m, 0)
            opt.step()
            sd = {'model': m.state_dict(), 'opt': opt.state_dict()}
            dcp.load(sd, checkpoint_id=f'{folder}/{name}')
            m.load_state_dict(sd['model'])
            opt.load_state_dict(sd['opt'])
            train(opt, m); train(ref, whole)
            check()

def broadcast_on_cpu():
    "Have fastai's `DistributedDL` broadcast without `.cuda()`"
    from fastai.distributed import DistributedDL
    def _broadcast(self, t, rank):
        t = torch.LongTensor(t)
        dist.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = _broadcast

def data_parallel(folder):
    "A `Learner` in `distrib_ctx`, which each rank saves"
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.callback.schedule import fit_one_cycle
    from fastai.learner import Learner
    from fastai.losses import MSELossFlat
    if dist.is_initialized(): broadcast_on_cpu()
    gen = torch.Generator().manual_seed(1)
    xs = torch.randn(64, 5, generator=gen)
    items = list(zip(xs, xs.sum(1, keepdim=True)))
    if dist.is_initialized(): bs = 8
    # rank 1 has the second half
    else: bs, items = 16, [o for i in range(0, 32, 8) for o in items[i:i+8] + items[32+i:40+i]]
    dls = DataLoaders(*(DataLoader(items, bs=bs, shuffle=False, num_workers=0) for _ in range(2)), device='cpu')
    learn = Learner(dls, model(), loss_func=MSELossFlat(), opt_func=NAdam, lr=0.05)
    with learn.no_bar(), learn.no_logging():
        if dist.is_initialized():
            with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit_one_cycle(3)
        else: learn.fit_one_cycle(3)
    rank = dist.get_rank() if dist.is_initialized() else 'alone'
    torch.save({'model': learn.model.state_dict(), 'opt': learn.opt.state_dict()}, Path(folder)/f'{rank}.pth')

def resume(folder):
    "`nadam-train` on all ranks: a whole run, and one that is stopped and goes on"
    import fastai.distributed
    from fastai.callback.core import Callback
    from fastai.learner import Learner
    from fastai_nadam.tools import train as room
    class Stop(Callback):
        def before_batch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    broadcast_on_cpu()
    room.check_gpu, room.setup_distrib = lambda fp16: None, lambda gpu: None
    distrib_ctx = Learner.distrib_ctx
    Learner.distrib_ctx = lambda learn: distrib_ctx(learn, sync_bn=False, cpu=True)
    args = dict(data=f'{folder}/four_seven', arch='squeezenet1_1', size=24, epochs=3, bs=4, lr=1e-3, num_workers=0)
    def out(name): return f'{folder}/{name}' + ('' if dist.get_rank() == 0 else '-of-rank-1')  # where nothing should be
    room.train(**args, out=out('whole'))
    new_learner = room.new_learner
    room.new_learner = lambda *args: new_learner(*args).add_cb(Stop())
    try: room.train(**args, out=out('part'))
    except KeyboardInterrupt: pass
    room.new_learner = new_learner
    dist.barrier()
    learn = room.train(resume=f'{folder}/part')
    torch.save(learn.model.state_dict(), f'{folder}/{dist.get_rank()}.pth')

def work(job, folder, env):
    os.environ.update(env)
    torch.set_num_threads(1)
    if 'WORLD_SIZE' in env: dist.init_process_group('gloo')
    globals()[job](folder)
    if dist.is_initialized(): dist.barrier()
    print('done')
    os._exit(0)  # gloo sometimes aborts at the interpreter's exit
