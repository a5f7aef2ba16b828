"""How can a person see what is trained? One HTML file, without anything from elsewhere.

Every token of a sample is a box: filled where it is a label, outlined where it is special, with a
thin border where the next begins; a run of image tokens is one box with its length. White space is
shown: · for a space, ⏎ for a line break.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from mllmkd_kernels.rows import PAIR
from training.data.check import Report, Shown
from training.data.item import IGNORE, Item, apart
from training.journal import write_whole

THUMBNAIL = 180
PARTIAL = "\ufffd"  # what decodes from bytes that are no whole letter
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em;color:#1c2330}
h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em}table{border-collapse:collapse}
td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}td.n{text-align:right}
.bar{background:#4878a8;height:.8em;display:inline-block}.dim{color:#667}
.sample{border:1px solid #ccd;border-radius:6px;padding:.8em;margin:1em 0}
.tokens{font:13px/2 ui-monospace,monospace;overflow-wrap:anywhere}
.t{border-left:1px solid #bbc;padding:.15em 0;white-space:pre-wrap}
.y{background:#ffd98a}.s{outline:1px solid #5a7;border-radius:3px;margin:0 1px}
.i{background:#d5e5f5;border-radius:3px;padding:.15em .4em}
img{max-height:180px;margin-right:.5em;border:1px solid #ccd}
"""


def write_page(report: Report, tokenizer: Any, image_id: int, path: Path) -> None:
    """Write the report as one HTML file."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>data check</title>",
        f"<style>{STYLE}</style><h1>data check: {escape(', '.join(report.names))}</h1>",
        _summary(report),
        _reasons(report),
        _lengths(report),
        "<h2>Samples</h2><p><span class='t y'>trained</span> "
        "<span class='t s'>special</span> <span class=i>image</span> "
        "&middot; is a space, &#9166; a line break</p>",
        *(_sample(shown, tokenizer, image_id) for shown in report.shown),
    ]
    write_whole(path, "\n".join(parts))


def rows_of(report: Report) -> Iterator[tuple[str, str]]:
    """The figures of a report, named; also what the command prints."""
    tokens = sum(report.lengths) or 1
    yield "entries read", f"{report.read:,}"
    yield "can be trained on", f"{report.sound:,}"
    yield "would be skipped", f"{report.read - report.sound:,}"
    if report.lengths:
        middle = f"{report.percentile(0.5):,}, 95% up to {report.percentile(0.95):,}"
        ends = f"{min(report.lengths):,} to {max(report.lengths):,}"
        yield "tokens a sample", f"{ends}, median {middle}"
        yield "label tokens", f"{report.labels:,} ({report.labels / tokens:.1%} of all)"
        share = report.image_tokens / tokens
        yield "image tokens", f"{report.image_tokens:,} ({share:.1%} of all)"
        counts = ", ".join(f"{n}: {report.images[n]:,}" for n in sorted(report.images))
        yield "images a sample", counts
    for done, count in report.conversions.most_common():
        yield "images converted", f"{count:,} of {report.n_images:,}: {done}"
    if report.unread:
        yield "fields not read", ", ".join(f"{k}: {n:,}" for k, n in report.unread.most_common())
    for note in report.notes:
        yield "note", note


def _summary(report: Report) -> str:
    rows = (f"<tr><td>{escape(a)}<td>{escape(b)}" for a, b in rows_of(report))
    return f"<table>{''.join(rows)}</table>"


def _reasons(report: Report) -> str:
    if not report.reasons:
        return ""
    rows = []
    for reason, count in report.reasons.most_common():
        examples = "<br>".join(escape(text) for text in report.examples[reason])
        rows.append(f"<tr><td class=n>{count:,}<td>{escape(reason)}<div class=dim>{examples}</div>")
    return f"<h2>Why entries would be skipped</h2><table>{''.join(rows)}</table>"


def _lengths(report: Report) -> str:
    bins = report.histogram()
    most = max((count for _, _, count in bins), default=1)
    rows = (
        f"<tr><td class=n>{low:,}{f'&ndash;{high:,}' if high > low else ''}<td class=n>{count:,}"
        f"<td><span class=bar style='width:{20 * count / most:.2f}em'></span>"
        for low, high, count in bins
    )
    return f"<h2>Tokens a sample</h2><table>{''.join(rows)}</table>" if bins else ""


def _sample(shown: Shown, tokenizer: Any, image_id: int) -> str:
    sample = shown.sample
    images = "".join(_thumbnail(image) for image in shown.images)
    answers = apart([shown.item])
    names = [f"{name}: " for name in PAIR] if len(answers) > 1 else [""]
    tokens = "".join(
        f"<div class=dim>{name}{_facts(item)}</div>"
        f"<div class=tokens>{''.join(boxes(item, tokenizer, image_id))}</div>"
        for name, item in zip(names, answers, strict=True)
    )
    place = escape(str(sample.place))
    return (
        f"<div class=sample><b>{escape(sample.id)}</b> <span class=dim>{place}</span>"
        f"<div>{images}</div>{tokens}</div>"
    )


def _facts(item: Item) -> str:
    labels = int((item["labels"] != IGNORE).sum())
    lens = ", ".join(str(n) for n in item["image_lens"].tolist())
    facts = f"{len(item['input_ids'])} tokens, {labels} trained"
    return facts + (f", image tokens {lens}" if lens else ", text alone")


def boxes(item: Any, tokenizer: Any, image_id: int) -> Iterator[str]:
    """The tokens of an item as HTML, in order."""
    special = set(tokenizer.all_special_ids)
    pairs = list(zip(item["input_ids"].tolist(), item["labels"].tolist(), strict=True))
    for is_image, run in groupby(pairs, key=lambda pair: pair[0] == image_id):
        tokens = list(run)
        if is_image:
            yield f"<span class=i>image &times; {len(tokens)}</span>"
            continue
        for ids, label in _letters(tokens, tokenizer):
            kinds = "t" + (" y" if label else "") + (" s" if ids[0] in special else "")
            yield f"<span class='{kinds}'>{_visible(tokenizer.decode(ids))}</span>"


def _letters(tokens: list[tuple[int, int]], tokenizer: Any) -> Iterator[tuple[list[int], bool]]:
    """Tokens one by one, and together where only together they are a letter."""
    ids: list[int] = []
    for i, (token, label) in enumerate(tokens):
        ids.append(token)
        last = i + 1 == len(tokens) or (tokens[i + 1][1] == IGNORE) != (label == IGNORE)
        if last or PARTIAL not in tokenizer.decode(ids):
            yield ids, label != IGNORE
            ids = []


def _visible(text: str) -> str:
    return escape(text).replace(" ", "&middot;").replace("\n", "&#9166;<br>")


def _thumbnail(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f"{image.width} x {image.height}"
    return f"<img alt='{size}' title='{size}' src='data:image/jpeg;base64,{data}'>"
