"""Router-R1 for JAX: a language model that learns by reinforcement whom to ask, how often and at what price."""

import os

# transformers would say at every start that without PyTorch there are no models; ours are in JAX.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
