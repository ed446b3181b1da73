"""Shipped configurations: one for each model of ``conf/model/``, and when one is taken."""

import json
import re
from pathlib import Path

import pytest
from transformers import PretrainedConfig

from fttrain.config.run_config import compose
from fttrain.frozen.config import ModelConfig
from fttrain.model.decoder import Architecture
from fttrain.plan import shapes
from fttrain.plan.architectures import planned_config, shipped_config
from fttrain.util.errors import UserError
from fttrain.util.paths import conf_folder

LLAMA = "meta-llama/Llama-3.3-70B-Instruct"
LOCAL = {"local", "smollm2_135m"}  # no hub ids: a path of the user's, and an installed package
OPTIONS = sorted({path.stem for path in (conf_folder() / "model").glob("*.yaml")} - LOCAL)
PUBLISHED = {  # billions of parameters, as model cards have them
    "llama2_7b": 6.74,
    "llama3_70b": 70.6,
    "llama3_8b": 8.03,
    "mistral_7b": 7.25,
    "qwen2_5_7b": 7.62,
    "qwen2_7b": 7.62,
    "qwen3_14b": 14.8,
    "qwen3_32b": 32.8,
    "qwen3_4b": 4.02,
    "qwen3_8b": 8.19,
}


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty; the hub itself cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_model_has_its_published_size(option: str, hub_cache: Path) -> None:
    config = planned_config(compose([f"model={option}"]).model)
    assert shapes.parameters(Architecture(config)) / 1e9 == pytest.approx(
        PUBLISHED[option], rel=5e-3
    )


def test_numbers_that_no_parameter_count_shows(hub_cache: Path) -> None:
    config = planned_config(ModelConfig("llama3_70b", LLAMA))
    assert config.max_position_embeddings == 131072
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert config.rope_parameters["rope_type"] == "llama3"
    assert shipped_config("qwen2_5_7b").sliding_window is None
    assert shipped_config("qwen3_4b").head_dim == 128


def test_the_config_json_of_the_hub_s_cache_wins(hub_cache: Path) -> None:
    repository = hub_cache / f"models--{LLAMA.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    fields = json.loads((conf_folder() / "model/architectures/llama3_70b.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 7}))
    assert layers(planned_config(ModelConfig("llama3_70b", LLAMA))) == 7


@pytest.mark.parametrize(("path", "revision"), [("nobody/nothing", None), (LLAMA, "some-branch")])
def test_other_hub_ids_and_revisions_are_the_hub_s(
    path: str, revision: str | None, hub_cache: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(f"model.path={path}: not a folder here")):
        planned_config(ModelConfig("model", path, revision))


def layers(config: PretrainedConfig) -> int:
    return int(config.num_hidden_layers)
