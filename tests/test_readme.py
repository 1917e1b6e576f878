"""README is true: its Python runs, its pictures are what the masks say, its commands are those of CI."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jattn import masks
from tests.test_house import ORDER

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    """(line number, text) of each fenced block of a language."""
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
        yield README[: match.start(1)].count("\n"), match.group(1)


def test_every_python_block_runs_in_order():
    found = list(blocks("python"))
    assert found
    namespace = {"__name__": "readme"}
    for line, text in found:
        # The empty lines make a traceback point into README.
        exec(compile("\n" * line + text, "README.md", "exec"), namespace)


def test_the_first_screen_says_what_it_is_how_it_is_used_and_where_it_stands():
    first = "\n".join(README.splitlines()[:45])
    parts = [
        "`pip install .`",
        "jattn.attend",
        "jattn.attention(",
        "| CPU |",
        "| GPU |",
        "| TPU |",
        "-m jattn\n",
        "pytest",
    ]
    assert [part for part in parts if part not in first] == []
    assert first.count("```python") == 1 and first.count("```bash") == 2


def test_no_link_needs_a_place():
    """README is shown elsewhere too, where a relative link leads nowhere."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", README, flags=re.DOTALL)
    assert [link for link in re.findall(r"\]\(([^)]*)\)", prose) if not link.startswith("https://")] == []
    assert not re.search(r"<(img|a)\b", prose)


def test_compiles_for_a_tpu():
    """What README says of TPUs: it compiles the forward and the gradient, with no TPU there, and runs nothing."""
    pytest.importorskip("libtpu")
    code = """
import jax, jattn
from jax.experimental import topologies
device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
x = jax.ShapeDtypeStruct((16384, 4, 128), "bfloat16", sharding=jax.sharding.SingleDeviceSharding(device))
def loss(*x):
    return jattn.attention(*x, mask=jattn.masks.Causal()).astype("float32").sum()
for f in (loss, jax.grad(loss, (0, 1, 2))):
    compiled = jax.jit(f).trace(x, x, x).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 16384 * 16384 * 2 / 2  # half of all scores
"""
    # Nobody is asked over the network which TPU this is, and this process may have loaded libtpu itself.
    settings = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    environment = os.environ | settings | {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_each_command_sets_itself_up_and_ci_runs_the_tests_to_the_letter():
    commands = [text.strip() for _, text in blocks("bash")]
    main_job, tests = commands[:2]
    for command in (main_job, tests):
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert main_job.endswith(" && .venv/bin/python -m jattn")
    assert " && .venv/bin/pytest" in tests
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()
    for workflow in ROOT.glob(".github/workflows/*.y*ml"):
        assert ".ci/run" in workflow.read_text()


def test_the_reading_order_is_the_one_that_imports_obey():
    table = README.split("## Reading order")[1].split("\n## ")[0]
    files = re.findall(r"`([\w/]+)\.py`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    assert files == [name for name in ORDER if name not in ("version", "__init__")]


def test_the_drawn_masks():
    """Each column of the drawing: a title of one or two lines (a mask, T, S, q_offset), then rows of █ and ·."""
    (drawing,) = (text for _, text in blocks("text") if "█" in text)
    lines = drawing.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+(?: ?\S+)*", lines[0])]
    columns = [
        [line[start:end].strip() for line in lines] for start, end in zip(starts, [*starts[1:], None], strict=True)
    ]
    assert len(columns) >= 5
    for column in columns:
        title = " ".join(line for line in column if line and not re.fullmatch("[█·]+", line))
        drawn = [line for line in column if re.fullmatch("[█·]+", line)]
        mask, *options = re.split(r", (?=T=)", title)
        mask = eval(mask, vars(masks) | {"Segments": lambda ids: masks.Segments(np.array(ids, np.int32))})
        options = eval(f"dict({options[0] if options else 'T=4, S=4'})")
        array = np.squeeze(np.asarray(mask.to_array(**options)))
        assert ["".join("·█"[allowed] for allowed in row) for row in array.astype(int)] == drawn, title
