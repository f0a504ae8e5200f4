"""The charts of a report as static SVG, in the colors of the page by CSS variables."""

import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from selectmoe.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Shape letters: B = bins, C = categories, N = points.

WIDTH_INCHES = 5.0  # of 72 points: on a phone a letter of 10 points is shown at 9
FONT_POINTS = 10
# matplotlib writes colors into the SVG; these stand for those of the page.
COLORS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--kept)",
    "#050505": "var(--pool)",
}
INK, MUTED, LINE, KEPT, POOL = COLORS
_FEW = ((KEPT, "-"), (INK, "--"), (MUTED, ":"), (POOL, "-."))
Z_95 = 1.96  # standard errors on either side of a value
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay text: searchable, and in the page's font
    "text.parse_math": False,  # a dollar sign in the name of a dataset is one
    "svg.hashsalt": "selectmoe",  # the same names of clip paths in every run
    "font.size": FONT_POINTS,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def require_matplotlib() -> None:
    """Raises ConfigError, with the extra that has it, where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401 (only to know whether it is there)
    except ImportError as error:
        raise ConfigError(
            "report.html needs matplotlib, the extra 'report': pip install 'selectmoe[report]'"
        ) from error


def histogram(
    edges: np.ndarray, dropped: np.ndarray, kept: np.ndarray, thresholds: Sequence[float]
) -> str:
    """Stacked counts of kept and dropped rows by score. edges: (B + 1,); counts: (B,)."""

    def draw(axes: "Axes") -> None:
        both = dropped + kept
        axes.stairs(dropped, edges, fill=True, color=POOL, label="dropped")
        axes.stairs(both, edges, baseline=dropped, fill=True, color=KEPT, label="kept")
        for number, threshold in enumerate(thresholds):
            label = None if number else "threshold" if len(thresholds) == 1 else "thresholds"
            axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=label)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, 1.04 * max(both.max(), 1))
        axes.set_xlabel("score")
        axes.set_ylabel("rows")
        axes.grid(axis="y")
        axes.tick_params(axis="y", length=0)
        _legend(axes)

    return _svg("scores", draw, height_inches=2.9)


def shares(
    name: str, labels: Sequence[str], pool: np.ndarray, kept: np.ndarray, *, pool_label: str
) -> str:
    """Pairs of horizontal bars. pool, kept: shares in [0, 1], (C,)."""

    def draw(axes: "Axes") -> None:
        positions = np.arange(len(labels), dtype=float)
        for offset, values, color, label in (
            (-0.2, pool, POOL, pool_label),
            (0.2, kept, KEPT, "kept rows"),
        ):
            axes.barh(positions + offset, 100 * values, 0.38, color=color, label=label)
            for position, value in zip(positions, values, strict=True):
                axes.annotate(
                    percent(value),
                    (100 * value, position + offset),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    color=MUTED,
                    fontsize=FONT_POINTS - 1.5,
                )
        axes.set_yticks(positions, labels)
        axes.set_ylim(len(labels) - 0.45, -0.55)
        axes.set_xlim(0, 116 * max(float(np.max([pool, kept])), 0.01))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        _legend(axes)

    return _svg(name, draw, height_inches=0.75 + 0.42 * len(labels))


def scatter(
    name: str, x: np.ndarray, y: np.ndarray, kept: np.ndarray, *, labels: tuple[str, str], log: bool
) -> str:
    """A point for each row. x, y: (N,); kept: bool (N,); log: whether x has a log axis."""

    def draw(axes: "Axes") -> None:
        for side, color, label in ((~kept, POOL, "dropped"), (kept, KEPT, "kept")):
            axes.plot(
                x[side], y[side], "o", color=color, label=label, markersize=3.4,
                markeredgewidth=0, alpha=0.7,
            )  # fmt: skip
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid()
        _legend(axes)

    return _svg(name, draw, height_inches=3.2)


def lines(
    name: str, series: Mapping[str, tuple[np.ndarray, np.ndarray]], *, labels: tuple[str, str]
) -> str:
    """A line for each series of (x, y). Up to 4 have colors of their own; of more, as those of a
    model's layers, later ones are darker and only the first and the last are named."""

    def draw(axes: "Axes") -> None:
        count = len(series)
        for number, (label, (x, y)) in enumerate(series.items()):
            few = count <= len(_FEW)
            color, style = _FEW[number] if few else (KEPT, "-")
            opacity = 1.0 if few else 0.15 + 0.85 * number / (count - 1)
            named = few or number in (0, count - 1)
            axes.plot(
                x, y, style, color=color, alpha=opacity, linewidth=1.6,
                marker="o" if len(x) == 1 else None, markersize=4,
                label=label if named and count > 1 else None,
            )  # fmt: skip
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(axis="y")
        axes.tick_params(axis="y", length=0)
        if count > 1:
            _legend(axes)

    return _svg(name, draw, height_inches=2.7)


def intervals(
    name: str,
    labels: Sequence[str],
    values: np.ndarray,
    errors: np.ndarray,
    *,
    baseline: float | None,
) -> str:
    """A value with its 95 % interval for each label. values, errors: (C,), errors NaN where they
    are unknown. baseline: a value that is drawn as a line."""

    def draw(axes: "Axes") -> None:
        positions = np.arange(len(labels), dtype=float)
        if baseline is not None:
            axes.axvline(baseline, color=POOL, linewidth=1, linestyle=(0, (4, 3)))
        axes.errorbar(
            values, positions, xerr=Z_95 * np.nan_to_num(errors), fmt="o", color=KEPT,
            ecolor=KEPT, elinewidth=1.4, capsize=3, markersize=5,
        )  # fmt: skip
        axes.set_yticks(positions, labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="x")

    return _svg(name, draw, height_inches=0.7 + 0.34 * len(labels))


def percent(share: float) -> str:
    """0.0312 -> "3.1 %", 0.312 -> "31 %"."""
    if share in (0, 1) or 0.1 <= share < 0.995:
        return f"{100 * share:.0f} %"
    return "<0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def _legend(axes: "Axes") -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0, borderpad=0.2,
        handlelength=1.2, handletextpad=0.5, columnspacing=1.4, labelcolor=MUTED, markerscale=1.8,
    )  # fmt: skip


def _svg(name: str, draw: Callable[["Axes"], None], *, height_inches: float) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        target = io.StringIO()
        with warnings.catch_warnings():
            # The page's font draws the letters; matplotlib's only measures them.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(target, format="svg", metadata={"Date": None})
    return _for_page(target.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """The <svg> element alone, with ids of its own and the page's colors.

    It is hidden from screen readers, which have the table beneath it.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None, "matplotlib writes a viewBox"
    head = f'<svg class="chart" aria-hidden="true" focusable="false" {size.group()}>'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    prefix = html.escape(name)
    svg = re.sub(r' id="', f' id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    for color, variable in COLORS.items():
        svg = svg.replace(color, variable)
    return re.sub(r"\s*\n\s*", " ", svg)
