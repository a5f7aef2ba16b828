"""What does lmms-eval need of a student? A folder that can be moved anywhere, with names and
arguments as of version 0.7.3:

    model/      the model and its processor, with the chat template, as transformers loads them
    tasks.txt   the benchmarks of LLaVA-KD's tables by their names there, one a line
    run.sh      the command; GPUS, DEVICE and TASKS change it, more arguments are passed on

lmms-eval has a wrapper for each family of models, and some overrule the processor's own image
sizes: those are passed on, so that the student sees what it saw in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.settings import ConfigError

ANY = "huggingface"  # the wrapper for whatever AutoModelForImageTextToText loads
WRAPPERS = {
    "gemma3": "gemma3",
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
}
TASKS = """vqav2_val gqa vizwiz_vqa_val scienceqa_img textvqa_val mme mmbench_en_dev mmbench_cn_dev
pope mmmu_val"""

# With one process each wrapper is told where the model goes (one of them fails if it is not); with
# several it gives each its own GPU, unless it is told.
RUN = """#!/bin/sh
# pip install lmms-eval, then: sh run.sh, or for instance GPUS=8 sh run.sh --limit 100
{note}cd "$(dirname "$0")" || exit 1
ARGS={arguments}
if [ "${{GPUS:-1}}" = 1 ]; then
    ARGS="$ARGS,device=${{DEVICE:-cuda}},device_map=${{DEVICE:-cuda}}"
fi
exec accelerate launch --num_processes "${{GPUS:-1}}" -m lmms_eval \\
    --model {wrapper} --model_args "$ARGS" \\
    --tasks "${{TASKS:-$(paste -sd, tasks.txt)}}" --batch_size 1 \\
    --output_path logs --log_samples "$@"
"""
# Seen with SmolVLM and transformers 5.23: the wrapper names an argument that processors refuse.
NOTE = """# lmms-eval 0.7.3 has no wrapper for {kind}, and the one for any model stops with
# "You passed keyword argument `audios`" under transformers 5: it needs a later lmms-eval.
"""


def export_model(model: Any, processor: Any, out: Path) -> str:
    """Write the folder for lmms-eval; returns the command in its run.sh.

    Raises:
        ConfigError: `out` is there and not empty, or the processor has no usable chat template.
    """
    from training.data.chat import ChatEncoder
    from training.models import save_model

    if processor.chat_template is None:
        name = type(processor).__name__
        raise ConfigError(
            f"processor: got a {name} without chat_template, expected one: save it with the "
            "template that the model was trained with (chat_template.jinja in its folder)"
        )
    ChatEncoder(processor)  # refuses a template that shows no image, or rewrites what was said
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out: {out} is not empty, expected a new folder")
    out.mkdir(parents=True, exist_ok=True)
    save_model(model, processor, out / "model")
    (out / "tasks.txt").write_text("\n".join(TASKS.split()) + "\n")
    kind = model.config.model_type
    arguments = {"pretrained": "model", **_image_sizes(kind, processor.image_processor)}
    text = ",".join(f"{name}={value}" for name, value in arguments.items())
    note = "" if kind in WRAPPERS else NOTE.format(kind=kind)
    command = RUN.format(wrapper=WRAPPERS.get(kind, ANY), arguments=text, note=note)
    (out / "run.sh").write_text(command)
    return command


def _image_sizes(kind: str, images: Any) -> dict[str, int]:
    """Arguments that the wrapper would otherwise set to values of its own."""
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        return {
            "min_pixels": images.size["shortest_edge"],
            "max_pixels": images.size["longest_edge"],
        }
    if kind == "internvl":
        return {"min_patches": images.min_patches, "max_patches": images.max_patches}
    return {}
