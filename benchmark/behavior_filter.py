"""rosmo_bsuite.py with another behaviour filter: H(r + gamma v(s') - v(s)), s' the encoding of the observed next state.

    python -m benchmark.behavior_filter --filter authors    # r by the reward head at s', as in the authors' code
    python -m benchmark.behavior_filter --filter recorded   # r as it was recorded

Takes the script's flags too. The authors' reward head is never trained on encodings of observations.
"""

import functools
from typing import Literal, cast

import jax
import jax.numpy as jnp
from pydantic.dataclasses import dataclass

import rosmo_bsuite as script
from data.dataset import InputError, run_program
from rosmo_bsuite import Labels, Model, Steps, TrainState

label_dataset_by_model = script.label_dataset


@dataclass(frozen=True)
class Args(script.Args):
    filter: Literal["authors", "recorded"] = "authors"  # the behaviour filter's reward


@functools.partial(jax.jit, static_argnames="model")
def label_dataset(state: TrainState, data: Steps, model: Model) -> Labels:
    """Labels [N] with the filter's advantage in place of adv_g. It counts at steps whose next step windows read too."""
    labels, reward = label_dataset_by_model(state, data, model), data.reward
    if cast(Args, model.args).filter == "authors":
        net = model.bind(state.target_params)
        prediction = net.prediction(net.representation(data.observation))
        reward = jnp.roll(script.to_scalar(prediction.reward_logits), -1)
    return labels._replace(advantage=reward + model.args.discount * jnp.roll(labels.value, -1) - labels.value)


if __name__ == "__main__":
    script.Args, script.label_dataset, script.InputError = Args, label_dataset, InputError  # type: ignore
    run_program(lambda: script.main(script.parse_args()))
