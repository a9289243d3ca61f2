"""The pool of external models that the router can call: model cards, HTTP client, rate limits, call cache and ledger.

`pool.Pool` answers route calls with `outcomes.Reply`; every other file here serves it. No file of this package
but the command `check` imports JAX. This file imports nothing, so that the simulated models' server starts fast.
"""
