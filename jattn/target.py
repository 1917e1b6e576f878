"""The target: for which platform, and among how many devices, a program is written; a static value, asked for once."""

from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """Where a program is to run.

    Args:
      platform: "cpu", "cuda", "rocm" or "tpu", as JAX names what it lowers for.
      devices: how many there are; axes may be sharded over them.
    """

    platform: str
    devices: int

    @property
    def is_cpu(self) -> bool:
        """Whether loops over heads and examples pay, and nothing narrower than float32 is multiplied faster."""
        return self.platform == "cpu"

    def on(self, platform: str | None, devices: int | None) -> "Target":
        """Returns the target for which JAX lowers: on `platform` and so many devices, where it says so."""
        return Target(platform or self.platform, devices or self.devices)


def now() -> Target:
    """Returns the target of what is called now: JAX's default device, or else its default backend."""
    default: Any = jax.config.values["jax_default_device"]
    platform = getattr(default, "platform", default) or jax.default_backend()
    return Target({"gpu": "cuda"}.get(platform, platform), jax.device_count())
