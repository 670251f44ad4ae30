"""Foreign checkpoints, read without running anything they contain."""

from fanal.adapters.conversion import convert as convert
from fanal.adapters.edm import describe_edm as describe_edm
from fanal.adapters.edm import load_edm as load_edm
