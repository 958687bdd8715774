"""muzero_unplugged_bsuite.py with labels of every window: each of its steps has a search and Dirichlet noise of its own, as
in the authors' code. Takes the script's flags; `bsuite_studies labels` compares the two."""

import jax
import jax.numpy as jnp

import muzero_unplugged_bsuite as script
from data.dataset import InputError, run_program
from muzero_unplugged_bsuite import Labels, Model, Steps, TrainState

shared_labels_update = script.update


def label_nothing(state: TrainState, data: Steps, model: Model) -> Labels:
    """Labels [N] that nobody reads."""
    return Labels(jnp.zeros(len(data.action)), jnp.zeros((len(data.action), model.num_actions)))


def update(state: TrainState, key: jax.Array, batch: Steps, labels: Labels, model: Model) -> tuple[TrainState, dict]:
    """One update on windows [B, T], which are labelled first."""
    steps = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    labels_key = jax.random.fold_in(jax.random.split(state.key, 3)[2], state.step)
    new = script.make_labels(state.target_params, labels_key, steps, model)
    labels = jax.tree.map(lambda x: x.reshape(*batch.action.shape, *x.shape[1:]), new)
    return shared_labels_update(state, key, batch, labels, model)


if __name__ == "__main__":
    script.label_dataset, script.update, script.InputError = label_nothing, update, InputError  # type: ignore
    run_program(lambda: script.main(script.parse_args()))
