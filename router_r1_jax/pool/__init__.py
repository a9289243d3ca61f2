"""The pool: the external models that the router may ask. Cards, HTTP client, tape, ledger and simulated models.

`pool.Pool` answers route calls with `outcomes.Reply`; everything else here serves it. Nothing imports JAX, and this
file imports nothing, so that the simulated models' server process starts fast.
"""
