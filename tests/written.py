"""A program as it is written down: attention is one operation to JAX, and here it is opened."""

import jax
from jax.extend.core import jaxprs_in_params

from jattn.autodiff import attention_p


def equations(f, *args):
    """Every equation of f(*args), of inner programs too, and of what attention becomes where it is called."""
    return list(_within(jax.make_jaxpr(f)(*args).jaxpr))


def _within(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        inner = jaxprs_in_params(eqn.params)
        if eqn.primitive is attention_p:
            inner = [_opened(eqn)]
        for one in inner:
            yield from _within(one)


def _opened(eqn):
    function = eqn.params["operation"]
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    return jax.make_jaxpr(lambda *args: function(function.where, args))(*avals).jaxpr
