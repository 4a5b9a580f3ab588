"""Barlow Twins: the correlation matrix by hand, its two terms without it, learning rates of vectors, the zoo's rows."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_distributed import leave
from torch import nn

from sslnb import optim
from sslnb.errors import InputError
from sslnb.methods.barlowtwins import RECIPES, BarlowTwins
from sslnb.views import Blur, ColorJitter, Greyscale, HorizontalFlip, RandomResizedCrop, Solarize

ZOO, CHECKPOINT, OFFICIAL = (RECIPES[name] for name in (
    "r50_8xb64_accu4_cos_lr1_6_ep300", "r50_8xb256_cos_lr1_6_fp16_ep300", "r50_16xb128_cos_lr1_6_fp16_ep1000"))


class Given(nn.Module):
    """A backbone whose features are its input."""

    num_features = 4

    def forward(self, x):
        return x


def small(dim=4, **numbers):
    """Barlow Twins whose projector does nothing, so that z is what we say it is."""
    method = BarlowTwins(Given(), hidden_dim=4, dim=dim, **numbers)
    method.projector = nn.Sequential()
    return method


def matrix(z1, z2):
    """C as the paper has it."""
    a, b = (nn.functional.batch_norm(z, None, None, training=True) for z in (z1, z2))
    return a.T @ b / len(z1)


def by_definition(c):
    return (1 - c.diagonal()).square().sum(), c.square().sum() - c.diagonal().square().sum()


# The matrix and its terms

def standardised(column):
    mean = sum(column) / len(column)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in column) / len(column) + 1e-5)
    return [(v - mean) / deviation for v in column]


@pytest.mark.parametrize("images, lambd", [(5, 0.0051), (3, 0.5), (9, 0.0)])
def test_matrix_and_loss_are_the_papers_sums(images, lambd):
    z = [torch.randn(images, 4) * 3 + 1 for _ in range(2)]
    a, b = ([standardised(column) for column in x.T.tolist()] for x in z)
    c = [[sum(a[i][n] * b[j][n] for n in range(images)) / images for j in range(4)] for i in range(4)]
    invariance = sum((1 - c[i][i]) ** 2 for i in range(4))
    redundancy = sum(c[i][j] ** 2 for i in range(4) for j in range(4) if i != j)
    method = small(lambd=lambd)
    out = method(z)
    assert torch.allclose(method.snapshot([])["correlation"], torch.tensor(c), atol=1e-5)
    assert out["invariance"].item() == pytest.approx(invariance, rel=1e-4)
    assert out["redundancy"].item() == pytest.approx(redundancy, rel=1e-4)
    assert out["loss"].item() == pytest.approx(invariance + lambd * redundancy, rel=1e-4)


def test_rows_are_view_one_and_columns_view_two():
    z1 = torch.randn(2000, 4)
    z2 = z1[:, [1, 0, 2, 3]] * torch.tensor([5.0, 5, 5, -5]) + 7  # outputs swapped, stretched, shifted, one reversed
    z2[:, 2] = torch.randn(2000)
    method = small()
    method([z1, z2])
    assert method.snapshot([])["correlation"][0].round(decimals=1).tolist() == [0, 1, 0, 0]
    z2[:, 0] = 0.0
    method([z1, z2])
    assert method.snapshot([])["correlation"][1].abs().max() < 0.1, "a constant output correlates with nothing"


def test_the_loss_of_known_networks():
    d, signs = 6, torch.ones(1, 1)
    for _ in range(3):
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])  # Hadamard's matrix
    six = 1000 * signs[:, 1:7]  # six outputs for eight images, of mean 0, orthogonal; beside them 1e-5 is nothing
    one, zero = six[:, :1].repeat(1, d), torch.zeros(8, d)
    for z1, z2, expected in ((six, six, (0, 0)), (six, -six, (4 * d, 0)), (six, zero, (d, 0)),
                             (one, one, (0, d * (d - 1)))):
        assert [v.item() for v in small(d).terms(z1, z2)] == pytest.approx(list(expected), abs=1e-5)


@pytest.mark.parametrize("images, dim", [(6, 40), (40, 6), (16, 16)])
def test_the_matrix_need_not_be_made(images, dim):
    """Both terms and their gradients, from products of images: more outputs than images, fewer, as many."""
    z = [torch.randn(images, dim, requires_grad=True) for _ in range(2)]
    for ours, theirs in zip(small(dim).terms(*z), by_definition(matrix(*z)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5)
        for a, b in zip(*(torch.autograd.grad(term, z, retain_graph=True) for term in (ours, theirs))):
            assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item())


def test_the_terms_stay_in_full_precision_under_autocast():
    z = [torch.randn(64, 4) for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = small().terms(*z)
    assert all(a.dtype == torch.float32 and a.equal(b) for a, b in zip(inside, small().terms(*z)))
    large = torch.randn(64, 400, dtype=torch.float16) * 1000  # products of images overflow in half precision
    assert all(v.isfinite() for v in small(400).terms(large, large))


def test_the_projector_sees_one_view_after_the_other():
    """Its products take both views at once; statistics, running ones too, are those of each."""
    method, h = RECIPES["demo"].build(), [torch.randn(8, 64) + i for i in range(2)]
    one = copy.deepcopy(method.projector)
    z = method.project(torch.cat(h))
    assert torch.allclose(z, torch.cat([one(x) for x in h]), atol=1e-5)
    for ours, theirs in zip(method.projector.buffers(), one.buffers()):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_both_views_use_one_norm_that_cannot_scale():
    method = RECIPES["demo"].build()
    assert not method.norm.affine and not [name for name, _ in method.named_parameters() if name.startswith("norm")]
    method([torch.randn(8, 3, 20, 20) for _ in range(2)])
    assert method.norm.num_batches_tracked == 2 and method.projector[1].num_batches_tracked == 2


def test_a_snapshot_is_the_correlation_of_the_latest_batch():
    method = small(dim=4)
    assert method.snapshot([]) == {}
    z = [torch.randn(16, 4) for _ in range(2)]
    method(z)
    assert torch.allclose(method.eval().snapshot([])["correlation"], matrix(*z), atol=1e-6)
    wide = small(dim=100)
    wide([torch.randn(16, 100) for _ in range(2)])
    assert wide.snapshot([])["correlation"].shape == (64, 64)


# The real model

@pytest.mark.parametrize("recipe", [ZOO, CHECKPOINT, OFFICIAL], ids=lambda r: r.name)
def test_the_imagenet_rows_build_the_real_model(recipe):
    with torch.device("meta"):
        method = recipe.build()
        z1 = method.projector(method.backbone(torch.zeros(2, 3, 224, 224)))
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in method.named_children()} == {
        "backbone": 23_508_032, "projector": 151_027_712, "norm": 0}
    assert z1.shape == (2, 8192)
    assert [type(layer).__name__ for layer in method.projector] == [*["Linear", "BatchNorm1d", "ReLU"] * 2, "Linear"]
    assert not [name for name, _ in method.projector.named_parameters() if name in ("0.bias", "3.bias", "6.bias")]


def test_views_are_those_of_byol_one_always_blurred_one_sometimes_solarized():
    first, second = CHECKPOINT.with_(backbone="resnet18", hidden_dim=8, dim=8).build().views(224).views
    for view, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        ops = {type(op): op for op in (*view.image_ops, *view.batch_ops)}
        assert ops[RandomResizedCrop] == RandomResizedCrop(224, (0.08, 1.0), interpolation="bicubic")
        assert ops[HorizontalFlip].p == 0.5 and ops[Greyscale].p == 0.2
        assert ops[ColorJitter] == ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8)
        assert (ops[Blur].p, ops[Solarize].p, ops[Blur].sigma) == (blur, solarize, (0.1, 2.0))


# Optimisation

@pytest.mark.parametrize("recipe, gpus, batch, accum, epochs", [
    (ZOO, 8, 64, 4, 300), (CHECKPOINT, 8, 256, 1, 300), (OFFICIAL, 16, 128, 1, 1000)],
    ids=lambda v: getattr(v, "name", v))
def test_the_rows_of_the_zoo(recipe, gpus, batch, accum, epochs):
    assert (recipe.gpus, recipe.batch, recipe.accum, recipe.epochs) == (gpus, batch, accum, epochs)
    assert recipe.total_batch == 2048 and recipe.precision == "fp16" and recipe.optimizer == "lars"
    assert recipe.lr == 0.2 * 2048 / 256 and recipe.weight_decay == 1e-6 and recipe.warmup_epochs == 10
    method = recipe.with_(backbone="resnet18", hidden_dim=8, dim=8).build()
    assert method.lambd == 0.0051
    optimizer, steps = optim.build(method.param_groups(recipe), recipe), 625
    for step, share in ((0, 0.0), (5 * steps, 0.5), (10 * steps, 1.0), (epochs * steps, 1e-3)):
        optim.set_lr(optimizer, recipe.lr_at(step, steps))
        matrices, vectors = (group["lr"] for group in optimizer.param_groups)
        assert matrices == pytest.approx(1.6 * share) and vectors == pytest.approx(0.0048 * 2048 / 256 / gpus * share)


def test_vectors_are_not_adapted_not_decayed_and_have_their_own_rate():
    recipe = RECIPES["demo"].with_(optimizer="lars", lr=2.0, weight_decay=0.1, vector_lr=0.024)
    method = recipe.build()
    optimizer = optim.build(method.param_groups(recipe), recipe)
    optim.set_lr(optimizer, 2.0)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    method([torch.randn(8, 3, 20, 20) for _ in range(2)])["loss"].backward()
    gradient = {name: p.grad.clone() for name, p in method.named_parameters()}  # LARS overwrites it
    optimizer.step()
    for name, p in method.named_parameters():
        if p.ndim <= 1:
            expected = before[name] - 2.0 * 0.024 * gradient[name]
        else:
            g = gradient[name] + 0.1 * before[name]
            expected = before[name] - 2.0 * 1e-3 * before[name].norm() / g.norm() * g
        assert torch.allclose(p, expected, atol=1e-6), name


def test_only_the_zoos_own_file_accumulates():
    assert ZOO.force_accum and ZOO.on(8, 64).accum == 4 and "512 images" in ZOO.note
    assert (CHECKPOINT.on(4).batch, CHECKPOINT.on(4).accum) == (512, 1)
    with pytest.raises(InputError, match="barlowtwins must not accumulate"):
        CHECKPOINT.on(8, 64)


def test_accumulating_is_another_loss():
    z = [torch.randn(32, 4) for _ in range(2)]
    whole = small()(z)["loss"]
    parts = torch.stack([small()([x[i::4] for x in z])["loss"] for i in range(4)]).mean()
    assert parts > 1.05 * whole, "C of few images is noisier, and its noise is squared"


# Several processes: what the docstring says of the official code

def all_reduce_worker(rank, world, store, x, weight, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    layer = nn.Linear(6, 4, bias=False)
    layer.weight.data.copy_(weight)
    model = nn.parallel.DistributedDataParallel(layer)
    z1, z2 = (model(v.chunk(world)[rank]) for v in x)
    c = z1.T @ z2 / len(x[0])
    dist.all_reduce(c.data)  # autograd does not see it
    invariance, redundancy = by_definition(c)
    (invariance + 0.1 * redundancy).backward()
    if rank == 0:
        torch.save(layer.weight.grad, out)
    leave()


@pytest.mark.distributed
def test_an_all_reduce_in_place_gives_one_wth_of_the_gradient(tmp_path):
    x, layer = [torch.randn(8, 6), torch.randn(8, 6)], nn.Linear(6, 4, bias=False)
    mp.spawn(all_reduce_worker, (2, tmp_path / "store", x, layer.weight.data, tmp_path / "out.pt"), nprocs=2)
    invariance, redundancy = by_definition(layer(x[0]).T @ layer(x[1]) / 8)
    (invariance + 0.1 * redundancy).backward()
    assert torch.allclose(2 * torch.load(tmp_path / "out.pt", weights_only=True), layer.weight.grad, atol=1e-6)


def test_vectors_get_the_official_step_of_the_published_runs():
    """Whose gradient was 1/W of ours; 0.0048 a 256 images is 0.024 of the matrices' 0.2."""
    for name, row in RECIPES.items():
        if name != "demo":
            assert row.numbers["vector_lr"] * row.lr == pytest.approx(0.0048 * row.total_batch / 256 / row.gpus)
