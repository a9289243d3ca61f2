"""Sums a ledger's file on its own, to be compared with the sums that a run reports."""

from router_r1_jax.pool.ledger import UNITS_PER_DOLLAR, ledger_lines

SUMS = ("calls", "charged", "spent")


def state_totals(state):
    """The sums of `Ledger.state` in dollars: in all, and under "models" per model."""
    models = state["ledger"]
    in_all = [sum(column) for column in zip(*models.values(), strict=True)] or [0] * len(SUMS)
    return {**_in_dollars(in_all), "models": {model: _in_dollars(sums) for model, sums in models.items()}}


def ledger_totals(path):
    """The sums of all runs in a ledger's file: in all, under "models" per model, under "steps" per step, and under
    "router" the tokens that the router read and sampled.

    Calls and rollouts that a restart has made again do not count; such calls stay spent.
    """
    entries, again = [], set()
    for offset, line in ledger_lines(path):
        if "back_to" in line:
            again |= {at for at, entry in entries if at >= line["back_to"] and entry["step"] > line["step"]}
        else:
            entries.append((offset, line))
    totals = {"models": {}, "steps": {}, "router": {"read_tokens": 0, "sampled_tokens": 0}}
    in_all = [0] * len(SUMS)
    for offset, line in entries:
        counts = offset not in again
        if "model" not in line:
            for name in totals["router"]:
                totals["router"][name] += counts * line[f"router_{name}"]
            continue
        units = [round(line[name] * UNITS_PER_DOLLAR) for name in ("charged", "spent")]
        per_model = totals["models"].setdefault(line["model"], [0] * len(SUMS))
        per_step = totals["steps"].setdefault(line["step"], [0] * len(SUMS))
        for sums in (in_all, per_model, per_step):
            for i, amount in enumerate((int(counts), counts * units[0], units[1])):
                sums[i] += amount
    for table in ("models", "steps"):
        totals[table] = {key: _in_dollars(sums) for key, sums in sorted(totals[table].items())}
    return _in_dollars(in_all) | totals


def _in_dollars(sums):
    return {"calls": sums[0], "charged": sums[1] / UNITS_PER_DOLLAR, "spent": sums[2] / UNITS_PER_DOLLAR}
