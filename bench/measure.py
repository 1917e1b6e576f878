"""Checks and times: answers first, then everybody in turn, round after round, beside the machine's own rates.

A ratio is the median over rounds of the ratio within a round, so that a slow moment of the machine hits both sides.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import oracle
from bench.cases import DTYPES, Setting, Trial, numbers
from bench.contenders import CONTENDERS, Built, Unsupported, memory_bytes

SETTLE_S, SAMPLE_S, WARM_S = 0.005, 0.02, 0.3
SETTLE_BELOW_S = 0.5  # what takes longer hides what the one before it left behind


class Row(NamedTuple):
    """What one contender did with one case in one trial."""

    trial: int
    case: Setting
    contender: str
    status: str  # "timed"; or "unsupported", "wrong", "failed", "left out", with a note
    note: str = ""
    error: float | None = None  # relative to float64
    seconds: list[float] | None = None  # per round
    compile_s: float | None = None
    temp_bytes: int | None = None
    gemm: float | None = None  # achieved FLOP/s over those of the machine's matrix product
    read: float | None = None  # bytes of keys and values per second over those of a plain sum; decoding only

    @property
    def median(self) -> float:
        return statistics.median(self.seconds or [float("nan")])


def ratio(a: Row, b: Row) -> float | None:
    """Median over the rounds of a's time over b's; None unless both were timed in the same trial."""
    if a.trial != b.trial or not a.seconds or not b.seconds:
        return None
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


class Unit(NamedTuple):
    """A yardstick that is timed along with the contenders: what it does per call."""

    amount: float  # FLOPs or bytes
    call: Callable[[], Any]


def gemm_setting(backend: str, dtype: str) -> tuple[int, str]:
    """Size and dtype of the matrix product that is the unit: on a CPU float32, which XLA runs faster than bfloat16."""
    return (8192, dtype) if backend == "gpu" else (1536, "f32")


def gemm(dtype: str, size: int | None = None) -> Unit:
    n, dtype = gemm_setting(jax.default_backend(), dtype)
    n = size or n
    a = jnp.asarray(np.random.default_rng(0).standard_normal((n, n), np.float32), DTYPES[dtype])
    product = jax.jit(jnp.matmul)
    return Unit(2.0 * n**3, lambda: product(a, a).block_until_ready())


def read(size: int) -> Unit:
    """The sum of an array of `size` bytes, which waits for memory (or for the cache, where that holds it)."""
    a, total = jnp.ones(size // 4, jnp.float32), jax.jit(jnp.sum)
    return Unit(float(size), lambda: total(a).block_until_ready())


def copy(size: int) -> Unit:
    """A copy of `size` bytes into an array that is there already."""
    source, target = np.ones(size // 4, np.float32), np.zeros(size // 4, np.float32)
    return Unit(2.0 * size, lambda: np.copyto(target, source))


def rate(unit: Unit, rounds: int = 5) -> float:
    """Amount per second, once warm: torch's threads take some calls until each has a core to itself."""
    end = time.perf_counter() + WARM_S
    while time.perf_counter() < end:
        unit.call()
    return unit.amount / statistics.median(sample(unit.call, 1) for _ in range(rounds))


def sample(call: Callable[[], Any], calls: int, settle: bool = False) -> float:
    """Seconds per call. Settling lets the threads of the one before us sleep, and wakes our own and their memory."""
    if settle:
        time.sleep(SETTLE_S)
        call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def in_turn(calls: list[Callable[[], Any]], rounds: int, seconds: float) -> list[list[float]]:
    """Times per call of each, one sample a round, in another order each round: nobody always follows the same one."""
    once = [sample(call, 1) for call in calls]
    repeats = [max(1, min(1000, int(SAMPLE_S / t))) for t in once]
    settle = [t < SETTLE_BELOW_S for t in once]
    cost = sum(t * (n + s) + SETTLE_S * s for t, n, s in zip(once, repeats, settle, strict=True))
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(min(rounds, max(3, rounds // 3, int(seconds / cost)))):
        for i in random.Random(turn).sample(range(len(calls)), len(calls)):
            times[i].append(sample(calls[i], repeats[i], settle[i]))
    return times


def run_trial(index: int, trial: Trial, names: Iterable[str], rounds: int, seconds: float) -> list[Row]:
    """Checks every contender of the trial on every case, then times those that were right, in turn."""
    rows, calls = [], []
    for case in trial.cases:
        data = numbers(case)
        exact = oracle.answer(case, data)
        allowed = oracle.budget(case, exact, oracle.answer(case, data, np.float32))
        for name in names:
            row, call = _check(Row(index, case, name, "timed"), data, exact, allowed)
            rows.append(row)
            if call is not None:
                calls.append(call)
    if not calls:
        return rows
    units = {case.dtype: gemm(case.dtype) for case in trial.cases}
    units |= {case.cache_bytes: read(case.cache_bytes) for case in trial.cases if case.decoding}
    times = in_turn([*calls, *(unit.call for unit in units.values())], rounds, seconds)
    unit_times = dict(zip(units, times[len(calls) :], strict=True))
    own_times = iter(times)

    def share(amount: float, key: Any, took: list[float]) -> float:
        """What was done over what the unit would have done in the same time."""
        per_round = zip(unit_times[key], took, strict=True)
        return amount / units[key].amount * statistics.median(unit / own for unit, own in per_round)

    def with_times(row: Row) -> Row:
        case, took = row.case, next(own_times)
        bandwidth = share(case.cache_bytes, case.cache_bytes, took) if case.decoding else None
        return row._replace(seconds=took, gemm=share(case.flops, case.dtype, took), read=bandwidth)

    return [with_times(row) if row.status == "timed" else row for row in rows]


def _check(row: Row, data: dict, exact: list, allowed: float) -> tuple[Row, Callable[[], Any] | None]:
    """Builds a contender and compares its answer; the call that may be timed, or None and a row that says why."""
    case = row.case
    try:
        built: Built = CONTENDERS[row.contender](case, data)
        actual = built.fetch(built.call(built.place(oracle.probe(case, data))))
        error = oracle.error(case, oracle.at_sample(case, actual), exact)
        operands = built.place(data)
    except Unsupported as reason:
        return row._replace(status="unsupported", note=str(reason)), None
    except Exception as reason:  # a peer may fail in any way: say how, and go on with the others
        note = f"{type(reason).__name__}: {str(reason).partition(chr(10))[0][:200]}"
        return row._replace(status="failed", note=note), None
    row = row._replace(error=error, compile_s=built.compile_s, temp_bytes=built.temp_bytes)
    if not error <= allowed:
        return row._replace(status="wrong", note=f"error {error:.1e} exceeds {allowed:.1e}"), None
    return row, lambda: built.call(operands)


def run(trials: list[Trial], names: list[str], rounds: int, seconds: float, deadline_s: float) -> list[Row]:
    """All trials, with a progress bar on stderr; what does not start before the deadline is listed as left out."""
    start, rows = time.perf_counter(), []
    for index, trial in enumerate(trials):
        taking_part = [name for name in names if trial.contenders is None or name in trial.contenders]
        elapsed = time.perf_counter() - start
        _progress(index, len(trials), elapsed, str(trial.cases[0]))
        if elapsed > deadline_s:
            rows += [Row(index, case, "everybody", "left out", "no time was left") for case in trial.cases]
            continue
        rows += run_trial(index, trial, taking_part, rounds, seconds)
        jax.clear_caches()
    _progress(len(trials), len(trials), time.perf_counter() - start, "done")
    return rows


def _progress(done: int, total: int, elapsed: float, what: str) -> None:
    left = f", about {elapsed / done * (total - done):.0f} s left" if 0 < done < total else ""
    line = f"[{'#' * (24 * done // total):24}] {done}/{total} {elapsed:.0f} s{left}  {what}"
    inside = sys.stderr.isatty()  # elsewhere a line for each trial
    end = "" if inside and done < total else "\n"
    print(f"\r\x1b[K{line}" if inside else line, end=end, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What this was run on, its rates, and how busy it was before."""
    load = os.getloadavg()[0]
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        widest = next((f for f in ("avx512f", "avx2", "avx") if f in fields.get("flags", "").split()), "")
        cpu = f"{fields.get('model name', cpu)} {widest}".strip()
    about = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores of {cpu}",
        "memory": f"{memory_bytes() / 2**30:.0f} GiB",
        "versions": f"Python {platform.python_version()}, jax {jax.__version__}, NumPy {np.__version__}",
        "load before": f"{load:.2f}" + " (busy: distrust the times)" * (load > 0.5),
        "GEMM": "; ".join(f"{dtype} {rate(gemm(dtype)) / 1e9:.0f} GFLOP/s" for dtype in _gemm_dtypes()) + " (XLA)",
        "bandwidth": f"read {rate(read(2**28)) / 1e9:.0f} GB/s, copy {rate(copy(2**28)) / 1e9:.0f} GB/s (256 MiB)",
    }
    try:
        import torch
    except ImportError:
        return about
    torch.set_num_threads(os.cpu_count() or 1)
    a = torch.ones(1536, 1536)
    own = rate(Unit(2.0 * 1536**3, lambda: a @ a))
    about["GEMM"] += f"; torch's own, CPU, f32 {own / 1e9:.0f} GFLOP/s"
    about["versions"] += f", torch {torch.__version__} with {torch.get_num_threads()} threads"
    return about


def _gemm_dtypes() -> list[str]:
    return list(DTYPES) if jax.default_backend() == "gpu" else ["f32"]
