"""From a file to pixels: every kind of file, two decoders that agree, and what is the file's fault."""

import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from sslnb import decoding
from sslnb.data import load
from sslnb.decoding import BrokenImage, read_image, read_pixels


@pytest.fixture(scope="module")
def photo():
    return load("photos")[0].resize((24, 16))


def pixels(image):
    return np.asarray(image).astype(int)


def saved(tmp_path, image, name, **options):
    """Decoded from a file, as an image and as a tensor."""
    image.save(tmp_path / name, **options)
    decoded = read_image(tmp_path / name)
    assert decoding.pixels(decoded).equal(read_pixels(tmp_path / name))
    return decoded


def test_transparency_is_composited_on_white(tmp_path, photo):
    alpha = np.zeros((16, 24), np.uint8)
    alpha[:, 12:] = 255
    clear = photo.copy()
    clear.putalpha(Image.fromarray(alpha))
    for image in (clear, clear.convert("LA")):
        decoded = pixels(saved(tmp_path, image, "a.png"))
        assert (decoded[:, :12] == 255).all()
        assert (decoded[:, 12:] == pixels(image.convert("RGB"))[:, 12:]).all()
    palette = photo.quantize(16)
    corner = palette.getpixel((0, 0))
    decoded = pixels(saved(tmp_path, palette, "p.png", transparency=corner))
    where = np.asarray(palette) == corner
    assert (decoded[where] == 255).all() and (decoded[~where] == pixels(palette.convert("RGB"))[~where]).all()


@pytest.mark.parametrize("mode,name,tolerance", [("L", "a.png", 0), ("1", "a.png", 0), ("P", "a.png", 0),
                                                 ("CMYK", "a.jpg", 25), ("YCbCr", "a.jpg", 25)])
def test_other_modes_become_rgb(tmp_path, photo, mode, name, tolerance):
    image = photo.convert(mode)
    decoded = saved(tmp_path, image, name)
    assert decoded.mode == "RGB"
    assert np.abs(pixels(decoded) - pixels(image.convert("RGB"))).mean() <= tolerance


def test_deep_images_are_scaled_to_8_bits(tmp_path, photo):
    grey = pixels(photo.convert("L"))
    expected = np.repeat(grey[..., None], 3, axis=2)
    sixteen = Image.fromarray((grey * 257).astype(np.uint16))
    assert sixteen.mode.startswith("I;16")
    for name in ("a.png", "a.tif"):
        assert (pixels(saved(tmp_path, sixteen, name)) == expected).all()
    thirty_two = Image.fromarray((grey * 257).astype(np.int32))
    assert (pixels(saved(tmp_path, thirty_two, "b.tif")) == expected).all()
    reals = Image.fromarray((grey / 100 - 3).astype(np.float32))
    stretched = pixels(saved(tmp_path, reals, "c.tif"))[..., 0]
    assert stretched.min() == 0 and stretched.max() == 255
    assert np.abs(stretched - (grey - grey.min()) * 255 / (grey.max() - grey.min())).max() <= 0.51
    hole = np.where(np.arange(24) < 3, np.nan, grey / 100 + 1).astype(np.float32)  # a sensor's missing columns are 0
    seen = pixels(saved(tmp_path, Image.fromarray(hole), "d.tif"))[..., 0]
    assert (seen[:, :3] == 0).all() and seen[:, 3:].max() == 255 and seen[:, 3:].min() > 0


@pytest.mark.parametrize("turn,expected", [(1, lambda x: x), (3, lambda x: np.rot90(x, 2)),
                                           (6, lambda x: np.rot90(x, -1)), (7, lambda x: np.rot90(x, 2).T)])
def test_exif_orientation_is_applied(tmp_path, photo, turn, expected):
    exif = Image.Exif()
    exif[0x0112] = turn  # how the camera was held
    for name, tolerance in (("turned.png", 0), ("turned.jpg", 5)):
        decoded = pixels(saved(tmp_path, photo, name, exif=exif, quality=95, subsampling=0))
        upright = np.stack([expected(pixels(photo)[..., c]) for c in range(3)], -1)
        assert np.abs(decoded - upright).mean() <= tolerance


JPEGS = [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30, "restart_marker_blocks": 3},
         {"icc_profile": b"colours" * 50}, {"comment": b"a photograph"}]


@pytest.mark.parametrize("options", JPEGS)
def test_both_decoders_give_the_same_bytes(tmp_path, options, monkeypatch):
    image = load("photos")[1].resize((101, 67))
    with monkeypatch.context() as patch:
        image.save(tmp_path / "a.jpg", **options)
        patch.setattr(Image, "open", None)
        decoded = read_pixels(tmp_path / "a.jpg")  # not by Pillow
    assert decoded.shape == (3, 67, 101) and decoded.stride() == (1, 303, 3)
    assert decoded.equal(decoding.pixels(saved(tmp_path, image, "a.jpg", **options)))
    for mode in ("L", "CMYK"):
        saved(tmp_path, image.convert(mode), "a.jpg", **options)


def test_a_picture_that_would_fill_the_memory_is_refused_whoever_decodes(tmp_path, photo, monkeypatch):
    photo.save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16 // 2 - 1)
    for how in (read_image, read_pixels):
        with pytest.raises(BrokenImage, match="exceeds limit of"):
            how(tmp_path / "a.jpg")


def test_both_decoders_call_the_same_files_broken(tmp_path):
    """Ends torn off and bits turned over: broken for both, or the same damage for both."""
    def read(how, path):
        try:
            return how(path)
        except BrokenImage as error:
            return str(error)

    image, file, rng, found = load("photos")[0].resize((64, 48)), tmp_path / "a.jpg", random.Random(0), set()
    for n in range(200):
        image.save(file, **JPEGS[n % len(JPEGS)])
        data = bytearray(file.read_bytes())
        if n % 3:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            data = data[:rng.randrange(len(data))]
        file.write_bytes(data)
        one, other = read(read_image, file), read(read_pixels, file)
        assert type(one) is str or decoding.pixels(one).equal(other)
        assert type(one) is not str or type(other) is str
        found.add(type(other))
    assert found == {str, torch.Tensor}


def test_where_warnings_are_errors_no_image_is_broken_and_what_is_none_has_a_sentence(tmp_path, photo):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved(tmp_path, photo, "a.jpg")
    (tmp_path / "b.jpg").write_text("<html>404</html>")
    for how in (read_image, read_pixels):
        with pytest.raises(BrokenImage, match=r"b.jpg: it is no image, or a damaged one$"):
            how(tmp_path / "b.jpg")


def test_without_a_decoder_in_torchvision_pillow_does(tmp_path, photo, monkeypatch):
    """As in builds without JPEG, and in versions to come."""
    def cannot(data):
        raise RuntimeError("not compiled with libjpeg")
    monkeypatch.setattr("torchvision.io.decode_jpeg", cannot)
    saved(tmp_path, photo, "a.jpg")
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    saved(tmp_path, photo, "a.jpg")
