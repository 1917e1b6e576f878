"""The house: who imports whom, what an import costs, and that everything public says what it is."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jattn

PACKAGE = Path(jattn.__file__).parent
# The reading order: a file imports only from files above it.
ORDER = (
    "version",
    "checks",
    "closures",
    "params",
    "retrieval",
    "letters",
    "values",
    "intervals",
    "algebra",
    "masks",
    "scores",
    "softmax",
    "projection",
    "rotary",
    "target",
    "problem",
    "visits",
    "implementations/base",
    "implementations/dense",
    "implementations/loops",
    "implementations/blockwise",
    "implementations/__init__",
    "rule",
    "operations",
    "autodiff",
    "dispatch",
    "explanation",
    "compat",
    "layer",
    "plot",
    "__init__",
    "tour/__init__",
    "tour/text",
    "tour/files",
    "tour/walk",
    "tour/proof",
    "tour/command",
    "__main__",
)
IMPLEMENTATIONS = {"implementations/dense", "implementations/blockwise"}
FILES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("name", FILES)


def tree(name):
    return ast.parse((PACKAGE / f"{name}.py").read_text())


def imports(name, body=None):
    """The dotted names that a file imports, `from a import b` as a.b; relative ones made absolute."""
    found = []
    for node in ast.walk(tree(name)) if body is None else body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["jattn" if node.level else "", node.module]))
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def own(name):
    """The files of the library that a file imports."""
    for dotted in imports(name):
        first, *rest = dotted.split(".")
        if first == "jattn":
            paths = ["/".join(rest[:n]) for n in range(len(rest), 0, -1)]
            yield next((p for path in paths for p in (path, f"{path}/__init__") if p in FILES), "__init__")


def test_the_reading_order_lists_every_file():
    assert sorted(ORDER) == FILES


@every_file
def test_a_file_imports_only_from_files_above_it(name):
    above = ORDER[: ORDER.index(name)]
    assert set(own(name)) <= set(above)
    if name in IMPLEMENTATIONS:
        assert not set(own(name)) & IMPLEMENTATIONS


@every_file
def test_third_parties_are_the_declared_dependencies(name):
    roots = {dotted.split(".")[0] for dotted in imports(name)} - sys.stdlib_module_names - {"jattn"}
    at_the_top = {dotted.split(".")[0] for dotted in imports(name, tree(name).body)}
    optional = {"matplotlib"} if name in ("plot", "tour/command") else set()
    assert roots <= {"jax", "jaxlib", "numpy", "chex"} | optional
    assert "matplotlib" not in at_the_top
    assert not [dotted for dotted in imports(name) if "jax._src" in dotted]
    # A primitive of one's own cannot be written without the rules of JAX's interpreters: in that one file.
    assert name == "autodiff" or not [dotted for dotted in imports(name) if dotted.startswith("jax.interpreters")]
    assert "jax._src" not in (PACKAGE / f"{name}.py").read_text()


def test_no_module_bears_the_name_of_a_public_function():
    functions = {name for name in dir(jattn) if inspect.isfunction(getattr(jattn, name))}
    assert not functions & {name.split("/")[-1] for name in FILES}


def documentation_lines(node):
    """The lines of all docstrings in a node."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [inner.body[0] for inner in ast.walk(node) if isinstance(inner, holders) and ast.get_docstring(inner)]
    return {line for docstring in found for line in range(docstring.lineno, docstring.end_lineno + 1)}


def code_lines(name):
    """The numbers of the lines that are code: no docstring, no comment, not blank."""
    lines = (PACKAGE / f"{name}.py").read_text().splitlines()
    code = {n for n, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")}
    return code - documentation_lines(tree(name))


def test_the_library_stays_small():
    """In lines of code. A part that is full is split, and not squeezed."""
    size = {name: len(code_lines(name)) for name in FILES}
    apart = ("plot", "__main__", "rule", "operations", "autodiff")
    core = [name for name in FILES if name not in apart and not name.startswith(("implementations/", "tour/"))]
    assert sum(size[name] for name in core) <= 2600, size
    assert max(size.values()) <= 300, size
    assert max(size["rule"], size["operations"], size["autodiff"]) <= 250, size


MANY_PARAMETERS = {
    *("attention", "attention_with_lse", "attention_weights", "dot_product_attention", "flax_attention_fn"),
    *("init", "from_matrices"),
}  # the public surface


@every_file
def test_a_function_stays_small(name):
    code = code_lines(name)
    for function in ast.walk(tree(name)):
        if isinstance(function, ast.FunctionDef):
            lines = [n for n in code if function.lineno <= n <= function.end_lineno]
            given = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
            inner = [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef)][1:]
            assert len(lines) <= 40, (function.name, len(lines))
            assert len(inner) <= 3, (function.name, [node.name for node in inner])
            assert len(given) <= 8 or function.name in MANY_PARAMETERS, (function.name, len(given))


def sources(pattern):
    """How often a pattern stands in the code of each file that has it."""
    texts = {name: (PACKAGE / f"{name}.py").read_text().splitlines() for name in FILES}
    found = {name: sum(bool(re.search(pattern, texts[name][n - 1])) for n in code_lines(name)) for name in FILES}
    return {name: count for name, count in found.items() if count}


def test_one_place_knows_the_names_of_implementations():
    """Beside each implementation's own name, the table in `implementations`, and the tour, which checks both."""
    named = sources(r"""["'](dense|blockwise)["']""")
    own_name = {"implementations/dense": 1, "implementations/blockwise": 1}
    assert named == own_name | {"implementations/__init__": 1, "tour/proof": 2}


def test_the_platform_is_asked_for_once():
    assert sources(r"default_backend|device_count|jax_default_device") == {"target": 3}


def test_an_import_adds_the_library_and_little_else():
    """No time is asserted; what would cost time is named instead."""
    code = (
        "import sys, jax, chex, jax.numpy; before = set(sys.modules); import jattn; "
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = result.stdout.split()
    assert "jattn" in added
    assert {name.split(".")[0] for name in added} <= {"jattn", "jax", "numpy", *sys.stdlib_module_names}
    for heavy in (
        "jax.experimental.pallas",
        "matplotlib",
        "torch",
        "flax",
        "jattn.plot",
        "jattn.tour",
        "jattn.__main__",
        "jax.export",
    ):
        assert not [name for name in added if name == heavy or name.startswith(heavy + ".")], heavy


def test_an_import_starts_no_backend_and_changes_no_setting():
    code = (
        "import jax; before = dict(jax.config.values); import jattn; from jax._src import xla_bridge; "
        "print(before == dict(jax.config.values), xla_bridge.backends_are_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]


CONTRACT = {
    jattn: [
        "Blockwise",
        "Dropout",
        "Params",
        "Rotary",
        "__version__",
        "attend",
        "attention",
        "attention_weights",
        "attention_with_lse",
        "context_vector",
        "dot_product_attention",
        "enrich",
        "explain",
        "flax_attention_fn",
        "from_matrices",
        "init",
        "lookup",
        "masks",
        "merge",
        "multi_hot",
        "project",
        "scores",
    ],
    jattn.masks: [
        "Causal",
        "Chunks",
        "Dense",
        "Empty",
        "Full",
        "Function",
        "Lengths",
        "Neighborhood",
        "Prefix",
        "Segments",
        "SlidingWindow",
        "Window",
    ],
    jattn.scores: ["ALiBi", "Bias", "Function", "RelativePosition", "Sink", "SoftCap", "alibi_slopes"],
}


def test_the_public_names():
    for module, names in CONTRACT.items():
        assert [name for name in names if not hasattr(module, name)] == []
    modules = {name for name, value in vars(jattn).items() if inspect.ismodule(value)}
    public_names = {name for name in vars(jattn) if not name.startswith("_")} - modules
    assert public_names <= {*CONTRACT[jattn], "Explanation"}


PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name, None)
    for module, names in CONTRACT.items()
    for name in names
    if not inspect.ismodule(getattr(module, name, None)) and not name.startswith("_")
}
every_public = pytest.mark.parametrize("name", PUBLIC)


def described(documentation):
    """The names that a docstring describes under Args: one by one, or as those of another public function.

    `a, b: as in `f`` lists a and b, which f must describe; `a and all others: as in `f`` lists what f describes.
    """
    text = re.split("Returns:|Raises:", documentation.split("Args:")[1])[0]
    entry = r"(?:^ *|[.,] )((?:\*{0,2}\w+, )*\*{0,2}\w+)( and all others)?: (?:as in `(\w+)`)?"
    names = set()
    for listed, others, function in re.findall(entry, text, re.MULTILINE):
        found = set(re.findall(r"\w+", listed))
        if function:
            theirs = described(inspect.cleandoc(getattr(jattn, function).__doc__))
            found = (found & theirs if "*" not in listed else found) | (theirs if others else set())
        names |= found
    return names


def undescribed(function):
    """The parameters that the docstring of a function says nothing about."""
    parameters = inspect.signature(function).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD}
    return named - described(inspect.cleandoc(function.__doc__))


@every_public
def test_every_public_name_is_documented(name):
    value = PUBLIC[name]
    documentation = inspect.cleandoc(value.__doc__ or "")
    # a dataclass or NamedTuple without a docstring gets one that repeats its signature
    assert documentation and not documentation.startswith(f"{value.__name__}(")
    assert documentation.splitlines()[0].endswith((".", ":")), "the first line is one sentence"
    if inspect.isfunction(value):
        equation = any(line.startswith("    ") and "=" in line for line in documentation.splitlines())
        assert "Args:" in documentation or equation
        if "Args:" in documentation:
            assert not undescribed(value)


@pytest.mark.parametrize(
    ("args", "missing"),
    [
        ("query: an array. key, value, bare: as in `attention`.", {"bare"}),  # attention knows no such parameter
        ("query, key: as in `attention`. value: its values, without bare ones.", {"bare"}),
        ("query, key, value and all others: as in `attention`.", {"bare"}),
        ("query_seq: `[T]`. keys: as in `lookup`, and value: whatever.", {"query", "key", "value", "bare"}),
        ("query, key, value and all others: as in `attention`. bare: whether.", set()),
        ("query: `[T]`.\n  key, value: `[S]`, bare: `[B]`.", set()),
    ],
)
def test_a_parameter_that_no_phrase_names_is_missed(args, missing):
    def function(query, key, value, bare, **rest): ...

    function.__doc__ = f"Does.\n\nArgs:\n  {args}\n\nReturns:\n  bare: nothing."
    assert undescribed(function) == missing


@every_public
def test_every_public_function_declares_its_types(name):
    value = PUBLIC[name]
    functions = (
        [value]
        if inspect.isfunction(value)
        else [member for key, member in vars(value).items() if inspect.isfunction(member) and not key.startswith("_")]
    )
    for function in functions:
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function
        for parameter in list(signature.parameters.values()):
            if parameter.name not in ("self", "cls"):
                assert parameter.annotation is not inspect.Parameter.empty, (function, parameter)


@every_file
def test_every_file_says_what_it_is(name):
    assert ast.get_docstring(tree(name))
    for node in tree(name).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            assert node.returns is not None, f"{node.name} does not say what it returns"


def test_the_version_is_in_one_place():
    version = importlib.import_module("jattn.version")
    assert jattn.__version__ == version.__version__
    holders = [path.name for path in PACKAGE.rglob("*.py") if f'"{jattn.__version__}"' in path.read_text()]
    assert holders == ["version.py"]
    assert f'"{jattn.__version__}"' not in (PACKAGE.parent / "pyproject.toml").read_text()


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
