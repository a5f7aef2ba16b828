"""What can be typed after `python -m training data`?"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from training.config import Config, DataConfig, SourceConfig
from training.recipes import configured
from training.settings import ConfigError

CHECK = """Read a data set as training would: count what would be skipped and why, how long samples
are and how much of them is trained, and write a page that shows some of them token by token. What
to read is a run's configuration (--config, --recipe, --set), or a file and a processor."""
ANSWER = """Have a teacher answer a data set's questions, to be learned from: a LLaVA file or a HF
data set of messages in, the same form out, images by the same paths. An entry may end with its
question. Killed, the same command continues. --out gets the data, report.json with the counts, and
what is needed to go on. Left out and counted: entries that cannot be asked, and conversations in
which an answer was empty or, without --keep-cut, cut at --max-new-tokens."""
USES = ("captions", "conversations", "preferences", "held_out")


def add_data(command: argparse.ArgumentParser, source: argparse.ArgumentParser) -> None:
    """The options of `data check` and `data answer`; `source` has those that name a run's
    configuration."""
    actions = command.add_subparsers(required=True, metavar="check | answer")
    _add_answer(actions.add_parser("answer", help="have a teacher answer it", description=ANSWER))
    text = "count, and show samples"
    check = actions.add_parser("check", help=text, description=CHECK, parents=[source])
    check.add_argument("--use", choices=USES, default="conversations", help="which of a run's data")
    check.add_argument("--json", metavar="PATH", help="instead: one source (data.sources.path)")
    check.add_argument("--image-root", default=".", help="folder its image paths start from")
    check.add_argument(
        "--processor", metavar="PATH", help="folder of the processor to read it with"
    )
    check.add_argument("--samples", type=int, default=12, help="how many to show (default 12)")
    check.add_argument("--limit", type=int, help="read only so many entries of each source")
    check.add_argument("--html", default="data-check.html", help="the page (data-check.html)")
    check.set_defaults(function=check_data)


def _add_answer(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--teacher", required=True, metavar="PATH", help="folder or hub name of a model")
    add("--json", required=True, metavar="PATH", help="the data (data.sources.path)")
    add("--image-root", default=".", help="folder its image paths start from")
    add("--out", required=True, metavar="DIR", help="folder to write to")
    add("--batch-size", type=int, default=16, help="questions at a time (16)")
    add("--max-new-tokens", type=int, default=128, help="longest answer (128)")
    add("--temperature", type=float, default=0.0, help="0: greedy (default); more: sampled")
    add("--top-p", type=float, default=1.0, help="of what is sampled from (1)")
    add("--seed", type=int, default=0, help="of what is sampled (0)")
    choices = ("own", "data")
    add("--history", choices=choices, default="own", help="earlier answers: its own, the data's")
    add("--keep-cut", action="store_true", help="keep conversations with an answer that was cut")
    add("--limit", type=int, help="only the first so many entries")
    command.set_defaults(function=answer_data)


def answer_data(options: argparse.Namespace) -> None:
    """Run `data answer`: figures to stdout."""
    from training.data.answer import Request, answer

    names = [one.name for one in fields(Request) if one.name not in ("data", "out")]
    same = {name: getattr(options, name) for name in names}
    path, report = answer(Request(data=options.json, out=Path(options.out), **same))
    for name, value in vars(report).items():
        if name not in ("reasons", "examples"):
            print(f"{name:<18} {value}")
    for reason, count in report.reasons.items():
        print(f"  {count:>8,} x {reason}\n{'':13}{report.examples[reason]}")
    print(f"{'result':<18} {path}")


def check_data(options: argparse.Namespace) -> None:
    """Run `data check`: figures to stdout, the page to a file."""
    from training.data.check import read_data
    from training.data.encoding import Encoding
    from training.data.load import sources_of
    from training.data.page import rows_of, write_page
    from training.models import known_positions

    config = configured(options)
    if options.samples < 0 or (options.limit is not None and options.limit < 1):
        raise ConfigError("--samples, --limit: expected 0 or more, and 1 or more")
    data, use = config.data, options.use
    if options.json is not None:
        one = SourceConfig(path=options.json, use=use)
        data = DataConfig(sources=(one,), image_root=options.image_root)
    processor = _processor(options, config)
    stages = (*(config.table[name] for name in config.stages), *config.table.values())
    template: Any = next((stage.template for stage in stages if stage.data == use), "chat")
    pairs = use == "preferences"
    encoding = Encoding(
        processor, template=template, max_length=config.data.max_length, pairs=pairs
    )
    report = read_data(
        sources_of(data, use),
        encoding,
        show=options.samples,
        limit=options.limit,
        positions=known_positions(options.processor or config.model.path or config.model.language),
    )
    for name, value in rows_of(report):
        print(f"{name:<18} {value}")
    for reason, count in report.reasons.most_common():
        print(f"  {count:>8,} x {reason}\n{'':13}{report.examples[reason][0]}")
    write_page(report, processor.tokenizer, encoding.encoders[0].image_id, Path(options.html))
    print(f"{'page':<18} {options.html}: {len(report.shown)} samples")


def _processor(options: argparse.Namespace, config: Config) -> Any:
    from training.models import build_processor, load_processor

    if options.processor is not None:
        return load_processor(options.processor)
    if options.json is not None and options.config is None and options.recipe is None:
        raise ConfigError("--processor: expected with --json: its folder decides the tokens")
    return build_processor(config.model)
