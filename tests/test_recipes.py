"""Each recipe in examples/recipes/ runs as it stands, and none of our warnings shows."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
NEEDS = {
    "accelerate_loop": "accelerate",
    "deepspeed_engine": "deepspeed",
    "fastai_learner": "fastai",
    "lightning_module": "pytorch_lightning",
    "skorch_net": "skorch",
    "timm_loop": "timm",
    "transformers_trainer": "transformers",
}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.py")))
def test_the_recipe_runs_without_a_word_from_us(recipe: str, tmp_path: Path, monkeypatch) -> None:
    if recipe in NEEDS:
        pytest.importorskip(NEEDS[recipe])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
    assert not [str(warning.message) for warning in caught if "dm." in str(warning.message)]
