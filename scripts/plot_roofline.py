#!/usr/bin/env python3
"""Draws what `nestor bench --json` measured under this machine's roofs.

    nestor bench models/smollm2-135m-instruct.nested --rows 1,4,16 --json > bench.json
    plot_roofline.py bench.json roofline.svg [--title TEXT]

The roofs are the measured read bandwidth and the measured rate of matrix products; a point is one
row of the report: FLOPs of its linear layers for each byte of weights that it read, and FLOPs a
second. Colours are levels, markers what was run. Weights that stay in a cache may stand above the
slanted roof. OUT is an SVG or a PNG, by its name. Needs requirements-plots.txt.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

MARKERS = "osDv^<>PXp*h8d"
MIXED_COLOR = "0.45"


def points_of(report):
    """Of every row of the report: (what was run, its level or None, FLOPs a byte, GFLOP/s)."""
    points = []

    def add(what, level, row):
        intensity = row["flops"] / row["weight_bytes"]
        points.append((what, level, intensity, row["flops"] / row["seconds"] / 1e9))

    for row in report["decode"]:
        add(f"decode, {row['rows']} row{'s' * (row['rows'] > 1)}", row["level"], row)
    for row in report["prefill"]:
        add(f"prefill of {row['tokens']}", row["level"], row)
    for row in report["embed"]:
        add(f"{row['sentences']} sentences, batch {row['batch']}", row["level"], row)
    for row in report["mixed"]:
        add(f"{row['rows']} rows of all levels", None, row)
    return points


def draw_roofs(axis, report, low, high):
    bandwidth, rate = report["read_gbps"], report["gemm_gflops"]
    ridge = rate / bandwidth
    # The slanted roof is long enough for its label, which stands on its left.
    low, high = min(low, ridge / 8), max(high, ridge * 4)
    axis.plot([low, ridge, high], [low * bandwidth, rate, rate], color="black", linewidth=1.2)
    style = {"textcoords": "offset points", "fontsize": 9}
    axis.annotate(
        f"reads {bandwidth:.1f} GB/s",
        (ridge / 2, rate / 2),
        xytext=(-8, 4),
        ha="right",
        **style,
    )
    axis.annotate(f"multiplies {rate:.0f} GFLOP/s", (ridge * 1.1, rate), xytext=(0, 5), **style)


def plot(report, title, path):
    points = points_of(report)
    kinds = list(dict.fromkeys(what for what, *_ in points))
    levels = sorted({level for _, level, *_ in points if level is not None})
    colors = {
        level: plt.get_cmap("viridis")(i / max(1, len(levels) - 1) * 0.95)
        for i, level in enumerate(levels)
    }
    figure, axis = plt.subplots(figsize=(9.5, 5.5))
    intensities = [intensity for _, _, intensity, _ in points]
    draw_roofs(axis, report, min(intensities) / 1.6, max(intensities) * 1.6)
    for what, level, intensity, gflops in points:
        axis.plot(
            intensity,
            gflops,
            MARKERS[kinds.index(what) % len(MARKERS)],
            color=colors.get(level, MIXED_COLOR),
            markersize=6.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="FLOPs for each byte of weights read",
        ylabel="GFLOP/s",
        title=title,
    )
    axis.grid(which="both", alpha=0.2)
    add_legend(axis, kinds, levels, colors)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def add_legend(axis, kinds, levels, colors):
    """Beside the picture, where it covers no point."""
    entries = [
        Line2D([], [], linestyle="", marker=MARKERS[i % len(MARKERS)], color="0.3", label=kind)
        for i, kind in enumerate(kinds)
    ]
    entries.append(Line2D([], [], linestyle="", label=""))
    shades = [(f"level {level}", colors[level]) for level in levels]
    if any(kind.endswith("of all levels") for kind in kinds):
        shades.append(("all levels", MIXED_COLOR))
    entries += [
        Line2D([], [], linestyle="", marker="s", markersize=9, color=color, label=label)
        for label, color in shades
    ]
    axis.legend(
        handles=entries,
        bbox_to_anchor=(1.02, 1),
        loc="upper left",
        borderaxespad=0,
        fontsize=8,
        frameon=False,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--title")
    options = parser.parse_args()
    report = json.loads(options.report.read_text(encoding="utf-8"))
    threads = report["threads"]
    title = options.title or (
        f"{pathlib.Path(report['model']).name} on {report['cpu']}, "
        f"{threads} thread{'s' * (threads > 1)}"
    )
    plot(report, title, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
