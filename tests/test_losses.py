"""Every loss against nested loops with plain `math`, and the values it must have at known points."""

import math

import pytest
import torch

from sslnb import methods
from sslnb.losses import SoftmaxInParts, nt_xent, regression
from sslnb.masking import patchify


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


@pytest.mark.parametrize("n, d, temperature", [(2, 3, 0.1), (5, 4, 0.5), (3, 8, 0.07)])
def test_nt_xent_is_the_papers_sum(n, d, temperature):
    z1, z2 = torch.randn(n, d), torch.randn(n, d)
    rows = [*z1.tolist(), *z2.tolist()]
    total = 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = sum(math.exp(cosine(rows[i], rows[j]) / temperature) for j in range(2 * n) if j != i)
        total -= math.log(math.exp(cosine(rows[i], rows[partner]) / temperature) / others)
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(total / (2 * n), rel=1e-4)


def test_nt_xent_at_known_points():
    same = torch.ones(6, 4)
    assert nt_xent(same, same, 0.1).item() == pytest.approx(math.log(11), rel=1e-5)  # log(2N - 1): no information
    z = torch.eye(4)
    assert nt_xent(z, z, 0.01).item() < 1e-6  # partners alike, all others at right angles
    assert nt_xent(z, z.roll(1, 0), 0.1).item() > 9  # every partner is wrong
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    assert nt_xent(a, b, 0.2).item() == pytest.approx(nt_xent(b, a, 0.2).item(), rel=1e-5)


@pytest.mark.parametrize("sizes", [(9,), (1, 8), (4, 2, 3)])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_softmax_in_parts_is_that_of_all(sizes, temperature):
    """Also where exp() of a logit would be infinite (logits to 500), whichever part has the highest."""
    q, shared, own = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4), torch.randn(5, 9, 4)
    right, weight = own[:, 3], torch.rand(5)
    for v, parts in ((shared.expand(5, 9, 4), shared.split(sizes)), (own, own.split(sizes, 1))):
        among = SoftmaxInParts(q, temperature)
        for part in parts:
            among.add(part)
        loss = among.loss(right)
        gradient = torch.autograd.grad((weight * loss).sum(), q)[0]
        logits = [[sum(a * b for a, b in zip(x, y)) / temperature for y in ys] for x, ys in zip(q.tolist(), v.tolist())]
        for i, row in enumerate(logits):
            high = max(row)
            weights = [math.exp(s - high) for s in row]
            said = sum(a * b for a, b in zip(q[i].tolist(), right[i].tolist())) / temperature
            assert loss[i].item() == pytest.approx(high + math.log(sum(weights)) - said, rel=1e-4, abs=1e-4)
            mean = (torch.tensor(weights)[:, None] * v[i]).sum(0) / sum(weights)
            expected = weight[i] * (mean - right[i]) / temperature
            assert torch.allclose(gradient[i], expected, rtol=1e-3, atol=1e-4 / temperature)


def test_regression_is_two_minus_two_cosines():
    p, z = torch.randn(7, 5), torch.randn(7, 5)
    expected = sum(2 - 2 * cosine(a, b) for a, b in zip(p.tolist(), z.tolist())) / 7
    assert regression(p, z).item() == pytest.approx(expected, rel=1e-5)
    assert regression(p, 3 * p).item() == pytest.approx(0, abs=1e-6)
    assert regression(p, -p).item() == pytest.approx(4, rel=1e-6)
    assert regression(1e-6 * p, z).item() == pytest.approx(expected, rel=1e-5), "however short the vectors are"


def test_byol_sums_both_directions():
    torch.manual_seed(0)
    method = methods.recipes("byol")["demo"].build()
    views = [torch.randn(6, 3, 20, 20) for _ in range(2)]
    out = method(views)
    z = [method.projector(method.backbone(x)) for x in views]
    p, t = [method.predictor(x) for x in z], [method.target(x) for x in views]
    expected = 0.0
    for a, b in ((0, 1), (1, 0)):
        expected += sum(2 - 2 * cosine(x, y) for x, y in zip(p[a].tolist(), t[b].tolist())) / 6
    assert out["loss"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_loss_is_the_mean_over_hidden_patches(norm_pix):
    torch.manual_seed(0)
    method = methods.recipes("mae")["demo"].with_(norm_pix=norm_pix).build()
    images = torch.randn(3, 3, 28, 28)
    out = method([images])
    patches = patchify(images, 4).tolist()
    total = count = 0
    for b in range(3):
        for i in range(49):
            if out["mask"][b, i]:
                x = patches[b][i]
                if norm_pix:
                    mean = sum(x) / 48
                    var = sum((v - mean) ** 2 for v in x) / 47  # unbiased, as in the official code
                    x = [(v - mean) / math.sqrt(var + 1e-6) for v in x]
                total += sum((p - v) ** 2 for p, v in zip(out["prediction"][b, i].tolist(), x)) / 48
                count += 1
    assert count == 3 * 37
    assert out["loss"].item() == pytest.approx(total / count, rel=1e-4)


def test_mae_ignores_visible_predictions():
    method = methods.recipes("mae")["demo"].build()
    prediction, target = torch.randn(2, 49, 48, requires_grad=True), torch.randn(2, 49, 48)
    mask = (torch.rand(2, 49) < 0.75).float()
    method.loss(prediction, target, mask).backward()
    assert prediction.grad[mask == 0].abs().max() == 0 and (prediction.grad[mask == 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("loss", [lambda a, b: nt_xent(a, b, 0.1), regression])
def test_losses_stay_in_full_precision_under_autocast(loss):
    a, b = torch.randn(64, 32), torch.randn(64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(a, b)
    assert inside.dtype == torch.float32 and inside.item() == loss(a, b).item()
