"""The statements of [PDE] sec. 2 and 3, each checked on solved equations, to the tolerance of their cells and steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fanal.pde.theory import backward, forward, generated
from fanal.pde.theory.findings import Finding as Finding

__all__ = ["SHEETS", "STATEMENTS", "Finding"]

STATEMENTS: dict[str, Callable[[], Finding]] = {
    "forward equation": forward.forward_equation,
    "transition": forward.transition,
    "equilibrium": forward.equilibrium,
    "equilibrium, centered data": partial(forward.equilibrium, 0.0),
    "growing waves": forward.growing_waves,
    "blow-up": forward.blown_up,
    "transport": forward.transport,
    "stable reverse": backward.stable_reverse,
    "deterministic reverse": backward.deterministic_reverse,
    "walled forward": backward.walled_forward,
    "uniform equilibrium": backward.uniform_equilibrium,
    "without walls": backward.without_walls,
    "walled reverse": backward.walled_reverse,
    "backward equation": forward.backward_equation,
    "adjoint": forward.adjoint,
    "terminal": forward.terminal,
    "reverse generator": backward.reverse_generator,
    "product rule": forward.product_rule,
    "homogeneity": generated.homogeneity,
    "past is future": generated.past_is_future,
    "explicit kernel": generated.explicit_kernel,
    "any start": generated.any_start,
    "support": generated.support,
    "vanishing": generated.vanishing,
    "convergence": partial(generated.convergence, 0.5),
    "convergence, centered data": partial(generated.convergence, 0.0),
}
"""Checks by name, in the paper's order; each returns a `Finding`."""

SHEETS: dict[str, tuple[str, ...]] = {
    "forward": ("forward equation", "transition", "equilibrium", "equilibrium, centered data"),
    "unstable": ("growing waves", "blow-up"),
    "reverse": ("stable reverse", "deterministic reverse"),
    "walls": ("walled forward", "uniform equilibrium", "without walls", "walled reverse"),
    "generators": ("transport", "backward equation", "adjoint", "terminal", "reverse generator", "product rule"),
    "kernel": ("homogeneity", "past is future", "explicit kernel", "any start"),
    "support": ("support", "vanishing"),
    "convergence": ("convergence", "convergence, centered data"),
}
"""Checks whose figures are drawn together, by name of the picture."""
