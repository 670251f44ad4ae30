"""The geometry of trajectories: how far they stray from a line, in how many dimensions, how they bend."""

from __future__ import annotations

from fanal.geometry.alignment import align as align
from fanal.geometry.alignment import procrustes as procrustes
from fanal.geometry.combination import shares as shares
from fanal.geometry.diagnosis import Diagnosis as Diagnosis
from fanal.geometry.diagnosis import Outlier as Outlier
from fanal.geometry.diagnosis import diagnose as diagnose
from fanal.geometry.diagnosis import outliers as outliers
from fanal.geometry.frames import Frenet as Frenet
from fanal.geometry.frames import frenet as frenet
from fanal.geometry.frames import rebuild as rebuild
from fanal.geometry.gaussian import exact_path as exact_path
from fanal.geometry.gaussian import residual as residual
from fanal.geometry.likelihood import AnnealedMeanShift as AnnealedMeanShift
from fanal.geometry.likelihood import Ascent as Ascent
from fanal.geometry.likelihood import ascent as ascent
from fanal.geometry.likelihood import mean_shift as mean_shift
from fanal.geometry.measures import Measured as Measured
from fanal.geometry.measures import measure as measure
from fanal.geometry.nulls import bridge_shares as bridge_shares
from fanal.geometry.nulls import brownian_shares as brownian_shares
from fanal.geometry.nulls import forward_paths as forward_paths
from fanal.geometry.nulls import smooth_curves as smooth_curves
from fanal.geometry.paths import angle as angle
from fanal.geometry.paths import deviation as deviation
from fanal.geometry.paths import distance as distance
from fanal.geometry.paths import gram as gram
from fanal.geometry.paths import length as length
from fanal.geometry.paths import magnitude as magnitude
from fanal.geometry.paths import pendulum as pendulum
from fanal.geometry.paths import rotation as rotation
from fanal.geometry.paths import split as split
from fanal.geometry.regularity import Shapes as Shapes
from fanal.geometry.regularity import apart as apart
from fanal.geometry.regularity import shapes as shapes
from fanal.geometry.regularity import smooth_null as smooth_null
from fanal.geometry.stages import Stages as Stages
from fanal.geometry.stages import by_curvature as by_curvature
from fanal.geometry.stages import by_entropy as by_entropy
from fanal.geometry.stages import stays as stays
from fanal.geometry.streaming import Band as Band
from fanal.geometry.streaming import Gathered as Gathered
from fanal.geometry.subspace import Projection as Projection
from fanal.geometry.subspace import direct as direct
from fanal.geometry.subspace import project as project
