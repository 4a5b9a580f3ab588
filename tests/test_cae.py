"""CAE: who sees what, the regressor's block and the losses by hand, the target encoder's timing, sizes, recipes."""

import math

import pytest
import torch
from conftest import HALVES, ten_steps
from PIL import Image
from torch import nn

from sslnb import backbones, data, figures, methods, optim, tokenizers
from sslnb.errors import InputError
from sslnb.evaluate.reconstruction import masked_error, masked_psnr
from sslnb.masking import upsample_mask, visible_first
from sslnb.methods.cae import CAE, RECIPES
from sslnb.methods.cae_neck import CrossBlock, Decoder, Regressor
from sslnb.tokens import encode_visible, sincos_position
from sslnb.views import Normalize, RandomResizedCrop

ZOO = "vit_base_sz224_8xb64_accu4_cos_fp16_ep300"
DEMO = RECIPES["demo"].with_(tokenizer="brightness", vocab_size=16)


@pytest.fixture
def method():
    return DEMO.build()


@pytest.fixture
def views(method):
    images = data.load("fashion_small")
    return method.views(28)([images[i] for i in range(4)])


def count(module):
    return sum(p.numel() for p in module.parameters())


# Full size

def full_size(**changes):
    """The zoo's network with a tokenizer that needs no file."""
    return RECIPES[ZOO].with_(tokenizer="brightness", **changes).build()


def test_the_full_size_model_has_the_published_numbers_of_parameters():
    with torch.device("meta"):
        method = RECIPES[ZOO].build()
    assert count(method.backbone) == count(method.target_encoder) == 85_807_872
    assert count(method.regressor) + count(method.decoder) == 63_024_896
    assert count(method.tokenizer) == 53_786_240 and count(method) == 288_426_880
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert trained == 85_807_872 - 197 * 768 + 63_024_896, "positions, target encoder and tokenizer stand still"


def test_the_full_size_shapes_are_the_specs():
    torch.manual_seed(0)
    method, shapes = full_size(), {}
    for name in ("regressor", "decoder"):
        getattr(method, name).register_forward_hook(
            lambda _, args, out, name=name: shapes.update({name: ([tuple(a.shape) for a in args], tuple(out.shape))}))
    with torch.no_grad():
        out = method([torch.randn(1, 3, 224, 224), torch.rand(1, 3, 112, 112)])
    assert shapes["regressor"] == ([(1, 121, 768), (1, 121, 768), (1, 75, 768)], (1, 75, 768))
    assert shapes["decoder"] == ([(1, 75, 768), (1, 75, 768)], (1, 75, 8192))
    assert out["tokens"].shape == (1, 75)
    assert out["cross_entropy"].item() == pytest.approx(math.log(8192), abs=1)  # Xavier in the head: not quite uniform


def test_the_backbone_goes_to_and_from_plain_timm_and_has_biases_for_q_and_v_only():
    method = full_size()
    plain = backbones.build("beit_base_patch16_224", 224, **RECIPES[ZOO].backbone_numbers)
    plain.load_state_dict(method.backbone.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(plain.eval().forward_features(x), method.backbone.eval().forward_features(x))
    names = set(plain.state_dict())
    assert {"pos_embed", "blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "blocks.11.gamma_2"} <= names
    assert not [n for n in names if "relative" in n or "k_bias" in n or n.endswith("qkv.bias")]


# Masks and views

@pytest.mark.parametrize("ratio, removed", [(0.383, 75), (0.5, 98)])
def test_exactly_75_or_98_of_196_patches_are_hidden(ratio, removed):
    with torch.device("meta"):
        method = RECIPES[ZOO].with_(mask_ratio=ratio).build()
    mask = method.draw_mask(20, torch.Generator().manual_seed(0))
    assert mask.sum(1).tolist() == [removed] * 20 and mask.shape == (20, 196)
    assert (method.mask_ratio == CAE.__init__.__kwdefaults__["mask_ratio"] or ratio == 0.5) and method.least == 16


def test_the_mask_is_of_blocks(method):
    grid = method.draw_mask(200).view(200, 7, 7)
    scattered = grid.flatten(1)[:, torch.randperm(49)].view(200, 7, 7)
    assert grid.sum((1, 2)).tolist() == [24] * 200

    def outline(x):
        return float(x.diff(dim=1).abs().sum() + x.diff(dim=2).abs().sum())
    assert outline(grid) < 0.65 * outline(scattered)


def test_the_two_views_are_one_crop_at_two_sizes():
    with torch.device("meta"):
        method = RECIPES[ZOO].build()
    views = method.views(224)
    first, second = views.views
    assert first.image_ops[0] == RandomResizedCrop(224, (0.08, 1.0), interpolation="bicubic")
    assert second.image_ops[0] == RandomResizedCrop(112, (0.08, 1.0), interpolation="lanczos") and second.aligned
    picture = Image.effect_mandelbrot((300, 260), (-2, -1, 1, 1), 50).convert("RGB")
    large, small = views([picture] * 4, seed=3)
    assert large.shape == (4, 3, 224, 224) and small.shape == (4, 3, 112, 112)
    shrunk = nn.functional.avg_pool2d(Normalize().undo(large), 2) * 0.8 + 0.1
    assert (shrunk - small).abs().mean() < 0.01 < 0.05 < (shrunk - small.roll(1, 0)).abs().mean()
    assert small.min() >= 0.1 and small.max() <= 0.9 + 1e-6


def test_the_demos_second_view_has_a_cell_of_four_pixels_for_a_patch(method, views):
    assert [v.shape[-1] for v in views] == [28, 28] and method.tokenizer.cell == 4
    assert torch.allclose(views[1], tokenizers.second_view(views[0], 28), atol=0.06)  # bicubic and Lanczos


# The regressor and the decoder

def test_the_decoder_is_told_where_each_latent_belongs():
    decoder, latents, places = Decoder(8, 2, 1, 0.0, 5).eval(), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    assert torch.equal(decoder(latents, places), decoder(latents + places, torch.zeros(1, 3, 8)))
    assert not torch.allclose(decoder(latents, places), decoder(latents, places.flip(1)))


def test_a_regressor_block_by_hand():
    torch.manual_seed(1)
    block = CrossBlock(8, 2, 0.0).requires_grad_(False)
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)
    x, everything, at_x, at_all = (torch.randn(1, n, 8) for n in (3, 5, 3, 5))
    q = block.q(block.norm_q(x + at_x))
    k = block.k(block.norm_k(everything + at_all))
    v = block.v(block.norm_v(everything))
    looked = torch.zeros(1, 3, 8)
    for head in (0, 1):
        part = slice(4 * head, 4 * head + 4)
        for i in range(3):
            weights = [math.exp(float(q[0, i, part] @ k[0, j, part]) / 2) for j in range(5)]
            looked[0, i, part] = sum(w / sum(weights) * v[0, j, part] for j, w in enumerate(weights))
    halfway = block.norm_mlp(x + block.gamma_1 * block.proj(looked))
    expected = halfway + block.gamma_2 * block.mlp[2](nn.functional.gelu(block.mlp[0](halfway)))
    assert torch.allclose(block(x, everything, at_x, at_all), expected, atol=1e-5)
    assert block.k.bias is None and block.q.bias is not None and block.v.bias is not None
    assert CrossBlock(8, 2, 0.0).gamma_1.unique().tolist() == [pytest.approx(0.1)]


def test_every_block_sees_the_visible_latents_as_they_are_and_the_hidden_ones_as_they_have_become():
    torch.manual_seed(1)
    regressor, inputs, outputs = Regressor(8, 2, 3, 0.0), [], []
    for block in regressor.blocks:
        block.register_forward_hook(lambda _, args, out: inputs.append(args) or outputs.append(out))
    visible, at_visible, at_hidden = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    result = regressor(visible, at_visible, at_hidden)
    streams = [regressor.mask_token.expand(2, 4, 8), *outputs[:-1]]
    for (x, everything, at_x, at_all), stream in zip(inputs, streams, strict=True):
        assert torch.equal(x, stream) and torch.equal(everything, torch.cat([visible, stream], 1))
        assert torch.equal(at_x, at_hidden) and torch.equal(at_all, torch.cat([at_visible, at_hidden], 1))
    assert torch.equal(result, regressor.norm(outputs[-1]))


def test_paths_are_dropped_more_and_more_in_regressor_and_decoder():
    method = DEMO.with_(regressor_depth=3, decoder_depth=2, neck_drop_path=0.2).build()
    assert [b.drop_path.drop_prob for b in method.regressor.blocks] == pytest.approx([0, 0.1, 0.2])
    assert getattr(method.decoder.blocks[1].drop_path1, "drop_prob", 0) == pytest.approx(0.2)


def test_the_regressor_drops_either_path_of_an_image_and_makes_up_for_it():
    """With p = 1/2 what is kept counts twice: an image has none, one or both of the two branches."""
    torch.manual_seed(0)
    block = CrossBlock(8, 2, 0.5)
    x, everything, at_x, at_everything = (torch.randn(1, n, 8).expand(64, -1, -1) for n in (3, 5, 3, 5))
    with torch.no_grad():
        k = block.norm_k(everything + at_everything)
        looked = block.attend(block.norm_q(x + at_x), k, block.norm_v(everything))
        halfway = [block.norm_mlp(x + kept * block.gamma_1 * looked)[0] for kept in (0, 2)]
        possible = [h + kept * block.gamma_2 * block.mlp(h) for h in halfway for kept in (0, 2)]
        found = block(x, everything, at_x, at_everything)
    seen = [sum(torch.allclose(y, p, atol=1e-5) for y in found) for p in possible]
    assert sum(seen) == 64 and min(seen) > 5


# Who sees what

def test_encoder_regressor_and_decoder_never_see_a_hidden_pixel(method, views):
    images, mask = views[0], method.draw_mask(4)
    changed = images + 5 * upsample_mask(mask, 4) * torch.randn_like(images)
    visible, hidden = method.places(mask, images.device)
    assert torch.equal(method.regress(images, visible, hidden), method.regress(changed, visible, hidden))
    assert torch.equal(method.reconstruct(images, mask), method.reconstruct(changed, mask))
    assert not torch.equal(method.latents(images, hidden), method.latents(changed, hidden))


def test_nothing_hidden_gets_into_a_prediction_through_a_tokenizer_that_looks_beyond_its_cell(method, views):
    tokenize = method.tokenizer.tokenize
    method.tokenizer.tokenize = lambda view: tokenize(nn.functional.avg_pool2d(view, 9, 1, 4))  # as a dVAE does
    images, mask = views[0], method.draw_mask(4)
    changed = images + 5 * upsample_mask(mask, 4) * torch.randn_like(images)
    visible = method.places(mask, images.device)[0]
    assert not torch.equal(method.target(images).gather(1, visible), method.target(changed).gather(1, visible))
    assert torch.equal(method.reconstruct(images, mask), method.reconstruct(changed, mask))


def test_the_target_encoder_never_sees_a_visible_pixel(method, views):
    images, mask = views[0], method.draw_mask(4)
    changed = images + 5 * (1 - upsample_mask(mask, 4)) * torch.randn_like(images)
    hidden = method.places(mask, images.device)[1]
    assert torch.equal(method.latents(images, hidden), method.latents(changed, hidden))


def test_a_hidden_patch_keeps_its_place(method):
    mask = method.draw_mask(3)
    visible, hidden = method.places(mask, torch.device("cpu"))
    assert (mask.gather(1, visible) == 0).all() and (mask.gather(1, hidden) == 1).all()
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(49).expand(3, -1))
    assert torch.equal(method.position(hidden)[1, 2], method.backbone.pos_embed[0, 1 + hidden[1, 2]])


def test_the_decoder_gets_regressed_latents_and_positions_and_nothing_else(method, views):
    seen = []
    method.decoder.register_forward_pre_hook(lambda module, args: seen.append(args))
    mask = method.draw_mask(4)
    method.draw_mask = lambda *_: mask
    method(views)
    visible, hidden = method.places(mask, views[0].device)
    assert torch.equal(seen[0][0], method.regress(views[0], visible, hidden))
    assert torch.equal(seen[0][1], method.position(hidden)) and len(seen[0]) == 2


# The loss

def test_the_loss_is_cross_entropy_and_twice_the_squared_distance(method, views):
    with torch.no_grad():
        for p in method.target_encoder.parameters():
            p.add_(0.02 * torch.randn_like(p))
    mask = method.draw_mask(4)
    method.draw_mask = lambda *_: mask
    out = method(views)
    regressed = method.regress(views[0], *method.places(mask, views[0].device))
    true = encode_visible(method.target_encoder, views[0], visible_first(1 - mask)[0])[:, 1:]
    tokens, entropy, square, right = method.tokenizer.tokenize(views[1]), 0.0, 0.0, 0
    for image in range(4):
        for n, place in enumerate(mask[image].nonzero()[:, 0].tolist()):
            logits = out["logits"][image, n].tolist()
            token = int(tokens[image, place])
            entropy += math.log(sum(math.exp(x) for x in logits)) - logits[token]
            right += logits[token] == max(logits)
            square += sum((a - b) ** 2 for a, b in zip(regressed[image, n].tolist(), true[image, n].tolist())) / 64
    assert out["cross_entropy"].item() == pytest.approx(entropy / 96, rel=1e-4)
    assert out["distance"].item() == pytest.approx(square / 96, rel=1e-4)
    assert out["loss"].item() == pytest.approx(entropy / 96 + 2 * square / 96, rel=1e-4)
    assert out["accuracy"].item() == pytest.approx(right / 96)


def test_the_loss_is_in_full_precision_whatever_the_networks_give(method):
    logits, regressed, latents = (torch.randn(2, 5, d).bfloat16() for d in (16, 64, 64))
    tokens = torch.randint(16, (2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = method.loss(logits, tokens, regressed, latents)
    outside = method.loss(logits.float(), tokens, regressed.float(), latents.float())
    assert [x.dtype for x in inside] == [torch.float32] * 2
    assert [x.item() for x in inside] == [x.item() for x in outside]


def test_the_alignment_pulls_on_regressor_and_encoder_and_not_on_the_target(method, views):
    method(views)["distance"].backward()
    for part in (method.backbone.blocks, method.regressor):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert all(p.grad is None for p in (*method.target_encoder.parameters(), *method.decoder.parameters()))


def test_the_optimizer_holds_what_is_trained_and_vectors_do_not_decay(method):
    decayed, free = method.param_groups(DEMO)
    held = {id(p) for p in (*decayed["params"], *free["params"])}
    trained = [*method.backbone.parameters(), *method.regressor.parameters(), *method.decoder.parameters()]
    assert held == {id(p) for p in trained if p is not method.backbone.pos_embed}
    assert {id(method.backbone.cls_token), id(method.regressor.mask_token)} <= {id(p) for p in decayed["params"]}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0) and all(p.ndim == 1 for p in free["params"])


# The target encoder

def step(method, views, optimizer):
    """As the loop does it."""
    optimizer.zero_grad()
    method(views)["loss"].backward()
    method.before_step(0.5)
    optimizer.step()
    method.after_step(0.5)


def test_targets_come_from_the_encoder_as_it_was_one_step_before(method, views):
    def weights(module):
        return nn.utils.parameters_to_vector(module.parameters()).clone()

    optimizer = optim.build(method.param_groups(DEMO), DEMO)
    history = [weights(method.backbone)]
    assert torch.equal(weights(method.target_encoder), history[0]), "it starts as a copy"
    for number in range(1, 4):
        step(method, views, optimizer)
        history.append(weights(method.backbone))
        assert torch.equal(weights(method.target_encoder), history[number - 1])
        assert not torch.equal(history[number], history[number - 1])


def test_a_momentum_makes_the_target_encoder_slow(views):
    method = DEMO.with_(momentum=0.9).build()
    start = method.backbone.norm.weight.detach().clone()
    with torch.no_grad():
        method.backbone.norm.weight.add_(1.0)
    method.before_step(0.5)
    assert torch.allclose(method.target_encoder.norm.weight, start + 0.1)


def test_accumulated_gradients_are_those_of_the_big_batch(method, views):
    mask = method.draw_mask(4)

    def gradient(parts):
        method.zero_grad()
        for part in parts:
            method.draw_mask = lambda *_, part=part: mask[part]
            (method([v[part] for v in views])["loss"] / len(parts)).backward()
        return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])

    big, small = gradient([slice(0, 4)]), gradient([slice(0, 2), slice(2, 4)])
    assert method.accumulable and torch.allclose(big, small, atol=1e-5)


# The first weights

def test_the_first_weights_are_the_official_ones():
    torch.manual_seed(0)
    method = DEMO.with_(vocab_size=128).build()
    vit = method.backbone
    assert torch.equal(vit.pos_embed, sincos_position(7, 64, first="row")) and not vit.pos_embed.requires_grad
    for layer in (vit.blocks[0].attn.qkv, vit.blocks[3].mlp.fc2, method.regressor.blocks[0].k, method.decoder.head):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert layer.weight.abs().max() <= bound and layer.weight.abs().max() > 0.95 * bound
        assert layer.bias is None or layer.bias.abs().sum() == 0
    for weight in (vit.patch_embed.proj.weight, vit.cls_token, method.regressor.mask_token):
        assert weight.abs().max() <= 0.02 and weight.std().item() == pytest.approx(0.0108, rel=0.2)
    assert vit.blocks[0].gamma_1.unique().tolist() == [pytest.approx(0.1)]


# The tokenizer and the run

def test_before_training_the_tokenizer_is_made_ready_once(tiny, tmp_path):
    from types import SimpleNamespace

    method, run = tiny("cae").build(), SimpleNamespace(recipe=tiny("cae"), seed=0)
    assert not method.tokenizer.ready
    method.before_train(run)
    centres = method.tokenizer.centres.clone()
    assert method.tokenizer.ready and not torch.equal(centres, tiny("cae").build().tokenizer.centres)
    run.seed = 5  # a second start finds it ready and leaves it alone
    method.before_train(run)
    assert torch.equal(method.tokenizer.centres, centres)
    again = tiny("cae").build()
    again.fit_tokenizer(data.load("few_digits"), seed=0)
    assert torch.equal(again.tokenizer.centres, centres), "the notebook's one call gives the run's tokenizer"


def test_a_runs_tokenizer_is_in_its_checkpoint_and_not_in_its_backbone(tiny, tmp_path):
    from safetensors.torch import load_file

    from sslnb import pretrain

    run = pretrain(tiny("cae", epochs=1), out=tmp_path / "run")
    method = run.method()
    assert method.tokenizer.ready and method.tokenizer.centres.std() > 0
    assert set(load_file(run.path / "backbone.safetensors")) == set(method.backbone.state_dict())
    assert {"accuracy", "cross_entropy", "distance"} <= set(run.history()[-1])
    assert set(run.snapshots()[-1][1]) == {"images", "mask", "reconstruction"}
    test = data.load("few_digits", "test")
    psnr = masked_psnr(run, test, limit=50)
    assert psnr.n == 50 and psnr.ceiling > psnr.model, "no token is as good as the pixels themselves"
    with pytest.raises(InputError, match="guesses tokens.*use masked_psnr"):
        masked_error(run, test)


def test_without_a_file_a_run_of_the_zoo_ends_before_its_first_step_with_a_sentence(tmp_path):
    from sslnb import pretrain

    recipe = DEMO.with_(tokenizer=str(tmp_path / "dalle_encoder.pth"), vocab_size=8192, cell=8, batch=50, epochs=1)
    with pytest.raises(InputError, match="there is no such file; give dalle_encoder.pth"):
        pretrain(recipe, out=tmp_path / "run")


def test_without_dalles_decoder_there_is_no_film_but_a_run():
    method = DEMO.with_(tokenizer="nowhere_encoder.pth", vocab_size=8192, cell=8).build()
    images = torch.randn(2, 3, 28, 28)
    assert method.views(28).views[1].image_ops[0].size == 56
    assert method.snapshot([images, images]) == {}
    with pytest.raises(InputError, match="holds the encoder alone"):
        method.to_image(torch.zeros(2, 49, dtype=torch.long), images)


# Pictures

def test_a_prediction_has_the_decoders_tokens_where_hidden_and_the_images_own_elsewhere(method, views):
    images, mask = views[0], method.draw_mask(4)
    prediction = method.reconstruct(images, mask)
    visible, hidden = method.places(mask, images.device)
    logits = method.decoder(method.regress(images, visible, hidden), method.position(hidden))
    assert torch.equal(prediction.gather(1, hidden), logits.argmax(-1))
    assert torch.equal(prediction.gather(1, visible), method.target(images).gather(1, visible))
    assert prediction.shape == (4, 49) and method.to_image(prediction, images).shape == images.shape


def test_the_picture_of_the_target_is_the_image_as_well_as_tokens_can_say_it(views):
    method = DEMO.with_(vocab_size=4096).build()
    picture = Normalize().undo(method.to_image(method.target(views[0]), views[0]))
    truth = nn.functional.avg_pool2d(Normalize().undo(views[0]), 4)
    assert torch.allclose(nn.functional.avg_pool2d(picture, 4), truth, atol=1e-3)
    assert figures.reconstructions(method, views[0], method.draw_mask(4), Normalize()).axes


# Backbones

BACKBONES = {"beit_mini": RECIPES["demo"].backbone_numbers, "vit_mini": {}}


@HALVES
@pytest.mark.parametrize("name", BACKBONES)
def test_ten_steps_in_sixteen_bits_are_finite(name, views, half):
    ten_steps(DEMO.with_(backbone=name, backbone_numbers=BACKBONES[name]).build(), views, half)


@pytest.mark.parametrize("name, numbers, words", [
    ("beit_mini", {"use_abs_pos_emb": True, "use_rel_pos_bias": True}, "absolute positions and no relative"),
    ("beit_mini", {"use_abs_pos_emb": False, "use_rel_pos_bias": False}, "absolute positions and no relative"),
    ("resnet_mini", {}, "needs a vision transformer"), ("swin_mini", {}, "needs a vision transformer"),
])
def test_other_backbones_are_refused_in_a_sentence(name, numbers, words):
    with pytest.raises(InputError, match=words):
        DEMO.with_(backbone=name, backbone_numbers=numbers).build()


# Recipes

def test_the_zoos_row_and_the_official_ones():
    zoo = RECIPES[ZOO]
    assert (zoo.total_batch, zoo.lr, zoo.min_lr, zoo.clip, zoo.weight_decay) == (2048, 1.5e-3, 1e-5, 3.0, 0.05)
    assert (zoo.epochs, zoo.warmup_epochs, zoo.betas, zoo.precision) == (300, 10, (0.9, 0.999), "fp16")
    assert zoo.published == {"fine-tune, BEiT (CAE)": 83.2} and "drop_path_rate" not in zoo.backbone_numbers
    official = [r for name, r in RECIPES.items() if "32xb64" in name]
    assert [(r.epochs, r.warmup_epochs, *r.published.values()) for r in official] == [
        (300, 10, 83.6), (800, 20, 83.8), (1600, 40, 83.9)]
    for r in official:
        assert r.total_batch == 2048 and r.numbers["mask_ratio"] == 0.5 and r.numbers["neck_drop_path"] == 0.1
        assert r.backbone_numbers["drop_path_rate"] == 0.1
    assert zoo.on(1).accum == 32 and methods.get("cae") is CAE
