"""Entry point: `python -m training run | check | data | cache | eval | export | show | methods |
demo | study`.

A file of one's own that ends in ``training.main(STAGES)`` has the same commands, for its method.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import warnings
from collections.abc import Sequence

from mllmkd_kernels.methods import Stage
from training import config as configuration
from training import settings
from training.data.command import add_data
from training.demo.config import DemoConfig, StudyConfig
from training.evaluation.command import add_eval, add_export, evaluate, export
from training.recipes import configured, names, summaries

RECIPES = "Recipes (--recipe NAME):\n\n{}\n\n"
EPILOG = (
    "Every field of a run's configuration (--config FILE.yaml, or --set FIELD=VALUE), here of the "
    "method {}; `methods NAME` has another's:\n\n{}"
)
DEMO_FLAGS = ("seeds", "data", "out", "garments")
DEMO_EPILOG = "Every field (--set FIELD=VALUE):\n\n{}"


def main(arguments: Sequence[str] | None = None, stages: tuple[Stage, ...] | None = None) -> int:
    """Parse the command line and run; faults of the user's are one line on stderr, exit status 2.

    Args:
        arguments: default those of the process.
        stages: a method of the caller's, in place of those that a configuration names.
    """
    try:
        options = _parser(stages).parse_args(arguments, argparse.Namespace(stages=stages))
        for name, value in vars(options).items():
            if isinstance(value, str):
                setattr(options, name, settings.home(value, f"--{name.replace('_', '-')}"))
        _quiet()
        options.function(options)
    except _faults() as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:  # Interrupted, or Ctrl-C where nothing was to be saved
        print(str(error) or "interrupted; the same command continues", file=sys.stderr)
        return getattr(error, "status", 130)
    return 0


def _faults() -> tuple[type[Exception], ...]:
    """What is the user's to mend; anything else keeps its traceback."""
    from training.data.records import DataError
    from training.demo.garments import GarmentError
    from training.models import CheckpointError
    from training.watch import NonFiniteError

    return (
        settings.ConfigError,
        CheckpointError,
        DataError,
        NonFiniteError,
        GarmentError,
        OSError,  # a full disk, a folder that may not be written, no way to a hub
    )


def _parser(stages: tuple[Stage, ...] | None) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    cls = type(configuration.load(stages=stages))
    method = cls.model_fields["method"].default
    fields = EPILOG.format(method, "\n".join(settings.describe(cls)))
    prog, shipped = None, stages is None  # recipes are of shipped methods
    if shipped:
        prog, fields = "python -m training", RECIPES.format("\n".join(summaries())) + fields
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, epilog=fields)
    parser.formatter_class = raw
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--config", metavar="FILE.yaml", help="configuration file")
    about = "a shipped one" if shipped else argparse.SUPPRESS
    source.add_argument("--recipe", choices=names(), metavar="NAME", help=about)
    source.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    texts = {"epilog": fields, "formatter_class": raw, "parents": [source]}
    for name, text in (
        ("run", "train a model through its stages; given again, continue"),
        ("check", "compare teacher and student as `run` would before its first step"),
        ("cache", "store the teacher's hidden states, for `run` to train from"),
        ("show", "print the configuration that `run` would use, as YAML"),
    ):
        command = commands.add_parser(name, help=text, **texts)
        command.set_defaults(function=_configured, command=name)
        if name == "cache":
            command.add_argument(
                "--dry-run", action="store_true", help="print what it would cost on disk, no more"
            )
        elif name == "check":
            command.add_argument(
                "--ask",
                type=int,
                metavar="N",
                help="ask the teacher N samples of the held-out data (or the conversations): is it "
                "right more often than the most frequent answer?",
            )
    command = commands.add_parser("data", help="look at a data set, or have it answered")
    add_data(command, source)
    command = commands.add_parser("eval", help="score a saved model: held-out data, a benchmark")
    add_eval(command)
    command.set_defaults(function=evaluate)
    command = commands.add_parser("export", help="a model for lmms-eval")
    add_export(command)
    command.set_defaults(function=export)
    command = commands.add_parser("methods", help="the methods, and one's equations and fields")
    command.add_argument("name", nargs="?", metavar="NAME", help="the method to describe")
    command.set_defaults(function=_methods)
    for name, text, cls, function in (
        ("demo", "teacher, SFT students and distilled students, compared", DemoConfig, _demo),
        ("study", "one student, trained in many ways, in one table", StudyConfig, _study),
    ):
        about, epilog = inspect.getdoc(cls), DEMO_EPILOG.format("\n".join(settings.describe(cls)))
        command = commands.add_parser(
            name, help=text, description=about, epilog=epilog, formatter_class=raw
        )
        for flag in DEMO_FLAGS:
            command.add_argument(f"--{flag}", help=f"the same as --set {flag}=...")
        command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
        command.set_defaults(function=function)
    return parser


def _methods(options: argparse.Namespace) -> None:
    if options.stages is not None and options.name in (None, configuration.OWN):
        print("\n".join(settings.describe(type(configuration.load(stages=options.stages)))))
        return
    if options.name is None:
        known = configuration.method_names().items()
        print("\n".join(f"  {name:<20}{about}" for name, about in known))
        return
    cls = type(configuration.load(overrides=[f"method={options.name}"]))
    about = configuration.module_of(options.name).__doc__ or ""
    print("\n".join([about, *settings.describe(cls)]))


def _configured(options: argparse.Namespace) -> None:
    """The commands that are told a run's configuration."""
    config = configured(options)
    if options.command == "show":
        print(settings.dump(config), end="")
    elif options.command == "cache":
        from training.teacher_cache.fill import make

        make(config, dry_run=options.dry_run)
    elif options.command == "check":
        from training.start import check

        if options.ask is not None and options.ask < 1:
            raise settings.ConfigError(f"--ask: got {options.ask}, expected 1 or more")
        check(config, ask=options.ask)
    else:
        from training.loop import run

        run(config)


def _demo(options: argparse.Namespace) -> None:
    config = settings.load(DemoConfig, None, _demo_settings(options))
    from training.demo.run import demo

    demo(config)


def _study(options: argparse.Namespace) -> None:
    from training.demo.study import study

    study(settings.load(StudyConfig, None, _demo_settings(options)))


def _demo_settings(options: argparse.Namespace) -> list[str]:
    given = [f"{flag}={getattr(options, flag)}" for flag in DEMO_FLAGS if getattr(options, flag)]
    return [*given, *options.set]


def _quiet() -> None:
    """No bars for writing and reading weights: the stages' own are enough."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # read when `datasets` is imported
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # of a mixture's shared expert, which may have width 0
    warnings.filterwarnings("ignore", "Initializing zero-element tensors")
    from transformers.utils import logging

    logging.disable_progress_bar()
