"""Which complete configurations are shipped, and what is each for? The YAML files in `recipes/`.

A recipe is the configuration of a published run, or of a pair of published models, with the source
of every value in a comment; only the data is left to give: `python -m training run --recipe
llava-kd-1b --set data.captions=...`. Its first comment line says what it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training import settings
from training.config import Config, load

FOLDER = Path(__file__).with_name("recipes")


def names() -> list[str]:
    """Names of the recipes, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe(name: str) -> Config:
    """The configuration of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in names():
        raise settings.ConfigError(f"--recipe {name}: expected one of {', '.join(names())}")
    return load(FOLDER / f"{name}.yaml")


def configured(options: argparse.Namespace) -> Config:
    """The configuration that a command line names: --recipe, over it --config, over it --set.

    Raises:
        ConfigError: values that cannot be used, or a recipe for a method of the caller's own.
    """
    base = recipe(options.recipe) if options.recipe else None
    if base is not None and options.stages is not None:
        raise settings.ConfigError(
            f"--recipe {options.recipe}: got a recipe of {base.method}, expected none: the method "
            "here is the file's own"
        )
    return load(options.config, options.set, base, options.stages)


def summaries() -> list[str]:
    """One line a recipe for `--help`: its name and its first comment line."""
    width = max(map(len, names()))
    first = {name: (FOLDER / f"{name}.yaml").read_text().partition("\n")[0] for name in names()}
    return [f"  {name:<{width}}  {line.removeprefix('# ')}" for name, line in first.items()]
