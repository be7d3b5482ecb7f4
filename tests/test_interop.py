"An optimizer that moves to PyTorch, or comes from there, takes the steps that it would have taken at home"
from copy import deepcopy
from functools import partial
import math

import pytest, timm.optim, torch
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.optimizer import Adam, Lookahead, OptimWrapper
from fastai.test_utils import RegModel, synth_dbunch
from torch import nn
from fastai_nadam import DozatNAdam, NAdam
from fastai_nadam.interop import from_adam, from_torch, to_torch
from fastai_nadam.optimizer import NAdamOptimizer
from fastai_nadam.rules import dozat_rule
from helpers import assert_close, copies, train
from impls import each_impl, with_impl

shapes = [(4, 3), (4,), (), (2, 1, 3), (0, 2), (5,)]

def new_params(dtype=torch.float32): return [nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]

def new_grads(ps, n): return [[torch.randn_like(p) for p in ps] for _ in range(n)]

def assert_same_opt(opt, other):
    "Same parameters in the same groups, hypers, state and flags"
    assert opt.rule is other.rule and opt.decouple_wd == other.decouple_wd
    assert len(opt.param_lists) == len(other.param_lists)
    for pg,pg2,h,h2 in zip(opt.param_lists, other.param_lists, opt.hypers, other.hypers):
        assert [id(p) for p in pg] == [id(p) for p in pg2]
        assert h == h2
        for p in pg:
            s, s2 = opt.state[p], other.state[p]
            assert s.keys() == s2.keys()
            for k in s:
                if torch.is_tensor(s[k]): assert torch.equal(s[k], s2[k])
                elif k == 'sqr_mom_prod': assert math.isclose(s[k], s2[k], rel_tol=1e-9)
                else: assert s[k] == s2[k] and type(s[k]) is type(s2[k])

def toy_learner(**kwargs): return Learner(synth_dbunch(), RegModel(), loss_func=MSELossFlat(), **kwargs)

def flagged(opt_func, ps, **kwargs):
    "Three groups, the second with nothing but exempt parameters; flags as a `Learner` sets them"
    opt = opt_func([ps[:3], [ps[3]], ps[4:]], **kwargs)
    opt.set_hypers(lr=slice(1e-3, 1e-1), wd=[0.1, 0.2, 0.3], mom=[0.9, 0.8, 0.95])
    for i in (0, 3): opt.state[ps[i]]['do_wd'] = False
    opt.state[ps[1]]['do_wd'] = True
    for i in (3, 4): opt.state[ps[i]]['force_train'] = True
    return opt

@each_impl
@pytest.mark.parametrize('foreach', [False, True])
@pytest.mark.parametrize('decouple_wd', [True, False])
@pytest.mark.parametrize('mom_decay', [4e-3, 1, None])
def test_three_legs_are_one_run(impl, foreach, decouple_wd, mom_decay):
    ps = new_params()
    qs, grads = copies(ps), new_grads(ps, 15)
    grads[2][0] = grads[3][0] = None  # so that parameters have done different numbers of steps
    kwargs = dict(lr=0.1, decouple_wd=decouple_wd, mom_decay=mom_decay)
    one = flagged(partial(with_impl, DozatNAdam, impl=impl), qs, **kwargs)
    train(one, qs, grads)
    opt = flagged(partial(with_impl, DozatNAdam, impl=impl), ps, **kwargs)
    train(opt, ps, grads[:5])
    torch_opt = to_torch(opt)
    for pg in torch_opt.param_groups: pg['foreach'] = foreach
    train(torch_opt, ps, grads[5:10])
    opt = with_impl(from_torch, torch_opt, impl)
    train(opt, ps, grads[10:])
    assert_close(ps, qs)
    assert [opt.state[p]['step'] for p in ps] == [13] + [15]*5

@each_impl
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_a_torch_run_goes_through_fastai(impl, dtype):
    "The reverse, with groups that PyTorch's users write: weight decay in one, tensor lr, no fastai in sight"
    if dtype is torch.bfloat16: torch.manual_seed(0) # PyTorch rounds so coarsely that 1 draw in 300 is beyond
    ps = new_params(dtype)
    qs, grads = copies(ps), new_grads(ps, 15)
    def make(ps):
        return torch.optim.NAdam([dict(params=ps[:2], weight_decay=0.1),
            dict(params=ps[2:], betas=(0.8, 0.99), momentum_decay=1.)],
        lr=torch.tensor(0.05, dtype=torch.float64), foreach=False)
    one = make(qs)
    train(one, qs, grads)
    torch_opt = make(ps)
    train(torch_opt, ps, grads[:5])
    opt = with_impl(from_torch, torch_opt, impl)
    assert not opt.decouple_wd and len(opt.hypers) == 2
    assert opt.hypers[0] == dict(lr=0.05, mom=0.9, sqr_mom=0.999, eps=1e-8, wd=0.1, mom_decay=4e-3)
    assert opt.hypers[1] == dict(lr=0.05, mom=0.8, sqr_mom=0.99, eps=1e-8, wd=0., mom_decay=1.)
    train(opt, ps, grads[5:10])
    torch_opt = to_torch(opt)
    train(torch_opt, ps, grads[10:])
    assert_close(ps, qs, 2e-2 if dtype is torch.bfloat16 else 1e-5)

@pytest.mark.parametrize('stepped', [True, False])
def test_there_and_back_changes_nothing(stepped):
    ps = new_params()
    opt = flagged(DozatNAdam, ps, lr=0.1, decouple_wd=False)
    if stepped: train(opt, ps, new_grads(ps, 3))
    opt.state.pop(ps[5], None)  # one that has never stepped
    torch_opt = to_torch(opt)
    assert [pg['weight_decay'] for pg in torch_opt.param_groups] == [0.1, 0, 0, 0.3]
    assert not any(pg['decoupled_weight_decay'] for pg in torch_opt.param_groups)
    assert_same_opt(from_torch(torch_opt), opt)

def test_an_empty_group_survives():
    p = nn.Parameter(torch.randn(3))
    opt = DozatNAdam([[], [p], []], lr=0.1)
    assert_same_opt(from_torch(to_torch(opt)), opt)

def test_state_is_a_copy():
    ps = new_params()
    opt = flagged(DozatNAdam, ps, lr=0.1)
    train(opt, ps, new_grads(ps, 2))
    before = deepcopy(opt.state_dict())
    torch_opt = to_torch(opt)
    train(torch_opt, ps, new_grads(ps, 2))
    for s,s2 in zip(before['state'], opt.state_dict()['state']):
        for k in s: assert torch.equal(s[k], s2[k]) if torch.is_tensor(s[k]) else s[k] == s2[k]
    before = deepcopy(torch_opt.state_dict())
    train(from_torch(torch_opt), ps, new_grads(ps, 2))
    for i,s in torch_opt.state_dict()['state'].items():
        for k in s: assert torch.equal(s[k], before['state'][i][k])

def test_torch_state_dict_on_disk(tmp_path):
    "Saved, read in torch's safe mode by a script that knows the model only, trained on there, and brought back"
    ps = new_params()
    opt = flagged(DozatNAdam, ps, lr=0.1)
    train(opt, ps, new_grads(ps, 3))
    torch.save(to_torch(opt).state_dict(), tmp_path/'opt.pth')
    sd = torch.load(tmp_path/'opt.pth', weights_only=True)
    script = torch.optim.NAdam([dict(params=[ps[o['index']] for o in g['fastai']['params']])
        for g in sd['param_groups']])
    script.load_state_dict(sd)
    qs, grads = copies(ps), new_grads(ps, 5)
    script_groups = [len(g['params']) for g in script.param_groups]
    assert script_groups == [2, 1, 1, 2]
    torch.optim.lr_scheduler.ConstantLR(script, factor=1.)  # leaves 'initial_lr' in the groups
    train(script, ps, grads)
    torch.save(script.state_dict(), tmp_path/'script.pth')
    again = torch.optim.NAdam([dict(params=list(g['params'])) for g in script.param_groups])
    again.load_state_dict(torch.load(tmp_path/'script.pth', weights_only=True))
    back = from_torch(again)
    assert [len(o) for o in back.param_lists] == [3, 1, 2]
    one = flagged(DozatNAdam, qs, lr=0.1)
    one.load_state_dict(opt.state_dict())
    train(one, qs, grads)
    assert_close(ps, qs)
    assert back.hypers == one.hypers
    assert [back.state[p].get('do_wd') for p in ps] == [one.state[q].get('do_wd') for q in qs]

def test_a_group_added_in_torch_comes_along():
    ps = new_params()
    torch_opt = to_torch(flagged(DozatNAdam, ps[:5], lr=0.1))
    torch_opt.add_param_group(dict(params=ps[5:], lr=0.7))
    opt = from_torch(torch_opt)
    assert [[id(p) for p in pg] for pg in opt.param_lists] == [[id(p) for p in pg]
        for pg in (ps[:3], [ps[3]], [ps[4]], [ps[5]])]
    assert opt.hypers[-1]['lr'] == 0.7

def test_hypers_changed_in_torch_come_along():
    ps = new_params()
    torch_opt = to_torch(flagged(DozatNAdam, ps, lr=0.1))
    for pg in torch_opt.param_groups:
        pg['lr'] = 0.5
        if pg['weight_decay']: pg['weight_decay'] = 0.7
    opt = from_torch(torch_opt)
    assert [h['lr'] for h in opt.hypers] == [0.5]*3
    assert [h['wd'] for h in opt.hypers] == [0.7, 0.2, 0.7]  # in the second, everything is exempt

@each_impl
@pytest.mark.parametrize('cls', [torch.optim.Adam, torch.optim.AdamW])
def test_from_adam_without_nesterov_is_that_adam(impl, cls):
    ps = new_params()
    qs, grads = copies(ps), new_grads(ps, 15)
    def make(ps):
        return cls([dict(params=ps[:2]), dict(params=ps[2:], betas=(0.8, 0.99), lr=0.2)], lr=0.05, weight_decay=0.1)
    one = make(qs)
    train(one, qs, grads)
    torch_opt = make(ps)
    train(torch_opt, ps, grads[:5])
    opt = with_impl(partial(from_adam, nesterov=False), torch_opt, impl)
    train(opt, ps, grads[5:])
    assert_close(ps, qs)

@each_impl
def test_a_checkpoint_of_fastais_adam_goes_on_with_nadam(impl, tmp_path):
    "`Learner.save` and `Learner.load`, then the steps of timm's NAdamW from fastai Adam's state"
    learn = toy_learner(opt_func=Adam, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    learn.save('adam')
    nlearn = toy_learner(opt_func=partial(with_impl, NAdam, impl=impl), path=tmp_path).load('adam')
    ps, old = list(nlearn.model.parameters()), learn.opt
    qs = copies(ps)
    assert [h['eps'] for h in nlearn.opt.hypers] == [1e-5]  # the hypers are the checkpoint's
    theirs = timm.optim.NAdamW([dict(params=[q], weight_decay=0.01) for q in qs], lr=0.01, betas=(0.9, 0.99), eps=1e-5)
    for p,q in zip(learn.model.parameters(), qs):
        s = old.state[p]
        theirs.state[q] = dict(step=torch.tensor(float(s['step'])), exp_avg=s['grad_avg'].clone(),
            exp_avg_sq=s['sqr_avg'].clone())
        if s.get('do_wd') is False: theirs.param_groups[[o is q for o in qs].index(True)]['weight_decay'] = 0.
    nlearn.opt.set_hypers(lr=0.01)
    grads = new_grads(ps, 5)
    train(nlearn.opt, ps, grads)
    train(theirs, qs, grads)
    assert_close(ps, qs)
    with nlearn.no_bar(), nlearn.no_logging(): nlearn.fit(1, 0.01)
    assert {s['step'] for s in nlearn.opt.state.values()} == {2*len(learn.dls.train) + 5}

# What one side does not have

def nadam(**kwargs): return torch.optim.NAdam([nn.Parameter(torch.ones(3))], **kwargs)

@pytest.mark.parametrize('opt_func,msg', [
    (NAdam, 'rule ruder_rule.*load opt.state_dict.* into a DozatNAdam'),
    (partial(NAdam, nesterov=False), 'rule adam_rule.*DozatNAdam')])
def test_ruders_rule_is_refused_and_the_advice_works(opt_func, msg):
    ps = new_params()
    opt = opt_func(ps, lr=0.1)
    train(opt, ps, new_grads(ps, 3))
    with pytest.raises(ValueError, match=msg): to_torch(opt)
    dozat = DozatNAdam(ps, lr=0.1)
    dozat.load_state_dict(opt.state_dict())
    assert to_torch(dozat).state[ps[0]]['step'].item() == 3

def test_a_scheduled_sqr_mom_is_refused_until_it_makes_no_difference():
    p = nn.Parameter(torch.ones(3))
    opt = DozatNAdam([p], lr=0.1, sqr_mom=0.8)
    for n in (1, 2):
        p.grad = torch.randn(3)
        opt.step()
    to_torch(opt)
    opt.set_hypers(sqr_mom=0.9)
    with pytest.raises(ValueError, match=r'sqr_mom has changed.*shape \(3,\).*keep sqr_mom constant, or move later'):
        to_torch(opt)
    for n in range(200):
        p.grad = torch.randn(3)
        opt.step()
    to_torch(opt)

@pytest.mark.parametrize('flag,what', [('maximize', 'negate the loss'), ('differentiable', 'False'),
    ('capturable', 'CUDA graphs')])
def test_flags_of_torch_are_refused(flag, what):
    torch_opt = nadam()
    torch_opt.param_groups[0][flag] = True
    with pytest.raises(ValueError, match=rf'param_groups\[0\] has {flag}=True.*{what}'): from_torch(torch_opt)

def test_amsgrad_is_refused():
    with pytest.raises(ValueError, match='amsgrad=True.*exp_avg_sq'):
        from_adam(torch.optim.AdamW([nn.Parameter(torch.ones(3))], amsgrad=True))

def test_two_kinds_of_weight_decay_are_refused():
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [dict(params=[a], decoupled_weight_decay=True, weight_decay=0.1), dict(params=[b], weight_decay=0.1)]
    with pytest.raises(ValueError, match='decoupled_weight_decay is True in some param_groups and False in others'):
        from_torch(torch.optim.NAdam(groups))
    groups[0]['weight_decay'] = 0.
    assert not from_torch(torch.optim.NAdam(groups)).decouple_wd

def test_frozen_parameters_with_a_gradient_are_refused():
    "PyTorch would go on stepping them"
    m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    opt = DozatNAdam([[*o.parameters()] for o in m], lr=0.1)
    m(torch.randn(4, 2)).mean().backward()
    opt.step()
    opt.freeze()
    with pytest.raises(ValueError, match=r'shape \(2, 2\) is frozen and has a gradient.*model.zero_grad\(\)'):
        to_torch(opt)
    m.zero_grad()
    torch_opt = to_torch(opt)
    before = deepcopy(m[0].state_dict())
    m(torch.randn(4, 2)).mean().backward()
    torch_opt.step()
    for k,v in m[0].state_dict().items(): assert torch.equal(v, before[k])
    m[0].weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match='is frozen and has a gradient'): from_torch(torch_opt)

def test_groups_that_grew_apart_are_refused_and_the_advice_works():
    ps = new_params()
    torch_opt = to_torch(flagged(DozatNAdam, ps, lr=0.1))
    torch_opt.param_groups[0]['lr'] = 0.9
    with pytest.raises(ValueError, match=r"now differ in \['lr'\]; make them equal, or delete their entries 'fastai'"):
        from_torch(torch_opt)
    for pg in torch_opt.param_groups[:2]: del pg['fastai']
    assert sorted(len(pg) for pg in from_torch(torch_opt).param_lists) == [1, 1, 2, 2]
    torch_opt = to_torch(flagged(DozatNAdam, ps, lr=0.1))
    torch_opt.param_groups[1]['weight_decay'] = 0.1
    with pytest.raises(ValueError, match=r"do_wd=False has weight_decay=0.1; set it to 0, or delete"):
        from_torch(torch_opt)
    torch_opt = to_torch(flagged(DozatNAdam, ps, lr=0.1))
    torch_opt.param_groups[3]['params'].pop()
    with pytest.raises(ValueError, match=r"has 1 parameters, but its entry 'fastai' is for 2; delete the entry"):
        from_torch(torch_opt)

@pytest.mark.parametrize('f,opt,msg', [
    (to_torch, nadam(), 'opt must be a .*NAdamOptimizer, got NAdam$'),
    (to_torch, Lookahead(DozatNAdam([nn.Parameter(torch.ones(2))], lr=1)),
        'got Lookahead; pass the optimizer that it wraps, its .opt'),
    (from_torch, OptimWrapper(opt=nadam()), 'got OptimWrapper; pass the optimizer that it wraps, its .opt'),
    (from_torch, torch.optim.Adam([nn.Parameter(torch.ones(2))]), 'must be a torch.optim.*NAdam, got Adam$'),
    (from_adam, nadam(), 'must be a torch.optim.*Adam or torch.optim.*AdamW, got NAdam$'),
    (from_torch, None, 'got NoneType')])
def test_other_optimizers_are_refused(f, opt, msg):
    with pytest.raises(TypeError, match=msg): f(opt)

def test_a_broken_state_is_refused():
    ps = new_params()
    torch_opt = torch.optim.NAdam(ps)
    train(torch_opt, ps, new_grads(ps, 1))
    torch_opt.state[ps[1]]['exp_avg'] = torch.zeros(7)
    with pytest.raises(ValueError, match=r'state of parameter 1, of shape \(4,\): grad_avg has shape \(7,\)'):
        from_torch(torch_opt)
    del torch_opt.state[ps[1]]['exp_avg']
    with pytest.raises(ValueError, match=r"state of parameter 1, of shape \(4,\): missing \['grad_avg'\]"):
        from_torch(torch_opt)

def test_without_the_hyper_mom_decay():
    "The rule's default is torch's"
    p = nn.Parameter(torch.ones(3))
    opt = NAdamOptimizer([p], dozat_rule, lr=0.1, mom=0.9, sqr_mom=0.99)
    assert to_torch(opt).param_groups[0]['momentum_decay'] == 4e-3

def lazy_params(): return list(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)).parameters())

def test_lazy_layers_move_and_load():
    "Before the first batch they have no shape and no state"
    ps = lazy_params()
    opt = flagged(DozatNAdam, [*ps, *new_params()[:2]], lr=0.1)
    assert_same_opt(from_torch(to_torch(opt)), opt)
    assert len(from_torch(torch.optim.NAdam(lazy_params())).hypers) == 1
    assert len(from_adam(torch.optim.AdamW(lazy_params())).hypers) == 1
    opt.load_state_dict(deepcopy(DozatNAdam([ps[:3], ps[3:], new_params()[:2]], lr=0.1).state_dict()))
    with pytest.raises(ValueError, match='parameter 0, of shape not known yet: a lazy layer that has seen no batch'):
        NAdam(lazy_params(), lr=0.1).load_state_dict(dict(hypers=[{}], state=[dict(step=1,
            grad_avg=torch.ones(3, 4), sqr_avg=torch.ones(3, 4))]*4))
