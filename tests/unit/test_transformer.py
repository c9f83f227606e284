"""The toy transformer starts where the paper's does, and its switches do what they say."""

import pytest
import torch

from sinkbook.errors import SinkbookError
from sinkbook.tasks import TaskConfig, task
from sinkbook.transformer import Transformer, TransformerConfig


@pytest.fixture(scope="module")
def paper_tokens():
    return task(TaskConfig()).batch_at(2, 0, 0)[:, :-1]


def residuals(model, tokens):
    """Residual states after the embedding and after each layer, by hooks as a reader would."""
    states = []
    hooks = [
        model.layers[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])),
        *(layer.register_forward_hook(lambda *a: states.append(a[2])) for layer in model.layers),
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize(("kernel", "norm"), [("softmax", 24.346817), ("relu", 23.368813)])
def test_golden_residual_norm_of_the_start_token_at_step_0(kernel, norm, paper_tokens):
    torch.manual_seed(42)
    model = Transformer(TransformerConfig(attention=kernel))
    after = residuals(model, paper_tokens)[1][0, 0].norm().item()
    assert after == pytest.approx(norm, abs=1e-5)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_golden_value_norm_of_the_start_token_at_step_0(kernel, paper_tokens):
    torch.manual_seed(42)
    model = Transformer(TransformerConfig(attention=kernel))
    block = model.layers[0]
    embedding = residuals(model, paper_tokens)[0]
    with torch.no_grad():
        value = block.attention.wo(block.attention.wv(block.attention_norm(embedding)))
    assert value[0, 0].norm().item() == pytest.approx(5.19937, abs=1e-5)


def test_no_position_sees_a_later_one(paper_tokens):
    torch.manual_seed(0)
    for kernel in ("softmax", "relu"):
        config = TransformerConfig(width=32, layers=2, heads=2, attention=kernel)
        model = Transformer(config).eval()
        changed = paper_tokens.clone()
        changed[:, 100:] = changed[:, 100:].roll(1, dims=1)
        with torch.no_grad():
            difference = (model(paper_tokens) - model(changed)).abs().amax(dim=(0, 2))
        assert difference[:100].max() < 1e-6
        assert difference[100:].max() > 1e-3


def test_switched_off_parts_are_absent_and_linear_ones_are_one_map():
    config = TransformerConfig(
        width=16, layers=3, without_attention=(0,), without_mlp=(1,), linear_mlp=(2,)
    )
    first, second, third = Transformer(config).layers
    assert first.attention is None
    assert first.mlp is not None
    assert second.mlp is None
    assert isinstance(third.mlp, torch.nn.Linear)
    assert third.mlp.bias is None


def test_a_model_of_nothing_but_switched_off_layers_is_its_embedding(paper_tokens):
    config = TransformerConfig(width=16, without_attention=(0,), without_mlp=(0,))
    states = residuals(Transformer(config), paper_tokens)
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"attention": "sofmax"}, "Known: softmax"), ({"heads": 3}, "not a multiple of 3")],
)
def test_an_impossible_model_is_refused(changes, said):
    with pytest.raises(SinkbookError, match=said):
        Transformer(TransformerConfig(**changes))


def test_a_text_longer_than_the_model_is_refused():
    model = Transformer(TransformerConfig(width=16, length=8))
    with pytest.raises(SinkbookError, match="9 positions"):
        model(torch.zeros(1, 9, dtype=torch.long))
