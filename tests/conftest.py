"""Compiles quickly rather than well: tests run small programs once."""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
