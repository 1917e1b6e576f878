"""Bad input to each public function: the error names the argument, what came and what was wanted.

And it is an error, whichever, also where assertions are switched off: never a wrong number.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn

T, S, N, K, H, V = 7, 11, 6, 3, 5, 13
D, C, E = 17, 19, 23
KEY = jax.random.key(0)


def f(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def b(*shape):
    return np.ones(shape, bool)


def attention(**changed):
    arguments = {"query": f(T, N, H), "key": f(S, K, H), "value": f(S, K, V)} | changed
    return jattn.attention(**arguments)


def weights(**changed):
    arguments = {"query": f(T, N, H), "key": f(S, K, H)} | changed
    return jattn.attention_weights(**arguments)


def init(**changed):
    return jattn.init(
        **{"key": KEY, "embed_dim": D, "num_heads": N, "num_kv_heads": K, "qk_dim": H, "v_dim": V} | changed
    )


def matrices(**changed):
    arguments = {"wq": f(N * H, D), "wk": f(K * H, C), "wv": f(K * V, C), "wo": f(E, N * V), "num_heads": N}
    return jattn.from_matrices(**arguments | {"num_kv_heads": K} | changed)


def params(**changed):
    whole = jattn.Params(f(D, N, H), f(C, K, H), f(C, K, V), f(N, V, E), f(N, H), f(K, H), f(K, V), f(E))
    return whole._replace(**changed)


class Bad(NamedTuple):
    name: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]  # patterns that the message contains: the argument, what came, what was wanted


def _layer(name, function):
    """What attend, context_vector and project have in common."""
    x, context = f(T, D), f(S, C)
    yield from [
        Bad(f"{name} x is a vector", lambda: function(params(), f(D), context), ValueError, (r"\bx\b", "T.*D", str(D))),
        Bad(
            f"{name} x of another width",
            lambda: function(params(), f(T, 3), context),
            ValueError,
            ("x|wq", "3", str(D)),
        ),
        Bad(
            f"{name} context is a vector", lambda: function(params(), x, f(C)), ValueError, ("context", "S.*C", str(C))
        ),
        Bad(
            f"{name} context of another width",
            lambda: function(params(), x, f(S, 3)),
            ValueError,
            ("context|wk", "3", str(C)),
        ),
        Bad(
            f"{name} context left out",
            lambda: function(params(), x),
            ValueError,
            ("x|context|wk", str(D), str(C)),
        ),
        Bad(
            f"{name} batch of context",
            lambda: function(params(), f(2, T, D), f(3, S, C)),
            ValueError,
            ("context", r"\b2\b", r"\b3\b"),
        ),
        Bad(
            f"{name} integer x", lambda: function(params(), x.astype(np.int32), context), TypeError, (r"\bx\b", "int32")
        ),
        Bad(f"{name} boolean x", lambda: function(params(), x > 0, context), TypeError, (r"\bx\b", "bool")),
        Bad(f"{name} complex x", lambda: function(params(), x * 1j, context), TypeError, (r"\bx\b", "complex")),
        Bad(
            f"{name} integer context",
            lambda: function(params(), x, context.astype(np.int32)),
            TypeError,
            ("context", "int32"),
        ),
        Bad(
            f"{name} integer wq",
            lambda: function(params(wq=f(D, N, H, dtype=np.int32)), x, context),
            TypeError,
            ("wq", "int32"),
        ),
        Bad(
            f"{name} wk of another width",
            lambda: function(params(wk=f(C, K, 4)), x, context),
            ValueError,
            ("wk", "4", "5"),
        ),
        Bad(
            f"{name} wv with other heads",
            lambda: function(params(wv=f(C, 2, V)), x, context),
            ValueError,
            ("wv", "2", "3"),
        ),
        Bad(
            f"{name} bq of another shape", lambda: function(params(bq=f(H, N)), x, context), ValueError, ("bq", "5.*6")
        ),
        Bad(
            f"{name} heads that do not divide",
            lambda: function(params(wk=f(C, 4, H), wv=f(C, 4, V), bk=f(4, H), bv=f(4, V)), x, context),
            ValueError,
            (r"\b4\b", r"\b6\b", "multiple of.*divi"),
        ),
        Bad(f"{name} no Params", lambda: function(f(D, N, H), x, context), TypeError, ("params", "Params")),
    ]


def _attention(name, function):
    """What attention and attention_weights have in common."""
    yield from [
        Bad(f"{name} query of rank 2", lambda: function(query=f(N, H)), ValueError, ("query", "T.*N.*H", "6.*5")),
        Bad(f"{name} key of rank 2", lambda: function(key=f(K, H)), ValueError, ("key", "S.*K.*H", "3.*5")),
        Bad(
            f"{name} widths of q and k", lambda: function(key=f(S, K, 4)), ValueError, ("key", r"\b4\b", r"\b5\b", "H")
        ),
        Bad(
            f"{name} heads that do not divide",
            lambda: function(key=f(S, 4, H), **({"value": f(S, 4, V)} if function is attention else {})),
            ValueError,
            (r"\b4\b", r"\b6\b", "multiple of.*divi"),
        ),
        Bad(f"{name} batch dims", lambda: function(query=f(2, T, N, H)), ValueError, ("key|batch|leading", r"\b2\b")),
        Bad(
            f"{name} mask does not broadcast",
            lambda: function(mask=b(T, T)),
            ValueError,
            ("mask", r"7.*7", "7.*11", r"T.*S"),
        ),
        Bad(f"{name} mask with too many heads", lambda: function(mask=b(4, T, S)), ValueError, ("mask", "4", "N")),
        Bad(f"{name} mask with other batch", lambda: function(mask=b(2, N, T, S)), ValueError, ("mask", "2")),
        Bad(
            f"{name} integer mask", lambda: function(mask=f(T, S, dtype=np.int32)), TypeError, ("mask", "int32", "bool")
        ),
        Bad(f"{name} float mask", lambda: function(mask=f(T, S)), TypeError, ("mask", "float32", "bool")),
        Bad(f"{name} mask that is no mask", lambda: function(mask="causal"), TypeError, ("mask", "str|causal")),
        Bad(
            f"{name} order without positions",
            lambda: function(mask=jattn.masks.Causal()),
            ValueError,
            ("q_offset", r"\b7\b", r"\b11\b", "S - T|T.*S"),
        ),
    ]
    for argument, shape in (("query", (T, N, H)), ("key", (S, K, H))):
        for dtype in ("int32", "bool", "complex64"):
            yield Bad(
                f"{name} {dtype} {argument}",
                lambda argument=argument, shape=shape, dtype=dtype: function(**{argument: f(*shape, dtype=dtype)}),
                TypeError,
                (argument, dtype, "float"),
            )


_HOT = (b(4), b(2, 4), b(2, 5))

BAD = [
    Bad("enrich of a vector", lambda: jattn.enrich(f(D)), ValueError, (r"\bx\b", "T.*D", str(D))),
    Bad("enrich of integers", lambda: jattn.enrich(f(T, D, dtype=np.int32)), TypeError, (r"\bx\b", "int32", "float")),
    Bad("enrich of booleans", lambda: jattn.enrich(b(T, D)), TypeError, (r"\bx\b", "bool")),
    Bad("enrich of complex", lambda: jattn.enrich(f(T, D) * 1j), TypeError, (r"\bx\b", "complex")),
    Bad("multi_hot of an unknown term", lambda: jattn.multi_hot(("a", "z"), ["a", "b"]), ValueError, ("'z'",)),
    Bad("multi_hot in a string", lambda: jattn.multi_hot("a", "abc"), TypeError, ("vocabulary", "str|abc")),
    Bad("multi_hot of a repeated term", lambda: jattn.multi_hot("a", ["a", "a"]), ValueError, ("vocabulary", "'a'")),
    Bad("lookup of floats", lambda: jattn.lookup(f(4), *_HOT[1:]), TypeError, ("query", "float32", "bool")),
    Bad("lookup in integers", lambda: jattn.lookup(_HOT[0], b(2, 4) * 1, _HOT[2]), TypeError, ("keys", "int", "bool")),
    Bad("lookup of float values", lambda: jattn.lookup(*_HOT[:2], f(2, 5)), TypeError, ("values", "float32", "bool")),
    Bad(
        "lookup in another vocabulary", lambda: jattn.lookup(b(3), *_HOT[1:]), ValueError, ("query|keys", "3", "4", "A")
    ),
    Bad("lookup with values too many", lambda: jattn.lookup(*_HOT[:2], b(3, 5)), ValueError, ("values", "3", "2", "S")),
    Bad("lookup keys of rank 1", lambda: jattn.lookup(_HOT[0], b(4), _HOT[2]), ValueError, ("keys", "S.*A", "4")),
    Bad("init num_kv_heads", lambda: init(num_kv_heads=4), ValueError, ("num_kv_heads", r"\b4\b", r"\b6\b", "divi")),
    Bad("init num_kv_heads of 0", lambda: init(num_kv_heads=0), ValueError, ("num_kv_heads", "0")),
    Bad("init num_heads of 0", lambda: init(num_heads=0, num_kv_heads=None), ValueError, ("num_heads", "0")),
    Bad("init embed_dim of 0", lambda: init(embed_dim=0), ValueError, ("embed_dim", "0")),
    Bad("init default width", lambda: init(qk_dim=None), ValueError, ("qk_dim|embed_dim", r"\b17\b", r"\b6\b")),
    Bad("init negative width", lambda: init(v_dim=-1), ValueError, ("v_dim", "-1")),
    Bad("init out_dim of 0", lambda: init(out_dim=0), ValueError, ("out_dim", "0")),
    Bad("init of integers", lambda: init(dtype=jnp.int32), TypeError, ("dtype", "int32", "float")),
    Bad("init of complex", lambda: init(dtype=jnp.complex64), TypeError, ("dtype", "complex64", "float")),
    Bad("init of float width", lambda: init(qk_dim=2.5), ValueError, ("qk_dim", "2.5", "int")),
    Bad("from_matrices num_heads", lambda: matrices(num_heads=4, num_kv_heads=4), ValueError, ("wq", "30", r"\b4\b")),
    Bad("from_matrices num_kv_heads", lambda: matrices(num_kv_heads=4), ValueError, ("num_kv_heads", "4", "6", "divi")),
    Bad("from_matrices wq of rank 3", lambda: matrices(wq=f(D, N, H)), ValueError, ("wq", "17.*6.*5")),
    Bad("from_matrices wk of other width", lambda: matrices(wk=f(K * 4, C)), ValueError, ("wk", r"\b12\b|\b4\b")),
    Bad(
        "from_matrices wv of other context", lambda: matrices(wv=f(K * V, 18)), ValueError, ("wv", r"\b18\b", r"\b19\b")
    ),
    Bad("from_matrices wv heads", lambda: matrices(wv=f(K * V + 1, C)), ValueError, ("wv", r"\b40\b", r"\b3\b")),
    Bad("from_matrices wo of other heads", lambda: matrices(wo=f(E, 77)), ValueError, ("wo", "77", "78")),
    Bad("from_matrices bq", lambda: matrices(bq=f(29)), ValueError, ("bq", "29", "30")),
    Bad("from_matrices bo", lambda: matrices(bo=f(22)), ValueError, ("bo", "22", "23")),
    Bad("from_matrices bo without wo", lambda: matrices(wo=None, bo=f(E)), ValueError, ("bo", "wo")),
    Bad(
        "from_matrices integers", lambda: matrices(wq=f(N * H, D, dtype=np.int32)), TypeError, ("wq", "int32", "float")
    ),
    Bad(
        "from_matrices integer bias", lambda: matrices(bk=f(K * H, dtype=np.int32)), TypeError, ("bk", "int32", "float")
    ),
    *_layer("project", jattn.project),
    *_layer("attend", jattn.attend),
    *_layer("context_vector", jattn.context_vector),
    Bad(
        "attend wo of other heads",
        lambda: jattn.attend(params(wo=f(N, 4, E)), f(T, D), f(S, C)),
        ValueError,
        ("wo", "4", "13"),
    ),
    Bad(
        "attend integer mask",
        lambda: jattn.attend(params(), f(T, D), f(S, C), mask=f(T, S)),
        TypeError,
        ("mask", "float32"),
    ),
    Bad(
        "attend order",
        lambda: jattn.attend(params(), f(T, D), f(S, C), mask=jattn.masks.Causal()),
        ValueError,
        ("q_offset",),
    ),
    *_attention("attention", attention),
    *_attention("attention_weights", weights),
    Bad("attention value of rank 2", lambda: attention(value=f(S, V)), ValueError, ("value", "S.*K.*V", "11.*13")),
    Bad("attention value of other length", lambda: attention(value=f(S + 1, K, V)), ValueError, ("value", "12", "11")),
    Bad("attention value of other heads", lambda: attention(value=f(S, 2, V)), ValueError, ("value", "2", "3", "K")),
    Bad("attention integer value", lambda: attention(value=f(S, K, V, dtype=np.int32)), TypeError, ("value", "int32")),
    Bad("attention boolean value", lambda: attention(value=b(S, K, V)), TypeError, ("value", "bool")),
    Bad("attention complex value", lambda: attention(value=f(S, K, V) * 1j), TypeError, ("value", "complex")),
    Bad(
        "attention implementation",
        lambda: attention(implementation="fast"),
        ValueError,
        ("implementation", "'fast'", "dense", "blockwise"),
    ),
    Bad(
        "attention implementation of no type",
        lambda: attention(implementation=3),
        (TypeError, ValueError),
        ("implementation", "3|int"),
    ),
    Bad("weights rows too large", lambda: weights(rows=[0, 7]), ValueError, ("rows", r"\b7\b")),
    Bad("weights rows of floats", lambda: weights(rows=np.ones(2, np.float32)), TypeError, ("rows", "float32", "int")),
    Bad("weights rows of rank 2", lambda: weights(rows=np.ones((1, 2), np.int32)), ValueError, ("rows", r"1.*2")),
]
every_bad = pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name.replace(" ", "_"))


@every_bad
def test_the_error_says_what_is_wrong(bad):
    with pytest.raises(bad.error) as caught:
        bad.call()
    for pattern in bad.says:
        assert re.search(pattern, str(caught.value), re.DOTALL), f"{pattern!r} is not in: {caught.value}"


def test_names_are_unique():
    assert len({bad.name for bad in BAD}) == len(BAD)


def test_good_input_is_no_error():
    attention()
    weights()
    init()
    matrices()
    for function in (jattn.project, jattn.attend, jattn.context_vector):
        function(params(), f(T, D), f(S, C))


def test_an_error_under_jit_is_the_same_error():
    with pytest.raises(ValueError, match="key"):
        jax.jit(lambda key: attention(key=key))(f(S, K, 4))
    with pytest.raises(TypeError, match="mask"):
        jax.jit(lambda mask: attention(mask=mask))(f(T, S))


def still_wrong():
    """The names of those bad calls that return although they should raise."""
    returned = []
    for bad in BAD:
        try:
            bad.call()
        except Exception:
            continue
        returned.append(bad.name)
    return returned


def test_no_bad_call_returns_without_chex_assertions():
    chex.disable_asserts()
    try:
        assert still_wrong() == []
    finally:
        chex.enable_asserts()


def test_no_bad_call_returns_under_python_o():
    code = "from tests import test_errors; assert_off = not __debug__; print(assert_off, test_errors.still_wrong())"
    result = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[-2] == "True []"
