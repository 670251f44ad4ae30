"""Foreign checkpoints, read without running anything they contain."""

from fanal.adapters.adm import describe_adm as describe_adm
from fanal.adapters.adm import load_adm as load_adm
from fanal.adapters.conversion import CHECKPOINTS as CHECKPOINTS
from fanal.adapters.conversion import checkpoint_file as checkpoint_file
from fanal.adapters.conversion import convert as convert
from fanal.adapters.conversion import describe_checkpoint as describe_checkpoint
from fanal.adapters.conversion import load_checkpoint as load_checkpoint
from fanal.adapters.edm import describe_edm as describe_edm
from fanal.adapters.edm import load_edm as load_edm
