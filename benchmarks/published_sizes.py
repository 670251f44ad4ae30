"""How much memory and time do networks of published sizes take on this machine, loaded from EDM pickles?

Usage: python benchmarks/published_sizes.py [--only NAME] [--threads 2] [--out FILE.json]

Writes each network with random weights as a pickle of the official structure, then loads it in a process of its own
through `fanal models cost edm:FILE.pkl`. Memory is the peak of that process, loading included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from edm_files import content, dump, make

SONG = {"model_type": "SongUNet", "img_channels": 3, "augment_dim": 9}
NETWORKS = {
    "cifar10": SONG | {"img_resolution": 32, "label_dim": 0, "channel_mult": [2, 2, 2]},
    "ffhq64": SONG | {"img_resolution": 64, "label_dim": 0, "channel_mult": [1, 2, 2, 2]},
    "imagenet64": {"model_type": "DhariwalUNet", "img_resolution": 64, "img_channels": 3, "label_dim": 1000},
}


def write(init: dict, path: Path) -> int:
    """Write a network with random weights as a pickle; returns its parameters."""
    torch.manual_seed(0)
    model = make("EDMPrecond", init)
    state = {f"model.{k.removeprefix('net.')}" if k.startswith("net.") else k: v for k, v in model.state_dict().items()}
    path.write_bytes(dump(content(state, "EDMPrecond", init)))
    return sum(p.numel() for p in model.parameters())


def cost(path: Path, threads: int) -> dict[str, float]:
    """What `fanal models cost` says of one image per call."""
    words = ["models", "cost", f"edm:{path}", "--batch", "1", "--repeats", "5", "--threads", str(threads)]
    code = "from fanal.cli import main; main()"
    told = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
    seconds = float(re.search(r"seconds per call\s+([\d.]+)", told)[1])
    memory = int(re.search(r"memory at the peak\s+([\d,]+) MiB", told)[1].replace(",", ""))
    return {"seconds_per_image": seconds, "peak_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=NETWORKS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = {}
    print(f"{'network':12s} {'parameters':>12s} {'file, MiB':>10s} {'peak, MiB':>10s} {'s / image':>10s}")
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.only] if args.only else NETWORKS:
            path = Path(folder) / f"{name}.pkl"
            count = write(NETWORKS[name], path)
            size = path.stat().st_size / 2**20
            found = cost(path, args.threads)
            path.unlink()
            rows[name] = {"parameters": count, "file_mib": round(size), **found}
            print(
                f"{name:12s} {count:12,d} {size:10,.0f} {found['peak_mib']:10,d} {found['seconds_per_image']:10.3f}",
                flush=True,
            )
    if args.out:
        about = {"threads": args.threads, "torch": torch.__version__, "networks": rows}
        args.out.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
