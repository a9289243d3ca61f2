"""Baselines: policies that a trained router is compared with, on the same questions, pool, call cache and scores.

    python -m router_r1_jax.baselines --config=configs/demo.py --workdir=runs/demo [--only=knn,mlp]

Most of them choose one model for a question by its text (`base.Baseline`): kNN, MLP, RouterDC, GraphRouter, FrugalGPT
cascade. They are fitted on how every model answered some train questions, and see no more of a question than its text
or the router's embedding of it. `router_lm` holds the baselines that are the router's language model. `suite` lists
all of them by name. scikit-learn comes with the extra `baselines`.
"""
