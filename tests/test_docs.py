"""The documentation and the package say what is so: every public name, every picture, every dependency, the version."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import jattn
from jattn import masks, plot
from tests.test_house import CONTRACT, PUBLIC

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
sys.path.insert(0, str(DOCS))  # where the build has what it makes pages with

import gallery  # noqa: E402

entries = pytest.mark.parametrize("entry", gallery.MASKS, ids=lambda entry: entry.name)


# --- pages ---


def test_the_api_page_has_every_public_name_once():
    shown = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    pictures = [f"jattn.plot.{node.name}" for node in ast.parse(Path(plot.__file__).read_text()).body if public(node)]
    beside = {"jattn.masks", "jattn.masks.Mask", "jattn.scores", "jattn.plot", "jattn.Explanation"}
    assert sorted(shown) == sorted({*PUBLIC, *pictures, *beside})


def public(node):
    return isinstance(node, ast.FunctionDef) and not node.name.startswith("_")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, capsys):
    namespace = {"__name__": page.stem}
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), namespace)


def test_every_page_is_in_the_navigation():
    shown = re.findall(r"^  - .*: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(page.name for page in DOCS.glob("*.md"))


# --- the gallery ---


def test_the_gallery_has_every_mask():
    shown = {name for entry in gallery.MASKS for name in re.findall(r"\b[A-Z]\w+(?=\()", entry.expression)}
    assert shown == set(CONTRACT[masks])
    assert all(any(sign in entry.expression for entry in gallery.MASKS) for sign in "&|~")
    assert len({entry.name for entry in gallery.MASKS}) == len(gallery.MASKS)


@entries
def test_the_gallery_shows_what_the_mask_says(entry):
    page = gallery.masks_page().split(f"## {entry.title}\n")[1].split("\n## ")[0]
    picture = page.split("```text\n")[1].split("\n```")[0]
    assert f"mask = {entry.expression}\n" in page
    if entry.is_small:
        array = np.asarray(gallery.mask_of(entry).to_array(**entry.sizes))
        first = array.reshape(-1, *array.shape[-2:])[0]
        assert picture.splitlines() == ["".join("·█"[int(allowed)] for allowed in row) for row in first]
        assert f"(pictures/{entry.name}.svg)" in page
    else:
        assert {*picture} == {*"·▒█\n"} and "svg" not in page


def test_the_gallery_is_drawn(monkeypatch):
    monkeypatch.setattr(gallery, "MASKS", (gallery.MASKS[2], gallery.MASKS[-1]))
    drawn = dict(gallery.pictures())
    assert list(drawn) == [gallery.MASKS[0].name] and b"<svg" in drawn[gallery.MASKS[0].name]


def test_the_table_of_implementations_is_what_explain_says():
    header, _, *lines = gallery.implementations_table().splitlines()
    assert {line.count("|") for line in lines} == {header.count("|")}
    assert {line.split(" | ")[1] for line in lines} == {"dense", "blockwise"}


# --- docstrings ---


def test_a_docstring_becomes_markdown():
    pytest.importorskip("griffe")
    import docstrings

    text = """Says one thing.

    y = x

Window(1):
    █···

Differs in:
  - one;
  - two.
As ever.

Args:
  x: `[T]`. y: `[S]`, z: one.  w: more, x: not apart,
    and y: as said.
"""
    found = docstrings.to_markdown(text, ["x", "y", "z", "w"])
    assert "\n```text\ny = x\n```\n" in found.replace("    y", "y")
    assert "```text\nWindow(1):\n    █···\n```" in found
    assert "Differs in:\n\n  - one;\n  - two.\n\nAs ever." in found
    assert found.split("Args:\n")[1].splitlines() == [
        "  x: `[T]`.",
        "  y: `[S]`.",
        "  z: one.",
        "  w: more, x: not apart,",
        "    and y: as said.",
    ]


# --- the package ---


MODULES = {"pytest-xdist": "xdist", "mkdocstrings-python": "mkdocstrings_handlers", "griffelib": "griffe"}
# what is used from a command line or a file of settings
COMMANDS = {
    "test": {"xdist"},  # pytest -n
    "docs": {"mkdocs", "mkdocstrings", "mkdocstrings_handlers"},
    "dev": {"ruff", "mypy"},
    "tpu": {"jax"},  # for libtpu
}
COMES_WITH = {"docs": {"pygments"}}  # mkdocs and its themes cannot be without it


def declared(requirements):
    names = (re.match(r"[\w-]+", requirement).group() for requirement in requirements)
    return {MODULES.get(name, name) for name in names} - {"jattn"}


def imported(folder):
    """The third parties that the files of a folder import, at the top or later."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
        if folder == "tests":  # may skip
            found |= {name.split(".")[0] for name in re.findall(r'importorskip\("([\w.]+)"\)', text)}
    own = {path.stem for path in DOCS.glob("*.py")} | {"jattn", "bench", "tests"}
    return found - own - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("folder", "extra", "optional"),
    [
        ("jattn", None, {"matplotlib"}),
        ("tests", "test", {"torch", "transformers", "libtpu", "griffe"}),
        ("bench", "bench", set()),
        ("docs", "docs", set()),
    ],
)
def test_what_is_imported_is_declared_and_the_other_way_round(folder, extra, optional):
    base = declared(PROJECT["dependencies"])
    own = declared(PROJECT["optional-dependencies"][extra]) if extra else base
    found = imported(folder) - COMES_WITH.get(folder, set())
    assert found - base - own - optional == set(), "imported and not declared"
    assert own - found - COMMANDS.get(extra, set()) - {"matplotlib"} == set(), "declared and not used"


def test_every_extra_is_looked_at():
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"plot", "test", "bench", "goldens", "docs", "dev", "tpu"}
    assert declared(extras["plot"]) == {"matplotlib"} <= imported("jattn")
    assert declared(extras["goldens"]) == {"torch", "transformers"} <= imported("tests")
    assert declared(extras["dev"]) == COMMANDS["dev"] and declared(extras["tpu"]) == COMMANDS["tpu"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(f".venv/bin/{tool}" in ci for tool in (*COMMANDS["dev"], "mkdocs build --strict"))
    assert [line for line in extras["dev"] if re.fullmatch(r"ruff==[\d.]+", line)], "ruff is pinned"


def test_the_classifiers_are_the_pythons_of_ci():
    prefix = "Programming Language :: Python :: "
    versions = [c.removeprefix(prefix) for c in PROJECT["classifiers"] if re.fullmatch(prefix + r"3\.\d+", c)]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow) == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "README.md").read_text()


def test_the_changelog_has_the_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert jattn.__version__ in headings
    assert headings[0] in ("Unreleased", jattn.__version__)


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 50
