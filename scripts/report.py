#!/usr/bin/env python3
"""Draws what `nestor evaluate --report DIR` or `nestor compress` measured: DIR/report.json.

    report.py DIR/report.json

Writes beside it quality_bytes.png, quality_flops.png, quality_time.png (where times are known),
ranks.png (where there are levels below the full one), spectra.png (where the artifact has them),
resident.png, and report.html, one page with all of them inside, which needs no network. Needs
requirements-plots.txt; exits with 3 where matplotlib is absent.
"""

import argparse
import base64
import html
import io
import json
import pathlib
import statistics
import sys

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    print(f"report.py: {error}", file=sys.stderr)
    sys.exit(3)

# Okabe and Ito's colours, which most colour-blind people tell apart.
COLORS = {"residual": "#0072B2", "prefix": "#D55E00", "mixed": "#009E73", "full": "#000000"}
ROLE_COLORS = [
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#8A8A00",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#000000",
]
ROLES = ["query", "key", "value", "attention out", "gate", "up", "down", "head"]
SHORT_ROLES = {"query": "q", "key": "k", "value": "v", "attention out": "o"}
PIXELS_PER_INCH = 84  # of the page, so that letters are as large in every figure
LEGEND_KINDS = (" levels", ", interpolated")
MARK_COLOR = "0.35"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "figure.dpi": 110,
}


def quality_key(report):
    """Against the source checkpoint where every level was measured so."""
    has_source = all("quality_vs_source" in level for level in report["levels"])
    return "quality_vs_source" if has_source else "quality"


def quality_label(report):
    return report["quality_text"][quality_key(report)]


def ladders_of(report):
    return list(dict.fromkeys(l["form"] for l in report["levels"] if l["form"] != "full"))


def curve_of(report, ladder, x_key):
    """The ladder's levels and the full one, cheapest first, those that have an x."""
    return [l for l in report["levels"] if l["form"] in (ladder, "full") and x_key in l]


def place_labels(axis, labels):
    """Annotates points (x, y, text, colour), each above its point or below where one is near."""
    figure = axis.figure
    figure.canvas.draw()
    taken = []
    area = axis.get_window_extent()
    for x, y, text, color in sorted(labels, key=lambda label: label[0]):
        px, py = axis.transData.transform((x, y))
        if not area.contains(px, py):
            continue
        width, height = 6.2 * len(text) + 6, 15
        options = [(6, -15), (6, 8), (-width, 8), (-width, -15), (6, -30), (6, 22), (-width, 22)]
        box = None
        for dx, dy in options:
            box = (px + dx, py + dy, px + dx + width, py + dy + height)
            inside = box[0] > area.x0 and box[2] < area.x1 and box[1] > area.y0 and box[3] < area.y1
            free = all(
                box[2] < b[0] or box[0] > b[2] or box[3] < b[1] or box[1] > b[3] for b in taken
            )
            if inside and free:
                break
        else:
            continue  # the table below has it
        taken.append(box)
        taken.append((px - 5, py - 5, px + 5, py + 5))
        scale = 72 / figure.dpi
        axis.annotate(
            text,
            (x, y),
            xytext=(dx * scale, dy * scale),
            textcoords="offset points",
            color=color,
            fontsize=8.5,
        )


def points_of(report, x_key):
    """(x, quality) of all that a figure shows: levels, and marks that were measured."""
    key = quality_key(report)
    return [
        (point[x_key], point[key])
        for point in report["levels"] + report["marks"]
        if x_key in point and point.get(key) is not None
    ]


def draw_ladders(axis, report, x_key):
    """The curves and the marks; the labels that they want, for place_labels."""
    key = quality_key(report)
    labels = []
    for ladder in ladders_of(report):
        curve = curve_of(report, ladder, x_key)
        color = COLORS.get(ladder, "0.5")
        stored = [l for l in curve if not l.get("interpolated") and l["form"] != "full"]
        between = [l for l in curve if l.get("interpolated")]
        axis.plot([l[x_key] for l in curve], [l[key] for l in curve], color=color, lw=1, alpha=0.6)
        axis.errorbar(
            [l[x_key] for l in stored],
            [l[key] for l in stored],
            yerr=[l.get("standard_error", 0) for l in stored],
            fmt="o",
            ms=6,
            color=color,
            capsize=2,
            lw=1,
            label=f"{ladder} levels",
        )
        if between:
            axis.plot(
                [l[x_key] for l in between],
                [l[key] for l in between],
                "o",
                ms=4.5,
                mfc="white",
                color=color,
                label=f"{ladder}, interpolated",
            )
        labels += [(l[x_key], l[key], str(l["level"]), color) for l in stored]
    for level in report["levels"]:
        if level["form"] == "full" and x_key in level:
            axis.plot(level[x_key], level[key], "s", ms=7, color=COLORS["full"], label="full level")
    for mark in report["marks"]:
        if x_key not in mark:
            continue
        if mark.get(key) is not None:
            axis.plot(mark[x_key], mark[key], "D", ms=9, mfc="none", color=MARK_COLOR, zorder=4)
            labels.append((mark[x_key], mark[key], mark["name"], MARK_COLOR))
            continue
        axis.axvline(mark[x_key], color=MARK_COLOR, lw=1, ls=":")
        axis.annotate(
            f"{mark['name']} (quality not measured)",
            (mark[x_key], 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            xytext=(-11, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=MARK_COLOR,
        )
    return labels


def draw_quality(report, x_key, x_label, title):
    """Quality of every ladder against levels' `x_key`; None where no level has one.

    Where some levels are far below the others, a second panel shows the upper ones alone."""
    if not any(x_key in level for level in report["levels"]):
        return None
    points = points_of(report, x_key)
    upper = [(x, y) for x, y in points if y >= 0.85]
    has_zoom = min(y for _, y in points) < 0.7 and len(upper) > 2
    figure, axes = plt.subplots(
        1, 1 + has_zoom, figsize=(12.4 if has_zoom else 7.6, 4.8), squeeze=False
    )
    drawn = [(axis, draw_ladders(axis, report, x_key)) for axis in axes.flat]
    for axis, _ in drawn:
        axis.set_xlabel(x_label)
        axis.margins(x=0.06, y=0.09)
    axes[0, 0].set_ylabel(quality_label(report), fontsize=9)
    axes[0, 0].set_title(title, loc="left", fontsize=11)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels())))
    names = [f"{ladder}{kind}" for ladder in ladders_of(report) for kind in LEGEND_KINDS]
    names = [name for name in [*names, "full level"] if name in handles]
    axes[0, 0].legend(
        [handles[name] for name in names], names, loc="lower right", fontsize=8.5, frameon=False
    )
    if has_zoom:
        xs, ys = zip(*upper)
        width = max(xs) - min(xs) or 0.1
        axes[0, 1].set_xlim(min(xs) - 0.06 * width, max(xs) + 0.08 * width)
        height = max(ys) - min(ys) or 0.01
        axes[0, 1].set_ylim(min(ys) - 0.12 * height, max(ys) + 0.1 * height)
        axes[0, 1].set_title("The upper part", loc="left", fontsize=11)
    figure.tight_layout()
    for axis, labels in drawn:
        place_labels(axis, labels)
    return figure


def draw_level_ranks(axis, report, level, roles, blocks, highest):
    """One level's ranks by block and type; returns the image."""
    grid = [[float("nan")] * len(roles) for _ in range(blocks)]
    head = None
    for layer, form, rank in zip(report["layers"], level["forms"], level["ranks"]):
        if layer["block"] < 0:
            head = form if form in ("dense", "middle") else f"{rank}"
        elif form != "dense":
            value = 2 * highest if form == "middle" else rank  # infinity would be masked
            grid[layer["block"]][roles.index(layer["role"])] = value
    cmap = plt.get_cmap("viridis").copy()
    cmap.set_bad("0.82")  # dense
    cmap.set_over("#e8a87c")  # the middle plane
    image = axis.imshow(grid, aspect="auto", cmap=cmap, vmin=0, vmax=highest)
    if blocks * len(roles) <= 100:
        for block, row in enumerate(grid):
            for column, value in enumerate(row):
                is_dense, is_middle = value != value, value > highest
                shade = "black" if value > 0.6 * highest else "white"
                axis.text(
                    column,
                    block,
                    "d" if is_dense else "m" if is_middle else f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="0.3" if is_dense else shade,
                )
    axis.grid(False)
    axis.set_xticks(range(len(roles)), [SHORT_ROLES.get(role, role) for role in roles])
    axis.tick_params(labelsize=8)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    is_prefix = level["form"] == "prefix"
    cost = level["relative_flops" if is_prefix else "relative_cost"]
    title = f"level {level['level']}\n{cost:.3f} of the {'FLOPs' if is_prefix else 'bytes'}"
    axis.set_title(title + (f"\nhead: {head}" if head is not None else ""), fontsize=8.5)
    return image


def draw_ranks(report):
    """A panel for each stored level below the full one; every ladder has rows and a scale."""
    stored = [l for l in report["levels"] if not l.get("interpolated")]
    by_ladder = {
        ladder: [l for l in stored if l["form"] == ladder] for ladder in ladders_of(report)
    }
    if not by_ladder:
        return None
    roles = [r for r in ROLES if any(l["role"] == r and l["block"] >= 0 for l in report["layers"])]
    blocks = 1 + max(l["block"] for l in report["layers"])
    columns = min(6, max(len(levels) for levels in by_ladder.values()))
    rows = {ladder: -(-len(levels) // columns) for ladder, levels in by_ladder.items()}
    height = max(1.8, 0.9 + 0.1 * blocks)
    figure = plt.figure(
        figsize=(1.6 + 1.95 * columns, sum(0.3 + height * count for count in rows.values())),
        layout="constrained",
    )
    parts = figure.subfigures(len(by_ladder), 1, squeeze=False, height_ratios=list(rows.values()))
    for part, (ladder, levels) in zip(parts.flat, by_ladder.items()):
        # One scale for the ladder, so that its levels compare. The head has its own range.
        highest = max(
            rank
            for level in levels
            for layer, rank in zip(report["layers"], level["ranks"])
            if layer["block"] >= 0
        )
        axes = part.subplots(rows[ladder], columns, squeeze=False, sharey=True)
        for index, axis in enumerate(axes.flat):
            if index >= len(levels):
                axis.set_visible(False)
                continue
            image = draw_level_ranks(axis, report, levels[index], roles, blocks, highest or 1)
            if index % columns == 0:
                axis.set_ylabel("block")
        bar = part.colorbar(image, ax=axes, shrink=0.8, pad=0.01, aspect=30)
        has_middle = any("middle" in level["forms"] for level in levels)
        others = "grey: dense, orange: middle plane" if has_middle else "grey: dense"
        bar.set_label(f"rank ({others})", fontsize=8.5)
        part.suptitle(f"{ladder} ladder", x=0.01, ha="left", fontsize=11)
    return figure


def draw_spectra(report):
    """The energy that a layer's output lacks at each rank, a panel for each form."""
    spectra = report.get("spectra") or []
    roles = {layer["name"]: layer["role"] for layer in report["layers"]}
    forms = [f for f in ("residual", "prefix") if any(layer.get(f) for layer in spectra)]
    if not forms:
        return None
    figure, axes = plt.subplots(1, len(forms), figsize=(5.6 * len(forms), 4.2), squeeze=False)
    titles = {
        "residual": "what the coarse plane leaves out",
        "prefix": "the weight itself",
    }
    for axis, form in zip(axes.flat, forms):
        for role, color in zip(ROLES, ROLE_COLORS):
            curves = [l[form] for l in spectra if roles.get(l["name"]) == role and l.get(form)]
            if not curves:
                continue
            for curve in curves:
                axis.plot(curve["ranks"], relative(curve), color=color, lw=0.5, alpha=0.3)
            ranks = min((curve["ranks"] for curve in curves), key=len)
            middle = [
                statistics.median(relative(curve)[i] for curve in curves) for i in range(len(ranks))
            ]
            axis.plot(ranks, middle, color=color, lw=2, label=role)
        axis.set_yscale("log")
        axis.set_xlabel("rank")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel("output energy left out, of that at rank 0", fontsize=9)
        axis.set_title(f"Components of {titles[form]}", loc="left", fontsize=11)
        axis.legend(fontsize=8.5, frameon=False, title="median of", title_fontsize=8.5)
    figure.tight_layout()
    return figure


def relative(curve):
    """Prefix factors lose everything at rank 0, residual ones what the plane alone loses."""
    first = curve["left"][0] if curve["ranks"][0] == 0 and curve["left"][0] > 0 else 1
    # A floor for the logarithm: what is left at full rank is rounding.
    return [max(left / first, 1e-6) for left in curve["left"]]


def draw_resident(report):
    """Bytes that stay in memory, by what they hold."""
    parts = [(name, count) for name, count in report["resident_bytes"].items() if count > 0]
    total = sum(count for _, count in parts)
    figure, axis = plt.subplots(figsize=(7.6, 0.5 * len(parts) + 1.3))
    names = [name for name, _ in parts]
    bars = axis.barh(names, [count / 1e6 for _, count in parts], color="#0072B2", height=0.6)
    texts = [f"{count / 1e6:.3g} MB, {100 * count / total:.1f} %" for _, count in parts]
    axis.bar_label(bars, texts, padding=4, fontsize=8.5)
    axis.invert_yaxis()
    axis.margins(x=0.22)
    axis.grid(False, axis="y")
    axis.set_xlabel("MB")
    axis.set_title(f"Stored and resident: {total / 1e6:.4g} MB", loc="left", fontsize=11)
    figure.tight_layout()
    return figure


def level_table(report):
    columns = [
        ("level", "level", "{}"),
        ("form", "form", "{}"),
        ("relative_cost", "relative cost", "{:.3f}"),
        ("relative_flops", "relative FLOPs", "{:.3f}"),
        ("weight_bytes", "MB read a token", "{:.4g}"),
        ("seconds_per_token", "ms a token", "{:.3f}"),
        ("perplexity", "perplexity", "{:.3f}"),
        ("spearman", "Spearman", "{:.4f}"),
        ("accuracy", "accuracy", "{:.4f}"),
        ("agreement", "agreement", "{:.4f}"),
        ("quality", "quality", "{:.4f}"),
        ("standard_error", "±", "{:.4f}"),
        ("quality_vs_source", "against the source", "{:.4f}"),
        ("estimated_quality", "estimate", "{:.4f}"),
    ]
    scale = {"weight_bytes": 1e-6, "seconds_per_token": 1e3}
    columns = [c for c in columns if any(c[0] in level for level in report["levels"])]
    rows = ["<tr>" + "".join(f"<th>{html.escape(c[1])}</th>" for c in columns) + "</tr>"]
    for level in report["levels"]:
        cells = []
        for key, _, form in columns:
            value = level.get(key)
            if value is not None and key in scale:
                value *= scale[key]
            cells.append(f"<td>{'' if value is None else html.escape(form.format(value))}</td>")
        kind = ' class="between"' if level.get("interpolated") else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return "<table>" + "\n".join(rows) + "</table>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto;
       padding: 0 1em; }}
h1 {{ font-size: 1.5em; margin-bottom: 0; }} h2 {{ font-size: 1.15em; margin-top: 2em; }}
p.facts {{ color: #666; margin-top: .2em; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }}
th, td {{ padding: .2em .7em; text-align: right; border-bottom: 1px solid #e5e5e5; }}
th {{ color: #666; font-weight: 600; vertical-align: bottom; }}
tr.between td {{ color: #888; font-style: italic; }}
img {{ max-width: 100%; height: auto; }} .wide {{ overflow-x: auto; }}
</style></head><body>
<h1>{title}</h1>
<p class="facts">{facts}</p>
{body}
</body></html>
"""


def page_of(report, images):
    """`images`: (heading, caption, PNG, width in inches) of each figure."""
    facts = [report["architecture"], report["dtype"], f"{report['tokens']} tokens measured"]
    if "pairs" in report:
        facts.append(f"{report['pairs']} pairs")
    interpolated = any(level.get("interpolated") for level in report["levels"])
    note = "<p>Rows in italics are interpolated between stored levels.</p>" if interpolated else ""
    body = [f'<h2>Levels</h2><div class="wide">{level_table(report)}</div>{note}']
    for heading, caption, png, width in images:
        data = base64.b64encode(png).decode()
        body.append(
            f"<h2>{html.escape(heading)}</h2><p>{html.escape(caption)}</p>"
            f'<img alt="{html.escape(heading)}" width="{width * PIXELS_PER_INCH:.0f}" '
            f'src="data:image/png;base64,{data}">'
        )
    return PAGE.format(
        title=html.escape(report["title"]),
        facts=html.escape(" · ".join(facts)),
        body="\n".join(body),
    )


def figures_of(report):
    """(file name, heading, caption, figure) of everything there is to draw."""
    marks = "Hollow diamonds are the model in one fixed type. Numbers are levels."
    figures = [
        (
            "quality_bytes",
            "Quality against bytes",
            f"Weight bytes that one decoded token reads. {marks}",
            draw_quality(
                report,
                "relative_cost",
                "weight bytes a token reads, as share of the full level's",
                "Quality against bytes",
            ),
        ),
        (
            "quality_flops",
            "Quality against FLOPs",
            "FLOPs of one token at 128 positions. Residual levels save none.",
            draw_quality(
                report,
                "relative_flops",
                "FLOPs of a token, as share of the full level's",
                "Quality against FLOPs",
            ),
        ),
        (
            "quality_time",
            "Quality against measured time",
            "Of the steps that measured the levels (up to 512 rows at once), on the machine that "
            "did; one pass, so read small differences with care.",
            draw_quality(
                report,
                "milliseconds_per_token",
                "measured ms a token",
                "Quality against time",
            ),
        ),
        (
            "ranks",
            "Ranks",
            "Of every layer, by block and type; a grey layer is dense.",
            draw_ranks(report),
        ),
        (
            "spectra",
            "Spectra",
            "What a layer's output lacks at each rank: thin lines are layers.",
            draw_spectra(report),
        ),
        (
            "resident",
            "Resident bytes",
            "The artifact's tensors, which all levels share; without KV cache and scratch.",
            draw_resident(report),
        ),
    ]
    return [figure for figure in figures if figure[3] is not None]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=pathlib.Path, help="report.json")
    path = parser.parse_args().report
    report = json.loads(path.read_text(encoding="utf-8"))
    for measured in report["levels"] + report["marks"]:
        if "seconds_per_token" in measured:
            measured["milliseconds_per_token"] = 1e3 * measured["seconds_per_token"]
    images = []
    with plt.rc_context(STYLE):
        for name, heading, caption, figure in figures_of(report):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130)
            (path.parent / f"{name}.png").write_bytes(buffer.getvalue())
            images.append((heading, caption, buffer.getvalue(), figure.get_figwidth()))
            plt.close(figure)
    (path.parent / "report.html").write_text(page_of(report, images), encoding="utf-8")


if __name__ == "__main__":
    main()
