"""Baselines: what a trained router is compared with, under the same questions, pool, tape and scores.

    python -m router_r1_jax.baselines --config=configs/demo.py --workdir=runs/demo [--only=knn,mlp]

Most choose one model for a question by its text (`interface.Baseline`): they are fitted on how every model answered
some train questions, and never see more of a question than its text or the router's embedding of it. `own` holds those
that are the router's own language model. scikit-learn comes with the extra `baselines`.
"""
