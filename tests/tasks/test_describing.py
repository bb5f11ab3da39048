"""Describing shapes: captions of procedural objects, the describer and its stages, files, any language model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

import nextscale
from nextscale.cli import main
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import CheckpointError
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.datasets.objects_captions import FEATURES, caption, descriptions, parts_of, questions
from nextscale.datasets.objects_procedural import CLASSES
from nextscale.datasets.shapes import ShapeSamples
from nextscale.datasets.shapes_files import MeshError
from nextscale.datasets.shapes_prepare import Preparation, prepare
from nextscale.datasets.shapes_sources import Procedural
from nextscale.tasks.generation.adapters import adapters_of
from nextscale.tasks.generation.vargpt_small import small_tokenizer
from nextscale.tasks.shapes.describing import Describer
from nextscale.tasks.shapes.describing_data import IGNORED, open_shapes
from nextscale.tasks.shapes.describing_recipe import DescriberRecipe, DescriptionData, SmallLanguage
from nextscale.tasks.shapes.describing_text import QuestionError, read_talks
from nextscale.tasks.shapes.describing_training import DescriberTraining
from nextscale.tasks.shapes.g3pt_tokenizer import PointTokenizer, PointTokenizerConfig
from nextscale.tasks.shapes.g3pt_tokenizer_training import initialize
from nextscale.tasks.shapes.sar3d_fields import FieldConfig
from nextscale.tasks.shapes.sar3d_planes import PlanesConfig
from nextscale.tasks.shapes.sar3d_tokenizer import TriplaneVQ, TriplaneVQConfig
from nextscale.tasks.shapes.sar3d_views import ViewsConfig
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig

POINTS = PointTokenizerConfig(16, 2, 8, 32, 1, 1, 3, 1.0, BitwiseQuantizerConfig(5), ScaleSchedule.counts(1, 3, 6))


def point_tokenizer() -> PointTokenizer:
    torch.manual_seed(0)
    return initialize(PointTokenizer(POINTS)).eval()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prepared objects with descriptions, a tokenizer, and a mesh."""
    root = tmp_path_factory.mktemp("shapes")
    samples = ShapeSamples(surface=64, uniform=8, near=8)
    prepare(root / "shapes", Procedural(3, 0, ("cup", "spoon", "lamp")), Preparation(samples), workers=0)
    talks, asked = descriptions(root / "shapes")
    (root / "talks.json").write_text(json.dumps(talks))
    (root / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asked))
    point_tokenizer().save(root / "tokenizer")
    trimesh.creation.box((1.0, 0.5, 0.3)).export(root / "box.glb")
    return root


def recipe(root: Path, **changes: Any) -> DescriberRecipe:
    data = {"source": str(root / "shapes"), "conversations": str(root / "talks.json")}
    data |= {
        f"validation{name}": value for name, value in (("", data["source"]), ("_conversations", data["conversations"]))
    }
    options: dict[str, Any] = {
        "tokenizer": str(root / "tokenizer"), "small": SmallLanguage(16, 1, 2), "hidden": (8, 8), "length": 128,
        "question": "what is it?", "stage": "all",
        "training": TrainingConfig(output=str(root / "run"), epochs=2, batch_size=3, learning_rate=1e-2),
    }  # fmt: skip
    return DescriberRecipe(DescriptionData(**data), **{**options, **changes})


@pytest.fixture(scope="module")
def trained(shapes: Path) -> Path:
    run = recipe(shapes)
    runner = run.trainer(nextscale.load)
    runner.run()
    return run.finish(runner)


# --- what is said ---------------------------------------------------------------------------------------


def test_every_object_has_the_features_of_its_class() -> None:
    for index in range(3 * len(CLASSES)):
        name, told = parts_of(5, index)
        assert name == CLASSES[index % len(CLASSES)]
        assert set(told) == set(FEATURES[name])
        for feature, phrase in told.items():
            assert phrase in FEATURES[name][feature] or (not phrase and len(FEATURES[name][feature]) == 1)
    assert parts_of(5, 2) == parts_of(5, 2)


def test_captions_name_what_there_is() -> None:
    assert caption("cup", {"saucer": ""}) == "a cup"
    told = {"legs": "four legs", "back": "a back of slats", "arms": "arm-rests"}
    assert caption("chair", told) == "a chair with four legs, a back of slats and arm-rests"


def test_questions_of_parts_are_answered_rightly() -> None:
    seen = set()
    for number in range(40):
        told = {"legs": "four legs", "top": "a round top"}
        found = questions("table", told, np.random.default_rng(number))
        question, answer = found["part"]
        assert answer == ("yes" if any(f"{part}?" in question for part in told.values()) else "no")
        question, answer = found["is-class"]
        assert (answer == "yes") == ("a table" in question)
        seen.add(answer)
    assert seen == {"yes", "no"}


def test_descriptions_need_procedural_objects(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "meshes").mkdir()
    trimesh.creation.box().export(tmp_path / "meshes" / "a.stl")
    from nextscale.datasets.shapes_sources import open_source

    samples = ShapeSamples(surface=8, uniform=8, near=0)
    prepare(tmp_path / "shapes", open_source(tmp_path / "meshes"), Preparation(samples), workers=0)
    with pytest.raises(ValueError, match="no procedural objects"):
        descriptions(tmp_path / "shapes")
    main(["prepare", "descriptions", str(shapes / "shapes"), "--out", str(tmp_path)])
    assert read_talks(tmp_path / "descriptions.json") == read_talks(shapes / "talks.json")


# --- the model ------------------------------------------------------------------------------------------


def test_a_trained_describer_loads_and_answers(shapes: Path, trained: Path) -> None:
    model = nextscale.load(trained)
    assert isinstance(model, Describer) and model.places == 10
    mesh = shapes / "box.glb"
    texts = model.describe([mesh, mesh, trimesh.creation.icosphere(1)], max_new_tokens=5, seed=[3, 4, 5])
    assert len(texts) == 3 and all(isinstance(text, str) for text in texts)
    assert texts[1] == model.describe(mesh, max_new_tokens=5, seed=4)
    alone = model.describe(mesh, "is it a cup?", max_new_tokens=5, temperature=1.0, seed=4)
    both = model.describe([mesh, mesh], "is it a cup?", max_new_tokens=5, temperature=1.0, seed=3)
    assert alone == both[1]
    model.save(shapes / "again")
    assert nextscale.load(shapes / "again").describe(mesh, max_new_tokens=5, seed=4) == texts[1]


def test_prompts_in_a_batch_score_as_alone(shapes: Path, trained: Path) -> None:
    model = nextscale.load(trained)
    rows = [
        model.spell(model.render([{"role": "user", "content": f"<shape> {text}"}])) for text in ("cup?", "is it a cup?")
    ]
    ids, mask = model.pad(rows, left=False)
    codes = model.codes(model.encode(torch.randn(2, 32, 6)))
    together = model(ids, mask, codes)
    for number, row in enumerate(rows):
        single = model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long), codes[number : number + 1])
        torch.testing.assert_close(together[number, : len(row)], single[0], atol=1e-5, rtol=1e-5)
    assert torch.allclose(codes.norm(dim=-1), torch.ones(2, 10))


def test_only_answers_are_learned(shapes: Path) -> None:
    run = recipe(shapes)
    model = run.build(nextscale.load)
    batch = run.open(model).fetch([(0, 0), (1, 2)])
    said = [model.vocabulary.decode([n for n in row if n != IGNORED]) for row in batch["labels"].tolist()]
    wanted = [messages for _, messages in read_talks(shapes / "talks.json")]
    for text, messages in zip(said, (wanted[0], wanted[2]), strict=True):
        answers = " ".join(f"{message['content']} <end>" for message in messages if message["role"] == "assistant")
        assert text.replace(" ", "") == answers.replace(" ", "")
    assert (batch["ids"] == model.config.words.patch).sum(1).tolist() == [10, 10]


def test_stages(shapes: Path) -> None:
    model = recipe(shapes).build(nextscale.load)
    DescriberTraining(model, "projector")
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"projector"}
    DescriberTraining(model, "all")
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"projector", "language"}
    with pytest.raises(ValueError, match="expected projector or all"):
        DescriberTraining(model, "some")  # type: ignore[arg-type]


def test_any_language_model_of_transformers(shapes: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    words = small_tokenizer(["what is it? a cup spoon lamp"], 128, ("<e>", "</s>", "<u>"), "")
    words.chat_template = None
    size = len(words)
    sizes = {"vocab_size": size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    llama = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        **sizes,
    )
    for name, model in (
        ("gpt", GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=200, **sizes))),
        ("llama", LlamaForCausalLM(llama)),
    ):
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    training = TrainingConfig(output=str(tmp_path / "projector"), epochs=1, batch_size=3)
    run = recipe(shapes, language=str(tmp_path / "gpt"), stage="projector", length=400, training=training)
    runner = run.trainer(nextscale.load)
    runner.run()
    loaded = nextscale.load(run.finish(runner))
    assert isinstance(loaded.describe(shapes / "box.glb", max_new_tokens=3), str)
    training = TrainingConfig(output=str(tmp_path / "lora"), epochs=1, batch_size=3)
    run = recipe(shapes, language=str(tmp_path / "llama"), lora_rank=2, length=400, training=training)
    runner = run.trainer(nextscale.load)
    model = runner.task.model  # type: ignore[attr-defined]
    assert adapters_of(model)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("projector.") for name in learned)
    runner.run()
    loaded = nextscale.load(run.finish(runner))
    assert not adapters_of(loaded)
    text = loaded.language.text
    assert text.lm_head.weight is text.get_input_embeddings().weight
    with pytest.raises(FileNotFoundError, match="language model"):
        recipe(shapes, language=str(tmp_path / "nothing")).build(nextscale.load)


def test_planes(shapes: Path, tiny: SimpleNamespace) -> None:
    torch.manual_seed(0)
    tokenizer = TriplaneVQ(
        TriplaneVQConfig(
            encoder=AutoencoderConfig(32, (1, 1), 1, 6, 10, attention=False),
            views=ViewsConfig(2, 2, 4),
            quantizer=QuantizerConfig(16, 2, unit_norm=True, smoothers=2),
            schedule=ScaleSchedule.squares(1, 2, 4, planes=3),
            decoder=PlanesConfig(8, 2, 2),
            upsampler=AutoencoderConfig(32, (1, 1), 1, 8, 4, level_attention=()),
            head=FieldConfig("density", 4, 8, grid=6),
        )
    )
    tiny.scattered(tokenizer, 0, std=0.2)
    tokenizer.save(shapes / "planes")
    run = recipe(shapes, tokenizer=str(shapes / "planes"), scales=2)
    model = run.build(nextscale.load).eval()
    assert model.places == 15 and model.config.channels == 2
    assert isinstance(model.describe(shapes / "box.glb", max_new_tokens=3), str)
    main(["prepare", "gbuffers", str(shapes / "views"), "--number", "2", "--classes", "cup", "spoon", "--views", "4",
          "--size", "16", "--workers", "0"])  # fmt: skip
    data = DescriptionData(str(shapes / "views"))
    from nextscale.tasks.shapes.describing_data import own_talks

    found = own_talks(open_shapes(data.source, model), "what is it?")
    assert sorted(messages[1]["content"] for _, messages in found) == ["a cup", "a spoon"]
    assert open_shapes(data.source, model).read([(0, 0)]).shape == (1, 2, 10, *tokenizer.image_size)
    with pytest.raises(QuestionError, match="no views"):
        open_shapes(shapes / "shapes", model)


# --- mistakes -------------------------------------------------------------------------------------------


def test_mistakes_are_told(shapes: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, mesh = nextscale.load(trained), str(shapes / "box.glb")
    for question, told in ((" ", "empty"), ("<shape> or <shape>?", "one shape"), ("cup " * 200, "tokens")):
        with pytest.raises(QuestionError, match=told):
            model.describe(mesh, question)
    with pytest.raises(QuestionError, match="2 questions"):
        model.describe(mesh, ["a?", "b?"])
    (shapes / "bad.obj").write_text("nothing")
    with pytest.raises(MeshError, match=r"bad\.obj"):
        model.describe(shapes / "bad.obj")
    with pytest.raises(MeshError, match="no mesh"):
        model.describe(3)
    with pytest.raises(CheckpointError, match="no weights"):
        Describer.from_official({})
    for options, told in (({"init": "x"}, "give init"), ({"scales": 9}, "scales"), ({"lora_rank": -1}, "lora_rank")):
        with pytest.raises(ValueError, match=told):
            recipe(shapes, **options).build(nextscale.load)
    (shapes / "other.json").write_text(json.dumps([{"shape": "x", "messages": [{"role": "user", "content": "a"}]}]))
    with pytest.raises(QuestionError, match="no answer"):
        read_talks(shapes / "other.json")
    assert main(["describe", str(shapes / "none.glb"), "--model", str(trained)]) == 2
    assert "no such mesh" in capsys.readouterr().err


def test_commands(shapes: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "said.json"
    command = [
        "describe",
        str(shapes / "box.glb"),
        "--model",
        str(trained),
        "--max-new-tokens",
        "3",
        "--json",
        str(out),
    ]
    assert main(command) == 0
    said = json.loads(out.read_text())["answers"][0]
    assert said["answer"] in capsys.readouterr().out
    assert said["question"] == "what is it?"
    assert main(["evaluate", "understanding", str(trained), "--benchmark", "answers", "--questions",
                 str(shapes / "questions.jsonl"), "--shapes", str(shapes / "shapes"), "--limit", "4",
                 "--max-new-tokens", "3", "--out", str(tmp_path)]) == 0  # fmt: skip
    scores = json.loads((tmp_path / "answers.json").read_text())["scores"]
    assert {"accuracy", "floor"} <= set(scores)
