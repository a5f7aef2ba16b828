"""In which ways is the student trained? The study's rows; the demo's students are four of them.

Rows differ from their control in one thing, but where the method wants it otherwise: D2S trains
projector, experts and router alone, and pairs are learned at a lower rate. Weight decay, smoothing
and dropout are the SFT students' alone, because they help those and not the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllmkd_kernels.methods import Stage
from mllmkd_kernels.methods.llava_mod import preference
from mllmkd_kernels.methods.stage import WHOLE

#: What a student is shown: labelled captions and questions; questions that the teacher answered;
#: new scenes of the labelled photographs (`training.demo.recomposed`).
LABELLED, ANSWERED, RECOMPOSED = "labelled", "answered", "recomposed"
PAIRS = "preference"


@dataclass(frozen=True, eq=False)
class Row:
    """One way to train the student, and the row that it is compared with.

    Attributes:
        name, control: of the row, and of that other one.
        shown: of what there is to learn from.
        stages, method: it goes through these of that method; in SFT alone it has no teacher.
        loss, settings: of a stage.
        share, rate: of the other students' steps and learning rate.
        regularised: with `DemoConfig`'s weight decay, smoothing and dropout.
        sizes: of the student, where they are others.
        after: the row whose model it starts as; its steps and seconds count too.
        ladder: that model is its teacher instead.
        data: it is left out of all others.
        folder: its name on the disk, where that is not its own.
    """

    name: str
    control: str
    shown: Sequence[str] = (LABELLED, ANSWERED)
    stages: tuple[str, ...] = ("dft",)
    method: str | tuple[Stage, ...] = "llava-kd"
    loss: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    rate: float = 1.0
    regularised: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    after: Row | None = None
    ladder: bool = False
    data: str = ""
    folder: str = ""

    @property
    def slug(self) -> str:
        """Its name on the disk."""
        words = "".join(c if c.isalnum() else " " for c in self.name.lower()).split()
        return self.folder or "-".join(words)


BASE = "answered: CE + KL + visual + relation"
_SFT: dict[str, Any] = {"stages": ("sft",), "shown": [LABELLED]}
SFT = Row("SFT, regularised", "", regularised=True, folder="sft", **_SFT)
DISTILLED = Row("answered: DPT, SFT, DFT", BASE, stages=("dpt", "sft", "dft"), folder="distilled")
UNLABELLED = Row("no label", BASE, [ANSWERED])

_KL: dict[str, Any] = {"visual": 0.0, "relation": 0.0}
_ADI: dict[str, Any] = {"method": "llavadi", "stages": ("kd",)}
_D2D: dict[str, Any] = {"method": "llava-mod", "stages": ("d2d",), "share": 0.5}
#: With the experts that a token goes to, 143,000 parameters of the sparse LM are active; the dense
#: one has 107,000 and, 80 wide, 159,000.
_D2S = _D2D | {
    "stages": ("d2s",),
    "settings": {"student": {"experts": 4, "top_k": 2, "every": 2}},
}
_WIDE: dict[str, Any] = {"sizes": {"hidden": 80}, **_D2D}
_D2D_HALF = Row("answered: D2D, half the steps", "", **_D2D)
_WIDE_HALF = Row("answered: D2D, half the steps, 80 wide", "", **_WIDE)
_FOUR = Row(BASE, "answered: CE + KL + visual")
_MORE = f"{BASE}, 25% more"
#: LLaVA-MoD's loss of pairs for a dense student, whose projector and LM train. The pairs are of
#: questions that the student got wrong, and learned alone they unlearn the others: on the
#: development split (scenes, one seed) .88 of the questions at rates of .003 and .01 (KTO; .88 at
#: .01 by DPO too), .74 and .60 at .03 and .1. This is the largest that does no harm.
_PAIRS: dict[str, Any] = {
    "shown": (),
    "method": (Stage(PAIRS, WHOLE, "preferences", "chat", preference),),
    "stages": (PAIRS,),
    "after": _FOUR,
    "share": 0.25,
    "rate": 0.01,
}
_MIDDLE = Row(
    "answered: CE + KL, 128 wide, 3 layers", "answered: CE + KL", loss=_KL,
    sizes={"hidden": 128, "layers": 3},
)  # fmt: skip


def _gkd(name: str, control: str, own: float) -> Row:
    """After half of D2D the student writes this share of the answers."""
    view = {"view": {"probability": own, "max_new_tokens": 16}}
    return Row(
        name, control, method="on-policy", stages=("gkd",), share=0.5, after=_D2D_HALF,
        settings=view,
    )  # fmt: skip


ROWS = (
    SFT,
    Row("SFT, as the others", SFT.name, folder="plain", **_SFT),
    Row("CE + KL", SFT.name, [LABELLED], loss=_KL),
    Row("CE + KL + visual", "CE + KL", [LABELLED], loss={"relation": 0.0}),
    Row("CE + KL + visual + relation", "CE + KL + visual", [LABELLED]),
    Row("KL", "CE + KL", [LABELLED], loss={"ce": 0.0, **_KL}),
    Row("answered: CE", SFT.name, loss={"response": 0.0, **_KL}),
    Row("answered: CE + KL", "CE + KL", loss=_KL),
    Row("answered: CE + KL + visual", "answered: CE + KL", loss={"relation": 0.0}),
    _FOUR,
    DISTILLED,
    Row("answered: KL + visual + relation", BASE, loss={"ce": 0.0}),
    UNLABELLED,
    Row("answered: reverse KL", "answered: CE + KL", loss={"divergence": "reverse_kl", **_KL}),
    Row("answered: JSD", "answered: CE + KL", loss={"divergence": "jsd", **_KL}),
    Row("answered: T = 2", "answered: CE + KL", loss={"temperature": 2.0, **_KL}),
    Row(
        "answered: z-scored KL", "answered: CE + KL", loss={"features": 0.0, "standardize": True},
        **_ADI,
    ),
    Row("answered: CE + KL + features", "answered: CE + KL", **_ADI),
    Row(
        "answered: CE + KL + affinity", "answered: CE + KL",
        loss={"features": 0.0, "affinity": 1.0}, **_ADI,
    ),
    Row(
        "answered: CE + logit MSE", "answered: CE + KL",
        loss={"features": 0.0, "response": 0.0, "logit_mse": 1.0}, **_ADI,
    ),
    _gkd("answered: D2D, JSD", "answered: JSD", 0.0),
    _gkd("answered: D2D, GKD with half own answers", "answered: D2D, JSD", 0.5),
    Row("answered: D2D, CE + KL", "answered: CE + KL", after=_D2D_HALF, loss={"ce": 1.0}, **_D2D),
    Row("answered: D2D, D2S", "answered: D2D, CE + KL", after=_D2D_HALF, **_D2S),
    Row(
        "answered: D2D, CE + KL, 80 wide", "answered: D2D, D2S", after=_WIDE_HALF, loss={"ce": 1.0},
        **_WIDE,
    ),
    Row(_MORE, BASE, after=_FOUR, share=0.25, rate=0.1),
    Row(f"{BASE}, 25% KTO pairs", _MORE, loss={"balance": 0.0}, **_PAIRS),
    Row(f"{BASE}, 25% DPO", _MORE, loss={"balance": 0.0, "kind": "sigmoid"}, **_PAIRS),
    _MIDDLE,
    Row(
        "answered: CE + KL of the student 128 wide", "answered: CE + KL", after=_MIDDLE,
        ladder=True, loss=_KL,
    ),
    Row(
        "SFT, photographs recomposed", SFT.name, [LABELLED, RECOMPOSED], ("sft",),
        regularised=True, data="scenes", folder="recomposed",
    ),
)  # fmt: skip
