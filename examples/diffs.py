"""What do the scripts change? Their marks, shown as diffs in docs/integrating.md.

    python -m examples.diffs           # rewrites the page between its markers

A line that ends with `# +` is there for distillation (what follows the mark stays as a comment), so
is every line between `# + below` and `# + above`; a comment that starts with `# -` is a line that
was there before. The rest of a script is what it was.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "integrating.md"
SCRIPTS = ("transformers_trainer", "trl_sft", "accelerate_loop", "llava_patch")
CONTEXT = 2  # unchanged lines shown around a change


def diff(source: str) -> str:
    """The marked lines of a script and their context, as a diff."""
    marked, inside = [], False
    for line in source.splitlines():
        text = line.strip()
        if text in ("# + below", "# + above"):
            inside = text == "# + below"
        else:
            marked.append(_marked(line, inside))
    changed = [i for i, line in enumerate(marked) if line[0] != " "]
    shown = {
        j for i in changed for j in range(i - CONTEXT, i + CONTEXT + 1) if 0 <= j < len(marked)
    }
    lines, before = [], -1
    for i in sorted(shown):
        if i != before + 1:
            lines.append("@@")
        lines.append(marked[i].rstrip())
        before = i
    return "\n".join(lines)


def _marked(line: str, added: bool) -> str:
    text = line.lstrip()
    indent = line[: len(line) - len(text)]
    if text.startswith("# - "):
        return f"-{indent}{text[4:]}"
    if found := re.fullmatch(r"(.*?)  # \+(?: (.*))?", line):
        code, comment = found.groups()
        return f"+{code}  # {comment}" if comment else f"+{code}"
    return ("+" if added else " ") + re.sub(r"  # pyright: .*", "", line)


def rewritten(page: str) -> str:
    """The page with the diff of each script between its markers.

    Raises:
        ValueError: the markers of a script are not there exactly once.
    """
    for name in SCRIPTS:
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"{PAGE.name}: expected one {begin} and one {end}")
        before, rest = page.split(begin)
        new = diff((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8"))
        page = f"{before}{begin}\n```diff\n{new}\n```\n{end}{rest.split(end)[1]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
