"""The command line of the tour: its options, what it refuses, and its exit status."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import jax
import numpy as np

import jattn
from jattn.tour.files import claim, read, write
from jattn.tour.proof import checks, prove
from jattn.tour.text import BadInput, Input
from jattn.tour.walk import random_params, walk


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tour; returns 0, or 1 when a check of the proof fails, or 2 on bad input."""
    start = time.perf_counter()
    with contextlib.suppress(AttributeError, ValueError):  # not every stdout has it
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may lack a letter
    try:
        options = _parse(argv)
        given = read(options.input)
        _refuse(options, given.x)
        with jax.default_matmul_precision("highest"):
            return _tour(given, options, start)
    except BadInput as error:
        print("jattn:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def _tour(given: Input, options: argparse.Namespace, start: float) -> int:
    """The walk, then the proof."""
    mask = jattn.masks.Causal() if options.causal else None
    print(f"jattn {jattn.__version__}: {given.source}")
    params = random_params(given.x.shape[-1], options)
    y = walk(given, params, mask, options)
    if options.out:
        write(options.out, lambda file: np.save(file, y))
    chosen = jattn.explain(*jax.eval_shape(jattn.project, params, given.x), mask=mask)
    return prove(chosen, checks(params, mask, given.x, y), start)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            hint = " (put a text of several words in quotes)" if message.startswith("unrecognized") else ""
            raise BadInput(message + hint)

    parser = Parser(prog="python -m jattn", description="Attention, step by step, on a text or on an array.")
    add = parser.add_argument
    add("input", nargs="?", metavar="TEXT | FILE.txt | FILE.npy", help="default: a paragraph by William James")
    add("--out", metavar="Y.npy", help="write the attended rows [..., T, N*V] here")
    add("--save", metavar="PICTURE.png|.svg", help="draw the weights here (needs matplotlib: the extra 'plot')")
    add("--heads", type=int, default=1, metavar="N", help="heads; must divide the width D (64 for a text)")
    add("--seed", type=int, default=0, metavar="S", help="of the random projections, 0 to 2**32 - 1")
    add("--causal", action="store_true", help="a word may attend to itself and the words before it only")
    add("--version", action="version", version=f"jattn {jattn.__version__}")
    options = parser.parse_args(argv)
    if not 0 <= options.seed < 2**32:
        raise BadInput(f"--seed must be from 0 to 2**32 - 1, got {options.seed}")
    return options


def _refuse(options: argparse.Namespace, x: np.ndarray) -> None:
    """Refuses, before the long work, what would fail after it."""
    D = x.shape[-1]
    if options.heads < 1 or D % options.heads:
        raise BadInput(f"--heads must divide the width D={D}, got {options.heads}")
    claim("--out", options.out, (".npy",), options.input)
    claim("--save", options.save, (".png", ".svg"), options.input)
    if options.save:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise BadInput("--save needs matplotlib: pip install '.[plot]'") from error
