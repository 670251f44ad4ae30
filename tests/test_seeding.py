"""Noise is a pure function of (seed, step, round, stream), and it is standard normal."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fanal.errors import FanalError
from fanal.sampling import Span
from fanal.seeding import SEED_STRIDE, check_seeds, noise, run_seeds

KEYS = st.tuples(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**20 - 1),
    st.integers(0, 2**12 - 1),
    st.sampled_from(["start", "ancestral", "churn", "a", "b"]),
)


def draw(key, shape=(4,)):
    seed, step, round, stream = key
    return noise(shape, [seed], step=step, round=round, stream=stream, dtype=torch.float64)


def test_noise_does_not_depend_on_batch_or_order():
    whole = noise((3, 5), range(10), step=7)
    assert torch.equal(whole[[4]], noise((3, 5), [4], step=7))
    assert torch.equal(whole.flip(0), noise((3, 5), reversed(range(10)), step=7))
    assert torch.equal(torch.cat([noise((3, 5), range(6), step=7), noise((3, 5), range(6, 10), step=7)]), whole)


def test_runs_of_different_seeds_share_no_noise():
    one, other = run_seeds(3, SEED_STRIDE), run_seeds(4, 2)
    assert one[-1] + 1 == other[0] == 4 * SEED_STRIDE
    assert list(run_seeds(0, 2)) == [0, 1]
    assert run_seeds(2**40 // SEED_STRIDE - 1, SEED_STRIDE)[-1] < 2**40
    for seed, count, word in ((0, 0, "count"), (0, SEED_STRIDE + 1, "count"), (-1, 1, "seed"), (2**40, 1, "seed")):
        with pytest.raises(FanalError, match=f"{word} must be in"):
            run_seeds(seed, count)


def test_noise_leaves_the_global_random_states_alone():
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = noise((4,), [1])
    torch.manual_seed(4)
    assert torch.equal(noise((4,), [1]), first)
    torch.manual_seed(3)
    noise((4,), [2])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_sees_the_same_noise(dtype):
    wide = noise((100,), range(5), sigma=80.0, dtype=torch.float64)
    assert torch.equal(noise((100,), range(5), sigma=80.0, dtype=dtype), wide.to(dtype))


def test_noise_is_standard_normal():
    """200 seeds × 1,000 values: mean and variance within 4 standard errors, Kolmogorov–Smirnov p > 1e-4."""
    values = noise((1000,), range(200), dtype=torch.float64)
    n = values.numel()
    assert abs(float(values.mean())) < 4 / math.sqrt(n)
    assert abs(float(values.var()) - 1) < 4 * math.sqrt(2 / n)
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("other", [{"step": 1}, {"round": 1}, {"stream": "churn"}, {"seeds": [12346]}])
def test_neighbouring_keys_are_uncorrelated(other):
    """Correlation of 200,000 pairs, of the values and of their squares: within 4 standard errors of 0."""
    n = 200_000
    a = noise((n,), [12345], dtype=torch.float64)[0]
    b = noise((n,), **{"seeds": [12345], **other}, dtype=torch.float64)[0]
    for f in (lambda v: v, lambda v: v**2):
        assert abs(float(torch.corrcoef(torch.stack([f(a), f(b)]))[0, 1])) < 4 / math.sqrt(n)


@given(a=KEYS, b=KEYS)
def test_keys_do_not_collide(a, b):
    assert torch.equal(draw(a), draw(b)) == (a == b)


def test_steps_rounds_and_seeds_do_not_run_into_each_other():
    """The corners of the packed key, where one field would spill into the next."""
    keys = [(s, i, r, "start") for s in (0, 1, 2**32, 2**64 - 1) for i in (0, 1, 2**20 - 1) for r in (0, 1, 2**12 - 1)]
    values = torch.cat([draw(key) for key in keys])
    assert len(values.unique(dim=0)) == len(keys)


def test_sigma_scales_the_same_noise():
    unit = noise((2, 3), range(4), dtype=torch.float64)
    levels = torch.tensor([1.0, 2.0, 80.0, 0.002], dtype=torch.float64)
    assert torch.equal(noise((2, 3), range(4), 80.0, dtype=torch.float64), 80.0 * unit)
    assert torch.equal(noise((2, 3), range(4), torch.tensor(80.0), dtype=torch.float64), 80.0 * unit)
    assert torch.equal(noise((2, 3), range(4), levels, dtype=torch.float64), levels[:, None, None] * unit)


def test_span_noise_is_keyed_by_its_step_and_round():
    x = torch.zeros(2, 3)
    sigma = torch.tensor(1.0, dtype=torch.float64)
    got = Span(5, 9, sigma, sigma / 2, (8, 9), round=2).noise(x, "churn")
    assert torch.equal(got, noise((3,), [8, 9], step=5, round=2, stream="churn"))


@pytest.mark.parametrize("bad", [[-1], [2**64], [1.5], [1, float("nan")], ["a"], [None]])
def test_check_seeds_refuses(bad):
    with pytest.raises(FanalError, match="whole numbers"):
        check_seeds(bad)


def test_check_seeds_accepts_what_counts():
    assert check_seeds(np.arange(3)) == (0, 1, 2)
    assert check_seeds(torch.arange(3)) == (0, 1, 2)
    assert check_seeds(iter([2**64 - 1])) == (2**64 - 1,)
    with pytest.raises(FanalError, match="got 2 seeds for a batch of 3"):
        check_seeds([1, 2], 3)


@pytest.mark.parametrize("key", [{"step": -1}, {"step": 2**20}, {"round": -1}, {"round": 2**12}])
def test_noise_refuses_keys_out_of_range(key):
    with pytest.raises(FanalError, match="must be in"):
        noise((2,), [0], **key)


def test_noise_refuses_sigmas_of_another_length():
    with pytest.raises(FanalError, match="one sigma per sample"):
        noise((2,), [0], torch.ones(3))
