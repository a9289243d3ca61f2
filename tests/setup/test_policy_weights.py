"""The fingerprint of parameters: a plain loop gives the same, and no small change escapes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from router_r1_jax.setup.policy_weights import fingerprint


def params(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    tree = {"a": rng.standard_normal((3, 4, 2)), "b": {"c": rng.standard_normal(5), "d": rng.standard_normal((2, 3))}}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def looped(tree):
    """Both sums, number by number, with Python's whole numbers."""
    plain = placed = 0
    for number, leaf in enumerate(jax.tree.leaves(tree), start=1):
        array = np.asarray(leaf)
        bits = array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
        for index in np.ndindex(bits.shape):
            place = number
            for i in index:
                place = (place * 2654435761 + i) % 2**32
            plain += int(bits[index])
            placed += int(bits[index]) * (2 * place + 1)
    return f"{plain % 2**32:08x}{placed % 2**32:08x}"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_the_sum_of_all_bits_by_place(dtype):
    assert fingerprint(params(dtype)) == looped(params(dtype)) == fingerprint(params(dtype))


def test_a_change_of_any_number_or_place_is_seen():
    tree = params()
    known = {fingerprint(tree), fingerprint(params(seed=1)), fingerprint(params(jnp.bfloat16))}
    known.add(fingerprint(tree | {"a": tree["a"][::-1]}))  # rows in another order
    known.add(fingerprint(tree | {"a": jnp.swapaxes(tree["a"].reshape(3, 2, 4), 1, 2)}))
    swapped = tree["b"]["d"].at[0, 1].set(tree["b"]["d"][1, 2]).at[1, 2].set(tree["b"]["d"][0, 1])
    known.add(fingerprint(tree | {"b": tree["b"] | {"d": swapped}}))
    bits = jax.lax.bitcast_convert_type(tree["b"]["c"], jnp.uint32)
    known.add(fingerprint(tree | {"b": tree["b"] | {"c": jax.lax.bitcast_convert_type(bits ^ 1, jnp.float32)}}))
    assert len(known) == 7
