"""What a main opens before it starts: tokenizer, model, mesh, questions, pool, and the weights of a policy."""

from router_r1_jax.setup.session import Session, open_session

__all__ = ["Session", "open_session"]
