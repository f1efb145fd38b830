"""A short run of the models' machine; ``scripts/try_everything.py`` runs longer."""

from __future__ import annotations

from tests.machines import run
from tests.mlx_metal.model_machine import ModelMachine


def test_any_sequence_of_calls_gives_the_plain_models_logits():
    run(ModelMachine, n_sequences=16, n_steps=8)
