"""Draw the pictures of the documentation, from the library itself.

    python docs/make_images.py                    # all of them
    python docs/make_images.py paths step         # some of them
    python docs/make_images.py demo               # runs `fanal demo` and photographs its report

Every picture is a PNG in docs/images, at most 150 KB. Those of the theory come from the checks themselves:

    python benchmarks/theory_densities.py --figures docs/images
    python benchmarks/theory_samplers.py --figures docs/images
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import fanal
from fanal.pictures import COLORS
from fanal.report.sheets import compact

FOLDER = Path(__file__).parent / "images"
INK, SOFT, LIGHT = "#1d2733", "#5b6875", "#cfd8e0"

mpl.use("Agg")
plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.edgecolor": LIGHT,
        "axes.labelcolor": SOFT,
        "axes.titlesize": 10,
        "axes.titlecolor": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "figure.constrained_layout.use": True,
    }
)


def three_modes() -> fanal.exact.Mixture:
    """Three narrow modes in the plane, for pictures of single paths."""
    return fanal.exact.Mixture(torch.tensor([[-3.0, -1.5], [3.0, -1.5], [0.0, 3.0]]), std=0.25)


def record(model: fanal.Model, seeds: list[int] | range, sigmas: Tensor) -> fanal.Trajectory:
    """Record Euler runs in float64."""
    x = fanal.noise(model.shape, seeds, float(sigmas[0]), dtype=torch.float64)
    return fanal.Trajectory.record(fanal.trace(model, x, sigmas, fanal.solvers.Euler(), seeds))


def paths() -> Figure:
    """The sampling trajectory and the denoising trajectory, from afar and close up."""
    model, colors = three_modes(), ("#3567b0", "#2e9e5b", "#d1495b", "#8a5fb4")
    run = record(model, [3, 5, 6, 16], fanal.schedules.polynomial(160))
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
    for ax, reach, title in (
        (axes[0], 130.0, "from sigma = 80: the state x comes in almost straight"),
        (axes[1], 6.0, "close up: the prediction D gets there first"),
    ):
        ax.scatter(*model.means.T, s=900 if reach < 10 else 30, color=LIGHT, zorder=0, linewidths=0)
        for b, color in enumerate(colors):
            ax.plot(*run.x[:, b].T, color=color, lw=1.2, label="state x (sampling trajectory)" if b == 0 else None)
            if reach < 10:
                name = "prediction D (denoising trajectory)" if b == 0 else None
                ax.plot(*run.denoised[:, b].T, color=color, lw=0, marker="o", ms=2.4, label=name)
            ax.plot(*run.x[-1, b], color=INK, marker="x", ms=7, mew=1.6, zorder=5)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=title)
    axes[1].legend(loc="lower center", fontsize=8, frameon=False)
    return figure


def step() -> Figure:
    """One Euler step is a point on the line from x to D."""
    model = three_modes()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True)
    for ax, steps in zip(axes, (4, 8), strict=True):
        sigmas = fanal.schedules.polynomial(steps, sigma_max=6.0, sigma_min=0.05)
        start = torch.tensor([[4.9, 4.4]], dtype=torch.float64)
        run = fanal.Trajectory.record(fanal.trace(model, start, sigmas, fanal.solvers.Euler()))
        ax.scatter(*model.means.T, s=700, color=LIGHT, zorder=0, linewidths=0)
        for i in range(steps):
            here, there, aim = run.x[i, 0], run.x[i + 1, 0], run.denoised[i, 0]
            ax.plot(*torch.stack([here, aim]).T, color=COLORS["flag"], lw=1, ls=":", zorder=1)
            ax.annotate("", there, here, arrowprops={"arrowstyle": "->", "color": "#3567b0", "lw": 1.8})
        ax.plot(*run.denoised[:, 0].T, "o", color=COLORS["flag"], ms=5, label="D(x, sigma)")
        ax.plot(*run.x[:, 0].T, "o", color="#3567b0", ms=4, label="x")
        ax.set(xlim=(-4.2, 5.6), ylim=(-2.6, 5.2), aspect="equal", title=f"{steps} steps")
    axes[0].legend(loc="upper left", fontsize=9, frameon=False)
    return figure


def between() -> Figure:
    """The same exact denoiser with few and with many steps: which samples end between the modes."""
    model, data = fanal.load("mixture:grid2"), fanal.datasets.get("grid2")
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6))
    for ax, steps in zip(axes[:2], (10, 40), strict=True):
        run = record(model, range(600), fanal.schedules.polynomial(steps))
        wrong = data.verify(run.x[-1]) != 0
        ax.scatter(*run.x[-1, ~wrong].T, s=5, color=COLORS["good"], linewidths=0)
        ax.scatter(*run.x[-1, wrong].T, s=14, color=COLORS["bad"], linewidths=0)
        ax.set(xlim=(-5, 5), ylim=(-5, 5), aspect="equal")
        ax.set_title(f"Euler, {steps} steps: {int(wrong.sum())} of 600 off the grid")
    run = record(model, range(600), fanal.schedules.polynomial(10))
    wrong = (data.verify(run.x[-1]) != 0).nonzero().flatten()
    bend = run.denoised.diff(dim=0).norm(dim=-1).sum(0)
    b = int(wrong[bend[wrong].argmax()])
    axes[2].scatter(*model.denoiser.means.T, s=250, color=LIGHT, zorder=0, linewidths=0)
    axes[2].plot(*run.denoised[:, b].T, "o-", color=COLORS["flag"], ms=4, lw=1, label="prediction D")
    axes[2].plot(*run.x[:, b].T, "o-", color="#3567b0", ms=3, lw=1.2, label="state x")
    axes[2].plot(*run.x[-1, b], "x", color=COLORS["bad"], ms=9, mew=2)
    axes[2].set(xlim=(-5, 1), ylim=(-1, 5), aspect="equal", title="how one of the red ones came about")
    axes[2].legend(fontsize=8, frameon=True, loc="lower left")
    return figure


def risk() -> Figure:
    """What a free detector sees while the samples are drawn."""
    model, data = fanal.load("mixture:grid2"), fanal.datasets.get("grid2")
    sigmas, seeds = fanal.schedules.polynomial(10), range(2000)
    watch = fanal.hallucination.LastSlope()
    x = fanal.noise(model.shape, seeds, 80.0)
    seen = fanal.hallucination.watch(model, x, sigmas, fanal.solvers.Euler(), watch, seeds)
    wrong = data.verify(seen.x) != 0
    area = fanal.metrics.auc(seen.risk, wrong)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    order = torch.cat([(~wrong).nonzero().flatten()[:80], wrong.nonzero().flatten()[:40]])
    for b in order.tolist():
        color = COLORS["bad"] if wrong[b] else COLORS["good"]
        left.plot(range(1, 11), seen.per_step[:, b], color=color, lw=0.8, alpha=0.6)
    left.set(xlabel="step", ylabel="size of the noise prediction", title="as the run goes on", ylim=(0, None))
    bins = torch.linspace(0, float(seen.risk.max()), 40).tolist()
    for mask, color, label in ((~wrong, COLORS["good"], "right"), (wrong, COLORS["bad"], "wrong")):
        right.hist(seen.risk[mask].tolist(), bins=bins, color=color, alpha=0.7, label=label)
    right.set(yscale="log", xlabel="at the last step", ylabel="samples", title=f"AUC {area.plain()}")
    right.legend(frameon=False)
    return figure


def demo() -> Image.Image:
    """The first screens of the report that `fanal demo` writes; without a browser, its pictures alone."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        program = Path(sys.executable).with_name("fanal")
        subprocess.run([str(program), "demo", "--out", str(out)], check=True)
        browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if browser is None:
            return _sheets(out)
        from playwright.sync_api import sync_playwright

        shot = Path(folder) / "shot.png"
        with sync_playwright() as play:
            running = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = running.new_page(viewport={"width": 1080, "height": 1400})
            page.goto((out / "report.html").as_uri())
            # Of each set of samples, two rows are enough for a picture.
            page.add_style_tag(content=".tiles figure:nth-child(n+21) { display: none }")
            end = page.locator("h2", has_text="Risk against step").bounding_box()
            clip = {"x": 0.0, "y": 0.0, "width": 1080.0, "height": float(end["y"]) if end else 1400.0}
            page.screenshot(path=str(shot), clip=clip, full_page=True)
            running.close()
        return Image.open(shot).convert("RGB").copy()


def _sheets(folder: Path) -> Image.Image:
    """The samples before and after, side by side, with the flagged ones framed."""
    from safetensors.torch import load_file

    samples = load_file(str(folder / "samples.safetensors"))
    frames = [COLORS["flag"] if hit else None for hit in samples["flagged"].tolist()]
    pair = [fanal.pictures.grid(samples[name], frames=frames) for name in ("before", "x")]
    sheet = Image.new("RGB", (pair[0].width * 2 + 24, pair[0].height), "#ffffff")
    sheet.paste(pair[0], (0, 0))
    sheet.paste(pair[1], (pair[0].width + 24, 0))
    return sheet


def scenes() -> Image.Image:
    """Real scenes in the first row, below them one of each kind that is broken."""
    data = fanal.datasets.get("scenes64")
    broken = [data.broken(kind, 4)[1:2] for kind in data.broken_kinds]
    return fanal.pictures.grid(torch.cat([data.data("held out", 8).x, *broken]), columns=8, scale=2)


def label() -> Image.Image:
    """The page that `fanal label` serves."""
    import threading

    from playwright.sync_api import sync_playwright

    from fanal.generation import SampleConfig, generate
    from fanal.labeling import LabelServer, open_labels, read_samples

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        out = generate(SampleConfig("hands32", count=24, block=24, calibrate=16), Path(folder) / "hands")
        found = read_samples(out)
        server = LabelServer(found, open_labels(found))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shot = Path(folder) / "shot.png"
        with sync_playwright() as play:
            running = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = running.new_page(viewport={"width": 1000, "height": 600})
            page.goto(server.url)
            for key in ("1", "1", "5", "1", "0", "1", "ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
                page.keyboard.press(key)
                page.wait_for_timeout(500)
            page.screenshot(path=str(shot))
            running.close()
        server.shutdown()
        return Image.open(shot).convert("RGB").copy()


def weights() -> Figure:
    """GITS's schedules as weights: how much of the old state an Euler step keeps, for each step."""
    from fanal.bench.gits_subject import Sizes, Subject
    from fanal.bench.gits_tables import weights as of
    from fanal.schedules.published import tables

    colors = ("#3567b0", "#2e9e5b", "#d1495b", "#8a5fb4", INK)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    names = ("hands32", "shapes32", "digits8", "grid2")
    found = {name: Subject(name, Sizes(test=3, light=3, alone=3, reference=1), 0).base.schedules for name in names}
    for steps, color in zip((4, 6, 8, 10), colors, strict=False):
        drawn = of(found["hands32"][steps].tolist())
        axes[0].plot(range(1, steps + 1), drawn, "o-", color=color, ms=4, label=f"{steps} calls")
    rows = {name: own[10].tolist() for name, own in found.items()} | {"CIFAR-10, printed": tables["gits-cifar10"][10]}
    for (name, sigmas), color in zip(rows.items(), colors, strict=True):
        axes[1].plot(range(1, 11), of(sigmas), "o-", color=color, ms=4, label=name)
    plain = of(fanal.schedules.polynomial(10, zero=False).tolist())
    for ax, title in zip(axes, ("searched on hands32", "10 calls"), strict=True):
        ax.plot(range(1, 11), plain, "--", color=SOFT, lw=1, label="polynomial, 10 calls")
        ax.set(xlabel="step", title=title)
        ax.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("weight of the old state, sigma'/sigma")
    return figure


PICTURES: dict[str, Callable[[], Figure | Image.Image]] = {
    "paths": paths,
    "step": step,
    "between": between,
    "risk": risk,
    "gits": weights,
    "demo": demo,
    "scenes": scenes,
    "label": label,
}


def save(name: str, drawn: Figure | Image.Image) -> None:
    """Write a picture with as many colors as fit under the limit."""
    target = FOLDER / f"{name}.png"
    if isinstance(drawn, Figure):
        drawn.savefig(target, dpi=110, metadata={"Software": None})
        plt.close(drawn)
        drawn = Image.open(target).convert("RGB").copy()
    compact(drawn, target)
    print(f"{target}: {target.stat().st_size // 1024} KB")


def main() -> None:
    """Draw the pictures named on the command line, or all of them."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        save(name, PICTURES[name]())


if __name__ == "__main__":
    main()
