"""What can be typed after `python -m training eval` and `export`?

Options become the arguments of `training.evaluation.run`, of `held_out` and of `export`; torch and
transformers are imported when a command runs, so that --help is quick.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training.config import DataConfig
from training.evaluation.benchmarks import BENCHMARKS
from training.evaluation.export import export_model
from training.settings import ConfigError

MAX_LENGTH = DataConfig().max_length
PATHS = ("questions", "images", "annotations", "synonyms")  # of a benchmark
EVAL = """With a LLaVA json: exact match and perplexity in one pass over the data. With --benchmark:
the model writes answers to the benchmark's own files; they are kept in a folder, scored there, and
the same command continues what was cut short. Faulty entries, and questions that cannot be asked,
are left out and counted. Benchmarks, and what --questions is:

{}"""


def add_eval(command: argparse.ArgumentParser) -> None:
    """The options of `eval`."""
    raw = argparse.RawDescriptionHelpFormatter
    names = "\n".join(f"  {name:<10} {benchmark.help}" for name, benchmark in BENCHMARKS.items())
    command.description, command.formatter_class = EVAL.format(names), raw
    command.add_argument("model", help="folder of a saved model and its processor")
    command.add_argument("json", nargs="?", help="held-out data, LLaVA format")
    command.add_argument("--image-root", default=".", help="folder its image paths start from")
    command.add_argument("--batch-size", type=int, help="default 256; with --benchmark 16")
    command.add_argument(
        "--max-length", type=int, help=f"of held-out samples, in tokens (default {MAX_LENGTH})"
    )
    command.add_argument("--benchmark", choices=BENCHMARKS, metavar="NAME", help="see above")
    command.add_argument("--questions", metavar="FILE", help="the benchmark's questions")
    command.add_argument(
        "--annotations", metavar="FILE", help="vqav2: its answers; chair: captions of the images"
    )
    command.add_argument(
        "--synonyms", metavar="FILE", help="chair: other words for its categories, a line each"
    )
    command.add_argument("--images", metavar="DIR", help="folder that its image names start from")
    command.add_argument("--split", help="scienceqa, karpathy: which split (default test)")
    command.add_argument("--out", metavar="DIR", help="default eval-NAME beside the model")
    command.add_argument("--max-new-tokens", type=int, help="longest answer (default by benchmark)")
    command.add_argument("--instruction", help="last line of the prompts (default LLaVA-1.5's)")
    command.add_argument("--limit", type=int, help="ask only the first so many questions")
    command.add_argument(
        "--tokenizer", choices=("words", "ptb"), default="words", help="of captions; ptb: with Java"
    )


def evaluate(options: argparse.Namespace) -> None:
    """Run `eval`."""
    if options.benchmark is None:
        _held_out(options)
    else:
        _benchmark(options)


def _held_out(options: argparse.Namespace) -> None:
    if options.json is None:
        raise ConfigError("eval: got no data, expected a LLaVA json file or --benchmark")
    for name in (*PATHS, "split", "out", "max_new_tokens", "limit"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: expected it only with --benchmark")
    size = 256 if options.batch_size is None else options.batch_size
    most = MAX_LENGTH if options.max_length is None else options.max_length
    for name, value in (("batch-size", size), ("max-length", most)):
        if value < 1:
            raise ConfigError(f"--{name}: got {value}, expected 1 or more")
    from training.data.collate import Collator
    from training.data.dataset import LlavaDataset
    from training.evaluation.held_out import evaluate
    from training.generate import load

    model, processor = load(options.model)
    data = LlavaDataset(
        Path(options.json), options.image_root, processor, skip_bad=True, max_length=most
    )
    print(evaluate(model, data, Collator(processor), batch_size=size))


def _benchmark(options: argparse.Namespace) -> None:
    from training.evaluation.questions import Files
    from training.evaluation.run import Options, run_benchmark
    from training.generate import load
    from training.lock import held

    for name in ("questions", "images"):
        if getattr(options, name) is None:
            raise ConfigError(f"--{name}: got nothing, expected a path with --benchmark")
    if options.max_length is not None:
        raise ConfigError("--max-length: expected it only without --benchmark")
    if options.json is not None:
        raise ConfigError(f"json: got {options.json!r}, expected nothing with --benchmark")
    model = Path(options.model)
    beside = model.parent if model.is_dir() else Path()
    paths = {name: getattr(options, name) for name in PATHS}
    same = ("model", "benchmark", "max_new_tokens", "instruction", "limit", "tokenizer")
    asked = Options(
        files=Files(split=options.split, **{n: Path(path) for n, path in paths.items() if path}),
        out=Path(options.out) if options.out else beside / f"eval-{options.benchmark}",
        batch_size=16 if options.batch_size is None else options.batch_size,
        **{name: getattr(options, name) for name in same},
    )
    with held(asked.out, "--out"):
        run_benchmark(asked, load)


def add_export(command: argparse.ArgumentParser) -> None:
    """The options of `export`."""
    command.description = "A folder with the model, lmms-eval's tasks and the command to run them."
    command.add_argument("model", help="folder of a saved model")
    command.add_argument("out", help="folder to write")


def export(options: argparse.Namespace) -> None:
    """Run `export`."""
    from training.models import load_vlm

    out = Path(options.out)
    print(export_model(*load_vlm(options.model), out), end="")
    print(f"# written to {out / 'run.sh'}")
