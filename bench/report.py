"""From rows to what people read: Markdown, JSON, pictures, and the tables in the README."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.cases import LONG, SHOWN, STEP, TARGETS, Setting, Target
from bench.measure import Row, ratio

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
STATUS_BEGIN, STATUS_END = "<!-- status:begin -->", "<!-- status:end -->"
OURS = "jattn"
PEERS = ("torch", "jax.nn", "jax.nn cudnn")  # that the README shows
KERNELS = ("torch", "jax.nn cudnn")  # of those the ones that bring fused kernels to a GPU
HOW = """\
Written by `python -m bench`. Everybody is checked against float64 NumPy first, then timed in turn in one process; a
ratio is the median over the rounds of the ratio within a round. Arrays are on the device already and each call waits
for its result. `of GEMM` is FLOP/s of the admitted pairs over XLA's own matrix product (float32 on a CPU), `of read` is
bytes of keys and values per second over a plain sum of as many, both timed in the same loop. After `·` stands jattn's
time as a share of that peer's: **bold** is where jattn loses. torch gets its own layout [B, N, T, H] and ready-made
masks; its jvp and hvp are its math backend's. `head-major` is a caller who keeps keys and values as [B, K, S, H]; there
jattn is asked for `implementation="dense"`, as its docstring advises."""


class Result(NamedTuple):
    """One run of the bench."""

    machine: dict[str, Any]
    rows: list[Row]


def to_json(result: Result) -> str:
    rows = [row._asdict() | {"case": row.case._asdict()} for row in result.rows]
    return json.dumps({"machine": result.machine, "rows": rows}, indent=1)


def from_json(text: str) -> Result:
    loaded = json.loads(text)
    return Result(loaded["machine"], [Row(**(row | {"case": Setting(**row["case"])})) for row in loaded["rows"]])


# --- the figures that are to be reached ---


class Verdict(NamedTuple):
    figure: str
    wanted: str
    measured: str
    verdict: str  # "met", "missed", "not measured"


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Each target with what was measured, leaving out those whose cases were not part of the run."""
    together = defaultdict(set)
    for row in rows:
        together[row.trial].add(row.case)
    ran = set().union(*together.values())

    def measurable(target: Target) -> bool:
        if isinstance(target.against, Setting):
            return any({*target.cases, target.against} <= cases for cases in together.values())
        return ran.issuperset(target.cases)

    return [_verdict(target, rows) for target in TARGETS if measurable(target)]


def _verdict(target: Target, rows: list[Row]) -> Verdict:
    figure, measure = _figure(target, rows)
    cases = target.cases or tuple(dict.fromkeys(row.case for row in rows if row.contender == OURS and row.compile_s))
    measured = [(value, case) for case in cases if (value := measure(case)) is not None]
    number = "{:.1f} s" if target.against == "compile" else "{:.2f}" if target.limit >= 0.2 else "{:.3f}"
    wanted = ("≥ " if target.at_least else "≤ ") + number.format(target.limit)
    if not measured:
        return Verdict(figure, wanted, "", "not measured")
    value, case = min(measured) if target.at_least else max(measured)
    met = value >= target.limit if target.at_least else value <= target.limit
    worst = f" (worst: {case})" if len(cases) > 1 else ""
    return Verdict(figure, wanted, number.format(value) + worst, "met" if met else "**missed**")


def _figure(target: Target, rows: list[Row]) -> tuple[str, Callable[[Setting], float | None]]:
    """What is compared, in words, and how to find it for a case."""
    ours = [row for row in rows if row.contender == OURS]

    def of(case: Setting, field: str) -> float | None:
        return next((value for row in ours if row.case == case and (value := getattr(row, field)) is not None), None)

    def over(pick: Callable[[Row], bool]) -> Callable[[Setting], float | None]:
        def measure(case: Setting) -> float | None:
            mine = [row for row in ours if row.case == case]
            return next((r for a in mine for b in rows if pick(b) and (r := ratio(a, b)) is not None), None)

        return measure

    more = f" and {len(target.cases) - 1} more" if len(target.cases) > 1 else ""
    name = f"{target.cases[0]}{more}" if target.cases else "any case"
    match target.against:
        case "gemm":
            return f"{name}: share of the GEMM rate", lambda case: of(case, "gemm")
        case "read":
            return f"{name}: share of the read bandwidth", lambda case: of(case, "read")
        case "compile":
            return f"{name}: compile time", lambda case: of(case, "compile_s")
        case "compile growth":
            first = of(min(target.cases, key=lambda case: case.T), "compile_s")
            return f"{name}: growth of compile time", lambda case: first and (of(case, "compile_s") or 0) / first
        case str(peer):
            return f"{name}: time / {peer}", over(lambda row: row.contender == peer and row.case in target.cases)
        case other:
            return f"{name}: time / {other}", over(lambda row: row.contender == OURS and row.case == other)


# --- tables ---


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _against(ours: Row | None, peer: Row | None) -> str:
    """A peer's time and jattn's share of it, bold where jattn loses."""
    if peer is None or peer.status == "unsupported":
        return "–"
    if not peer.seconds:
        return f"**{peer.status}**"
    r = ours and ratio(ours, peer)
    return _time(peer.median) + ("" if not r else f" · **{r:.2f}**" if r > 1 else f" · {r:.2f}")


def _by_case(rows: list[Row]) -> list[tuple[Setting, dict[str, Row]]]:
    found: dict[tuple[int, Setting], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row.trial, row.case][row.contender] = row
    return [(case, by_name) for (_, case), by_name in found.items()]


def case_table(rows: list[Row], peers: list[str]) -> str:
    """A line per case: jattn's figures, then every peer's time and jattn's time as a share of it."""
    lines = []
    for case, by_name in _by_case(rows):
        ours = by_name.get(OURS)
        figures = ["**" + ours.status + "**" if ours and not ours.seconds else "–", "", "", "", ""]
        if ours and ours.seconds:
            read = "" if ours.read is None else f"{ours.read:.0%}"
            compiled = "" if ours.compile_s is None else f"{ours.compile_s:.2f} s"
            figures = [_time(ours.median), f"{ours.gemm:.0%}", read, _bytes(ours.temp_bytes), compiled]
        lines.append([str(case), *figures, *(_against(ours, by_name.get(peer)) for peer in peers)])
    return _table(["case", OURS, "of GEMM", "of read", "temp", "compile", *peers], lines)


def _peers(rows: list[Row]) -> list[str]:
    """The other contenders that were timed at least once."""
    names = dict.fromkeys(row.contender for row in rows if row.contender != OURS)
    return [name for name in names if any(row.seconds for row in rows if row.contender == name)]


def losses(rows: list[Row]) -> list[str]:
    """Where jattn takes longer than a peer, or 10% longer than the implementation it did not choose; worst first."""
    lost = []
    for case, by_name in _by_case(rows):
        for name, peer in by_name.items():
            r = ratio(by_name[OURS], peer) if OURS in by_name else None
            if r is not None and r > (1.1 if name.startswith(OURS) else 1.0):
                lost.append((r, f"{case}: {r:.2f} times {name}"))
    return [line for _, line in sorted(lost, reverse=True)]


def _notes(rows: list[Row]) -> list[str]:
    """Who did not take part in what, each reason once."""
    reasons: dict[tuple[str, str, str], list[Setting]] = defaultdict(list)
    for row in rows:
        if row.status != "timed":
            reasons[row.contender, row.status, row.note].append(row.case)
    lines = []
    for (name, status, note), cases in reasons.items():
        which = str(cases[0]) if len(cases) == 1 else f"{len(cases)} cases, such as {cases[0]}"
        lines.append(f"{name}: {status}, {note} ({which})")
    return lines


def markdown(result: Result) -> str:
    rows = result.rows
    about = _table(["machine", ""], [[name, str(value)] for name, value in result.machine.items()])
    parts = ["# Benchmark", HOW, about]
    if _on_cpu(result) and (reached := verdicts(rows)):  # the targets are for a CPU
        parts += ["## To reach", _table(["figure", "to reach", "measured", ""], [list(verdict) for verdict in reached])]
    if lost := losses(rows):
        parts += ["## Where jattn loses", "\n".join(f"- {line}" for line in lost)]
    for work in dict.fromkeys(row.case.work for row in rows):
        for title, chosen in ((work, False), (f"{work}, decoding", True)):
            some = [
                row for row in rows if (row.case.work, row.case.decoding) == (work, chosen) and row.status != "left out"
            ]
            if some:
                parts += [f"## {title[0].upper()}{title[1:]}", case_table(some, _peers(some))]
    if notes := _notes(rows):
        parts += ["## Not timed", "\n".join(f"- {line}" for line in notes)]
    return "\n\n".join(parts) + "\n"


def _kind(case: Setting) -> str:
    """The column that the README sums a case up in."""
    return f"{'decoding' if case.decoding else case.work} {case.dtype}"


def _ratios(result: Result, peers: tuple[str, ...], pick: Callable[[Setting], bool]) -> list[float]:
    """jattn's time over that of each of some peers, in each case that the README shows and `pick` picks."""
    shown = [(case, by) for case, by in _by_case(result.rows) if case in SHOWN and pick(case) and OURS in by]
    found = (ratio(by[OURS], by[peer]) for _, by in shown for peer in peers if peer in by)
    return [r for r in found if r is not None]


def _range(ratios: list[float], dash: str = "–") -> str:
    least, most = (f"{pick(ratios):.2f}" for pick in (min, max))
    return least if least == most else f"{least}{dash}{most}"


def _device(result: Result) -> str:
    name = str(result.machine["device"]).replace("(R)", "")
    return name.replace("cpu", "CPU", 1) if _on_cpu(result) else name.split(",")[0]


def _on_cpu(result: Result) -> bool:
    return str(result.machine.get("device", "cpu")).startswith("cpu")


def readme_table(results: dict[str, Result]) -> str:
    """One table of ratios: for each run and peer the least and the greatest of the cases that the README shows."""
    kinds = [f"{work} {dtype}" for work in ("forward", "grad", "decoding") for dtype in ("f32", "bf16")]
    lines, about = [], []
    for folder, result in results.items():
        for peer in PEERS:
            by_kind = [_ratios(result, (peer,), lambda case, kind=kind: _kind(case) == kind) for kind in kinds]
            if any(by_kind):
                cells = [("–" if not r else f"**{_range(r)}**" if max(r) > 1 else _range(r)) for r in by_kind]
                lines.append([_device(result), peer, *cells])
        load = str(result.machine.get("load before", ""))
        busy = f" **This machine was busy: distrust its times** (load {load.split()[0]})." if "busy" in load else ""
        about.append("- {device}; {versions}; {date}: ".format(**result.machine) + f"`{folder}/RESULTS.md`.{busy}")
    meaning = (
        "jattn's time over the peer's, least and greatest of the cases shown. Below 1 jattn is faster; **bold** is "
        "where it is slower in at least one of them. The runs, each with a file of all cases and times:"
    )
    return "\n\n".join([_table(["machine", "peer", *kinds], lines), meaning, "\n".join(about)])


def status_table(results: dict[str, Result]) -> str:
    """Where jattn stands on each kind of device, in the figures of the runs."""

    def long(case: Setting) -> bool:
        return not case.decoding and case.mask in ("full", "causal") and case.dtype == "bf16"

    cpus = [result for result in results.values() if _on_cpu(result)]
    gpus = [result for result in results.values() if not _on_cpu(result)]
    against = [(peer, [r for cpu in cpus for r in _ratios(cpu, (peer,), lambda case: True)]) for peer in PEERS]
    measured = " and ".join(f"{_range(ratios, ' to ')} times that of {peer}" for peer, ratios in against if ratios)
    behind = [r for gpu in gpus for r in _ratios(gpu, KERNELS, long)]
    cpu = f"measured: time {measured}, by processor and case" if measured else "not measured"
    gpu = "through XLA, without a kernel of its own: "
    gpu += f"{_range(behind, ' to ')} times the time of fused kernels on long bfloat16" if behind else "not measured"
    busy = any("busy" in str(result.machine.get("load before", "")) for result in results.values())
    lines = [["CPU", cpu], ["GPU", gpu], ["TPU", "compiled by a test, not run"]]
    note = "\n\nThe figures are of machines that were busy: distrust them until quiet runs exist (see Speed)." * busy
    return _table(["device", "status"], lines) + note


def with_tables(readme: str, results: dict[str, Result]) -> str:
    """The README with what the runs in some folders say between its marker lines."""
    sections = (STATUS_BEGIN, STATUS_END, status_table), (BEGIN, END, readme_table)
    for begin, end, write in sections:
        if begin in readme:
            before, rest = readme.split(begin, 1)
            readme = f"{before}{begin}\n{write(results)}\n{end}{rest.split(end, 1)[1]}"
    return readme


# --- pictures ---


def plots(result: Result, folder: Path) -> list[Path]:
    """ratios.png: jattn's time over each peer's, case by case; scaling.png: time against length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = _by_case(result.rows)
    peers = [name for name in _peers(result.rows) if not name.startswith(OURS) and name != "numpy"]
    compared = [(c, by) for c, by in cases if OURS in by and any(ratio(by[OURS], by[p]) for p in peers if p in by)]
    figure = Figure(figsize=(9, 2 + 0.2 * len(compared)), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="jattn's time / peer's time (left of 1: jattn is faster)")
    for peer in peers:
        found = [(ratio(by[OURS], by[peer]), i) for i, (_, by) in enumerate(compared) if peer in by]
        points = [point for point in found if point[0] is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], "o", label=peer, alpha=0.8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(compared)), [str(case) for case, _ in compared], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=max(1, len(peers)))
    scaling = _scaling(Figure(figsize=(10, 4), layout="constrained"), cases)
    paths = [folder / "ratios.png", folder / "scaling.png"]
    for path, drawn in zip(paths, (figure, scaling), strict=True):
        FigureCanvasAgg(drawn).print_png(str(path))
    return paths


def _scaling(figure, cases):
    """Time against T for one batch entry of 8 heads, full and causal, and against S for one step of decoding."""

    def like(case, other):
        return case._replace(T=0, S=0) == other._replace(T=0, S=0)

    panels = [
        ("forward full", LONG, "T"),
        ("forward causal", LONG._replace(mask="causal"), "T"),
        ("decoding", STEP, "S"),
    ]
    for axes, (title, model, letter) in zip(figure.subplots(1, 3), panels, strict=True):
        lines = defaultdict(dict)
        for case, by_name in cases:
            if like(case, model) and case.decoding == (letter == "S") and (letter == "T" or case.T == 1):
                for name, row in by_name.items():
                    if row.seconds:
                        lines[name].setdefault(getattr(case, letter), row.median)
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points.items()), strict=True), "o-", label=name, linewidth=2 if name == OURS else 1)
        axes.set(title=title, xlabel=letter, ylabel="seconds", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize=7)
    return figure
