"""What trains, and that a forward's plan is its backward's."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import get_peft_model

from peft_hoe import record_votes


@pytest.fixture
def hoe_llama(hoe_llama):
    """In float64, where equal means equal."""
    return lambda **settings: hoe_llama(**settings).double()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model, tokens, **kwargs):
    return model(tokens, **kwargs).logits.pow(2).mean()


def checkpointed(model, reentrant):
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")  # peft 0.18, of modules_to_save
def test_only_routers_train(hoe_llama, tokens):
    model = hoe_llama(trained=True, modules_to_save=["lm_head"])
    names = trainable(model)
    assert names
    assert all("hoe_router" in name or "modules_to_save" in name for name in names)
    assert any("modules_to_save" in name for name in names)
    model.set_preference([0, 1])
    with model.use_preference([1, 0]):
        model(tokens, preference=[0.3, 0.7])
    assert trainable(model) == names
    model.set_adapter("default")
    assert trainable(model) == names
    with model.disable_adapter():
        assert not any("hoe_" in name for name in trainable(model))
    assert trainable(model) == names


def test_loaded_for_inference_nothing_becomes_trainable(hoe_llama, llama, tmp_path):
    from peft import PeftModel

    hoe_llama().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    assert not trainable(model)
    with model.disable_adapter():
        pass
    model.set_preference([1, 0])
    assert not trainable(model)


def test_train_experts_is_one_switch(hoe_llama, tokens):
    model = hoe_llama(train_experts=True)
    assert {name.split(".")[-3] for name in trainable(model)} == {"hoe_A", "hoe_B", "hoe_router"}
    loss_of(model, tokens).backward()
    got = gradients(model)
    assert {name.split(".")[-3] for name in got if got[name].abs().sum() > 0} == {"hoe_A", "hoe_B"}


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_every_voting_router_gets_a_gradient(hoe_llama, tokens, checkpointing):
    model = hoe_llama(trained=True)
    if checkpointing is not None:
        checkpointed(model, reentrant=checkpointing)
    loss_of(model, tokens, preference=[0.25, 0.75]).backward()
    got = gradients(model)
    assert len(got) == 2 * 14
    assert all(grad.abs().sum() > 0 for grad in got.values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("change", ["none", "set_preference", "leave the block", "another thread"])
def test_checkpointing_replays_the_forwards_plan(hoe_llama, tokens, reentrant, change):
    wanted = [0.1, 0.9]
    plain = hoe_llama(trained=True).train()
    loss_of(plain, tokens, preference=wanted).backward()
    expected = gradients(plain)

    model = hoe_llama(trained=True)
    checkpointed(model, reentrant)
    if change == "leave the block":
        with model.use_preference(wanted):
            loss = loss_of(model, tokens)
    else:
        loss = loss_of(model, tokens, preference=wanted)
    if change == "set_preference":
        model.set_preference([1, 0])
    if change == "another thread":
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_preferences_before_one_backward_raise(hoe_llama, tokens, reentrant):
    model = hoe_llama(trained=True)
    checkpointed(model, reentrant)
    loss = loss_of(model, tokens, preference=[0.1, 0.9]) + loss_of(model, tokens, preference=[0.25, 0.75])
    with pytest.raises(RuntimeError, match="2 different preferences await"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_harmless_orders_do_not_raise(hoe_llama, tokens, reentrant):
    model = hoe_llama(trained=True)
    checkpointed(model, reentrant)
    for preference in ([0.1, 0.9], [0.25, 0.75]):  # forward, backward, forward, backward
        loss = loss_of(model, tokens, preference=preference)
        loss.backward()
    (loss_of(model, tokens, preference=[0.2, 0.8]) + loss_of(model, tokens, preference=[0.2, 0.8])).backward()
    loss = loss_of(model, tokens, preference=[0.1, 0.9])  # a skipped step: the graph is dropped
    del loss
    loss = loss_of(model, tokens, preference=[0.2, 0.8])
    with torch.no_grad():  # an evaluation in between
        loss_of(model, tokens, preference=[1, 0])
    loss.backward()
    assert len(gradients(model)) == 2 * 14


@pytest.mark.parametrize("reentrant", [True, False])
def test_generating_between_forward_and_backward_changes_nothing(hoe_llama, tokens, reentrant):
    plain = hoe_llama(trained=True).train()
    loss_of(plain, tokens, preference=[0.1, 0.9]).backward()
    expected = gradients(plain)
    model = hoe_llama(trained=True)
    checkpointed(model, reentrant)
    loss = loss_of(model, tokens, preference=[0.1, 0.9])
    model.eval().generate(tokens, preference=[0.25, 0.75], max_new_tokens=2)
    model.train()
    loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", ["logits", "hidden_states", "loss"])
def test_two_preferences_raise_wherever_the_loss_comes_from(hoe_llama, tokens, reentrant, part):
    model = hoe_llama(trained=True)
    checkpointed(model, reentrant)

    def loss(preference):
        output = model(tokens, labels=tokens, output_hidden_states=True, preference=preference)
        found = output[part]
        return (found[-1] if part == "hidden_states" else found).pow(2).mean()

    with pytest.raises(RuntimeError, match="2 different preferences await"):
        (loss([0.1, 0.9]) + loss([0.25, 0.75])).backward()


def test_two_preferences_raise_in_parts_that_are_called_by_themselves(hoe_llama, tokens):
    model = hoe_llama(trained=True)
    checkpointed(model, reentrant=False)
    inner = model.base_model.model.model
    losses = []
    for preference in ([0.1, 0.9], [0.25, 0.75]):
        with model.use_preference(preference):
            losses.append(inner(tokens).last_hidden_state.pow(2).mean())
    with pytest.raises(RuntimeError, match="2 different preferences await"):
        sum(losses).backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_backwards_out_of_order_use_their_own_forwards(hoe_llama, tokens, reentrant):
    plain = hoe_llama(trained=True).train()
    wanted = [[0.1, 0.9], [0.25, 0.75], [0.2, 0.8]]
    expected = []
    for preference in wanted:
        plain.zero_grad()
        loss_of(plain, tokens, preference=preference).backward()
        expected.append(gradients(plain))
    model = hoe_llama(trained=True)
    checkpointed(model, reentrant)
    losses = [loss_of(model, tokens, preference=preference) for preference in wanted]
    for i in (1, 0, 2):  # all three graphs stay alive
        model.zero_grad()
        losses[i].backward()
        torch.testing.assert_close(gradients(model), expected[i], rtol=0, atol=1e-10)


def test_checkpointing_in_eval_mode_replays_too(hoe_llama, tokens):
    from torch.utils.checkpoint import checkpoint

    model = hoe_llama(trained=True)
    loss_of(model, tokens, preference=[0.1, 0.9]).backward()
    expected = gradients(model)
    model.zero_grad()
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()

    def forward(embeddings):
        return model(inputs_embeds=embeddings, preference=[0.1, 0.9]).logits

    loss = checkpoint(forward, inputs, use_reentrant=False).pow(2).mean()
    model.set_preference([1, 0])
    loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_checkpointing_encoder_decoders(steerable, tokens, kind):
    model = steerable(kind)

    def loss():
        return model(input_ids=tokens, decoder_input_ids=tokens, preference=[0.1, 0.9]).logits.pow(2).mean()

    loss().backward()
    expected = gradients(model)
    model.zero_grad()
    checkpointed(model, reentrant=False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    pending = loss()
    model.set_preference([1, 0])
    pending.backward()
    got = gradients(model)
    assert got.keys() == expected.keys()


def test_a_trained_model_can_be_pickled(hoe_llama, tokens, tmp_path):
    model = hoe_llama(trained=True).train()
    loss_of(model, tokens, preference=[0.25, 0.75]).backward()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-10)


def test_enabling_adapters_frees_nothing(hoe_llama, llama, tmp_path):
    from peft import PeftModel

    hoe_llama().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    model.base_model.enable_adapter_layers()
    assert not trainable(model)


def test_other_trainable_adapters_of_peft_keep_their_rules(llama, config):
    model = get_peft_model(llama(), config())
    model.add_adapter("second", config(routers=[[0.75, 0.25]]))
    assert all(".default." in name for name in trainable(model))
    model.set_adapter("second")
    assert all(".second." in name for name in trainable(model))
    assert trainable(model)


def test_checkpointing_repeats_a_forward_whose_votes_were_recorded(toys):
    """The repeated forward is outside of the recorder, and took another way through a module with a small router: an error."""
    found = []
    for repeat in (False, True):
        model = toys.make_policy().double()
        model.mark_trained("r0")
        if repeat:
            checkpointed(model, reentrant=False)
        ids = torch.randint(4, 32, (3, 9), generator=torch.Generator().manual_seed(0))
        with record_votes(model) as votes:
            loss = loss_of(model, ids, preference=[0.25, 0.75])
        loss.backward()
        assert votes
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-12)
    assert found[0]
