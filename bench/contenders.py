"""Who takes part: a table from a name to `build(case, data) -> Built`, which raises Unsupported where it cannot.

Peers are imported when they are built, so that the bench runs with whatever is installed.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from bench.cases import CAP, DTYPES, WINDOW, Setting
from tests import cases as table

GIB = 2**30
Data = dict[str, np.ndarray]


class Unsupported(Exception):
    """This contender cannot do this case, or not on this machine; the message says why."""


class Built(NamedTuple):
    """A contender made ready for one case."""

    place: Callable[[Data], Any]  # numbers -> operands, on the device, in the contender's own layout
    call: Callable[[Any], Any]  # operands -> outputs, which are there when it returns
    fetch: Callable[[Any], list[np.ndarray]]  # outputs -> NumPy, in the public layout
    compile_s: float | None = None
    temp_bytes: int | None = None


def _optional(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as reason:
        raise Unsupported(f"{module.partition('.')[0]} is not installed ({reason})") from None


# --- JAX: an attention function (case, q, k, v, operands) -> out is all that differs ---


def _jattn(case, q, k, v, data, *, implementation):
    if implementation is None and case.head_major:
        implementation = "dense"  # as the docstring of attention says to such callers
    return jattn.attention(q, k, v, **_jattn_options(case, data), implementation=implementation)


def _jattn_layer(case, x, data, *, implementation):
    params = jattn.Params(data["wq"], data["wk"], data["wv"], data["wo"])
    return jattn.attend(params, x, **_jattn_options(case, data), implementation=implementation)


def _jattn_options(case: Setting, data: Any) -> dict[str, Any]:
    """What the tests' table gives jattn, round arrays that are operands."""
    problem, ids = case.problem, data.get("segments")
    mask = table.build_mask(problem, {} if ids is None else {"q": ids, "kv": ids})
    scores = table.build_scores(
        problem, {name: {"array": data[name]} if name in data else {} for name in problem.scores}
    )
    return {"mask": mask, "scores": scores, "q_offset": problem.q_offset}


def _jax_nn(case, q, k, v, data, *, implementation):
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise Unsupported(f"cuDNN needs a GPU, here is {jax.default_backend()}")
    return jax.nn.dot_product_attention(q, k, v, **_peer_options(case, data), implementation=implementation)


def _tokamax(case, q, k, v, data):
    options = _peer_options(case, data, soft_cap=True)
    return _optional("tokamax").dot_product_attention(q, k, v, **options, implementation="xla_chunked")


def _peer_options(case: Setting, data: Any, soft_cap: bool = False) -> dict[str, Any]:
    """The case in the words of `jax.nn.dot_product_attention`."""
    if case.mask == "causal" and not case.decoding:
        return {"is_causal": True}
    if case.mask == "causal":  # is_causal counts from the first key
        allowed = np.arange(case.S)[None] <= np.arange(case.S - case.T, case.S)[:, None]
        return {"mask": jnp.asarray(allowed[None, None])}
    if case.mask == "window" and not case.decoding:
        return {"is_causal": True, "local_window_size": (WINDOW - 1, 0)}
    if case.mask == "segments":
        ids = data["segments"]
        return {"mask": (ids[..., :, None] == ids[..., None, :])[..., None, :, :]}
    if case.mask == "bias":
        return {"bias": data["bias"][None, None]}
    if case.mask == "softcap" and soft_cap:
        return {"logits_soft_cap": CAP}
    if case.mask != "full":
        raise Unsupported(f"has no {case.mask}" + " for decoding" * case.decoding)
    return {}


def _plain_layer(case, x, data, *, attention):
    """The projections as anybody writes them, round a peer's attention."""
    q, k, v = (jnp.einsum("...td,dnh->...tnh", x, data[w]) for w in ("wq", "wk", "wv"))
    return jnp.einsum("...tnh,nhe->...te", attention(case, q, k, v, data), data["wo"])


def _work(case: Setting, attention: Callable, layer: Callable) -> Callable:
    """The function of the operands that a case asks for."""

    def attend(data):
        def f(q, k, v):
            if case.head_major:
                k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))
            return attention(case, q, k, v, data)

        return f

    def primals(data):
        return data["q"], data["k"], data["v"]

    def tangents(data):
        return data["dq"], data["dk"], data["dv"]

    def per_example(data):
        return {name: data[name] for name in ("x", "segments") if name in data}

    def grad(data):
        return lambda *x: jax.vjp(attend(data), *x)[1](data["cot"])

    return {
        "forward": lambda data: attend(data)(*primals(data)),
        "grad": lambda data: grad(data)(*primals(data)),
        "jvp": lambda data: jax.jvp(attend(data), primals(data), tangents(data)),
        "hvp": lambda data: jax.jvp(grad(data), primals(data), tangents(data)),
        "layer": lambda data: layer(case, data["x"], data),
        "layer-vmap": lambda data: jax.vmap(lambda one: layer(case, one["x"], data | one))(per_example(data)),
    }[case.work]


def _in_jax(attention: Callable, layer: Callable | None = None) -> Callable[[Setting, Data], Built]:
    layer = layer or functools.partial(_plain_layer, attention=attention)

    def build(case: Setting, data: Data) -> Built:
        function = jax.jit(_work(case, attention, layer))
        operands = place(case, data)
        start = time.perf_counter()
        compiled = function.lower(operands).compile()  # the call of `function` finds it, and is faster than its own
        compile_s = time.perf_counter() - start
        analysis = compiled.memory_analysis()
        temp = None if analysis is None else int(analysis.temp_size_in_bytes)
        if temp is not None and temp > memory_bytes() / 2:
            raise Unsupported(f"would take {temp / GIB:.0f} GiB of temporary memory")

        def call(operands):
            return jax.block_until_ready(function(operands))

        return Built(functools.partial(place, case), call, fetch, compile_s, temp)

    def place(case: Setting, data: Data) -> dict[str, jax.Array]:
        if case.head_major:
            data = data | {name: np.swapaxes(data[name], 1, 2) for name in ("k", "v")}
        return {name: jax.device_put(np.ascontiguousarray(array)) for name, array in data.items()}

    def fetch(outputs: Any) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(outputs)]

    return build


def memory_bytes() -> int:
    """Memory of the device, or of the machine where the device has none of its own."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- PyTorch, in its own layout [B, N, T, H] ---


def _torch() -> tuple[Any, str]:
    torch = _optional("torch")
    if jax.default_backend() == "gpu":
        if not torch.cuda.is_available():
            raise Unsupported("this torch has no CUDA")
        return torch, "cuda"
    torch.set_num_threads(os.cpu_count() or 1)
    return torch, "cpu"


def _torch_built(case: Setting, call: Callable, compile_s: float | None = None) -> Built:
    torch, device = _torch()
    is_layer = case.work.startswith("layer")

    def place(data: Data) -> dict[str, Any]:
        operands = {}
        for name, array in data.items():
            if array.ndim == 4:
                array = np.swapaxes(array, 1, 2)
            if name in ("wq", "wk", "wv"):
                array = array.reshape(array.shape[0], -1).T
            if name == "wo":
                array = data[name].reshape(-1, data[name].shape[-1]).T
            tensor = torch.from_numpy(np.ascontiguousarray(array, np.int32 if name == "segments" else np.float32))
            operands[name] = tensor if name == "segments" else tensor.to(getattr(torch, DTYPES[case.dtype].name))
            operands[name] = operands[name].to(device).requires_grad_(case.work == "grad" and name in ("q", "k", "v"))
        return operands

    def finished(operands: Any) -> Any:
        outputs = call(operands)
        if device == "cuda":
            torch.cuda.synchronize()
        return outputs

    def fetch(outputs: Any) -> list[np.ndarray]:
        leaves = [outputs] if torch.is_tensor(outputs) else jax.tree.leaves(outputs)
        arrays = [leaf.detach().float().cpu().numpy().astype(DTYPES[case.dtype]) for leaf in leaves]
        return arrays if is_layer else [np.swapaxes(a, 1, 2) for a in arrays]

    return Built(place, finished, fetch, compile_s)


def _torch_sdpa(case: Setting, data: Data) -> Built:
    torch, device = _torch()
    F = torch.nn.functional
    options: dict[str, Any] = {"is_causal": case.mask == "causal" and not case.decoding, "enable_gqa": case.K < case.N}
    if case.mask == "softcap":
        raise Unsupported("has no softcap")
    if case.mask in ("window", "segments") or (case.mask == "causal" and case.decoding):
        options["attn_mask"] = _dense_mask(case, data, torch).to(device)
    pairs = case.B * case.N * case.T * case.S
    if case.work in ("jvp", "hvp") and pairs > memory_bytes() / 64:  # about eight dense arrays of float32
        raise Unsupported("its math backend, the only one with forward derivatives, would take too much memory")

    def attend(data):
        bias = {"attn_mask": data["bias"]} if case.mask == "bias" else {}
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options, **bias)

    def forward(data):
        with torch.inference_mode():
            return attend(data)(data["q"], data["k"], data["v"])

    def grad(data):
        x = data["q"], data["k"], data["v"]
        return torch.autograd.grad(attend(data)(*x), x, data["cot"])

    def tangent(data):
        x, u = (tuple(data[prefix + name] for name in "qkv") for prefix in ("", "d"))
        f = attend(data)
        if case.work == "hvp":
            f = lambda *x: torch.func.vjp(attend(data), *x)[1](data["cot"])  # noqa: E731
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.jvp(f, x, u)

    def layer(data):
        def heads(w):
            return F.linear(data["x"], data[w]).unflatten(-1, (-1, case.H)).transpose(1, 2)

        with torch.inference_mode():
            out = attend(data)(heads("wq"), heads("wk"), heads("wv"))
            return F.linear(out.transpose(1, 2).flatten(2), data["wo"])

    if case.work == "layer-vmap":
        raise Unsupported("batches by itself: see the layer")
    works = {"forward": forward, "grad": grad, "jvp": tangent, "hvp": tangent, "layer": layer}
    return _torch_built(case, works[case.work])


def _dense_mask(case: Setting, data: Data, torch: Any) -> Any:
    """[T, S] of booleans, which is how SDPA takes what it has no word for."""
    if case.T * case.S > 2**28:
        raise Unsupported(f"would need a mask of {case.T} x {case.S}")
    q, k = torch.arange(case.S - case.T, case.S)[:, None], torch.arange(case.S)[None]
    if case.mask == "segments":
        ids = torch.from_numpy(data["segments"][0])
        return ids[:, None] == ids[None]
    return (k <= q) & (k > q - (WINDOW if case.mask == "window" else case.S))


def _torch_flex(case: Setting, data: Data) -> Built:
    torch, device = _torch()
    flex = _optional("torch.nn.attention.flex_attention")
    if case.work != "forward" or case.decoding or case.dtype != "f32" or case.mask == "bias":
        raise Unsupported("is taken for float32 forward without bias only: on a CPU it has no backward")
    if case.mask in ("full", "causal") and case.T < 4096:
        raise Unsupported("is the same kernel as SDPA here, and takes long to compile")
    if case.T * case.S > 2**28:
        raise Unsupported("makes its block mask from a dense one")
    ids = torch.from_numpy(data["segments"][0]).to(device) if "segments" in data else None
    predicate = {
        "causal": lambda b, h, q, k: k <= q,
        "window": lambda b, h, q, k: (k <= q) & (k > q - WINDOW),
        "segments": lambda b, h, q, k: ids[q] == ids[k],
    }.get(case.mask)
    options: dict[str, Any] = {"enable_gqa": case.K < case.N}
    if predicate:
        options["block_mask"] = flex.create_block_mask(predicate, None, None, case.T, case.S, device=device)
    if case.mask == "softcap":
        options["score_mod"] = lambda score, b, h, q, k: CAP * torch.tanh(score / CAP)
    torch._dynamo.reset()
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def forward(data):
        with torch.no_grad():
            return compiled(data["q"], data["k"], data["v"], **options)

    built = _torch_built(case, forward)
    start = time.perf_counter()
    built.call(built.place(data))
    return built._replace(compile_s=time.perf_counter() - start)


# --- NumPy, as in the notebook ---


def _numpy(case: Setting, data: Data) -> Built:
    """The notebook's steps, head after head; its softmax overflows, so the row's maximum is taken off first."""
    if case.work != "forward" or case.mask not in ("full", "causal") or case.dtype != "f32":
        raise Unsupported("is the notebook's: float32 forward, full or causal")
    if case.B * case.N * case.T * case.S > 2**23:
        raise Unsupported("would take long")

    def softmax(scores):
        exp = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return exp / exp.sum(axis=-1, keepdims=True)

    def attend(q, k, v):
        scores = q @ k.T / np.float32(np.sqrt(case.H))
        if case.mask == "causal":
            scores = np.where(np.tri(case.T, case.S, case.S - case.T, dtype=bool), scores, -np.inf)
        return softmax(scores) @ v

    def attention(data):
        out, group = np.empty_like(data["q"]), case.N // case.K
        for b, n in np.ndindex(case.B, case.N):
            out[b, :, n] = attend(data["q"][b, :, n], data["k"][b, :, n // group], data["v"][b, :, n // group])
        return out

    return Built(lambda data: data, attention, lambda out: [out])


def _jattn_contender(implementation: str | None) -> Callable[[Setting, Data], Built]:
    bound = functools.partial(_jattn, implementation=implementation)
    return _in_jax(bound, functools.partial(_jattn_layer, implementation=implementation))


CONTENDERS: dict[str, Callable[[Setting, Data], Built]] = {
    "jattn": _jattn_contender(None),
    "jattn dense": _jattn_contender("dense"),
    "jattn blockwise": _jattn_contender("blockwise"),
    "jax.nn": _in_jax(functools.partial(_jax_nn, implementation="xla")),
    "jax.nn cudnn": _in_jax(functools.partial(_jax_nn, implementation="cudnn")),
    "tokamax": _in_jax(_tokamax),
    "torch": _torch_sdpa,
    "torch flex": _torch_flex,
    "numpy": _numpy,
}
SLOW_TO_COMPILE = ("torch flex",)  # half a minute for the first, which --quick has no time for
