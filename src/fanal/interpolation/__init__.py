"""Paths between two samples' noise: linear, spherical and variance-preserving, with their laws ([GEO] appendix E).

A denoiser knows noise of its own variance only. A point between two noise tensors with too little of it is a start that
the model never saw.
"""

from fanal.interpolation.laws import Shift as Shift
from fanal.interpolation.laws import expected_distance as expected_distance
from fanal.interpolation.laws import expected_length as expected_length
from fanal.interpolation.laws import expected_variance as expected_variance
from fanal.interpolation.laws import length as length
from fanal.interpolation.laws import mean_square as mean_square
from fanal.interpolation.laws import measure_shift as measure_shift
from fanal.interpolation.laws import variance as variance
from fanal.interpolation.methods import METHODS as METHODS
from fanal.interpolation.methods import angle as angle
from fanal.interpolation.methods import coefficients as coefficients
from fanal.interpolation.methods import in_distribution as in_distribution
from fanal.interpolation.methods import linear as linear
from fanal.interpolation.methods import n_linear as n_linear
from fanal.interpolation.methods import slerp as slerp

__all__ = [
    "METHODS",
    "Shift",
    "angle",
    "coefficients",
    "expected_distance",
    "expected_length",
    "expected_variance",
    "in_distribution",
    "length",
    "linear",
    "mean_square",
    "measure_shift",
    "n_linear",
    "slerp",
    "variance",
]
