"""Checks shapes and types of every public signature while the tests run (jaxtyping + beartype)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

# Not ot_attention.spec and api, which check their arguments themselves, with messages that tests look for.
_NAMES = ("asap", "backends.xla", "plans", "problem", "reference", "sinkhorn", "steps", "support")
_CHECKED = [f"ot_attention.{name}" for name in _NAMES]
install_import_hook(
    [*_CHECKED, "data", "models", "training", "alignment", "evaluation"], "beartype.beartype"
).__enter__()
