"""Where does the demo's vision tower come from? A small SigLIP trained as a classifier, then frozen
for good.

LLaVA starts from a tower pre-trained on more images than the language side ever sees. The demo has
nothing to download, so it makes one: an ordinary `SiglipVisionModel`, patch 32 on a 64x64 canvas,
so that the four photos of a scene are its four tokens. It learns to name the garment in each cell,
from all 60,000 training photos **and their labels**; a linear probe reads the answer and is thrown
away. Teacher and students share the frozen result, so whatever those labels taught it, all of them
have; the report says so.

For a data set without photo labels (easy-VQA, one's own) the probe answers the training questions
instead, from the image alone: one row of logits for each distinct question text, on the mean of the
tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from training.bar import track
from training.data.dataset import LlavaDataset, SampleDataset
from training.demo.config import DemoConfig, TowerConfig
from training.demo.folder import LABELLED
from training.demo.garments import CLASSES, Photos, photo_arrays
from training.demo.scenes import CANVAS, CELL, CELLS, canvases
from training.demo.tell import say
from training.demo.words import build_processor, collect_words
from training.journal import whole
from training.settings import ConfigError, differences, to_dict

PROBED = 200_000  # pairs of a question and an answer
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # pixels, targets (B, ...), which logits


def make_tower(demo: DemoConfig) -> None:
    """The shared vision tower and processor in `out/tower`, trained or reused.

    Raises:
        ConfigError: the one that is there is another.
    """
    path, sizes, start = demo.folder / "tower", demo.tower, time.perf_counter()
    if path.is_dir():
        made = json.loads((path / "tower.json").read_text()).get("sizes", {})
        if changed := differences(made, to_dict(sizes)):
            raise ConfigError(
                f"out: {path} was made with another tower ({'; '.join(changed)}); go back to it, "
                "remove the folder or name another"
            )
        say(f"{path}: already there")
        return
    # every word of questions and answers, held-out ones included: they are templates
    files = (demo.split(name) for name in (*LABELLED, "dev"))
    words = collect_words(*(file for file in files if file.is_file()))
    patches = {"image_size": sizes.image_size, "patch_size": sizes.patch_size}
    processor = build_processor(words, **patches)
    if demo.data == "scenes":
        tower, accuracy = photo_tower(sizes, photo_arrays(demo.garments))
    else:
        questions = LlavaDataset(demo.split("train"), demo.images, processor, cache_mb=1_500)
        tower, accuracy = question_tower(sizes, questions)
    facts = {"accuracy": accuracy, "seconds": time.perf_counter() - start, "sizes": to_dict(sizes)}
    with whole(path) as staged:
        tower.save_pretrained(staged)
        processor.save_pretrained(staged)
        (staged / "tower.json").write_text(json.dumps(facts))
    say(f"{path}: accuracy of its probe {accuracy:.3f}")


def photo_tower(config: TowerConfig, photos: Photos) -> tuple[SiglipVisionModel, float]:
    """A tower that knows the garment in each cell, and its accuracy on the test photos.

    Raises:
        ConfigError: its patches do not divide the cells.
    """
    if config.image_size != CANVAS or CELL % config.patch_size:
        got = f"{config.image_size} and {config.patch_size}"
        expected = f"{CANVAS} and a divisor of {CELL}, for scenes"
        raise ConfigError(f"tower.image_size, patch_size: got {got}, expected {expected}")
    tower = new_tower(config)
    probe = nn.Linear(config.hidden, len(CLASSES))
    train = torch.tensor(photos.train_images), torch.tensor(photos.train_labels).long()
    test = torch.tensor(photos.test_images), torch.tensor(photos.test_labels).long()

    def logits(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:  # (B, 4, 10)
        return probe(_cells(tower(pixels).last_hidden_state))

    def batches() -> Iterator[Batch]:
        order = torch.Generator().manual_seed(config.seed)
        while True:
            index = torch.randint(len(train[0]), (config.batch_size, CELLS), generator=order)
            yield scene_pixels(train[0][index]), train[1][index], index

    _fit(config, tower, probe, logits, batches())
    index = torch.arange(len(test[0]) // CELLS * CELLS).view(-1, CELLS)
    with torch.no_grad():
        best = torch.cat(
            [logits(scene_pixels(test[0][part]), part).argmax(-1) for part in index.split(512)]
        )
    return tower, float((best == test[1][index]).float().mean())


def question_tower(config: TowerConfig, dataset: SampleDataset) -> tuple[SiglipVisionModel, float]:
    """A tower that answers `dataset`'s questions, the first of each sample of one image, and its
    accuracy on the questions it was trained on.

    Raises:
        ConfigError: there is no such sample, or their questions and answers are too many.
    """
    tower = new_tower(config)
    chosen = [
        i
        for i, sample in enumerate(dataset.samples)
        if len(sample.images) == len(sample.asked().images) == 1
    ]
    dataset = dataset.some(chosen)
    asked = [sample.turns[0] for sample in dataset.samples]
    questions = {text: i for i, text in enumerate(sorted({question for question, _ in asked}))}
    answers = {text: i for i, text in enumerate(sorted({answer for _, answer in asked}))}
    if not 0 < len(questions) * len(answers) <= PROBED:
        raise ConfigError(
            f"tower: got {len(questions):,} questions about one image and {len(answers):,} answers "
            f"to them, expected up to {PROBED:,} pairs: its probe has a logit for each"
        )
    which = torch.tensor([questions[question] for question, _ in asked])
    target = torch.tensor([answers[answer] for _, answer in asked])
    probe = nn.Linear(config.hidden, len(questions) * len(answers))

    def logits(pixels: torch.Tensor, which: torch.Tensor) -> torch.Tensor:  # (B, answers)
        pooled = tower(pixels).last_hidden_state.mean(dim=1)
        every = probe(pooled).view(-1, len(questions), len(answers))
        return every[torch.arange(len(which)), which]

    def batches() -> Iterator[Batch]:
        order = torch.Generator().manual_seed(config.seed)
        while True:
            index = torch.randint(len(asked), (config.batch_size,), generator=order)
            pixels = torch.cat([dataset[i]["pixel_values"] for i in index.tolist()])  # pyright: ignore[reportTypedDictNotRequiredAccess]
            yield pixels, target[index], which[index]

    _fit(config, tower, probe, logits, batches())
    with torch.no_grad():
        seen = [next(part) for part in [batches()] for _ in range(8)]
        hits = [(logits(pixels, q).argmax(-1) == y).float().mean() for pixels, y, q in seen]
    return tower, float(torch.stack(hits).mean())


def new_tower(config: TowerConfig) -> SiglipVisionModel:
    """An untrained SigLIP vision model of the configured size, without SigLIP's pooling head."""
    torch.manual_seed(config.seed)
    sizes = SiglipVisionConfig(
        hidden_size=config.hidden,
        intermediate_size=2 * config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        vision_use_head=False,
    )
    return SiglipVisionModel(sizes)


def scene_pixels(photos: torch.Tensor) -> torch.Tensor:  # (B, 4, 28, 28) uint8 -> (B, 3, 64, 64)
    """Photos as the pixel values that the demo's processor makes of their scene."""
    scenes = torch.from_numpy(canvases(photos.numpy())).float()
    return ((scenes / 255 - 0.5) / 0.5).unsqueeze(1).expand(-1, 3, -1, -1)


def _cells(tokens: torch.Tensor) -> torch.Tensor:  # (B, P, C) -> (B, 4, C)
    """Mean of the tokens that lie in each cell of the 2x2 scene (P = 4: the tokens themselves)."""
    batch, patches, channels = tokens.shape
    side = int(patches**0.5) // 2
    grid = tokens.view(batch, 2, side, 2, side, channels)
    return grid.mean(dim=(2, 4)).view(batch, CELLS, channels)


def _fit(
    config: TowerConfig,
    tower: nn.Module,
    probe: nn.Module,
    logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batches: Iterator[Batch],
) -> None:
    """Cross-entropy on the batches: AdamW, one-cycle learning rate, gradient norm clipped to 1."""
    parameters = [*tower.parameters(), *probe.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=config.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config.lr, total_steps=config.steps, pct_start=0.1
    )
    tower.train()
    for _ in track(range(config.steps), "vision tower", "steps"):
        pixels, target, which = next(batches)
        loss = F.cross_entropy(logits(pixels, which).flatten(0, -2), target.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
    tower.eval()
