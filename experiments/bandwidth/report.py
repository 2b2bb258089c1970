"""The text output of a run: the table and the claims.

Owns: the order of transports, limits first. Plain text, so that it can be pasted into docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiments.bandwidth.claims import Claim
from experiments.bandwidth.match import MatchFigures
from experiments.bandwidth.results import Row

LIMITS = ("memcpy", "raw_tcp", "iperf3", "grpc_bare")
OURS = ("grpc", "tcp", "shm_copy", "shm_in_place")
PEERS = ("redis_get", "redis_mget", "redis_set", "mooncake_get", "mooncake_put")
TRANSPORTS = (*LIMITS, *OURS, *PEERS)


def table(rows: Iterable[Row]) -> str:
    """Returns one line per row, grouped by page size, operation and batch."""
    ordered = sorted(rows, key=lambda row: (row["page_bytes"], row["op"], row["batch"], TRANSPORTS.index(row["transport"])))
    lines = [("page B", "op", "batch", "transport", "GB/s", "p50 us", "p99 us", "CPU s/GB")]
    lines += [
        (
            f"{row['page_bytes']:,}",
            row["op"],
            str(row["batch"]),
            row["transport"],
            f"{row['gb_per_s']:.2f}",
            f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}",
            f"{row['cpu_s_per_gb']:.2f}",
        )
        for row in ordered
    ]
    return aligned(lines, left=("op", "transport"))


def pivot(rows: Iterable[Row]) -> str:
    """Returns only throughput, one line per transport and one column per batch, which fits a page."""
    cells = {(row["page_bytes"], row["op"], row["transport"], row["batch"]): f"{row['gb_per_s']:.2f}" for row in rows}
    batches = sorted({batch for *_, batch in cells})
    lines = [("page B", "op", "transport", *(f"GB/s x{batch}" for batch in batches))]
    for page_bytes, op, name in sorted({key[:3] for key in cells}, key=lambda key: (key[0], key[1], TRANSPORTS.index(key[2]))):
        speeds = (cells.get((page_bytes, op, name, batch), "") for batch in batches)
        lines.append((f"{page_bytes:,}", op, name, *speeds))
    return aligned(lines, left=("op", "transport"))


def claims_table(claims: Iterable[Claim]) -> str:
    """Returns each claim with its measured value and its bound."""
    lines = [("claim", "measured", "bound", "verdict")]
    for claim in claims:
        measured = "-" if claim.measured is None else f"{claim.measured:.2f}{claim.unit}"
        sign = "<=" if claim.at_most else ">="
        lines.append((claim.text, measured, f"{sign} {claim.bound:g}{claim.unit}", claim.verdict))
    return aligned(lines, left=("claim", "verdict"))


def match_table(figures: Iterable[MatchFigures]) -> str:
    """Returns the look-ups: where, how many hashes, how long."""
    lines = [("match", "pages in table", "hashes", "p50 us", "p99 us", "ns a hash")]
    lines += [
        (
            figure.where,
            f"{figure.table_pages:,}",
            f"{figure.hashes:,}",
            f"{figure.p50_us:,.1f}",
            f"{figure.p99_us:,.1f}",
            f"{figure.ns_per_hash:,.0f}",
        )
        for figure in figures
    ]
    return aligned(lines, left=("match",))


def aligned(lines: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """Returns a Markdown table with aligned columns; the first line is the head, columns named in `left` are text."""
    head = lines[0]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if name in left else cell.rjust(width) for name, cell, width in zip(head, cells, widths, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if name in left else "-" * (width - 1) + ":" for name, width in zip(head, widths, strict=True)]
    return "\n".join([row(head), row(rule), *(row(line) for line in lines[1:])])
