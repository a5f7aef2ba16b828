"""How does a Hugging Face model hand over what its logits are made of, without making them?

The losses want the last hidden states (B, T, D) and the `lm_head` weight (V, D); the model wants
to return logits (B, T, V). `head_inputs` runs the model's *own* forward with one thing replaced:
where the class calls its `lm_head`, a recorder takes the hidden states and answers with one row
of V known numbers. So

* what the class does before its head happens exactly as it does it (images, masks, final norm);
* the head's matrix product never runs, and nothing of size T × V exists;
* what the class does *after* its head shows on the known numbers: nothing, or a soft-cap
  `c·tanh(z/c)`, which `HeadInputs` can say; anything else (a logit scale, suppressed tokens) is
  refused.

The last point is why there is no table of class names here: Gemma 3's text-only class applies
its soft-cap and its vision-language class does not, Granite's scaling is 1 in one checkpoint and
6 in the next. The model's code decides.

The replacement lives in a shallow copy of the modules on the path to the head. The model itself
is never touched; parameters, sub-modules, their hooks and training mode are the model's own.

Left out: auxiliary losses (a router's logits can be recorded, see `record`), encoder-decoders, and
whether a sample with image tokens was given its image (the data loader's business: looking would
wait for the device).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mllmkd_kernels.heads import HeadInputs
from mllmkd_kernels.needs import Needs
from mllmkd_kernels.record import recording

# Arguments of the loss, which the model would compute after its head. Dropped; nothing else is.
_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch")
_IMAGE_ARGUMENTS = (
    "pixel_values",
    "pixel_values_videos",
    "image_grid_thw",
    "video_grid_thw",
    "mm_encoder_outputs",
)
#: Which positions are image, 0 for text. 3-D RoPE (Qwen2.5-VL) and two-way attention among image
#: tokens (Gemma 3, PaliGemma) are made from these; without them those classes quietly do something
#: else.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


def head_inputs(model: nn.Module, record: Needs | None = None, **batch: Any) -> HeadInputs:
    """Run a causal LM or vision-language model up to, never through, its `lm_head`.

    Gradients flow into `hidden` as they would in `model(**batch)`; run a teacher under
    `torch.no_grad()`. `hidden @ weight.T + bias`, soft-capped where `softcap` is not None, equals
    `model(**batch).logits`.

    Args:
        model: a transformers model with `get_output_embeddings()`. `torch.compile`d models and
            PEFT adapters are looked into (the graph compiled for the whole model is not used:
            compile `model.model`). So is a data-parallel wrapper, where no gradient is wanted;
            going round it in training would skip its all-reduce, so there put the model,
            `head_inputs` and the loss into one module and wrap that.
        record: what else is kept on the way, in `HeadInputs.recorded`: an objective's `needs`.
        **batch: what `model(**batch)` takes. `labels`, `shift_labels` and `num_items_in_batch`
            belong to the loss and are dropped; `use_cache` is False unless given;
            `mm_encoder_outputs` is copied, because models write to it.

    Returns:
        `HeadInputs` with `hidden` (B, T, D), `weight` (V, D), `bias` (V,) or None, `softcap` a
        float or None. `weight` and `bias` are the parameters themselves, frozen or not.

    Raises:
        TypeError: `model` is not such a model, or is wrapped in a way that would change the
            result; its head is not a plain linear layer held whole in memory; `batch` has an
            argument that no part of the model takes.
        ValueError: an encoder-decoder; logits that are not (soft-capped) head outputs; images
            without the token types their class needs; `logits_to_keep`; hidden states that do
            not line up with the tokens; what `record` asks for and the model does not have.
    """
    model = _unwrap(model)
    head, path = _find_head(model)
    batch = _checked_batch(model, batch)
    recorder = _Recorder(head)
    with recording(model, record) as recorded:
        # The class's forward, not the instance's: a patched one would be bound to the real head.
        output = type(model).forward(_with_replaced(model, path, recorder), **batch)
    name = type(model).__name__
    if len(recorder.seen) != 1:
        raise ValueError(
            f"model: {name} called its lm_head {len(recorder.seen)} times in one forward, "
            "expected once"
        )
    hidden = recorder.seen[0]
    _check_rows(name, hidden, batch)
    logits = output[0] if isinstance(output, tuple) else output.logits
    softcap = _softcap_of(name, recorder.answer, logits)
    return HeadInputs(hidden, head.weight, head.bias, softcap, recorded=recorded())


# --- one module replaced in a shallow copy ------------------------------------------------------


def hidden_size(model: nn.Module) -> int:
    """D, of the hidden states that enter the head of a model as `head_inputs` takes it."""
    return _find_head(_unwrap(model))[0].in_features


def _with_replaced(model: nn.Module, path: str, replacement: nn.Module) -> Any:
    """Copy the modules along `path`, ending in `replacement`; all the rest is shared."""
    child, _, rest = path.partition(".")
    shadow: Any = object.__new__(type(model))  # as `copy.copy`, but for FSDP2's `__new__`
    shadow.__setstate__(model.__getstate__())
    vars(shadow).pop("forward", None)  # put there by accelerate: bound to the real module
    shadow._modules = dict(model._modules)
    shadow._modules[child] = (
        _with_replaced(model.get_submodule(child), rest, replacement) if rest else replacement
    )
    return shadow


class _StandIn(nn.Module):
    """Takes a module's place; attributes it does not have itself are the module's."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.__dict__["real"] = real  # past nn.Module: not a child

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)


class _Recorder(_StandIn):
    """Stands where the head stood: keeps what comes in, answers one row of known logits."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head)
        self.seen: list[Tensor] = []
        # A ramp shows scales, shifts and holes; its last entry is far beyond any soft-cap and so
        # shows its value. On the CPU: reading it back must not wait for the model's device.
        size = head.weight.shape[0]
        self.answer = torch.linspace(-100.0, 100.0, size, device="cpu", dtype=torch.float32)
        self.answer[-1] = 1e30

    def forward(self, hidden: Tensor) -> Tensor:  # (B, T, D) -> (1, 1, V)
        self.seen.append(hidden)
        return self.answer.view([1] * (hidden.dim() - 1) + [-1])


# --- finding the parts --------------------------------------------------------------------------


def _unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside wrappers, or an error where going round one changes results."""
    while True:
        name = type(model).__name__
        children = getattr(model, "_modules", {})
        if isinstance(inner := children.get("_orig_mod"), nn.Module):  # torch.compile
            model = inner
        elif callable(get_base_model := getattr(model, "get_base_model", None)):  # PEFT
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise TypeError(
                    f"model: {name} puts learnt tokens before the input, outside the model that "
                    "has the head; expected adapters inside it (LoRA and the like)"
                )
            model = get_base_model()  # pyright: ignore[reportAssignmentType]
        elif isinstance(inner := children.get("module"), nn.Module):  # DDP, FSDP, DeepSpeed
            trained = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
            if trained or "FullySharded" in name:
                raise TypeError(
                    f"model: {name} synchronises gradients or gathers weights in its own forward, "
                    "which running the model inside it would skip; put the model, head_inputs "
                    "and the loss into one module and wrap that"
                )
            model = inner
        elif callable(getattr(model, "get_output_embeddings", None)):
            return model
        else:
            raise TypeError(f"model: expected a transformers model with an lm_head, got {name}")


def _find_head(model: Any) -> tuple[nn.Linear, str]:
    """The output layer and its path, checked to be one whole matrix that is in memory."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model: {name} is an encoder-decoder, expected a decoder-only model")
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"model: {name} has no lm_head, expected a causal or vision-language model")
    # Adapters and quantised layers have a `.weight` too, but do not return hidden @ weight.T.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"  # PEFT calls its own Linear too
        raise TypeError(
            f"model: the lm_head of {name} is a {kind}, expected a plain torch.nn.Linear (merge "
            "adapters into the head, and leave it unquantised)"
        )
    gather: Any = getattr(head, "unshard", None)
    if gather is not None:  # a unit of FSDP2's, which would gather it when called
        gather()
    weight = head.weight
    whole = type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2  # no DTensor, no ZeRO-3
    if not whole or weight.is_meta or not weight.is_floating_point():
        raise TypeError(
            f"model: the lm_head weight of {name} is a {type(weight).__name__} "
            f"{tuple(weight.shape)} of {weight.dtype} on {weight.device}, expected a floating "
            "(V, D) tensor, whole and in memory: gather it if sharded, keep it out of offloading"
        )
    return head, path_of(model, head)


def path_of(model: nn.Module, part: nn.Module) -> str:
    """The dotted name of `part` in `model`."""
    for path, module in model.named_modules():
        if module is part:
            return path
    raise TypeError(f"model: its {type(part).__name__} is no part of {type(model).__name__}")


# --- what goes in, what comes out ---------------------------------------------------------------


def _checked_batch(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The forward's arguments: the loss's dropped, unknown ones and missing types refused."""
    name = type(model).__name__
    batch = {key: value for key, value in batch.items() if key not in _LOSS_ARGUMENTS}
    keep = batch.pop("logits_to_keep", 0)
    if keep is not None and (isinstance(keep, Tensor) or keep != 0):
        raise ValueError("logits_to_keep: expected none; choose rows of the hidden states instead")
    device = next(model.parameters()).device.type
    if "_original_forward" in vars(model) and not torch.is_autocast_enabled(device):
        raise TypeError(
            f"model: accelerate put mixed precision into the forward of {name}, which is not what "
            "runs here; call head_inputs inside `accelerator.autocast()`"
        )
    own = _forward_names(type(model))
    known = own.union(*(_forward_names(kind) for kind in {type(m) for m in model.modules()}))
    for key in sorted(batch.keys() - known):
        if key not in _transformers_names():
            raise TypeError(f"{key}: {name} takes no such argument, nor does any part of it")
    has_images = any(batch.get(key) is not None for key in _IMAGE_ARGUMENTS)
    for key in TOKEN_TYPES:
        placed = key == "mm_token_type_ids" and batch.get("position_ids") is not None
        if has_images and key in own and batch.get(key) is None and not placed:
            raise ValueError(
                f"{key}: missing; {name} places or masks the image tokens by it and may silently "
                "go on without. The processor returns it next to input_ids"
            )
    if "use_cache" in known:
        batch.setdefault("use_cache", False)
    if isinstance(vision := batch.get("mm_encoder_outputs"), Mapping):
        batch["mm_encoder_outputs"] = dict(vision)
    return batch


@cache
def _forward_names(kind: type[nn.Module]) -> frozenset[str]:
    """The arguments that a module's forward names."""
    return frozenset(inspect.signature(kind.forward).parameters) - {"self", "args", "kwargs"}


@cache
def _transformers_names() -> frozenset[str]:
    """Arguments that every transformers model takes without naming them (packing, recording)."""
    # Here, because importing the package must not import transformers.
    from transformers.utils.generic import TransformersKwargs

    return frozenset(TransformersKwargs.__annotations__) | {"return_dict"}


def _check_rows(name: str, hidden: Tensor, batch: Mapping[str, Any]) -> None:
    """One hidden state per token, or labels and masks would select the wrong ones."""
    tokens = batch.get("input_ids")
    tokens = batch.get("inputs_embeds") if tokens is None else tokens
    if hidden.dim() != 3 or (tokens is not None and hidden.shape[:2] != tokens.shape[:2]):
        expected = "B, T" if tokens is None else f"{tokens.shape[0]}, {tokens.shape[1]}"
        raise ValueError(
            f"model: {name} gives its lm_head hidden states {tuple(hidden.shape)}, "
            f"expected ({expected}, D), one per token"
        )


def _softcap_of(
    name: str,
    answer: Tensor,  # (V,)
    logits: Tensor,  # (1, 1, V)
) -> float | None:
    """Name what the class made of the recorder's answer: itself, c·tanh(z/c), or an error."""
    logits = logits.flatten()
    if logits.shape == answer.shape:
        if torch.equal(logits, answer):
            return None
        cap = float(logits[-1])
        capped = cap * torch.tanh(answer / cap)
        if 0.0 < cap < 1e30 and torch.allclose(logits, capped, rtol=1e-5, atol=1e-5):
            return cap
    raise ValueError(
        f"model: {name} changes its logits after the lm_head (a logit scale, suppressed or cut "
        "tokens) in a way that HeadInputs cannot say; expected lm_head(hidden), soft-capped or not"
    )
