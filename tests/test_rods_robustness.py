"""The index beside the exact maximizations and the eigenvalues that it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fanal
from fanal.denoiser import Labelled
from fanal.errors import FanalError
from fanal.exact import Gaussian, Mixture
from fanal.hallucination import rods
from fanal.hallucination.continuation import continuation
from fanal.hallucination.perturbation import differentiate
from fanal.hallucination.robustness import bounds, hessian_product, largest_eigenvalue
from problems import mixture, scattered

F64 = torch.float64


class WithoutFloat64(TorchFunctionMode):
    """Tensors turn to float64 on the CPU only, as those of mps do."""

    def __init__(self):
        super().__init__()
        self.moved = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            self.moved[id(out)] = out
        if func is torch.Tensor.double and id(args[0]) not in self.moved:
            raise TypeError("the MPS framework does not support float64")
        return out


def points(D, sigma, count=4):
    return D.draw(count, seed=3) + fanal.noise(D.shape, range(count), sigma, dtype=F64)


def hessian(D, point, sigma):
    level = torch.tensor(sigma, dtype=F64)

    def size(y):
        return (y - D(y[None], level)[0]).flatten().norm()

    return torch.autograd.functional.hessian(size, point).reshape(point.numel(), point.numel())


@pytest.mark.parametrize("D", [mixture(), scattered(48)])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_products_and_lanczos_are_those_of_the_whole_hessian(D, sigma):
    x, level = points(D, sigma), torch.tensor(sigma, dtype=F64)
    way = fanal.noise(D.shape, range(50, 54), 1.0, dtype=F64)
    product = hessian_product(D, x, level, way)
    value, axis = largest_eigenvalue(D, x, level, tolerance=1e-9)
    for b, point in enumerate(x):
        whole = hessian(D, point, sigma)
        torch.testing.assert_close(product[b], whole @ way[b], rtol=1e-8, atol=1e-10)
        found = torch.linalg.eigvalsh(whole)
        assert float(value[b]) == pytest.approx(float(found[found.abs().argmax()]), rel=1e-6)
        torch.testing.assert_close(whole @ axis[b], value[b] * axis[b], rtol=1e-4, atol=1e-5)


def test_lanczos_on_a_networks_products_is_the_whole_hessians():
    net = fanal.load("digits8")
    D, sigma = Labelled(net, torch.tensor([3])), 0.8
    x = fanal.noise(net.shape, [5], sigma)
    value, _ = largest_eigenvalue(D, x, torch.tensor(sigma, dtype=F64))
    found = torch.linalg.eigvalsh(hessian(D, x[0], sigma).double())
    assert float(value) == pytest.approx(float(found[found.abs().argmax()]), rel=5e-3)


def dense(D, x, sigma, r, count=3600):
    """Both maximizations over a circle of perturbations, by trying all."""
    angle = torch.linspace(0, 2 * math.pi, count + 1, dtype=F64)[:-1]
    circle, level = r * torch.stack([angle.cos(), angle.sin()], 1), torch.tensor(sigma, dtype=F64)
    lengths, turns = [], []
    for point in x:
        base = differentiate(D, point[None], level).gradient
        around = differentiate(D, point + circle, level)
        turned = (around.gradient - base).norm(dim=1)
        lengths.append(turned[around.residual.norm(dim=1).argmax()])
        turns.append(turned.max())
    return torch.stack(lengths), torch.stack(turns)


@pytest.mark.parametrize("sigma", [0.4, 1.0])
@pytest.mark.parametrize("r", [0.02, 0.4])
def test_in_the_plane_both_maxima_are_those_of_a_dense_search(sigma, r):
    D = mixture()
    x = points(D, sigma, 6)
    found = bounds(D, x, sigma, rho=r, rho_units="absolute", steps=80)
    along, most = dense(D, x, sigma, r)
    torch.testing.assert_close(found.turned, most, rtol=2e-3, atol=0)
    torch.testing.assert_close(found.maximized, along, rtol=2e-2, atol=2e-3 * float(most.max()))
    torch.testing.assert_close(found.index, rods.index(D, x, sigma, v="residual", rho=r, rho_units="absolute")[0])
    assert bool((found.index <= found.turned * (1 + 1e-9)).all())
    assert bool((found.gained <= 1 + 1e-9).all())
    if r == 0.02:  # to first order, all that A.2 says
        torch.testing.assert_close(found.turned, found.linear, rtol=0.1, atol=0)
        assert float(found.gained.min()) > 0.95


def test_readings_and_dimension_48():
    D = scattered(48)
    x = points(D, 0.5, 2)
    residual = bounds(D, x, 0.5, rho=0.01, steps=8, starts=1)
    score = bounds(D, x, 0.5, rho=0.01, steps=8, starts=1, v="score")
    for name in ("index", "maximized", "turned", "linear"):
        torch.testing.assert_close(getattr(score, name), getattr(residual, name) / 0.25, rtol=1e-6, atol=0)
    assert bool((residual.index <= residual.turned).all())
    assert bool((residual.turned <= residual.linear * 1.05).all())
    assert float((residual.turned / residual.linear).min()) > 0.9


def test_on_a_gaussian_with_one_variance_the_index_is_blind_and_the_maximum_is_not():
    # ‖e‖ = c‖x‖: its Hessian is c/‖x‖ across x and 0 along it, the one direction that the index looks in
    D, x = Gaussian(torch.zeros(4, dtype=F64), 0.49), fanal.noise((4,), range(3), 2.0, dtype=F64)
    c, r = 4 / 4.49, 1e-3
    found = bounds(D, x, 2.0, rho=r, rho_units="absolute")
    assert float(found.index.max()) < 1e-12
    torch.testing.assert_close(found.linear, r * c / x.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.turned, found.linear, rtol=1e-2, atol=0)


def fused(x, sigma):
    """A kernel without a second derivative."""
    rows = x.float().reshape(1, 1, -1, 8)
    return torch.nn.functional.scaled_dot_product_attention(rows, rows, rows).reshape(x.shape)


def test_what_cannot_be_done_is_told():
    D = mixture()
    with pytest.raises(FanalError, match="cannot be differentiated twice"):
        hessian_product(fused, torch.ones(1, 16), torch.tensor(1.0), torch.ones(1, 16))
    with pytest.raises(FanalError, match="one sigma > 0"):
        bounds(D, torch.zeros(2, 2, dtype=F64), 0.0)
    with pytest.raises(FanalError, match="v of rods"):
        bounds(D, torch.zeros(2, 2, dtype=F64), 1.0, v="noise")
    flat = Mixture(torch.zeros(1, 2), std=1.0)  # nothing turns anywhere but across x
    assert bounds(flat, torch.ones(1, 2, dtype=F64), 1.0).index.item() < 1e-12


def test_figures_turn_to_float64_on_the_cpu():
    """Lanczos in more than three dimensions, and the path of the continuation method too."""
    x = fanal.noise((48,), range(2), 1.0)
    D = scattered(48)
    wanted = bounds(D, x, 1.0, steps=1, starts=1)
    with WithoutFloat64():
        found = bounds(D, x, 1.0, steps=1, starts=1)
        path = continuation(lambda y, level: (y - level).square().sum(1), x[:, :2], 1.0, least=0.5)
    assert torch.equal(found.linear, wanted.linear)
    assert found.index.dtype == path.dtype == F64
