"""A loaded adapter gains and loses experts, routers and objectives; what stays is the same bit by bit."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_hoe import ExpertError, ExpertSpec, HoEConfig, HoELayer, HoEWarning, PreferenceError, RouterSpec
from peft_hoe.training.run.trained_router import TrainedRouter
from peft_hoe.tuner.functional import adapter_of
from peft_hoe.tuner.lengths import gram
from peft_hoe.tuner.rearranging import rearranged

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def layers(model):
    return {module.module_name: module for module in model.modules() if isinstance(module, HoELayer)}


def factors(model, seed=5, rank=3, only=""):
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2  # noqa: E731
    return {
        name: (drawn(rank, layer.in_features), drawn(layer.out_features, rank))
        for name, layer in layers(model).items()
        if only in name
    }


def expert(model, name):
    """An expert's A and B in every module, copied."""
    index = adapter_of(model).expert_names.index(name)
    found = {}
    for module, layer in layers(model).items():
        ranks = layer.hoe_layouts["default"].ranks
        rows = slice(sum(ranks[:index]), sum(ranks[: index + 1]))
        a, b = layer.factors("default")
        found[module] = a[rows].clone(), b[:, rows].clone()
    return found


def router(model, name):
    """A router's weight and bias in every module, copied."""
    adapter = adapter_of(model)
    index = adapter.router_names.index(name)
    rows = slice(sum(map(len, adapter.votes()[:index])), sum(map(len, adapter.votes()[: index + 1])))
    found = {}
    for module, layer in layers(model).items():
        part = layer.hoe_router["default"]
        found[module] = part.weight[rows].clone(), part.bias[rows].clone()
    return found


def same(first, second):
    assert first.keys() == second.keys()
    for key, tensors in first.items():
        assert all(torch.equal(one, other) for one, other in zip(tensors, second[key], strict=True)), key


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.peft_config["default"].to_dict()


def unchanged(model, before):
    tensors, plain = state(model)
    assert plain == before[1]
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("interpolation", ["linear", "norm"])
def test_an_expert_that_is_added_is_the_naive_sum_and_leaves_the_others_alone(hoe_llama, tokens, interpolation):
    model = hoe_llama(trained=True, interpolation=interpolation).double()
    old = {name: expert(model, name) for name in ("a", "b", "centroid")}
    votes = router(model, "r0")
    far = logits(model, tokens, preference=[0.25, 0.75])
    weights = factors(model)
    model.add_expert(ExpertSpec([0.75, 0.25], name="new"), weights)
    for name, tensors in old.items():
        same(tensors, expert(model, name))
    same(votes, router(model, "r0"))
    same({module: (a, b) for module, (a, b) in weights.items()}, expert(model, "new"))
    assert model.route([0.75, 0.25]).experts == {"new": 1.0}
    assert model.route([0.875, 0.125]).experts == pytest.approx({"a": 0.5, "new": 0.5})
    torch.testing.assert_close(logits(model, tokens, preference=[0.25, 0.75]), far, **EXACT)
    got = logits(model, tokens, preference=[0.75, 0.25])
    with model.disable_adapter():
        for name, layer in layers(model).items():
            layer.get_base_layer().weight.data += weights[name][1] @ weights[name][0]
        torch.testing.assert_close(got, logits(model, tokens), rtol=1e-9, atol=1e-9)


def test_inner_products_of_old_experts_stay_and_new_ones_are_measured(hoe_llama):
    model = hoe_llama(interpolation="norm").double()
    for layer in layers(model).values():
        layer.measure_lengths("default")
    before = {name: layer.hoe_length["default"].gram.clone() for name, layer in layers(model).items()}
    weights = {name: (a * 40, b) for name, (a, b) in factors(model).items()}  # longer than the old ones
    model.add_expert([0.75, 0.25], weights)
    for name, layer in layers(model).items():
        products = layer.hoe_length["default"].gram
        scale = products[0, 0] / before[name][0, 0]
        assert torch.equal(products[:3, :3], before[name] * scale)  # a power of four
        assert float(torch.log2(scale)) % 2 == 0
        assert 0.25 < float(products.max()) <= 1
        wanted = gram(*layer.factors("default"), layer.hoe_layouts["default"].ranks)
        torch.testing.assert_close(products / products.max(), wanted, **EXACT)
    model.remove_expert("e3")
    for name, layer in layers(model).items():
        products = layer.hoe_length["default"].gram
        assert torch.equal(products / products[0, 0], before[name] / before[name][0, 0])


def test_an_expert_of_few_modules(hoe_llama, tokens, llama, tmp_path):
    model = hoe_llama(rank_pattern={"q_proj": [1, 2, 0]}).double()
    weights = factors(model, only="up_proj") | factors(model, rank=5, only="layers.1.mlp.up_proj")
    model.add_expert([0.75, 0.25], weights)
    ranks = {name: layer.hoe_layouts["default"].ranks for name, layer in layers(model).items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == (1, 2, 0, 0)
    assert ranks["model.layers.0.mlp.up_proj"] == (4, 4, 4, 3)
    assert ranks["model.layers.1.mlp.up_proj"] == (4, 4, 4, 5)
    assert ranks["model.layers.1.mlp.down_proj"] == (4, 4, 4, 0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path)
    torch.testing.assert_close(
        logits(loaded, tokens, preference=[0.8, 0.2]), logits(model, tokens, preference=[0.8, 0.2]), **EXACT
    )


def test_a_new_objective_changes_nothing_on_the_old_face(hoe_llama, tokens):
    model = hoe_llama(trained=True, interpolation="norm").double()
    grid = [[i / 20, 1 - i / 20] for i in range(21)]
    routes = [model.route(point).experts for point in grid]
    outputs = [logits(model, tokens, preference=point) for point in grid[::5]]
    default = logits(model, tokens)
    old = {name: expert(model, name) for name in ("a", "b", "centroid")}
    model.add_objective("c", weights=factors(model))
    assert dict(model.preference) == {"a": 0.5, "b": 0.5, "c": 0}
    assert [spec.preference for spec in model.peft_config["default"].experts][2:] == [[0.5, 0.5, 0], [0, 0, 1]]
    assert model.peft_config["default"].routers[0].preference == [0.25, 0.75, 0]
    for point, route in zip(grid, routes, strict=True):
        assert model.route([*point, 0]).experts == pytest.approx(route, abs=1e-12)
    for point, output in zip(grid[::5], outputs, strict=True):
        torch.testing.assert_close(logits(model, tokens, preference=[*point, 0]), output, **EXACT)
    torch.testing.assert_close(logits(model, tokens), default, **EXACT)
    for name, tensors in old.items():
        same(tensors, expert(model, name))
    assert model.route([0, 0, 1]).experts == {"c": 1.0}
    with pytest.raises(PreferenceError):
        model.set_preference([0.5, 0.5])


def test_an_objective_whose_expert_serves_others_too(hoe_llama):
    model = hoe_llama().double()
    with pytest.warns(UserWarning, match=r"no expert serves \['c'\] alone"):
        model.add_objective("c", ExpertSpec({"a": 0.2, "c": 0.8}, name="mostly c"), factors(model))
    assert model.route({"a": 0.2, "c": 0.8}).experts == {"mostly c": 1.0}


def test_a_router_that_is_added_changes_nothing_until_it_is_trained(hoe_llama, tokens):
    for routers in ([], [[0.25, 0.75]]):
        model = hoe_llama(routers=routers, interpolation="norm").double()
        model.mark_trained()
        points = [[0.75, 0.25], [0.6, 0.4], [0.3, 0.7]]
        before = [logits(model, tokens, preference=point) for point in points]
        model.add_router([0.75, 0.25])
        name = f"r{len(routers)}"
        assert model.route([0.75, 0.25]).experts == {name: 1.0}
        for point, output in zip(points, before, strict=True):
            torch.testing.assert_close(logits(model, tokens, preference=point), output, **EXACT)
        with torch.no_grad():
            for layer in layers(model).values():
                layer.hoe_router["default"].weight.normal_(generator=torch.Generator().manual_seed(3))
        model.mark_trained(name)
        assert not torch.allclose(logits(model, tokens, preference=points[0]), before[0], rtol=1e-3)
        assert all(layer.hoe_router["default"].weight.requires_grad for layer in layers(model).values())


def test_what_is_removed_leaves_the_rest_as_it_was(hoe_llama, tokens):
    model = hoe_llama(routers=[[0.25, 0.75], [0.75, 0.25], RouterSpec([0.5, 0.5], name="m", votes_for=["a", "b"])])
    model.mark_trained()
    kept = router(model, "m")
    model.remove_router("r0")
    same(kept, router(model, "m"))
    assert adapter_of(model).router_names == ["r1", "m"]
    model.remove_router("r1")
    old = {name: expert(model, name) for name in ("a", "b")}
    output = logits(model, tokens, preference=[1, 0])
    model.remove_expert("centroid")
    for name, tensors in old.items():
        same(tensors, expert(model, name))
    torch.testing.assert_close(logits(model, tokens, preference=[1, 0]), output)
    model.remove_router("m")
    assert model.route([0.25, 0.75]).experts == {"a": 0.25, "b": 0.75}
    assert not any("hoe_router" in name for name, _ in model.named_parameters())
    model.merge_adapter()


def test_a_module_whose_only_expert_goes_adds_nothing(hoe_llama, tokens, tmp_path, llama):
    model = hoe_llama(routers=[], rank_pattern={"q_proj": [0, 0, 2]}).double()
    model.remove_expert("centroid")
    layer = layers(model)["model.layers.0.self_attn.q_proj"]
    assert layer.hoe_layouts["default"].ranks == (1, 0)
    assert not any(factor.any() for factor in layer.factors("default"))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(llama().double(), tmp_path), tokens), logits(model, tokens)
    )


CHANGES = {
    "add_expert": lambda model: model.add_expert([0.75, 0.25], factors(model)),
    "add_router": lambda model: model.add_router([0.75, 0.25]),
    "add_objective": lambda model: model.add_objective("c", weights=factors(model)),
    "remove_router": lambda model: model.remove_router("r0"),
    "remove_expert": lambda model: model.remove_expert("a"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:no expert serves", "ignore:.*outside the hull")
def test_saved_and_loaded_after_each(hoe_llama, llama, tokens, tmp_path, change):
    model = hoe_llama(trained=True, interpolation="norm").double()
    CHANGES[change](model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path)
    assert loaded.peft_config["default"].to_dict()["experts"] == model.peft_config["default"].to_dict()["experts"]
    for point in torch.eye(len(model.preference)).tolist():
        torch.testing.assert_close(
            logits(loaded, tokens, preference=point), logits(model, tokens, preference=point), **EXACT
        )


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:no expert serves", "ignore:.*outside the hull")
def test_the_configuration_in_use_stays_the_one_master(hoe_llama, change):
    model = hoe_llama()
    config = model.peft_config["default"]
    held = config.routers[0], config.experts[1]
    CHANGES[change](model)
    assert model.peft_config["default"] is config
    config.default_preference = [0, 1, 0][: len(config.objectives)]
    assert model.preference["b"] == 1
    with pytest.raises(ExpertError, match="cannot become"):
        config.experts = []
    with pytest.raises(ExpertError, match="cannot be changed in place"):
        config.experts.append([0.5, 0.5])
    assert config.experts[[spec.name for spec in config.experts].index("b")] is held[1]
    if change != "remove_router":
        held[0].trained = True  # a reference from before is still heard
        assert adapter_of(model).trained[0]
    other = copy.deepcopy(model)
    other.set_preference([1, *[0] * (len(config.objectives) - 1)])
    assert model.preference["b"] == 1


def refusals(model):
    name, (a, b) = next(iter(factors(model).items()))
    nan = torch.full_like(a, float("nan"))
    return [
        (lambda: model.add_expert([0.505, 0.495], factors(model)), r"only 0.00707 apart"),
        (lambda: model.add_expert(ExpertSpec([0.7, 0.3], name="a"), factors(model)), r"'a'.* used twice"),
        (lambda: model.add_expert([0.7, 0.7], factors(model)), r"sum"),
        (lambda: model.add_expert([0.7, 0.3]), r"weights is None.*give weights=\{module: \(A, B\)\}"),
        (lambda: model.add_expert([0.7, 0.3], {}), r"weights is \{\}; give"),
        (lambda: model.add_expert([0.7, 0.3], {"nowhere": (a, b)}), r"name the modules \['nowhere'\]"),
        (lambda: model.add_expert([0.7, 0.3], {name: (b, a)}), r"give \(A, B\) with A \(r, 32\) and B \(32, r\), finite"),
        (lambda: model.add_expert([0.7, 0.3], {name: (nan, b)}), r"finite"),
        (lambda: model.add_expert([0.7, 0.3], {name: 3}), r"are 3; give \(A"),
        (lambda: model.add_expert(ExpertSpec([0.7, 0.3], r=2), {name: (a, b)}), r"r at most 2"),
        (lambda: model.add_objective("a", weights=factors(model)), r"objective names \['a'\] are used twice"),
        (lambda: model.add_objective("c", [0.5, 0.5], factors(model)), r"expert 3: preference"),
        (lambda: model.add_router([0.25, 0.75]), r"only 0 apart"),
        (lambda: model.add_router(RouterSpec([0.7, 0.3], trained=True)), r"trained is True for a router that is added"),
        (lambda: model.add_router(RouterSpec([0.7, 0.3], votes_for=["b"])), r"do not enclose it"),
        (lambda: model.remove_expert("nobody"), r"no expert 'nobody'; the experts are \['a', 'b', 'centroid'\]"),
        (lambda: model.remove_expert("b"), r"'b' cannot be removed, because the routers \['r0'\] vote for it"),
        (lambda: model.remove_router("a"), r"no router 'a'; the routers are \['r0'\]"),
    ]  # fmt: skip


def test_refusals_name_the_remedy_and_leave_the_model_as_it_was(hoe_llama, tokens):
    model = hoe_llama().double()
    before, output = state(model), logits(model, tokens)
    for refused, message in refusals(model):
        with pytest.raises((ExpertError, PreferenceError), match=message):
            refused()
        unchanged(model, before)
    torch.testing.assert_close(logits(model, tokens), output, rtol=0, atol=0)


def test_not_while_merged_or_in_a_block(hoe_llama):
    model = hoe_llama()
    with model.use_preference([1, 0]), pytest.raises(ExpertError, match="use_preference block is open; leave it first"):
        model.add_router([0.75, 0.25])
    model.merge_adapter()
    with pytest.raises(ExpertError, match=r"merged into the base; call unmerge_adapter\(\) first"):
        model.add_router([0.75, 0.25])
    model.unmerge_adapter()
    model.add_router([0.75, 0.25])


def test_the_last_expert_stays(llama, config):
    model = get_peft_model(llama(), config(objectives=["a"], routers=[]))
    with pytest.raises(ExpertError, match="it is the adapter's only one"):
        model.remove_expert("a")


def test_experts_that_train_may_start_at_zero(hoe_llama, tokens):
    model = hoe_llama(train_experts=True).double()
    with model.disable_adapter():
        base = logits(model, tokens)
    model.add_expert(ExpertSpec([0.75, 0.25], r=2))
    torch.testing.assert_close(logits(model, tokens, preference=[0.75, 0.25]), base, **EXACT)
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    assert layer.hoe_A["default"].weight.requires_grad
    assert bool(layer.factors("default")[0][12:].any())


@pytest.mark.parametrize("change", ["add_objective", "add_router"])
def test_a_calibration_of_before_is_dropped_and_said_so(hoe_llama, change):
    # One of two objectives is none of three; and other experts and routers write other texts.
    model = hoe_llama()
    config = model.peft_config["default"]
    line = [[1, 0], [0, 1]]
    config.calibration = {
        "positions": line, "preferences": line, "simplices": [[0, 1]], "made_for": config.calibrates(),
    }  # fmt: skip
    with pytest.warns(HoEWarning, match="calibration was made for other experts and routers, so it is dropped"):
        CHANGES[change](model)
    assert config.calibration is None


def test_a_16_bit_base_keeps_its_experts_bits_and_exact_routers(llama, config, randomise):
    model = get_peft_model(llama().bfloat16(), config(routers=[], interpolation="norm"))
    randomise(model)
    old = expert(model, "centroid")
    model.add_expert([0.75, 0.25], factors(model))
    model.add_router([0.6, 0.4])
    same(old, expert(model, "centroid"))
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    assert layer.factors("default")[0].dtype == torch.bfloat16
    assert layer.hoe_router["default"].bias.dtype == layer.hoe_length["default"].gram.dtype == torch.float32
    assert bool(model(torch.tensor([[3, 4]]), preference=[0.6, 0.4]).logits.isfinite().all())


def test_another_adapter_of_the_model_is_left_alone(hoe_llama, tokens):
    model = hoe_llama().double()
    model.add_adapter("second", HoEConfig(objectives=["x", "y"], target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".second." in name}
    model.base_model.add_objective("c", weights=factors(model), adapter_name="default")
    assert {name for name in model.state_dict() if ".second." in name} == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert adapter_of(model, "second").objectives == ["x", "y"]


@pytest.mark.slow
@pytest.mark.usefixtures("whole_graph")
def test_compiled_models_go_on(hoe_llama, tokens):
    model = hoe_llama(trained=True).double()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled, tokens)
    model.add_expert([0.75, 0.25], factors(model))
    model.set_preference([0.75, 0.25])
    torch.testing.assert_close(logits(compiled, tokens), logits(model, tokens), rtol=1e-10, atol=1e-10)


def test_a_router_that_was_added_trains(hoe_llama, tokens):
    model = hoe_llama(trained=True).double()
    model.add_router([0.75, 0.25])
    kept = router(model, "r0")
    trained = TrainedRouter(model, "r1")
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
    model.mark_trained("r1")
    losses = []
    with trained.attached():
        for _ in range(4):
            loss = model(tokens, labels=tokens, preference=[0.75, 0.25]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    trained.write()
    assert losses[-1] < losses[0]
    same(kept, router(model, "r0"))
    assert all(bool(weight.any()) for weight, _ in router(model, "r1").values())


def test_routers_by_module_come_and_go_among_the_others(hoe_llama, tokens, llama, tmp_path):
    model = hoe_llama(trained=True).double()
    far = logits(model, tokens, preference=[0.25, 0.75])
    model.add_router(RouterSpec([0.75, 0.25], name="m", kind="module"))
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    assert layer.hoe_layouts["default"].by_module == (False, True)
    with torch.no_grad():
        for each in layers(model).values():
            each.hoe_router["default"].bias[2:] += torch.tensor([0.3, -0.2])
    model.mark_trained("m")
    wanted = logits(model, tokens, preference=[0.75, 0.25])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().double(), tmp_path)
    torch.testing.assert_close(logits(loaded, tokens, preference=[0.75, 0.25]), wanted, **EXACT)
    model.remove_router("r0")
    torch.testing.assert_close(logits(model, tokens, preference=[0.75, 0.25]), wanted, **EXACT)
    model.set_preference([0.75, 0.25])
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), wanted, **EXACT)
    torch.testing.assert_close(logits(loaded, tokens, preference=[0.25, 0.75]), far, **EXACT)


def test_not_while_a_router_trains(hoe_llama):
    model = hoe_llama()
    with TrainedRouter(model).attached(), pytest.raises(ExpertError, match="being trained; let the training end first"):
        model.remove_router("r0")


def test_rows_and_generation_go_on(hoe_llama, tokens):
    model = hoe_llama(trained=True).double()
    model.add_objective("c", weights=factors(model))
    rows = [[1, 0, 0], [0, 0, 1], [0.2, 0.3, 0.5]]
    together = logits(model, tokens, preference=rows)
    for row, point in enumerate(rows):
        alone = logits(model, tokens[row : row + 1], preference=point)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-9, atol=1e-9)
    texts = model.generate(tokens, preference=[0, 0, 1], max_new_tokens=4, do_sample=False)
    assert texts.shape == (3, 11)


def test_the_old_tensors_stay_as_they_are(hoe_llama):
    # Whoever holds them, such as an optimizer or a running mean, does not see other experts in them.
    model = hoe_llama().double()
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    a, before = layer.factors("default")[0], layer.factors("default")[0].clone()
    model.add_expert([0.75, 0.25], factors(model))
    assert torch.equal(a, before)
    assert layer.factors("default")[0] is not a


def test_a_change_of_nothing_is_the_same_tensors(hoe_llama):
    from peft_hoe.growth import Change

    model = hoe_llama(interpolation="norm")
    config = model.peft_config["default"]
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    tensors = layer.adapter_tensors("default")
    after = rearranged(tensors, Change(config, config, (0, 1, 2), (0,)), layer.module_name, None)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in after.items())
    assert after["hoe_A.weight"] is tensors["hoe_A.weight"]
