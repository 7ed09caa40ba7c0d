"""What a forward never holds: logits of every position, and a whole MLP of a long prefill."""

import weakref

import pytest
import torch
from tiny_elva import BOS, VOCAB, batch, batch_inputs, sample_inputs, tiny_model, video, words
from torch.utils._python_dispatch import TorchDispatchMode

from elva_hf import mlp_elva, modeling_elva

STEPS = [{"layer": 1, "target_ratio": 0.5}]
SAMPLE = [BOS, *video(*6 * [(3, 3)]), *words(6, 1)]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned, and of the largest with a given last size."""

    def __init__(self, last_size=None):
        super().__init__()
        self.last_size, self.largest = last_size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.t.default:  # a view of a weight
            return outputs
        for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(output, torch.Tensor) and self.last_size in (None, output.shape[-1:].numel()):
                self.largest = max(self.largest, output.numel())
        return outputs


def labels_of(inputs, count):
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -count:] = inputs["input_ids"][:, -count:]
    return labels


@pytest.fixture
def model():
    return tiny_model(text={"num_hidden_layers": 3}, merge_schedule=STEPS)


@pytest.mark.parametrize("schedule", ["none", STEPS])
def test_training_makes_logits_where_labels_are_and_nowhere_else(model, schedule):
    inputs = sample_inputs(SAMPLE)
    model.train()
    with LargestTensor(VOCAB) as seen:
        outputs = model(**inputs, labels=labels_of(inputs, 4), merge_schedule=schedule)
        outputs.loss.backward()
    assert outputs.logits is None
    assert seen.largest == 4 * VOCAB


def test_the_loss_is_the_mean_over_labels_in_both_modes(model):
    inputs = batch_inputs([SAMPLE, SAMPLE[:-2]])
    labels = labels_of(inputs, 5)
    outputs = model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, -6:-1].flatten(0, 1), labels[:, -5:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    assert outputs.logits.shape == (*inputs["input_ids"].shape, VOCAB)
    model.train()
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    total = model(**inputs, labels=labels, num_items_in_batch=20).loss
    torch.testing.assert_close(total, expected * 10 / 20)


def test_a_batch_without_labels_has_no_loss_but_a_gradient(model):
    inputs = sample_inputs(SAMPLE)
    model.train()
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    assert model.model.patch_embed.pixel_proj.weight.grad is not None


def test_a_long_loss_is_made_in_parts_with_the_same_gradient(model, monkeypatch):
    inputs = sample_inputs(words(40, 3))
    model.train()

    def run():
        model.zero_grad()
        with LargestTensor(VOCAB) as seen:
            loss = model(**inputs, labels=labels_of(inputs, 33)).loss
        loss.backward()
        return loss, model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone(), seen.largest

    whole, gradient, _ = run()
    monkeypatch.setattr(modeling_elva, "LOSS_ROWS", 8)
    parts, gradient_of_parts, largest = run()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient_of_parts, gradient)
    assert largest == 8 * VOCAB


def test_a_prefill_of_generate_makes_one_row_of_logits(model):
    inputs = sample_inputs(SAMPLE)
    with LargestTensor(VOCAB) as seen:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert seen.largest == VOCAB


def test_a_long_prefill_runs_its_mlp_in_chunks_and_leaves_the_modules_as_they_were(model, monkeypatch):
    inputs = sample_inputs(SAMPLE)
    width = model.config.text_config.intermediate_size
    with torch.no_grad():
        whole = model(**inputs).logits
        monkeypatch.setattr(mlp_elva, "MLP_ROWS", 7)
        with LargestTensor(width) as seen:
            chunked = model(**inputs).logits
    torch.testing.assert_close(chunked, whole)
    assert seen.largest == 7 * width
    assert all("forward" not in vars(layer.mlp) for layer in model.model.language_model.layers)


@torch.no_grad()
def test_an_mlp_in_chunks_is_never_held_twice(model, monkeypatch):
    """Its pieces go into one output as they come; joined at the end they would all be there beside it."""
    monkeypatch.setattr(mlp_elva, "MLP_ROWS", 7)
    layers, hidden = model.model.language_model.layers, torch.randn(1, 40, model.config.text_config.hidden_size)
    whole = layers[0].mlp(hidden)
    pieces = []
    handle = layers[0].mlp.down_proj.register_forward_hook(lambda *args: pieces.append(weakref.ref(args[2])))
    with mlp_elva.mlp_in_chunks(layers, 40):
        alive = []
        layers[0].mlp.gate_proj.register_forward_pre_hook(lambda *_: alive.append(sum(p() is not None for p in pieces)))
        chunked = layers[0].mlp(hidden)
    handle.remove()
    torch.testing.assert_close(chunked, whole)
    assert len(pieces) == 6 and max(alive) <= 1


@torch.no_grad()
def test_states_that_nothing_has_merged_are_not_copied(model):
    """Without padding the state of a layer is what the layer was given, up to the first merge."""
    given = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    states = model(**sample_inputs(SAMPLE), output_hidden_states=True).hidden_states
    pointers = [state.data_ptr() for state in states[:3]], [state.data_ptr() for state in given]
    assert [one == other for one, other in zip(*pointers, strict=True)] == [True, False, False]


def test_mlp_chunks_respect_a_forward_that_was_there_before(model, monkeypatch):
    """Offloading libraries hang a forward of their own on modules; it is called, and put back."""
    monkeypatch.setattr(mlp_elva, "MLP_ROWS", 7)
    mlp = model.model.language_model.layers[0].mlp
    calls, original = [], mlp.forward

    def hooked(hidden):
        calls.append(hidden.shape[1])
        return original(hidden)

    mlp.forward = hooked
    with torch.no_grad():
        model(**sample_inputs(SAMPLE))
    assert max(calls) == 7
    assert mlp.forward is hooked


def test_training_keeps_whole_mlps(model, monkeypatch):
    """Chunks would keep as much for the backward pass and be slower."""
    monkeypatch.setattr(mlp_elva, "MLP_ROWS", 7)
    width = model.config.text_config.intermediate_size
    with LargestTensor(width) as seen:
        model(**sample_inputs(SAMPLE))
    assert seen.largest > 7 * width


def test_text_alone_is_left_to_the_decoder(model):
    inputs = batch([words(9, 1), words(5, 2)])
    plain = model.model.language_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(
        model(**inputs).logits, model.lm_head(plain.last_hidden_state), msg="a schedule must not touch text"
    )
