"""Fine-tuning: the old model's knowledge is kept where the new data allows it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.var_finetune import LoRAConfig, adapt, add_lora, merge_lora

CONFIG = LoRAConfig(rank=2, alpha=4.0)


def logits(model: VAR, label: int = 1) -> Tensor:
    schedule = model.config.schedule
    tokens = torch.arange(schedule.length)[None] % model.config.vocabulary
    with torch.no_grad():
        inputs = model.tokenizer.quantizer.teacher_inputs(tokens, schedule)
        return model.eval()(inputs, torch.tensor([label]))


def test_the_same_data_gives_the_same_model(var: VAR) -> None:
    adapted, changed = adapt(var, classes=5, class_names=var.config.class_names)
    assert changed == set()
    assert adapted.config == var.config
    assert torch.equal(logits(adapted), logits(var))


def test_other_classes_lie_around_the_old_ones(var: VAR) -> None:
    adapted, changed = adapt(var, classes=400)
    assert changed == {"class_embedding.weight"}
    assert torch.equal(logits(adapted, 400), logits(var, 5))  # "no class" is kept
    old, new = var.class_embedding.weight[:-1], adapted.class_embedding.weight[:-1]
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=0, atol=0.2 * old.std().item())
    torch.testing.assert_close(new.std(0), old.std(0), rtol=0.2, atol=0)
    one, _ = adapt(adapt(var, classes=1)[0], classes=2)
    assert logits(one).isfinite().all()


def test_another_scale_list_takes_the_nearest_scales(var: VAR, tiny: SimpleNamespace) -> None:
    schedule = ScaleSchedule.squares(1, 2, 3, 4, 6)
    adapted, changed = adapt(var, classes=5, schedule=schedule)
    assert changed == {"position_embedding", "level_embedding.weight"}
    old, new = var.config.schedule.split(var.position_embedding), schedule.split(adapted.position_embedding)
    assert torch.equal(new[0], old[0])
    assert torch.equal(new[1], old[1])
    assert torch.equal(new[3], old[2])
    levels = adapted.level_embedding.weight
    assert torch.equal(levels[[0, 4]], var.level_embedding.weight[[0, 2]])
    result = logits(adapted)
    assert result.shape == (1, schedule.length, 16)
    assert result.isfinite().all()
    assert adapted.generate(1).shape == (1, 3, 12, 12)
    smooth = torch.linspace(-1, 1, 16).view(1, 16, 1).expand(1, 16, 16)
    with torch.no_grad():
        var = copy.deepcopy(var)
        var.position_embedding[:, 5:] = smooth
    again, _ = adapt(var, classes=5, schedule=ScaleSchedule.squares(1, 2, 6))
    column = again.config.schedule.split(again.position_embedding)[2].view(6, 6, 16)[:, 3, 0]
    assert (column.diff() > 0).all()


def test_another_tokenizer_starts_the_head_anew(var: VAR, tiny: SimpleNamespace) -> None:
    adapted, changed = adapt(var, classes=5, tokenizer=tiny.tokenizer(vocabulary=24))
    assert changed == {"head.linear.weight", "head.linear.bias"}
    assert logits(adapted).shape == (1, 21, 24)
    assert logits(adapted).isfinite().all()


@pytest.fixture
def adapters(var: VAR) -> VAR:
    torch.manual_seed(0)
    adapted, changed = adapt(var, classes=3)
    return add_lora(adapted, CONFIG, changed)


def test_only_adapters_and_what_is_new_train(adapters: VAR) -> None:
    trainable = {n for n, p in adapters.named_parameters() if p.requires_grad}
    rest = {n for n in trainable if "lora_" not in n}
    assert rest == {"class_embedding.weight"}
    assert len(trainable - rest) == 2 * 4 * 2  # blocks x layers x (down, up)
    frozen = {n: p.clone() for n, p in adapters.named_parameters() if n not in trainable}
    train(adapters)
    own = dict(adapters.named_parameters())
    assert all(torch.equal(own[n], p) for n, p in frozen.items())


def train(model: VAR, steps: int = 3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    tokens = torch.randint(16, (2, 21))
    inputs = model.train().tokenizer.quantizer.teacher_inputs(tokens, model.config.schedule)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs, torch.tensor([0, 1])).square().mean().backward()
        optimizer.step()


def test_merging_changes_nothing_but_the_names(adapters: VAR, var: VAR) -> None:
    before = logits(adapters)
    train(adapters)
    trained = logits(adapters)
    assert not torch.allclose(trained, before, atol=1e-3)
    merged = merge_lora(adapters)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == var.state_dict().keys()
