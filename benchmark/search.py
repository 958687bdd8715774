"""Processor time of muzero_unplugged_bsuite's search, beside mctx's and beside the model that both run.

    python -m benchmark.search

BSuite's network with random heads, float32, on one core; the smallest of ROUNDS timings, the three in turns in one process.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import mctx
import numpy as np

import muzero_unplugged_bsuite as mzu
from benchmark.studies import CORES, print_table

CASES = [  # roots, simulations, depth, actions
    *((1_024, 20, None, 3), (1_024, 20, 4, 3), (512, 50, None, 3), (1_024, 20, None, 18)),
]
ROUNDS, SECONDS = 7, 0.5  # SECONDS: at least, of each timing


def random_network(num_actions: int, num_roots: int, scale: float = 0.3, **settings: Any) -> tuple[Any, ...]:
    """(model, params, state, prediction): a model with noise of this scale on its parameters, and roots."""
    model, key = mzu.Model(num_actions, mzu.Args(**settings)), jax.random.PRNGKey(0)
    leaves, tree = jax.tree.flatten(mzu.init_state((50,), model).params)
    keys = jax.random.split(key, len(leaves))
    leaves = [x + scale * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    params = jax.device_put(jax.tree.unflatten(tree, leaves), jax.devices()[0])
    net = model.bind(params)
    state = net.representation(jax.random.normal(key, (num_roots, 50)))
    return model, params, state, net.prediction(state)


def search_by_mctx(params: Any, key: jax.Array, state: jax.Array, prediction: mzu.Prediction, model: mzu.Model) -> Any:
    """The same search by mctx.muzero_policy, at the same arguments and settings."""
    args, value = model.args, mzu.to_scalar(prediction.value_logits)
    root = mctx.RootFnOutput(prior_logits=prediction.policy_logits, value=value, embedding=state)
    step, depth = functools.partial(mzu.expand, model=model), args.search_depth or args.num_simulations
    noise = {"dirichlet_fraction": args.dirichlet_fraction, "temperature": args.temperature}
    result = mctx.muzero_policy(params, key, root, step, args.num_simulations, max_depth=depth, **noise)
    return result.action, result.action_weights, result.search_tree.summary().value


def model_alone(params: Any, key: jax.Array, state: jax.Array, prediction: mzu.Prediction, model: mzu.Model) -> jax.Array:
    """As many steps of the model as a search makes, each following from the one before."""

    def step(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        after, state = mzu.expand(params, key, carry[1], carry[0], model)
        return state, (jnp.argmax(after.prior_logits, axis=-1) + (after.reward + after.value > 0)) % model.num_actions

    return jax.lax.fori_loop(0, model.args.num_simulations, step, (state, jnp.argmax(prediction.policy_logits, axis=-1)))[0]


def processor_time(function: Callable[..., Any], *arguments: Any) -> float:
    """Milliseconds a call."""
    calls, start = 0, time.process_time()
    while (spent := time.process_time() - start) < SECONDS:
        jax.block_until_ready(function(*arguments))
        calls += 1
    return spent / calls * 1e3


def rows() -> Iterator[list[str]]:
    yield ["roots", "simulations", "depth", "actions", "mctx", "here", "the model alone", "mctx / here", "equal visits"]
    for num_roots, num_simulations, depth, num_actions in CASES:
        settings: dict[str, Any] = {"num_simulations": num_simulations, "search_depth": depth}
        model, *arguments = random_network(num_actions, num_roots, **settings)
        arguments.insert(1, jax.random.PRNGKey(1))
        functions = [jax.jit(function, static_argnames="model") for function in (search_by_mctx, mzu.search, model_alone)]
        theirs, mine = (np.asarray(function(*arguments, model)[1]) for function in functions[:2])  # visit counts
        times = [[processor_time(function, *arguments, model) for function in functions] for _ in range(ROUNDS)]
        mctx_ms, here_ms, model_ms = np.min(times, axis=0)
        cells = [f"{num_roots:,}", str(num_simulations), str(depth or "any"), str(num_actions)]
        cells += [f"{mctx_ms:.1f} ms", f"{here_ms:.1f} ms", f"{model_ms:.1f} ms", f"{mctx_ms / here_ms:.1f}"]
        yield [*cells, f"{np.isclose(theirs, mine, atol=1e-5).all(axis=1).sum():,} roots"]


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {CORES[-1]})
    jax.set_mesh(jax.sharding.Mesh(jax.devices()[:1], ("batch",)))
    print_table(rows())
