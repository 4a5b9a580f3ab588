"""Static figures. Each is a function from data to a matplotlib Figure, with a line of text that says what it shows.

Colours are Okabe and Ito's, readable for the colour-blind; lines differ in style too. Nothing here needs a display.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*<>"
MASKED = 0.65  # the grey of a removed patch


def _figure(rows: int, columns: int, width: float = 8.0, height: float | None = None, title: str = "", **kwargs):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(rows, columns, figsize=(width, height or width * rows / columns), squeeze=False,
                             layout="constrained", **kwargs)
    plt.close(fig)  # else the notebook shows it twice and keeps it in memory
    if title:
        fig.suptitle(title, fontsize=11)
    return fig, axes


def picture(x) -> np.ndarray:
    """A PIL image, or (3, H, W) in [0, 1] -> (H, W, 3) for imshow."""
    if isinstance(x, Tensor):
        return x.detach().float().clamp(0, 1).permute(1, 2, 0).numpy()
    return np.asarray(x)


def grid(rows: Sequence[Sequence], row_names: Sequence[str] = (), title: str = "", column_names: Sequence[str] = (),
         size: float = 0.85) -> Figure:
    """A table of small pictures."""
    rows = list(rows) or [[]]
    columns = max(1, *map(len, rows))
    fig, axes = _figure(len(rows), columns, width=size * columns + 1.1 * bool(row_names), height=size * len(rows) + 0.5,
                        title=title)
    for r, (line, row) in enumerate(zip(axes, rows, strict=True)):
        for c, ax in enumerate(line):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if c < len(row) and row[c] is not None:
                ax.imshow(picture(row[c]), interpolation="nearest", vmin=0, vmax=1)
        if row_names:
            line[0].set_ylabel(row_names[r], rotation=0, ha="right", va="center", fontsize=9)
    for ax, name in zip(axes[0], column_names, strict=False):
        ax.set_title(name, fontsize=9)
    return fig


def views_grid(views, images: Sequence, draws: int = 4, seed: int = 0) -> Figure:
    """Each row one image: as it is, then `draws` draws of every view, de-normalised."""
    rows = [[image] for image in images]
    for draw in range(draws):
        for view, batch in zip(views.views, views(list(images), seed=seed + draw), strict=True):
            for row, x in zip(rows, view.normalize.undo(batch), strict=True):
                row.append(x)
    names = ["image"] + [f"view {v + 1}" for _ in range(draws) for v in range(len(views))]
    return grid(rows, title="What the network gets to see", column_names=names)


def curves(runs: Mapping[str, object], value: str = "loss", title: str = "") -> Figure:
    """One value over epochs for one or several runs, from their logs."""
    fig, ((ax,),) = _figure(1, 1, 6.5, 3.0, title or f"{value} while training")
    for i, (name, run) in enumerate(runs.items()):
        rows = [row for kind in ("step", "monitor") for row in run.history(kind) if value in row]
        ax.plot([r["epoch"] for r in rows], [r[value] for r in rows], color=COLORS[i % 8], ls=STYLES[i % 4],
                marker="o" * (len(rows) < 30), ms=3, label=name)
    ax.set(xlabel="epoch", ylabel=value)
    ax.grid(alpha=0.3)
    if len(runs) > 1:
        ax.legend(frameon=False)
    return fig


def lines(values: Mapping[str, Sequence[float]], x: Sequence[float] | None = None, *, xlabel: str, title: str,
          ylabel: str = "") -> Figure:
    """Named curves over x (their index without it)."""
    fig, ((ax,),) = _figure(1, 1, 6.5, 2.8, title)
    for i, (name, y) in enumerate(values.items()):
        ax.plot(range(len(y)) if x is None else x, y, color=COLORS[i % 8], ls=STYLES[i % 4], label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel or next(iter(values)))
    ax.grid(alpha=0.3)
    if len(values) > 1:
        ax.legend(frameon=False)
    return fig


PANEL = {"knn": ("kNN (%)", "higher is better"), "feature_std": ("feature std", "near 0: all images alike"),
         "effective_rank": ("effective rank", "low: few directions used"),
         "alignment": ("alignment", "low: views of an image agree"),
         "uniformity": ("uniformity", "low: images spread out")}


def collapse_panel(runs: Mapping[str, object] | object) -> Figure:
    """Is it learning or collapsing? kNN, std, rank, alignment and uniformity over epochs, and a plain sentence."""
    from .evaluate.collapse import diagnose

    runs = runs if isinstance(runs, Mapping) else {"": runs}
    fig, (axes,) = _figure(1, len(PANEL), 11, 2.5)
    for i, (name, run) in enumerate(runs.items()):
        history = run.history("monitor")
        losses = run.history("step")
        if losses:  # the verdict wants to know whether the loss fell
            history = [{**losses[0], **history[0]}, *history[1:-1], {**losses[-1], **history[-1]}]
        print(f"{name}: {diagnose(history)}" if name else diagnose(history))
        for ax, (key, (label, hint)) in zip(axes, PANEL.items(), strict=True):
            rows = [row for row in history if key in row]
            ax.plot([r["epoch"] for r in rows], [r[key] for r in rows], color=COLORS[i % 8], ls=STYLES[i % 4],
                    marker="o", ms=3, label=name)
            ax.set_title(f"{label}\n{hint}", fontsize=9)
            ax.set_xlabel("epoch", fontsize=9)
            ax.grid(alpha=0.3)
    if len(runs) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    return fig


def accuracy_bars(rows: Sequence[Mapping]) -> Figure:
    """Evaluation rows as bars with their 95 % intervals, one group per protocol."""
    if not rows:
        return grid([[np.full((8, 8, 3), 255)]], title="no labels, no accuracy")
    protocols = list(dict.fromkeys(r["protocol"] for r in rows))
    fig, (axes,) = _figure(1, len(protocols), 8, 2.6)
    for ax, protocol in zip(axes, protocols, strict=True):
        mine = [r for r in rows if r["protocol"] == protocol]
        y = np.arange(len(mine))[::-1]
        x = np.array([r["top1"] for r in mine])
        low, high = np.array([r["interval"] for r in mine]).T
        ax.barh(y, x, color=[COLORS[i % 8] for i in range(len(mine))], height=0.6)
        ax.errorbar(x, y, xerr=[x - low, high - x], fmt="none", ecolor="black", capsize=3)
        ax.set_yticks(y, [f"{r['source'].split('-')[0]}  {r['top1']:.1f}" for r in mine], fontsize=9)
        ax.set(xlim=(0, 100), xlabel="test accuracy (%)")
        ax.set_title(protocol, fontsize=10)
    return fig


def neighbours(images, features: Tensor, queries: Sequence[int], k: int = 8) -> Figure:
    """For each query its nearest images by cosine; the title of a neighbour is its similarity."""
    z = torch.nn.functional.normalize(features, dim=1)
    similarity, index = (z[list(queries)] @ z.T).topk(k + 1)
    rows = [[images[int(j)] for j in row] for row in index]
    return grid(rows, title="Query (left) and its nearest neighbours in feature space",
                column_names=["query", *(f"{i}." for i in range(1, k + 1))])


def embedding(features: Tensor, labels: Tensor | None, classes: Sequence[str], title: str = "") -> Figure:
    """t-SNE of features in the plane. Colours AND markers tell the classes apart; labels are for looking only."""
    from sklearn.manifold import TSNE

    xy = TSNE(perplexity=min(30, len(features) // 4), init="pca", random_state=0).fit_transform(features.numpy())
    fig, ((ax,),) = _figure(1, 1, 6.5, 4.6, title or "Features in the plane (t-SNE)")
    labels = torch.zeros(len(features)) if labels is None else labels
    for c, name in enumerate(classes or ["images"]):
        mine = labels.numpy() == c
        ax.scatter(*xy[mine].T, s=14, alpha=0.7, color=COLORS[c % 8], marker=MARKERS[c % 10], label=name, lw=0)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xticks=[], yticks=[])
    return fig


def confusion(truth: Tensor, guess: Tensor, names: Sequence[str], title: str = "") -> Figure:
    """How often each answer was given for each truth, in % of the row. truth, guess: (N,) numbers into `names`."""
    n = len(names)
    counts = torch.bincount(truth * n + guess, minlength=n * n).view(n, n)
    percent = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    fig, ((ax,),) = _figure(1, 1, 0.5 * n + 2.6, 0.5 * n + 1.6, title)
    shown = ax.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for row in range(n):
        for column in range(n):
            value = float(percent[row, column])
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 50 else "black")
    ax.set_xticks(range(n), names)
    ax.set_yticks(range(n), names)
    ax.set(xlabel="answer", ylabel="truth")
    fig.colorbar(shown, ax=ax, label="% of the row", shrink=0.85)
    return fig


def embeddings(features: Mapping[str, Tensor], labels: Tensor | None, classes: Sequence[str]) -> Figure:
    """`embedding` for several features of the same images, side by side."""
    from sklearn.manifold import TSNE

    fig, (axes,) = _figure(1, len(features), 3.3 * len(features) + 1, 3.6, "The same images in the plane (t-SNE)")
    for ax, (name, x) in zip(axes, features.items(), strict=True):
        xy = TSNE(perplexity=min(30, len(x) // 4), init="pca", random_state=0).fit_transform(x.numpy())
        of = np.zeros(len(x)) if labels is None else np.asarray(labels)
        for c, label in enumerate(classes or ["images"]):
            ax.scatter(*xy[of == c].T, s=10, alpha=0.7, color=COLORS[c % 8], marker=MARKERS[c % 10], label=label, lw=0)
        ax.set_title(name, fontsize=10)
        ax.set(xticks=[], yticks=[])
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def similarities(matrices: Tensor | Mapping[str, Tensor], title: str, xlabel: str = "", ylabel: str = "",
                 label: str = "cosine similarity") -> Figure:
    """A matrix of cosines or correlations, or named ones side by side: blue is opposite, white unrelated, red alike."""
    named = {"": matrices} if isinstance(matrices, Tensor) else matrices
    fig, (axes,) = _figure(1, len(named), 3.1 * len(named) + 1.3, 3.8, title)
    for ax, (name, matrix) in zip(axes, named.items(), strict=True):
        shown = ax.imshow(matrix.detach().numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    fig.colorbar(shown, ax=list(axes), label=label, shrink=0.85)
    return fig


def codes(matrices: Mapping[str, Tensor], title: str = "") -> Figure:
    """Named assignments (images x prototypes, rows sum to 1); below, what each prototype gets beside an equal share."""
    fig, (above, below) = _figure(2, len(matrices), 2.6 * len(matrices) + 0.8, 4.2, title, height_ratios=(3, 1))
    for assigned, sums, (name, q) in zip(above, below, matrices.items(), strict=True):
        shown = assigned.imshow(q.detach(), cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        assigned.set_title(name, fontsize=9)
        sums.bar(range(q.shape[1]), q.detach().sum(0), width=1.0, color=COLORS[0])
        sums.axhline(len(q) / q.shape[1], color=COLORS[1], ls="--", label="equal share")
        sums.set(xlim=(-0.5, q.shape[1] - 0.5), xlabel="prototype")
    above[0].set_ylabel("image")
    below[0].set_ylabel("images it gets")
    below[0].legend(frameon=False, fontsize=8)
    fig.colorbar(shown, ax=list(above), label="share of the image", shrink=0.9)
    return fig


def dictionary(similarity: Tensor, batch: int, title: str = "") -> Figure:
    """MoCo's look-up, (n, 1 + K) cosines: one row per query, its own key at the left, then the queue from the newest
    key to the oldest, `batch` of them per step."""
    n, K = len(similarity), similarity.shape[1] - 1
    fig, ((own, queue),) = _figure(1, 2, 9.5, 0.22 * n + 1.2, title, width_ratios=(1, 30))
    for ax, part in ((own, similarity[:, :1]), (queue, similarity[:, 1:])):
        shown = ax.imshow(part.detach(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        ax.set_yticks(range(n) if ax is own else [])
    own.set(xticks=[], ylabel="query")
    own.set_title("own key", fontsize=9)
    ticks = range(0, K + 1, batch * max(1, K // batch // 10))
    queue.set_xticks([x - 0.5 for x in ticks], [f"{x // batch}" for x in ticks])
    queue.set(xlabel="age of the keys in the queue (steps)")
    fig.colorbar(shown, ax=queue, label="cosine")
    return fig


# ---------------------------------------------------------------- masked images


def masked(images: Tensor, mask: Tensor, patch: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with the removed patches grey."""
    from .masking import upsample_mask

    hole = upsample_mask(mask, patch)
    return images * (1 - hole) + MASKED * hole


def reconstructions(method, images: Tensor, mask: Tensor, normalize, title: str = "") -> Figure:
    """Rows: image, what the encoder sees, the target if it is not the image, the prediction, and the prediction pasted
    into the visible patches.

    images (B, 3, H, W) normalised, mask (B, L).
    """
    from .masking import upsample_mask

    with torch.no_grad():
        painted = normalize.undo(method.to_image(method.reconstruct(images, mask), images))
        target = images if method.paints else method.to_image(method.target(images), images)
        seen = method.seen(images, mask)
    truth, target = normalize.undo(images), normalize.undo(target)
    hole = upsample_mask(mask, target.shape[-1] // round(mask.shape[1] ** 0.5))
    encoder_sees = masked(truth, mask, method.patch) if seen is None else normalize.undo(seen)
    rows = {"image": truth, "encoder sees": encoder_sees, "target": target, "prediction": painted,
            "pasted": target * (1 - hole) + painted * hole}
    if method.paints:
        del rows["target"]
    decibel = f", {psnr(painted, truth, hole):.1f} dB on them" if method.paints else ""
    leak = f"; {method.borrows} taken from the truth" if method.borrows else ""
    return grid([list(row) for row in rows.values()], list(rows),
                title or f"{int(mask[0].sum())} of {mask.shape[1]} patches removed{decibel}{leak}",
                size=0.85 if method.paints else 1.2)


def latents(images: Tensor, mask: Tensor, patch: int, found: Mapping[str, Tensor], title: str = "") -> Figure:
    """Vectors of hidden patches as colours in their places: what is alike has the same colour, in all rows.

    images (B, 3, H, W) in [0, 1], mask (B, L), found[name] (B, n, D) for the n hidden patches of each image in order.
    Red, green and blue are three principal components, those of the first entry.
    """
    from .masking import upsample_mask

    first = next(iter(found.values())).float().flatten(0, 1)
    mean = first.mean(0)
    basis = torch.linalg.svd(first - mean, full_matrices=False)[2][:3].T  # D x 3
    low, high = torch.quantile((first - mean) @ basis, torch.tensor([0.02, 0.98]), dim=0)
    hole, rows = upsample_mask(mask, patch), {"image": images, "encoder sees": masked(images, mask, patch)}
    for name, z in found.items():
        colours = torch.zeros(*mask.shape, 3)
        colours[mask > 0] = ((z.float().flatten(0, 1) - mean) @ basis - low) / (high - low)
        channels = [upsample_mask(c, patch) for c in colours.clamp(0, 1).unbind(2)]
        rows[name] = torch.where(hole > 0, torch.cat(channels, 1), images)
    return grid([list(row) for row in rows.values()], list(rows), title)


def side_by_side(methods: Mapping[str, object], image: Tensor, mask: Tensor, amplitudes: bool = False) -> Figure:
    """One image under one mask, a column per masked method: what its encoder sees, its target, its prediction, and the
    prediction pasted into what is visible. `amplitudes`: the Fourier amplitudes of these instead.

    image (3, H, W) in [0, 1], mask (L,) of any grid: each method hides every cell of its own that a hidden one touches.
    """
    from .masking import regrid, upsample_mask

    columns, names = [], []
    for name, method in methods.items():
        normalize = method.views(image.shape[-1]).normalize
        x = normalize.apply(image[None])
        own = regrid(mask[None], image.shape[-1] // method.patch)
        with torch.no_grad():
            target, painted = (normalize.undo(method.to_image(y, x)) for y in
                               (method.target(x), method.reconstruct(x, own)))
            seen = method.seen(x, own)
        seen = masked(image[None], own, method.patch) if seen is None else normalize.undo(seen)
        hole = upsample_mask(own, painted.shape[-1] // round(own.shape[1] ** 0.5))
        column = [image, seen[0], target[0], painted[0], (target * (1 - hole) + painted * hole)[0]]
        columns.append([amplitude(x) for x in column] if amplitudes else column)
        decibel = f"{psnr(painted, image[None], hole):.1f} dB" if method.paints and not method.borrows else ""
        leak = f"{method.borrows}\ntaken from the truth" if method.borrows else decibel
        names.append(f"{name}\n{leak}")
    rows = ["image", "encoder sees", "target", "prediction", "pasted"]
    title = f"{int(mask.sum())} of {len(mask)} cells hidden" + ", amplitudes (log)" * amplitudes
    return grid(list(zip(*columns, strict=True)), rows, title, column_names=names, size=1.35)


def amplitude(x: Tensor) -> Tensor:
    """log(1 + |F|) of the grey picture (3, H, W), frequency 0 in the middle, scaled to [0, 1]."""
    log = torch.fft.fftshift(torch.fft.fft2(x.mean(0), norm="ortho")).abs().log1p()
    return (log / log.max().clamp(min=1e-9)).expand(3, -1, -1)


def film(run, count: int = 6) -> Figure:
    """The run's snapshots: the same images under the same masks while training goes on.

    Also written into the run directory: this strip as film.png, and film.gif, in which the pictures become sharper.
    """
    snaps = run.snapshots()
    normalize = run.recipe.build().views(run.recipe.size).normalize
    patch = snaps[0][1]["images"].shape[-1] // round(snaps[0][1]["mask"].shape[1] ** 0.5)
    first = snaps[0][1]
    truth = normalize.undo(first["images"][:count])
    seen = masked(truth, first["mask"][:count], patch)
    still = {"image": truth, "encoder sees": seen}
    if "target" in first:
        still["target"] = normalize.undo(first["target"][:count])
    painted = {f"step {step}": normalize.undo(tensors["reconstruction"][:count]) for step, tensors in snaps}
    # Drawings need more room than pictures: every second one is in the strip, the last among them.
    strip = still | (dict(list(painted.items())[::-2][::-1]) if "target" in first else painted)
    fig = grid(list(map(list, strip.values())), list(strip), title="The same masks while training goes on",
               size=1.1 if "target" in first else 0.75)
    fig.savefig(run.path / "film.png", dpi=150, facecolor="white")
    size = next(iter(painted.values())).shape[2:]
    above = [torch.nn.functional.interpolate(x, size) for x in still.values()]
    _gif([torch.cat([*above, x], 2) for x in painted.values()], run.path / "film.gif")
    return fig


def _gif(frames: Sequence[Tensor], path, height: int = 400) -> None:
    """Pictures (n, 3, H, W) in [0, 1] side by side, one frame after the other; the last one stays for a while."""
    scale = max(1, height // frames[0].shape[2])
    pages = [Image.fromarray((255 * picture(torch.cat(list(f), 2))).astype(np.uint8)) for f in frames]
    pages = [page.resize((page.width * scale, page.height * scale), Image.Resampling.NEAREST) for page in pages]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=[400] * (len(pages) - 1) + [2000], loop=0)


def psnr(painted: Tensor, truth: Tensor, hole: Tensor) -> float:
    """Peak signal-to-noise ratio in dB on the removed pixels; images in [0, 1], hole (B, 1, H, W)."""
    error = ((painted - truth) ** 2 * hole).sum() / (hole.sum() * truth.shape[1])
    return float(-10 * torch.log10(error))


def spectra(pictures: Mapping[str, Tensor], normalize, title: str = "") -> Figure:
    """Versions of the same pictures: the first one, its spectrum below, and how strong waves are, from slow to fast.

    pictures[name]: (n, 3, H, H) normalised. A spectrum is log(1 + amplitude), a mean over colours, with the slowest
    wave in the middle. The curves are root mean squares over rings of it and over all n pictures, as a share of the
    first entry's.
    """
    fig, (above, below) = _figure(2, len(pictures) + 2, 1.5 * len(pictures) + 3.6, 3.6, title)
    place = above[-1].get_gridspec()[:, -2:]
    for ax in (*above[-2:], *below[-2:]):
        ax.remove()
    curve = fig.add_subplot(place)
    f = torch.fft.fftfreq(next(iter(pictures.values())).shape[-1])
    rings = (24 * (f[:, None] ** 2 + f**2).sqrt()).round().long()  # 12 up to the fastest wave along a side
    first = None
    for i, (name, x) in enumerate(pictures.items()):
        amplitude = torch.fft.fft2(x.float(), norm="ortho").abs()
        seen = torch.fft.fftshift(amplitude[0].mean(0)).log1p().numpy()
        for ax, shown in ((above[i], picture(normalize.undo(x)[0])), (below[i], seen)):
            ax.imshow(shown, interpolation="nearest", cmap="magma", vmin=0, vmax=3)
            ax.set(xticks=[], yticks=[])
        above[i].set_title(name, fontsize=9)
        power = torch.stack([(amplitude[..., rings == r] ** 2).mean().sqrt() for r in range(13)])
        first = power if first is None else first
        curve.plot([r / 24 for r in range(13)], (power / first).tolist(), color=COLORS[i % 8], ls=STYLES[i % 4],
                   label=name)
    curve.set(xlabel="waves per pixel", ylim=(0, None))
    curve.set_title(f"amplitude, relative to {next(iter(pictures))}", fontsize=9)
    curve.legend(frameon=False, fontsize=8)
    curve.grid(alpha=0.3)
    return fig


# ---------------------------------------------------------------- cells


def matches(x1: Tensor, x2: Tensor, found: Mapping[str, Tensor], true: Tensor, shown: Tensor,
            title: str = "") -> Figure:
    """Two views of each image, the second half a picture lower, joined cell by cell; one row per entry of `found`.

    x1, x2 (n, 3, H, W) in [0, 1]; found[name] and true (n, S²): numbers of cells of view 2, row by row; shown (n, m):
    the cells of view 1 to join. Solid blue: as in `true`. Dashed orange: elsewhere.
    """
    n, size, side = len(x1), x1.shape[-1], round(true.shape[1] ** 0.5)
    fig, axes = _figure(len(found), n, 2.5 * n, 1.75 * len(found) + 0.4, title)
    down, right = size // 2, size + size // 5  # where view 2 lies
    pairs = torch.ones(n, 3, down + size, right + size)
    pairs[:, :, :size, :size], pairs[:, :, down:, right:] = x1, x2
    for line, (name, to) in zip(axes, found.items(), strict=True):
        for i, ax in enumerate(line):
            ax.imshow(picture(pairs[i]), interpolation="nearest", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            for s in shown[i].tolist():
                ends = torch.tensor([divmod(s, side), divmod(int(to[i, s]), side)])  # (row, column) in either view
                y, x = ((ends + 0.5) * size / side - 0.5).unbind(1)
                color, style = (COLORS[5], "-") if to[i, s] == true[i, s] else (COLORS[4], "--")
                ax.plot(x + torch.tensor([0, right]), y + torch.tensor([0, down]), color=color, ls=style,
                        marker="o", ms=3, lw=1.3)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return fig
