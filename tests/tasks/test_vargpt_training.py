"""Training VARGPT: conversations, stages, packing, preferences, adapters."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.optim import parameter_groups
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.tasks.generation.adapters import add_adapters, merge_adapters
from nextscale.tasks.generation.vargpt import SYSTEM
from nextscale.tasks.generation.vargpt_data import ConversationError, ConversationSet, packed_rows, read_conversations
from nextscale.tasks.generation.vargpt_recipe import VARGPTRecipe
from nextscale.tasks.generation.vargpt_small import SmallSizes, small_model
from nextscale.tasks.generation.vargpt_training import (
    IGNORED,
    STAGES,
    VARGPTLossConfig,
    VARGPTPreference,
    VARGPTTraining,
    freeze,
    packed_view,
)
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ, BitwiseVQConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

SCHEDULE = ScaleSchedule.squares(1, 2)
SIZES = SmallSizes(32, 1, 2, 16, 1, 2, 4, 32, 1, 2, 64)
VARIANTS = ("v1", "v1.1")


def build_tokenizer(variant: str):
    torch.manual_seed(0)
    if variant == "v1":
        sizes = AutoencoderConfig(32, (1, 1), 1, latent_channels=4)
        tokenizer = ResidualVQ(ResidualVQConfig(sizes, QuantizerConfig(16, 4, smoothers=1), SCHEDULE))
        torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
        tokenizer.quant_conv.weight.data.mul_(100)  # else all images have the same tokens
        return tokenizer.eval()
    sizes = AutoencoderConfig(32, (1, 1), 1, latent_channels=4, attention=False)
    return BitwiseVQ(BitwiseVQConfig(sizes, BitwiseQuantizerConfig(4), SCHEDULE)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Conversations with images, and pairs of images."""
    root = tmp_path_factory.mktemp("talks")
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8)).save(root / f"{name}.png")
    talks = [
        {"messages": [{"role": "user", "content": "draw a cat"}, {"role": "assistant", "content": "here <image_gen>"}],
         "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "<image> what is it"}, {"role": "assistant", "content": "a dog"}],
         "images": ["b.png"]},
        {"messages": [{"role": "user", "content": "<image> in red"}, {"role": "assistant", "content": "<image_gen>"}],
         "images": ["b.png", "c.png"]},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hello you"}]},
    ]  # fmt: skip
    (root / "talks.json").write_text(json.dumps(talks))
    (root / "lines.json").write_text("\n".join(json.dumps(talk) for talk in talks))
    (root / "pairs.json").write_text(json.dumps([{**talks[0], "images": ["a.png", "b.png"]}] * 2))
    return root


def build(folder, variant: str):
    torch.manual_seed(1)
    texts = [content for talk in read_conversations(folder / "talks.json") for _, content in talk.messages]
    return small_model(texts, build_tokenizer(variant), 8, SIZES)


def data(folder, model, name="talks.json", **options):
    pairs = options.get("pairs", False)
    return ConversationSet(read_conversations(folder / name, pairs), model.processor, 4, length=64, **options)


@pytest.fixture(params=VARIANTS)
def model(request, folder):
    return build(folder, request.param)


def spelt(model, ids) -> list[str]:
    return model.processor.tokenizer.convert_ids_to_tokens([int(n) for n in ids])


# --- data -----------------------------------------------------------------------------------------------


def test_only_answers_have_labels(folder, model):
    sample = data(folder, model).encode(0, 0)
    words = spelt(model, sample.ids)
    places = model.config.places
    assert words[:5] == ["<user>", "draw", "a", "cat", "<end>"]
    assert words[5:8] == ["<assistant>", "here", "<draw>"] and words[8 : 8 + places] == ["<pad>"] * places
    learned = [word for word, label in zip(words, sample.labels, strict=True) if label != IGNORED]
    assert learned == ["here", "<draw>", "<drawn>", "<end>"]
    [image] = sample.drawn
    assert image.shape == (3, 4, 4) and image.min() >= -1 and image.max() <= 1


def test_both_forms_of_files_are_alike(folder):
    assert read_conversations(folder / "talks.json") == read_conversations(folder / "lines.json")


def test_batches_hold_images_in_the_order_of_their_marks(folder, model):
    batch = data(folder, model).fetch([2, 0, 1])
    marks = model.config.marks
    assert len(batch["image"]) == 2 and int((batch["ids"] == marks.pad).sum()) == 2 * model.config.places
    features = model.language.see(batch["pixels"], batch["grids"])
    assert len(features) == int((batch["ids"] == marks.image).sum())
    alone = data(folder, model).fetch([0])
    torch.testing.assert_close(batch["image"][1], alone["image"][0])


def test_rows_are_filled():
    assert packed_rows([5, 9, 3, 2], 10) == [[1], [0, 2, 3]]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"messages": []}, "no list of messages"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer"),
        ({"messages": [{"role": "assistant", "content": "<image_gen>"}]}, "1 marks of images and 0 images"),
        ({"messages": [{"role": "assistant"}]}, "without role and content"),
        ([], "is a list"),
    ],
)
def test_conversations_that_are_wrong(tmp_path, entry, told):
    (tmp_path / "bad.json").write_text(json.dumps([entry]))
    with pytest.raises(ConversationError, match=f"sample 0.*{told}"):
        read_conversations(tmp_path / "bad.json")


def test_files_that_are_wrong(tmp_path, folder, model):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConversationError, match="not JSON"):
        read_conversations(tmp_path / "bad.json")
    with pytest.raises(ConversationError, match=r"is no pair|expected 2"):
        read_conversations(folder / "talks.json", pairs=True)
    short = ConversationSet(read_conversations(folder / "talks.json"), model.processor, 4, length=5)
    with pytest.raises(ConversationError, match=r"sample 0 has \d+ tokens"):
        short.fetch([0])


# --- losses ---------------------------------------------------------------------------------------------


def test_packing_changes_no_loss(folder, model):
    """Conversations in one row see nothing of each other."""
    model.eval()
    task = VARGPTTraining(model)
    flips = None
    losses = []
    for pack in (False, True):
        batch = data(folder, model, pack=pack).fetch([2, 0, 1, 3])
        if pack:
            assert len(batch["ids"]) < 4
        count = len(batch["image"])
        if model.config.infinity is not None:
            grids = [scale.grid for scale in SCHEDULE.scales]
            flips = [torch.zeros(count, 4, *grid, dtype=torch.bool) for grid in grids]
        with torch.no_grad():
            given = {**batch, "dropped": torch.zeros(count, dtype=torch.long), "flips": flips}
            losses.append(task.loss(SYSTEM, model, given, 0))
    for name in ("text_loss", "image_loss"):
        torch.testing.assert_close(losses[0][1][name], losses[1][1][name], atol=1e-5, rtol=0)


def test_packed_tokens_see_their_conversation_up_to_themselves():
    visible, positions = packed_view(torch.tensor([[1, 1, 2, 2, 0]]), 3)
    assert visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1],
    ]  # fmt: skip
    assert positions[:, 0].tolist() == [[0, 1, 0, 1, 0]] * 3


def test_text_alone(folder, model):
    loss, metrics = VARGPTTraining(model).loss(SYSTEM, model, data(folder, model).fetch([1, 3]), 0)
    assert set(metrics) == {"text_loss"} and loss.isfinite()


@pytest.mark.parametrize(("variant", "stage"), [(v, s) for v in STAGES for s in STAGES[v]])
def test_what_learns_in_each_stage(folder, variant, stage):
    model = build(folder, variant)
    freeze(model, stage)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = {
        "text": "language.text.layers.0.mlp.up_proj.weight",
        "vision": next(name for name, _ in model.named_parameters() if name.startswith("language.vision.")),
        "reader": "language.reader.0.weight",
        "projectors": "to_language.expand.weight",
        "labels": "decoder.class_embedding.weight" if variant == "v1" else "start_embedding.weight",
        "decoder": "decoder.head.linear.weight",
    }
    assert {part for part, name in groups.items() if name in learns} == set(STAGES[variant][stage]) - (
        {"reader"} if variant == "v1.1" else set()
    )
    assert not any("tokenizer" in name for name in learns)


def test_stages_that_are_not(folder):
    with pytest.raises(ValueError, match="no stage '12'"):
        freeze(build(folder, "v1.1"), "12")
    with pytest.raises(ValueError, match="folded"):
        freeze(build(folder, "v1").fold(), "all")


def test_preferences_are_learned(folder, model):
    """Steps down the loss make the liked image likelier than the other."""
    task = VARGPTPreference(model, copy.deepcopy(model), VARGPTLossConfig(flip_strength=0.0))
    batch = data(folder, model, "pairs.json", pairs=True).fetch([0, 1])
    assert torch.equal(batch["ids"][0], batch["ids"][2]) and not torch.equal(batch["image"][0], batch["image"][2])
    model.eval()
    loss, metrics = task.loss(SYSTEM, model, batch, 0)
    assert float(loss.detach()) == pytest.approx(np.log(2), abs=1e-5) and float(metrics["margin"]) == 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        task.loss(SYSTEM, model, batch, 0)[0].backward()
        optimizer.step()
    assert float(task.loss(SYSTEM, model, batch, 0)[1]["margin"]) > 0


def test_preferences_need_what_they_started_from(folder, model):
    with pytest.raises(ValueError, match="reference"):
        VARGPTPreference(model, None)


def test_adapters_learn_and_merge(folder, model):
    names = set(model.state_dict())
    recipe = VARGPTRecipe("x.json", init="x", lora_rank=2, loss=VARGPTLossConfig(train="2"))
    task = recipe.task(model)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".lora_" in name for name in learns)
    assert all(".lora_" in name for name in learns if name.startswith("language.text."))
    batch = data(folder, model).fetch([0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    task.loss(SYSTEM, model, batch, 0)[0].backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        before, _ = model(batch["ids"], batch["mask"])
        after, _ = merge_adapters(model)(batch["ids"], batch["mask"])
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == names


def test_adapters_of_layers_that_are_not(model):
    with pytest.raises(ValueError, match="no layer nosuch"):
        add_adapters(model, layers=("nosuch",))
    with pytest.raises(ValueError, match="rank"):
        add_adapters(model, 0)


# --- runs -----------------------------------------------------------------------------------------------


def test_a_run_from_nothing_to_a_model(folder, tmp_path):
    recipe = VARGPTRecipe(
        str(folder / "talks.json"),
        validation=str(folder / "talks.json"),
        tokenizer="any",
        seen=8,
        small=SIZES,
        length=64,
        training=TrainingConfig(output=str(tmp_path), epochs=1, batch_size=2, log_every=1, save_every=0),
    )
    run = recipe.trainer(lambda source: build_tokenizer("v1.1"))
    run.run()
    assert len(recipe.examples(run).rows) == 2
    from nextscale import load

    model = load(recipe.finish(run))
    assert model.generate("draw a cat").shape == (1, 3, 4, 4)
    assert isinstance(model.chat([{"role": "user", "content": "hello"}], max_new_tokens=3).text, str)


def build_var(tokenizer):
    from nextscale.core.transformer import TransformerConfig
    from nextscale.tasks.generation.var import VAR, VARConfig
    from nextscale.tasks.generation.var_training import initialize

    torch.manual_seed(2)
    config = VARConfig(TransformerConfig(32, 1, 2), 3, 16, 4, SCHEDULE, class_names=("a", "b", "c"))
    return initialize(VAR(config, tokenizer), modulation=1, gate=1, head=1).eval()


def test_a_decoder_begins_with_a_vars_weights_and_reads_through_the_language_model(folder):
    var = build_var(build_tokenizer("v1"))
    model = small_model(["draw a cat"], var.tokenizer, 8, replace(SIZES, width=40), var)
    own, found = model.decoder.state_dict(), var.state_dict()
    assert all(torch.equal(own[name], found[name]) for name in found if name != "class_embedding.weight")
    x = model.decoder.embed(None, SCHEDULE, 0, SCHEDULE.length) + var.class_embedding.weight[-1]
    inside = model.to_language(x)
    back = model.from_language(inside / inside.square().mean(-1, keepdim=True).sqrt())
    assert torch.nn.functional.cosine_similarity(back, x, dim=-1).min() > 0.99
    torch.testing.assert_close(back.norm(dim=-1).mean(), x.norm(dim=-1).mean(), rtol=0.1, atol=0)
    # As wide as the decoder, the language model lets everything through.
    wide = small_model(["draw a cat"], var.tokenizer, 8, SIZES, var)
    given = wide.to_language(x)
    seen = wide.language.text(inputs_embeds=given).last_hidden_state
    torch.testing.assert_close(seen, given / (given.square().mean(-1, keepdim=True) + 1e-6).sqrt(), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="begin with a VAR"):
        VARGPTRecipe("x.json", decoder="y", vocabulary=str(folder / "talks.json")).model(lambda source: model)
    with pytest.raises(ValueError, match="it is a transformer"):
        small_model(["a"], build_tokenizer("v1.1"), 8, replace(SIZES, vision="convolutions"))


def test_a_run_that_reads_by_convolutions_and_begins_with_a_var(folder, tmp_path):
    sizes = replace(SIZES, vision="convolutions", vision_width=16)
    recipe = VARGPTRecipe(
        str(folder / "talks.json"),
        decoder="any",
        seen=32,
        small=sizes,
        length=64,
        read_ratio=1.25,
        mirror=True,
        null_prompt="draw a cat",
        guidance=2.5,
        training=TrainingConfig(output=str(tmp_path), epochs=1, batch_size=2, log_every=1, save_every=0),
    )
    run = recipe.trainer(lambda source: build_var(build_tokenizer("v1")))
    run.run()
    from nextscale import load

    model = load(recipe.finish(run))
    assert model.language.convolves
    assert (model.config.null_prompt, model.config.guidance) == ("draw a cat", 2.5)
    picture = Image.new("RGB", (40, 30), "red")
    talk = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is it"}]}]
    assert isinstance(model.chat(talk, max_new_tokens=3, max_images=0).text, str)
    together = model.generate(["draw a cat", "hello"], seed=3, guidance=2.0)
    torch.testing.assert_close(model.generate("hello", seed=4, guidance=2.0)[0], together[1])
    # A prompt that is the null prompt is led away from by nothing.
    same = [model.generate("draw a cat", seed=5, guidance=strength) for strength in (0.0, 3.0)]
    torch.testing.assert_close(same[0], same[1])


def test_a_small_one_begins_with_trained_eyes_and_learns_its_parts_at_their_own_rates(folder, tmp_path):
    seeing = small_model(["what is it"], build_tokenizer("v1"), 8, SIZES)
    sources = {"eyes": seeing, "codes": build_tokenizer("v1"), "var": build_var(build_tokenizer("v1"))}
    recipe = VARGPTRecipe(
        str(folder / "talks.json"),
        decoder="var",
        vision="eyes",
        seen=8,
        small=SIZES,
        length=64,
        rates={"vision": 0.0, "projectors": 0.5},
        training=TrainingConfig(output=str(tmp_path), epochs=1, batch_size=2, log_every=1, save_every=0),
    )
    run = recipe.trainer(sources.__getitem__)
    run.run()
    model = run.task.model
    old = seeing.language.vision.state_dict()
    assert all(torch.equal(value, old[name]) for name, value in model.language.vision.state_dict().items())
    groups = {group["rate"] for group in parameter_groups(model, 0.1)}
    assert groups == {0.0, 0.5, 1.0}
    begun = recipe.model(sources.__getitem__)
    assert not torch.equal(model.language.words.weight, begun.language.words.weight)
    with pytest.raises(ValueError, match="the vision models differ"):
        replace(recipe, small=replace(SIZES, vision_width=32)).model(sources.__getitem__)
    with pytest.raises(ValueError, match="codes is a ResidualVQ, expected a VARGPT"):
        replace(recipe, vision="codes").model(sources.__getitem__)
    with pytest.raises(ValueError, match="rates has eyes; expected of text, vision"):
        replace(recipe, rates={"eyes": 1.0})
    with pytest.raises(ValueError, match="a vision model of its own"):
        VARGPTRecipe("x.json", init="y", vision="eyes")


def test_images_to_read_are_cut_and_mirrored_in_training_alone(folder):
    model = small_model(["what is it hello you a cat dog in red draw here"], build_tokenizer("v1"), 8, SIZES)
    plain, other = (data(folder, model, **options) for options in ({}, {"read_ratio": 1.5, "mirror": True}))
    first = [plain.encode(epoch, 1).seen[0][0] for epoch in (0, 1)]
    assert torch.equal(*first)
    cut = [other.encode(epoch, 1).seen[0][0] for epoch in range(6)]
    assert len({tuple(each.flatten().tolist()) for each in cut}) == 6
    assert torch.equal(other.encode(3, 1).seen[0][0], cut[3])
    assert plain.encode(0, 1).ids == other.encode(0, 1).ids
    with pytest.raises(ValueError, match="read_ratio"):
        data(folder, model, read_ratio=0.5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "give one of init"),
        ({"tokenizer": "x", "pairs": True}, "pairs"),
        ({"init": "x", "lora_rank": -1}, "lora_rank"),
    ],
)
def test_recipes_that_are_wrong(options, told):
    with pytest.raises(ValueError, match=told):
        VARGPTRecipe("x.json", **options)
