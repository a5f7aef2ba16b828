"""Models: ordinary LLaVA folders, and no weight ever goes missing quietly."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.training import tiny
from training.config import ModelConfig
from training.demo.words import build_processor
from training.models import (
    CheckpointError,
    assemble,
    build_model,
    image_features,
    load_model,
    load_state,
    load_tower,
    same_vocabulary,
    save_model,
    share_tower,
)
from training.settings import ConfigError


@pytest.fixture
def tower(tmp_path):
    return tiny.write_tower(tmp_path / "tower")


@pytest.fixture
def built(tower):
    return build_model(tiny.model_config(tower), seed=0)


def test_saved_folder_is_loaded_by_transformers_alone(built, tmp_path):
    model, processor = built
    save_model(model, processor, tmp_path / "m")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    assert type(again) is LlavaForConditionalGeneration
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    read = AutoProcessor.from_pretrained(tmp_path / "m")
    assert read.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert not list(tmp_path.glob(".*incomplete")), "nothing of the staging folder stays"


def test_parts_keep_their_weights(tower):
    torch.manual_seed(3)
    language = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )
    eye = load_tower(str(tower))
    model = assemble(eye, language, image_token_id=3, feature_layer=-1)
    assert torch.equal(model.lm_head.weight, language.lm_head.weight)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight, "tied stays tied"
    for key, value in eye.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[key], value)


def test_seed_decides_new_weights(tower):
    def weight(seed):
        return build_model(tiny.model_config(tower), seed)[0].lm_head.weight

    assert torch.equal(weight(1), weight(1)) and not torch.equal(weight(1), weight(2))


def test_head_may_be_larger_than_the_tokenizer(tower):
    config = ModelConfig(
        vision=str(tower), processor=str(tower), hidden=16, layers=1, heads=2, vocab_size=1000
    )
    assert build_model(config, 0)[0].lm_head.weight.shape == (1000, 16)


def test_parts_that_are_not_named(tower):
    with pytest.raises(ConfigError, match=r"model.vision: got null"):
        build_model(ModelConfig(), 0)
    with pytest.raises(ConfigError, match=r"model.processor: got null"):
        build_model(ModelConfig(vision=str(tower)), 0)


class TestBrokenCheckpoints:
    @pytest.fixture
    def saved(self, built, tmp_path):
        model, processor = built
        save_model(model, processor, tmp_path / "m")
        return tmp_path / "m"

    def change(self, saved, edit):
        state = load_file(saved / "model.safetensors")
        edit(state)
        save_file(state, saved / "model.safetensors", metadata={"format": "pt"})

    def test_no_config(self, tmp_path):
        tmp_path.joinpath("empty").mkdir()
        with pytest.raises(CheckpointError, match=r"no config.json"):
            load_model(tmp_path / "empty")

    def test_another_architecture(self, tower):
        with pytest.raises(CheckpointError, match="model_type is 'siglip_vision_model'"):
            load_model(tower)

    def test_missing_weight(self, saved):
        self.change(saved, lambda state: state.pop("language_model.lm_head.weight"))
        with pytest.raises(CheckpointError, match=r"missing_keys: lm_head.weight"):
            load_model(saved)

    def test_surplus_weight(self, saved):
        self.change(saved, lambda state: state.update({"language_model.extra": torch.zeros(1)}))
        with pytest.raises(CheckpointError, match=r"unexpected_keys: .*extra"):
            load_model(saved)

    def test_other_shape(self, saved):
        config = json.loads((saved / "config.json").read_text())
        config["text_config"]["vocab_size"] += 1
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"lm_head.weight"):
            load_model(saved)

    def test_cut_short(self, saved):
        weights = saved / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_model(saved)


def test_load_state_names_what_differs(built, tower):
    other, _ = build_model(tiny.model_config(tower, hidden=24, layers=2), 0)
    with pytest.raises(CheckpointError) as caught:
        load_state(built[0], other.state_dict(), "checkpoint-5")
    message = str(caught.value)
    assert "checkpoint-5" in message and "surplus" in message and "layers.1" in message
    assert "shape" in message and "expected" in message


def test_tower_is_shared_only_if_equal(built, tower, tmp_path):
    student, _ = built
    teacher, _ = build_model(tiny.model_config(tower, hidden=24), 1)
    assert share_tower(student, teacher)
    assert teacher.model.vision_tower is student.model.vision_tower
    other, _ = build_model(tiny.model_config(tiny.write_tower(tmp_path / "t2", seed=9)), 1)
    assert not share_tower(student, other)
    assert other.model.vision_tower is not student.model.vision_tower


@pytest.mark.parametrize("layer", [-1, -2, [-2, -1]], ids=str)
@pytest.mark.parametrize("strategy", ["full", "default"])
def test_features_are_what_llava_projects(built, layer, strategy):
    model, _ = built
    model.config.vision_feature_layer = layer
    model.config.vision_feature_select_strategy = strategy
    pixels = torch.randn(3, 3, 16, 16)
    features = image_features(model, pixels)
    if isinstance(layer, list):  # a projector that takes both layers side by side
        width = model.model.multi_modal_projector.linear_1.out_features
        model.model.multi_modal_projector.linear_1 = torch.nn.Linear(features.shape[-1], width)
    ours = model.model.multi_modal_projector(features)
    theirs = model.get_image_features(
        pixels, vision_feature_layer=layer, vision_feature_select_strategy=strategy
    ).pooler_output
    assert torch.equal(ours, torch.stack(list(theirs)))


def test_vocabularies_must_agree():
    same_vocabulary(tiny.processor(), tiny.processor())
    other = build_processor([*tiny.WORDS, "zebra"], image_size=16, patch_size=8)
    with pytest.raises(CheckpointError, match="zebra"):
        same_vocabulary(tiny.processor(), other)
