"""What can be typed after `python -m training data`?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from training.config import Config, DataConfig, SourceConfig
from training.settings import ConfigError

CHECK = """Read a data set as training would: count what would be skipped and why, how long samples
are and how much of them is trained, and write a page that shows some of them token by token. What
to read is a run's configuration (--config, --recipe, --set), or a file and a processor."""
USES = ("captions", "conversations", "preferences", "held_out")


def add_data(command: argparse.ArgumentParser, recipes: list[str]) -> None:
    """The options of `data check`."""
    actions = command.add_subparsers(required=True, metavar="check")
    check = actions.add_parser("check", help="count, and show samples", description=CHECK)
    check.add_argument("--config", metavar="FILE.yaml", help="configuration of a run")
    check.add_argument("--recipe", choices=recipes, metavar="NAME", help="a shipped one")
    check.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    check.add_argument("--use", choices=USES, default="conversations", help="which of a run's data")
    check.add_argument("--json", metavar="PATH", help="instead: one source (data.sources.path)")
    check.add_argument("--image-root", default=".", help="folder its image paths start from")
    check.add_argument(
        "--processor", metavar="PATH", help="folder of the processor to read it with"
    )
    check.add_argument("--samples", type=int, default=12, help="how many to show (default 12)")
    check.add_argument("--limit", type=int, help="read only so many entries of each source")
    check.add_argument("--html", default="data-check.html", help="the page (data-check.html)")
    check.add_argument("--json-out", metavar="FILE", help="the figures as json, too")


def check_data(options: argparse.Namespace, config: Config) -> None:
    """Run `data check`: figures to stdout, the page and the json to files."""
    from training.data.check import read_data
    from training.data.encoding import Encoding
    from training.data.page import rows_of, write_page
    from training.journal import write_whole
    from training.models import known_positions

    if options.samples < 0 or (options.limit is not None and options.limit < 1):
        raise ConfigError("--samples, --limit: expected 0 or more, and 1 or more")
    data, use = config.data, options.use
    if options.json is not None:
        one = SourceConfig(path=options.json, use=use)
        data = DataConfig(sources=(one,), image_root=options.image_root)
    processor = _processor(options, config)
    template: Any = "pretrain" if use == "captions" else "chat"
    pairs = use == "preferences"
    encoding = Encoding(
        processor, template=template, max_length=config.data.max_length, pairs=pairs
    )
    sources = _sources(data, use)
    report = read_data(
        sources,
        encoding,
        show=options.samples,
        limit=options.limit,
        positions=known_positions(options.processor or config.model.path or config.model.language),
    )
    for name, value in rows_of(report):
        print(f"{name:<18} {value}")
    for reason, count in report.reasons.most_common():
        print(f"  {count:>8,} x {reason}\n{'':13}{report.examples[reason][0]}")
    write_page(report, processor.tokenizer, processor.image_token_id, Path(options.html))
    print(f"{'page':<18} {options.html}: {len(report.shown)} samples")
    if options.json_out:
        write_whole(Path(options.json_out), json.dumps(report.to_dict(), indent=1))


def _processor(options: argparse.Namespace, config: Config) -> Any:
    from training.models import build_processor, load_processor

    if options.processor is not None:
        return load_processor(options.processor)
    if options.json is not None and options.config is None and options.recipe is None:
        raise ConfigError("--processor: expected with --json: its folder decides the tokens")
    return build_processor(config.model)


def _sources(data: DataConfig, use: str) -> Any:
    from training.data.load import sources_of

    return sources_of(data, use)
