"""Every test under strict JAX: no implicit promotion, no rank broadcasting, 8 CPU devices; warnings are errors."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
