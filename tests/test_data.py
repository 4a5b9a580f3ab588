"""Images by name, folder or list; every file format; parts of a set; and what each process of a run reads."""

import errno
import gzip
import pickle
import random
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sslnb import data, decoding, prepare, resolve
from sslnb.data import Images, load
from sslnb.decoding import BrokenImage
from sslnb.errors import InputError
from sslnb.reading import EpochSampler, ViewSet, draw_seed, in_order, next_batch


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def photo():
    return load("photos")[0].resize((24, 16))


def write_classes(folder: Path, digits, classes="012", each=10, suffix=".png"):
    for c in classes:
        (folder / c).mkdir(parents=True)
        of_class = [i for i in range(len(digits)) if digits.labels[i] == int(c)][:each]
        for i in of_class:
            digits[i].save(folder / c / f"{c}_{i}{suffix}")
    return folder


def names(images):
    return [Path(images.where(i)).name for i in range(len(images))]


def pixels(image):
    return np.asarray(image).astype(int)


# By name

@pytest.mark.parametrize("name", ["digits", "digits_scattered", "fashion_small", "photos"])
def test_embedded_sets_are_rgb_with_one_label_per_image(name):
    images = load(name)
    assert images[0].mode == "RGB" and images.where(3) == f"{name}[3]"
    assert (images.labels is None and images.classes == []) or len(images.labels) == len(images)


def test_a_missing_or_mistyped_name_gets_one_sentence(tmp_path):
    with pytest.raises(InputError, match="did you mean 'cifar10'.*"):
        load("cifr10")
    with pytest.raises(InputError, match="or a path to a folder or list file"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="split of digits 'tset': did you mean 'test'"):
        load("digits", "tset")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_fashion_mnist_is_read_from_torchvisions_layout(tmp_path, end, monkeypatch):
    small = load("fashion_small", "test").subset(range(20))
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    grey = small.items[..., 0]
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in grey.shape)
    for part, content in (("images-idx3", header + grey.tobytes()),
                          ("labels-idx1", bytes([0, 0, 8, 1, 0, 0, 0, 20, *small.labels.tolist()]))):
        (raw / f"t10k-{part}-ubyte{end}").write_bytes(gzip.compress(content) if end else content)
    found = load("fashion_mnist", "test", root=tmp_path)
    assert found.labels.equal(small.labels) and (pixels(found[7]) == pixels(small[7])).all()
    with pytest.raises(InputError, match="fashion_mnist.*torchvision.datasets.FashionMNIST"):
        load("fashion_mnist", "train", root=tmp_path)
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", raw)
    with pytest.raises(InputError, match="fashion_mnist is not whole in .*nowhere"):
        load("fashion_mnist", "test", root=tmp_path / "nowhere")  # another place than the one named is no answer
    monkeypatch.setenv("SSLNB_DATA", str(tmp_path / "nowhere"))
    if end:  # Debian's are packed
        assert len(load("fashion_mnist", "test")) == 20


def test_cifar_and_stl_are_read_through_torchvision(tmp_path, photo, monkeypatch):
    from torchvision import datasets
    for module in (datasets.cifar, datasets.stl10):
        monkeypatch.setattr(module, "check_integrity", lambda *a, **k: True)
    crop = pixels(photo.resize((32, 32))).astype(np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {"data": crop.transpose(2, 0, 1).reshape(1, -1), "labels": [4]}
    (folder / "test_batch").write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    cifar = load("cifar10", "test", root=tmp_path)
    assert (pixels(cifar[0]) == crop).all() and cifar.labels.tolist() == [4] and cifar.classes[4] == "e"

    crop = pixels(photo.resize((96, 96))).astype(np.uint8)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for part in ("test", "unlabeled"):
        (folder / f"{part}_X.bin").write_bytes(crop.transpose(2, 1, 0).tobytes())
    (folder / "test_y.bin").write_bytes(bytes([3]))
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    monkeypatch.setenv("SSLNB_DATA", str(tmp_path))
    assert load("stl10", "test").labels.tolist() == [2]
    unlabeled = load("stl10", "unlabeled")
    assert (pixels(unlabeled[0]) == crop).all() and unlabeled.labels is None and unlabeled.classes == []


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_an_absent_download_names_the_folder_and_the_remedy(name, tmp_path):
    remedy = rf"torchvision.datasets.{name.upper()}\(.*download=True"
    with pytest.raises(InputError, match=f"{name} .*{tmp_path}.*{remedy}"):
        load(name, root=tmp_path)


def test_imagenet_and_its_hundred_classes(tmp_path, digits, monkeypatch):
    write_classes(tmp_path / "train", digits, "0123", suffix=".JPEG")
    write_classes(tmp_path / "val", digits, "013", each=2, suffix=".JPEG")  # class 2 has no validation image
    monkeypatch.setenv("IMAGENET", str(tmp_path))
    train, test = load("imagenet"), load("imagenet", "test")
    assert train.classes == test.classes == list("0123") and len(train) == 40
    assert test.labels.tolist() == [0, 0, 1, 1, 3, 3], "both splits must number the classes alike"
    with pytest.raises(InputError, match="imagenet100 is a part of ImageNet's classes"):
        load("imagenet100")
    file = tmp_path / "classes.txt"
    file.write_text("3\n1\n")
    some = load("imagenet100", "test", classes=file)
    assert some.classes == ["1", "3"] and some.labels.tolist() == [0, 0, 1, 1]
    assert [name[0] for name in names(some)] == ["1", "1", "3", "3"]
    file.write_text("1\nn999\n")
    with pytest.raises(InputError, match="imagenet100 lacks 1 of 2 classes.*n999"):
        load("imagenet100", classes=file)
    with pytest.raises(InputError, match="imagenet: there is no folder .*IMAGENET"):
        load("imagenet", root=tmp_path / "elsewhere")


@pytest.mark.parametrize("place", ["whole", None])
def test_the_shell_line_for_imagenet100_makes_a_folder_that_every_call_takes(tmp_path, digits, monkeypatch, place):
    for part, each in (("train", 10), ("val", 2)):
        write_classes(tmp_path / (place or "data/imagenet") / part, digits, "0123", each=each)
    (tmp_path / "classes.txt").write_text("3\n1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMAGENET", place) if place else monkeypatch.delenv("IMAGENET", raising=False)
    with pytest.raises(InputError) as refused:
        prepare(resolve("simclr", data="imagenet100", batch=4), out="run")
    subprocess.run(["sh", "-c", str(refused.value).split("`")[1]], check=True)
    for split, each in (("train", 10), ("test", 2)):
        images = load("imagenet100", split)
        assert images.name == "imagenet100" and images.classes == ["1", "3"] and len(images) == 2 * each
        assert len(images.first(99)) == 2 * each
    assert prepare(resolve("simclr", data="imagenet100", batch=4), out="run").recipe.load().classes == ["1", "3"]
    with pytest.raises(InputError, match="Known: .*imagenet, photos, stl10"):
        load("imagnet100")


# By path

def test_class_folders_hold_out_a_tenth_of_each_class(tmp_path, digits):
    write_classes(tmp_path, digits, each=20)
    train, test = load(tmp_path), load(str(tmp_path), "test")
    assert not set(names(train)) & set(names(test)) and len(train) + len(test) == 60
    assert test.labels.bincount().tolist() == [2, 2, 2]
    assert test.split == "test" and test.classes == list("012")
    assert names(test) == names(load(tmp_path, "test")) != names(load(tmp_path, "test", seed=1))
    assert all(int(name[0]) == label for name, label in zip(names(train), train.labels, strict=True))


@pytest.mark.parametrize("train, held", [("train", "val"), ("train", "test"), ("train", "valid"), ("Train", "Val"),
                                         ("train", "validation"), ("training", "Testing")])
def test_split_folders_are_used_as_they_are(tmp_path, digits, train, held):
    write_classes(tmp_path / train, digits)
    write_classes(tmp_path / held, digits, each=3)
    assert len(load(tmp_path)) == 30 and len(load(tmp_path, "test")) == 9
    assert load(tmp_path).classes == load(tmp_path, "test").classes == list("012")


def test_one_of_several_folders_to_test_with_is_taken(tmp_path, digits):
    write_classes(tmp_path / "train", digits)
    for each, part in enumerate(("test", "validation", "valid", "val"), start=2):
        write_classes(tmp_path / part, digits, each=each)
        assert len(load(tmp_path, "test")) == 3 * each and len(load(tmp_path)) == 30


def test_folders_without_images_do_not_count(tmp_path, digits):
    write_classes(tmp_path / "train", digits)
    for path in ("__MACOSX/train/._0.png", "docs/more/notes.txt", ".cache/0.png", "lost+found/0.png", "val/readme"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    (tmp_path / "docs" / "back").symlink_to("..")
    (tmp_path / "empty").mkdir()
    assert load(tmp_path).classes == list("012") and len(load(tmp_path)) == 30
    with pytest.raises(InputError, match="no folder .*test for the split 'test', or no image in it"):
        load(tmp_path, "test")
    for c in "012":
        (tmp_path / "train" / c).rename(tmp_path / c)
    assert load(tmp_path).classes == list("012"), "an empty train/ is no class and no split"


def test_a_class_may_be_called_train(tmp_path, digits):
    write_classes(tmp_path, digits, "012")
    (tmp_path / "0").rename(tmp_path / "train")
    assert load(tmp_path).classes == ["1", "2", "train"]
    (tmp_path / "of two").mkdir()
    for c in ("1", "train"):
        shutil.copytree(tmp_path / c, tmp_path / "of two" / "train" / c)
    assert load(tmp_path / "of two").classes == ["1", "train"]


@pytest.mark.parametrize("part, folders", [
    ("train", ("a/0", "train/0")), ("train", ("a", "train")), ("train", ("a/0", "b/0", "train")),
    ("train", ("a", "b", "train/0")), ("val", ("a/0", "val/0")), ("Valid", ("a", "Valid")),
    ("Test", ("a/0", "b", "Test"))])
def test_nobody_is_trained_on_what_may_be_held_out(tmp_path, digits, part, folders):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            digits[i].save(tmp_path / folder / f"{i}.png")
    for split in ("train", "test"):
        with pytest.raises(InputError, match=f"{tmp_path} has {part}/ beside a/, .*: call splits train/ and val/"):
            load(tmp_path, split)
    assert len(load(tmp_path / part)) in (2, 3), "one of the folders, with or without labels"


def test_a_split_may_be_without_labels(tmp_path, digits):
    write_classes(tmp_path / "val", digits, each=3)
    (tmp_path / "train" / "nothing in it").mkdir(parents=True)
    for i in range(4):
        digits[i].save(tmp_path / "train" / f"{i}.png")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert len(train) == 4 and train.labels is None and train.classes == []
    assert test.labels.bincount().tolist() == [3, 3, 3] and {"0", "1", "2"} <= set(test.classes)
    (tmp_path / "train").rename(tmp_path / "t")
    (tmp_path / "val").rename(tmp_path / "train")
    (tmp_path / "t").rename(tmp_path / "val")
    assert load(tmp_path).labels.bincount().tolist() == [3, 3, 3]
    with pytest.raises(InputError, match="/val/ has no class folders, train/ has; sort its images into class folders"):
        load(tmp_path, "test")
    write_classes(tmp_path / "val", digits, "1")
    with pytest.raises(InputError, match="val has 4 images beside class folders such as 1/"):
        load(tmp_path, "test")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    digits[0].save(tmp_path / "train" / "0.png")
    shutil.rmtree(tmp_path / "val" / "1")
    assert load(tmp_path, "test").labels is None, "as in train/"


def test_links_that_lead_back_and_folders_named_as_images(tmp_path, digits):
    write_classes(tmp_path / "set", digits, "01")
    (tmp_path / "set" / "0").rename(tmp_path / "set" / "x.jpg")
    (tmp_path / "set" / "1" / "y.png").mkdir()
    digits[0].save(tmp_path / "set" / "1" / "y.png" / "0.png")
    for name, to in (("1/back", ".."), ("1/y.png/here", "."), ("1/self", "self"), ("1/self.png", "self.png")):
        (tmp_path / "set" / name).symlink_to(to)
    (tmp_path / "set" / "1" / "self.png").unlink()
    train, test = (load(tmp_path / "set", split) for split in ("train", "test"))
    assert train.classes == ["1", "x.jpg"] and len(train) + len(test) == 10 + 11, "each image once"
    assert {*names(train), *names(test)} >= {"0.png"} and all(image.size == (8, 8) for image in train)
    (tmp_path / "linked").mkdir()
    for c in "ab":
        (tmp_path / "linked" / c).symlink_to(tmp_path / "set" / "x.jpg")
    assert len(load(tmp_path / "linked")) == 18, "links elsewhere are followed"


def test_a_flat_folder_has_no_labels_and_extensions_have_no_case(tmp_path, digits):
    for i, end in enumerate(["jpg", "JPEG", "Png", "bmp", "webp", "TIF", "tiff", "ppm", "jfif", "gif", "pgm"]):
        digits[i].save(tmp_path / f"{i}.{end}")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._0.jpg").write_text("what macOS leaves behind")
    train, test = load(tmp_path), load(tmp_path, "test")
    assert len(train) == len(test) == 11, "nothing to test without labels, so nothing is kept from training"
    assert train.labels is None and train.classes == []
    assert all(image.size == (8, 8) for image in train)


def test_contradictory_folders(tmp_path, digits):
    with pytest.raises(InputError, match="has no images"):
        load(tmp_path)
    (tmp_path / "a").mkdir()
    digits[0].save(tmp_path / "a" / "0.png")
    with pytest.raises(InputError, match=r"has 1 image\(s\), too few"):
        load(tmp_path, "test")
    (tmp_path / "a" / "0.png").rename(tmp_path / "0.png")
    (tmp_path / "a").rmdir()
    write_classes(tmp_path, digits, "0")
    with pytest.raises(InputError, match="1 images beside class folders such as 0/"):
        load(tmp_path)
    (tmp_path / "0.png").unlink()
    (tmp_path / "0").rename(tmp_path / "train")
    with pytest.raises(InputError, match="no folder .*test for the split 'test'"):
        load(tmp_path, "test")


def test_list_files_allow_spaces_and_labels(tmp_path, digits):
    (tmp_path / "my digits").mkdir()
    for i in range(20):
        digits[i].save(tmp_path / "my digits" / f"no {i}.png")
    lines = [f"my digits/no {i}.png" for i in range(20)]
    file = tmp_path / "list.txt"
    file.write_text("\n".join(f"{line} {i % 2}" for i, line in enumerate(lines)) + "\n\n")
    train, test = load(file), load(file, "test")
    assert sorted(names(train) + names(test)) == sorted(Path(line).name for line in lines)
    assert train.classes == ["0", "1"] and test.labels.tolist() == [0, 1]
    assert all(int(name[3:-4]) % 2 == label for name, label in zip(names(train), train.labels, strict=True))
    assert (pixels(train[0]) == pixels(digits[int(names(train)[0][3:-4])])).all()

    elsewhere = tmp_path / "lists" / "unlabelled.txt"
    elsewhere.parent.mkdir()
    elsewhere.write_text("\r\n".join(lines))
    assert load(elsewhere, root=tmp_path).labels is None
    with pytest.raises(InputError, match="20 files that are not in .*first 'my digits/no 0.png'"):
        load(elsewhere)
    file.write_text(f"{lines[0]} 1\n{lines[1]}\n")
    with pytest.raises(InputError, match="1 of 2 lines end in a label"):
        load(file)
    file.write_text(" \n\n")
    with pytest.raises(InputError, match="list.txt is empty"):
        load(file)
    with pytest.raises(InputError, match="cannot be read as a list file"):
        load(tmp_path / lines[0])


def test_lists_in_a_folder_are_loaded_by_the_folder(tmp_path, digits):
    write_classes(tmp_path / "pictures", digits, "01")
    write_classes(tmp_path / "train", digits, "0", each=1)  # no reason to doubt what the lists say
    paths = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "pictures").rglob("*.png"))
    for part, lines in (("train", paths[4:]), ("val", paths[:4])):
        (tmp_path / f"{part}.txt").write_text("\n".join(f"{line} {line[9]}" for line in lines))
    for split, n in (("train", 16), ("test", 4)):
        images = load(str(tmp_path), split)
        assert len(images) == n and images.name == str(tmp_path), "a name that loads both splits, also elsewhere"
    assert load(tmp_path / "val.txt").name == str(tmp_path / "val.txt")


# Parts

def test_fraction_is_stratified_deterministic_and_nested(digits):
    tenth = load("digits", fraction=0.1)
    counts = digits.labels.bincount()
    assert (tenth.labels.bincount() - counts * 0.1).abs().max() <= 0.5
    assert (load("digits", fraction=0.0001).labels.bincount(minlength=10) == 1).all(), "no class may vanish"
    assert (tenth.items == load("digits", fraction=0.1).items).all()
    assert tenth.items.tobytes() != load("digits", fraction=0.1, seed=1).items.tobytes()
    small = {image.tobytes() for image in load("digits", fraction=0.01).items}
    assert small <= {image.tobytes() for image in tenth.items}
    assert len(load("digits", fraction=1.0)) == len(digits) and len(load("photos", fraction=0.5)) == 6
    for wrong in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"outside \(0, 1\]"):
            load("digits", fraction=wrong)


def test_a_subset_has_images_and_labels_in_the_order_asked(digits):
    some = digits.subset([9, 2, 9])
    assert some.labels.tolist() == [digits.labels[i] for i in (9, 2, 9)] == [9, 2, 9]
    assert [image.tobytes() for image in some.items] == [digits.items[i].tobytes() for i in (9, 2, 9)]


def test_fraction_by_file(tmp_path, digits):
    write_classes(tmp_path / "set" / "train", digits)
    everything = names(load(tmp_path / "set"))
    file = tmp_path / "part.txt"
    file.write_text(f"{everything[25]}\n0/{everything[3]}\n")
    part = load(tmp_path / "set", fraction=file)
    assert names(part) == [everything[3], everything[25]] and part.labels.tolist() == [0, 2]
    file.write_text(f"{everything[25]}\nn01440764_10026.JPEG\n")
    with pytest.raises(InputError, match="1 of 2 file names are not in .*n01440764_10026"):
        load(tmp_path / "set", fraction=file)
    with pytest.raises(InputError, match="2 of 2 file names are not in digits"):
        load("digits", fraction=file)
    for c in "01":
        digits[0].save(tmp_path / "set" / "train" / c / "same.png")
    file.write_text("same.png")
    with pytest.raises(InputError, match="fit several images"):
        load(tmp_path / "set", fraction=file)
    with pytest.raises(InputError, match="cannot be read as a list file"):
        load("digits", fraction=tmp_path / "absent.txt")


# What training reads

def crop(image, rng):
    x, y = rng.randrange(3), rng.randrange(3)
    large = torch.from_numpy(np.array(image.crop((x, y, x + 6, y + 6)))).permute(2, 0, 1).contiguous()
    return [large, large[:, :4, :4]]


views = SimpleNamespace(crop=crop, on_tensors=False)


def test_broken_images_are_replaced_and_marked(tmp_path, digits):
    paths = []
    for i in range(5):
        digits[i].resize((64, 64)).save(tmp_path / f"{i}.jpg")
        paths.append(f"{i}.jpg")
    whole = (tmp_path / "4.jpg").read_bytes()
    (tmp_path / "4.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "3.jpg").write_text("<html>404</html>")
    images = Images("five", "train", paths, root=tmp_path)
    for i in (3, 4):
        with pytest.raises(BrokenImage, match=f"{i}.jpg: "):
            images[i]
    loader = DataLoader(ViewSet(images, views), batch_sampler=[[(i, 7) for i in range(5)]])
    crops, index, seed, broken = next(iter(loader))
    assert broken.tolist() == [-1, -1, -1, 3, 4] and index.tolist() == [0, 1, 2, 0, 0]
    assert crops[0][3].equal(crops[0][0])
    assert crops[0][4].equal(crops[0][0]), "the search goes on at the first image"
    bad = ViewSet(images.subset([3, 4]), views)
    with pytest.raises(InputError, match="No image can be decoded from .*3.jpg .*: restore .*4.jpg: Trunc"):
        bad[(0, 1)]


def test_an_image_that_was_removed_is_replaced_but_not_a_folder(tmp_path, digits):
    images = load(write_classes(tmp_path / "set", digits, "01"))
    gone, other = Path(images.where(2)), Path(images.where(10))
    gone.unlink()
    with pytest.raises(BrokenImage, match=f"{gone.name}: .*No such file"):
        images[2]
    _, index, _, broken = ViewSet(images, views)[(2, 0)]
    assert (index, broken) == (3, 2)
    shutil.move(other.parent, tmp_path / "away")
    with pytest.raises(InputError, match=f"No image can be decoded from {other}: bring back its folder") as caught:
        ViewSet(images, views)[(10, 0)]
    assert not isinstance(caught.value, BrokenImage)
    (tmp_path / "away").rename(other.parent)
    assert ViewSet(images, views)[(10, 0)][1] == 10


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EIO, errno.ENOMEM, errno.ENOTCONN])
def test_what_the_machine_lacks_is_not_blamed_on_an_image(tmp_path, digits, monkeypatch, number):
    images = load(write_classes(tmp_path, digits, "01"))

    def fails(*args):
        raise OSError(number, "the reason")
    for where in ("sslnb.decoding.Image.open", "PIL.ImageFile.ImageFile.load"):
        with monkeypatch.context() as patch:
            patch.setattr(where, fails)
            for get in (images.__getitem__, images.pixels, lambda i: ViewSet(images, views)[(i, 0)],
                        lambda i: next_batch(iter(DataLoader(ViewSet(images, views), sampler=[(i, 0)])))):
                with pytest.raises(OSError, match=f"the reason: '{images.where(3)}'") as caught:
                    get(3)
                assert caught.value.errno == number
    assert ViewSet(images, views)[(3, 0)][1] == 3


def test_want_of_memory_is_not_blamed_on_an_image(tmp_path, digits, monkeypatch):
    images = load(write_classes(tmp_path, digits, "01"))

    def fails(*args):
        raise MemoryError
    monkeypatch.setattr(decoding, "to_rgb", fails)
    with pytest.raises(MemoryError):
        ViewSet(images, views)[(3, 0)]


def test_a_loader_process_says_what_the_machine_lacks(tmp_path, digits, monkeypatch):
    images = load(write_classes(tmp_path, digits, "01"))

    def fails(*args):
        raise OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr("sslnb.decoding.Image.open", fails)
    loader = DataLoader(ViewSet(images, views), sampler=[(3, 0)], num_workers=1, multiprocessing_context="fork")
    with pytest.raises(OSError, match=f"(?s)in DataLoader worker process.*Too many open files: '{images.where(3)}'"):
        next_batch(iter(loader))


def test_a_loader_gives_the_same_bytes_for_any_number_of_workers(digits):
    def batches(workers):
        sampler = EpochSampler(40, 8, seed=3)
        return list(DataLoader(ViewSet(digits, views), batch_sampler=sampler, num_workers=workers))

    here, there = batches(0), batches(2)
    assert len(here) == len(there) == 5
    for (crops, index, seed, broken), other in zip(here, there, strict=True):
        assert [x.shape for x in crops] == [(8, 3, 6, 6), (8, 3, 4, 4)] and crops[0].dtype == torch.uint8
        assert index.dtype == seed.dtype == torch.int64 and (broken == -1).all()
        assert all(a.equal(b) for a, b in zip(crops, other[0], strict=True))
        assert index.equal(other[1]) and seed.equal(other[2])
    assert crops[0][0].equal(crop(digits[int(index[0])], random.Random(int(seed[0])))[0])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_what_one_process_with_the_whole_batch_sees(world):
    alone = list(EpochSampler(50, 8, seed=5))
    ranks = [list(EpochSampler(50, 8 // world, rank=r, world=world, seed=5)) for r in range(world)]
    together = [[pair for part in step for pair in part] for step in zip(*ranks, strict=True)]
    assert together == alone and len(alone) == 6
    assert len({index for step in alone for index, _ in step}) == 48, "no image twice in an epoch"


def test_processes_share_what_is_tested(digits):
    ranks = [in_order(digits.subset(range(11)), views, 3, 0, rank, 2) for rank in range(2)]
    assert [[index.tolist() for _, index, _, _ in rank] for rank in ranks] == [[[0, 2, 4], [6, 8, 10]],
                                                                               [[1, 3, 5], [7, 9]]]


def test_epochs_differ_and_a_resumed_epoch_is_the_tail():
    sampler = EpochSampler(50, 8)
    first = list(sampler)
    sampler.set_position(1, 0)
    second = list(sampler)
    assert [i for step in first for i, _ in step] != [i for step in second for i, _ in step]
    sampler.set_position(1, 4)
    assert list(sampler) == second[4:] and len(sampler) == 2
    assert list(EpochSampler(50, 8, seed=1)) != first


def test_seeds_depend_on_seed_epoch_and_index_only():
    for batch, world in ((8, 1), (5, 2)):
        sampler = EpochSampler(50, batch, world=world, seed=2)
        sampler.set_position(3, 1)
        assert all(seed == draw_seed(2, 3, index) for step in sampler for index, seed in step)
    drawn = {draw_seed(s, e, i) for s in range(5) for e in range(5) for i in range(40)}
    assert len(drawn) == 1000 and all(0 <= seed < 2**62 for seed in drawn)
    assert draw_seed(0, 0, 0) == 1941451862642788776, "runs of earlier versions must stay resumable"


def test_an_image_that_an_order_has_several_times_is_shown_in_other_views():
    def steps(epoch=0, step=0, batch=8, **of):
        sampler = EpochSampler(50, batch, seed=5, **of)
        sampler.set_position(epoch, step, [7] * 50)
        return list(sampler)

    alone, ranks = steps(), [steps(batch=4, rank=rank, world=2) for rank in range(2)]
    assert {index for step in alone for index, _ in step} == {7}
    assert len({seed for part in (alone, steps(epoch=1)) for step in part for _, seed in step}) == 96
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone and steps(step=4) == alone[4:]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(InputError, match=r"larger than the data: 30 on 2 process\(es\) are 60 images.*50"):
        EpochSampler(50, 30, world=2)


def test_a_folder_that_is_called_like_a_set_of_ours_is_asked_about(tmp_path, digits, monkeypatch):
    write_classes(tmp_path / "photos", digits, "01")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="'photos' is a set of ours and a folder here; write './photos'"):
        load("photos")
    assert len(load("./photos")) == len(load(Path("photos"))) == 18 and len(load("digits_scattered")) == 1300


def test_the_first_images_that_can_be_read(tmp_path, digits):
    images = load(write_classes(tmp_path / "set", digits, "01"))
    Path(images.where(1)).write_text("no image")
    assert len(images.first(2)) == 2 and len(images.first(99)) == len(images) - 1
    assert images.first(2)[1].tobytes() == images[2].tobytes()


def test_what_this_user_may_not_read_is_named(tmp_path, monkeypatch):
    def closed(*_):
        raise PermissionError(13, "Permission denied", f"{tmp_path}/private")

    monkeypatch.setattr(data, "_find", closed)
    with pytest.raises(InputError, match="pics cannot be read by this user .Permission denied: .*/private.; change"):
        load("pics")


def test_archives_are_to_be_unpacked(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in ("shards/0.tar", "all.tar"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00 no text")
    with pytest.raises(InputError, match="has no images .*unpack archives such as .tar"):
        load(tmp_path / "shards")
    with pytest.raises(InputError, match="cannot be read as a list file.*Unpack it, and give the folder."):
        load(tmp_path / "all.tar")
