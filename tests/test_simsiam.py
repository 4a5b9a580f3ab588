"""SimSiam: the loss by hand, what the stop-gradient stops, the predictor that never slows down, the zoo's rows."""

import math

import pytest
import torch
from torch import nn

from sslnb import methods, optim
from sslnb.methods.simsiam import RECIPES, SimSiam
from sslnb.views import Blur, ColorJitter, Greyscale, HorizontalFlip, RandomResizedCrop

ROWS = [RECIPES["r50_4xb64_cos_lr0_05_ep100"], RECIPES["r50_4xb64_cos_lr0_05_ep200"]]


@pytest.fixture
def method():
    return RECIPES["demo"].build()


@pytest.fixture
def images():
    return [torch.randn(6, 3, 20, 20) for _ in range(2)]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


# The loss

def test_the_loss_is_the_mean_negative_cosine_of_both_directions(method, images):
    out = method(images)
    z = [method.projector(method.backbone(x)) for x in images]
    p = [method.predictor(x) for x in z]
    total = 0.0
    for mine, other in ((0, 1), (1, 0)):
        for i in range(6):
            total -= cosine(p[mine][i].tolist(), z[other][i].tolist()) / 6 / 2
    assert out["loss"].item() == pytest.approx(total, rel=1e-5)


def test_the_loss_lies_between_minus_one_and_one(method):
    p = torch.randn(5, 8)
    assert method.loss(p, 7 * p).item() == pytest.approx(-1, abs=1e-6)
    assert method.loss(p, -p).item() == pytest.approx(1, abs=1e-6)
    assert method.loss(torch.eye(4), torch.eye(4).roll(1, 0)).item() == 0


def test_the_loss_stays_in_full_precision_under_autocast(method):
    p, z = torch.randn(64, 32).bfloat16(), torch.randn(64, 32).bfloat16()  # what networks give under autocast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = method.loss(p, z)
    assert inside.dtype == torch.float32 and inside.item() == method.loss(p.float(), z.float()).item()


# The stop-gradient

def gradients(method, loss):
    method.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in method.named_parameters()}


def with_constant_targets(method, images):
    """The loss with targets that are numbers and nothing else."""
    with torch.no_grad():
        t1, t2 = (method.projector(method.backbone(x)) for x in images)
    p1, p2 = (method.predictor(method.projector(method.backbone(x))) for x in images)
    unit = nn.functional.normalize
    return -((unit(p1) * unit(t2)).sum(1).mean() + (unit(p2) * unit(t1)).sum(1).mean()) / 2


def test_no_gradient_flows_into_what_is_predicted(method, images):
    ours, held = gradients(method, method(images)["loss"]), gradients(method, with_constant_targets(method, images))
    assert all(torch.allclose(ours[name], held[name], rtol=1e-4, atol=1e-7) for name in held)


def test_without_the_stop_gradient_the_loss_is_the_same_and_the_gradient_is_not(method, images):
    with_it = method(images)["loss"]
    held = gradients(method, with_it)
    method.stop_gradient = False
    without = method(images)["loss"]
    free = gradients(method, without)
    assert with_it.item() == pytest.approx(without.item(), rel=1e-6)
    name = "projector.0.weight"
    assert not torch.allclose(free[name], held[name], rtol=0.05)
    assert torch.allclose(free["predictor.0.weight"], held["predictor.0.weight"], rtol=1e-4, atol=1e-7)


# The measure of collapse

def test_std_is_that_of_the_unit_outputs_over_the_batch(method, images):
    out = method(images)
    unit = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in out["z1"].tolist()]
    columns = list(zip(*unit, strict=True))
    means = [sum(c) / len(c) for c in columns]
    stds = [math.sqrt(sum((v - m) ** 2 for v in c) / len(c)) for c, m in zip(columns, means, strict=True)]
    assert out["std"].item() == pytest.approx(sum(stds) / len(stds), rel=1e-4)
    assert not out["std"].requires_grad


class Outputs(nn.Module):
    """A backbone whose features are given."""

    num_features = 64

    def __init__(self, features):
        super().__init__()
        self.features = nn.Parameter(features)

    def forward(self, x):
        return self.features


@pytest.mark.parametrize("features, expected", [
    (torch.randn(512, 64, generator=torch.Generator().manual_seed(0)), 1 / 8), (torch.ones(512, 64), 0.0)],
    ids=["spread over the sphere", "all the same"])
def test_std_is_one_over_root_d_when_healthy_and_zero_when_collapsed(features, expected):
    method = SimSiam(Outputs(features), hidden_dim=64, dim=64, predictor_dim=16)
    method.projector = nn.Identity()
    assert method([None, None])["std"].item() == pytest.approx(expected, abs=0.003)


# The networks

def kinds(mlp):
    return [type(layer).__name__ for layer in mlp]


def test_the_projector_ends_in_a_norm_that_cannot_scale_and_the_predictor_in_none():
    method = SimSiam(Outputs(torch.zeros(2, 64)), hidden_dim=48, dim=32, predictor_dim=8)
    three = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds(method.projector) == [*three, *three, "Linear", "BatchNorm1d"]
    assert kinds(method.predictor) == [*three, "Linear"]
    assert [layer.affine for layer in method.projector if isinstance(layer, nn.BatchNorm1d)] == [True, True, False]
    biases = [name for name, _ in method.named_parameters() if name.endswith("bias")]
    assert biases == ["projector.1.bias", "projector.4.bias", "predictor.1.bias", "predictor.3.bias"]
    assert [tuple(w.shape) for w in (method.projector[3].weight, method.projector[6].weight,
                                     method.predictor[0].weight)] == [(48, 48), (32, 48), (8, 32)]


@pytest.mark.parametrize("recipe", ROWS, ids=lambda r: r.name)
def test_the_imagenet_rows_build_the_real_model(recipe):
    with torch.device("meta"):
        built = recipe.build()
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in built.named_children()} == {
        "backbone": 23_508_032, "projector": 12_591_104, "predictor": 2_100_224}
    h = built.backbone(torch.zeros(2, 3, 224, 224, device="meta"))
    z = built.projector(h)
    assert (h.shape, z.shape, built.predictor(z).shape) == ((2, 2048),) * 3


# The rows of the zoo

@pytest.mark.parametrize("recipe, epochs, linear", [(ROWS[0], 100, 68.28), (ROWS[1], 200, 69.84)])
def test_the_rows_are_the_official_recipe_at_256_images(recipe, epochs, linear):
    assert (recipe.total_batch, recipe.epochs, recipe.lr, recipe.weight_decay) == (256, epochs, 0.05, 1e-4)
    assert (recipe.optimizer, recipe.sgd_momentum, recipe.precision, recipe.warmup_epochs) == ("sgd", 0.9, "fp32", 0)
    assert recipe.published == {"linear, SimSiam protocol": linear} and "512" in recipe.note
    steps = recipe.steps_per_epoch(1_281_167)
    assert steps == 5004
    assert recipe.lr_at(0, steps) == recipe.lr_at(steps - 1, steps) == 0.05  # still within an epoch
    last = 0.05 * (1 + math.cos(math.pi * (epochs - 1) / epochs)) / 2
    assert recipe.lr_at(epochs * steps - 1, steps) == pytest.approx(last)


def test_the_views_are_those_of_moco_v2():
    views = ROWS[0].with_(backbone="resnet_mini").build().views(224)
    assert len(views) == 2
    (ops,) = {(*view.image_ops, *view.batch_ops) for view in views.views}
    found = {type(op): op for op in ops}
    assert found[RandomResizedCrop] == RandomResizedCrop(224, (0.2, 1.0)) and found[HorizontalFlip].p == 0.5
    assert found[ColorJitter] == ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    assert (found[Greyscale].p, found[Blur].p, found[Blur].sigma) == (0.2, 0.5, (0.1, 2.0))


# The optimizer

def test_the_predictors_learning_rate_never_falls():
    recipe = RECIPES["demo"].with_(optimizer="sgd", lr=0.05, weight_decay=1e-4, epochs=10, warmup_epochs=0,
                                   predictor_lr=1.0)
    method = recipe.build()
    optimizer = optim.build(method.param_groups(recipe), recipe)
    seen = []
    for step in range(100):
        optim.set_lr(optimizer, recipe.lr_at(step, 10))
        seen.append([group["lr"] for group in optimizer.param_groups])
    slow, predictor = zip(*seen, strict=True)
    assert set(predictor) == {0.05}
    assert slow[0] == 0.05 and slow[-1] < 0.0015 and list(slow) == sorted(slow, reverse=True)


def test_every_tensor_decays_and_is_in_one_group(method):
    recipe = ROWS[0]
    optimizer = optim.build(method.param_groups(recipe), recipe)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 1e-4]
    predictor = {id(p) for p in method.predictor.parameters()}
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == predictor


def test_the_method_is_found_by_its_name():
    assert methods.get("simsiam") is SimSiam and methods.recipes("simsiam") is RECIPES
