"""Whether a model replays its training set: copies among samples, counted against what held-out data would show."""

from __future__ import annotations

from fanal.memorization.copies import Neighbors as Neighbors
from fanal.memorization.copies import Share as Share
from fanal.memorization.copies import copied as copied
from fanal.memorization.copies import neighbors as neighbors
from fanal.memorization.copies import threshold as threshold
from fanal.memorization.settling import Settling as Settling
from fanal.memorization.settling import settling as settling
from fanal.memorization.settling import typical as typical
