"""What every test shares: one thread, one hypothesis profile, and `problems` on the path."""

import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

settings.register_profile("fanal", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fanal")
