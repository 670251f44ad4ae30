"""Supports of data laws: projections, distances, exact denoisers of the laws on them, and guided runs to a part."""

from __future__ import annotations

from fanal.supports.sets import Polytope as Polytope
from fanal.supports.shapes import Affine as Affine
from fanal.supports.shapes import Ball as Ball
from fanal.supports.shapes import Box as Box
from fanal.supports.shapes import FiniteSet as FiniteSet
from fanal.supports.shapes import Polyline as Polyline
from fanal.supports.shapes import Sphere as Sphere
from fanal.supports.shapes import Support as Support
from fanal.supports.shapes import Union as Union
from fanal.supports.targets import TARGETS as TARGETS
from fanal.supports.targets import Target as Target
from fanal.supports.targets import target as target
