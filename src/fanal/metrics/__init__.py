"""Figures with their standard errors: rates, detection, diversity, and distances between sets of samples."""

from fanal.metrics.estimates import Estimate as Estimate
from fanal.metrics.estimates import auc as auc
from fanal.metrics.estimates import mean as mean
from fanal.metrics.estimates import paired_rate as paired_rate
from fanal.metrics.estimates import rate as rate
from fanal.metrics.estimates import spread as spread
from fanal.metrics.estimates import std_ratio as std_ratio
