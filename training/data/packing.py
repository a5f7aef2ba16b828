"""Can the samples of a micro-batch lie end to end in one row, and what does a model need for that?

A packed row has no padding: `position_ids` begin at 0 with every sample, there is no attention
mask, and transformers sees from the positions where a sample ends, so none attends to another.
That holds for models with one position a token that hand `position_ids` on (LLaVA and its
relatives); Qwen-VL has three and makes them itself, window and linear attention may reach over the
borders. So nothing is believed: `check_packable` compares two samples packed with the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import mllmkd_kernels as mk
from mllmkd_kernels.batch import in_eval
from mllmkd_kernels.models import TOKEN_TYPES
from training.data.collate import Batch, Collator
from training.data.item import IGNORE, Item
from training.settings import ConfigError

# Packed and apart differ by the order of sums only: some units in the last place of the dtype. A
# sample that attends to another one changes its hidden states by tens of per cent.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
PROBE = (7, 5)  # tokens of the two samples


class PackedCollator(Collator):
    """Lays `Item`s end to end: a `Batch` of one row without attention_mask, with position_ids."""

    def __call__(self, items: Sequence[Item]) -> Batch:
        """One row of at least one item, in their order.

        Raises:
            ValueError: as `Collator`, or a sample whose first token is a label: in a packed row the
                sample before it would have to say it.
        """
        padded: dict[str, Any] = dict(super().__call__(items))
        kept = padded.pop("attention_mask").bool()
        for name in ("input_ids", "labels", *TOKEN_TYPES):
            if name in padded:
                padded[name] = padded[name][kept].unsqueeze(0)
        first = [item["sample_id"] for item in items if int(item["labels"][0]) != IGNORE]
        if first:
            raise ValueError(f"items: the first token of {first[0]!r} is a label, expected none")
        lengths = [len(item["input_ids"]) for item in items]
        padded["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
        return padded  # pyright: ignore[reportReturnType]


@torch.no_grad()
def check_packable(model: Any) -> None:
    """Run a model on two texts packed and apart.

    Raises:
        ConfigError: it has positions of its own, or the texts change each other.
    """
    name = type(model).__name__
    if hasattr(model.model, "get_rope_index"):
        raise ConfigError(f"packing: {name} has three positions a token, which it makes itself")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    most = min(64, model.get_input_embeddings().weight.shape[0])
    texts = [torch.randint(3, most, (1, n), generator=generator).to(device) for n in PROBE]
    image = getattr(model.config, "image_token_id", None)
    texts = [torch.where(text == image, 3 if image != 3 else 4, text) for text in texts]
    with in_eval(model):
        apart = [mk.head_inputs(model, input_ids=text).hidden for text in texts]
        positions = torch.cat([torch.arange(n, device=device) for n in PROBE]).unsqueeze(0)
        packed = mk.head_inputs(model, input_ids=torch.cat(texts, 1), position_ids=positions).hidden
    whole = torch.cat(apart, 1).float()
    error = float((packed.float() - whole).abs().max() / whole.abs().max())
    limit = TOLERANCE.get(packed.dtype, TOLERANCE[torch.float32])
    if not error <= limit:
        kind = getattr(model.config, "_attn_implementation", "its attention")
        raise ConfigError(
            f"packing: {name} with {kind}: a packed sample differs from the same alone by "
            f"{error:.1e}, expected at most {limit:.0e}; set data.packing to false"
        )
