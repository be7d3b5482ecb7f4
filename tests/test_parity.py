"The steps are those of the article, of PyTorch and fastai. (timm: test_learner; Keras and optax: tutorial.which_nadam)"
from functools import partial

import pytest, torch
from fastai.callback.schedule import combined_cos
from fastai.optimizer import Adam, Optimizer, average_grad, average_sqr_grad, step_stat, weight_decay
from torch import nn
from fastai_nadam import DozatNAdam, NAdam
from fastai_nadam.steppers import dozat_step, nadam_step
from helpers import assert_close, copies, train
from impls import each_impl, with_impl

shapes = [(4, 3), (7,), (), (1,), (2, 3, 1, 5), (0, 2), (300, 11)]

def params(dtype=torch.float32): return [nn.Parameter(torch.randn(s, dtype=dtype)) for s in shapes]

def grads_for(ps, n=50):
    return [[torch.randn_like(p) * 10**torch.empty(()).uniform_(-3, 1) for p in ps] for _ in range(n)]

@each_impl
def test_the_articles_example(impl):
    p = torch.tensor([1., 2., 3.])
    p.grad = torch.full((3,), 0.1)
    opt = with_impl(NAdam, [p], impl, lr=1.)
    for want,grad_avg,sqr_avg in (([-0.9099998100, 0.0800001900, 1.0700001900], 0.01, 0.0001),
            ([-2.3272154587, -1.3471154587, -0.3670154587], 0.019, 0.000199)):
        opt.step()
        torch.testing.assert_close(p, torch.tensor(want), rtol=0, atol=1e-6)
        torch.testing.assert_close(opt.state[p]['grad_avg'], torch.full((3,), grad_avg), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(opt.state[p]['sqr_avg'], torch.full((3,), sqr_avg), rtol=1e-6, atol=1e-9)

@each_impl
@pytest.mark.parametrize('wd,decouple_wd', [(0., True), (0.1, True), (0.1, False)])
def test_torch_nadam(impl, wd, decouple_wd):
    ps = params()
    qs, grads = copies(ps), grads_for(ps)
    train(with_impl(DozatNAdam, ps, impl, lr=0.01, wd=wd, decouple_wd=decouple_wd), ps, grads)
    train(torch.optim.NAdam(qs, lr=0.01, weight_decay=wd, decoupled_weight_decay=decouple_wd), qs, grads)
    assert_close(ps, qs)

@each_impl
@pytest.mark.parametrize('decouple_wd', [True, False])
def test_without_nesterov_is_adam(impl, decouple_wd):
    ps = params()
    qs, grads = copies(ps), grads_for(ps)
    train(with_impl(NAdam, ps, impl, lr=0.01, eps=1e-5, wd=0.1, decouple_wd=decouple_wd, nesterov=False), ps, grads)
    train(Adam(qs, lr=0.01, wd=0.1, decouple_wd=decouple_wd), qs, grads)
    assert_close(ps, qs)

def reference(p, grads, hypers, rule, wd, l2=False):
    "The family's update in float64, with running products; `hypers` has lr, mom, sqr_mom for each step"
    m, v, P, M, V = torch.zeros_like(p), torch.zeros_like(p), 1., 1., 1.
    for t,(g,(lr,b,b2)) in enumerate(zip(grads, hypers), 1):
        if l2: g = g + wd*p
        else: p = p*(1 - lr*wd)
        m, v = b*m + (1-b)*g, b2*v + (1-b2)*g*g
        P, V = P*b, V*b2
        mu, mu1 = b*(1 - 0.5*0.96**(t*0.004)), b*(1 - 0.5*0.96**((t+1)*0.004))
        M *= mu
        x, y = {'ruder': (b/(1-P), (1-b)/(1-P)), 'adam': (1/(1-P), 0.), 'dozat': (mu1/(1-M*mu1), (1-mu)/(1-M))}[rule]
        p = p - lr*(x*m + y*g)/((v/(1-V)).sqrt() + 1e-8)
    return p

@each_impl
@pytest.mark.parametrize('rule', ['ruder', 'adam', 'dozat'])
@pytest.mark.parametrize('decouple_wd', [True, False])
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_any_schedule(impl, rule, decouple_wd, dtype, tol):
    "lr, mom and sqr_mom change at every step, over the whole range that they may have"
    ps, n = params(torch.float64), 30
    grads = grads_for(ps, n)
    moms = combined_cos(0.3, 0.95, 0.2, 0.99)
    hypers = [(0.01*(1+i%3), moms(i/n), 0.8+0.19*i/n) for i in range(n)]
    want = [reference(p.detach(), [gs[i] for gs in grads], hypers, rule, 0.1, not decouple_wd) for i,p in enumerate(ps)]
    f = {'ruder': NAdam, 'adam': partial(NAdam, nesterov=False), 'dozat': DozatNAdam}[rule]
    ps = copies(ps, dtype)
    opt = with_impl(f, ps, impl, lr=1., wd=0.1, decouple_wd=decouple_wd)
    train(opt, ps, grads, lambda opt,i: opt.set_hypers(**dict(zip(('lr', 'mom', 'sqr_mom'), hypers[i]))))
    assert_close(ps, want, tol)

def test_steppers_in_a_plain_optimizer_follow_schedules_too():
    for step,rule,kw in ((nadam_step, 'ruder', {}), (dozat_step, 'dozat', dict(mom_decay=4e-3))):
        p = nn.Parameter(torch.randn(4, dtype=torch.float64))
        grads = [[torch.randn(4, dtype=torch.float64)] for _ in range(20)]
        hypers = [(0.1, *(torch.rand(2)*0.98).tolist()) for _ in range(20)]
        want = reference(p.detach(), [g for g, in grads], hypers, rule, 0.1)
        opt = Optimizer([p], [weight_decay, partial(average_grad, dampening=True), average_sqr_grad, step_stat, step],
            lr=1., wd=0.1, **kw)
        train(opt, [p], grads, lambda opt,i: opt.set_hypers(**dict(zip(('lr', 'mom', 'sqr_mom'), hypers[i]))))
        assert_close([p], [want], 1e-10)

@pytest.mark.parametrize('mom', [0., 1e-6, 0.1, 0.999999])
@pytest.mark.parametrize('sqr_mom', [0., 0.5, 0.999999])
@pytest.mark.parametrize('f,rule', [(NAdam, 'ruder'), (DozatNAdam, 'dozat')])
@each_impl
def test_ends_of_the_range(impl, f, rule, mom, sqr_mom):
    p = nn.Parameter(torch.randn(50, dtype=torch.float64))
    grads = [[torch.randn(50, dtype=torch.float64)] for _ in range(10)]
    want = reference(p.detach(), [g for g, in grads], [(0.1, mom, sqr_mom)]*10, rule, 0.)
    train(with_impl(f, [p], impl, lr=0.1, mom=mom, sqr_mom=sqr_mom, wd=0.), [p], grads)
    assert_close([p], [want], 1e-7)

@each_impl
def test_after_very_many_steps(impl):
    "The products are 0 by then, and the correction is over"
    p = nn.Parameter(torch.randn(3))
    opt = with_impl(NAdam, [p], impl, lr=0.1, wd=0.)
    sd = opt.state_dict()
    sd['state'][0] = dict(grad_avg=torch.ones(3), sqr_avg=torch.ones(3), step=10**6)
    opt.load_state_dict(sd)
    assert opt.state[p]['sqr_mom_prod'] == opt.state[p]['mom_prod'] == 0
    before, p.grad = p.detach().clone(), torch.ones(3)
    opt.step()
    torch.testing.assert_close(before - p.detach(), torch.full((3,), 0.1))
