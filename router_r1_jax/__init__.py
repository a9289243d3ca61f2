"""Router-R1 for JAX: a language model that learns by reinforcement whom to ask, how often and at what price."""

__version__ = "0.1.0"
