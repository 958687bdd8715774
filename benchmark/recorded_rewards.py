"""rosmo_bsuite.py with the recorded reward in the behaviour filter, in place of the one that the reward head reads off the
encoding of the next observation, as in the authors' code: that head is trained after a step of the model only. Takes the
script's flags; bsuite_scores.py compares the two."""

import sys

import jax
import jax.numpy as jnp

import rosmo_bsuite as script
from rosmo_bsuite import Args, Labels, Steps, Targets

make_targets_by_model = script.make_targets


def make_targets(key: jax.Array, batch: Steps, labels: Labels, args: Args) -> Targets:
    """Targets of windows [B, T]. A label is of the reward that has led to its step."""
    before = jnp.pad(batch.reward[:, :-1], ((0, 0), (1, 0)))
    return make_targets_by_model(key, batch, labels._replace(reward=before), args)


if __name__ == "__main__":
    script.make_targets = make_targets
    script.__file__ = __file__  # its runs are resumed by this program
    sys.exit(script.main(script.parse_args()))
