"""The report shows the rows, is self-contained, and refuses rows that it does not understand."""

from __future__ import annotations

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from attnstore.errors import InvalidArgument
from experiments.report.__main__ import main
from experiments.report.attend import attend_findings, crossover_tokens
from experiments.report.curves import break_even_gbit_per_s
from experiments.report.findings import findings
from experiments.report.rows import FirstToken, Results, read_results

_RUN = {"machine": "two <cores> & a cable", "seed": 7}
_BROWSER_S_MAX = 120


def _cell(rtt_ms: float, gbit_per_s: float, context_tokens: int, **change: Any) -> dict[str, Any]:
    recompute_ms = context_tokens * 0.7
    fetch_ms = 2 * rtt_ms + context_tokens * 23_040 * 8 / gbit_per_s / 1e6
    planner_ms = 0.7 * min(recompute_ms, fetch_ms)
    row = {
        "rtt_ms": rtt_ms,
        "gbit_per_s": gbit_per_s,
        "context_tokens": context_tokens,
        "hit_rate": 0.9,
        "recompute_ttft_ms": recompute_ms,
        "fetch_ttft_ms": fetch_ms,
        "planner_ttft_ms": planner_ms,
        "predicted_ttft_ms": planner_ms * 1.1,
        "choice": "fetch" if fetch_ms < recompute_ms else "recompute",
    }
    return row | change


def _decode(residence: str, gbit_per_s: float) -> dict[str, Any]:
    return {"rtt_ms": 1, "gbit_per_s": gbit_per_s, "context_tokens": 512, "residence": residence, "itl_ms": 40 + 10 / gbit_per_s}


_FAULT = {
    "fault": "collapse",
    "rtt_ms": 1,
    "gbit_per_s": 1,
    "context_tokens": 512,
    "recompute_ttft_ms": 100,
    "planner_ttft_ms": 120,
}
_SWEEP = [_cell(rtt, rate, context) for rtt in (0, 50) for rate in (0.01, 0.1, 10) for context in (512, 6_000)]
_ROWS = [_RUN, *_SWEEP, *(_decode(where, rate) for where in ("resident", "fetched") for rate in (0.1, 10)), _FAULT]


def _attend(mode: str, context_tokens: int, tpot_ms: float, **change: Any) -> dict[str, Any]:
    moved = {"fetch_each_step": context_tokens * 46_080, "attend": 139_320, "attend_speculative": 30_000}.get(mode, 0)
    row = {
        "model": "SmolLM2",
        "context_tokens": context_tokens,
        "rtt_ms": 0.1 if moved else 0.0,
        "gbit_per_s": 1.0 if moved else None,
        "mode": mode,
        "nodes": 1,
        "tpot_ms": tpot_ms,
        "ttft_ms": None,
        "bytes_per_token": moved,
        "round_trips_per_token": {"fetch_each_step": 1, "attend": 30}.get(mode, 0),
        "tokens_equal": True,
        "accepted_per_step": None,
        "predicted_ms": tpot_ms * 0.9 if moved else None,
    }
    return row | change


_ATTENDS = [
    *(_attend("fetch_each_step", tokens, tokens) for tokens in (1_024, 8_128)),
    *(_attend("attend", tokens, 60 + tokens / 100) for tokens in (1_024, 8_128)),
    *(_attend("resident", tokens, 50 + tokens / 100) for tokens in (1_024, 8_128)),
    _attend("shared_in_place", 8_128, 140),
    *(_attend("attend", tokens, 56 + tokens / 100, rtt_ms=0.0, gbit_per_s=None) for tokens in (1_024, 8_128)),
    *(_attend(mode, 1_024, tpot_ms, rtt_ms=2.0) for mode, tpot_ms in (("attend", 180), ("attend_speculative", 60))),
]


def _written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert main([str(_written(folder / "rows.jsonl", _ROWS)), "--out", str(folder / "out")]) == 0
    return folder / "out"


class _References(HTMLParser):
    """Collects everything that a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_the_page_holds_all_that_it_shows(out: Path) -> None:
    html = (out / "report.html").read_text()
    references = _References()
    references.feed(html)
    assert len(references.found) > 5
    assert all(reference.startswith("data:") for reference in references.found)
    assert "script" not in references.tags
    assert "@import" not in html
    assert "url(" not in html


def test_every_picture_is_a_png_beside_the_page(out: Path) -> None:
    pictures = {path.stem: path.read_bytes() for path in out.glob("*.png")}
    assert pictures.keys() == {"penalty", "planner", "first_token", "crossover", "predictions", "decode", "hierarchy"}
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    assert set(re.findall(r'<figure id="(\w+)"', (out / "report.html").read_text())) == pictures.keys()


def test_the_same_rows_make_the_same_page(out: Path, tmp_path: Path) -> None:
    assert main([str(_written(tmp_path / "rows.jsonl", _ROWS)), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_bytes() == (out / "report.html").read_bytes()


def test_faults_are_told_one_by_one(out: Path) -> None:
    row = '<th scope="row">collapse</th><td>1 Gb/s, 1 ms</td><td>512</td><td>100 ms</td><td>120 ms</td><td>1.20</td>'
    assert row in (out / "report.html").read_text()


def test_words_from_results_cannot_become_markup(out: Path) -> None:
    html = (out / "report.html").read_text()
    assert "two &lt;cores&gt; &amp; a cable" in html
    assert "<cores>" not in html


@pytest.mark.needs("chromium")
@pytest.mark.slow
def test_the_page_opens_in_a_browser_without_an_error_and_with_every_picture(out: Path, tmp_path: Path) -> None:
    # The page has no script; this one reports images that did not load, and proves that errors are detected.
    broken = "for (const each of document.images) if (!each.naturalWidth) console.error('broken', each.alt)"
    judge = f"<script>console.error('judged'); {broken}</script>"
    judged = tmp_path / "judged.html"
    judged.write_text((out / "report.html").read_text().replace("</body>", f"{judge}</body>"))
    assert _console(out / "report.html", tmp_path) == []
    assert ["judged" in line for line in _console(judged, tmp_path)] == [True]


def _console(page: Path, folder: Path) -> list[str]:
    """Returns the lines of the page's console."""
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    options = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={folder / 'page.png'}", "--window-size=1100,4000"]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=_BROWSER_S_MAX, check=True)
    assert (folder / "page.png").stat().st_size > 20_000
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_rounds_of_a_cell_become_their_median(tmp_path: Path) -> None:
    rounds = [_cell(1, 1, 512, planner_ttft_ms=time, choice=choice) for time, choice in ((90, "a"), (300, "b"), (100, "a"))]
    (cell,) = read_results([_written(tmp_path / "rows", rounds)]).first_tokens
    assert (cell.planner_ttft_ms, cell.choice) == (100, "a")


def test_lists_and_lines_and_several_files_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "list").write_text(json.dumps(_SWEEP[:5]))
    lines = _written(tmp_path / "lines", _SWEEP[5:])
    assert read_results([tmp_path / "list", lines]) == read_results([_written(tmp_path / "all", _SWEEP)])


def test_results_of_the_other_experiments_are_drawn(tmp_path: Path) -> None:
    bandwidth = [
        {"transport": name, "op": "read", "page_bytes": 368_640, "batch": batch, "gb_per_s": speed, "p50_us": 1, "p99_us": 2}
        | {"cpu_s_per_gb": 0.5}
        for name, speed in (("memcpy", 7.0), ("tcp", 5.0))
        for batch in (1, 32)
    ]
    attention = [
        {"model": "m", "backend": "cpu", "phase": "decode", "context_tokens": tokens, "batch": 1, "threads": 1, "ms": 1.0}
        | {"gb_per_s": 6.0, "read_limit_gb_per_s": 8.0, "contiguous_read_gb_per_s": 12.0, "of_limit": 0.75}
        for tokens in (1024, 8192)
    ]
    replays = [
        {"policy": "lru", "capacity_tokens": tokens, "capacity_blocks": 9, "queue_depth": 8, "requests": 9, "blocks": 100}
        | {"hit_blocks": 30, "evicted_blocks": 0, "bound_hit_blocks": 40, "duration_s": 0.1, "hit_rate_blocks": 0.3}
        for tokens in (500_000, 1_000_000)
    ]
    files = [_written(tmp_path / name, rows) for name, rows in (("b", bandwidth), ("a", attention), ("r", replays))]
    assert main([*map(str, files), "--out", str(tmp_path / "out")]) == 0
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"hierarchy", "bandwidth", "attention", "replay"}
    assert "this machine, memcpy 7.0 GB/s" in (tmp_path / "out" / "report.html").read_text()


def test_attending_is_drawn_and_judged_by_the_real_models_rows(tmp_path: Path) -> None:
    assert main([str(_written(tmp_path / "rows.jsonl", _ATTENDS)), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "attend.png").is_file()
    html = (tmp_path / "report.html").read_text()
    assert html.count("<td>met</td>") + html.count('<td class="">met</td>') == 7
    rows = read_results([tmp_path / "rows.jsonl"]).attends
    judged = {claim.text.split(",")[0]: claim for claim in attend_findings(rows)}
    assert judged["fetching for each token over attending"].measured == pytest.approx(8_128 / 141.28)
    assert judged["attending over resident"].measured == pytest.approx(66.24 / 60.24), "the last of that name is without a link"
    assert judged["attending over attending with guesses"].measured == pytest.approx(3)
    [wrong] = read_results([_written(tmp_path / "wrong", [_attend("attend", 512, 60, tokens_equal=False)])]).attends
    assert attend_findings([*rows, wrong])[-1].verdict == "MISSED"
    assert {claim.verdict for claim in attend_findings([])} == {"not measured"}


def test_the_context_where_attending_begins_to_win_follows_from_bytes_and_round_trips(tmp_path: Path) -> None:
    fetched, attended = read_results(
        [_written(tmp_path / "rows", [_attend("fetch_each_step", 1_000, 9), _attend("attend", 1_000, 9)])]
    ).attends
    # At 1 Gb/s a token's 46,080 bytes take 0.36864 ms; 29 more round trips take 2.9 ms and 139,320 bytes 1.11456 ms.
    assert crossover_tokens(fetched, attended) == pytest.approx(4.01456 / 0.36864)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (_attend("guess", 512, 60), "mode is 'guess'"),
        (_attend("attend", 512, 0), "tpot_ms is 0"),
        (_attend("attend", 512, 60, nodes=None), "nodes is None"),
        ({"color": "red"}, "of no known kind"),
        (["rtt_ms"], "is no object"),
        (_cell(1, 1, 512, planner_ttft_ms=None), "planner_ttft_ms is None"),
        (_cell(1, 1, 512, recompute_ttft_ms=0), "recompute_ttft_ms is 0"),
        (_cell(1, 1, 512) | {"gbit_per_s": -1}, "gbit_per_s is -1"),
        (_cell(1, 1, 512, fetch_ttft_ms="soon"), "fetch_ttft_ms is 'soon'"),
        ({name: value for name, value in _cell(1, 1, 512).items() if name != "choice"}, "choice is missing"),
        (_decode("elsewhere", 1), "residence is 'elsewhere'"),
        (_FAULT | {"planner_ttft_ms": float("nan")}, "planner_ttft_ms is nan"),
    ],
)
def test_a_row_that_says_nothing_sensible_stops_the_report(row: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=rf"rows, row 2: .*{words}"):
        read_results([_written(tmp_path / "rows", [_RUN, row])])


@pytest.mark.parametrize(("content", "words"), [("", "no results"), ("{", "neither JSON lines"), (None, "No such file")])
def test_a_file_without_results_ends_the_command_with_one_line(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def _first_token(gbit_per_s: float, penalty: float) -> FirstToken:
    return FirstToken(1, gbit_per_s, 512, 0.9, 100, 100 * penalty, 80, 80, "fetch")


def test_the_crossover_lies_where_the_two_ways_are_equal() -> None:
    cells = [_first_token(10.0**power, 10.0 ** (1 - power)) for power in (0, 3)]  # fetch takes 1,000 / bandwidth
    assert break_even_gbit_per_s(cells) == pytest.approx(10)


@pytest.mark.parametrize("penalties", [(5, 2), (0.5, 0.2), (2,)])
def test_there_is_no_crossover_where_one_way_always_wins(penalties: tuple[float, ...]) -> None:
    assert break_even_gbit_per_s([_first_token(10.0**index, penalty) for index, penalty in enumerate(penalties)]) is None


def test_bounds_are_judged_by_the_worst_cell_and_never_met_by_nothing(tmp_path: Path) -> None:
    assert {claim.verdict for claim in findings(Results())} == {"not measured"}
    results = read_results([_written(tmp_path / "rows", _ROWS)])
    assert [claim.verdict for claim in findings(results)] == ["met"] * 4
    results.first_tokens.append(FirstToken(1, 1, 99, 0.9, 100, 200, 111, 300, "fetch"))
    worst, best, error, fault = findings(results)
    assert (worst.verdict, worst.measured) == ("MISSED", pytest.approx(1.11))
    assert (best.verdict, error.verdict, fault.verdict) == ("met", "met", "met")
