"""Rotary positions: queries and keys are turned by angles that grow with their positions.

    y_i = f (x_i cos(p w_i) - x_j sin(p w_i)),   y_j = f (x_i sin(p w_i) + x_j cos(p w_i))

for each pair (i, j) of a head's numbers, at position p. The product of a query and a key then depends on how far apart
they are, and not on where. Su et al., 2021 (arXiv:2104.09864).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jattn import checks
from jattn.values import Value

_PI = np.longdouble("3.14159265358979323846264338327950288")  # of a position of 2^31 the last bits of a turn count
# Whose pairs are neighbours, and whose are halves apart, among models whose configurations do not say.
_INTERLEAVED = {"gptj", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "glm", "glm4"}
_HALVES = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_vl", "qwen2_5_vl", "qwen2_moe", "qwen3", "qwen3_moe", "gemma"),
    *("gemma2", "gemma3", "gemma3_text", "olmo", "olmo2", "olmo3", "phi", "phi3", "gpt_neox", "gpt_oss", "stablelm"),
    *("starcoder2", "falcon", "granite", "persimmon", "smollm3"),
}
# The fields of each kind of scaling: those that it must have, and those that it may have.
_FIELDS = {
    "default": ((), ("mrope_section",)),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"),
            *("mscale_all_dim", "truncate"),
        ),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "attention_factor", "original_max_position_embeddings"),
    ),
}
_SYNONYMS = {"su": "longrope", "mrope": "default"}


class Rotary(Value):
    """Turns pairs of numbers of queries and keys by their positions.

        w_i = theta^(-2 i / width),   i = 0 ... width / 2 - 1

    Methods scale the frequencies for longer contexts, as in `Rotary(128, theta=5e5).llama3(8.0)`; `from_config` reads
    what the configurations of models carry. All of it is static. Angles are right to 1e-6 at every int32 position.
    Su et al., 2021 (arXiv:2104.09864).

    Args:
      width: how many of the first numbers of each head are turned, even; the others stay.
      theta: the base of the frequencies.
      interleaved: whether pairs are neighbours, (0, 1), (2, 3), ..., as in the paper, Meta's Llama and GPT-J. Otherwise
        they are (i, i + width / 2), as in Hugging Face's Llama and in NeoX.
      sections: how many of the frequencies belong to each of several kinds of position, such as time, height and width
        in Qwen2-VL; positions are `[..., T, kinds]` then.
      frequencies: w, in radians for each position, in place of those that theta gives.
      factor: f, what cosines and sines are multiplied by.
    """

    width: int
    theta: float = 10000.0
    interleaved: bool = False
    sections: tuple[int, ...] | None = None
    frequencies: tuple[float, ...] | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 2 or self.width % 2:
            raise ValueError(f"Rotary width must be an even int, at least 2, got {self.width!r}")
        for name in ("theta", "factor"):
            _positive(f"Rotary {name}", getattr(self, name))
        if not isinstance(self.interleaved, bool):
            raise TypeError(f"Rotary interleaved must be a bool, got {self.interleaved!r}")
        for name in ("sections", "frequencies"):
            given = getattr(self, name)
            if given is not None:
                self._set(**{name: tuple(given)})
        if self.sections is not None and sum(self.sections) != self.width // 2:
            raise ValueError(f"Rotary sections must have width / 2 = {self.width // 2} in all, got {self.sections}")
        if self.frequencies is not None and len(self.frequencies) != self.width // 2:
            raise ValueError(f"Rotary frequencies must be width / 2 = {self.width // 2}, got {len(self.frequencies)}")

    def __call__(self, x: ArrayLike, positions: ArrayLike | None = None) -> jax.Array:
        """Returns queries or keys turned by their positions.

        Args:
          x: `[..., T, N, H]`, real floating, H at least the width.
          positions: int `[..., T]`, or `[..., T, kinds]` with sections; leading dims broadcast. None: 0, 1, ...

        Returns:
          `[..., T, N, H]` in the dtype of `x`, computed in float32 or wider.

        Raises:
          ValueError: shapes that do not agree. TypeError: dtypes that are not real floating and integer.
        """
        x = checks.floating("x", x)
        checks.rank("x", x, "..., T, N, H")
        if x.shape[-1] < self.width:
            raise ValueError(f"x must be [..., T, N, H] with H at least the width {self.width}, got shape {x.shape}")
        wide = checks.wide(x)
        angles = self._angles(self._checked(positions, x), wide)[..., None, :]
        cos, sin = (f(angles) * jnp.asarray(self.factor, wide) for f in (jnp.cos, jnp.sin))
        turned, rest = x[..., : self.width].astype(wide), x[..., self.width :]
        pairs = turned.reshape((*x.shape[:-1], -1, 2)) if self.interleaved else None
        a, b = jnp.split(turned, 2, axis=-1) if pairs is None else (pairs[..., 0], pairs[..., 1])
        both = a * cos - b * sin, a * sin + b * cos
        y = jnp.concatenate(both, -1) if pairs is None else jnp.stack(both, -1).reshape(turned.shape)
        return jnp.concatenate((y.astype(x.dtype), rest), -1)

    def linear(self, factor: float) -> "Rotary":
        """Returns it with positions that are a factor closer: w / factor. Chen et al., 2023 (arXiv:2306.15595)."""
        return self._with(self._plain() / _positive("factor", factor))

    def ntk(self, factor: float) -> "Rotary":
        """Returns it with a greater base: theta factor^(width / (width - 2)), so that only slow turns are slower."""
        if self.width < 4:
            raise ValueError(f"Rotary.ntk needs a width of at least 4, got {self.width}")
        theta = self.theta * _positive("factor", factor) ** (self.width / (self.width - 2))
        return self._with(self.replace(theta=theta)._plain())

    def dynamic(self, factor: float, *, original: int, length: int) -> "Rotary":
        """Returns it for a length: `ntk(factor n / original - (factor - 1))`, n = max(length, original).

        Keys turned for one length do not go with queries turned for another: with a cache, choose the greatest.

        Args:
          factor: how much longer a text may be. original: the length in training.
          length: the greatest position that will be asked for, plus 1.
        """
        return self.ntk(factor * max(length, original) / original - (factor - 1))

    def yarn(
        self,
        factor: float,
        *,
        original: int,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        truncate: bool = True,
    ) -> "Rotary":
        """Returns it with slow turns made slower, fast ones left, and a ramp between them.

            w_i' = w_i (1 - ramp_i) + w_i / factor ramp_i,   ramp_i = clip((i - low) / (high - low), 0, 1)

        low and high are the pairs that turn `beta_fast` and `beta_slow` times in the original length. Peng et al., 2023
        (arXiv:2309.00071).

        Args:
          factor: how much longer a text may be. original: the length in training.
          beta_fast, beta_slow: turns, see above.
          attention_factor: f. None: 1 + ln(factor) / 10, or 1 for factors up to 1.
          truncate: whether low and high are rounded outwards to whole pairs.
        """
        w, R = self._plain(), self.width

        def pair(turns: float) -> float:
            return R * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair(beta_fast), pair(beta_slow)
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, R - 1)
        ramp = np.clip((np.arange(R // 2) - low) / (high - low if high != low else 0.001), 0, 1)
        f = _mscale(_positive("factor", factor), 1.0) if attention_factor is None else attention_factor
        return self._with(w * (1 - ramp) + w / factor * ramp, f)

    def llama3(
        self, factor: float, *, low_freq_factor: float = 1.0, high_freq_factor: float = 4.0, original: int = 8192
    ) -> "Rotary":
        """Returns it scaled as Llama 3.1 is: by how often a pair turns in the original length.

            w_i' = w_i s_i + w_i / factor (1 - s_i),   s_i = clip((original w_i / 2π - low) / (high - low), 0, 1)

        Args:
          factor: how much longer a text may be.
          low_freq_factor, high_freq_factor: low and high, in turns. original: the length in training.
        """
        w = self._plain()
        turns = original * w / (2 * math.pi)
        s = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
        return self._with(w * s + w / _positive("factor", factor) * (1 - s))

    def longrope(
        self,
        short_factor: Sequence[float],
        long_factor: Sequence[float],
        *,
        original: int,
        length: int,
        factor: float,
        attention_factor: float | None = None,
    ) -> "Rotary":
        """Returns it with each frequency divided by its own factor. Ding et al., 2024 (arXiv:2402.13753).

        Args:
          short_factor, long_factor: `width / 2` numbers each, for texts up to the original length and for longer ones.
          original: the length in training.
          length: the greatest position that will be asked for, plus 1; with a cache, the greatest ever.
          factor: how much longer a text may be.
          attention_factor: f. None: sqrt(1 + ln(factor) / ln(original)), or 1 for factors up to 1.
        """
        each = np.asarray(long_factor if length > original else short_factor, np.float64)
        if each.shape != (self.width // 2,):
            raise ValueError(f"longrope factors must be width / 2 = {self.width // 2} each, got {each.size}")
        if attention_factor is None:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return self._with(self._plain() / each, attention_factor)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        interleaved: bool | None = None,
        layer: str | None = None,
        length: int | None = None,
    ) -> "Rotary":
        """Makes one from the configuration of a model, as Hugging Face writes them, old fields and new ones.

        Args:
          config: the whole dictionary. What scales its frequencies must be known, field by field.
          interleaved: which pairs. None: as the configuration says, or as its `model_type` is known to do.
          layer: "full_attention" or "sliding_attention", for models in which they differ.
          length: the greatest position that will be asked for, plus 1, for scalings that go by it.

        Raises:
          ValueError: a kind of scaling, or a field of it, that is not known, and one that is missing; a `model_type`
            whose pairs are not known.
        """
        scaling = _scaling(config, layer)
        kind = str(scaling.pop("rope_type", scaling.pop("type", "default")))
        scaling.pop("type", None)
        kind = _SYNONYMS.get(kind, kind)
        theta = scaling.pop("rope_theta", None) or _theta(config, layer)
        plain = cls(
            _width(config, scaling.pop("partial_rotary_factor", None)),
            float(theta),
            _is_interleaved(config) if interleaved is None else interleaved,
            sections=tuple(scaling["mrope_section"]) if scaling.get("mrope_section") else None,
        )
        if kind not in _FIELDS:
            raise ValueError(f"rope_type must be one of {sorted(_FIELDS)}, got {kind!r}")
        needed, known = _FIELDS[kind]
        missing, more = set(needed) - set(scaling), set(scaling) - {*needed, *known}
        if missing or more:
            raise ValueError(f"the {kind} scaling lacks {sorted(missing)} and has what is not known: {sorted(more)}")
        return _scaled(plain, kind, scaling, config, length)

    def _plain(self) -> np.ndarray:
        """The frequencies that theta gives; ValueError if there are others."""
        if self.frequencies is not None:
            raise ValueError("these frequencies are scaled or given already: scale those of theta, and once")
        return np.asarray(self.theta ** (-np.arange(0, self.width, 2, dtype=np.float64) / self.width))

    def _with(self, w: np.ndarray, factor: float = 1.0) -> "Rotary":
        return self.replace(frequencies=tuple(map(float, w)), factor=self.factor * factor)

    def _checked(self, positions: ArrayLike | None, x: jax.Array) -> jax.Array:
        """Positions `[..., T]`, or `[..., T, kinds]`, with as many leading dims as `x` has or fewer."""
        T, kinds = x.shape[-3], self.sections and len(self.sections)
        own = (T,) if kinds is None else (T, kinds)
        if positions is None:
            steps = np.arange(T, dtype=np.int32)
            positions = steps if kinds is None else np.repeat(steps[:, None], kinds, 1)
        array = checks.integer("positions", positions)
        lead = array.shape[: max(array.ndim - len(own), 0)]
        batch = x.shape[:-3][len(x.shape) - 3 - len(lead) :]
        fits = len(lead) <= x.ndim - 3 and all(n in (1, b) for n, b in zip(lead, batch, strict=True))
        if array.shape[len(lead) :] != own or not fits:
            spelled = "..., T" if kinds is None else f"..., T, {kinds}"
            raise ValueError(
                f"positions must be [{spelled}] with T={T} and ...={x.shape[:-3]}, got shape {array.shape}"
            )
        return array.reshape((*(1,) * (x.ndim - 3 - len(lead)), *array.shape))

    def _angles(self, positions: jax.Array, wide: Any) -> jax.Array:
        """Angles `[..., T, width / 2]`, each less than a turn."""
        w = self._plain() if self.frequencies is None else np.asarray(self.frequencies)
        if self.sections is None:
            positions = positions[..., None]
        else:
            positions = positions[..., np.repeat(np.arange(len(self.sections)), self.sections)]
        turns = np.mod(w.astype(np.longdouble) / (2 * _PI), 1.0).reshape((1,) * (positions.ndim - 1) + (-1,))
        return _by_parts(positions, turns) if wide == jnp.float64 else _in_fixed_point(positions, turns)


def _in_fixed_point(p: jax.Array, turns: np.ndarray) -> jax.Array:
    """2π times p * turns but for whole turns, float32: a turn is all of a uint32, in which products wrap rightly."""
    fraction = np.floor(turns * 2.0**64).astype(np.uint64)
    parts = [fraction >> np.uint64(32), fraction >> np.uint64(16) & np.uint64(0xFFFF), fraction & np.uint64(0xFFFF)]
    whole, middle, last = (jnp.asarray(part.astype(np.uint32)) for part in parts)
    high, low = p >> 16, p & 0xFFFF  # p = high 2^16 + low, and middle and last are 2^-16 and 2^-32 of whole's unit
    carry = lax.shift_right_logical(_u32(low) * middle, jnp.uint32(16))
    carry = carry + _u32((high * last.astype(jnp.int32)) >> 16)
    phase = _u32(p) * whole + _u32(high) * middle + carry
    return lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32) * np.float32(math.pi * 2.0**-31)


def _u32(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.int32), jnp.uint32)


def _by_parts(p: jax.Array, turns: np.ndarray) -> jax.Array:
    """2π times p * turns but for whole turns, float64: parts of 22 bits, whose products with p are exact."""
    phase = jnp.zeros((1,) * p.ndim, jnp.float64)
    for _ in range(3):
        part = np.floor(turns * 2.0**22) / 2.0**22
        product = p.astype(jnp.float64) * part.astype(np.float64)
        phase = phase + (product - jnp.floor(product))
        turns = (turns - part) * 2.0**22
        p = p.astype(jnp.float64) * 2.0**-22
    return (phase - jnp.round(phase)) * (2 * math.pi)


def _scaling(config: Mapping[str, Any], layer: str | None) -> dict[str, Any]:
    """A copy of what a configuration says of scaling, for one kind of layer."""
    kinds = ("full_attention", "sliding_attention")
    if layer not in (None, *kinds):
        raise ValueError(f"layer must be one of {kinds} or None, got {layer!r}")
    given = config.get("rope_parameters")
    if given is None:
        local = layer == kinds[1] and "rope_local_base_freq" in config
        return {} if local else dict(config.get("rope_scaling") or {})
    if set(given) & set(kinds):
        if layer is None:
            raise ValueError(f"this model has rotary positions for each kind of layer: say layer=, one of {kinds}")
        given = given[layer]
    return dict(given)


def _theta(config: Mapping[str, Any], layer: str | None) -> float:
    if layer is None and "rope_local_base_freq" in config:
        raise ValueError("this model has one theta for each kind of layer: say layer=")
    if layer == "sliding_attention" and "rope_local_base_freq" in config:
        return float(config["rope_local_base_freq"])
    return float(config.get("rope_theta", config.get("rotary_emb_base", 10000.0)))


def _width(config: Mapping[str, Any], partial: float | None) -> int:
    """How many numbers of a head are turned."""
    for name in ("qk_rope_head_dim", "rotary_dim"):
        if config.get(name):
            return int(config[name])
    head = config.get("head_dim")
    if not head:
        if not ("hidden_size" in config and "num_attention_heads" in config):
            raise ValueError("config must have head_dim, or hidden_size and num_attention_heads")
        head = config["hidden_size"] // config["num_attention_heads"]
    fractions = [partial, config.get("partial_rotary_factor"), config.get("rotary_pct")]
    return int(head * next((fraction for fraction in fractions if fraction is not None), 1.0))


def _is_interleaved(config: Mapping[str, Any]) -> bool:
    name = config.get("model_type")
    if "rope_interleave" in config:
        return bool(config["rope_interleave"])
    if name not in _INTERLEAVED | _HALVES:
        raise ValueError(f"it is not known which pairs model_type={name!r} turns: say interleaved=")
    return name in _INTERLEAVED


def _scaled(plain: Rotary, kind: str, scaling: Mapping[str, Any], config: Mapping[str, Any], length: Any) -> Rotary:
    """The rotary positions of a model scaled as its configuration says."""
    if kind == "default":
        return plain
    factor: Any = scaling.get("factor")
    greatest, outside = config.get("max_position_embeddings"), config.get("original_max_position_embeddings")
    original: Any = scaling.get("original_max_position_embeddings") or outside or greatest
    if original is None and kind != "linear":
        raise ValueError(f"the {kind} scaling needs original_max_position_embeddings or max_position_embeddings")
    if length is None and kind in ("dynamic", "longrope"):
        raise ValueError(f"the {kind} scaling goes by the greatest position: say length=")
    if kind == "linear":
        return plain.linear(factor)
    if kind == "dynamic":
        return plain.dynamic(factor, original=original, length=length)
    if kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
        return plain.llama3(factor, original=original, **{name: scaling[name] for name in names})
    given = scaling.get("attention_factor")
    if kind == "longrope":
        factor = greatest / original if outside or factor is None else factor
        each = scaling["short_factor"], scaling["long_factor"]
        return plain.longrope(*each, original=original, length=length, factor=factor, attention_factor=given)
    scales: Any = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if given is None and all(scales):
        given = _mscale(factor, scales[0]) / _mscale(factor, scales[1])
    betas = {name: scaling[name] for name in ("beta_fast", "beta_slow") if scaling.get(name)}
    return plain.yarn(
        factor, original=original, attention_factor=given, truncate=scaling.get("truncate", True), **betas
    )


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _positive(name: str, number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} must be a number, got {number!r}")
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return float(number)
