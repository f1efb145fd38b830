"""Running a state machine: the same sequences in every run of the tests."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run(
    machine: type[RuleBasedStateMachine],
    n_sequences: int,
    n_steps: int,
    is_repeatable: bool = True,
) -> None:
    """Try sequences of rules.

    Args:
        machine: What to try.
        n_sequences: How many.
        n_steps: Rules of each, at most.
        is_repeatable: Whether they are the same in every run.
    """
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=n_sequences,
            stateful_step_count=n_steps,
            deadline=None,
            derandomize=is_repeatable,
            database=None,
            # a failure is reported as it is found: to make it small takes minutes
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
