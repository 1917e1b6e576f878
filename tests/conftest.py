"""Every test under strict JAX: no implicit promotion, no rank broadcasting, 8 CPU devices; warnings are errors."""

import gc
import importlib.metadata
import os

# Compiling is most of the time that the suite takes, and most of that is spent on making the code fast. Where the
# compiled code is what a test looks at, as in tests/test_memory.py, it says so.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    # Later ones may not know these, and an unknown flag ends the process.
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# Tracing makes many small objects that stay: to go through them again and again is a sixth of the time.
gc.freeze()
gc.set_threshold(200_000, 20, 20)
