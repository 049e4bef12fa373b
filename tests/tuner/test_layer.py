"""The layer against the naive sum of its definition."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_hoe import ExpertSpec, HoEConfig, RouterSpec, record_votes
from peft_hoe.errors import ModuleError

OBJECTIVES = ["a", "b", "c"]


class OneLayer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(6, 5) if kind == "linear" else Conv1D(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def make(kind, randomise, **changes):
    settings = {
        "objectives": OBJECTIVES,
        "experts": [ExpertSpec([1, 0, 0], r=2), ExpertSpec([0, 1, 0], r=3), [0, 0, 1], ExpertSpec([1 / 3] * 3, r=1)],
        "routers": [RouterSpec([0.5, 0.5, 0], trained=True), RouterSpec([0, 0.5, 0.5], votes_for="all", trained=True)],
        "r": 4,
        "target_modules": ["lin"],
        "router_temperature": 0.7,
    }
    model = get_peft_model(OneLayer(kind).double(), HoEConfig(**{**settings, **changes}), autocast_adapter_dtype=False)
    randomise(model)
    return model.eval()


@torch.no_grad()
def naive(model, x, preferences):
    """y = W x + c sum_j w_j B_j A_j x, one token at a time; x (rows, tokens, d_in)."""
    layer = model.base_model.model.lin
    config = model.peft_config["default"]
    ranks = config.ranks("lin")
    starts = [sum(ranks[:j]) for j in range(len(ranks) + 1)]
    y = layer.base_layer(x).clone()
    for row, preference in enumerate(preferences):
        route = model.route(preference).experts
        for t in range(x.shape[1]):
            token = x[row, t]
            votes = torch.zeros(len(ranks), dtype=torch.float64)
            slot = 0
            for spec in config.routers:
                logits = layer.hoe_router["default"].weight @ token + layer.hoe_router["default"].bias
                choice = (logits[slot : slot + len(spec.votes_for)] / config.router_temperature).softmax(0)
                slot += len(spec.votes_for)
                for name, vote in zip(spec.votes_for, choice, strict=True):
                    votes[config.expert_names.index(name)] += route.get(spec.name, 0.0) * vote
            deltas = []
            for j, name in enumerate(config.expert_names):
                votes[j] += route.get(name, 0.0)
                span = slice(starts[j], starts[j + 1])
                deltas.append(layer.hoe_B["default"].weight[:, span] @ layer.hoe_A["default"].weight[span])
            assert votes.sum() == pytest.approx(1)
            mixed = sum(vote * delta for vote, delta in zip(votes, deltas, strict=True))
            if config.interpolation == "norm" and mixed.any():
                mixed = mixed * sum(v * delta.norm() for v, delta in zip(votes, deltas, strict=True)) / mixed.norm()
            y[row, t] += mixed @ token
    return y


PREFERENCES = [[0.5, 0.5, 0.0], [0.1, 0.5, 0.4], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]]


@contextlib.contextmanager
def computed(model, path):
    """Read weights directly, without or with an autograd graph; or call their modules, as for hooks that fetch them."""
    layer = model.base_model.model.lin
    hooks = []
    if path == "modules":
        for part in (layer.hoe_A, layer.hoe_B, layer.hoe_router):
            hooks += [part["default"].register_forward_pre_hook(lambda module, args: None)]
    with torch.set_grad_enabled(path == "training"):
        yield
    for hook in hooks:
        hook.remove()


PATHS = ["inference", "training", "modules"]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interpolation", ["linear", "norm"])
def test_one_preference_equals_the_naive_sum(kind, path, interpolation, randomise):
    model = make(kind, randomise, interpolation=interpolation)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with computed(model, path):
        for preference in PREFERENCES:
            torch.testing.assert_close(
                model(x, preference=preference), naive(model, x, [preference] * 2), rtol=0, atol=1e-10
            )


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interpolation", ["linear", "norm"])
def test_per_row_preferences_equal_the_naive_sum(kind, path, interpolation, randomise):
    model = make(kind, randomise, interpolation=interpolation)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    with computed(model, path):
        torch.testing.assert_close(model(x, preference=PREFERENCES), naive(model, x, PREFERENCES), rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interpolation", ["linear", "norm"])
@pytest.mark.parametrize("ranks", [[2, 2, 2, 2], [1, 2, 3, 4], [0, 3, 0, 2]])
def test_any_preference_and_experts_of_any_rank(path, interpolation, ranks, randomise):
    """Selected experts with gaps between them, routers in every company, one that votes for more than the others."""
    routers = [
        RouterSpec([0.5, 0.5, 0], trained=True),
        RouterSpec([0, 0.5, 0.5], trained=True, votes_for="all"),
        RouterSpec([0.5, 0, 0.5], trained=True),
    ]
    model = make("linear", randomise, interpolation=interpolation, routers=routers, rank_pattern={"lin": ranks})
    generator = np.random.default_rng(0)
    x = torch.randn(8, 2, 6, dtype=torch.float64)
    points = [*np.eye(3), [0.5, 0.5, 0], [0, 0.5, 0.5], [0.6, 0, 0.4], *generator.dirichlet(np.ones(3), size=18)]
    with computed(model, path):
        for preference in points:
            preference = list(preference)
            torch.testing.assert_close(
                model(x, preference=preference), naive(model, x, [preference] * 8), rtol=0, atol=1e-10
            )
        for rows in (points[:8], points[8:16], points[16:24]):
            rows = [list(row) for row in rows]
            torch.testing.assert_close(model(x, preference=rows), naive(model, x, rows), rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [False, True])
def test_adapters_that_are_active_together_add_up(path, rows, randomise):
    """Each with its own objectives, experts and preference, or one per row."""
    model = make("linear", randomise, interpolation="norm")
    second = HoEConfig(objectives=["x", "y"], r=2, target_modules=["lin"])
    model.add_adapter("second", second, autocast_adapter_dtype=False)
    randomise(model, seed=1)
    layer = model.base_model.model.lin.double()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    preference = PREFERENCES if rows else PREFERENCES[1]
    with computed(model, path):
        expected = naive(model, x, preference if rows else [preference] * 4)
        weight_a, weight_b = layer.factors("second")
        for expert, vote in ((0, 0.4), (2, 0.6)):  # [0.7, 0.3] = 0.4 [1, 0] + 0.6 [0.5, 0.5]
            here = slice(2 * expert, 2 * expert + 2)
            expected = expected + vote * (x @ weight_a[here].T) @ weight_b[:, here].T
        model.base_model.set_adapter(["default", "second"])
        found = model(x, preference={"default": preference, "second": [0.7, 0.3]})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_ranks_of_inputs(randomise):
    """A layer takes one vector, a batch, and more axes than a batch and its tokens; also none at all."""
    model = make("linear", randomise, interpolation="norm")
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x.view(6, 4, 6), preference=PREFERENCES[1])
        torch.testing.assert_close(model(x, preference=PREFERENCES[1]), expected.view(2, 3, 4, 5), rtol=0, atol=1e-12)
        torch.testing.assert_close(model(x[0, 0, 0], preference=PREFERENCES[1]), expected[0, 0], rtol=0, atol=1e-12)
        torch.testing.assert_close(model(x[0, 0], preference=PREFERENCES[1]), expected[0], rtol=0, atol=1e-12)
        assert model(x[:0], preference=PREFERENCES[1]).shape == (0, 3, 4, 5)
        rows = model(x, preference=PREFERENCES[:2])
        torch.testing.assert_close(rows[1], expected[3:], rtol=0, atol=1e-12)


def test_the_paths_are_the_ones_tested(randomise, monkeypatch):
    model = make("linear", randomise)
    called = []
    part = model.base_model.model.lin.hoe_A["default"]
    monkeypatch.setattr(part, "forward", lambda x: called.append(1) or x @ part.weight.T)
    x = torch.zeros(1, 6, dtype=torch.float64)
    for path, calls in (("inference", 0), ("training", 0), ("modules", 1)):
        with computed(model, path):
            model(x)
        assert len(called) == calls


def test_what_hooks_see_of_the_base_stays_the_bases(randomise):
    """The experts are added in place, but not into what a hook may have kept."""
    model = make("linear", randomise)
    base = model.base_model.model.lin.base_layer
    x = torch.randn(2, 6, dtype=torch.float64)
    kept = []
    with torch.no_grad():
        expected = base(x)
        base.register_forward_hook(lambda module, args, output: kept.append(output))
        model(x, preference=PREFERENCES[1])
    torch.testing.assert_close(kept[0], expected, rtol=0, atol=0)


def test_hooked_weights_are_fetched_by_calling_their_modules(randomise):
    model = make("linear", randomise)
    x = torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        part = model.base_model.model.lin.hoe_B["default"]
        weight = part.weight.data.clone()
        part.weight.data = torch.zeros_like(weight)  # as offloading does, until the hook brings it
        part.register_forward_pre_hook(lambda module, args: setattr(module.weight, "data", weight))
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_an_expert_that_has_nothing_here_is_a_zero_delta(randomise):
    model = make("linear", randomise, rank_pattern={"lin": [2, 0, 1, 1]})
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        base = model.base_model.model.lin.base_layer(x)
        torch.testing.assert_close(model(x, preference=[0, 1, 0]), base, rtol=0, atol=0)
        torch.testing.assert_close(
            model(x, preference=[0.2, 0.5, 0.3]), naive(model, x, [[0.2, 0.5, 0.3]] * 2), rtol=0, atol=1e-10
        )


def test_fresh_experts_leave_the_base_alone(llama, config, tokens):
    base = llama()
    expected = base(tokens).logits
    model = get_peft_model(base, config())
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)


def test_untrained_routers_vote_statically_and_training_starts_there(hoe_llama, tokens):
    model = hoe_llama()
    for name, parameter in model.named_parameters():
        if "hoe_router" in name and name.endswith("weight"):
            parameter.data.zero_()
        elif "hoe_router" in name:
            parameter.data = torch.log(torch.tensor([0.5, 0.5]))  # [.25, .75] = 1/2 b + 1/2 centroid
    with torch.no_grad():
        static = model(tokens, preference=[0.25, 0.75]).logits
        model.mark_trained("r0")
        torch.testing.assert_close(model(tokens, preference=[0.25, 0.75]).logits, static, rtol=0, atol=1e-4)


def test_votes_can_be_read(hoe_llama, tokens):
    model = hoe_llama(trained=True)
    with torch.no_grad(), record_votes(model) as votes:
        model(tokens, preference=[0.1, 0.9])
    assert len(votes) == 14
    for weights in votes.values():
        assert weights.shape == (3, 7, 3)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7))
    with torch.no_grad(), record_votes(model) as votes:
        model(tokens, preference=[0.7, 0.3])  # [.7, .3] = .4 [1, 0] + .6 [.5, .5]: no router
    torch.testing.assert_close(next(iter(votes.values())).double(), torch.tensor([0.4, 0.0, 0.6]).double())


def test_other_modules_are_refused_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.attention = nn.MultiheadAttention(4, 1)

    for target, message in (("conv", "conv is a Conv2d"), ("attention.out_proj", "MultiheadAttention")):
        with pytest.raises(ModuleError, match=message):
            get_peft_model(Odd(), HoEConfig(objectives=["a", "b"], target_modules=[target]))


def test_another_linear_runs_through_its_own_forward(randomise):
    class ScaledLinear(nn.Module):
        """Like a quantised linear: it has features and a forward, and no float weight."""

        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 6, 5
            self.weight = nn.Parameter(torch.ones(5, 6, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ self.weight.T.float()

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = ScaledLinear()

        def forward(self, x):
            return self.lin(x)

    model = get_peft_model(Holder(), HoEConfig(objectives=["a", "b"], target_modules=["lin"], r=2))
    x = torch.ones(3, 6)
    torch.testing.assert_close(model(x), torch.full((3, 5), 6.0))
    with pytest.raises(ValueError, match=r"lin cannot be merged.*int8"):
        model.merge_adapter()
