# SPDX-License-Identifier: Apache-2.0
"""The HTML of a report: one file with everything inside, no script and no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import cv2
import numpy as np

from mmeformer.report.review import Table

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f1f5f9; color: #0f172a;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 60px; }
header h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
header p { margin: 4px 0 18px; color: #475569; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 1; background: #f1f5f9ee; padding: 10px 0;
  display: flex; flex-wrap: wrap; gap: 6px; }
nav a { color: #1e40af; text-decoration: none; background: #fff; border: 1px solid #e2e8f0;
  padding: 2px 10px; border-radius: 99px; font-size: 13px; }
section { background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; padding: 18px 20px;
  margin: 14px 0; scroll-margin-top: 60px; }
h2 { margin: 0 0 10px; font-size: 18px; }
h3 { margin: 18px 0 6px; font-size: 14px; color: #334155; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tile { background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; padding: 12px 16px;
  flex: 1 1 150px; }
.tile b { display: block; font-size: 22px; line-height: 1.3; overflow-wrap: anywhere; }
.tile b.long { font-size: 15px; padding: 5px 0; }
.tile span { color: #64748b; font-size: 13px; }
.charts { display: flex; flex-wrap: wrap; gap: 14px 18px; align-items: flex-start; }
figure { margin: 0; max-width: 100%; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: #64748b; font-size: 13px; overflow-wrap: anywhere; }
.pictures { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); }
.pictures img { width: 100%; border-radius: 6px; border: 1px solid #e2e8f0; }
.scroll { overflow-x: auto; max-height: 460px; overflow-y: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; color: #64748b; font-weight: 600; position: sticky; top: 0;
  background: #fff; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid #f1f5f9; }
td.number, th.number { text-align: right; padding-left: 14px; }
td.number { background-repeat: no-repeat; background-position: right bottom;
  background-origin: content-box; background-size: var(--part, 0%) 2px;
  background-image: linear-gradient(#93c5fd, #93c5fd); }
pre { background: #0f172a; color: #e2e8f0; padding: 12px 14px; border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 14px;
  font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
details summary { cursor: pointer; color: #1e40af; }
.note { color: #92400e; background: #fffbeb; border: 1px solid #fde68a; border-radius: 8px;
  padding: 8px 12px; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        name: its title.
        body: HTML.
    """

    name: str
    body: str

    @property
    def anchor(self) -> str:
        """Target of links to it."""
        return self.name.lower().replace(" ", "-")


_SMALL = ' class="long"'


def page(title: str, subtitle: str, tiles: Sequence[tuple[str, str]], sections) -> str:
    """The whole file.

    Args:
        title, subtitle: texts.
        tiles: the most important numbers, each with its name.
        sections: in their order.
    """
    links = "".join(f'<a href="#{part.anchor}">{escape(part.name)}</a>' for part in sections)
    shown = "".join(
        f'<div class="tile"><b{_SMALL * (len(value) > 12)}>{escape(value)}</b>'
        f"<span>{escape(name)}</span></div>"
        for name, value in tiles
    )
    bodies = "\n".join(
        f'<section id="{part.anchor}"><h2>{escape(part.name)}</h2>\n{part.body}</section>'
        for part in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body><main>
<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>
<div class="tiles">{shown}</div>
<nav>{links}</nav>
{bodies}
</main></body>
</html>
"""


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{escape(text)}</p>\n"


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>\n"


def note(text: str) -> str:
    """A remark that stands out, such as why something is missing."""
    return f'<p class="note">{escape(text)}</p>\n'


def code(text: str) -> str:
    """Text as it is, such as commands."""
    return f"<pre>{escape(text)}</pre>\n"


def folded(title: str, body: str) -> str:
    """HTML that appears after a click."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>\n"


def chart(svg: bytes, text: str) -> str:
    """A chart.

    Args:
        svg: the file.
        text: what it shows, for those who cannot see it.
    """
    data = base64.b64encode(svg).decode("ascii")
    return f'<figure><img alt="{escape(text)}" src="data:image/svg+xml;base64,{data}"></figure>\n'


def charts(items: Sequence[str]) -> str:
    """Charts beside each other."""
    return f'<div class="charts">{"".join(items)}</div>\n'


def picture(image: np.ndarray, caption: str) -> str:
    """A picture with a caption.

    Args:
        image: (H, W, 3) uint8, blue, green, red.
        caption: text below it.
    """
    done, content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 82])
    assert done, "OpenCV writes JPEG"
    data = base64.b64encode(content.tobytes()).decode("ascii")
    return (
        f'<figure><img loading="lazy" alt="{escape(caption)}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def pictures(items: Sequence[str]) -> str:
    """Pictures in columns."""
    return f'<div class="pictures">{"".join(items)}</div>\n'


def table(content: Table) -> str:
    """A table; bars show numbers from 0 to 1."""
    first, *others = content.header
    head = f"<th>{escape(first)}</th>"
    head += "".join(f'<th class="number">{escape(name)}</th>' for name in others)
    rows = "".join(
        "<tr>" + f"<td>{escape(str(row[0]))}</td>" + "".join(map(_cell, row[1:])) + "</tr>\n"
        for row in content.rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _cell(value: str | float | int | None) -> str:
    if isinstance(value, float):
        part = f' style="--part: {100 * min(max(value, 0.0), 1.0):.0f}%"'
        return f'<td class="number"{part}>{value:.3f}</td>'
    text = "–" if value is None else f"{value:,}" if isinstance(value, int) else escape(value)
    return f'<td class="number">{text}</td>'
