"""The page: plots and tables in one HTML file that loads nothing from the network and runs no script.

Owns: the HTML and its style. Invariant: everything shown is in the file; text from results is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from experiments.bandwidth.claims import Claim
from experiments.report.rows import Run
from experiments.report.style import Picture
from experiments.report.tables import Table

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2.5rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
.lead, figcaption, .caption { color: #444; }
figure { margin: 0 0 1rem; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; margin: .6rem 0 1rem; }
.wide { overflow-x: auto; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, .claims td:last-child { text-align: left; }
.claims td:first-child { white-space: normal; }
thead th { border-bottom: 2px solid #888; }
.missed { font-weight: bold; color: #a33b00; }
footer { color: #666; font-size: .85rem; margin-top: 3rem; border-top: 1px solid #ddd; padding-top: .6rem; }
"""


def page(
    runs: Sequence[Run], sentences: Sequence[str], claims: Sequence[Claim], pictures: Sequence[Picture], tables: Sequence[Table]
) -> str:
    """Returns the whole file."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
        f"<title>AttnStore: what the network costs</title><style>{_STYLE}</style></head><body>",
        "<h1>When can the network serve as an LLM's memory?</h1>",
        '<p class="lead">What fetching, recomputing and attending in place cost, measured by the experiments of AttnStore.</p>',
        *(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        _claims(claims) if any(claim.measured is not None for claim in claims) else "",
        *map(_picture, pictures),
        *map(_table, tables),
        "<footer>",
        *(f"<p>Measured on {escape(run.machine)}; seed {run.seed}.</p>" for run in runs),
        "<p>Made by <code>python -m experiments.report</code>. Times are medians; GB and Gb are powers of ten.</p>",
        "</footer></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _picture(picture: Picture) -> str:
    drawn = io.BytesIO()
    picture.figure.savefig(drawn, format="svg", metadata={"Date": None})
    data = base64.b64encode(drawn.getvalue()).decode()
    width = round(picture.figure.get_figwidth() * 96)
    return (
        f'<h2>{escape(picture.title)}</h2><figure id="{picture.name}"><figcaption>{escape(picture.caption)}</figcaption>'
        f'<img width="{width}" alt="{escape(picture.title, quote=True)}" src="data:image/svg+xml;base64,{data}"></figure>'
    )


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    lines = "".join(
        f'<tr><th scope="row">{escape(line[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in line[1:]) + "</tr>"
        for line in table.lines
    )
    return (
        f'<h2>{escape(table.title)}</h2><p class="caption">{escape(table.caption)}</p>'
        f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _claims(claims: Sequence[Claim]) -> str:
    lines = []
    for claim in claims:
        measured = "-" if claim.measured is None else f"{claim.measured:.2f}{claim.unit}"
        bound = f"{'at most' if claim.at_most else 'at least'} {claim.bound:g}{claim.unit}"
        kind = "missed" if claim.verdict == "MISSED" else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in (claim.text, measured, bound))
        lines.append(f'<tr>{cells}<td class="{kind}">{claim.verdict}</td></tr>')
    return (
        "<h2>What it must show</h2>"
        '<table class="claims"><thead><tr><th>claim</th><th>measured</th><th>bound</th><th>verdict</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )
