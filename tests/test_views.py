"""Every view op against torchvision with the same parameters, and the promise that draws depend on seeds alone."""

import pickle
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import InterpolationMode

from sslnb import blur, methods, resolve
from sslnb import views as V
from sslnb.blur import gaussian_blur
from sslnb.draws import Draws
from sslnb.embedded import photos
from sslnb.errors import InputError
from sslnb.photometry import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """(11, 3, 96, 96) in [0, 1]: real photographs."""
    return torch.from_numpy(photos("train")[0][:, ::2, ::2][:, :96, :96]).permute(0, 3, 1, 2).float() / 255


def one_by_one(function, x, factors):
    return torch.stack([function(image, float(f)) for image, f in zip(x, factors, strict=True)])


@pytest.mark.parametrize("ours, theirs, low, high", [
    (adjust_brightness, TF.adjust_brightness, 0, 2), (adjust_contrast, TF.adjust_contrast, 0, 2),
    (adjust_saturation, TF.adjust_saturation, 0, 2), (adjust_hue, TF.adjust_hue, -0.5, 0.5)])
def test_colour_ops_agree_with_torchvision(pictures, ours, theirs, low, high):
    factors = torch.linspace(low, high, len(pictures))
    expected = one_by_one(theirs, pictures, factors)
    alone = [ours(x, f) for x, f in zip(pictures.clone().split(1), factors.tolist(), strict=True)]
    assert (torch.cat(alone) - expected).abs().max() < TOLERANCE
    if ours is adjust_hue:  # the others go together by `mixed`, see below
        assert (ours(pictures.clone(), factors) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("way", [blur._banded, blur._convolved])  # of a CPU and of a GPU
@pytest.mark.parametrize(("taps", "size"), [(3, (96, 96)), (9, (83, 96)), (23, (96, 49))])
def test_blur_agrees_with_torchvision(pictures, taps, size, way, monkeypatch):
    monkeypatch.setattr(blur, "_banded", way)
    pictures = pictures[..., :size[0], :size[1]]
    sigma = torch.linspace(0.1, 2, len(pictures))
    theirs = one_by_one(lambda x, s: TF.gaussian_blur(x, [taps, taps], [s, s]), pictures, sigma)
    assert (gaussian_blur(pictures, sigma, taps) - theirs).abs().max() < 1e-4  # it leaves out what weighs less
    alone = [gaussian_blur(x, s, taps) for x, s in zip(pictures.split(1), sigma.tolist(), strict=True)]
    assert (torch.cat(alone) - theirs).abs().max() < 1e-4


def test_blur_of_a_crop_smaller_than_its_kernel_reaches_as_far_as_its_borders_can_be_reflected(pictures):
    tiny = pictures[..., :6, :6]
    found = gaussian_blur(tiny, torch.full((len(tiny),), 2.0), 23)
    assert found.shape == tiny.shape and (found - TF.gaussian_blur(tiny, [11, 11], [2.0, 2.0])).abs().max() < 1e-4


def test_solarize_greyscale_and_normalize_agree_with_torchvision(pictures):
    on = torch.ones(len(pictures), dtype=torch.bool)
    solarized = V.Solarize(1.0).apply(pictures.clone(), on)
    assert (solarized - TF.solarize(pictures, 128 / 255)).abs().max() < TOLERANCE
    grey = V.Greyscale(1.0).apply(pictures.clone(), on)
    assert (grey - TF.rgb_to_grayscale(pictures, 3)).abs().max() < TOLERANCE
    normal = V.Normalize()
    for out in (None, torch.empty_like(pictures)):
        made = normal.apply(pictures, out=out)
        assert torch.allclose(made, TF.normalize(pictures, V.IMAGENET_MEAN, V.IMAGENET_STD), atol=1e-6)
        assert out is None or made is out
    assert torch.allclose(normal.undo(normal.apply(pictures)), pictures, atol=1e-6)


@pytest.mark.parametrize("strengths", [(0.8, 0.8, 0.8, 0.2), (0.8, 0.8, 0.8, 0.0), (0.0, 0.8, 0.0, 0.2),
                                       (0.8, 0.0, 0.8, 0.0)])
def test_jitter_applies_its_ops_in_each_images_own_order(pictures, strengths):
    """Many images together, which go another way than one by one."""
    x = pictures[:4, :, ::3, ::3].repeat(30, 1, 1, 1)
    factors, order = V.ColorJitter(*strengths, p=0.7).sample(Draws(torch.arange(len(x))))
    on = (order >= 0).any(1)
    assert len({tuple(o) for o in order[on].tolist()}) == {4: 24, 3: 24, 2: 12}[sum(s > 0 for s in strengths)]
    theirs = x.clone()
    ops = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for i in range(len(x)):
        for which in order[i].tolist():
            if which >= 0:
                theirs[i] = ops[which](theirs[i], float(factors[i, which]))
    assert 0 < on.sum() < len(on)
    assert (V.ColorJitter(*strengths).apply(x.clone(), factors, order) - theirs).abs().max() < TOLERANCE


def test_colours_may_change_in_any_order_and_the_pixels_given_stay(pictures):
    """MoCo v1 makes images grey before it changes their brightness."""
    ops = (V.Greyscale(1.0), V.ColorJitter(0.8, 0.8, 0.8, 0.2, p=1.0), V.Blur(1.0), V.Solarize(1.0), V.Normalize())
    x, seeds = (pictures * 255).byte(), torch.arange(len(pictures))
    for order in (ops, ops[::-1]):
        before = x.clone()
        (made,) = V.Views(V.View(*order)).photometric([x], seeds)
        assert made.isfinite().all() and torch.equal(x, before)
        alone = torch.cat([V.Views(V.View(*order)).photometric([x[i:i + 1]], seeds[i:i + 1])[0] for i in range(3)])
        assert torch.allclose(made[:3], alone, atol=1e-4)


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_the_views_of_every_published_row_are_made(name):
    """On two small photographs, many draws: every op takes part."""
    images = [Image.fromarray(x[:64, :64]) for x in photos("train")[0][:2]]
    row = next(r for key, r in methods.recipes(name).items() if key != "demo")
    with torch.device("meta"):
        views = row.build().views(row.size)
    if name == "relative_loc":
        images = [image.resize((300, 300)) for image in images]
    for view in views(images * 5, seed=1):
        assert view.isfinite().all()


def test_parameters_are_drawn_per_image_within_their_ranges():
    factors, order = V.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8).sample(Draws(torch.arange(20_000)))
    assert abs((order >= 0).all(1).float().mean() - 0.8) < 0.01 and abs((order < 0).all(1).float().mean() - 0.2) < 0.01
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        f = factors[:, column]
        assert f.min() >= low - 1e-6 and f.max() <= high + 1e-6
        assert f.min() < low + 0.01 * (high - low) and f.max() > high - 0.01 * (high - low)
        assert len(f.unique()) > 15_000


def test_draws_are_uniform_and_independent():
    draws = Draws(torch.arange(50_000))
    a, b = draws(), draws()
    c = Draws(torch.arange(50_000), stream=1)()
    for x in (a, b, c):
        counts = torch.histc(x, 20, 0, 1) / len(x)
        assert (counts - 0.05).abs().max() < 0.005
    correlations = torch.corrcoef(torch.stack([a[1:], a[:-1], b[1:], c[1:]]))
    assert (correlations - torch.eye(4)).abs().max() < 0.02


def test_views_of_an_image_depend_on_its_seed_alone(pictures):
    views = V.Views(V.View(V.ColorJitter(0.8, 0.8, 0.8, 0.2), V.Greyscale(0.2), V.Blur(0.5), V.Solarize(0.2),
                           V.Normalize(), count=2))
    x, seeds = (pictures * 255).byte(), torch.arange(len(pictures)) * 7919
    whole = views.photometric([x, x], seeds)
    again = views.photometric([x, x], seeds)
    order = torch.randperm(len(x))
    parts = views.photometric([x[order][:4]] * 2, seeds[order][:4])
    for v in range(2):
        assert torch.equal(whole[v], again[v])
        assert torch.allclose(parts[v], whole[v][order][:4], atol=1e-5)
    assert not torch.allclose(whole[0], whole[1])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_random_resized_crop_is_torchvisions_crop_of_the_same_box(interpolation):
    image = Image.fromarray(photos("train")[0][0])
    op = V.RandomResizedCrop(64, (0.2, 0.8), interpolation=interpolation)
    for seed in range(20):
        left, top, right, bottom = op.box(*image.size, random.Random(seed))
        theirs = TF.resized_crop(image, top, left, bottom - top, right - left, [64, 64],
                                 InterpolationMode(interpolation))
        ours = op(image, random.Random(seed))
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_of_tensors_are_those_of_pillow(interpolation):
    """Large ones, which are resized by torch: the same draws, and but for the sharpest edges not one of 255 apart."""
    image = Image.fromarray(photos("train")[0][0])
    ops = V.Pad(3), V.RandomResizedCrop(96, (0.2, 1.5), interpolation=interpolation), V.HorizontalFlip()
    assert V.View(*ops).on_tensors
    for seed in range(20):
        tensor, pil = V.pixels(image), image
        rngs = random.Random(seed), random.Random(seed)
        for op in ops:
            tensor, pil = op(tensor, rngs[0]), op(pil, rngs[1])
        apart = (tensor.float() - V.pixels(pil).float()).abs()
        assert apart.max() <= 3 and (apart > 1).float().mean() < 1e-3
        assert torch.equal(V.Views(V.View(*ops)).crop(image, random.Random(seed))[0], tensor)


def test_what_torch_cannot_do_or_the_demos_were_measured_with_is_done_by_pillow():
    assert not V.View(V.RandomResizedCrop(224, interpolation="lanczos")).on_tensors
    assert not V.View(V.RandomResizedCrop(20)).on_tensors
    assert not V.View(V.RandomResizedCrop(224), V.RandomRotation(2)).on_tensors
    assert V.View(V.RandomResizedCrop(224), V.RandomRotation(0)).on_tensors
    image = Image.fromarray(photos("train")[0][0])
    small, large = V.View(V.RandomResizedCrop(20)), V.View(V.RandomResizedCrop(96, interpolation="nearest"))
    for view in small, large:
        (x,) = V.Views(view).crop(image, random.Random(0))
        assert torch.equal(x, V.pixels(view.image_ops[0](image, random.Random(0))))


def test_random_resized_crop_draws_the_asked_areas_and_aspects():
    op, rng = V.RandomResizedCrop(32, (0.2, 0.6)), random.Random(0)
    boxes = [op.box(500, 400, rng) for _ in range(2000)]
    areas = np.array([(r - l) * (b - t) / 200_000 for l, t, r, b in boxes])
    aspects = np.array([(r - l) / (b - t) for l, t, r, b in boxes])
    assert 0.19 < areas.min() < 0.22 and 0.58 < areas.max() < 0.61 and abs(areas.mean() - 0.4) < 0.01
    assert 0.74 < aspects.min() < 0.77 and 1.3 < aspects.max() < 1.35 and abs(np.log(aspects).mean()) < 0.02
    assert all(0 <= l < r <= 500 and 0 <= t < b <= 400 for l, t, r, b in boxes)


def test_a_crop_that_never_fits_falls_back_to_the_central_box():
    left, top, right, bottom = V.RandomResizedCrop(8, (1.0, 1.0)).box(1000, 10, random.Random(0))
    assert (top, bottom) == (0, 10) and (left, right) == (493, 506)


def test_flip_resize_and_center_crop():
    image = Image.fromarray(photos("train")[0][1]).resize((60, 40))
    assert V.HorizontalFlip(1.0)(image, random.Random(0)) == TF.hflip(image)
    assert V.HorizontalFlip(0.0)(image, random.Random(0)) is image
    assert V.Resize(20)(image).size == (30, 20)
    assert V.CenterCrop(30)(image) == TF.center_crop(image, 30)


def test_multi_crop_makes_views_of_several_sizes():
    views = V.Views(V.View(V.RandomResizedCrop(48, (0.14, 1)), V.Normalize(), count=2),
                    V.View(V.RandomResizedCrop(24, (0.05, 0.14)), V.Normalize(), count=6))
    made = views([Image.fromarray(x) for x in photos("train")[0][:3]])
    assert [tuple(v.shape) for v in made] == [(3, 3, 48, 48)] * 2 + [(3, 3, 24, 24)] * 6


def test_geometry_after_photometry_is_refused():
    with pytest.raises(InputError, match="HorizontalFlip works on single images and must come before Blur"):
        V.View(V.Blur(), V.HorizontalFlip())
    with pytest.raises(InputError, match="interpolation 'cubic'"):
        V.Resize(10, "cubic")(Image.new("RGB", (20, 20)))


def test_views_can_be_differentiated_through_though_torch_recorded_nothing_while_they_were_made(pictures):
    normal = V.Normalize((0.3, 0.2, 0.1), (0.7, 0.8, 0.9))  # numbers that are nowhere else kept
    (made,) = V.Views(V.View(V.Greyscale(0.5), normal)).photometric([(pictures * 255).byte()], torch.arange(11))
    weights = torch.ones(3, 1, 1, requires_grad=True)
    normal.undo(made * weights).sum().backward()
    assert weights.grad.abs().min() > 0


def test_no_device_is_asked_for_a_value():
    """It would make the CPU wait for a GPU. A meta tensor has none to give."""
    views = V.Views(V.View(V.ColorJitter(0.8, 0.8, 0.8, 0.2), V.Greyscale(0.2), V.Blur(0.5), V.Solarize(0.2),
                           V.Normalize()))
    for batch in 1, 16:
        x = torch.zeros(batch, 3, 96, 96, dtype=torch.uint8, device="meta")
        assert views.photometric([x], torch.arange(batch) + 7)[0].shape == x.shape


def test_ops_that_want_tensors_get_them_of_large_images_too():
    """Which come one by one on a CPU, where our own ops take plain numbers."""
    class Shifted(V.BatchOp):
        def sample(self, draws):
            return draws(), torch.stack([draws(), draws()], 1)

        def apply(self, x, all_by, of_two):
            return x + all_by[:, None, None, None] + of_two.sum(1)[:, None, None, None]

    x, seeds = torch.zeros(3, 3, 224, 224, dtype=torch.uint8), torch.arange(3)
    draws = Draws(seeds, 0)
    (found,) = V.Views(V.View(V.Solarize(0.0), Shifted())).photometric([x], seeds)
    draws()  # Solarize's
    assert found[:, 0, 5, 7].allclose(draws() + draws() + draws())


def test_views_that_differ_in_probabilities_may_go_together_as_on_a_gpu(pictures):
    pair = [V.View(V.ColorJitter(0.8, 0.8, 0.8, 0.2, p=jitter), V.Greyscale(0.2), V.Blur(blur), V.Normalize())
            for jitter, blur in ((0.8, 0.9), (0.5, 0.1))]
    x, seeds = (pictures * 255).byte(), torch.arange(len(pictures))
    first, second = V.Views(*pair).photometric([x, x.flip(0)], seeds)
    assert torch.equal(pair[0].photometric(torch.cat([x, x.flip(0)]), Draws(seeds, 0), Draws(seeds, 1), views=pair),
                       torch.cat([first, second]))


@pytest.mark.parametrize(("name", "together"), [("simclr", [2]), ("byol", [2]), ("mocov3", [2]), ("swav", [2, 6])])
def test_what_a_gpu_does_in_one_go(monkeypatch, name, together):
    """A meta tensor is on no CPU either."""
    with torch.device("meta"):
        views = resolve(name, data="imagenet").build().views(224)
    found, photometric = [], V.View.photometric
    monkeypatch.setattr(V.View, "photometric", lambda view, x, *draws, views: found.append(len(views)) or
                        photometric(view, x, *draws, views=views))
    crops = [torch.empty(8, 3, 96 if name == "swav" and n > 1 else 224, 224, dtype=torch.uint8, device="meta")
             for n in range(sum(together))]
    made = views.photometric(crops, torch.arange(8))
    assert found == together and [x.shape for x in made] == [x.shape for x in crops]


def test_views_with_other_ops_do_not_go_together():
    view = V.View(V.ColorJitter(0.8, 0.8, 0.8, 0.2), V.Blur(0.5))
    for ops in ((V.ColorJitter(0.8, 0.8, 0.8, 0.1), V.Blur(0.5)), (V.ColorJitter(0.8, 0.8, 0.8, 0.2),),
                (V.Blur(0.5), V.ColorJitter(0.8, 0.8, 0.8, 0.2)), (V.ColorJitter(0.8, 0.8, 0.8, 0.2), V.Solarize(0.5))):
        assert not view.goes_with(V.View(*ops)) and not V.View(*ops).goes_with(view)
    assert view.goes_with(V.View(V.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.1), V.Blur(0.1)))


def test_one_batch_of_crops_for_each_view(pictures):
    views, x = V.Views(V.View(V.Normalize(), count=2)), (pictures * 255).byte()
    for crops in ([x], [x] * 3):
        with pytest.raises(ValueError, match="zip"):
            views.photometric(crops, torch.arange(len(x)))


@pytest.mark.gpu
def test_the_device_does_not_change_the_views(pictures):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    ops = V.ColorJitter(0.8, 0.8, 0.8, 0.2), V.Greyscale(0.2), V.Blur(0.5), V.Normalize()
    views = V.Views(V.View(*ops, count=2), V.View(*ops[:3]), V.View(*ops, count=3), V.View(ops[0], aligned=True))
    x, seeds = (pictures * 255).byte(), torch.arange(len(pictures))
    for here, there in zip(views.photometric([x] * 7, seeds), views.photometric([x.cuda()] * 7, seeds), strict=True):
        assert torch.allclose(here, there.cpu(), atol=1e-4)


def test_a_batch_takes_the_memory_of_one_that_is_gone_and_of_no_other():
    memory = V.Memory(2)
    whole, other = memory((4, 3)), memory((4, 3))
    places = {whole.data_ptr(), other.data_ptr()}
    assert len(places) == 2
    part, looked_at = whole[2:], other.numpy()
    del whole, other
    for held in (part, looked_at):
        assert memory((4, 3)).data_ptr() not in places, f"{type(held).__name__} still shows it"
    del part, looked_at, held
    there = {array.ctypes.data for array in memory.kept}
    assert places <= there and memory((4, 3)).data_ptr() in there and len(memory.kept) == 2 < len(there)
    memory((5, 3))
    assert [array.shape for array in memory.kept] == [(5, 3)], "what is free and of another shape is given up"
    held = [memory((4, 3)) for _ in range(9)]
    assert len({x.data_ptr() for x in held}) == 9 and len(memory.kept) == 4
    assert pickle.loads(pickle.dumps(memory)).kept == []


def test_views_that_are_kept_stay_as_they_are(pictures):
    views = resolve("simclr").build().views(20)
    crops = [(255 * pictures[:, :, :20, :20]).byte()] * 2
    kept = views.photometric(crops, torch.arange(len(pictures)))
    was = [x.clone() for x in kept]
    views.photometric(crops, 99 + torch.arange(len(pictures)))
    assert all(map(torch.equal, kept, was)) and len(views.views[0].memory.kept) == 4
    del kept
    views.photometric(crops, torch.arange(len(pictures)))
    assert len(views.views[0].memory.kept) == 2


def test_an_aligned_view_is_the_same_crop_at_another_size():
    box = dict(scale=(0.2, 0.5), interpolation="nearest")
    jitter = V.ColorJitter(0.8, 0.8, 0.8, 0.0, p=1.0)

    def both(aligned):
        return V.Views(V.View(V.RandomResizedCrop(32, **box), V.HorizontalFlip(), jitter),
                       V.View(V.RandomResizedCrop(16, **box), V.HorizontalFlip(), jitter, aligned=aligned))

    images = [Image.fromarray(x) for x in photos("train")[0][:4]]
    large, small = both(True)(images, seed=3)
    assert large.shape[-1] == 32 and small.shape[-1] == 16
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.1  # nearest pixels of one crop
    large, other = both(False)(images, seed=3)
    assert (torch.nn.functional.avg_pool2d(large, 2) - other).abs().mean() > 0.15
    flat = [Image.new("RGB", (64, 64), (90, 140, 60))]  # of one colour: what jitter did to it must be the same
    large, small = both(True)(flat, seed=3)
    assert torch.allclose(large[..., :1, :1], small[..., :1, :1], atol=1e-6)


def test_a_blur_reaches_a_twentieth_of_the_image_either_way():
    """SimCLR's 23 taps at 224 px, and 7 at 64; at σ = 2 what is further than 8 px away weighs nothing."""
    for size, reach in ((224, 8), (64, 3)):
        x = torch.zeros(1, 3, size, size)
        x[:, :, size // 2, size // 2] = 1
        seen = V.Blur().apply(x, torch.tensor([True]), torch.tensor([2.0]))[0, 0, size // 2]
        assert seen.nonzero()[[0, -1], 0].tolist() == [size // 2 - reach, size // 2 + reach]


def test_jitter_of_more_than_one_never_turns_a_picture_negative():
    factors, _ = V.ColorJitter(1.5, 1.5, 1.5, 0.0, p=1.0).sample(Draws(torch.arange(500)))
    assert factors[:, :3].min() >= 0 and factors[:, :3].max() > 2.3 and factors[:, :3].min() < 0.05


def test_crops_lie_everywhere_in_the_image():
    crop, rng = V.RandomResizedCrop(8, (0.25, 0.25), (1.0, 1.0)), random.Random(0)
    left, top, right, bottom = np.array([crop.box(60, 40, rng) for _ in range(1000)]).T
    for start, end, room in ((left, right, 60), (top, bottom, 40)):
        free = room - (end - start)[0]
        assert start.min() == 0 and end.max() == room and abs(start.mean() - free / 2) < 0.03 * room
