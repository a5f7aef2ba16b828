"""Which data does a configuration name, and in which order is it trained on?

A use (`captions`, `conversations`, `preferences`, `held_out`) is either a LLaVA file of its own
field, or all `data.sources` of that use. They are indexed, or all of them streamed.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from training.config import DataConfig, SourceConfig, require
from training.data.collate import Collator
from training.data.dataset import SampleDataset
from training.data.encoding import Encoding
from training.data.packing import PackedCollator, check_packable
from training.data.sampler import ModalitySampler
from training.data.sources import LlavaSource, Source, open_source
from training.data.stream import StreamDataset
from training.data.template import TemplateName
from training.settings import ConfigError

Data = SampleDataset | StreamDataset


def has_data(config: DataConfig, use: str) -> bool:
    """Whether there is any data of a use."""
    return getattr(config, use) is not None or any(one.use == use for one in config.sources)


def require_data(config: DataConfig, use: str) -> None:
    """`ConfigError` where there is no data of a use."""
    if not has_data(config, use):
        require(None, f"data.{use}", "a stage's data")


def open_data(
    config: DataConfig,
    processor: Any,
    use: str,
    template: TemplateName,
    *,
    teacher: Any = None,
    seed: int = 0,
    pairs: bool = False,
) -> Data:
    """The data of a use as items of a processor, and of the teacher's if it is given one; of pairs
    of answers, or of single ones.

    Raises:
        ConfigError: no data, two answers to which data, or a stream that cannot be had.
        DataError: a faulty entry.
    """
    chosen = _chosen(config, use)
    options: dict[str, Any] = {
        "teacher": teacher,
        "template": template,
        "max_length": config.max_length,
        "cache_mb": config.cache_mb,
        "pairs": pairs,
    }
    if any(one.stream for _, one in chosen):
        return _stream(config, chosen, Encoding(processor, **options), seed, use)
    sources = sources_of(config, use)
    return SampleDataset(sources, processor, skip_bad=config.skip_bad, **options)


def sources_of(config: DataConfig, use: str) -> list[Source]:
    """The sources of a use, to be read by index.

    Raises:
        ConfigError: there is none, two answers to which, or one that is to be streamed.
    """
    chosen = _chosen(config, use)
    for i, one in chosen:
        if one.stream:
            raise ConfigError(f"data.sources[{i}].stream: got true, expected false to read it here")
    if chosen:
        return [open_source(one, f"data.sources[{i}]", config.image_root) for i, one in chosen]
    require_data(config, use)
    return [LlavaSource(getattr(config, use), config.image_root)]


def _chosen(config: DataConfig, use: str) -> list[tuple[int, SourceConfig]]:
    """The sources of a use and their places in data.sources."""
    chosen = [(i, one) for i, one in enumerate(config.sources) if one.use == use]
    field = getattr(config, use)
    if chosen and field is not None:
        raise ConfigError(
            f"data.{use}: got {field!r} and {len(chosen)} of data.sources, expected one of them"
        )
    return chosen


def epoch_size(data: Data) -> int | None:
    """Samples of an epoch, or None for a stream, which has none."""
    return None if isinstance(data, StreamDataset) else len(data.sampler(1, 0, group=False))


def order_of(config: DataConfig, data: Data, step_size: int, seed: int) -> ModalitySampler | None:
    """The order of training where it is not a plain shuffle of all samples; `ConfigError` where a
    stream is to be grouped."""
    if isinstance(data, StreamDataset):
        if config.order == "grouped":
            raise ConfigError(
                "data.order: got 'grouped', expected 'shuffled': samples of a stream come as they "
                "are read (data.sources)"
            )
        return None
    if config.order == "shuffled" and all(source.weight == 1.0 for source in data.sources):
        return None
    return data.sampler(step_size, seed, group=config.order == "grouped")


def collator_of(
    config: DataConfig, student: tuple[Any, Any], teacher: Any, own: Any = None
) -> Collator:
    """What makes batches: padded, or packed if that is asked for and both models can.

    Args:
        student: its model and processor.
        teacher: its model, which is tried out too, or None.
        own: the teacher's processor, where it needs batches of its own.

    Raises:
        ConfigError: packing is asked for, and a model cannot be packed.
    """
    if not config.packing:
        return Collator(student[1], own)
    if own is not None:
        raise ConfigError("data.packing: got true, expected false: the teacher has its own batches")
    for model in (student[0], teacher):
        if model is not None:
            check_packable(model)
    return PackedCollator(student[1])


def _stream(config: DataConfig, chosen: list[Any], encoding: Encoding, seed: int, use: str) -> Any:
    i = next((i for i, one in chosen if not one.stream), None)
    if i is not None:
        raise ConfigError(
            f"data.sources[{i}].stream: got false, expected all sources of use {use} to be "
            "streamed or none"
        )
    if use == "held_out":
        raise ConfigError("data.sources: a held_out source is streamed, expected one with an end")
    together = dist.is_initialized()
    return StreamDataset(
        [one for _, one in chosen],
        config.image_root,
        encoding,
        seed=seed,
        buffer=config.shuffle_buffer,
        skip_bad=config.skip_bad,
        rank=dist.get_rank() if together else 0,
        world=dist.get_world_size() if together else 1,
    )
