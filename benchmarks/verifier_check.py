"""How many real samples pass the verifiers, and how many of each broken kind get the right verdict?

Usage: OMP_NUM_THREADS=1 python benchmarks/verifier_check.py [SET] [COUNT]

Prints a table for SET (default: scenes64): the share of COUNT samples (default: 1000) with a right verdict as they are,
with white noise of standard deviation 0.05 and 0.1 (in images of range 2), and blurred by half a pixel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from scipy import ndimage
from torch import Tensor

from fanal.datasets import get


def noisy(level: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + level * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def blurred(x: Tensor) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, 0.5, 0.5), mode="nearest"))


DAMAGE = {"as it is": lambda x: x, "noise 0.05": noisy(0.05), "noise 0.1": noisy(0.1), "blurred": blurred}


def main() -> None:
    name, count = sys.argv[1] if len(sys.argv) > 1 else "scenes64", int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    torch.set_num_threads(1)
    dataset = get(name)
    print(f"| {name} | right verdicts | {' | '.join(DAMAGE)} |")
    print(f"| --- | --- |{' --- |' * len(DAMAGE)}")
    kinds = {"real": ("ok",), **dataset.broken_kinds}
    for kind, right in kinds.items():
        x = dataset.data("held out", count).x if kind == "real" else dataset.broken(kind, count)
        codes = torch.tensor([dataset.verdicts.index(verdict) for verdict in right])
        shares = [torch.isin(dataset.verify(damage(x)), codes).double().mean().item() for damage in DAMAGE.values()]
        print(f"| {kind} | {', '.join(right)} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")


if __name__ == "__main__":
    main()
