"""Published weights, one row per file: the seed's table of pre-trained models, and the official releases.

Names, addresses and checksums as in the seed's model zoo and the repositories' own pages. `layout` is what the code
that wrote a file lets expect (a name of layouts.LAYOUTS): no file was opened for this table. Configs are our recipes'.
"""

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

from ..errors import unknown

MMLAB = "https://download.openmmlab.com/mmselfsup/"
WESTLAKE = "https://github.com/Westlake-AI/openmixup/releases/download/a2mim-in1k-weights/"
FAIR = "https://dl.fbaipublicfiles.com/"
REPOSITORY = "see repository"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One published file. `backbone` is a timm name, "" if no reader for the file is here, and `note` says why."""

    name: str
    method: str
    url: str
    backbone: str = "resnet50"
    numbers: dict[str, Any] = field(default_factory=dict)  # for backbones.build
    size: int = 224
    epochs: int = 0
    config: str = ""  # a recipe of our method of that name
    checksum: str = ""  # "sha256:" or "md5:" and the first digits
    layout: str = "plain names"
    licence: str = REPOSITORY
    file: str = ""  # its name on disk
    pool: str = "model"  # how its method's evaluation pools features, see backbones.features
    note: str = ""


R, V = "OpenMMLab or OpenMixup", "vit_base_patch16_224"
BEIT = {"use_abs_pos_emb": True, "use_rel_pos_bias": True}
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
CAE = {"use_abs_pos_emb": True, "use_rel_pos_bias": False}


def _of(kind: str) -> str:
    return f"{kind} of OpenMMLab 0.x or OpenMixup"


def _seed(method: str, config: str, url: str, epochs: int, layout: str = R, **more: Any) -> Model:
    """A row of the seed's table; OpenMMLab's file names end with a date and the first digits of their SHA-256."""
    file = url.rpartition("/")[2]
    name, digits = re.fullmatch(r"(.+?)(?:_\d{8})?(?:-([0-9a-f]{8}))?\.pth", file).groups()
    return Model(name=name, method=method, config=config, url=url, epochs=epochs, layout=layout, file=file,
                 checksum=f"sha256:{digits}" if digits else "", **more)


def _official(name: str, method: str, url: str, epochs: int = 0, layout: str = "plain names", **more: Any) -> Model:
    """A row of an official release; the name on disk is ours where another file has the same one."""
    file = urlparse(url).path.rpartition("/")[2]
    more.setdefault("file", f"{name}.pth.tar" if file.startswith("checkpoint") else file)
    return Model(name=name, method=method, url=url, epochs=epochs, layout=layout, **more)


_mmlab = [
    ("relative_loc", "r50_8xb64_step_ep70", "relative_loc/relative-loc_resnet50_8xb64-steplr-70e_in1k_20220225-84784688"
     ".pth", 70),
    ("rotation", "r50_8xb64_step_ep70", "rotation_pred/rotation-pred_resnet50_8xb16-steplr-70e_in1k_20220225-5b9f06a0"
     ".pth", 70),
    ("npid", "r50_4xb64_step_ep200", "npid/npid_resnet50_8xb32-steplr-200e_in1k_20220225-5fbbda2a.pth", 200),
    ("odc", "r50_8xb64_step_ep440", "odc/odc_resnet50_8xb64-steplr-440e_in1k_20220225-a755d9c0.pth", 440),
    ("simclr", "r50_8xb64_cos_lr0_6_fp16_ep200", "simclr/simclr_resnet50_8xb32-coslr-200e_in1k_20220428-46ef6bb9.pth",
     200),
    ("simclr", "r50_16xb256_cos_lr4_8_fp16_ep200", "simclr/simclr_resnet50_16xb256-coslr-200e_in1k_20220428-8c24b063"
     ".pth", 200),
    ("mocov2", "r50_4xb64_cos", "moco/mocov2_resnet50_8xb32-coslr-200e_in1k_20220225-89e03af4.pth", 200, _of("MoCo")),
    ("byol", "r50_8xb64_accu8_cos_lr4_8_fp16_ep200", "byol/byol_resnet50_16xb256-coslr-200e_in1k_20220527-b6f8eedd.pth",
     200, _of("BYOL")),
    ("byol", "r50_8xb64_accu8_cos_lr4_8_fp16_ep300", "byol/byol_resnet50_8xb32-accum16-coslr-300e_in1k_20220225-"
     "a0daa54a.pth", 300, _of("BYOL")),
    ("swav", "r50_8xb64_accu8_cos_lr9_6-mcrop-224_2-96_6_fp16_ep200", "swav/swav_resnet50_8xb32-mcrop-2-6-coslr-200e_"
     "in1k-224-96_20220225-0497dd5d.pth", 200),
    ("densecl", "r50_4xb64_cos", "densecl/densecl_resnet50_8xb32-coslr-200e_in1k_20220225-8c7808fe.pth", 200,
     _of("MoCo")),
    ("simsiam", "r50_4xb64_cos_lr0_05_ep100", "simsiam/simsiam_resnet50_8xb32-coslr-100e_in1k_20220225-68a88ad8.pth",
     100, _of("SimSiam")),
    ("simsiam", "r50_4xb64_cos_lr0_05_ep200", "simsiam/simsiam_resnet50_8xb32-coslr-200e_in1k_20220225-2f488143.pth",
     200, _of("SimSiam")),
    ("barlowtwins", "r50_8xb64_accu4_cos_lr1_6_ep300", "barlowtwins/barlowtwins_resnet50_8xb256-coslr-300e_in1k_"
     "20220419-5ae15f89.pth", 300),
]

SEED = [
    *(_seed(method, config, MMLAB + path, *rest) for method, config, path, *rest in _mmlab),
    _seed("deepcluster", "r50_sobel_8xb64_step_ep200", MMLAB + "deepcluster/deepcluster-sobel_resnet50_8xb64-steplr-"
          "200e_in1k-bb8681e2.pth", 200, "plain names", numbers={"sobel": True},
          note="Its first convolution sees two Sobel maps. The checksum is that of OpenSelfSup's release."),
    _seed("mocov3", "vit_small_8xb64_accu8_cos_fp16_ep300", MMLAB + "moco/mocov3_vit-small-p16_32xb128-fp16-coslr-300e_"
          "in1k-224_20220225-e31238dd.pth", 300, _of("MoCo v3"), backbone="vit_small_patch16_224",
          numbers={"num_heads": 12}),
    _seed("mae", "vit_base_dec8_dim512_8xb128_accu4_cos_fp16_ep400", MMLAB + "mae/mae_vit-base-p16_8xb512-coslr-400e_"
          "in1k-224_20220223-85be947b.pth", 400, backbone=V),
    _seed("simmim", "swin_base_sz192_8xb128_accu2_cos_ep100", MMLAB + "simmim/simmim_swin-base_16xb128-coslr-100e_in1k-"
          "192_20220316-1d090125.pth", 100, backbone="swin_base_patch4_window7_224", numbers={"window_size": 6},
          size=192),
    _seed("simmim", "vit_base_rgb_m_sz224_8xb128_accu2_step_fp16_ep800", WESTLAKE + "full_simmim_vit_base_rgb_m_sz224_"
          "8xb128_accu2_step_fp16_ep800.pth", 800, backbone="beit_base_patch16_224", numbers=BEIT, pool="mean",
          note="Other than in our recipe, and the official code, it has absolute positions and a table per block."),
    _seed("maskfeat", "vit_base_hog_108_sz224_8xb128_accu2_cos_fp16_ep300", MMLAB + "maskfeat/maskfeat_vit-base-p16_"
          "8xb256-coslr-300e_in1k_20220913-591d4c4b.pth", 300, backbone=V, pool="mean"),
    _seed("cae", "vit_base_sz224_8xb64_accu4_cos_fp16_ep300", MMLAB + "cae/cae_vit-base-p16_16xb256-coslr-300e_in1k-"
          "224_20220427-4c786349.pth", 300, backbone="beit_base_patch16_224", numbers=CAE, pool="mean"),
    _seed("a2mim", "r50_l3_sz224_init_8xb256_cos_ep100", WESTLAKE + "full_a2mim_r50_l3_sz224_init_8xb256_cos_ep100.pth",
          100),
    _seed("a2mim", "r50_l3_sz224_init_8xb256_cos_ep300", WESTLAKE + "full_a2mim_r50_l3_sz224_init_8xb256_cos_ep300.pth",
          300),
    _seed("a2mim", "vit_base_l0_sz224_8xb128_accu2_step_ep800", WESTLAKE + "full_a2mim_vit_base_l0_res_fft01_sz224_"
          "4xb128_accu4_step_fp16_ep800.pth", 800, backbone="beit_base_patch16_224", numbers=BEIT, pool="mean"),
]

_moco, _moco3, _swav, _dino = "MoCo, official", "MoCo v3, official", "SwAV or DeepCluster-v2, official", "apache-2.0"
_facebook = [  # name, method, path, epochs, layout, and the rest
    ("moco_v1_200ep", "mocov1", "moco/moco_checkpoints/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar", 200, _moco,
     {"checksum": "md5:b251726a"}),
    ("moco_v2_200ep", "mocov2", "moco/moco_checkpoints/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar", 200, _moco,
     {"checksum": "md5:59fd9945"}),
    ("moco_v2_800ep", "mocov2", "moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar", 800, _moco,
     {"checksum": "md5:a04e12f8"}),
    *((f"moco_v3_r50_{n}ep", "mocov3", f"moco-v3/r-50-{n}ep/r-50-{n}ep.pth.tar", n, _moco3, {})
      for n in (100, 300, 1000)),
    ("moco_v3_vit_small_300ep", "mocov3", "moco-v3/vit-s-300ep/vit-s-300ep.pth.tar", 300, _moco3,
     {"backbone": "vit_small_patch16_224", "numbers": {"num_heads": 12}}),
    ("moco_v3_vit_base_300ep", "mocov3", "moco-v3/vit-b-300ep/vit-b-300ep.pth.tar", 300, _moco3, {"backbone": V}),
    ("simsiam_100ep_bs512", "simsiam", "simsiam/models/100ep/pretrain/checkpoint_0099.pth.tar", 100,
     "SimSiam, official", {}),
    ("simsiam_100ep_bs256", "simsiam", "simsiam/models/100ep-256bs/pretrain/checkpoint_0099.pth.tar", 100,
     "SimSiam, official", {}),
    ("barlow_twins_1000ep", "barlowtwins", "barlowtwins/ljng/resnet50.pth", 1000, "plain names",
     {"file": "barlow_twins_resnet50.pth"}),
    ("barlow_twins_1000ep_full", "barlowtwins", "barlowtwins/ljng/checkpoint.pth", 1000,
     "Barlow Twins or DINO, whole file", {}),
    *((f"swav_{n}ep{size}", "swav", f"deepcluster/swav_{n}ep{size}_pretrain.pth.tar", n, _swav, {})
      for n, size in ((100, ""), (200, ""), (400, ""), (800, ""), (200, "_bs256"), (400, "_bs256"))),
    *((f"deepcluster_v2_{n}ep", "deepcluster_v2", f"deepcluster/deepclusterv2_{n}ep_pretrain.pth.tar", n, _swav, {})
      for n in (400, 800)),
    ("vicreg_1000ep", "vicreg", "vicreg/resnet50.pth", 1000, "plain names", {"file": "vicreg_resnet50.pth"}),
    *((f"dino_{name}", "dino", f"dino/dino_{name}_pretrain/dino_{name}_pretrain.pth", 0, "plain names",
       {"backbone": timm, "licence": _dino})
      for name, timm in (("deitsmall16", "vit_small_patch16_224"), ("deitsmall8", "vit_small_patch8_224"),
                         ("vitbase16", V), ("vitbase8", "vit_base_patch8_224"), ("resnet50", "resnet50"))),
    *((f"mae_vit_{kind}_1600ep", "mae", f"mae/pretrain/mae_pretrain_vit_{kind}.pth", 1600, "plain names",
       {"backbone": timm, "checksum": md5, "licence": "cc-by-nc-4.0"})
      for kind, timm, md5 in (("base", V, "md5:8cad7c"), ("large", "vit_large_patch16_224", "md5:b8b06e"),
                              ("huge", "vit_huge_patch14_224", "md5:9bdbb0"))),
    *((f"mae_vit_{kind}_finetuned", "mae", f"mae/finetune/mae_finetuned_vit_{kind}.pth", 1600, "plain names",
       {"backbone": timm, "numbers": {"global_pool": "avg"}, "licence": "cc-by-nc-4.0",
        "note": "Fine-tuned on the labels of ImageNet-1K: no self-supervised baseline."})
      for kind, timm in (("base", V), ("large", "vit_large_patch16_224"), ("huge", "vit_huge_patch14_224"))),
    *((f"mae_visualize_vit_large{loss}", "mae", f"mae/visualize/mae_visualize_vit_large{loss}.pth", 0,
       "MAE with its decoder", {"backbone": "vit_large_patch16_224", "licence": "cc-by-nc-4.0"})
      for loss in ("", "_ganloss")),
    *((f"maskfeat_vit_{kind}_1600ep", "maskfeat", f"pyslowfast/masked_models/in1k_VIT_{kind[0].upper()}_MaskFeat_PT_"
       "epoch_01600.pyth", 1600, "MaskFeat of SlowFast", {"backbone": f"vit_{kind}_patch16_224",
       "pool": "mean"})
      for kind in ("base", "large")),
    *((f"simclr_vissl_{n}ep", "simclr", f"vissl/model_zoo/simclr_rn50_{n}ep_simclr_8node_resnet_16_07_20.{digits}/"
       f"model_final_checkpoint_phase{n - 1}.torch", n, "VISSL", {"file": f"simclr_vissl_{n}ep.torch"})
      for n, digits in ((100, "8edb093e"), (200, "a816c0ef"), (800, "7e8feed1"))),
    ("swav_vissl_100ep", "swav", "vissl/model_zoo/swav_in1k_rn50_100ep_swav_8node_resnet_27_07_20.7e6fc6bf/"
     "model_final_checkpoint_phase99.torch", 100, "VISSL", {"file": "swav_vissl_100ep.torch"}),
]

_drive, _simmim = "https://drive.google.com/file/d/", "SimMIM, official"
_byol = "https://storage.googleapis.com/deepmind-byol/checkpoints/"
_ibot = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot/"
_beit = "https://unilm.blob.core.windows.net/beit/"
OFFICIAL = [
    *(_official(name, method, FAIR + path, epochs, layout, **more)
      for name, method, path, epochs, layout, more in _facebook),
    _official("byol_resnet50_1000ep", "byol", _byol + "pretrain_res50x1.pkl", 1000, "BYOL's JAX file",
              note="Trained with JAX's padding, one-sided where the stride is 2: features differ a little from the "
              "original's."),
    _official("byol_resnet200x2_1000ep", "byol", _byol + "pretrain_res200x2.pkl", 1000, "BYOL's JAX file", backbone="",
              note="A ResNet-200 of twice the width, which timm does not have."),
    *(_official(f"ibot_{name}16", "ibot", f"{_ibot}{name}_16/checkpoint_teacher.pth", backbone=timm)
      for name, timm in (("vits", "vit_small_patch16_224"), ("vitb", V))),
    _official("simmim_vit_base_800ep", "simmim", f"{_drive}1dJn6GYkwMIcoP3zqOEyW1_iQfpBi8UOw/view?usp=sharing", 800,
              _simmim, backbone="beit_base_patch16_224", numbers=SHARED, pool="mean",
              file="simmim_vit_base_800ep.pth"),
    *(_official(f"simmim_swin_base_{n}ep", "simmim", f"{_drive}{digits}/view?usp=sharing", n, _simmim, size=192,
                backbone="swin_base_patch4_window7_224", numbers={"window_size": 6},
                file=f"simmim_swin_base_{n}ep.pth")
      for n, digits in ((100, "1Wcbr66JL26FF30Kip9fZa_0lXrDAKP-d"), (800, "15zENvGjHlM71uKQ3d2FbljWPubtrPtjl"))),
    *(_official(f"cae_vit_{kind}", "cae", "https://github.com/lxtGH/CAE", 0, "CAE, official",
                backbone=f"beit_{kind}_patch16_224", numbers=CAE, pool="mean",
                file=f"cae_vit_{kind}.pth")
      for kind in ("base", "large")),
    _official("beit_base_pt22k", "beit", _beit + "beit_base_patch16_224_pt22k.pth", 0, "BEiT, official",
              backbone="beit_base_patch16_224", numbers=SHARED, pool="mean",
              note="Expects images of mean and deviation 0.5."),
    _official("beit_base_pt22k_ft22k", "beit", _beit + "beit_base_patch16_224_pt22k_ft22k.pth",
              backbone="beit_base_patch16_224", numbers={"use_rel_pos_bias": True, "global_pool": "avg"},
              note="Fine-tuned on the labels of ImageNet-22K; expects images of mean and deviation 0.5."),
    _official("densecl_r50_200ep", "densecl", "https://huggingface.co/xinlongwang/DenseCL/resolve/main/densecl_r50_"
              "imagenet_200ep.pth?download=true", 200),
    _official("simclr_v2_tensorflow", "simclr", "gs://simclr-checkpoints/simclrv2/pretrained", backbone="",
              note="TensorFlow's format, which is not read here; OpenMMLab and VISSL have SimCLR for PyTorch."),
    *(_official(f"dalle_{part}", "cae", f"https://cdn.openai.com/dall-e/{part}.pkl", backbone="",
                note="The tokenizer of CAE and BEiT and no backbone; see sslnb.tokenizers.")
      for part in ("encoder", "decoder")),
    _official("dalle_encoder_mmselfsup", "cae", MMLAB + "cae/dalle_encoder.pth", backbone="",
              note="The tokenizer of CAE and BEiT and no backbone; see sslnb.tokenizers."),
    _official("a2mim_extras", "a2mim", "https://github.com/Westlake-AI/A2MIM/releases", backbone="",
              note="A page of files for other networks; fetch one and load it by its path."),
]

MODELS = {model.name: model for model in [*SEED, *OFFICIAL]}


def names(method: str | None = None) -> list[str]:
    """Every published file, or those of one method."""
    methods = {model.method for model in MODELS.values()}
    if method is not None and method not in methods:
        unknown("method with published weights", method, methods)
    return [name for name, model in MODELS.items() if method in (None, model.method)]


def of_file(file: str) -> Model | None:
    """The row of a file with this name, however the file got here."""
    return next((model for model in MODELS.values() if model.file == file), None)
