"""What errors in each group's keys, and values, cost: measured, and half believed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.planning.pieces import pieces
from xkv.planning import tensor_weights
from xkv.store import bit_plan
from xkv.store.model_basis import prior_weights


@pytest.fixture(autouse=True)
def low_ratios(monkeypatch):
    """The model has too few columns for high ones."""
    monkeypatch.setattr(tensor_weights, "RATIOS", (3.0, 4.0, 100.0))


def test_divergence_grows_with_what_is_left_out(subject, basis):
    text = tensor_weights._Text(subject, basis, pieces(2)[1])
    nothing = [[(), ()], [(), ()]]
    prior = prior_weights(basis.directions)
    planned = [tensor_weights._planned(subject, basis, r, prior) for r in (2.0, 4.0, 8.0)]
    found = [text.divergence(bits) for bits in (nothing, *planned)]
    assert found[0] == 0 and found == sorted(found)
    # keys alone, of one group
    alone = text.divergence([[planned[2][0][0], ()], [(), ()]])
    assert 0 < alone < found[3]


class Told:
    """Divergences of a model whose tensors cost so much for each unit of energy."""

    def __init__(self, costs):
        self.costs = costs

    def __call__(self, subject, basis, piece):
        self.directions = basis.directions
        return self

    def divergence(self, bits):
        return sum(
            cost * bit_plan.lost_energy(tensor.energies, each)
            for group, costs, parts in zip(self.directions, self.costs, bits, strict=True)
            for tensor, cost, each in zip(group, costs, parts, strict=True)
            if each
        )


def test_weights_go_half_the_way_to_what_errors_cost(subject, basis, monkeypatch):
    prior = prior_weights(basis.directions)
    costs = [[100 * prior[0][0], prior[0][1]], [prior[1][0], prior[1][1]]]
    monkeypatch.setattr(tensor_weights, "_Text", Told(costs))
    seen = []
    weights = tensor_weights.measured_weights(
        subject, basis, pieces(2), lambda *counts: seen.append(counts)
    )
    assert set(weights) == {3.0, 4.0}
    for found in weights.values():
        np.testing.assert_allclose(found[0][0], 10 * prior[0][0])
        np.testing.assert_allclose(found[0][1:] + found[1], prior[0][1:] + prior[1])
    assert seen == [(i + 1, 36) for i in range(24)]
    # and the keys get more bits for it
    before, after = (
        sum(tensor_weights._planned(subject, basis, 4.0, each)[0][0])
        for each in (prior, weights[4.0])
    )
    assert after > before


def test_weights_that_do_no_better_are_left(subject, basis, monkeypatch):
    prior = prior_weights(basis.directions)

    class Worse(Told):
        n_whole = 0

        def divergence(self, bits):
            if all(map(all, bits)):
                self.n_whole += 1
                # the new plan is looked at first
                return 1.0 if self.n_whole % 2 else 0.5
            return super().divergence(bits)

    monkeypatch.setattr(tensor_weights, "_Text", Worse([[50 * w for w in x] for x in prior]))
    weights = tensor_weights.measured_weights(subject, basis, pieces(1), lambda *_: None)
    assert set(weights.values()) == {prior}
