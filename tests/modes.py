"""Every way to differentiate and transform attention, as functions of (f, args, tangents) that return arrays.

    f(q, k, v, arrays) -> (out, lse)         arrays: a pytree of whatever else can be differentiated

A mode feels both outputs; a row without keys, whose lse is -inf, contributes nothing to a loss.
"""

import functools

import jax
import jax.numpy as jnp

ALL = (0, 1, 2, 3)


def wide(dtype):
    """The dtype of sums over numbers of a dtype."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def features(f):
    """A vector [V] that feels every element of out and every finite one of lse."""

    def of(*args):
        out, lse = f(*args)
        lse = jnp.where(jnp.isneginf(lse), 0, lse)
        out = out.astype(lse.dtype)
        return jnp.sin(out + 0.3).sum(range(out.ndim - 1)) + jnp.sin(lse).sum()

    return of


def loss(f):
    return lambda *args: features(f)(*args).sum()


def layer(f):
    """f as a map of q to q, whose value may be of another width than q."""

    def step(q, *rest):
        out, lse = f(q, *rest)
        lse = jnp.where(jnp.isneginf(lse), 0, lse)
        change = jnp.sin(out.astype(lse.dtype)).sum(-1) + 0.1 * lse
        return q + 0.5 * change[..., None].astype(q.dtype)

    return step


def stack(tree, tangents, axis=0):
    """Three neighbours of a pytree, stacked along an axis (the last where a leaf has fewer), and where that is."""
    axes = jax.tree.map(lambda x: min(axis, jnp.ndim(x)), tree)
    return jax.tree.map(lambda x, dx, a: jnp.stack([x, x + dx, x - dx], axis=a), tree, tangents, axes), axes


def forward(f, x, dx):
    return f(*x)


def grad(f, x, dx):
    return jax.grad(loss(f), ALL)(*x)


def jvp(f, x, dx):
    return jax.jvp(f, x, dx)[1]


def linearize(f, x, dx):
    return jax.linearize(f, *x)[1](*dx)


def jacfwd(f, x, dx):
    def along(c):
        def move(a, da, c):
            return a + (c * da.astype(c.dtype)).astype(a.dtype)

        return features(f)(*(jax.tree.map(functools.partial(move, c=c[i]), x[i], dx[i]) for i in ALL))

    return jax.jacfwd(along)(jnp.zeros(4, wide(x[0].dtype)))


def jacrev(f, x, dx):
    return jax.jacrev(features(f), ALL)(*x)


def vmap_grad(f, x, dx):
    return jax.vmap(jax.grad(loss(f), ALL))(*stack(x, dx)[0])


def vmap_jvp(f, x, dx):
    several = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), dx)
    return jax.vmap(lambda d: jax.jvp(f, x, d)[1])(several)


def vmap_vjp(f, x, dx):
    y, pull = jax.vjp(lambda *args: f(*args)[0], *x)
    return jax.vmap(pull)(jnp.stack([jnp.ones_like(y), y, y * y]))


def vmap_alone(index, axis, f, x, dx):
    """vmap over one argument, along one axis; the others are shared."""
    if not jax.tree.leaves(x[index]):
        return f(*x)
    several, axes = stack(x[index], dx[index], axis)
    in_axes = tuple(axes if i == index else None for i in ALL)
    return jax.vmap(f, in_axes)(*x[:index], several, *x[index + 1 :])


def vmap_nested(f, x, dx):
    (q, q_axis), (k, k_axis), (v, v_axis) = (stack(x[i], dx[i], axis) for i, axis in ((0, 1), (1, 0), (2, -1)))
    inner = jax.vmap(jax.grad(loss(f), ALL), (None, k_axis, v_axis, None))
    return jax.vmap(inner, (q_axis, None, None, None), out_axes=1)(q, k, v, x[3])


def hvp_forward_over_reverse(f, x, dx):
    return jax.jvp(jax.grad(loss(f), ALL), x, dx)[1]


def hvp_reverse_over_reverse(f, x, dx):
    def slope(*args):
        pairs = zip(jax.tree.leaves(jax.grad(loss(f), ALL)(*args)), jax.tree.leaves(dx), strict=True)
        return sum((g.astype(wide(g.dtype)) * d.astype(wide(d.dtype))).sum() for g, d in pairs)

    return jax.grad(slope, ALL)(*x)


def hvp_reverse_over_forward(f, x, dx):
    return jax.grad(lambda *args: jax.jvp(loss(f), args, dx)[1], ALL)(*x)


def hvp_forward_over_forward(f, x, dx):
    return jax.jvp(lambda *args: jax.jvp(features(f), args, dx)[1], x, dx)[1]


def hvp_of_scan(f, x, dx):
    """Of no family: in it JAX before 0.12 differentiates forwards themselves, without the rules they come with."""

    def scanned(q, *rest):
        return jax.lax.scan(lambda _, shift: (None, f(q + shift, *rest)), None, jnp.asarray([0, 0.5], q.dtype))[1]

    return hvp_reverse_over_reverse(scanned, x, dx)


def third_order(f, x, dx):
    return jax.jvp(lambda *args: hvp_forward_over_reverse(f, args, dx), x, dx)[1]


def remat(policy, f, x, dx):
    return jax.grad(loss(jax.checkpoint(f, policy=policy)), ALL)(*x)


def _scanned(f, wrap=lambda step: step):
    def net(q, *rest):
        step = wrap(lambda h, _: (layer(f)(h, *rest), None))
        return jnp.sin(jax.lax.scan(step, q, None, length=3)[0].astype(wide(q.dtype))).sum()

    return net


def scan_grad(f, x, dx):
    return jax.grad(_scanned(f), ALL)(*x)


def scan_remat_hvp(f, x, dx):
    return jax.jvp(jax.grad(_scanned(f, functools.partial(jax.checkpoint, prevent_cse=False)), ALL), x, dx)[1]


def while_jvp(f, x, dx):
    def net(*args):
        def step(state):
            return state[0] + 1, layer(f)(state[1], *args[1:])

        return jax.lax.while_loop(lambda state: state[0] < 2, step, (0, args[0]))[1]

    return jax.jvp(net, x, dx)


FAMILIES = {
    "forward": {
        "forward": forward,
        # Every axis of every argument: test_d1_vmap_over_each_argument_alone.
        "vmap_q": functools.partial(vmap_alone, 0, 1),
        "vmap_k": functools.partial(vmap_alone, 1, -1),
        "vmap_v": functools.partial(vmap_alone, 2, 0),
        "vmap_arrays": functools.partial(vmap_alone, 3, 1),
    },
    "forward_mode": {
        "jvp": jvp,
        "linearize": linearize,
        "jacfwd": jacfwd,
        "vmap_jvp": vmap_jvp,
        "while_jvp": while_jvp,
    },
    "reverse_mode": {
        "grad": grad,
        "jacrev": jacrev,
        "vmap_grad": vmap_grad,
        "vmap_vjp": vmap_vjp,
        "vmap_nested": vmap_nested,
    },
    "recomputed": {
        "remat": functools.partial(remat, None),
        "remat_dots": functools.partial(remat, jax.checkpoint_policies.dots_saveable),
        "scan_grad": scan_grad,
    },
    "second_order": {
        "hvp_forward_over_reverse": hvp_forward_over_reverse,
        "hvp_reverse_over_reverse": hvp_reverse_over_reverse,
        "hvp_reverse_over_forward": hvp_reverse_over_forward,
        "hvp_forward_over_forward": hvp_forward_over_forward,
    },
    "further": {"third_order": third_order, "scan_remat_hvp": scan_remat_hvp},
}
MODES = {name: mode for family in FAMILIES.values() for name, mode in family.items()}
