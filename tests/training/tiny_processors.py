"""The real processor classes at tiny sizes: what a test needs to be any off-the-shelf model.

`PROCESSORS` names a builder for each class. All share one byte-level tokenizer made here (every
text has ids, none is unknown) and use the image processors that run on Pillow. The chat templates
are written here too, with the published ones' structure: Qwen's default system turn, OneVision's
answers that open differently in history and in a prompt, SmolVLM's space before an answer,
InternVL's line break after an image, Gemma's own before and after one.

Two packages these classes ask for are only used for video, and are stood in for where they are not
installed: torchvision (the video processors) and num2words (SmolVLM spells the number of frames).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import transformers as tf
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import processing_utils
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

START, END, EOS, PAD = "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<|pad|>"
# The names by which InternVL's and SmolVLM's processors ask the tokenizer for their tokens.
NAMED = {
    "image_token": "<image>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": EOS,
}
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TILE_TOKENS = tuple(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))
CORPUS = "what is this ? a red square and a blue one . system user assistant User Assistant : \n "

TEXT = "{% if p.type == 'text' %}{{ p.text }}{% endif %}"
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nbe good<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}" + TEXT + ""
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTERNVL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'image' %}<IMG_CONTEXT>\n{% endif %}" + TEXT + "{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONEVISION = (
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% for p in m.content if p.type == 'image' %}<image>{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ '\n' + p.text }}{% endgeneration %}{% else %}{{ '\n' + p.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:"
    "{% if m.content[0].type != 'image' %} {% endif %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% endif %}" + TEXT + "{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
LLAVA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: "
    "{% for p in m.content %}{% if p.type == 'image' %}<image>\n{% endif %}" + TEXT + ""
    "{% endfor %} ASSISTANT:{% else %} {{ m.content[0].text }}<|im_end|>{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% set system = messages[0].content[0].text + '\n\n' "
    "if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ system if loop.first }}"
    "{% for p in m.content %}{% if p.type == 'image' %}<start_of_image>{% endif %}" + TEXT + ""
    "{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# A LLaVA's that asks in another way than LLaVA did.
LLAVA_CHATML = QWEN.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
# As the published LLaVA-1.5 has it: asks as training does, and ends no answer in its history.
UNENDED = (
    "{% for m in messages %}{{ m.role.upper() }}: "
    "{% for p in m.content %}{% if p.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@cache
def trained() -> str:
    """The shared tokenizer as json: 256 bytes, some merges, the special tokens."""
    specials = [PAD, START, END, *NAMED.values(), *QWEN_TOKENS, *TILE_TOKENS]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = BpeTrainer(
        vocab_size=340,
        special_tokens=list(dict.fromkeys(specials)),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 3, trainer)
    return tokenizer.to_str()


def tokenizer(eos: str = END, image: str | None = None) -> Any:
    """A fresh tokenizer; `image` is what it names as image token, if not LLaVA's."""
    named = NAMED | ({"image_token": image} if image else {})
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained()),
        eos_token=eos,
        pad_token=PAD,
        extra_special_tokens=named,
    )


def llava() -> Any:
    """8 pixels a patch, 16 a side: 4 rows an image."""
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return tf.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=LLAVA,
    )


def onevision() -> Any:
    """4 rows a tile, plus the newline rows; tiles of 16 pixels in up to 2 x 2."""
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]
    )
    return tf.LlavaOnevisionProcessor(
        images,
        tokenizer(),
        video(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION,
    )


def qwen2_5_vl() -> Any:
    """8 pixels a patch, merged 2 x 2: an image of 32 x 48 is 6 rows."""
    images = Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
    )
    return tf.Qwen2_5_VLProcessor(
        images, tokenizer(image="<|image_pad|>"), video(), chat_template=QWEN
    )


def internvl() -> Any:
    """4 rows a tile of 32 pixels, at most 2 tiles and the thumbnail."""
    images = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=2
    )
    return tf.InternVLProcessor(
        images, tokenizer(), video(), image_seq_length=4, chat_template=INTERNVL
    )


def smolvlm() -> Any:
    """4 rows a tile of 32 pixels, an image of up to 64: 4 tiles and the thumbnail."""
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    return tf.SmolVLMProcessor(
        images, tokenizer(eos=EOS), video(), image_seq_len=4, chat_template=SMOLVLM
    )


def gemma3() -> Any:
    """4 rows an image, between line breaks that its tokenizer joins with those of the template."""
    own: Any = tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained()),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token=PAD,
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    own.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    own.add_tokens(["\n\n\n\n", "\n\n\n", "\n\n"])
    first = ("<bos>", own.bos_token_id)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[first]
    )
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return tf.Gemma3Processor(images, own, chat_template=GEMMA, image_seq_length=4)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": llava,
    "llava-onevision": onevision,
    "qwen2.5-vl": qwen2_5_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
}


def video() -> Any:
    """What stands where a processor wants a video processor; no test gives it a video."""
    if is_torchvision_available():
        return tf.LlavaOnevisionVideoProcessor()
    return NoVideo()


class NoVideo(VideoProcessorMixin):
    """A video processor in name: it can be saved and loaded with its processor."""

    num_frames, fps, merge_size = 1, 1, 2

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> NoVideo:
        return cls()


if not is_torchvision_available():
    # processing_utils checks arguments against a module object of its own, and loads by this name
    vars(processing_utils.transformers_module)["VideoProcessorMixin"] = NoVideo
    auto: Any = import_module("transformers.models.auto.video_processing_auto")
    auto.AutoVideoProcessor = NoVideo
smol: Any = processing_smolvlm
if smol.num2words is None:
    smol.num2words = str
