"""What the README promises of the demo recipes: three seeds, intervals apart, a budget in steps and not in seconds.

The test split is used here, once per run, and nowhere while a recipe was chosen. `pytest --seeds 1` asks for the
margins alone, in half the time; SimCLR, BYOL and MAE keep their three.
"""

import json
import statistics

import pytest

from sslnb import data, methods, pretrain
from sslnb.evaluate import evaluate, mean_interval
from sslnb.evaluate.reconstruction import masked_error, masked_psnr

pytestmark = pytest.mark.slow
PAINTERS = ("mae", "simmim", "a2mim", "inpainting", "cae")
THREE = range(3)  # seeds


@pytest.fixture
def seeds(request):
    return range(request.config.getoption("--seeds"))


def results(method: str, folder, seeds, protocols=("knn", "linear")) -> dict[str, list[float]]:
    """kNN and linear accuracy in % of the trained network, its random initialisation and raw pixels, per seed."""
    found: dict[str, list[float]] = {}
    recipe = methods.recipes(method)["demo"]
    for seed in seeds:
        run = pretrain(recipe, out=folder / f"{method}-{seed}", seed=seed)
        for row in evaluate(run, protocols=protocols, seed=seed):
            name = "trained" if row["source"] == run.path.name else row["source"]
            found.setdefault(f"{name} {row['protocol'].split()[0]}", []).append(row["top1"])
        if method in PAINTERS:
            psnr = masked_psnr(run, data.load(recipe.data, "test"))
            found.setdefault("trained psnr", []).append(psnr.model)
            found.setdefault("baseline psnr", []).append(psnr.baseline)
    print(f"\nDEMO {method} " + json.dumps({k: [round(v, 1) for v in vs] for k, vs in found.items()}))
    return found


def is_above(better: list[float], worse: list[float], by: float = 0.0) -> bool:
    """The means differ by at least `by`, and the 95 % intervals of the means over seeds, if several, do not touch."""
    high = mean_interval(worse)[1] if len(set(worse)) > 1 else worse[0]  # raw pixels are the same for every seed
    low = mean_interval(better)[0] if len(better) > 1 else better[0]
    return statistics.fmean(better) - statistics.fmean(worse) >= by and low > high


def clearly_above(better: list[float], worse: list[float], by: float = 0.0) -> None:
    assert is_above(better, worse, by), f"{better} is not clearly above {worse} by {by}"


@pytest.mark.parametrize("method, steps", [("simclr", 600), ("byol", 1200)])
def test_joint_embedding_beats_its_start_by_20_points(method, steps, tmp_path):
    recipe = methods.recipes(method)["demo"]
    assert recipe.epochs * recipe.steps_per_epoch(1300) == steps
    found = results(method, tmp_path, THREE)
    clearly_above(found["trained knn"], found["random initialisation knn"], by=20)
    clearly_above(found["trained knn"], found["raw pixels knn"])
    clearly_above(found["trained linear"], found["raw pixels linear"], by=20)


@pytest.mark.parametrize("method, by", [
    ("deepcluster", 20), ("npid", 20), ("odc", 15), ("mocov1", 20), ("mocov2", 20), ("swav", 20), ("densecl", 20),
    ("simsiam", 20), ("barlowtwins", 20), ("mocov3", 10)])
def test_contrast_and_clustering_beat_their_start_in_knn(method, by, tmp_path, seeds):
    found = results(method, tmp_path, seeds, ["knn"])
    clearly_above(found["trained knn"], found["random initialisation knn"], by)


@pytest.mark.parametrize("method", ["relative_loc", "rotation"])
def test_pretext_tasks_beat_their_start_by_5_points_in_the_linear_probe(method, tmp_path, seeds):
    found = results(method, tmp_path, seeds, ["linear"])
    clearly_above(found["trained linear"], found["random initialisation linear"], by=5)


def test_mae_beats_its_start_by_15_points_and_the_mean_by_5_decibel(tmp_path):
    recipe = methods.recipes("mae")["demo"]
    assert recipe.epochs * recipe.steps_per_epoch(5000) == 800
    found = results("mae", tmp_path, THREE)
    clearly_above(found["trained knn"], found["random initialisation knn"], by=15)
    clearly_above(found["trained psnr"], found["baseline psnr"], by=5)


@pytest.mark.parametrize("method", ["simmim", "a2mim", "inpainting", "cae"])
def test_painters_beat_the_mean_of_the_visible_pixels_by_3_decibel(method, tmp_path, seeds):
    found = results(method, tmp_path, seeds, [])
    clearly_above(found["trained psnr"], found["baseline psnr"], by=3)


def test_maskfeat_says_how_hidden_edges_run_better_than_the_mean_of_the_visible_ones(tmp_path, seeds):
    recipe = methods.recipes("maskfeat")["demo"]
    runs = [pretrain(recipe, out=tmp_path / str(seed), seed=seed) for seed in seeds]
    errors = [masked_error(run, data.load(recipe.data, "test")) for run in runs]
    print(f"\nDEMO maskfeat explained {[round(e.explained, 3) for e in errors]}")
    clearly_above([-e.model for e in errors], [-e.baseline for e in errors], by=0.1 * errors[0].baseline)
