"""Memory and growth: time against the number of images, long folders and their kept lists, memory against the batch.

The slow tests use a million images, or processes of their own.
"""

import json
import math
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import measured
from torch.profiler import ProfilerActivity, profile

from sslnb import bench, clustering, data, folders, methods
from sslnb.bench_steps import training_step
from sslnb.evaluate.knn import weighted_knn
from sslnb.monitor import Monitor
from sslnb.parts import MemoryBank, in_groups
from sslnb.reading import EpochSampler


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test writes into the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sslnb"


# ---------------------------------------------------------------- time against the number of images


def least_times(make, sizes, rounds: int = 5) -> dict[int, float]:
    """Seconds of make(n)() for each n: of the processor, which others on the machine do not lengthen; the least of some
    rounds in turns."""
    calls, least = {n: make(n) for n in sizes}, dict.fromkeys(sizes, math.inf)
    for _ in range(rounds):
        for n, call in calls.items():
            start = time.process_time()
            call()
            least[n] = min(least[n], time.process_time() - start)
    return least


def power(least: dict[int, float]) -> float:
    """By which power of n does the time grow? 0: not at all, 1: in proportion, 2: with the square."""
    (small, fast), (large, slow) = least.items()
    return math.log(slow / fast) / math.log(large / small)


def often(call, times: int = 100):
    return lambda: [call() for _ in range(times)]


def images(n: int, each: int = 20) -> data.Images:
    """n image files that are not there, in class folders of `each`: so there are more classes the more images."""
    files = [b"%07d/%07d.jpg" % (i // each, i) for i in range(n)]
    return data.Images("many", "train", np.array(files), root=Path("/nowhere"), labels=np.arange(n) // each)


def demo(method: str, n: int, **numbers):
    return methods.recipes(method)["demo"].with_(images=n, **numbers).build().train()


def bank_update(n):
    bank, index, f = MemoryBank(n, 4, 0.5), torch.randint(n, (64,)), torch.randn(64, 4)
    return often(lambda: bank.update(index, f))


def npid_loss(n):
    """NPID compares 8 images with all others"""
    npid, index, f = demo("npid", n, dim=16), torch.randint(n, (8,)), torch.randn(8, 16)
    return lambda: npid.loss(f, torch.cat([index[:, None], npid.others(index)], 1))


def odc_remember(n):
    odc, index, f = demo("odc", n, dim=4), torch.randint(n, (64,)), torch.randn(64, 4)
    return often(lambda: odc.remember(index, f))


def odc_upkeep(n):
    """ODC's clusters after a step, ten steps"""
    odc = demo("odc", n, dim=16)
    return often(lambda: odc.after_step(0.5), 10)


def odc_repair(n):
    """ODC splits clusters for three empty ones"""
    odc = demo("odc", n, dim=8)
    lost = torch.where(odc.labels < 3, 24, odc.labels)  # three of 25 clusters are empty

    def repair():
        odc.labels.copy_(lost)
        odc.sizes.copy_(lost.bincount(minlength=25))
        odc.repair()
    return repair


def k_means(n):
    """k-means, 20 clusters, 3 rounds"""
    x = torch.randn(n, 8)
    return lambda: clustering.kmeans(x, 20, iterations=3)


def whiten(n):
    """PCA and whitening before it"""
    x = torch.randn(n, 32)
    return lambda: clustering.whiten(x, 8)


def evenly(n):
    """DeepCluster's order, all clusters equally often"""
    labels = torch.randint(n // 20, (n,))
    return lambda: clustering.evenly(labels, 0)


def collapsed(n):
    """k-means after all images fell into one cluster"""
    centroids, counts = torch.randn(n // 50, 8), torch.zeros(n // 50, dtype=torch.int64)
    counts[0] = 10**9
    return lambda: clustering._fill_empty(centroids, counts)


def neighbours(bank, tests):
    x, y = torch.randn(bank, 16), torch.randint(10, (bank,))
    queries, labels = torch.randn(tests, 16), torch.randint(10, (tests,))
    return lambda: weighted_knn(x, y, queries, labels)


def resume(n):
    """a run goes on in the middle of an epoch"""
    sampler = EpochSampler(n, 64)

    def seek():
        sampler.set_position(3, len(sampler) // 2)
        next(iter(sampler))
    return seek


def resume_with_order(n):
    sampler, order = EpochSampler(n, 64), np.random.RandomState(0).permutation(n)

    def seek():
        sampler.set_position(3, 10, order)
        next(iter(sampler))
    return often(seek)


def epoch(n):
    """the numbers of all batches of an epoch"""
    sampler = EpochSampler(n, 64)
    return lambda: sum(len(batch) for batch in sampler)


def monitor(n):
    """the monitor chooses its images"""
    many, recipe = images(n), methods.recipes("simclr")["demo"]
    return lambda: Monitor(None, many, None, recipe)


def fraction(n):
    """a tenth of every class is drawn"""
    many = images(n)
    return lambda: many.subset(data._draw(many, 0.1, 0))


def parted(n):
    """a tenth of every class is held out"""
    many = images(n)
    return lambda: data.parted(many, 0.1)


def named(n, tmp_path):
    """the images that a list of a tenth of them names"""
    many, file = images(n), tmp_path / f"{n}.txt"
    file.write_text("\n".join(f"{i:07d}.jpg" for i in range(0, n, 10)))
    return lambda: data._named_in(many, file)


def classes(n, tmp_path):
    """the images of every second class"""
    many, file = images(n, 10), tmp_path / f"{n}.txt"
    many.classes = [str(i) for i in range(n // 10)]
    file.write_text("\n".join(many.classes[::2]))
    return lambda: data._only_classes(many, file)


CONSTANT = [bank_update, odc_remember, resume_with_order]
# The docstrings of these are the first column of the README's table.
LINEAR = [npid_loss, odc_upkeep, odc_repair, k_means, whiten, evenly, collapsed, resume, epoch, monitor, fraction,
          parted]


@pytest.mark.parametrize("make", CONSTANT)
def test_a_step_takes_no_longer_with_four_hundred_times_the_images(make):
    assert power(least_times(make, (5_000, 2_000_000))) < 0.3  # measured: 0 to 0.15: a large memory is not in the cache


def check_linear(make, small, large, rounds=5, most=1.3, name=""):  # measured: 0.6 to 1.0, and to 1.1 for a million
    least = least_times(make, (small, large), rounds)
    if name:
        times = " | ".join(f"{1000 * seconds:.3g} ms" for seconds in least.values())
        print(f"DEMO | {name} | {times} | {power(least):.2f} |")
    assert power(least) < most, f"time grows with the power {power(least):.2f} of the number of images"


@pytest.mark.parametrize("make", LINEAR)
def test_time_is_linear(make):
    check_linear(make, 5_000, 100_000)


def test_neighbours_and_lists_are_linear(tmp_path):
    check_linear(lambda n: neighbours(n, 20), 5_000, 100_000)
    check_linear(lambda n: neighbours(500, n), 500, 10_000)
    for make in (named, classes):
        check_linear(lambda n, make=make: make(n, tmp_path), 5_000, 50_000)


@pytest.mark.slow
@pytest.mark.parametrize("make", LINEAR)
def test_time_is_linear_up_to_a_million(make):
    check_linear(make, 50_000, 1_000_000, 3, 1.5, make.__doc__)


@pytest.mark.slow
def test_neighbours_and_lists_are_linear_up_to_a_million(tmp_path):
    check_linear(lambda n: neighbours(n, 20), 50_000, 1_000_000, 3, 1.5, "the nearest neighbours of 20 images, for kNN")
    for make in (named, classes):
        check_linear(lambda n, make=make: make(n, tmp_path), 50_000, 1_000_000, 3, 1.5, make.__doc__)


def test_parts_are_drawn_as_class_by_class():
    rng = np.random.RandomState(0)
    for seed in range(20):
        labels = rng.randint(-1, 12, rng.randint(1, 150))
        many = data.Images("some", "train", np.zeros((len(labels), 2, 2), np.uint8), labels=labels)
        draws, drawn = np.random.RandomState(seed), []
        for c in sorted(set(labels)):
            members = draws.permutation([i for i, label in enumerate(labels) if label == c])
            drawn += members[:max(1, round(0.3 * len(members)))].tolist()
        assert data._draw(many, 0.3, seed).tolist() == sorted(drawn)
        assert data._others(np.array(drawn), len(labels)).tolist() == sorted(set(range(len(labels))) - set(drawn))


# ---------------------------------------------------------------- long folders


def write_folder(root: Path, classes: int, each: int) -> Path:
    """Class folders of empty files; those of a class are one file with many names, which is quicker."""
    for c in range(classes):
        (root / f"c{c:04d}").mkdir(parents=True)
        first = root / f"c{c:04d}" / "0000.jpg"
        first.touch()
        for i in range(1, each):
            os.link(first, first.with_name(f"{i:04d}.jpg"))
    return root


def test_listing_a_folder_is_linear(tmp_path):
    """In class folders, in one folder, and named in a file."""
    for n in (500, 10_000):
        write_folder(tmp_path / f"{n}", n // 20, 20)
        write_folder(tmp_path / f"flat{n}", 1, n)
        (tmp_path / f"{n}.txt").write_text("\n".join(f"{n}/c{i // 20:04d}/{i % 20:04d}.jpg 1" for i in range(n)))
    for name in ("{}", "flat{}/c0000", "{}.txt"):
        check_linear(lambda n, name=name: lambda: data.load(tmp_path / name.format(n)), 500, 10_000)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three classes of four images, long enough to be kept, and old enough."""
    monkeypatch.setattr(folders, "LONG", 5)
    monkeypatch.setattr(folders, "SETTLED", -10**12)
    return write_folder(tmp_path / "set", 3, 4)


def load(folder, monkeypatch) -> tuple[list[str], int]:
    """What is loaded, both splits, and how many folders had to be read for it."""
    read, scandir = [], os.scandir
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda path: read.append(path) or scandir(path))
        found = [data.load(folder, split) for split in ("train", "test")]
    files = sorted(f"{f.where(i)} {f.classes[f.labels[i]]}" for f in found for i in range(len(f)))
    return [os.path.relpath(file, folder) for file in files], len(read)


def truth(folder) -> list[str]:
    return sorted(f"{path.relative_to(folder)} {path.relative_to(folder).parts[0]}" for path in folder.rglob("*.jpg"))


def test_a_long_folder_is_read_once(folder, monkeypatch, cache):
    first, read = load(folder, monkeypatch)
    assert read > 0 and len(list(cache.iterdir())) == 1
    again, read = load(folder, monkeypatch)
    assert again == first == truth(folder) and read == 0


def test_a_flat_folder_is_read_once(tmp_path, folder, monkeypatch):
    flat = folder / "c0001"
    monkeypatch.setattr(folders, "LONG", 3)
    first = data.load(flat)
    monkeypatch.setattr(os, "scandir", None)
    again = data.load(flat)
    assert again.labels is None and (again.items == first.items).all() and len(again) == 4


def test_the_parts_of_a_set_are_read_once(tmp_path, folder, monkeypatch):
    for part in ("train", "val"):
        shutil.copytree(folder, tmp_path / "split" / part)
    first = [data.load(tmp_path / "split", part) for part in ("train", "test")]
    monkeypatch.setattr(folders, "_walk", None)
    again = [data.load(tmp_path / "split", part) for part in ("train", "test")]
    for one, other in zip(first, again, strict=True):
        assert len(one) == 12 and (one.items == other.items).all() and one.labels.equal(other.labels)


def add(folder):
    (folder / "c0001" / "new.png.jpg").touch()


def remove(folder):
    (folder / "c0001" / "0002.jpg").unlink()


def rename(folder):
    (folder / "c0001" / "0002.jpg").rename(folder / "c0001" / "other.jpg")


def move(folder):
    (folder / "c0001" / "0002.jpg").rename(folder / "c0002" / "moved.jpg")


def add_class(folder):
    (folder / "c0009").mkdir()
    for i in range(3):
        (folder / "c0009" / f"{i}.jpg").touch()


def remove_class(folder):
    shutil.rmtree(folder / "c0000")


def rename_class(folder):
    (folder / "c0000").rename(folder / "d")


def add_below(folder):
    (folder / "c0000" / "deep" / "er" / "new.jpg").touch()


def add_as_rsync(folder):
    """Copying programs give a folder the time of its original, whenever they came to it."""
    was = os.stat(folder / "c0001").st_mtime_ns
    add(folder)
    os.utime(folder / "c0001", ns=(was, was))


@pytest.mark.parametrize("change", [add, remove, rename, move, add_class, remove_class, rename_class, add_below,
                                    add_as_rsync])
def test_a_changed_folder_is_read_again(folder, monkeypatch, change):
    (folder / "c0000" / "deep" / "er").mkdir(parents=True)
    load(folder, monkeypatch)
    time.sleep(0.03)  # what `SETTLED` is for: clocks of file systems tick every few milliseconds
    change(folder)
    found, read = load(folder, monkeypatch)
    assert found == truth(folder) and read > 0
    assert load(folder, monkeypatch) == (found, 0), "and what was read is kept"


def test_a_folder_that_changed_just_now_is_not_kept(folder, monkeypatch, cache):
    """Its next change might come within the same tick of the file system's clock, and would not show."""
    monkeypatch.setattr(folders, "SETTLED", 3 * 10**9)
    load(folder, monkeypatch)
    assert not cache.exists()


def test_small_folders_leave_nothing_behind(folder, monkeypatch, cache):
    monkeypatch.setattr(folders, "LONG", 12)
    load(folder, monkeypatch)
    assert not cache.exists()


def test_a_layout_is_found_though_a_list_is_kept(folder, tmp_path, monkeypatch):
    """A list that was kept for the part of a larger set is used for it alone, with what its own folders mean."""
    for part in ("train", "val"):
        write_folder(tmp_path / "outer" / "train" / part, 2, 3)
    outer = data.load(tmp_path / "outer")
    assert outer.classes == ["train", "val"]
    assert data.load(tmp_path / "outer" / "train").classes == ["c0000", "c0001"]


def test_damaged_and_foreign_lists_are_replaced(folder, tmp_path, monkeypatch, cache):
    expected, _ = load(folder, monkeypatch)
    (place,) = cache.iterdir()
    whole = place.read_bytes()
    write_folder(tmp_path / "other", 2, 7)
    load(tmp_path / "other", monkeypatch)
    (foreign,) = set(cache.iterdir()) - {place}
    np.savez(tmp_path / "arrays.npz", files=np.arange(3))
    for content in (b"", b"no archive", whole[:len(whole) // 2], pickle.dumps([1, 2]), foreign.read_bytes(),
                    (tmp_path / "arrays.npz").read_bytes()):
        place.write_bytes(content)
        found, read = load(folder, monkeypatch)
        assert found == expected and read > 0 and load(folder, monkeypatch) == (expected, 0)
    for i in range(0, len(whole), 23):
        place.write_bytes(whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1:])
        assert load(folder, monkeypatch)[0] == expected, f"byte {i}"


def test_without_a_place_to_write_it_goes_on(folder, tmp_path, monkeypatch, cache):
    expected, _ = load(folder, monkeypatch)
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert load(folder, monkeypatch)[0] == expected
    with monkeypatch.context() as patch:
        patch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
        assert len(folders.listing(folder).files) == 12

    def full(path, **arrays):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")
    (place,) = cache.iterdir()
    place.unlink()
    monkeypatch.setattr(np, "savez", full)
    assert load(folder, monkeypatch)[0] == expected and list(cache.iterdir()) == []


def list_often(folder):
    for _ in range(30):
        assert len(folders.listing(folder).files) == 12
        folders._place(folder).unlink(missing_ok=True)


def test_processes_that_list_at_once_do_not_disturb_each_other(folder, cache):
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=list_often, args=(folder,)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    folders.listing(folder)
    assert len(list(cache.iterdir())) == 1 and folders.kept(folder) is not None


LONG_FOLDER = """
import pickle, sys, time
from sslnb import data

start, times = peak(), []
for _ in range(3):
    began = time.process_time()
    images = data.load(sys.argv[1])
    times.append(time.process_time() - began)
print(times[0], min(times[1:]), len(images), peak() - start, len(pickle.dumps(images)))
"""


@pytest.mark.slow
def test_a_folder_of_128_000_images(tmp_path):
    """Mostly the time of the system, which reads folders; on a network disk it is minutes against a second."""
    write_folder(tmp_path / "set", 128, 1000)
    time.sleep(folders.SETTLED / 1e9)
    try:
        code = f"import sys; sys.argv.append({str(tmp_path / 'set')!r}); sys.path.insert(0, '')\n" + LONG_FOLDER
        first, again, n, held, sent = measured(code)
    finally:
        shutil.rmtree(tmp_path / "set")
    print(f"DEMO a folder of 128,000 images: {first:.2f} s the first time, {again:.3f} s from the kept list, "
          f"{1000 * held:.0f} MB; {sent / n:.0f} bytes an image for every worker")
    assert n == 128_000 - 12_800 and again < first / 4
    assert held < 0.1 and sent < 60 * n


# ---------------------------------------------------------------- memory


WIDE = """
import numpy as np, torch
from sslnb.data import Images
from sslnb.evaluate.features import extract

class Wide(torch.nn.Module):
    def forward(self, x):
        return x.mean((1, 2, 3))[:, None].expand(-1, 2048)

images = Images("grey", "train", np.zeros((60_000, 4, 4), np.uint8))
extract(Wide(), images.subset(range(300)), size=4)
start = peak()
print(extract(Wide(), images, size=4).x.numel() * 4e-9, peak() - start)
"""


@pytest.mark.slow
def test_features_of_many_images_are_there_once():
    features, held = measured(WIDE)
    assert held < 1.2 * features


def step_of(method: str, batch: int):
    recipe = methods.recipes(method)["demo"].with_(batch=batch)
    return training_step(recipe.with_(queue=1024) if "queue" in recipe.numbers else recipe)


def blocks(call, file: Path) -> list[int]:
    """Bytes of every block of memory that torch takes (positive) or gives back (negative) meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    found.export_chrome_trace(str(file))
    return [e["args"]["Bytes"] for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]


# Bytes for every pair of images that the loss needs: some B x B tables of float32 (SimCLR: 2B x 2B). Masks are drawn at
# random, and what two methods take hangs on them a little.
PAIRS = {"simclr": 130, "mocov3": 60, "barlowtwins": 24, "maskfeat": 250, "cae": 250}


@pytest.mark.parametrize("method", methods.METHODS)
def test_memory_is_linear_in_the_batch(method, tmp_path, monkeypatch):
    """Everything that a step takes is a + b B + c B², exactly, so three batches tell c. On a CPU: a GPU's libraries
    choose workspaces as they please."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    taken = []
    for batch in (16, 32, 64):
        torch.manual_seed(0)
        step = step_of(method, batch)
        taken.append(sum(n for n in blocks(step, tmp_path / "trace.json") if n > 0))
    c = (taken[2] - 3 * taken[1] + 2 * taken[0]) / (6 * 16**2)
    assert abs(c) <= PAIRS.get(method, 8), f"{c:.1f} bytes for every pair of images"


def test_barlow_twins_needs_no_memory_for_pairs_of_outputs(tmp_path):
    """d x d correlations of 8192 outputs would be 268 MB, and as much for each gradient on the way."""
    taken = []
    for dim in (64, 128, 256):
        recipe = methods.recipes("barlowtwins")["demo"].with_(batch=16, dim=dim)
        step = training_step(recipe)
        taken.append(sum(n for n in blocks(step, tmp_path / "trace.json") if n > 0))
    assert abs(taken[2] - 3 * taken[1] + 2 * taken[0]) / (6 * 64**2) < 4


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_groups_are_those_of_tensor_split(parts):
    x = torch.randn(20, 3, requires_grad=True)
    mine, theirs = in_groups(x, -(-20 // parts)), x.tensor_split(parts)
    assert all(a.equal(b) for a, b in zip(mine, theirs, strict=True))
    weights = [torch.randn_like(part) for part in theirs]
    losses = [sum((part * w).sum() for part, w in zip(groups, weights)) for groups in (mine, theirs)]
    assert torch.autograd.grad(losses[0], x)[0].equal(torch.autograd.grad(losses[1], x)[0])


def test_the_line_through_peaks():
    per_image, fixed = bench.Memory({16: 1_160, 32: 1_320, 64: 1_640}).line
    assert (per_image, fixed) == (pytest.approx(10), pytest.approx(1_000))


@pytest.mark.slow
def test_a_step_is_weighed_where_torch_uses_several_threads():
    """In forks, which have none of them: they must not wait for one."""
    code = ("from sslnb import bench, methods; recipe = methods.recipes('simclr')['demo']; "
            "print(*bench.memory({'simclr': recipe}, (16, 32))['simclr'].peaks.values())")
    found = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "2"}, text=True,
                           capture_output=True, timeout=120)
    assert found.returncode == 0 and len(found.stdout.split()) == 2, found.stderr


@pytest.mark.slow
def test_the_memory_of_a_process_is_linear_in_the_batch():
    recipes = {name: methods.recipes(name)["demo"] for name in ("rotation", "simclr", "mae")}
    for name, found in bench.memory(recipes, (32, 64, 128)).items():
        per_image, fixed = found.line
        print(f"DEMO {name}: {per_image / 1e6:.2f} MB per image and {fixed / 1e6:.0f} MB")
        assert list(found.peaks) == [32, 64, 128] and per_image > 1e5 and fixed > 1e6
        assert all(abs(per_image * b + fixed - peak) < 0.03 * peak for b, peak in found.peaks.items())


RSS = """
import ctypes
from sslnb import methods
from sslnb.bench_steps import training_step

def rss():
    ctypes.CDLL(None).malloc_trim(0)  # else a leak goes unseen into what was freed before, and fragments look like one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1e3
"""

LEAKS = """
for name in ["simclr", *methods.METHODS]:  # the first one warms up
    step = training_step(methods.recipes(name)["demo"].with_(batch=32))
    for _ in range(10):
        step()
    before = rss()
    for _ in range(20):
        step()
    print(rss() - before)
"""

LEAKS_OF_TRAINING = """
import contextlib, io, tempfile
from sslnb import pretrain, train

held, step = {}, train.Trainer._step

def noted(self, *args):
    out = step(self, *args)
    held[self.step] = rss()
    return out

train.Trainer._step = noted
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    recipe = methods.recipes("npid")["demo"].with_(batch=32, epochs=9)
    pretrain(recipe, out=folder + "/run")
print(len(held), held[len(held)] - held[len(held) // 3])
"""


@pytest.mark.slow
def test_nothing_grows_with_the_number_of_steps():
    for name, grown in zip(methods.METHODS, measured(RSS + LEAKS)[1:], strict=True):
        assert grown < 1, f"{name} holds {grown:.1f} MB more after 30 steps than after 10"


@pytest.mark.slow
def test_nothing_grows_as_training_goes_on():
    steps, grown = measured(RSS + LEAKS_OF_TRAINING)
    assert steps == 360 and grown < 2
