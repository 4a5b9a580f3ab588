"""Tokenizers: round trips, the same in every process, DALL-E's published shapes, and what files are let in."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslnb import data, decoding, pretrain
from sslnb.dvae import DVAE
from sslnb.errors import InputError
from sslnb.masking import patchify
from sslnb.tokenizers import SECOND_VIEW, Dalle, DalleDecoder, DalleEncoder, KMeans, build, first_view, second_view
from sslnb.views import Normalize


def pictures(images):
    """Second views of 28 px without any crop."""
    x = torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(28, 28, 3) for i in images])
    return SECOND_VIEW.apply(x.permute(0, 3, 1, 2) / 255)


@pytest.fixture(scope="module")
def clothes():
    images = data.load("fashion_small").subset(range(300))
    return images, pictures([images[i] for i in range(20)])


@pytest.fixture(scope="module")
def fitted(clothes):
    tokenizer = KMeans(32, 4)
    tokenizer.fit(clothes[0], pictures, seed=0)
    return tokenizer


# The second view

def test_the_second_view_is_eight_tenths_and_one_tenth():
    x = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    assert torch.allclose(SECOND_VIEW.apply(x), 0.8 * x + 0.1) and torch.allclose(SECOND_VIEW.undo(0.8 * x + 0.1), x)


def test_first_and_second_view_turn_into_each_other():
    x = torch.rand(2, 3, 16, 16)
    assert torch.allclose(second_view(Normalize().apply(x), 16), 0.8 * x + 0.1, atol=1e-6)
    assert torch.allclose(first_view(0.8 * x + 0.1, 16), Normalize().apply(x), atol=1e-5)
    assert second_view(Normalize().apply(x), 8).shape == (2, 3, 8, 8) and first_view(x, 32).shape == (2, 3, 32, 32)
    flat = torch.full((1, 3, 16, 16), 0.3)
    assert torch.allclose(second_view(Normalize().apply(flat), 8), torch.full((1, 3, 8, 8), 0.34), atol=1e-5)


# The one for tests

def test_brightness_by_hand():
    tokenizer = build("brightness", 4, 2)
    view = torch.tensor([0.0, 0.3, 0.6, 1.0]).view(1, 1, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    tokens = tokenizer.tokenize(SECOND_VIEW.apply(view.expand(1, 3, 4, 4)))
    assert tokens.tolist() == [[0, 1, 2, 3]] and tokens.dtype == torch.int64 and tokenizer.ready
    decoded = SECOND_VIEW.undo(tokenizer.decode(tokens))
    assert torch.allclose(decoded[0, :, ::2, ::2], torch.tensor([[0.125, 0.375], [0.625, 0.875]]).expand(3, 2, 2))
    assert torch.equal(tokenizer.tokenize(tokenizer.decode(tokens)), tokens)


# k-means

def test_a_token_is_the_nearest_centre_and_its_picture_is_that_centre(fitted, clothes):
    view = clothes[1][:3]
    tokens, cells = fitted.tokenize(view), patchify(view, 4)
    for image in range(3):
        for place in range(49):
            distances = [float(((cells[image, place] - centre) ** 2).sum()) for centre in fitted.centres]
            assert distances[tokens[image, place]] == pytest.approx(min(distances), abs=1e-5)
    assert torch.equal(patchify(fitted.decode(tokens), 4), fitted.centres[tokens])
    assert torch.equal(fitted.tokenize(fitted.decode(tokens)), tokens)


def test_clusters_describe_clothes_better_than_the_random_start_does(fitted, clothes):
    def error(tokenizer):
        return float(((tokenizer.decode(tokenizer.tokenize(clothes[1])) - clothes[1]) ** 2).mean())

    assert not KMeans(32, 4).ready and fitted.ready
    assert error(fitted) < 0.2 * error(KMeans(32, 4))
    assert len(fitted.tokenize(clothes[1]).unique()) > 24, "nearly every centre is used"


def test_equal_cells_count_once_so_that_not_every_word_is_black():
    def view(images):
        cells = torch.full((50, 3, 28, 28), 0.1)  # all black but for one image
        cells[0] = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(0))
        return cells

    tokenizer = KMeans(16, 4)
    tokenizer.fit(range(50), view, seed=0)
    assert int((tokenizer.centres.amax(1) < 0.11).sum()) <= 1


def test_the_same_data_and_seed_give_the_same_centres_and_they_are_in_the_state(fitted, clothes):
    torch.manual_seed(77)  # the random state of another process
    before = torch.get_rng_state()
    twin = KMeans(32, 4)
    twin.fit(clothes[0], pictures, seed=0)
    assert torch.equal(twin.centres, fitted.centres) and torch.equal(torch.get_rng_state(), before)
    other, loaded = KMeans(32, 4), KMeans(32, 4)
    other.fit(clothes[0], pictures, seed=1)
    loaded.load_state_dict(fitted.state_dict())
    assert not torch.equal(other.centres, fitted.centres)
    assert torch.equal(loaded.centres, fitted.centres) and loaded.ready
    assert not list(fitted.parameters()), "nothing to train"


def test_tokens_do_not_depend_on_the_precision(fitted, clothes):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fitted.tokenize(clothes[1])
    assert torch.equal(inside, fitted.tokenize(clothes[1]))


def test_images_that_cannot_be_read_are_left_out(clothes):
    class Some:
        def __len__(self):
            return 40

        def __getitem__(self, i):
            if i % 4 == 0:
                raise decoding.BrokenImage(f"image {i}")
            return clothes[0][i]

    seen = []
    KMeans(8, 4).fit(Some(), lambda images: seen.append(len(images)) or pictures(images), seed=0)
    assert seen == [30]


# DALL-E

def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return DalleEncoder().requires_grad_(False), DalleDecoder().requires_grad_(False)


def test_dalles_networks_have_the_published_sizes_and_names(networks):
    encoder, decoder = networks
    assert (count(encoder), count(decoder)) == (53_786_240, 43_829_766)
    names = {f"blocks.{n}.{p}" for n in ("input", "output.conv") for p in "wb"}
    names |= {f"blocks.group_{g}.block_{b}.res_path.conv_{c}.{p}"
              for g in range(1, 5) for b in (1, 2) for c in range(1, 5) for p in "wb"}
    shortcuts = {g: {f"blocks.group_{g}.block_1.id_path.{p}" for p in "wb"} for g in range(1, 5)}
    assert set(encoder.state_dict()) == names | shortcuts[2] | shortcuts[3] | shortcuts[4]
    assert set(decoder.state_dict()) == names | shortcuts[1] | shortcuts[2] | shortcuts[3] | shortcuts[4]
    shapes = {k: tuple(v.shape) for k, v in encoder.state_dict().items()}
    assert shapes["blocks.input.w"] == (256, 3, 7, 7) and shapes["blocks.output.conv.w"] == (8192, 2048, 1, 1)
    assert [shapes[f"blocks.group_3.block_1.res_path.conv_{c}.w"] for c in range(1, 5)] == [
        (256, 512, 3, 3), (256, 256, 3, 3), (256, 256, 3, 3), (1024, 256, 1, 1)]
    shapes = {k: tuple(v.shape) for k, v in decoder.state_dict().items()}
    assert shapes["blocks.input.w"] == (128, 8192, 1, 1) and shapes["blocks.output.conv.w"] == (6, 256, 1, 1)
    assert [shapes[f"blocks.group_1.block_1.res_path.conv_{c}.w"] for c in range(1, 5)] == [
        (512, 128, 1, 1), (512, 512, 3, 3), (512, 512, 3, 3), (2048, 512, 3, 3)]


def written_out(weights, x, encode):
    """The forward pass in words of functions only."""
    def conv(x, name):
        w = weights[name + ".w"]
        return F.conv2d(x, w, weights[name + ".b"], padding=w.shape[-1] // 2)

    x = conv(x, "blocks.input")
    for g in (1, 2, 3, 4):
        for b in (1, 2):
            block = f"blocks.group_{g}.block_{b}"
            y = x
            for c in (1, 2, 3, 4):
                y = conv(y.relu(), f"{block}.res_path.conv_{c}")
            x = (conv(x, f"{block}.id_path") if f"{block}.id_path.w" in weights else x) + y * (1 / (4 * 2) ** 2)
        if g < 4:
            x = F.max_pool2d(x, 2) if encode else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return conv(x.relu(), "blocks.output.conv")


def test_dalles_networks_compute_what_was_published(networks):
    encoder, decoder = networks
    for module in networks:
        for name, p in module.named_parameters():
            if name.endswith("b"):
                p.normal_(std=0.1)
    x, z = torch.rand(1, 3, 16, 16), torch.rand(1, 8192, 2, 2)
    assert torch.allclose(encoder(x), written_out(encoder.state_dict(), x, True), atol=1e-4)
    assert torch.allclose(decoder(z), written_out(decoder.state_dict(), z, False), atol=1e-4)
    assert encoder(x).shape == (1, 8192, 2, 2) and decoder(z).shape == (1, 6, 16, 16)


def test_the_last_layer_of_dalle_stays_in_full_precision(networks):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert networks[0](torch.rand(1, 3, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize("before", ["", "head.encoder."])
def test_dalle_reads_a_plain_state_dict_and_a_cae_checkpoint(networks, tmp_path, before):
    encoder, decoder = networks
    state = {before + k: v for k, v in encoder.state_dict().items()}
    if before:  # as OpenMMLab packs a checkpoint
        state = {"state_dict": {"backbone.cls_token": torch.zeros(1, 1, 768), **state}, "meta": {"epoch": 300}}
    torch.save(state, tmp_path / "dalle_encoder.pth")
    tokenizer = build(str(tmp_path / "dalle_encoder.pth"), 8192, 8)
    assert (tokenizer.vocab_size, tokenizer.cell) == (8192, 8) and not tokenizer.ready and not tokenizer.decodes
    tokenizer.fit(None, None, seed=0)
    view = 0.1 + 0.8 * torch.rand(2, 3, 16, 16)
    tokens = tokenizer.tokenize(view)
    assert tokenizer.ready and tokens.shape == (2, 4) and tokens.dtype == torch.int64
    assert torch.equal(tokens, encoder(view).argmax(1).flatten(1))
    assert not [p for p in tokenizer.parameters() if p.requires_grad]
    with pytest.raises(InputError, match="holds the encoder alone.*dalle_decoder.pth"):
        tokenizer.decode(tokens)
    torch.save(decoder.state_dict(), tmp_path / "dalle_decoder.pth")
    one_hot = F.one_hot(tokens.view(2, 2, 2), 8192).permute(0, 3, 1, 2).float()
    expected = decoder(one_hot)[:, :3].sigmoid()
    assert tokenizer.decodes and torch.equal(tokenizer.decode(tokens), expected)
    assert not [k for k in tokenizer.state_dict() if "decoder" in k], "pictures need no place in a checkpoint"
    for file in tmp_path.iterdir():  # 400 MB, which pytest would keep for days
        file.unlink()


def refused(path):
    with pytest.raises(InputError, match=r"give dalle_encoder\.pth") as caught:
        build(str(path), 8192, 8).fit(None, None, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in the file ran')",)


def test_files_that_are_no_plain_weights_are_refused_with_the_reason(tmp_path):
    assert "there is no such file" in refused(tmp_path / "nowhere.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint at all")
    for name in ("module.pth", "evil.pth", "noise.pth"):
        assert "no plain state dict" in refused(tmp_path / name) and "run" in refused(tmp_path / name)
    assert "pickled module" in refused(tmp_path / "encoder.pkl")
    torch.save({"blocks.input.w": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("other.pth", "list.pth"):
        assert "does not hold the weights of a DalleEncoder" in refused(tmp_path / name)


@pytest.mark.parametrize("name, words", [("kmean", "did you mean 'kmeans'"), ("dalle", "dalle_encoder.pth")])
def test_a_name_that_is_no_tokenizer_is_told_so(name, words):
    with pytest.raises(InputError, match=words):
        build(name, 8192, 8)


def test_dalles_vocabulary_cannot_be_changed():
    with pytest.raises(InputError, match="8192 codes for cells of 8 px, not 256 for 4 px"):
        build("dalle_encoder.pth", 256, 4)


def test_a_tokenizer_is_built_on_the_meta_device_without_work():
    with torch.device("meta"):
        for name in ("kmeans", "brightness"):
            build(name, 16, 4)
        assert isinstance(build("nowhere.pth", 8192, 8), Dalle)


# The small dVAE

@pytest.fixture(scope="module")
def trained():
    images = data.load("fashion_small").subset(range(1000))
    vae = build("dvae", 64, 4)
    state = torch.get_rng_state()
    vae.fit(images, pictures, seed=0)
    assert torch.equal(state, torch.get_rng_state()), "nobody's random state is touched"
    return vae, images


def error(tokenizer, x):
    return float((tokenizer.decode(tokenizer.tokenize(x)) - x).square().mean())


def test_before_it_learns_a_dvae_is_k_means(fitted, clothes):
    vae = DVAE(32, 4)
    vae.centres.copy_(fitted.centres)
    assert torch.equal(vae.tokenize(clothes[1]), fitted.tokenize(clothes[1]))
    assert torch.allclose(vae.decode(vae.tokenize(clothes[1])), fitted.decode(fitted.tokenize(clothes[1])), atol=1e-6)


def test_a_trained_dvae_draws_clothes_it_has_never_seen_better_than_k_means(trained):
    vae, images = trained
    plain = KMeans(64, 4)
    plain.fit(images, pictures, seed=0)
    test = data.load("fashion_small", "test")
    x = pictures([test[i] for i in range(200)])
    assert error(vae, x) < 0.92 * error(plain, x)
    assert len(vae.tokenize(x).unique()) > 50, "nearly all words are in use"
    assert vae.ready and not any(p.requires_grad for p in vae.parameters())


def test_the_choice_of_a_dvae_hardens_from_a_half_to_a_sixteenth(monkeypatch):
    asked, loss = [], DVAE.loss
    monkeypatch.setattr("sslnb.dvae.STEPS", 6)
    monkeypatch.setattr(DVAE, "loss", lambda self, x, temperature: asked.append(temperature) or loss(
        self, x, temperature))
    DVAE(8, 4).fit(data.load("fashion_small").subset(range(70)), pictures, seed=0)
    assert asked == pytest.approx([0.5 * 8 ** (-step / 6) for step in range(6)])


def test_the_loss_of_a_dvae_by_hand():
    vae = DVAE(5, 2)
    torch.nn.init.normal_(vae.see[-1].weight), torch.nn.init.normal_(vae.paint[-1].weight)
    x = torch.rand(3, 3, 4, 4)
    logits = vae.logits(x)
    torch.manual_seed(3)
    soft = F.gumbel_softmax(logits, 0.7, dim=-1)
    torch.manual_seed(3)
    g = -torch.empty_like(logits).exponential_().log()
    assert torch.allclose(soft, ((logits + g) / 0.7).softmax(-1), atol=1e-6)
    share = logits.softmax(-1)
    kl = sum(float(p * (p.log() + torch.tensor(5.0).log())) for p in share.flatten()) / 12
    torch.manual_seed(3)
    by_hand = float((vae.draw(soft) - x).square().mean()) + 1e-4 * kl
    assert float(vae.loss(x, 0.7)) == pytest.approx(by_hand, rel=1e-5)


def test_a_choice_sees_the_neighbouring_cells_and_no_others(trained):
    vae = trained[0]
    x = torch.rand(1, 3, 28, 28)
    y = x.clone()
    y[..., :4, :4] = 0.5
    changed = ((vae.logits(x) - vae.logits(y)).abs().amax(-1) > 1e-6).view(7, 7)
    assert changed[:2, :2].all() and not changed[2:].any() and not changed[:, 2:].any()


def test_cae_trains_on_a_dvae_and_its_checkpoint_holds_it(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("sslnb.dvae.STEPS", 2)
    run = pretrain(tiny("cae", data="few_digits", size=28, tokenizer="dvae", vocab_size=16), out=tmp_path / "run")
    vae = run.method().tokenizer
    assert type(vae) is DVAE and vae.ready and vae.paint[-1].weight.abs().max() > 0
    assert not any("tokenizer" in name for name in run.backbone().state_dict())
