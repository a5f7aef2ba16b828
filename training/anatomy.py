"""Where does a class keep its vision tower, its projector and its language model?

The classes of transformers that join a tower to a language model agree on a `model.` that holds the
parts and on what the parts do, but not on their names: the projector is `multi_modal_projector`,
`connector`, or Qwen's `merger` inside the tower. A stage trains *roles*, and this file says which
parameters play which. It goes by names that are there, not by a list of classes, and a parameter
that it cannot place is an error: left out, it would be neither frozen nor trained on purpose.

| role | what | examples |
|---|---|---|
| `vision` | patches to features; frozen in every stage | `vision_tower`, `visual`, `vision_model` |
| `projector` | features to the LM's width | `multi_modal_projector`, `image_newline`, `merger` |
| `language` | the LM and its head; also the next two | `language_model`, `text_model`, `lm_head` |
| `experts` | of the LM, a mixture's feed-forward blocks | `mlp.experts` |
| `router` | of the LM, what sends tokens to experts | `mlp.gate` |
| `objective` | none of the model's: terms with parameters, while they train | `objective_terms` |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mllmkd_kernels import batch, learned

Role = Literal["vision", "projector", "language", "experts", "router", "objective"]

# Below `model.`; the longest name wins, so that `visual.merger` is not taken for the tower.
_PLACES: dict[str, Role] = {
    "vision_tower": "vision",
    "vision_model": "vision",
    "visual": "vision",
    "multi_modal_projector": "projector",
    "connector": "projector",
    "visual.merger": "projector",
    "visual.deepstack_merger_list": "projector",
    "image_newline": "projector",
    "language_model": "language",
    "text_model": "language",
}
# Within a language model's layers.
_MIXTURE: dict[str, Role] = {".mlp.experts.": "experts", ".mlp.gate.": "router"}


@dataclass(frozen=True)
class Anatomy:
    """Names of a model's parts.

    Attributes:
        roles: role of every parameter, the narrowest, by its name in `model.named_parameters()`.
        modules: path of each module that plays a role, by role; a bare parameter is no module.
    """

    roles: dict[str, Role]
    modules: dict[Role, tuple[str, ...]]

    def parameters(self, *roles: str) -> list[str]:
        """Names of the parameters with one of these roles, in the model's order."""
        wanted = {*roles, *(_MIXTURE.values() if "language" in roles else ())}
        return [name for name, role in self.roles.items() if role in wanted]

    def still(self, model: nn.Module) -> None:
        """Put the frozen tower into eval mode, but for a projector inside it."""
        training = {path: model.get_submodule(path).training for path in self.modules["projector"]}
        for path in self.modules["vision"]:
            model.get_submodule(path).eval()
        for path, mode in training.items():
            model.get_submodule(path).train(mode)


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of an image-text-to-text model of transformers.

    Raises:
        TypeError: a part is missing or has no parameters, or a parameter belongs to none of them.
    """
    places = _places(model)
    roles: dict[str, Role] = {}
    odd: list[str] = []
    for name, _ in model.named_parameters():
        found = [place for place in places if name == place or name.startswith(f"{place}.")]
        if name.startswith(f"{learned.PLACE}."):
            roles[name] = "objective"
        elif found:
            role = places[max(found, key=len)]
            inner: list[Role] = [each for part, each in _MIXTURE.items() if part in name]
            roles[name] = inner[0] if role == "language" and inner else role
        else:
            odd.append(name)
    missing = [role for role in ("vision", "projector", "language") if role not in roles.values()]
    if odd or missing:
        what = f"no {' and no '.join(missing)}" if missing else f"{', '.join(odd[:4])} in none"
        raise TypeError(
            f"model: {type(model).__name__} has {what} of the known places, expected a vision "
            f"tower, a projector and a language model below `model.`: {', '.join(_PLACES)}"
        )
    modules: dict[Role, tuple[str, ...]] = {"vision": (), "projector": (), "language": ()}
    kinds = dict(model.named_modules())
    for place, role in places.items():
        if place in kinds:
            modules[role] = (*modules[role], place)
    return Anatomy(roles, modules)


def freeze(model: nn.Module, *trained: str) -> list[str]:
    """Let exactly the parameters of these roles that have numbers (a mixture's shared expert of
    width 0 has none) require gradients; return their names.

    Raises:
        ValueError: no parameter has one of the roles.
    """
    parts = anatomy(model)
    if absent := [role for role in trained if role not in parts.roles.values()]:
        known = ", ".join(dict.fromkeys(parts.roles.values()))
        raise ValueError(f"trains: got {', '.join(absent)}, expected some of {known}")
    names = [name for name in parts.parameters(*trained) if model.get_parameter(name).numel()]
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return names


def image_token_id(model: Any) -> int:
    """The id that stands where a row of an image goes, by the name the model's config has for it.

    Raises:
        TypeError: the config names none.
    """
    if (token := batch.image_token_id(model)) is not None:
        return token
    raise TypeError(
        f"model: the config of {type(model).__name__} has no image_token_id, expected the id of "
        "the token that stands for image rows"
    )


def positions(config: Any) -> int | None:
    """How many tokens a sequence of a model may have, by its config; None if it does not say.

    Where rotary positions are scaled (linear, dynamic, yarn), as many as they are scaled to; the
    other kinds have the scaled number in `max_position_embeddings` already.
    """
    text = config.get_text_config()
    known = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if known is None or rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return known
    original = rope.get("original_max_position_embeddings", known)
    return max(known, int(rope["factor"] * original))


def _places(model: Any) -> dict[str, Role]:
    """Full path -> role, the output head included."""
    places: dict[str, Role] = {f"model.{place}": role for place, role in _PLACES.items()}
    head = model.get_output_embeddings()
    places |= {path: "language" for path, module in model.named_modules() if module is head}
    return places
