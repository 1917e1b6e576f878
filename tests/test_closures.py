"""Functions of one's own that close over arrays being traced: these are arguments, in every transform."""

import functools
import gc
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jattn
from jattn import masks, scores
from tests.plain import assert_close, quick

both = pytest.mark.parametrize("implementation", ["dense", jattn.Blockwise(3, 4)], ids=["dense", "blockwise"])


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((7, 4, 5), (7, 2, 5), (7, 2, 3)))


def near(n, q, k, v, implementation):
    """Closes over n."""
    return jattn.attention(q, k, v, mask=masks.Function(lambda i, j: abs(i - j) < n), implementation=implementation)


def heated(a, q, k, v, implementation):
    """Closes over a; the same as `cooled` says with a parameter."""
    scaled = scores.Function(lambda s, i, j, _: s * a - 0.1 * a * abs(i - j).astype(s.dtype))
    return jattn.attention(q, k, v, scores=(scaled,), implementation=implementation)


def cooled(a, q, k, v, implementation):
    scaled = scores.Function(lambda s, i, j, a: s * a - 0.1 * a * abs(i - j).astype(s.dtype), a)
    return jattn.attention(q, k, v, scores=(scaled,), implementation=implementation)


@both
def test_a_mask_that_closes_over_a_tracer(implementation):
    x = draw()
    distance = np.abs(np.subtract.outer(np.arange(7), np.arange(7)))
    wanted = [jattn.attention(*x, mask=distance < n, implementation="dense") for n in (2, 4)]
    assert_close(jax.jit(lambda n: near(n, *x, implementation))(2), wanted[0], 1e-5)
    got = jax.vmap(lambda n: near(n, *x, implementation))(jnp.array([2, 4]))
    assert_close(got, jnp.stack(wanted), 1e-5)


@both
def test_a_score_that_closes_over_a_tracer_and_its_derivatives(implementation):
    x = draw()

    def all_of(f):
        def loss(a, q):
            return jnp.sin(f(a, q, *x[1:], implementation)).sum()

        at = jnp.float32(0.7), x[0]
        gradient, hvp = jax.jvp(jax.grad(loss, (0, 1)), at, (jnp.float32(0.3), jnp.cos(x[0])))
        mapped = jax.vmap(jax.grad(loss), (0, None))(jnp.array([0.5, 1.5]), x[0])
        return loss(*at), gradient, hvp, mapped

    assert_close(jax.jit(lambda: all_of(heated))(), jax.jit(lambda: all_of(cooled))(), 1e-4)


@both
def test_what_a_function_holds_is_found_wherever_it_holds_it(implementation):
    x = draw()

    class Settings:
        def __init__(self, n):
            self.n = n

        def near(self, i, j):
            return abs(i - j) < self.n

    def through(make):
        def f(n):
            return jattn.attention(*x, mask=masks.Function(make(n)), implementation=implementation)

        return quick(f, 3)

    wanted = near(3, *x, "dense")
    for make in (
        lambda n: Settings(n).near,
        lambda n: functools.partial(lambda i, j, settings: abs(i - j) < settings.n, settings=SimpleNamespace(n=n)),
        lambda n: (lambda held: lambda i, j: abs(i - j) < held[1]["n"])({1: {"n": n}, "a": 2}),
    ):
        assert_close(through(make), wanted, 1e-5)


def test_a_function_that_names_what_is_not_there_yet():
    x = draw()
    causal = masks.Function(lambda i, j: j <= i if True else later)
    out = jattn.attention(*x, mask=causal)
    later = None
    assert_close(out, jattn.attention(*x, mask=masks.Causal()), 1e-5)


@both
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["shard_map", "explicit"])
def test_a_score_that_closes_over_a_tracer_on_several_devices(implementation, kind):
    """What it closes over is the same on all devices, or differs between them; its gradient is summed once."""
    q, k, v = (jnp.stack([a, jnp.cos(a)]) for a in draw())
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    example, nowhere = jax.P("x"), jax.P()

    def on_devices(a, q, k, v):
        def f(a, *x):
            return heated(a if a.ndim == 0 else a[0], *x, implementation)

        if kind == AxisType.Auto:
            specs = (example if a.ndim else nowhere, example, example, example)
            return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=example)(a, q, k, v)
        return heated(a, q, k, v, implementation)

    def loss(f):
        return lambda a, *x: jnp.sin(f(a, *x)).sum()

    wanted = jax.value_and_grad(loss(lambda *x: cooled(*x, "dense")))(jnp.float32(0.7), q, k, v)
    with jax.set_mesh(mesh):
        placed = jax.device_put((q, k, v), jax.NamedSharding(mesh, example))
        run = jax.value_and_grad(loss(on_devices))
        assert_close(jax.jit(run)(jnp.float32(0.7), *placed), wanted, 1e-4)
        if kind == AxisType.Explicit:
            assert_close(run(jnp.float32(0.7), *placed), wanted, 1e-4)
            mapped = jax.vmap(lambda a, *x: heated(a, *x, implementation), (None, 0, 0, 0))(jnp.float32(0.7), *placed)
            assert_close(mapped, cooled(0.7, q, k, v, "dense"), 1e-4)
        else:
            varied = jax.jit(run)(jnp.full(2, 0.7, jnp.float32), *placed)
            assert_close((varied[0], varied[1].sum()), wanted, 1e-4)


def test_nothing_captured_stays():
    x = draw()

    def gradient(table):
        def f(q):
            biased = scores.Function(lambda s, i, j, _: s + table[i - j])
            return jattn.attention(q, *x[1:], scores=(biased,), implementation="dense").sum()

        return jax.grad(f)(x[0])

    def live():
        gc.collect()
        return sum(array.size for array in jax.live_arrays() if array.size >= 10007)

    before = live()
    for _ in range(3):
        jax.grad(lambda table: gradient(table).sum())(jnp.ones(10007)).block_until_ready()
    assert live() <= before


def test_whatever_holds_it_and_itself():
    """Functions that know themselves, wrapped ones, and objects that hold their own methods."""
    x = draw()

    class Model:
        def __init__(self, n, weights):
            self.n, self.weights, self.method = n, weights, self.near

        def near(self, i, j):
            return abs(i - j) < self.n * min(self.weights.shape)

    def recursive(n):
        def near(i, j, again=True):
            return near(j, i, again=False) if again else abs(i - j) < n

        return near

    def custom(n):
        own = jax.custom_jvp(lambda i, j: abs(i - j) < n)
        own.defjvp(lambda primals, tangents: (own(*primals), tangents[0]))
        return own

    wanted = near(3, *x, "dense")
    for make in (
        lambda n: Model(n, jnp.ones((1, 9)) * n).near,
        recursive,
        custom,
        lambda n: jax.jit(lambda i, j: abs(i - j) < n),
        lambda n: lambda i, j: masks.Window(n - 1, n - 1)(i, j),
        lambda n: functools.wraps(jnp.add)(functools.partial(lambda n, i, j: abs(i - j) < n, n)),
    ):
        got = quick(lambda n, make=make: jattn.attention(*x, mask=masks.Function(make(n)), implementation="dense"), 3)
        assert_close(got, wanted, 1e-5)


def test_only_what_a_function_computes_with_is_an_operand():
    x = draw()

    class Model:
        def __init__(self, weights, slope):
            self.weights, self.slope = weights, slope

        def bias(self, s, i, j, _):
            return s - self.slope * abs(i - j).astype(s.dtype)

    def loss(weights, slope):
        return jattn.attention(*x, scores=(scores.Function(Model(weights, slope).bias),)).sum()

    program = jax.make_jaxpr(loss)(jnp.ones((77, 77)), 0.5)
    (call,) = (equation for equation in program.eqns if equation.primitive.name == "jattn_attention")
    assert not [v for v in call.invars if 77 in v.aval.shape]
    gradient = jax.grad(loss, (0, 1))(jnp.ones((77, 77)), 0.5)
    assert not gradient[0].any() and gradient[1] != 0


class Scaled(scores.Modifier):
    """A modifier of one's own: an array, and a function that closes over what it likes."""

    f: object
    table: object
    axes: ClassVar = {"table": "NTS"}

    def __call__(self, score, q_pos, kv_pos):
        assert self.table.ndim == score.ndim, "an axis of 1 is an axis"
        return self.f(score, q_pos, kv_pos) + self.table


@both
def test_values_of_ones_own_classes_that_close_over_tracers(implementation):
    x, table = draw(), jnp.ones((1, 1, 1))

    def held(a, table):
        own = Scaled(lambda s, i, j: s * a - 0.1 * a * abs(i - j).astype(s.dtype), table)
        return jattn.attention(*x, scores=(own,), implementation=implementation)

    def within(a, table):
        class Within(scores.Modifier):
            def __call__(self, score, q_pos, kv_pos):
                return score * a - 0.1 * a * abs(q_pos - kv_pos).astype(score.dtype) + table.sum()

        return jattn.attention(*x, scores=(Within(),), implementation=implementation)

    def near_class(n):
        class Near(masks.Mask):
            def __call__(self, q_pos, kv_pos):
                return abs(q_pos - kv_pos) < n

        return jattn.attention(*x, mask=Near() & masks.Full(), implementation=implementation)

    wanted = cooled(0.7, *x, "dense")
    gradient = jax.grad(lambda a: jnp.sin(cooled(a, *x, "dense")).sum())(0.7)
    for f in (held, within):
        assert_close(jax.jit(f)(0.7, table), wanted, 1e-5)
        assert_close(jax.grad(lambda a, f=f: jnp.sin(f(a, table)).sum())(0.7), gradient, 1e-4)
    assert_close(jax.jit(near_class)(3), near(3, *x, "dense"), 1e-5)


def test_an_array_that_its_class_does_not_declare():
    class Own(scores.Modifier):
        array: object

        def __call__(self, score, q_pos, kv_pos):
            return score * self.array

    with pytest.raises(TypeError, match=r"Own.array holds an array, .* `axes`.* `payload`.* got float32\[\]"):
        jattn.attention(*draw(), scores=(Own(jnp.float32(2)),))


@both
def test_a_function_may_ask_for_the_name_of_an_axis_of_vmap(implementation):
    x = [jnp.stack([a, a, a]) for a in draw()]

    def f(q, k, v):
        farther = masks.Function(lambda i, j: abs(i - j) <= jax.lax.axis_index("example"))
        return jattn.attention(q, k, v, mask=farther, implementation=implementation)

    def both_derivatives(*x):
        return jax.jvp(jax.grad(lambda q: jnp.sin(f(q, *x[1:])).sum()), x[:1], x[:1])

    def plain(n, q, k, v):
        return jnp.sin(near(n, q, k, v, "dense")).sum()

    wanted = jnp.stack([near(n, *[a[n - 1] for a in x], "dense") for n in (1, 2, 3)])
    assert_close(jax.vmap(f, axis_name="example")(*x), wanted, 1e-5)
    derivatives = jax.jit(jax.vmap(both_derivatives, axis_name="example"))(*x)
    wanted = [
        jax.jvp(jax.grad(lambda q, n=n: plain(n, q, *[a[n - 1] for a in x[1:]])), [x[0][n - 1]], [x[0][n - 1]])
        for n in (1, 2, 3)
    ]
    assert_close(derivatives, jax.tree.map(lambda *each: jnp.stack(each), *wanted), 1e-4)
    alone = jax.vmap(lambda: f(*[a[0] for a in x]), axis_name="example", axis_size=3)()
    assert_close(alone, jnp.stack([near(n, *[a[0] for a in x], "dense") for n in (1, 2, 3)]), 1e-5)


def test_what_a_function_returns_is_checked_when_it_is_called():
    x = draw()
    for options, says in (
        (dict(mask=masks.Function(lambda i, j: i - j)), "booleans"),
        (dict(scores=(scores.Function(lambda s, i, j, _: s.astype(jnp.bfloat16)),)), "as they came"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            jax.eval_shape(lambda q, options=options: jattn.attention(q, *x[1:], **options), x[0])
