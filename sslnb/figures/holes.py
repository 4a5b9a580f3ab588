"""Images of which a part is hidden, and what was painted there."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..masking import regrid, upsample_mask
from .base import COLORS, STYLES, grid, panels, picture

MASKED = 0.65  # the grey of a removed patch


def masked(images: Tensor, mask: Tensor, patch: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with the removed patches grey."""
    hole = upsample_mask(mask, patch)
    return images * (1 - hole) + MASKED * hole


def painting(method, images: Tensor, mask: Tensor, normalize) -> tuple[dict[str, Tensor], Tensor]:
    """What a masked method makes of normalised images (B, 3, H, W) under a mask (B, L), in pictures: the image, what
    its encoder sees, its target, its prediction, and the prediction pasted into what is visible; and the hole."""
    with torch.no_grad():
        target, painted = (normalize.undo(method.to_image(y, images)) for y in
                           (method.target(images), method.reconstruct(images, mask)))
        seen = method.seen(images, mask)
    truth = normalize.undo(images)
    seen = masked(truth, mask, method.patch) if seen is None else normalize.undo(seen)
    hole = upsample_mask(mask, target.shape[-1] // round(mask.shape[1] ** 0.5))
    return {"image": truth, "encoder sees": seen, "target": target, "prediction": painted,
            "pasted": target * (1 - hole) + painted * hole}, hole


def reconstructions(method, images: Tensor, mask: Tensor, normalize, title: str = "") -> Figure:
    """The rows of `painting`, without the target where it is the image. images normalised, mask (B, L)."""
    rows, hole = painting(method, images, mask, normalize)
    if method.paints:
        del rows["target"]
    decibel = f", {psnr(rows['prediction'], rows['image'], hole):.1f} dB on them" if method.paints else ""
    leak = f"; {method.borrows} taken from the truth" if method.borrows else ""
    cells = "pixels" if method.patch == 1 else "patches"
    return grid([list(row) for row in rows.values()], list(rows),
                title or f"{int(mask[0].sum())} of {mask.shape[1]} {cells} removed{decibel}{leak}",
                size=0.85 if method.paints else 1.2)


def latents(images: Tensor, mask: Tensor, patch: int, found: Mapping[str, Tensor], title: str = "") -> Figure:
    """Vectors of hidden patches as colours in their places: what is alike has the same colour, in all rows.

    images (B, 3, H, W) in [0, 1], mask (B, L), found[name] (B, n, D) for the n hidden patches of each image in order.
    Red, green and blue are three principal components, those of the first entry.
    """
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
    """`painting` of one image under one mask, a column per masked method, or the Fourier amplitudes of it.

    image (3, H, W) in [0, 1], mask (L,) of any grid: each method hides every cell of its own that a hidden one touches.
    """
    columns, names = [], []
    for name, method in methods.items():
        normalize = method.views(image.shape[-1]).normalize
        own = regrid(mask[None], image.shape[-1] // method.patch)
        rows, hole = painting(method, normalize.apply(image[None]), own, normalize)
        column = [x[0] for x in rows.values()]
        if amplitudes:
            column = [a.expand(3, -1, -1) / a.max().clamp(min=1e-9) for a in map(amplitude, column)]
        columns.append(column)
        below = f"{psnr(rows['prediction'], rows['image'], hole):.1f} dB" if method.paints else ""
        names.append(f"{name}\n" + (f"{method.borrows}\ntaken from the truth" if method.borrows else below))
    title = f"{int(mask.sum())} of {len(mask)} cells hidden" + ", amplitudes (log)" * amplitudes
    return grid(list(zip(*columns, strict=True)), list(rows), title, column_names=names, size=1.35)


def amplitude(x: Tensor) -> Tensor:
    """log(1 + |F|), a mean over the colours of x (3, H, W), with the slowest wave in the middle: (H, W)."""
    return torch.fft.fftshift(torch.fft.fft2(x.float(), norm="ortho").abs().mean(0)).log1p()


def film(run, count: int = 6) -> Figure:
    """The run's snapshots: the same images under the same masks while training goes on.

    Also written into the run directory: this strip as film.png, and film.gif, in which the pictures become sharper.
    """
    snaps = run.snapshots()
    normalize = run.recipe.build().views(run.recipe.size).normalize
    patch = snaps[0][1]["images"].shape[-1] // round(snaps[0][1]["mask"].shape[1] ** 0.5)
    first = snaps[0][1]
    truth = normalize.undo(first["images"][:count])
    seen = normalize.undo(first["seen"][:count]) if "seen" in first else masked(truth, first["mask"][:count], patch)
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
    fig, (above, below) = panels(2, len(pictures) + 2, 1.5 * len(pictures) + 3.6, 3.6, title)
    place = above[-1].get_gridspec()[:, -2:]
    for ax in (*above[-2:], *below[-2:]):
        ax.remove()
    curve = fig.add_subplot(place)
    f = torch.fft.fftfreq(next(iter(pictures.values())).shape[-1])
    rings = (24 * (f[:, None] ** 2 + f**2).sqrt()).round().long()  # 12 up to the fastest wave along a side
    first = None
    for i, (name, x) in enumerate(pictures.items()):
        for ax, shown in ((above[i], picture(normalize.undo(x)[0])), (below[i], amplitude(x[0]).numpy())):
            ax.imshow(shown, interpolation="nearest", cmap="magma", vmin=0, vmax=3)
            ax.set(xticks=[], yticks=[])
        above[i].set_title(name, fontsize=9)
        waves = torch.fft.fft2(x.float(), norm="ortho").abs()
        power = torch.stack([(waves[..., rings == r] ** 2).mean().sqrt() for r in range(13)])
        first = power if first is None else first
        curve.plot([r / 24 for r in range(13)], (power / first).tolist(), color=COLORS[i % 8], ls=STYLES[i % 4],
                   label=name)
    curve.set(xlabel="waves per pixel", ylim=(0, None))
    curve.set_title(f"amplitude, relative to {next(iter(pictures))}", fontsize=9)
    curve.legend(frameon=False, fontsize=8)
    curve.grid(alpha=0.3)
    return fig
