"""The tour: `python -m jattn` walks, draws and proves; it can fail; and it refuses bad input in one line."""

import argparse
import io
import os
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.tour import command, files, proof, text, walk


@pytest.fixture
def run(capsys):
    def run(*arguments):
        status = command.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


def test_the_command_walks_the_notebook_and_proves_it(tmp_path):
    picture = tmp_path / "a.png"
    command = [sys.executable, "-m", "jattn", "--save", picture]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
    steps = ["Bare bones:", "Retrieval:", "Projections:", "Weights:", "Attention:", "Context vector:", "Who", "Proof"]
    assert [step for line in lines for step in steps if line.startswith(step)] == steps
    for said in (
        "query a c finds d1 d2 d3 d4 d5",
        "query scatterbrained simultaneously finds s2 s4",
        "enriched [T, D]      [79, 64]",
        "weights  [N, T, S]   [1, 79, 79]",
        "context  [N*V]       [25]",
        "(cut to fit: 24 of 79 rows, 24 of 79 columns)",
        "implementation  dense",
        "all 12 checks pass",
    ):
        assert said in result.stdout
    assert "checking vmap" in result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_text_with_every_option(run, tmp_path):
    out, picture = tmp_path / "y.npy", tmp_path / "a.SVG"
    status, stdout, _ = run("One two, one!", "--heads", 2, "--causal", "--seed", 7, "--out", out, "--save", picture)
    assert status == 0 and "Causal" in stdout and "the mean of 2 heads" in stdout
    x = jnp.stack([text.vector(word) for word in ("one", "two", "one")])
    params = jattn.init(jax.random.key(7), 64, num_heads=2)
    np.testing.assert_allclose(np.load(out), proof.reference(params, x, causal=True), atol=1e-5)
    assert "<!-- two -->" in picture.read_text()


def test_an_array_is_attended_to_and_written_and_a_failed_check_is_status_1(run, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "checks", lambda *_: {"attend": lambda: (1.0, 0.1)})
    x = np.random.default_rng(0).standard_normal((2, 3, 5))
    np.save(tmp_path / "x.npy", x)
    status, stdout, _ = run(tmp_path / "x.npy", "--out", tmp_path / "y.npy")
    assert status == 1 and "1 of 1 checks FAIL" in stdout
    assert "[2, 3, 5] float64, computed in float32" in stdout and "Retrieval" not in stdout
    y = np.load(tmp_path / "y.npy")
    rng = np.random.default_rng(0)
    w = [rng.standard_normal((rows, 5)).T[:, None] / 5**0.5 for rows in (20, 20, 25)]
    assert y.dtype == np.float32 and y.shape == (2, 3, 25)
    np.testing.assert_allclose(y[1], proof.reference(jattn.Params(*w), x[1], causal=False), atol=1e-5)


# The checks can fail.


def leak(params, x, mask=None, **options):
    return TRUE["attend"](params, x, **options)


def frozen(params, x, **options):
    return TRUE["attend"](params, jax.lax.stop_gradient(x), **options)


def unscaled(params, x, **options):
    return TRUE["attend"](params, x, scale=1.0, **options)


TRUE = {name: getattr(jattn, name) for name in ("attend", "attention_weights", "context_vector")}
PLAIN = {"attend", "attend, dense", "attend, blockwise", "jit", "vmap"}
DERIVED = {"grad, finite differences", "jvp, finite differences"}
WRONG = {
    "leak": ("attend", leak, PLAIN | DERIVED),
    "frozen": ("attend", frozen, DERIVED),
    "unscaled": ("attend", unscaled, PLAIN | DERIVED),
    "shape": ("attend", lambda *a, **o: TRUE["attend"](*a, **o).T, PLAIN),
    "raises": ("attend", lambda *a, **o: 1 / 0, PLAIN | DERIVED),
    "weights": ("attention_weights", lambda *a, **o: TRUE["attention_weights"](*a, **o).mT, {"weights"}),
    "context": ("context_vector", lambda *a, **o: TRUE["context_vector"](*a, **o) / 13, {"context vector"}),
    "enrich": ("enrich", lambda x: x, {"enrich, the two loops"}),
    "lookup": ("lookup", lambda query, keys, values: values[1], {"lookup, sets of names"}),
}


@pytest.fixture(scope="module")
def checks():
    """The checks of the causal tour on a small array, whose own result is wrong."""
    options = argparse.Namespace(heads=1, seed=0)
    x = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    y = np.zeros((3, 25), np.float32)
    return proof.checks(walk.random_params(5, options), jattn.masks.Causal(), x, y)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_library_fails_its_checks(wrong, checks, monkeypatch, capsys):
    name, function, failing = WRONG[wrong]
    monkeypatch.setattr(jattn, name, function)
    explanation = argparse.Namespace(implementation="dense", reasons={"dense": "small"})
    chosen = {name: check for name, check in checks.items() if name in failing}
    assert chosen and proof.prove(explanation, chosen, 0.0) == 1
    table = capsys.readouterr().out
    assert f"{len(chosen)} of {len(chosen)} checks FAIL" in table
    assert ("ZeroDivisionError" in table) == (wrong == "raises")


def test_a_true_library_passes_and_a_wrong_result_or_a_nan_does_not(checks, capsys):
    explanation = argparse.Namespace(implementation="dense", reasons={"dense": "small"})
    error, limit = checks["attend, your input"]()
    assert error > limit
    error, limit = checks["attend"]()
    assert error <= limit < 1e-4
    assert proof.prove(explanation, {"fine": lambda: (0.0, 0.0)}, 0.0) == 0
    assert proof.prove(explanation, {"fine": lambda: (0.0, 0.0), "nan": lambda: (np.nan, 1.0)}, 0.0) == 1
    assert "1 of 2 checks FAIL" in capsys.readouterr().out


# Reading


def test_the_same_word_has_the_same_vector_in_every_process():
    np.testing.assert_allclose(text.vector("attention")[:3], [0.5738472, 0.7916518, 0.6343905], rtol=1e-6)
    np.testing.assert_array_equal(text.vector("Attention"), text.vector("attention"))
    np.testing.assert_allclose(np.linalg.norm(text.vector("x")), 8, rtol=1e-6)
    alike = [text.vector("attention") @ text.vector(other) / 64 for other in ("attentions", "zebra")]
    assert alike[0] > 0.7 > 0.4 > alike[1]


@pytest.mark.parametrize(
    "text", ["and/or", "e.g. this", "3.14", "Wait...", "... what?", "日本語。はい", "don't", "\x1b[31mred"]
)
def test_a_text_is_a_text(text):
    given = files.read(text)
    assert given.labels and not any("\x1b" in word for word in given.labels)
    assert [word for sentence in given.sentences for word in sentence] == given.labels


def test_a_file_is_read_and_a_long_one_is_cut(tmp_path):
    path = tmp_path / "any name"
    path.write_bytes("\ufeffOne two. “Three” – four!\n".encode())
    assert files.read(str(path)).sentences == [["One", "two"], ["Three", "four"]]
    path.write_text("word, and. " * 500)
    given = files.read(str(path))
    assert len(given.labels) == 256 == len(given.x) == sum(map(len, given.sentences))
    assert "1000 words, of which the first 256 are walked" in given.source


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", np.int8, np.uint64])
def test_every_real_dtype_is_read(dtype, tmp_path):
    x = np.arange(6).reshape(2, 3).astype(dtype)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    given = files.read(str(tmp_path / "x.npy"))
    assert given.x.dtype == np.float32 and given.x.dtype.isnative
    np.testing.assert_array_equal(given.x, x.astype(np.float32))


# Bad input

ARRAYS = {
    "rank.npy": np.zeros(3),
    "rank4.npy": np.zeros((1, 1, 1, 1)),
    "empty.npy": np.zeros((0, 3)),
    "text.npy": np.array([["a"]]),
    "bool.npy": np.zeros((2, 2), bool),
    "complex.npy": np.zeros((2, 2), complex),
    "nan.npy": np.array([[np.nan, 1]]),
    "inf.npy": np.array([[[np.inf, 1]]]),
    "huge.npy": np.array([[1e200, 1]]),
    "good.npy": np.ones((2, 6), np.float32),
}
BAD = {
    "missing.npy": "cannot read",
    "missing.txt": "cannot read",
    "./missing": "cannot read",
    "report.md": "cannot read",
    "nul\0.txt": "null",
    ".": "is a directory",
    "": "empty",
    " \n": "empty",
    "?!": "empty",
    "empty.txt": "empty",
    "latin.txt": "not UTF-8",
    "rank.npy": "[T, D] or [B, T, D]",
    "rank4.npy": "[T, D] or [B, T, D]",
    "empty.npy": "none of them 0",
    "text.npy": "real numbers",
    "bool.npy": "real numbers, got dtype bool",
    "complex.npy": "real numbers",
    "nan.npy": "NaN or infinite",
    "inf.npy": "NaN or infinite",
    "huge.npy": "overflow float32",
    "object.npy": "not a plain .npy array",
    "pickle.npy": "not a plain .npy array",
    "short.npy": "not a plain .npy array",
    "void.npy": "not a plain .npy array",
    "zip.npy": "npz",
    "good.npy --heads 4": "--heads must divide the width D=6, got 4",
    "good.npy --heads 0": "--heads",
    "good.npy --heads -2": "--heads",
    "good.npy --heads two": "--heads",
    "good.npy --seed -1": "--seed must be from 0",
    "good.npy --seed 4294967296": "--seed must be from 0",
    "good.npy --seed 1e3": "--seed",
    "good.npy --out y.txt": "--out must end in .npy",
    "good.npy --out good.npy": "overwrite the input",
    "good.npy --out none/y.npy": "cannot write",
    "good.npy --out good.npy/y.npy": "cannot write",
    "good.npy --out folder.npy": "cannot write",
    "good.npy --save a.jpg": "--save must end in .png or .svg",
    "good.npy --save png": "--save must end in .png or .svg",
    "good.npy --save none/a.png": "cannot write",
    "good.npy --nonsense": "unrecognized",
    "two words": "quotes",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, array in ARRAYS.items():
        np.save(folder / name, array)
    np.save(folder / "object.npy", np.array([[{}]]), allow_pickle=True)
    (folder / "pickle.npy").write_bytes(b"\x80\x04N.")
    (folder / "short.npy").write_bytes((folder / "good.npy").read_bytes()[:-4])
    (folder / "void.npy").write_bytes(b"")
    with zipfile.ZipFile(folder / "zip.npy", "w") as archive:
        archive.write(folder / "good.npy", "x.npy")
    (folder / "empty.txt").write_text("\n")
    (folder / "latin.txt").write_bytes("é".encode("latin1"))
    (folder / "folder.npy").mkdir()
    return folder


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_status_2(line, run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    status, stdout, stderr = run(*(line.split(" ") if "." in line or line == "two words" else [line]))
    assert (status, stdout) == (2, "")
    assert stderr.startswith("jattn: ") and stderr.count("\n") == 1 and stderr.endswith("\n")
    assert BAD[line] in stderr
    assert sorted(folder.iterdir()) == before


def test_without_matplotlib_save_names_the_extra(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("text", "--save", tmp_path / "a.png") == (
        2,
        "",
        "jattn: --save needs matplotlib: pip install '.[plot]'\n",
    )


def test_a_disk_that_fills_up_is_bad_input_too():
    def full(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(text.BadInput, match="No space left"):
        files.write(os.devnull, full)


def test_a_terminal_without_the_shades_gets_others(monkeypatch):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    walk.picture(np.full((1, 2, 2), 0.5, np.float32), ["a", "b"], argparse.Namespace(save=None))
    plain.flush()
    assert b"a  ####  a          0.50" in plain.buffer.getvalue()
