"""NPID: the memory bank, the sampled softmax and its hand-made gradient, and the zoo's rows."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import measured

from sslnb import methods
from sslnb.methods import npid
from sslnb.parts import MemoryBank, normalized

ROWS = {name: r for name, r in methods.recipes("npid").items() if name != "demo"}


def small(**numbers):
    """A method with twelve images."""
    torch.manual_seed(0)
    return methods.recipes("npid")["demo"].with_(images=12, dim=5, negatives=7, **numbers).build()


# ---------------------------------------------------------------- the bank


def test_the_bank_starts_on_the_sphere_and_in_every_process_alike():
    torch.manual_seed(3)
    a = MemoryBank(50, 8, 0.5)
    torch.manual_seed(3)
    assert torch.equal(a.vectors, MemoryBank(50, 8, 0.5).vectors)
    assert torch.allclose(a.vectors.norm(dim=1), torch.ones(50)) and a.vectors.std() == pytest.approx(8**-0.5, rel=0.1)
    assert "vectors" in a.state_dict() and a.vectors.dtype == torch.float32


def test_an_entry_moves_towards_the_feature_and_back_onto_the_sphere():
    bank = MemoryBank(4, 2, momentum=0.75)
    bank.vectors.copy_(torch.tensor([[1.0, 0.0]]).expand(4, 2))
    index, new = bank.update(torch.tensor([2]), torch.tensor([[0.0, 1.0]]))
    expected = [0.75 / math.hypot(0.75, 0.25), 0.25 / math.hypot(0.75, 0.25)]
    assert bank.vectors[2].tolist() == pytest.approx(expected) and index.tolist() == [2]
    assert torch.equal(new[0], bank.vectors[2])
    assert bank.vectors[[0, 1, 3]].tolist() == [[1.0, 0.0]] * 3, "the others stay"


def test_of_an_image_that_is_there_twice_the_last_one_counts():
    bank = MemoryBank(3, 2, momentum=0.0)
    f = normalized(torch.randn(5, 2))
    bank.update(torch.tensor([1, 0, 1, 0, 1]), f)
    assert torch.allclose(bank.vectors[1], f[4]) and torch.allclose(bank.vectors[0], f[3])


def test_the_bank_takes_half_precision_and_stays_in_full():
    bank = MemoryBank(3, 4, 0.5)
    bank.update(torch.tensor([0]), torch.randn(1, 4).bfloat16())
    assert bank.vectors.dtype == torch.float32 and bank.vectors[0].norm().item() == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------- the loss


def test_the_loss_is_the_papers_softmax_over_the_image_and_its_negatives():
    method = small(temperature=0.2)
    f = normalized(torch.randn(3, 5))
    index, others = torch.tensor([4, 0, 9]), torch.randint(12, (3, 7))
    loss = method.loss(f, torch.cat([index[:, None], others], 1))
    v = method.bank.vectors.tolist()
    for b in range(3):
        def e(i, b=b):
            return math.exp(sum(x * y for x, y in zip(v[i], f[b].tolist(), strict=True)) / 0.2)
        expected = -math.log(e(index[b]) / (e(index[b]) + sum(e(j) for j in others[b].tolist())))
        assert loss[b].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("similarities", [1, 25, 2**27], ids=["one image", "two images", "all"])
def test_value_and_gradient_are_autograds_however_many_images_are_compared_at_a_time(similarities, monkeypatch):
    """8 of 12 are drawn with replacement: some are there twice, and some not at all."""
    monkeypatch.setattr(npid, "SIMILARITIES", similarities)
    f = normalized(torch.randn(6, 5)).requires_grad_()
    bank, entries, weight = normalized(torch.randn(12, 5)), torch.randint(12, (6, 8)), torch.rand(6)
    ours = npid.sampled_softmax(f, bank, entries, 0.07)
    logits = (bank[entries] * f[:, None]).sum(-1) / 0.07
    plain = F.cross_entropy(logits, torch.zeros(6, dtype=torch.long), reduction="none")
    assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)
    a, b = (torch.autograd.grad((weight * loss).sum(), f)[0] for loss in (ours, plain))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) and a.abs().sum() > 0


def test_the_gradient_is_that_of_the_bank_before_its_update():
    """The bank changes in forward, after the loss: a gradient that looked it up in backward would be another one."""
    method = small()
    x, index = torch.randn(4, 3, 20, 20), torch.tensor([0, 3, 5, 7])
    before = method.bank.vectors.clone()
    torch.manual_seed(1)
    out = method([x], index)
    assert not torch.equal(before, method.bank.vectors)
    ours = torch.autograd.grad(out["loss"], method.projector[0].weight)[0]
    torch.manual_seed(1)
    entries = torch.cat([index[:, None], torch.randint(12, (4, 7))], 1)
    logits = (before[entries] * method.embed(x)[:, None]).sum(-1) / method.temperature
    plain = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    assert out["loss"].item() == pytest.approx(plain.item(), rel=1e-4)
    assert torch.allclose(ours, torch.autograd.grad(plain, method.projector[0].weight)[0], rtol=1e-3, atol=1e-5)


def test_the_memory_of_the_similarities_is_bounded(monkeypatch):
    seen, part = [], npid.softmax_and_gradient
    monkeypatch.setattr(npid, "SIMILARITIES", 4 * 50 + 49)
    monkeypatch.setattr(npid, "softmax_and_gradient", lambda f, *rest: seen.append(len(f)) or part(f, *rest))
    npid.sampled_softmax(torch.randn(10, 5), torch.randn(50, 5), torch.randint(50, (10, 101)), 0.1)
    assert seen == [4, 4, 2]


def test_large_logits_do_not_overflow():
    f, bank = torch.ones(1, 4), torch.stack([torch.ones(4), -torch.ones(4)])  # logits of 400 and -400
    loss = npid.sampled_softmax(f.requires_grad_(), bank, torch.tensor([[1, 0, 0]]), 0.01)
    assert loss.item() == pytest.approx(800 + math.log(2), rel=1e-5)
    assert torch.allclose(torch.autograd.grad(loss.sum(), f)[0], torch.full((1, 4), 200.0))


def test_at_the_start_nothing_is_known():
    """Features at right angles to a random bank: p = 1 / (1 + K), a loss of log(1 + K)."""
    method = methods.recipes("npid")["demo"].with_(negatives=500, temperature=1e6).build()
    out = method([torch.randn(8, 3, 20, 20)], torch.arange(8))
    assert out["loss"].item() == pytest.approx(math.log(501), rel=1e-4)
    assert out["probability"].item() == pytest.approx(1 / 501, rel=1e-3)


def test_all_probabilities_sum_to_one_and_are_what_all_negatives_once_would_give():
    method = small()
    f = method.embed(torch.randn(3, 3, 20, 20))
    p = method.probabilities(f)
    assert p.shape == (3, 12) and torch.allclose(p.sum(1), torch.ones(3))
    rest = torch.tensor([[j for j in range(12) if j != 5]] * 3)
    loss = method.loss(f, torch.cat([torch.full((3, 1), 5), rest], 1))
    assert torch.allclose(loss.exp().reciprocal(), p[:, 5], rtol=1e-4)


# ---------------------------------------------------------------- the negatives


def test_negatives_are_uniform_with_replacement_and_may_hit_the_image_itself():
    method = small()
    method.negatives = 6000
    drawn = method.others(torch.tensor([3, 8]))
    assert drawn.shape == (2, 6000)
    for row in drawn:
        assert ((row.bincount(minlength=12) - 500).abs() < 110).all()  # 5 standard deviations


def test_ensure_neg_leaves_the_image_out_and_the_rest_uniform():
    method = small(ensure_neg=True)
    method.negatives = 5500
    index = torch.tensor([0, 3, 11])
    for i, row in zip(index, method.others(index), strict=True):
        counts = row.bincount(minlength=12)
        assert len(counts) == 12 and counts[i] == 0
        assert ((counts[torch.arange(12) != i] - 500).abs() < 110).all()


def test_the_entries_of_an_image_are_its_own_and_then_its_negatives(monkeypatch):
    method, seen, index = small(ensure_neg=True), [], torch.tensor([4, 0, 7])
    loss = method.loss
    monkeypatch.setattr(method, "loss", lambda f, entries: seen.append(entries) or loss(f, entries))
    method.negatives = 200
    method([torch.randn(3, 3, 20, 20)], index)
    assert torch.equal(seen[0][:, 0], index) and not (seen[0][:, 1:] == index[:, None]).any()


def test_negatives_come_from_torchs_generator():
    method, index = small(), torch.arange(4)
    torch.manual_seed(7)
    first = method.others(index)
    torch.manual_seed(7)
    assert torch.equal(first, method.others(index)) and not torch.equal(first, method.others(index))


# ---------------------------------------------------------------- the method


def test_looking_does_not_change_the_bank():
    method = small().eval()
    before = method.bank.vectors.clone()
    method([torch.randn(4, 3, 20, 20)], torch.arange(4))
    found = method.snapshot([torch.randn(4, 3, 20, 20)])
    assert torch.equal(before, method.bank.vectors)
    assert found["nearest"].shape == (4, 8) and (found["probability"].diff(dim=1) <= 0).all()


def test_features_are_of_unit_length_in_float32_under_autocast():
    method = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = method([torch.randn(4, 3, 20, 20)], torch.arange(4))["f"]
    assert f.dtype == torch.float32 and torch.allclose(f.norm(dim=1), torch.ones(4))


def test_weight_decay_is_on_every_tensor():
    (group,) = small().param_groups(ROWS["r50_4xb64_step_ep200"])
    assert len(group["params"]) == len(list(small().parameters())) and "weight_decay" not in group


# ---------------------------------------------------------------- the zoo


def test_the_zoo_rows():
    assert list(ROWS) == ["r50_4xb64_step_ep200", "r50_ensure_neg_4xb64_step_ep200"]
    for name, r in ROWS.items():
        assert r.total_batch == 256 and r.epochs == 200 and r.precision == "fp32"
        assert (r.optimizer, r.lr, r.weight_decay, r.sgd_momentum) == ("sgd", 0.03, 1e-4, 0.9)
        assert r.numbers.get("ensure_neg", False) == ("ensure_neg" in name)
        rates = [r.lr_at(e * 5004, 5004) for e in (0, 119, 120, 159, 160, 199)]
        assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_the_real_model():
    with torch.device("meta"):
        method = ROWS["r50_ensure_neg_4xb64_step_ep200"].build()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in method.named_children()}
    assert counts == {"backbone": 23_508_032, "projector": 262_272, "bank": 0}
    assert method.bank.vectors.shape == (1_281_167, 128)
    assert method.bank.vectors.numel() * 4 == 655_957_504  # 0.66 GB
    assert (method.temperature, method.momentum, method.negatives, method.ensure_neg) == (0.07, 0.5, 65_536, True)
    assert method.sync_bn and method.projector[0].bias is not None


def test_the_projector_starts_as_kaimings():
    w = ROWS["r50_4xb64_step_ep200"].with_(images=10).build().projector[0]
    assert w.weight.std().item() == pytest.approx((2 / 2048) ** 0.5, rel=0.02) and not w.bias.any()


def test_views_are_the_papers():
    with torch.device("meta"):
        (view,) = ROWS["r50_4xb64_step_ep200"].build().views(224).views
    ops = [type(op).__name__ for op in view.image_ops + view.batch_ops]
    assert ops == ["Pad", "RandomResizedCrop", "HorizontalFlip", "Greyscale", "ColorJitter", "Normalize"]
    assert view.image_ops[0].pixels == 0
    assert view.image_ops[1].scale == (0.2, 1.0) and view.image_ops[1].interpolation == "bilinear"
    assert vars(view.batch_ops[1]) == {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4, "p": 1.0}


# ---------------------------------------------------------------- at full size


MEASURE = """
import torch
from sslnb.methods.npid import sampled_softmax
from sslnb.parts import MemoryBank

start = peak()
bank = MemoryBank(1_281_167, 128, 0.5)
built = peak()
f = torch.nn.functional.normalize(torch.randn(64, 128)).requires_grad_()
bank.update(torch.randint(1_281_167, (64,)), f)
sampled_softmax(f, bank.vectors, torch.randint(1_281_167, (64, 65_537)), 0.07).mean().backward()
print(built - start, peak() - start)
"""


@pytest.mark.slow
def test_the_memory_at_imagenets_size():
    """The bank is 0.66 GB, twice that while it is drawn; 64 images would have 2.1 GB of negatives."""
    built, peak = measured(MEASURE)
    assert 0.65 < built < 1.5 and peak < 1.9
