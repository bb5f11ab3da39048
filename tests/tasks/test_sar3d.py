"""SAR3D: planes and tokens, stepping and teacher forcing, conditions, official files both ways, meshes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import CheckpointError
from nextscale.core.cross_attention import CrossAttention, Packed
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.random import ImageDraws
from nextscale.core.sampling import Accepted, classifier_free, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.text import TextEncoderConfig, TextFeatures
from nextscale.tasks.generation.text_small import make_encoder
from nextscale.tasks.generation.var_training import initialize
from nextscale.tasks.shapes import sar3d_layout, sar3d_tokenizer
from nextscale.tasks.shapes.pictures import LearnedEncoderConfig, open_picture, pixels
from nextscale.tasks.shapes.sar3d import PRESETS, SAR3D, SAR3DConfig, is_official
from nextscale.tasks.shapes.sar3d_fields import FieldConfig
from nextscale.tasks.shapes.sar3d_planes import PlanesConfig
from nextscale.tasks.shapes.sar3d_sampling import ConditionedNetwork
from nextscale.tasks.shapes.sar3d_tokenizer import TriplaneVQ, TriplaneVQConfig
from nextscale.tasks.shapes.sar3d_transformer import SAR3DBlocksConfig
from nextscale.tasks.shapes.sar3d_views import ViewsConfig

SCHEDULE = ScaleSchedule.squares(1, 2, 4, planes=3)
SMALL: dict[str, Any] = {
    "encoder": AutoencoderConfig(32, (1, 1), 1, 6, 10, attention=False),
    "views": ViewsConfig(2, 2, 4),
    "quantizer": QuantizerConfig(16, 2, unit_norm=True, smoothers=2),
    "schedule": SCHEDULE,
    "decoder": PlanesConfig(8, 2, 2),
    "upsampler": AutoencoderConfig(32, (1, 1), 1, 8, 4, level_attention=()),
    "head": FieldConfig("density", 4, 8, grid=6),
}


def build_tokenizer(tiny: SimpleNamespace, seed: int = 0, **changes: Any) -> TriplaneVQ:
    torch.manual_seed(seed)
    tokenizer = TriplaneVQ(TriplaneVQConfig(**{**SMALL, **changes}))
    tiny.scattered(tokenizer, seed, std=0.2)
    return tokenizer.eval()


def build(tiny: SimpleNamespace, tokenizer: TriplaneVQ | None = None, **options: Any) -> SAR3D:
    condition = options.pop("condition", "image")
    blocks = SAR3DBlocksConfig(
        **{"width": 16, "depth": 2, "heads": 2, "memory_width": 8, "look": "before", **options.pop("blocks", {})}
    )
    config = SAR3DConfig(blocks, condition, 16, 2, SCHEDULE, **options)
    torch.manual_seed(1)
    model = SAR3D(config, tokenizer or build_tokenizer(tiny))
    initialize(model, modulation=1, gate=1, head=1)  # type: ignore[arg-type]
    for part in (model.transformer, model.head, model.word_embedding, model.pooled_embedding):
        tiny.scattered(part, 1, std=0.3)
    model.conditions.set_null(torch.randn(5, 8), torch.randn(8))
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny: SimpleNamespace) -> SAR3D:
    return build(tiny)


def features(count: int, length: int = 5, seed: int = 0) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    states, pooled = torch.randn(count * length, 8, generator=generator), torch.randn(count, 8, generator=generator)
    return TextFeatures(Packed(states, (length,) * count), pooled)


# --- the tokenizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [False, True])
def test_what_is_encoded_is_decoded_where_codes_have_length_one(tiny: SimpleNamespace, published: bool) -> None:
    tokenizer = build_tokenizer(tiny, published=published)
    maps = torch.randn(6, 2, 4, 4)
    tokens, totals = tokenizer.quantizer.encode(maps, SCHEDULE)
    assert [each.shape for each in tokens] == [(2, 3), (2, 12), (2, 48)]
    decoded = tokenizer.quantizer.decode(torch.cat(tokens, 1), SCHEDULE)[-1]
    # The published tokenizer encodes with codes as they are and decodes them at length 1: an exception by design.
    assert torch.allclose(decoded, totals[-1], atol=1e-5) is not published
    trained = tokenizer.quantizer(maps, SCHEDULE).features
    assert torch.allclose(trained, totals[-1], atol=1e-5) is not published


def test_planes_of_a_scale_follow_each_other(tiny: SimpleNamespace) -> None:
    tokenizer = build_tokenizer(tiny)
    maps = torch.randn(6, 2, 4, 4)
    changed = maps.clone()
    changed[4] += 1  # plane 1 of object 1
    both = [torch.cat(tokenizer.quantizer.encode(each, SCHEDULE)[0], 1) for each in (maps, changed)]
    differ = (both[0] != both[1]).nonzero()
    assert set(differ[:, 0].tolist()) == {1}
    planes = torch.cat([torch.arange(3).repeat_interleave(n * n) for n in (1, 2, 4)])
    assert set(planes[differ[:, 1]].tolist()) == {1}


def test_one_object_does_not_see_another(tiny: SimpleNamespace) -> None:
    tokenizer = build_tokenizer(tiny)
    views = torch.randn(4, 10, 8, 8)
    together = tokenizer.features(views)
    torch.testing.assert_close(together[3:], tokenizer.features(views[2:]), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="3 views are not 2 of each object"):
        tokenizer.features(views[:3])


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"encoder\.latent_channels is 6, the parts beside it need 9"):
        TriplaneVQConfig(**{**SMALL, "quantizer": QuantizerConfig(16, 3)})
    with pytest.raises(ValueError, match="are not of 3 planes"):
        TriplaneVQConfig(**{**SMALL, "schedule": ScaleSchedule.squares(1, 2, 4)})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": FieldConfig("mesh", 4, 8, grid=6)},
        {"quantizer": QuantizerConfig(16, 2, unit_norm=True, smoothers=1)},
        {"quantizer": QuantizerConfig(16, 2, unit_norm=True, smoothers=3), "separate_smoothers": True},
        {"quantizer": QuantizerConfig(16, 2, unit_norm=True, smoothing=0.0, smoothers=0)},
    ],
)
def test_tokenizer_in_the_official_layout_and_back(tiny: SimpleNamespace, changes: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(tiny, published=True, **changes)
    official = tokenizer.to_official()
    assert sar3d_tokenizer.is_official(official)
    again = TriplaneVQ.from_official(official, schedule=SCHEDULE, heads=2, view_heads=2, grid=6)
    assert again.config == tokenizer.config
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert {name: value.shape for name, value in again.to_official().items()} == {
        name: value.shape for name, value in official.items()
    }


def test_scales_of_no_published_list_must_be_named(tiny: SimpleNamespace) -> None:
    official = build_tokenizer(tiny).to_official()
    with pytest.raises(CheckpointError, match=r"3 scales that end at 16 cells a plane"):
        TriplaneVQ.from_official(official)


def test_tokenizer_saved_and_loaded(tiny: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tiny)
    again = nextscale.load(tokenizer.save(tmp_path / "model"))
    assert again.config == tokenizer.config
    views = torch.randn(2, 10, 8, 8)
    assert torch.equal(tokenizer.encode(views), again.encode(views))


# --- the transformer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"condition": "text", "blocks": {"look": "after"}},
        {"blocks": {"attention": "dot", "conditioning": "shared"}},
    ],
)
def test_stepping_gives_what_the_teacher_forced_call_gives(tiny: SimpleNamespace, options: dict[str, Any]) -> None:
    model, given = build(tiny, **options), features(2)
    steps = list(model.steps(given, draws=ImageDraws([0, 1]), guidance=0.0))
    tokens = torch.cat([step.tokens for step in steps], dim=1)
    with torch.inference_mode():
        inputs = model.tokenizer.quantizer.teacher_inputs(tokens, SCHEDULE)
        at_once = model(inputs, given)
        stepped = torch.cat([step.logits for step in steps], dim=1)
        torch.testing.assert_close(stepped, at_once, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model(inputs[:, :12], given, 2), at_once[:, :15], atol=2e-5, rtol=1e-4)


def test_sampling_goes_on_from_accepted_scales(model: SAR3D) -> None:
    given, emitter = features(1), CategoricalEmitter(top_k=1)
    steps = list(model.steps(given, draws=ImageDraws([0]), emitter=emitter, guidance=0.0))
    quantizer = model.tokenizer.quantizer
    inputs = [quantizer.next_input(steps[index].total, SCHEDULE, index + 1) for index in range(2)]
    accepted = Accepted(2, steps[1].total, torch.cat(inputs, dim=1))
    branches = classifier_free(torch.tensor([0]), torch.tensor([0]), 0.0, SCHEDULE)
    network = ConditionedNetwork(model, given)
    [last] = sample(network, quantizer, SCHEDULE, branches, emitter, ImageDraws([0]), accepted=accepted)
    torch.testing.assert_close(last.logits, steps[-1].logits, atol=2e-5, rtol=1e-4)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many conditions each call of the blocks' projections reads."""
    calls: list[int] = []
    remember = CrossAttention.remember

    def counted(self: CrossAttention, memory: Packed) -> Any:
        calls.append(len(memory))
        return remember(self, memory)

    monkeypatch.setattr(CrossAttention, "remember", counted)
    yield calls


def test_conditions_are_read_once_for_all_scales(model: SAR3D, read: list[int]) -> None:
    list(model.steps(features(2), draws=ImageDraws([0, 1]), guidance=2.0))
    assert read == [3, 3]  # two conditions and none, once by each of two blocks


def test_conditions_are_dropped_apart(model: SAR3D) -> None:
    given, null = features(3), model.null()
    assert null.pooled is not None and given.pooled is not None
    dropped = model.drop(given, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]))
    assert dropped.pooled is not None
    assert torch.equal(dropped.pooled[0], null.pooled[0]) and torch.equal(dropped.pooled[1:], given.pooled[1:])
    rows = dropped.states.split()
    assert torch.equal(rows[1], null.states.values)
    assert torch.equal(rows[0], given.states.split()[0]) and torch.equal(rows[2], given.states.split()[2])


def test_tokenizer_of_other_codes(tiny: SimpleNamespace) -> None:
    other = build_tokenizer(tiny, quantizer=QuantizerConfig(8, 2, unit_norm=True))
    with pytest.raises(ValueError, match="speaks 16 codes of 2 numbers, the tokenizer 8 of 2"):
        build(tiny, other)


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"condition": "text", "blocks": {"look": "after", "conditioning": "shared"}}])
def test_official_layout_and_back(tiny: SimpleNamespace, options: dict[str, Any]) -> None:
    model = build(tiny, **options)
    official = model.to_official()
    assert is_official({"trainer": {"var_wo_ddp": official}})
    assert official["plane_1L"].tolist()[0][:9] == [0, 1, 2, 0, 0, 0, 0, 1, 1]
    assert official["attn_bias_for_masking"].shape == (1, 1, 63, 63)
    again = SAR3D.from_official(official, model.tokenizer, schedule=SCHEDULE, condition=model.config.condition)
    assert replace(again.config.transformer, drop_path=0.0) == model.config.transformer
    returned = again.to_official()
    assert set(returned) == set(official) and all(torch.equal(returned[name], official[name]) for name in official)


def test_files_are_recognised_and_bring_their_tokenizer(model: SAR3D) -> None:
    file = {"trainer": {"var_wo_ddp": model.to_official()}}
    loaded = nextscale.load(file, tokenizer=model.tokenizer, schedule=SCHEDULE, device="cpu", condition="image")
    assert isinstance(loaded, SAR3D) and loaded.official_name == "image-condition-ckpt.pth"
    with pytest.raises(CheckpointError, match=r"positions for 63 tokens, the scales .* have 2040"):
        SAR3D.from_official(model.to_official(), model.tokenizer)


def test_saved_and_loaded_with_what_stands_for_no_condition(model: SAR3D, tmp_path: Path) -> None:
    again = nextscale.load(model.save(tmp_path / "model"), device="cpu")
    assert torch.equal(again.null().states.values, model.null().states.values)
    steps = [list(each.steps(features(1), draws=ImageDraws([3]))) for each in (model, again)]
    assert torch.equal(steps[0][-1].total, steps[1][-1].total)


def test_features_of_no_condition_lie_beside_official_files(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = build(tiny)
    model.conditions = type(model.conditions)("image", model.config.image, model.config.text)
    states = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    np.save(tmp_path / "empty_dino_embedding.npy", states)
    np.save(tmp_path / "empty_dino_pooler_output.npy", states[0])
    model.home = tmp_path
    null = model.null()
    assert null.pooled is not None
    assert torch.equal(null.states.values, torch.from_numpy(states[1:]))
    assert torch.equal(null.pooled[0], torch.from_numpy(states[0]))


@pytest.mark.parametrize(("name", "millions", "entries"), [("sar3d-image", 1243.3, 543), ("sar3d-text", 382.8, 367)])
def test_published_sizes(name: str, millions: float, entries: int) -> None:
    with torch.device("meta"):
        model = SAR3D(PRESETS[name], TriplaneVQ())
        own = [p for n, p in model.named_parameters() if not n.startswith("tokenizer.")]
        assert sum(p.numel() for p in own) / 1e6 == pytest.approx(millions, abs=0.05)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("tokenizer.")}
    assert len(sar3d_layout.transformer_to_layout(state, PRESETS[name].schedule)) == entries


def test_published_tokenizer() -> None:
    with torch.device("meta"):
        tokenizer = TriplaneVQ(sar3d_tokenizer.PRESETS["sar3d-vqvae"])
        counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in tokenizer.named_children()}
        assert sum(counts.values()) == pytest.approx(176.24, abs=0.05)
        assert counts["encoder"] == pytest.approx(45.1, abs=0.05)
        assert counts["decoder"] == pytest.approx(128.1, abs=0.05) and counts["upsampler"] == pytest.approx(
            2.8, abs=0.05
        )
    state = {name: torch.empty(()).expand(value.shape) for name, value in tokenizer.state_dict().items()}
    assert len(sar3d_layout.tokenizer_to_layout(state, 10)) == 370
    assert tokenizer.image_size == (256, 256)


# --- shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["density", "mesh"])
def test_a_shape_comes_out_the_same_alone_and_in_any_batch(tiny: SimpleNamespace, head: Any) -> None:
    tokenizer = build_tokenizer(tiny, head=FieldConfig(head, 4, 8, grid=6))
    if head == "density":  # so that its values lie around the level
        with torch.no_grad():
            tokenizer.density().network[-1].bias[0] = 10
    model = build(tiny, tokenizer)
    calls: list[tuple[int, int]] = []
    options: dict[str, Any] = {"resolution": 12, "top_k": 0, "top_p": 0.0}
    shapes = model.generate(features(3), seed=5, batch_size=2, progress=lambda *call: calls.append(call), **options)
    alone = model.generate(features(3).select([2]), seed=7, **options)
    assert calls == [(number, 6) for number in range(1, 7)]
    assert not shapes[2].empty and shapes[2].up == "z" and shapes[2].colours is not None
    np.testing.assert_allclose(shapes[2].vertices, alone[0].vertices, atol=1e-4)
    assert shapes[0].volume >= 0 or head == "density"


def test_pictures_of_planes(tiny: SimpleNamespace) -> None:
    tokenizer = build_tokenizer(tiny)
    planes = torch.randn(1, 12, 8, 8)
    pose = torch.eye(4)
    pose[2, 3] = -2.0
    camera = torch.cat((pose.flatten(), torch.tensor([1.39, 0, 0.5, 0, 1.39, 0.5, 0, 0, 1])))[None]
    seen = tokenizer.pictures(planes, camera, size=6)
    assert seen.shape == (1, 3, 6, 6) and seen.min() >= 0 and seen.max() <= 1
    with pytest.raises(ValueError, match="reads its planes as meshes"):
        build_tokenizer(tiny, head=FieldConfig("mesh", 4, 8, grid=6)).pictures(planes, camera, size=6)


def test_a_learned_encoder_reads_pictures(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = build(tiny, learned=LearnedEncoderConfig(16, 8, 2))
    assert model.picture_encoder is not None
    tiny.scattered(model.picture_encoder, 2)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a b.png")
    of_path = model.prepare(tmp_path / "a b.png")
    of_pixels = model.prepare(pixels([tmp_path / "a b.png"], 16))
    assert of_path.states.lengths == (16,) and of_path.pooled is not None and of_pixels.pooled is not None
    torch.testing.assert_close(of_path.pooled, of_pixels.pooled)
    assert len(model.prepare([Image.new("L", (4, 4)), torch.rand(3, 8, 8)])) == 2
    again = SAR3D.from_saved(*_read(model.save(tmp_path / "model")))
    torch.testing.assert_close(again.prepare(tmp_path / "a b.png").pooled, of_path.pooled)
    with pytest.raises(ValueError, match="a picture is 3; expected"):
        model.prepare([3])
    assert "encoder of the model's own" in model.official_differences()[0]


def _read(folder: Path) -> tuple[Any, Any]:
    from nextscale.core.checkpoint import read_folder

    return read_folder(folder)


def test_texts_are_read_by_a_small_encoder_that_is_saved_along(tiny: SimpleNamespace, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "words", ["a red box"], kind="clip", width=8, heads=2, max_length=6)
    text = TextEncoderConfig(str(folder), kind="clip", max_length=6, padded=True)
    model = build(tiny, condition="text", text=text, blocks={"look": "after"})
    model.conditions = type(model.conditions)("text", model.config.image, text)
    found = model.prepare(["a box", "red"])
    assert found.states.lengths == (6, 6) and found.pooled is not None and model.null().states.lengths == (6,)
    again = nextscale.load(model.save(tmp_path / "model"), device="cpu")
    assert (tmp_path / "model" / "words" / "config.json").is_file()
    torch.testing.assert_close(again.prepare("a box").states.values, found.states.split()[0])


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (3, 3), (255, 0, 0, 0))
    assert open_picture(clear).getpixel((1, 1)) == (255, 255, 255)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises((ValueError, OSError)):
        open_picture(tmp_path / "broken.png")
    with pytest.raises(OSError):
        open_picture(tmp_path / "absent.png")
