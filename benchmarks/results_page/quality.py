"""`benchmarks.quality.study`: every method on one model, perplexity on text that none of them saw."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from ..charts import Axes, Bar, Field, Series, bar_chart, line_chart
from ..origin import origin
from ..quality.rows import PROXSPARSE_WINDOWS
from ..svg import INK, QUIET, SERIES
from .section import Record, Section, figure, markdown_table, where_from, where_rows_are_from

LIMIT = 8  # times the dense perplexity: what is worse would flatten all other curves
CHOICES_AT = 0.45  # the sparsity at which tile sizes and settings are compared
README_SPARSITIES = (0.25, 0.35, 0.45, 0.5)
HYBRID, COMPAT = ("hybrid", "2:4"), [["compat", "patch"]]
# title, method, patterns, settings
README_ROWS: tuple[tuple[str, str, tuple[str, ...], list[list[str]]], ...] = (
    ("PATCH Joint, learned", "joint", HYBRID, []),
    ("the same as PATCH's public code does it", "joint", HYBRID, COMPAT),
    ("PATCH Tile, learned over SparseGPT's patterns", "tile", HYBRID, []),
    ("MaskLLM, learned", "maskllm", HYBRID, []),
    ("SparseGPT", "sparsegpt", HYBRID, []),
    ("Thanos", "thanos", HYBRID, []),
    ("Wanda", "wanda", HYBRID, []),
    ("magnitude", "magnitude", HYBRID, []),
    ("ProxSparse", "proxsparse", HYBRID, []),
    ("unstructured, which no tensor core runs: SparseGPT", "sparsegpt", ("unstructured",), []),
)


def section(name: str, record: Record) -> Section:
    settings = record["settings"]
    rows = [
        (
            row["name"], f"{row['heldout']:.2f}", f"{row['heldout_refitted']:.2f}" if "heldout_refitted" in row else None,
            f"{row['development']:.2f}", f"{row['overall']:.2%}",
            f"{row['heldout_by_sign']:.2f} at {row['reached_by_sign']:.2%}" if "heldout_by_sign" in row else None,
            f"{row['seconds']:.0f}", row["peak_gb"] if row["peak_gb"] else None,
        )
        for row in record["rows"]
    ]  # fmt: skip
    pictures = (
        (f"{name}.svg", "perplexity by sparsity and method", _by_sparsity(record)),
        (f"{name}-tiles.svg", "perplexity by tile size", _by_tile(record)),
        (f"{name}-settings.svg", "perplexity by settings of learning", _by_settings(record)),
    )
    text = [
        f"{where_from(record)}\n"
        f"{record['model']}{', ' + record['note'] if record['note'] else ''}. Learned rows: {settings['steps']} steps of "
        f"{settings['batch']} windows of {settings['context']} tokens.\nAll calibrate on the same windows and learn from the "
        f"same text, ProxSparse from {PROXSPARSE_WINDOWS} windows of it; perplexity is of held-out text, and of a\n"
        f"development text that is closer to what is learned from. {where_rows_are_from(record)} {record.get('remark', '')}",
        *(figure(file, words) for file, words, svg in pictures if svg is not None),
        markdown_table(
            ["row", "held-out", "refitted", "development", "sparsity", "by the sign rule", "seconds", "peak GB"], rows
        ),
    ]
    return Section(
        f"Quality: every method on {record['model']}",
        "\n\n".join(text),
        {file: svg for file, _, svg in pictures if svg is not None},
    )


def for_readme(record: Record) -> str:
    """Held-out perplexity by method and sparsity, tiles of 128, the mean over seeds."""
    settings, rows = record["settings"], [row for row in record["rows"] if row["tile"] == 128 and row["include"] is None]
    dense = next(row["heldout"] for row in rows if row["kind"] == "dense")
    lines = []
    for title, *kind in README_ROWS:
        alike = [row for row in rows if row["method"] == kind[0] and row["pattern"] in kind[1] and row["settings"] == kind[2]]
        cells = [_mean([row for row in alike if row["sparsity"] == sparsity]) for sparsity in README_SPARSITIES]
        if alike:
            lines.append((title, *(None if cell is None else f"{cell:.1f}" for cell in cells)))
    return (
        f"{where_from(record)}\n"
        f"{record['model']}; dense: {dense:.1f}. Learned: {settings['steps']} steps of {settings['batch']} windows of "
        f"{settings['context']} tokens, mean over seeds. {where_rows_are_from(record)}\n\n"
        + markdown_table(["method", *(f"{s:.0%}" for s in README_SPARSITIES)], lines)
    )


def _by_sparsity(record: Record) -> str:
    """Plain rows in tiles of 128, of the first seed, 2:4 everywhere as their end at 50 %; the others are in the table."""
    curves: dict[str, dict[float, float]] = {}
    for row in record["rows"]:
        plain = row["tile"] == 128 and row["include"] is None and not row["settings"] and row["seed"] == 0
        if plain and (row["kind"] == "learned" or row["pattern"] in ("hybrid", "2:4")):
            curves.setdefault(row["method"], {})[100 * row["sparsity"]] = row["heldout"]
    dense = next((row["heldout"] for row in record["rows"] if row["kind"] == "dense"), None)
    limit = LIMIT * dense if dense is not None else float("inf")
    shown = {method: {x: y for x, y in points.items() if y <= limit} for method, points in curves.items()}
    lines = {method: Series(points, SERIES[i % len(SERIES)]) for i, (method, points) in enumerate(shown.items())}
    highest = max([y for points in shown.values() for y in points.values()] + [dense or 1.0])
    above = sum(map(len, curves.values())) - sum(map(len, shown.values()))
    meaning = "hybrid dense/2:4 in tiles of 128; lower is better"
    legend = lines | ({"dense": Series({}, INK, "4 3", thin=True)} if dense is not None else {})
    return line_chart(
        "Perplexity by sparsity", f"{meaning}; {above} above {limit:.0f} in the table only" if above else meaning, legend,
        [[Field("held-out text", [s for s in lines.values() if s.points], dense)]],
        Axes("sparsity, %", 0, highest * 1.05, _step(highest)), origin(record["provenance"]),
    )  # fmt: skip


def _by_tile(record: Record) -> str | None:
    """Bars of each tile size; None if there is but one."""
    rows = [row for row in _compared(record) if not row["settings"] and row["pattern"] == "hybrid"]
    groups: dict[str, list[Bar]] = {}
    for tile in sorted({row["tile"] for row in rows}, reverse=True):
        for method, paint in (("joint", SERIES[0]), ("sparsegpt", SERIES[1])):
            found = _mean([row for row in rows if (row["method"], row["tile"]) == (method, tile)])
            if found is not None:
                groups.setdefault(f"tiles of {tile}", []).append(Bar(method, found, f"{found:.1f}", paint))
    if len(groups) < 2:
        return None
    title = f"What small tiles are worth at {CHOICES_AT:.0%}"
    return bar_chart(title, "held-out perplexity, mean over seeds; lower is better", groups, origin(record["provenance"]), True)


def _by_settings(record: Record) -> str | None:
    """Bars of every setting of PATCH Joint that was tried; None if that is one."""
    rows = [row for row in _compared(record) if row["method"] == "joint" and row["tile"] == 128]
    by_name: dict[str, list[Record]] = {}
    for row in rows:
        by_name.setdefault(_named(row["settings"]), []).append(row)
    means = {name: _mean(alike) for name, alike in by_name.items()}
    bars = [Bar(n, x, f"{x:.1f}", SERIES[0] if n == "default" else QUIET) for n, x in means.items() if x is not None]
    if len(bars) < 2:
        return None
    title = f"What settings of PATCH Joint are worth at {CHOICES_AT:.0%}"
    meaning = "held-out perplexity, mean over seeds; lower is better"
    return bar_chart(title, meaning, {"": bars}, origin(record["provenance"]))


def _compared(record: Record) -> list[Record]:
    return [row for row in record["rows"] if row["sparsity"] == CHOICES_AT and row["include"] is None]


def _named(settings: list[list[object]]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings) or "default"


def _mean(rows: Sequence[Record]) -> float | None:
    """Held-out perplexity."""
    return mean(row["heldout"] for row in rows) if rows else None


def _step(highest: float) -> float:
    """A round number of which about five fit."""
    power = 10.0 ** len(str(int(highest / 5))) / 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * 6 >= highest)
