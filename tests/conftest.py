"""The tests import the scripts from the folder above, and share what JAX has compiled."""

import os
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
jax.config.update("jax_num_cpu_devices", 1)  # main() sets it, and JAX refuses a change later


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tmp_path_factory.mktemp("compiled")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_disable_most_optimizations", True)  # they need not be fast
