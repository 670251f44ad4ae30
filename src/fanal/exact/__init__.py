"""Closed-form denoisers: the truth that solvers, detectors and trained networks are tested against."""

from __future__ import annotations

from fanal.exact.covariance import LowRank as LowRank
from fanal.exact.dataset import Dataset as Dataset
from fanal.exact.gaussian import Gaussian as Gaussian
from fanal.exact.mixture import Mixture as Mixture
