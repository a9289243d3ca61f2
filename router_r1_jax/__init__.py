"""Router-R1 for JAX: a language model learns by reinforcement which model to ask, how often and at what price."""

import os

# Without PyTorch, transformers warns at its import that it has no models. The models of this package are in JAX.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
