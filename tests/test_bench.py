"""The bench judges answers before it takes times: its oracle, its verdicts, its report. No test asserts a time."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import contenders, measure, oracle, report
from bench.__main__ import README, main, recorded
from bench.cases import FULL, MASKS, ON_GPU, QUICK, SHOWN, TARGETS, WORKS, Setting, Trial, numbers
from tests import plain, reference

TINY = Setting(B=2, T=13, S=13, N=6, K=2, H=5)
LONG = TINY._replace(B=1, T=331, S=331, N=2)  # longer than the window
EACH_ONCE = list(zip(WORKS, reversed(MASKS), strict=True))
PEERS = [name for name in contenders.CONTENDERS if name not in contenders.SLOW_TO_COMPILE]

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture(autouse=True)
def peers_are_not_strict():
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(case, *names):
    """One round of one trial, by name of contender."""
    return {row.contender: row for row in measure.run_trial(0, Trial((case,)), names, rounds=1, seconds=0.0)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", [TINY, LONG, TINY._replace(T=3, mask="causal")], ids=str)
def test_oracle_agrees_with_the_reference(case, mask):
    case = case if case.decoding else case._replace(mask=mask)
    data = numbers(case)
    keep = oracle.allowed(case, data, np.arange(case.T))[:, None]
    change = {
        "bias": lambda s, head: s + data["bias"],
        "softcap": lambda s, head: contenders.CAP * np.tanh(s / contenders.CAP),
    }.get(case.mask, lambda s, head: s)
    exact = reference.attention(data["q"], data["k"], data["v"], keep=keep, scores=[change])[0]
    np.testing.assert_allclose(oracle.answer(case, data)[0], exact[:, oracle.sample(case.T)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("work", ["grad", "jvp", "hvp"])
@pytest.mark.parametrize("mask", ["causal", "segments", "bias", "softcap"])
def test_oracle_derivatives_agree_with_jax_in_float64(work, mask):
    case = TINY._replace(work=work, mask=mask)
    data = numbers(case)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(array, float) for name, array in data.items() if name != "segments"}
        keep = oracle.allowed(case, data, np.arange(case.T))[:, None]
        score = {
            "bias": lambda s: s + jnp.broadcast_to(wide["bias"], s.shape),
            "softcap": lambda s: 2.0 * jnp.tanh(s / 2.0),
        }

        def attention(case, q, k, v, operands):
            return plain.attend(q, k, v, keep, score.get(mask, lambda s: s))[0]

        wanted = jax.tree.leaves(contenders._work(case, attention, attention)(wide))
        for actual, expected in zip(oracle.answer(case, data), wanted, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("work, mask", EACH_ONCE)
def test_everybody_is_right_or_says_why_not(work, mask):
    rows = run(TINY._replace(work=work, mask=mask), *PEERS)
    assert {row.status for row in rows.values()} <= {"timed", "unsupported"}, [r.note for r in rows.values()]
    assert [rows[name].status for name in ("jattn", "jattn dense", "jattn blockwise")] == ["timed"] * 3
    assert all(row.note for row in rows.values() if row.status == "unsupported")


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("T, mask", [(1, "full"), (5, "causal")])
def test_decoding_is_checked_in_both_layouts(T, mask, head_major):
    rows = run(TINY._replace(T=T, S=29, mask=mask, head_major=head_major), "jattn", "jax.nn", "torch")
    assert rows["jattn"].status == rows["jax.nn"].status == "timed"
    assert rows["torch"].status in ("timed", "unsupported")
    assert rows["jattn"].read > 0


def test_bfloat16_is_checked_within_its_own_precision():
    rows = run(LONG._replace(dtype="bf16", work="grad", mask="causal"), "jattn", "jax.nn")
    assert rows["jattn"].status == rows["jax.nn"].status == "timed"
    assert 1e-4 < rows["jattn"].error < 0.1


@pytest.mark.parametrize("work", ["forward", "grad", "jvp", "hvp", "layer"])
def test_a_wrong_contender_is_reported_and_not_timed(monkeypatch, work):
    def wrong(case, q, k, v, operands):
        return 1.0001 * plain.attend(q, k, v)[0]

    def broken(case, data):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(contenders.CONTENDERS, "torch", contenders._in_jax(wrong))
    monkeypatch.setitem(contenders.CONTENDERS, "numpy", broken)
    rows = run(TINY._replace(work=work), "jattn", "torch", "numpy")
    assert rows["jattn"].status == "timed"
    assert rows["torch"].status == "wrong" and rows["torch"].seconds is None and rows["torch"].error > 1e-5
    assert rows["numpy"].status == "failed" and rows["numpy"].note == "RuntimeError: no such kernel"
    text = report.markdown(report.Result({}, list(rows.values())))
    assert "torch: wrong, error" in text and "numpy: failed, RuntimeError: no such kernel" in text


def test_an_answer_that_is_nan_or_of_another_shape_is_wrong():
    exact = oracle.answer(TINY, numbers(TINY))
    assert oracle.error(TINY, exact, exact) == 0
    assert oracle.error(TINY, [exact[0] * np.nan], exact) == np.inf
    assert oracle.error(TINY, [exact[0][:, 1:]], exact) == np.inf


def test_without_a_gpu_its_path_steps_aside(monkeypatch):
    row = run(TINY._replace(dtype="bf16"), "jax.nn cudnn")["jax.nn cudnn"]
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU here")
    assert (row.status, row.note) == ("unsupported", "cuDNN needs a GPU, here is cpu")
    assert measure.gemm_setting("gpu", "bf16") == (8192, "bf16")
    assert measure.gemm_setting("cpu", "bf16") == (1536, "f32")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    row = run(TINY, "torch")["torch"]  # a torch without CUDA is no contender beside a GPU
    assert row.status == "unsupported"


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch):
    for name in ("tokamax", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = run(TINY, "tokamax", "torch", "torch flex")
    assert all(row.status == "unsupported" and "not installed" in row.note for row in rows.values())


def test_every_target_is_measured_by_the_full_run():
    together = [set(trial.cases) for trial in FULL]
    for target in TARGETS:
        if isinstance(target.against, Setting):
            assert {*target.cases, target.against} in together
        assert all(any(case in cases for cases in together) for case in target.cases)
    assert {case.work for trial in QUICK for case in trial.cases} == set(WORKS)
    assert {case.mask for trial in QUICK for case in trial.cases} == set(MASKS)


def test_what_the_readme_shows_is_measured():
    measured = [{case for trial in table for case in trial.cases} for table in (FULL, ON_GPU)]
    assert set(SHOWN) <= set.union(*measured)
    assert all(set(SHOWN) & cases for cases in measured)


def rows_of_every_target(times):
    """Rows as a full run would give them, each contender always taking its time in `times`."""
    return [
        measure.Row(i, case, name, "timed", "", 0.0, [t, 2 * t, 3 * t], 0.5, 2**20, 0.5, 0.5 if case.decoding else None)
        for i, trial in enumerate(FULL)
        for case in trial.cases
        for name, t in times.items()
    ]


def test_report_shows_targets_and_losses(tmp_path):
    rows = rows_of_every_target({"jattn": 1.0, "torch": 0.5, "jax.nn": 10.0})
    result = report.Result({"device": "a device", "versions": "1", "date": "today"}, rows)
    assert report.from_json(report.to_json(result)) == result

    verdicts = report.verdicts(rows)
    assert len(verdicts) == len(TARGETS)
    by_figure = {v.figure: v for v in verdicts}
    lost = by_figure["forward full f32 B1 T4096 N8 H64: time / torch"]
    assert (lost.wanted, lost.measured, lost.verdict) == ("≤ 0.90", "2.00", "**missed**")
    won = by_figure["forward full f32 B1 T4096 N8 H64: time / jax.nn"]
    assert (won.measured, won.verdict) == ("0.10", "met")

    text = report.markdown(result)
    assert "## Where jattn loses" in text and "2.00 times torch" in text and "times jax.nn" not in text
    for path in report.plots(result, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def a_run(times, **machine):
    machine = {"device": "cpu, 2 cores of A", "versions": "1", "date": "today", "load before": "0.10"} | machine
    return report.Result(machine, rows_of_every_target(times))


def test_the_readme_gets_one_table_of_ratios():
    results = {
        "bench": a_run({"jattn": 1.0, "torch": 0.5, "jax.nn": 10.0}),
        "bench/other": a_run({"jattn": 1.0, "torch": 0.25}, device="GPU(R) X, 2 cores of A"),
    }
    markers = report.STATUS_BEGIN, report.STATUS_END, report.BEGIN, report.END
    readme = report.with_tables("before\n{}\nformer\n{}\nbetween\n{}\nformer\n{}\nafter\n".format(*markers), results)
    assert "former" not in readme and readme.startswith("before") and readme.endswith("after\n")
    assert all(marker in readme for marker in markers) and "\nbetween\n" in readme
    header, _, *lines = [line for line in readme.split("between")[1].splitlines() if line.startswith("|")]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| CPU, 2 cores of A", "torch", "**2.00**"],
        ["| CPU, 2 cores of A", "jax.nn", "0.10"],
        ["| GPU X", "torch", "**4.00**"],
    ]
    assert {line.count("|") for line in lines} == {header.count("|")}
    assert re.findall(r"^- (.*?);.*`(.*)`\.$", readme, re.MULTILINE) == [
        ("cpu, 2 cores of A", "bench/RESULTS.md"),
        ("GPU(R) X, 2 cores of A", "bench/other/RESULTS.md"),
    ]
    cpu, gpu, tpu = re.findall(r"^\| [CGT]PU \| .*", readme, re.MULTILINE)
    assert "2.00 times that of torch and 0.10 times that of jax.nn" in cpu
    assert "4.00 times the time of fused kernels" in gpu and "not run" in tpu
    assert "busy" not in readme


def test_the_readme_says_which_machine_was_busy():
    quiet = a_run({"jattn": 1.0, "torch": 0.5})
    busy = a_run({"jattn": 1.0, "torch": 0.5}, **{"load before": "1.55 (busy: distrust the times)"})
    table = report.readme_table({"bench": quiet, "bench/other": busy})
    runs = [line for line in table.splitlines() if line.startswith("- ")]
    assert ["busy: distrust its times** (load 1.55)" in line for line in runs] == [False, True]
    assert "distrust" in report.status_table({"bench": quiet, "bench/other": busy})
    assert "distrust" not in report.status_table({"bench": quiet})
    assert report.status_table({}).count("not measured") == 2


def test_the_readme_shows_the_recorded_runs():
    """If not: python -m bench --from bench/results.json --update-readme"""
    readme = README.read_text()
    assert readme == report.with_tables(readme, recorded())


def test_without_a_peer_its_targets_are_not_measured():
    verdicts = report.verdicts(rows_of_every_target({"jattn": 1.0}))
    assert {v.verdict for v in verdicts if v.figure.endswith("/ torch")} == {"not measured"}


def test_the_command_line_writes_what_it_prints(tmp_path, capsys):
    flags = (
        "--work forward,grad --mask causal --sizes 16 --shape 1,2,1,8 --contenders jattn,jax.nn --rounds 3 --seconds 0"
    )
    assert main([*flags.split(), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == (tmp_path / "RESULTS.md").read_text().strip()
    assert "grad causal f32 B1 T16 N2 K1 H8" in printed.out and "2/2" in printed.err
    earlier = ["--from", str(tmp_path / "results.json")]
    assert main(earlier) == 0
    assert capsys.readouterr().out == printed.out
    with pytest.raises(SystemExit, match="2"):  # a part of the table is not what the README shows
        main([*earlier, "--update-readme"])


@pytest.mark.parametrize("flags", ["--work sideways", "--contenders nobody", "--shape 1,2", "--update-readme --quick"])
def test_the_command_line_refuses(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(flags.split())
    assert "error:" in capsys.readouterr().err


def test_what_does_not_fit_before_the_deadline_is_listed():
    rows = measure.run([Trial((TINY,)), Trial((LONG,), ("jattn",))], ["jattn"], rounds=1, seconds=0.0, deadline_s=-1.0)
    assert [(row.case, row.status) for row in rows] == [(TINY, "left out"), (LONG, "left out")]
    assert "everybody: left out, no time was left (2 cases" in report.markdown(report.Result({}, rows))
