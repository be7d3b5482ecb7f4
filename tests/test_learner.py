"fastai's callbacks and learners train with NAdam, and what each of them promises holds"
from copy import deepcopy
from functools import partial
import math, warnings

import numpy as np, pandas as pd, pytest, timm.optim, torch
import torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.fp16 import ModelToHalf, NonNativeMixedPrecision, _copy_state, get_master
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedExp, SchedLin, combined_cos
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.all import CategoryBlock, DataBlock, DataLoaders, RandomSplitter
from fastai.layers import ConvLayer, Flatten
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Lookahead
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import (AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, awd_lstm_lm_config,
    language_model_learner, text_classifier_learner)
from fastai.torch_core import default_device, params
from fastai.vision.all import ImageBlock, PILImage, Resize, vision_learner
from fastcore.foundation import L
from torch import nn
from torch.utils.data import TensorDataset
from fastai_nadam import DozatNAdam, NAdam
from fastai_nadam.optimizer import NAdamOptimizer
from helpers import CPUPrecision, assert_close, same
from impls import each_impl, with_impl

# A little data and little models, alike in each call within a test

n, bs = 64, 16

def split(m): return L(m[0], m[1:]).map(params)

class ToyDataset(TensorDataset):
    def new_empty(self): return ToyDataset(*(o[:0] for o in self.tensors))

def toy_dls(shape=(4,), bs=bs, device='cpu'):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    ds = ToyDataset(x, (x.flatten(1).sum(1) > 0).long())
    return DataLoaders.from_dsets(ds, ds, bs=bs, shuffle=False, device=device, num_workers=0)

def linear_model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 16), nn.ReLU()), nn.Linear(16, 2))

def conv_model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 8)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8, 2)))

def toy_learner(model=None, dls=None, opt_func=NAdam, splitter=split, **kwargs):
    kwargs = {**dict(loss_func=CrossEntropyLossFlat(), opt_func=opt_func, splitter=splitter), **kwargs}
    return Learner(dls or toy_dls(), model or linear_model(), **kwargs)

def conv_learner(**kwargs): return toy_learner(conv_model(), toy_dls((3, 8, 8)), **kwargs)

def quietly(learn, f, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of torch's CUDA pieces, which fastai uses on a CPU too
        return getattr(learn, f)(*args, **kwargs)

def fit(learn, *args, **kwargs): return quietly(learn, 'fit', *args, **kwargs)

def weights(learn): return [p.detach().clone() for p in learn.model.parameters()]

def steps(learn): return {s['step'] for s in learn.opt.state.values() if 'step' in s}

def weights_and_state(learn): return weights(learn), deepcopy(learn.opt.state_dict())

def loss_of(learn):
    with torch.no_grad():
        return F.cross_entropy(learn.model(learn.dls.valid_ds.tensors[0]), learn.dls.valid_ds.tensors[1]).item()

def assert_learns(learn, before):
    "Every parameter has moved and is finite"
    assert isinstance(learn.opt, NAdamOptimizer)
    for p,(name,q) in zip(before, learn.model.named_parameters(), strict=True):
        assert q.isfinite().all() and not torch.equal(p, q), name

@pytest.fixture
def nadam(impl): return partial(with_impl, NAdam, impl=impl)

# Mixed precision

class Overflow(Callback):
    "An infinite gradient in one element, at batch 5"
    def after_backward(self):
        if self.train_iter == 5: next(self.model.parameters()).grad[0, 0] = math.inf

@each_impl
def test_an_overflow_in_the_middle_is_skipped_and_training_goes_on(nadam):
    "As if that batch had not been there"
    scale = dict(init_scale=256., growth_interval=10**6)
    learn = toy_learner(opt_func=nadam, cbs=[CPUPrecision(torch.float32, **scale), Overflow()])
    fit(learn, 2, 1e-2)
    assert steps(learn) == {7}
    class SkipBatch(Callback):
        def before_batch(self):
            if self.training and self.train_iter == 5: raise CancelBatchException
    other = toy_learner(cbs=SkipBatch())
    fit(other, 2, 1e-2)
    assert_close(weights(learn), weights(other))

@each_impl
def test_bfloat16_autocast(nadam):
    learn, full = (toy_learner(opt_func=nadam) for _ in range(2))
    learn.add_cb(CPUPrecision(enabled=False))
    first, dtypes = loss_of(learn), set()
    hook = learn.model[0][0].register_forward_hook(lambda m,i,o: dtypes.add(o.dtype))
    for o in (learn, full): fit(o, 4, 1e-2)
    hook.remove()
    assert dtypes == {torch.bfloat16}
    for p,s in learn.opt.state.items(): assert {p.dtype, s['grad_avg'].dtype, s['sqr_avg'].dtype} == {torch.float32}
    assert steps(learn) == {16}
    assert_close(weights(learn), weights(full), tol=0.1)
    assert loss_of(learn) < first/2

@pytest.mark.parametrize('to', ['to_fp16', 'to_bf16'])
def test_fastais_own_switches(to):
    "They are made for CUDA; without it they train in float32"
    learn = toy_learner(dls=toy_dls(device=default_device()))
    getattr(learn, to)()
    fit(learn, 2, 1e-2, wd=0.1)
    assert steps(learn) == {8}
    assert_close([p.cpu() for p in weights(learn)], timm_run(), tol=1e-5 if default_device().type == 'cpu' else 0.05)

class CPUNonNative(NonNativeMixedPrecision):
    def before_fit(self):  # without the assertion that there is a GPU
        self.model_pgs,self.master_pgs = get_master(self.opt, self.flat_master)
        self.old_pgs, self.count = self.opt.param_lists, 0
        _copy_state(self.learn.opt, self.model_pgs, self.master_pgs)

@each_impl
def test_half_precision_with_master_weights(nadam):
    "The optimizer's parameters are others during `fit`, and their state is handed from one to the other"
    learn, full = (toy_learner(opt_func=nadam) for _ in range(2))
    dtypes = set()
    learn.model[0][0].register_forward_hook(lambda m,i,o: dtypes.add(o.dtype))
    for o in (learn, full): o.create_opt()
    learn.add_cbs([ModelToHalf(), CPUNonNative(dynamic=False)])
    for _ in range(2):
        for o in (learn, full): fit(o, 2, 1e-2)
    assert dtypes == {torch.float16}
    assert steps(learn) == {16} and {*learn.opt.state} == {*learn.model.parameters()}
    assert [h['lr'] for h in learn.opt.hypers] == [1e-2]*2
    assert_close(weights(learn), weights(full), tol=0.02)

# What changes the gradients

def timm_run(max_norm=None):
    "Two epochs in plain PyTorch, with timm's NAdamW and what `Learner` does besides"
    model, dls = linear_model(), toy_dls()
    ws, biases = ([p for p in model.parameters() if (p.ndim > 1) == o] for o in (True, False))
    opt = timm.optim.NAdamW([dict(params=ws, weight_decay=0.1), dict(params=biases, weight_decay=0.)], lr=1e-2,
        betas=(0.9, 0.99))
    for _ in range(2):
        for x,y in dls.train:
            F.cross_entropy(model(x), y).backward()
            if max_norm: nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            opt.step()
            opt.zero_grad()
    return list(model.parameters())

clip = GradientClip(0.05)

@each_impl
@pytest.mark.parametrize('cbs,at_once,max_norm', [([], bs, None), ([clip], bs, 0.05),
    ([clip, CPUPrecision(torch.float32, init_scale=1024.)], bs, 0.05), ([GradientAccumulation(bs)], 4, None)],
    ids=['plain', 'clip', 'clip, scaled', 'accumulation'])
def test_training_is_timms(nadam, cbs, at_once, max_norm):
    """Gradients are divided by the scale before they are clipped, and steps of four batches at a time are those of one
    batch four times as large"""
    learn = toy_learner(dls=toy_dls(bs=at_once), opt_func=nadam, cbs=cbs)
    fit(learn, 2, 1e-2, wd=0.1)
    assert steps(learn) == {8}
    assert_close(weights(learn), timm_run(max_norm))

@each_impl
def test_channels_last(nadam):
    "The weights' memory is laid out anew after the optimizer was made, also in the middle of training"
    learn, plain = (conv_learner(opt_func=nadam) for _ in range(2))
    for o in (learn, plain): fit(o, 1, 1e-2)
    learn.add_cb(ChannelsLast())
    for o in (learn, plain): fit(o, 2, 1e-2)
    assert learn.model[0][1][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert steps(learn) == {12}
    assert_close(weights(learn), weights(plain), tol=1e-3)

# What looks at the optimizer, saves it or moves its hypers

@each_impl
def test_save_model_with_opt(nadam, tmp_path):
    "The run that goes on from the file is the run that was never interrupted"
    whole = toy_learner(opt_func=nadam, path=tmp_path, cbs=SaveModelCallback(every_epoch=True, with_opt=True))
    fit(whole, 3, 1e-2)
    other = toy_learner(opt_func=nadam, path=tmp_path)
    quietly(other, 'load', 'model_1', with_opt=True)
    assert steps(other) == {8}
    fit(other, 1, 1e-2)
    for p,q in zip(weights(whole), weights(other)): assert torch.equal(p, q)
    assert same(whole.opt.state_dict(), other.opt.state_dict())

@each_impl
def test_fine_tune(nadam):
    "First the head alone, batch norm excepted; then all"
    learn = conv_learner(opt_func=nadam)
    class Frozen(Callback):
        def after_fit(self):
            if self.opt.frozen_idx: self.frozen_end = weights_and_state(self.learn)
    learn.add_cb(Frozen())
    start = weights(learn)
    quietly(learn, 'fine_tune', 2, 1e-2, freeze_epochs=2)
    ws, sd = learn.frozen.frozen_end
    for name,p,q in zip((k for k,_ in learn.model.named_parameters()), start, ws):
        conv = name.startswith('0') and p.ndim == 4
        assert torch.equal(p, q) == conv, name
    assert {s['step'] for s in sd['state'] if 'step' in s} == {8} and sum('step' not in s for s in sd['state']) == 2
    assert_learns(learn, start)
    assert learn.opt.hypers[0]['lr'] < learn.opt.hypers[1]['lr']

@each_impl
def test_every_hyper_can_be_scheduled(impl):
    sched = dict(lr=SchedExp(1e-2, 1e-4), mom=combined_cos(0.25, 0.95, 0.85, 0.95), sqr_mom=SchedLin(0.9, 0.99),
        eps=SchedExp(1e-3, 1e-8), wd=SchedCos(0.2, 0.),
        mom_decay=SchedLin(0.004, 1.))
    class Log(Callback):
        def before_fit(self): self.hypers = []
        def before_step(self): self.hypers.append({k: float(v) for k,v in self.opt.hypers[-1].items()})
    learn = toy_learner(opt_func=partial(with_impl, DozatNAdam, impl=impl), cbs=[ParamScheduler(sched), Log()])
    fit(learn, 2, 1.)
    log = pd.DataFrame(learn.log.hypers)
    assert len(log) == 8 and (log.nunique() == 8).sum() >= 5
    for k,f in sched.items(): np.testing.assert_allclose(log[k], [f(i/8) for i in range(8)])
    mu = log.mom * (1 - 0.5*0.96**(log.mom_decay*np.arange(1, 9)))
    for s in learn.opt.state.values():
        assert math.isclose(s['sqr_mom_prod'], log.sqr_mom.prod()) and math.isclose(s['mu_prod'], mu.prod())

@each_impl
def test_lr_find_leaves_everything_as_it_was(nadam, tmp_path):
    learn = toy_learner(opt_func=nadam, path=tmp_path)
    quietly(learn, 'fit_one_cycle', 1, 1e-2)
    ws, sd = weights_and_state(learn)
    found = quietly(learn, 'lr_find', num_it=20, show_plot=False)
    assert 1e-7 < found.valley < 10
    for p,q in zip(ws, weights(learn)): assert torch.equal(p, q)
    sd['hypers'] = [{**h, 'lr': 1e-7} for h in sd['hypers']]  # fit sets the first lr before the callback saves
    got = learn.opt.state_dict()
    got['hypers'] = [{**h, 'lr': 1e-7} for h in got['hypers']]
    assert same(sd, got)

@pytest.mark.parametrize('opt_func', [NAdam, DozatNAdam, partial(NAdam, eps=1e-6, nesterov=False)])
def test_export_and_load_learner(opt_func, tmp_path):
    learn = toy_learner(opt_func=opt_func)
    fit(learn, 1, 1e-2)
    learn.export(tmp_path/'export.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of load_learner, that pickles can be dangerous
        other = load_learner(tmp_path/'export.pkl')
    for p,q in zip(weights(learn), weights(other)): assert torch.equal(p, q)
    other.dls = learn.dls
    other.create_opt()
    assert [h['eps'] for h in other.opt.hypers] == [h['eps'] for h in learn.opt.hypers]
    assert other.opt.rule is learn.opt.rule
    fit(other, 1, 1e-2)
    assert steps(other) == {4}

@each_impl
def test_lookahead(nadam):
    "Every second step, the weights go half of the way from the slow ones to the fast ones"
    learn = toy_learner(opt_func=lambda ps, lr: Lookahead(nadam(ps, lr=lr), k=2, alpha=0.5))
    fit(learn, 2, 1e-2)
    class Slow(Callback):
        def before_fit(self): self.slow, self.n = weights(self.learn), 0
        def after_step(self):
            self.n += 1
            if self.n % 2: return
            for s,p in zip(self.slow, self.model.parameters()): p.data.copy_(s.lerp_(p.data, 0.5))
    other = toy_learner(cbs=Slow())
    fit(other, 2, 1e-2)
    assert_close(weights(learn), weights(other))
    sd = learn.opt.state_dict()
    assert sd['count'] == 8 and {s['step'] for s in sd['state']} == {8}

# Learners of every kind

def tiny_arch(pretrained=False):
    return nn.Sequential(*conv_model()[0], nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8, 2))

@each_impl
def test_vision_learner(nadam):
    x = np.random.default_rng(0).integers(0, 255, (n, 12, 12, 3), dtype=np.uint8)
    db = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: PILImage.create(x[i]),
        get_y=lambda i: int(x[i].mean() > 127),
        splitter=RandomSplitter(0.25, seed=0), item_tfms=Resize(8))
    dls = db.dataloaders(range(n), bs=bs, device='cpu', num_workers=0)
    learn = vision_learner(dls, tiny_arch, opt_func=nadam, pretrained=False, cut=2,
        splitter=split, lin_ftrs=[8])
    before = weights(learn)
    quietly(learn, 'fine_tune', 1, 1e-2)
    assert_learns(learn, before)
    assert len(learn.opt.param_lists) == 2
    for p,s in learn.opt.state.items():
        assert s.get('do_wd', True) == (p.ndim > 1)
        assert s['step'] == 3  # `unfreeze` has cleared the state of the frozen epoch, and kept do_wd

@each_impl
def test_tabular_learner(nadam):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(kind=rng.choice(list('abc'), n), size=rng.normal(size=n),
        y=rng.normal(size=n).astype(np.float32)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['kind'], cont_names=['size'],
        y_names='y', valid_idx=range(16), bs=bs, device='cpu')
    learn = tabular_learner(dls, layers=[8], opt_func=nadam, y_range=(-4, 4))
    before = weights(learn)
    quietly(learn, 'fit_one_cycle', 3, 1e-2)
    assert_learns(learn, before)
    assert steps(learn) == {9}

@each_impl
def test_collab_learner(nadam):
    "The embedding of a user who rated nothing gets gradients of zero, and moves by weight decay only"
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(0, 10, n), item=rng.integers(0, 20, n),
        rating=rng.integers(1, 6, n).astype(np.float32)))
    dls = CollabDataLoaders.from_df(df, bs=bs, device='cpu', seed=0)
    learn = collab_learner(dls, n_factors=4, y_range=(0, 6), opt_func=nadam)
    before, unused = weights(learn), learn.model.u_weight.weight[0].detach().clone()  # row 0 is for unknown users
    fit(learn, 2, 1e-2, wd=0.1)
    assert_learns(learn, before)
    (n_steps,) = steps(learn)
    torch.testing.assert_close(learn.model.u_weight.weight[0].detach(), unused * (1 - 1e-2*0.1)**n_steps)

words = 'the a one two three dog cat house tree runs sees eats sleeps in on under'.split()

def text_dls(**kwargs):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(text=[' '.join(rng.choice(words, 12)) for _ in range(n)], label=rng.integers(0, 2, n),
        is_valid=np.arange(n) % 4 == 0))
    return TextDataLoaders.from_df(df, text_col='text', valid_col='is_valid', seq_len=8, device='cpu', **kwargs)

@pytest.fixture(scope='module')
def lm_dls(): return text_dls(is_lm=True, bs=4)

@pytest.fixture(scope='module')
def class_dls(): return text_dls(label_col='label', bs=bs)

tiny_rnn = dict(emb_sz=8, n_hid=8, n_layers=2)

@each_impl
def test_language_model_learner(nadam, lm_dls):
    learn = language_model_learner(lm_dls, AWD_LSTM, config={**awd_lstm_lm_config, **tiny_rnn}, pretrained=False,
        opt_func=nadam)
    before = weights(learn)
    quietly(learn, 'fit_one_cycle', 1, 1e-2)
    assert_learns(learn, before)
    assert steps(learn) == {len(lm_dls.train)}

@each_impl
def test_text_classifier_learner(nadam, class_dls):
    "Unfrozen group by group, as ULMFiT does"
    learn = text_classifier_learner(class_dls, AWD_LSTM, config={**awd_lstm_clas_config, **tiny_rnn}, pretrained=False,
        opt_func=nadam)
    start = weights(learn)
    learn.create_opt()
    assert len(learn.opt.param_lists) == 4
    group = {id(p): i for i,pg in enumerate(learn.opt.param_lists) for p in pg}
    for depth in (1, 2):
        learn.freeze_to(-depth)
        quietly(learn, 'fit_one_cycle', 1, slice(1e-3, 1e-2))
        for p,q in zip(start, learn.model.parameters(), strict=True):
            assert torch.equal(p, q) == (group[id(q)] < 4 - depth)
    learn.unfreeze()
    quietly(learn, 'fit_one_cycle', 1, slice(1e-3, 1e-2))
    assert_learns(learn, start)
