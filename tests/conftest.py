"""What every test shares: one thread, one hypothesis profile, and `problems` on the path."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

settings.register_profile("fanal", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fanal")


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, cut off from the network."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as api:
        flags = ["--no-sandbox", "--disable-gpu", "--use-gl=swiftshader", "--disable-background-networking"]
        found = api.chromium.launch(executable_path=path, args=flags)
        yield found
        found.close()
