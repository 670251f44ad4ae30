"""Dynamic thresholding against diffusers, live, and its identities."""

import pytest
import torch

from fanal.denoiser import Model
from fanal.errors import FanalError
from fanal.thresholding import DynamicThreshold
from problems import mixture, start

LEVEL = torch.tensor(1.0, dtype=torch.float64)


def images(scale, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return scale * torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 4.0])
@pytest.mark.parametrize(("ratio", "ceiling"), [(0.995, 1.0), (0.995, 2.5), (0.9, 1e9)])
def test_it_is_diffusers_thresholding(scale, ratio, ceiling):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=ceiling)
    x = images(scale)
    mine = DynamicThreshold(lambda x, sigma: x, ratio, ceiling)
    assert torch.equal(mine(x, LEVEL), scheduler._threshold_sample(x))


def test_without_a_ceiling_large_predictions_are_scaled_into_range():
    x = images(4.0)
    out = DynamicThreshold(lambda x, sigma: x)(x, LEVEL)
    s = torch.quantile(x.flatten(1).abs(), 0.995, dim=1)[:, None, None, None]
    assert float(out.abs().max()) <= 1.0
    inside = (x.abs() <= s).expand_as(x)
    torch.testing.assert_close(out[inside], (x / s)[inside])


def test_predictions_within_the_range_stay_as_they_are():
    D = mixture()
    x = start(D) / 50
    small = D(x, LEVEL) / 10
    assert torch.equal(DynamicThreshold(lambda x, sigma: small)(x, LEVEL), small)


def test_each_sample_has_its_own_scale():
    x = images(3.0)
    wrapped = DynamicThreshold(lambda x, sigma: x)
    assert torch.equal(torch.cat([wrapped(row[None], LEVEL) for row in x]), wrapped(x, LEVEL))


def test_half_precision_keeps_its_dtype():
    assert DynamicThreshold(lambda x, sigma: x)(images(3.0, torch.bfloat16), LEVEL).dtype == torch.bfloat16


def test_the_models_range_passes_through():
    wrapped = DynamicThreshold(mixture())
    assert isinstance(wrapped, Model)
    assert wrapped.shape == (2,)


@pytest.mark.parametrize(("ratio", "ceiling"), [(0.0, None), (1.5, None), (0.9, 0.5), (float("nan"), None)])
def test_bad_options_are_refused(ratio, ceiling):
    with pytest.raises(FanalError, match="ratio in"):
        DynamicThreshold(mixture(), ratio, ceiling)
