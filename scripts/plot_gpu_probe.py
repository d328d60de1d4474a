"""Writes the page of facts and its plot from the records of one or two runs of gpu_probe.

    plot_gpu_probe.py OUTPUT_DIRECTORY RUN_JSON [SECOND_RUN_JSON]

Writes gpu_facts.md and gpu_facts.png. Every number in them comes from a record or is computed from
records here; records that failed their check appear in one list and nowhere else.
"""

import json
import math
import pathlib
import statistics
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MEASURED = {"first", "second", "invocations", "error", "bar", "check", "bf16",
            "one_plane_exact_rows", "one_plane_fp8_rows", "two_planes_exact_rows",
            "two_planes_fp8_rows"}
AGREEMENT = 0.05
RESIDUAL = "coarse + residual, accumulated"
RESIDUAL_APART = "coarse + residual, extra launches"


# --- records ----------------------------------------------------------------------------------

class Facts:
    """The records of all runs, by what was measured."""

    def __init__(self, paths: list[str]):
        self.runs = []
        for path in paths:
            with open(path, encoding="utf-8") as file:
                self.runs.append(json.load(file))
        self.device = self.runs[0]["device"]
        assert all(run["device"] == self.device for run in self.runs), "runs of different devices"
        self.by_key = {}
        for run in self.runs:
            for record in run["records"]:
                self.by_key.setdefault(self.key(record), []).append(record)
        self.failed = [records[0] for records in self.by_key.values()
                       if any(record.get("check") == "failed" for record in records)]
        self.records = []
        for records in self.by_key.values():
            if any(record.get("check") == "failed" for record in records):
                continue
            merged = dict(records[0])
            if "first" in merged:
                merged["time"] = statistics.median(
                    sample for record in records for sample in (record["first"], record["second"]))
            self.records.append(merged)

    @staticmethod
    def key(record: dict) -> tuple:
        return tuple(sorted((k, v) for k, v in record.items() if k not in MEASURED))

    def find(self, **wanted) -> list[dict]:
        return [record for record in self.records
                if all(record.get(key) == value for key, value in wanted.items())]

    def one(self, **wanted) -> dict | None:
        found = self.find(**wanted)
        return found[0] if found else None

    def time(self, **wanted) -> float | None:
        record = self.one(**wanted)
        return record["time"] if record else None

    def shapes(self) -> list[tuple[int, int]]:
        found = {(record["m"], record["n"]) for record in self.find(question="layers")}
        return sorted(found, key=lambda shape: shape[0] * shape[1])

    def rows(self) -> list[int]:
        return sorted({record["rows"] for record in self.find(question="layers")})


def spread(records: list[dict]) -> float:
    """Largest relative distance of a median from their mean."""
    samples = [sample for record in records for sample in (record["first"], record["second"])]
    mean = statistics.mean(samples)
    return max(abs(sample - mean) for sample in samples) / mean


# --- text ---------------------------------------------------------------------------------------

def micro(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.3g}" if seconds < 1e-3 \
        else f"{seconds * 1e6:.0f}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def table(header: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def shape_name(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(statistics.mean(map(math.log, values))) if values else None


# --- the model --------------------------------------------------------------------------------

class Model:
    """time = launches · t0 + max(bytes / bandwidth, operations / rate), fitted to one type."""

    def __init__(self, records: list[dict]):
        self.records = records
        self.t0, self.bandwidth, self.rate = self.fit()

    def predict(self, record: dict, t0: float, bandwidth: float, rate: float) -> float:
        return record["launches"] * t0 + max(record["bytes"] / bandwidth, record["flops"] / rate)

    def loss(self, parameters: list[float]) -> float:
        t0, bandwidth, rate = map(math.exp, parameters)
        return statistics.mean(
            abs(math.log(self.predict(record, t0, bandwidth, rate) / record["time"]))
            for record in self.records)

    def fit(self) -> tuple[float, float, float]:
        """Pattern search on the logarithms: three parameters, a smooth enough loss."""
        at = [math.log(2e-6), math.log(3e12), math.log(5e14)]
        best, step = self.loss(at), 0.5
        while step > 1e-3:
            moves = [at[:i] + [at[i] + sign * step] + at[i + 1:]
                     for i in range(3) for sign in (1, -1)]
            loss, move = min((self.loss(move), move) for move in moves)
            if loss < best:
                best, at = loss, move
            else:
                step /= 2
        self.error = best
        return tuple(map(math.exp, at))

    def t_star(self, bytes_a_weight: int) -> float:
        return bytes_a_weight * self.rate / (2 * self.bandwidth)


def models(facts: Facts) -> dict[str, Model]:
    result = {}
    for kind in ("bf16", "fp8"):
        records = facts.find(question="layers", form="dense", type=kind)
        records += facts.find(question="layers", form="prefix", type=kind)
        if len(records) >= 6:
            result[kind] = Model(records)
    return result


# --- sections -----------------------------------------------------------------------------------

def bandwidth_of(facts: Facts, form: str) -> float | None:
    record = facts.one(question="ceilings", form=form)
    return record["bytes"] / record["time"] if record else None


def rate_of(facts: Facts, kind: str) -> float | None:
    record = facts.one(question="ceilings", form=f"{kind} 8192^3")
    return record["flops"] / record["time"] if record else None


def ceilings(facts: Facts) -> str:
    rows = []
    for record in facts.find(question="ceilings"):
        if "bytes" in record:
            rows.append([record["form"], f"{record['bytes'] / record['time'] / 1e12:.2f} TB/s"])
        else:
            rows.append([record["form"], f"{record['flops'] / record['time'] / 1e12:.0f} TFLOP/s"])
    return "## Ceilings\n\n" + table(["what", "rate"], rows)


def launch_cost(facts: Facts) -> str:
    rows = [[record["form"], record["blocks"], f"{record['time'] * 1e6:.2f}"]
            for record in facts.find(question="launch cost")]
    return ("## Launch cost\n\nOne more dependent kernel in a graph, or one more barrier of the whole "
            "grid inside a kernel.\n\n" + table(["what", "blocks", "µs"], rows))


def layer_row(facts: Facts, shape: tuple[int, int], rows: int) -> list[str]:
    at = {"question": "layers", "m": shape[0], "n": shape[1], "rows": rows}
    cells = [str(rows)]
    for kind in ("bf16", "fp8"):
        cells.append(micro(facts.time(**at, form="dense", type=kind)))
        cells += [micro(facts.time(**at, form="prefix", type=kind, eighths=eighths))
                  for eighths in (1, 2, 3, 4)]
    for rank in (16, 32, 64, 128):
        cells.append(micro(facts.time(**at, form=RESIDUAL, rank=rank)) + " / " +
                     micro(facts.time(**at, form=RESIDUAL_APART, rank=rank)))
    return cells


def layers(facts: Facts) -> str:
    header = ["rows", "bf16 dense", "1/8", "1/4", "3/8", "1/2", "fp8 dense", "1/8", "1/4", "3/8",
              "1/2", "fp8 + 16", "+ 32", "+ 64", "+ 128"]
    text = ("## Dense and factored layers\n\nµs a layer, cold weights, through cublasLt: dense; the two "
            "products of a prefix at a fraction of the rank; the coarse fp8 plane with a bf16 residual "
            "of rank 16 to 128, its second product accumulating / as extra launches with an "
            "addition.\n\n")
    for shape in facts.shapes():
        text += f"### {shape_name(shape)}\n\n"
        text += table(header, [layer_row(facts, shape, rows) for rows in facts.rows()]) + "\n"
    return text + "![time against rank fraction](gpu_facts.png)\n"


def crossing(points: list[tuple[int, float]], level: float) -> float | None:
    """Where a ratio first passes `level`, between two measured row counts in the logarithm."""
    before = None
    for rows, value in points:
        if value > level:
            if before is None:
                return float(rows)
            share = (level - before[1]) / (value - before[1])
            return math.exp(math.log(before[0]) + share * math.log(rows / before[0]))
        before = (rows, value)
    return None


class Crossover:
    """T* of one shape and type: raised ÷ the large rank's rows alone, and raised ÷ segments."""

    def __init__(self, facts: Facts, kind: str, shape: tuple[int, int]):
        self.kind, self.shape = kind, shape
        at = {"question": "crossover", "type": kind, "m": shape[0], "n": shape[1]}
        self.points = []
        for record in sorted(facts.find(**at, form="raised"), key=lambda r: r["rows"]):
            large = facts.time(**at, form="large", rows=record["rows"])
            segments = facts.time(**at, form="segments", rows=record["rows"])
            if large and segments:
                self.points.append((record["rows"], record["time"], large, segments))
        self.stops_free = crossing([(rows, raised / large)
                                    for rows, raised, large, _ in self.points], 1 + AGREEMENT)
        self.segments_win = crossing([(rows, raised / segments)
                                      for rows, raised, _, segments in self.points], 1.0)


def crossovers(facts: Facts) -> list[Crossover]:
    found = sorted({(record["type"], record["m"], record["n"])
                    for record in facts.find(question="crossover")})
    return [Crossover(facts, kind, (m, n)) for kind, m, n in found]


def rows_text(value: float | None, points: list) -> str:
    return f"{value:.0f}" if value else f"above {points[-1][0]}" if points else "-"


def crossover_section(facts: Facts) -> str:
    text = ("## T*: where raising stops being free\n\nHalf of the rows at half of the rank, half at an "
            "eighth. *Raised*: all at half. *Large*: the first half of the rows alone. *Segments*: "
            f"two pairs. Raising is free while it costs at most {AGREEMENT:.0%} more than *large*.\n\n")
    found = crossovers(facts)
    text += table(["type", "shape", "raising is free up to, rows", "segments win from, rows"],
                  [[c.kind, shape_name(c.shape), rows_text(c.stops_free, c.points),
                    rows_text(c.segments_win, c.points)] for c in found])
    for c in found:
        text += f"\n{c.kind}, {shape_name(c.shape)}, µs:\n\n"
        text += table(["rows", "raised", "large", "segments"],
                      [[rows] + [micro(t) for t in times] for rows, *times in c.points])
    return text


def strided_ratios(facts: Facts, layout: str) -> list[float]:
    ratios = []
    for record in facts.find(question="strided", form=layout):
        at = {key: record[key] for key in ("type", "m", "rank", "rows")}
        contiguous = facts.time(question="strided", form="ld = r", **at)
        if contiguous:
            ratios.append(record["time"] / contiguous)
    return ratios


def strided(facts: Facts) -> str:
    rows = []
    for record in facts.find(question="strided", form="ld = r"):
        at = {key: record[key] for key in ("type", "m", "rank", "rows")}
        rows.append([record["type"], f"{record['m']} × {record['rank']} of {record['max_rank']}",
                     record["rows"], micro(record["time"])] +
                    [micro(facts.time(question="strided", form=form, **at))
                     for form in ("ld = R", "rank-major")])
    return ("## Strided against contiguous prefixes\n\nThe second product alone, µs.\n\n" +
            table(["type", "B", "rows", "ld = r", "ld = R", "rank-major"], rows))


def planes(facts: Facts) -> str:
    text = ("## FP8 planes\n\n`W ≈ s0·p0 + s1·p1`, a scale per output; rows quantised on the fly, a scale "
            "per row.\n\nError of a layer's output, ‖y − y_ref‖ / ‖y_ref‖, on rows of N(0, 1):\n\n")
    errors = facts.find(question="fp8 planes", form="error")
    if errors:
        names = ["bf16", "one_plane_exact_rows", "one_plane_fp8_rows", "two_planes_exact_rows",
                 "two_planes_fp8_rows"]
        text += table(["layer", "m × n"] + [name.replace("_", " ") for name in names],
                      [[f"`{r['layer']}`", shape_name((r["m"], r["n"]))] +
                       [f"{r[name]:.1e}" for name in names] for r in errors])
    else:
        text += "not measured: the run had no file of real weights.\n"
    text += "\nThe quantising pass, µs:\n\n"
    passes = facts.find(question="fp8 planes", form="quantising pass")
    columns = sorted({record["n"] for record in passes})
    text += table(["rows"] + [f"n = {n}" for n in columns],
                  [[rows] + [micro(facts.time(question="fp8 planes", form="quantising pass", n=n,
                                              rows=rows)) for n in columns]
                   for rows in sorted({record["rows"] for record in passes})])
    text += "\nProducts, µs (cold weights):\n\n"
    rows = []
    for record in facts.find(question="fp8 planes", form="two planes, accumulated"):
        at = {key: record[key] for key in ("m", "n", "rows")}
        rows.append([shape_name((record["m"], record["n"])), record["rows"],
                     micro(facts.time(question="layers", form="dense", type="bf16", **at)),
                     micro(facts.time(question="layers", form="dense", type="fp8", **at)),
                     micro(facts.time(
                         question="fp8 planes",
                         form="one plane, scales per output and row inside the product", **at)),
                     micro(record["time"])])
    return text + table(["shape", "rows", "bf16 dense", "one plane",
                         "one plane, scales inside the product", "two planes"], rows)


def gemv4(facts: Facts) -> str:
    read = bandwidth_of(facts, "read")
    rows = []
    for record in facts.find(question="gemv4"):
        at = {key: record[key] for key in ("m", "n", "rows")}
        dense = facts.time(question="layers", form="dense", type="fp8", **at)
        bandwidth = record["bytes"] / record["time"]
        rows.append([shape_name((record["m"], record["n"])), record["rows"], micro(record["time"]),
                     f"{bandwidth / 1e12:.2f}", f"{bandwidth / read:.0%}" if read else "-",
                     ratio(dense / record["time"] if dense else None)])
    return ("## The 4-bit plane\n\nOne untuned fused dequantise-GEMV, 4.5 bits a weight, cold weights.\n\n" +
            table(["shape", "rows", "µs", "TB/s", "of the read bandwidth", "× fp8 dense"], rows))


def switching(facts: Facts) -> str:
    rows = []
    for form in dict.fromkeys(record["form"] for record in facts.find(question="switching")):
        times = [facts.time(question="switching", form=form, levels=levels)
                 for levels in ("high", "low", "alternating")]
        if all(times):
            rows.append([form] + [micro(time) for time in times] +
                        [micro(times[2] - (times[0] + times[1]) / 2)])
    return ("## Switching levels\n\nµs a step of 16 layers of 2048 × 2048 as prefix pairs, one row, half "
            "and an eighth of the rank.\n\n" +
            table(["how", "high", "low", "alternating", "a switch costs"], rows))


# --- break-even ---------------------------------------------------------------------------------

def forms(facts: Facts) -> list[tuple[str, dict]]:
    found = [("fp8 dense", {"question": "layers", "form": "dense", "type": "fp8"})]
    for kind in ("bf16", "fp8"):
        found += [(f"{kind} prefix {eighths}/8",
                   {"question": "layers", "form": "prefix", "type": kind, "eighths": eighths})
                  for eighths in (1, 2, 3, 4)]
    found += [(f"fp8 plane + residual {rank}", {"question": "layers", "form": RESIDUAL, "rank": rank})
              for rank in (16, 32, 64, 128)]
    return found + [("4-bit plane", {"question": "gemv4"})]


def break_even(facts: Facts, form: dict, rows: int, against: str) -> str:
    """The smallest measured shape from which on the form is faster, and by how much at the largest."""
    wins, last = None, None
    for m, n in facts.shapes():
        at = {"m": m, "n": n, "rows": rows}
        own = facts.time(**form, **at)
        dense = facts.time(question="layers", form="dense", type=against, **at)
        if own is None or dense is None:
            continue
        last = dense / own
        if last <= 1:
            wins = None
        elif wins is None:
            wins = (m, n)
    if last is None:
        return "-"
    return f"{shape_name(wins)} ({last:.2f}×)" if wins else f"never ({last:.2f}×)"


def break_even_section(facts: Facts, fitted: dict[str, Model]) -> str:
    text = "## The model, refitted\n\n"
    text += ("`time = launches · t0 + max(bytes / B, operations / F)`, fitted to the dense and prefix layers "
             "above; `T* = w F / (2 B)` for w bytes a weight; a pair at a fraction q of the dense bytes "
             "beats dense for one row from `B t0 / (1 − q)` bytes of dense weights.\n\n")
    rows = []
    for kind, model in fitted.items():
        size = 2 if kind == "bf16" else 1
        rows.append([kind, f"{model.t0 * 1e6:.2f}", f"{model.bandwidth / 1e12:.2f}",
                     f"{model.rate / 1e12:.0f}", f"{model.error:.0%}", f"{model.t_star(size):.0f}"] +
                    [f"{model.bandwidth * model.t0 / (1 - q) / 1e6:.1f} MB" for q in (0.25, 0.5, 0.75)])
    text += table(["type", "t0, µs", "B, TB/s", "F, TFLOP/s", "mean error", "T*, rows",
                   "break-even, q = 0.25", "q = 0.5", "q = 0.75"], rows)
    text += ("\nMeasured: the smallest shape from which on a form beats dense, with its speed-up at the "
             "largest shape.\n\n")
    few, many = facts.rows()[0], facts.rows()[-1]
    header = ["form"] + [f"{rows} row{'s' * (rows > 1)}, against {against}"
                         for rows in (few, many) for against in ("bf16", "fp8")]
    text += table(header, [[name] + [break_even(facts, form, rows, against)
                                     for rows in (few, many) for against in ("bf16", "fp8")]
                           for name, form in forms(facts)])
    return text


# --- what it says -------------------------------------------------------------------------------

def floor_of(facts: Facts, record: dict, t0: float) -> float | None:
    """One launch that moves the record's bytes, or does its operations, at the measured ceilings."""
    read, bf16, fp8 = bandwidth_of(facts, "read"), rate_of(facts, "bf16"), rate_of(facts, "fp8")
    if not read or not bf16 or not fp8:
        return None
    is_fp8 = record.get("type") == "fp8"
    fp8_flops = record.get("fp8_flops", record["flops"] if is_fp8 else 0)
    return t0 + max(record["bytes"] / read, fp8_flops / fp8 + (record["flops"] - fp8_flops) / bf16)


def kernel_candidates(facts: Facts, t0: float, rows_wanted: list[int]) -> list[tuple]:
    """(form, measured speed-up over fp8 dense, speed-up at the floor, measured ÷ floor)."""
    found = []
    for name, form in forms(facts):
        measured, at_floor, gap = [], [], []
        for record in facts.find(**form):
            if record["rows"] not in rows_wanted:
                continue
            dense = facts.time(question="layers", form="dense", type="fp8", m=record["m"],
                               n=record["n"], rows=record["rows"])
            floor = floor_of(facts, record, t0)
            if dense and floor:
                measured.append(dense / record["time"])
                at_floor.append(dense / floor)
                gap.append(record["time"] / floor)
        if measured:
            found.append((name, geometric_mean(measured), geometric_mean(at_floor),
                          geometric_mean(gap)))
    return sorted(found, key=lambda entry: -entry[2])


def kernels_text(facts: Facts, t0: float) -> str:
    text = ("The floor of a form is one launch at the measured ceilings. A form is worth a kernel of our own "
            "where the floor is at least 1.2 times as fast as fp8 dense through the library and the library "
            "reaches less than 1 / 1.2 of that floor; the order is that of the floor's speed-up. Geometric "
            "means over the shapes.\n\n")
    last = facts.rows()[-1]
    for title, rows in (("Decoding (1, 4 and 16 rows)", [1, 4, 16]), (f"Prefill ({last} rows)", [last])):
        candidates = kernel_candidates(facts, t0, rows)
        text += f"{title}:\n\n" + table(
            ["form", "measured, × fp8 dense", "at the floor, × fp8 dense", "measured ÷ floor"],
            [[name] + [ratio(value) for value in values] for name, *values in candidates])
        worth = [name for name, _, at_floor, gap in candidates if at_floor >= 1.2 and gap >= 1.2]
        text += "\nWorth a kernel, in this order: " + ("; ".join(worth) if worth else "none") + ".\n\n"
    return text


def design_points(facts: Facts) -> list[str]:
    points = []
    plain = facts.time(question="launch cost", form="tiny GEMV")
    programmatic = facts.time(question="launch cost", form="tiny GEMV, programmatic, prefetched")
    barrier = facts.time(question="launch cost", form="grid barrier by a counter")
    if plain and programmatic and barrier:
        points.append(f"One more dependent kernel costs {plain * 1e6:.2f} µs; with programmatic dependent "
                      f"launch and prefetched weights {programmatic * 1e6:.2f} µs; a barrier inside a "
                      f"persistent kernel {barrier * 1e6:.2f} µs.")
    for layout in ("ld = R", "rank-major"):
        ratios = strided_ratios(facts, layout)
        if ratios:
            points.append(f"A prefix of B with {layout} takes {statistics.median(ratios):.2f} × the time of "
                          f"the contiguous one in the median, {max(ratios):.2f} × at worst.")
    for c in crossovers(facts):
        points.append(f"{c.kind}, {shape_name(c.shape)}: raising every row is free up to "
                      f"{rows_text(c.stops_free, c.points)} rows; segments win from "
                      f"{rows_text(c.segments_win, c.points)}.")
    pairs = []
    for record in facts.find(question="layers", form=RESIDUAL):
        at = {key: record[key] for key in ("m", "n", "rows", "rank")}
        apart = facts.time(question="layers", form=RESIDUAL_APART, **at)
        dense = facts.time(question="layers", form="dense", type="fp8", m=record["m"], n=record["n"],
                           rows=record["rows"])
        if apart and dense:
            pairs.append((record["time"] / dense, apart / dense))
    if pairs:
        points.append("A residual through the library costs "
                      f"{geometric_mean([p[0] for p in pairs]):.2f} × the coarse plane alone when it "
                      f"accumulates, {geometric_mean([p[1] for p in pairs]):.2f} × with extra launches.")
    errors = facts.find(question="fp8 planes", form="error")
    if errors:
        median = {name: statistics.median(record[name] for record in errors)
                  for name in ("bf16", "one_plane_fp8_rows", "two_planes_fp8_rows",
                               "two_planes_exact_rows")}
        points.append(f"Median error on real layers: bf16 {median['bf16']:.1e}; one fp8 plane "
                      f"{median['one_plane_fp8_rows']:.1e}, two {median['two_planes_fp8_rows']:.1e}, two with "
                      f"exact rows {median['two_planes_exact_rows']:.1e}.")
    return points


def conclusion(facts: Facts, fitted: dict[str, Model]) -> str:
    text = "## What this says about the design\n\n"
    text += "".join(f"* {point}\n" for point in design_points(facts)) + "\n"
    t0 = facts.time(question="launch cost", form="tiny GEMV")
    if t0 is None and fitted:
        t0 = fitted["bf16"].t0 if "bf16" in fitted else None
    return text + (kernels_text(facts, t0) if t0 else "")


# --- reliability --------------------------------------------------------------------------------

def agreement(facts: Facts) -> str:
    text = "## How far to trust this\n\n"
    timed = [records for records in facts.by_key.values() if all("first" in r for r in records)]
    within = [spread([record]) for records in timed for record in records]
    text += (f"{len(within)} timings, each taken twice in its run: the two medians lie within "
             f"{AGREEMENT:.0%} of each other's mean in {sum(s <= AGREEMENT for s in within)} of them.\n")
    both = [records for records in timed if len(records) == len(facts.runs)]
    if len(facts.runs) < 2:
        text += "Only one run completed: agreement between runs was not measured.\n"
    elif both:
        apart = [records for records in both if spread(records) > AGREEMENT]
        text += (f"Two runs: all medians within {AGREEMENT:.0%} in {len(both) - len(apart)} of {len(both)} "
                 "cases.\n")
        if apart:
            text += "Those that are not:\n\n" + table(
                ["what", "spread"], [[describe(records[0]), f"{spread(records):.0%}"]
                                     for records in sorted(apart, key=spread, reverse=True)])
    padded = [record for record in facts.records if record.get("executed_rows", record.get("rows"))
              != record.get("rows")]
    if padded:
        text += (f"\n{len(padded)} of the layers ran with padded rows, since the library takes no fewer: "
                 f"{', '.join(sorted({r['type'] + ' with ' + str(r['rows']) for r in padded}))} rows.\n")
    checks = [record for records in facts.by_key.values() for record in records if "bar" in record]
    text += (f"\n{len(checks)} results compared with a reference in double precision; "
             f"{len(facts.failed)} failed.\n")
    worst = {}
    for record in facts.records:
        if record.get("bar"):
            name = f"{record['question']}, {record.get('type', '')}".rstrip(", ")
            worst[name] = max(worst.get(name, 0), record["error"])
    text += "\n" + table(["part", "largest relative error"],
                         [[name, f"{error:.1e}"] for name, error in worst.items()])
    if facts.failed:
        text += "\nFailed checks, which no figure above uses:\n\n" + "".join(
            f"* {describe(record)}: error {record['error']}, bar {record['bar']}\n"
            for record in facts.failed)
    skipped = {(s["question"], s["form"], s["reason"]) for run in facts.runs for s in run["skipped"]}
    if skipped:
        text += "\nNot run:\n\n" + "".join(f"* {question}, {form}: {reason}\n"
                                           for question, form, reason in sorted(skipped))
    return text


def describe(record: dict) -> str:
    skip = MEASURED | {"bytes", "flops", "fp8_flops", "launches", "question", "form"}
    details = ", ".join(f"{key} {value}" for key, value in record.items() if key not in skip)
    return f"{record['question']}, {record['form']}" + (f" ({details})" if details else "")


def device_line(device: dict) -> str:
    return (f"Measured on one {device['form']}: {device['multiprocessors']} multiprocessors, "
            f"{device['l2_bytes'] / 2**20:.0f} MiB of L2, {device['memory_bytes'] / 2**30:.0f} GiB of "
            f"memory, at most {device['max_clock_mhz']} MHz; CUDA runtime {device['cuda_runtime']}, driver "
            f"{device['cuda_driver']}, cublasLt {device['cublaslt']}.")


# --- plot ---------------------------------------------------------------------------------------

def plot(facts: Facts, path: pathlib.Path) -> None:
    shapes = facts.shapes()
    figure, axes = plt.subplots(2, math.ceil(len(shapes) / 2), figsize=(15, 9), squeeze=False)
    for axis, shape in zip(axes.flat, shapes):
        for color, rows in enumerate(facts.rows()):
            for kind, style in (("bf16", "-"), ("fp8", "--")):
                at = {"question": "layers", "m": shape[0], "n": shape[1], "rows": rows, "type": kind}
                points = [(eighths / 8, facts.time(**at, form="prefix", eighths=eighths))
                          for eighths in (1, 2, 3, 4)]
                points.append((1.0, facts.time(**at, form="dense")))
                points = [(x, time * 1e6) for x, time in points if time]
                axis.plot(*zip(*points), style, marker="o", markersize=3, color=f"C{color}",
                          label=f"{rows} row{'s' * (rows > 1)}, {kind}") if points else None
        axis.set(title=shape_name(shape), xlabel="rank fraction (1: dense)", ylabel="µs", yscale="log")
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(shapes):]:
        axis.remove()
    if shapes:
        axes[0][0].legend(fontsize=7, ncols=2)
    figure.suptitle(f"{facts.device['form']}: time of one layer against rank fraction, cold weights")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    directory, *paths = sys.argv[1:]
    facts = Facts(paths)
    assert facts.find(question="layers"), "no layer was measured"
    fitted = models(facts)
    sections = [ceilings(facts), launch_cost(facts), layers(facts), crossover_section(facts),
                strided(facts), planes(facts), gemv4(facts), switching(facts),
                break_even_section(facts, fitted), agreement(facts), conclusion(facts, fitted)]
    text = ("# What a GPU charges for rank\n\n" + device_line(facts.device) +
            " Written by `scripts/gpu_probe.sh` from one run of it; random data unless said otherwise.\n\n" +
            "\n".join(sections))
    output = pathlib.Path(directory)
    plot(facts, output / "gpu_facts.png")
    (output / "gpu_facts.md").write_text(text, encoding="utf-8")
    print(f"wrote {output / 'gpu_facts.md'} and {output / 'gpu_facts.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
