"""The command line: `python -m bench` for everything, flags for parts of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax

from bench import measure, report
from bench.cases import DTYPES, FULL, MASKS, ON_GPU, QUICK, WORKS, Trial, product
from bench.contenders import CONTENDERS, SLOW_TO_COMPILE

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"


def _names(allowed):
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(allowed):
            raise argparse.ArgumentTypeError(f"{sorted(unknown)} not among {', '.join(allowed)}")
        return names

    return parse


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def _shape(text: str) -> list[int]:
    if len(sizes := _sizes(text)) != 4:
        raise argparse.ArgumentTypeError(f"{text} is not B,N,K,H")
    return sizes


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times jattn beside its peers, each answer checked first. Without flags: everything, into bench/.",
        epilog="Any of --work --mask --dtype --sizes --shape asks for their product in place of the table, as in"
        " python -m bench --work forward --mask full --sizes 4096 --contenders jattn,torch,jax.nn --rounds 7",
    )
    p.add_argument("--quick", action="store_true", help="a few small cases, at most 2 minutes")
    p.add_argument("--work", type=_names(WORKS), metavar="W,..", help=f"among {', '.join(WORKS)}")
    p.add_argument("--mask", type=_names(MASKS), metavar="M,..", help=f"among {', '.join(MASKS)}")
    p.add_argument("--dtype", type=_names(DTYPES), metavar="D,..", help=f"among {', '.join(DTYPES)}")
    p.add_argument("--sizes", type=_sizes, metavar="T,..", help="sequence lengths")
    p.add_argument("--shape", type=_shape, metavar="B,N,K,H", help="batch, heads, key/value heads, width (1,8,8,64)")
    p.add_argument("--contenders", type=_names(CONTENDERS), metavar="C,..", help=f"among {', '.join(CONTENDERS)}")
    p.add_argument("--rounds", type=int, default=15, help="at most so many rounds a trial (15)")
    p.add_argument(
        "--seconds", type=float, default=10.0, help="about so long a trial (10), but at least a third of the rounds"
    )
    p.add_argument("--deadline", type=float, default=float("inf"), help="start no trial after so many seconds")
    p.add_argument("--out", type=Path, help="folder for RESULTS.md, results.json and plots (bench)")
    p.add_argument("--update-readme", action="store_true", help="write the README's tables: a full run, or --from one")
    p.add_argument("--from", dest="source", type=Path, metavar="JSON", help="report on an earlier run's results.json")
    return p


def _trials(args: argparse.Namespace) -> list[Trial] | None:
    """The trials that the flags ask for; None for the full table."""
    if any((args.work, args.mask, args.dtype, args.sizes, args.shape)):
        lists = args.work or ["forward"], args.mask or ["full"], args.dtype or ["f32"], args.sizes or [4096]
        return product(*lists, args.shape or (1, 8, 8, 64))
    return QUICK if args.quick else None


def recorded() -> dict[str, report.Result]:
    """The runs that are kept, by folder: the last one in bench, others in folders of their own (--out bench/NAME)."""
    kept = [*HERE.glob("results.json"), *sorted(HERE.glob("*/results.json"))]
    return {str(path.parent.relative_to(HERE.parent)): report.from_json(path.read_text()) for path in kept}


def main(argv: list[str] | None = None) -> int:
    """Runs, reports, and returns 1 if jattn gave a wrong answer or none."""
    args = parser().parse_args(argv)
    trials = _trials(args)
    if args.source:
        result = report.from_json(args.source.read_text())
    full = result.machine["run"] == "full" if args.source else trials is None and args.contenders is None
    if args.update_readme and not full:
        parser().error("--update-readme wants a full run, or --from the results of one")
    if args.update_readme and report.BEGIN not in README.read_text():
        parser().error(f"{README} has no line {report.BEGIN}")

    if not args.source:
        names = args.contenders or [name for name in CONTENDERS if not (args.quick and name in SLOW_TO_COMPILE)]
        limits = args.rounds, args.seconds, args.deadline
        if args.quick:
            limits = min(args.rounds, 7), 1.0, min(args.deadline, 75.0)
        about = measure.machine() | {"run": "full" if full else "a part"}
        table = ON_GPU if jax.default_backend() == "gpu" else FULL
        result = report.Result(about, measure.run(table if trials is None else trials, names, *limits))

    print(report.markdown(result))
    out = HERE if full and not args.source and args.out is None else args.out
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "RESULTS.md").write_text(report.markdown(result))
        (out / "results.json").write_text(report.to_json(result))
        report.plots(result, out)
        print(f"written to {out}", file=sys.stderr)
    if args.update_readme:
        README.write_text(report.with_tables(README.read_text(), recorded() | {"bench": result}))
    ours = [row for row in result.rows if row.contender.startswith(report.OURS)]
    return 1 if any(row.status in ("wrong", "failed") for row in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
