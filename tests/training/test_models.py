"""Models: ordinary LLaVA folders, and no weight ever goes missing quietly."""

from __future__ import annotations

import http.server
import json
import threading

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests import tiny_models
from tests.training import tiny, tiny_pairs, tiny_processors
from training import models
from training.anatomy import image_token_id
from training.config import ModelConfig, SourceConfig
from training.data.chat import ChatEncoder
from training.data.encoding import Encoding
from training.data.item import IGNORE
from training.data.records import Place
from training.data.sample import Sample
from training.data.sources import load_rows
from training.models import (
    CheckpointError,
    assemble,
    build_model,
    load_processor,
    load_tower,
    load_vlm,
    save_model,
)
from training.settings import ConfigError
from training.sharding import load_whole


def read_rows(name):
    return load_rows(SourceConfig(path=name), "data.sources[0]")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Paths that are asked of a hub that has nothing, in a folder that has nothing either."""
    asked = []
    monkeypatch.chdir(tmp_path)

    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        constants = "huggingface_hub.constants."
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(f"{constants}HF_HUB_OFFLINE", False)
        monkeypatch.setattr(f"{constants}ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield asked
        server.shutdown()


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


def tiny_language():
    torch.manual_seed(3)
    return Qwen2ForCausalLM(
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


def test_parts_keep_their_weights(tower):
    language = tiny_language()
    eye = load_tower(str(tower))
    model = assemble(eye, language, image_token_id=3, feature_layer=-1)
    assert torch.equal(model.lm_head.weight, language.lm_head.weight)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight, "tied stays tied"
    for key, value in eye.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[key], value)


def test_a_student_from_a_whole_clip_and_a_causal_lm(tmp_path):
    """As LLaVA-MoD's: CLIP's class token dropped; the processor is made of the two folders."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "intermediate_size": 32, "image_size": 16, "patch_size": 8}
    text = {**sizes, "intermediate_size": 32, "vocab_size": 30, "eos_token_id": 1}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(tmp_path / "clip")
    tiny_language().save_pretrained(tmp_path / "lm")
    tokenizer = tiny.processor().tokenizer
    tokenizer.save_pretrained(tmp_path / "lm")
    model, processor = build_model(
        ModelConfig(
            vision=str(tmp_path / "clip"),
            language=str(tmp_path / "lm"),
            feature_strategy="default",
        ),
        0,
    )
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "say"}]}]
    prompt = processor.apply_chat_template(chat, tokenize=False)
    assert prompt == "USER: <image>\nsay ASSISTANT:"
    inputs = processor(images=[Image.new("RGB", (20, 30))], text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == image_token_id(model)).sum()) == 4, "no row for the CLS"
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    save_model(model, processor, tmp_path / "m")
    again = load_processor(str(tmp_path / "m"))
    assert again(images=[Image.new("RGB", (20, 30))], text=prompt).input_ids == [
        inputs["input_ids"][0].tolist()
    ]


def test_siglip_has_all_its_patches_or_as_in_released_code_all_but_the_first(tower, tmp_path):
    """729 or 728; here 4 or 3."""
    tiny_language().save_pretrained(tmp_path / "lm")
    tiny.processor().tokenizer.save_pretrained(tmp_path / "lm")
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    rows = {}
    for strategy in ("full", "default"):
        config = ModelConfig(
            vision=str(tower), language=str(tmp_path / "lm"), feature_strategy=strategy
        )
        model, processor = build_model(config, 0)
        inputs = processor(images=[picture], text="<image> say", return_tensors="pt")
        mask = inputs["input_ids"] == image_token_id(model)
        assert model(**inputs).logits.shape[:2] == mask.shape
        found = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        rows[strategy] = torch.cat(list(found))
        assert len(rows[strategy]) == int(mask.sum())
    assert len(rows["full"]) == 4
    torch.testing.assert_close(rows["default"], rows["full"][1:])


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "template", [CHATML, tiny_processors.LLAVA_CHATML], ids=["texts_alone", "images"]
)
def test_parts_keep_a_chat_template_that_shows_images_or_it_is_said(tmp_path, template):
    tower, small, _ = tiny_pairs.write_parts(tmp_path)
    (small / "chat_template.jinja").write_text(template)
    _, processor = build_model(ModelConfig(vision=str(tower), language=str(small)), 0)
    (note,) = Encoding(processor).notes or [""]
    if template == CHATML:
        assert processor.chat_template == models.CHAT_TEMPLATE
        assert "its tokenizer's chat template shows no images and is not used" in note
    else:
        assert processor.chat_template == template and note == ""
    encoder = ChatEncoder(processor)
    asked = Sample(Place(tmp_path), ("",), (("<image>\nwhat is this", "a red square"),))
    item = encoder.item(asked, encoder.see([Image.new("RGB", (16, 16))]))
    processor.save_pretrained(tmp_path / "p")
    again = load_processor(str(tmp_path / "p"))
    parts = [{"type": "image"}, {"type": "text", "text": "what is this"}]
    prompt = again.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    first = int((item["labels"] != IGNORE).nonzero()[0])
    told = again.tokenizer.decode(item["input_ids"][:first]).replace("<image>" * 4, "<image>")
    assert told == prompt, "what is trained is what the saved folder asks with"


@pytest.mark.parametrize(
    "name", ["llava-onevision", "qwen2.5-vl", "internvl", "smolvlm", "llava-siglip-full"]
)
def test_round_trip_of_every_class(name, tmp_path, monkeypatch):
    model, _ = tiny_models.build(name)
    monkeypatch.setattr(models, "load_processor", lambda path: path)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "a")
    for dtype, expected in (("auto", torch.bfloat16), (torch.float32, torch.float32)):
        again, where = load_vlm(tmp_path / "a", dtype=dtype)
        assert type(again) is type(model) and where == str(tmp_path / "a")
        assert again.dtype == expected
        written = model.state_dict()
        assert all(
            torch.equal(written[k].to(dtype=expected), v) for k, v in again.state_dict().items()
        )
    student, _ = build_model(ModelConfig(path=str(tmp_path / "a")), 0)
    assert student.dtype == torch.float32, "what is trained is fp32 whatever its checkpoint has"
    state = load_file(tmp_path / "a" / "model.safetensors")
    state.pop(next(key for key in sorted(state) if "norm" in key))
    save_file(state, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing_keys: .*norm"):
        load_vlm(tmp_path / "a")


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
            load_vlm(tmp_path / "empty")

    def test_no_such_model(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries again
        with pytest.raises(CheckpointError, match=r"nobody/nothing: neither a folder nor"):
            load_vlm("nobody/nothing")

    @pytest.mark.parametrize("load", [load_vlm, load_processor])
    def test_no_such_folder(self, load, tmp_path):
        with pytest.raises(CheckpointError, match=r"nothing: no such folder$"):
            load(str(tmp_path / "nothing"))

    @pytest.mark.parametrize("load", [load_vlm, load_processor, load_tower, read_rows])
    @pytest.mark.parametrize("name", ["runs/teacher/model", "./runs", "~/model", "/no/model"])
    def test_a_missing_folder_is_looked_for_on_no_hub(self, load, name, hub):
        said = name.replace("~", "(~|/.*)")  # a configuration has it expanded
        with pytest.raises(ValueError, match=f"{said}: no such (file or )?folder$"):
            load(name)
        assert hub == []

    @pytest.mark.parametrize("load", [load_vlm, load_processor, load_tower])
    def test_a_hub_is_asked_once_for_a_name(self, load, hub):
        with pytest.raises(CheckpointError, match="runs/model: neither a folder nor on the hub"):
            load("runs/model")
        assert len([path for path in hub if "runs/model" in path]) == 1

    def test_another_architecture(self, tower):
        with pytest.raises(CheckpointError, match="is 'siglip_vision_model', expected an image-te"):
            load_vlm(tower)

    def test_missing_weight(self, saved):
        self.change(saved, lambda state: state.pop("language_model.lm_head.weight"))
        with pytest.raises(CheckpointError, match=r"missing_keys: lm_head.weight"):
            load_vlm(saved)

    def test_surplus_weight(self, saved):
        self.change(saved, lambda state: state.update({"language_model.extra": torch.zeros(1)}))
        with pytest.raises(CheckpointError, match=r"unexpected_keys: .*extra"):
            load_vlm(saved)

    def test_other_shape(self, saved):
        config = json.loads((saved / "config.json").read_text())
        config["text_config"]["vocab_size"] += 1
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"lm_head.weight"):
            load_vlm(saved)

    def test_cut_short(self, saved):
        weights = saved / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_vlm(saved)


def test_a_state_of_another_architecture_is_named(built, tower):
    other, _ = build_model(tiny.model_config(tower, hidden=24, layers=2), 0)
    with pytest.raises(CheckpointError, match=r"^checkpoint-5: another arch.*layers\.1.*size mism"):
        load_whole(built[0], other.state_dict(), "checkpoint-5")
