"""The demo: what a small model draws, how, and what else it can do, on one page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextscale.demo_tasks import SECTIONS, photographs
from nextscale.pictures import (
    Code,
    Facts,
    Figure,
    Gallery,
    Section,
    Table,
    animate,
    comparison_sheet,
    contact_sheet,
    save_png,
    write_page,
)
from nextscale.tasks.generation.drawing import Drawn, class_name, draw
from nextscale.tasks.generation.editing import box_mask, edit

TITLE = "Images, scale by scale"
CLASSES, PER_CLASS = 10, 6


@dataclass
class _Demo:
    """One run: the model, where files go, and the seconds each part took."""

    model: Any
    folder: Path
    overwrite: bool
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.size = self.model.tokenizer.image_size(self.model.config.schedule)[0]
        self.scale = max(1, 96 // self.size)
        count = min(CLASSES, self.model.config.classes)
        self.classes = [self.model.config.classes * i // count for i in range(count)]

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - began
        self.say(f"{what}: {self.seconds[what]:.1f} s")

    def png(self, picture: Any, name: str) -> Path:
        return save_png(picture, self.folder / f"{name}.png", overwrite=self.overwrite)

    def name(self, label: int) -> str:
        return class_name(self.model, label)

    def draw(self, condition: Any, n: int, seed: Any = 0, **options: Any) -> Drawn:
        """All in one batch."""
        return next(iter(draw(self.model, condition, n, seed, batch_size=n, **options)))


def make_demo(model: Any, folder: Path, name: str, say: Callable[[str], None], also: Sequence[str] = ()) -> Path:
    """Draw, edit and reconstruct with a VAR and show it on ``folder/index.html``, every picture also as a file.

    A page that an earlier demo has written there is made anew with its pictures; other files are kept.

    Args:
        name: of the model, for the commands on the page.
        say: is told what was done, line by line.
        also: of :data:`nextscale.demo_tasks.SECTIONS`, what the small models of other tasks do.

    Returns:
        The page.
    """
    page = folder / "index.html"
    demo = _Demo(model, folder, page.is_file() and TITLE in page.read_text("utf-8", "replace"), say)
    began = time.perf_counter()
    with demo.timed(f"{len(demo.classes) * PER_CLASS} images"):
        samples = demo.draw(demo.classes, len(demo.classes) * PER_CLASS, forming=len(demo.classes))
    sections = [_samples(demo, samples)]
    with demo.timed("pictures of how they form"):
        sections.append(_forming(demo, samples))
    with demo.timed("the same seeds alone and together"):
        sections.append(_seeds(demo, samples))
    with demo.timed("four strengths of guidance"):
        sections.append(_guidance(demo))
    with demo.timed("edits"):
        sections.append(_edits(demo, samples))
    with demo.timed("tokenizer"):
        sections.append(_tokenizer(demo))
    sections += [SECTIONS[task](folder, demo.overwrite, say) for task in also]
    whole = time.perf_counter() - began
    sections.append(_speed(demo, name, whole))
    schedule, count = model.config.schedule, len(samples.images)
    rate = count / demo.seconds[f"{count} images"]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    facts = Facts(
        [
            ("Parameters", f"{parameters:.1f} M", "tokenizer included"),
            ("Steps per image", str(len(schedule)), f"for {schedule.length} tokens, not {schedule.length} steps"),
            ("Speed", f"{rate:.1f} images/s", f"on this machine's {model.device.type}, {demo.size} x {demo.size} px"),
        ]
    )
    lead = (
        "A next-scale model draws a whole picture in its coarsest form first and then adds detail, scale by scale, all "
        f"of a scale's tokens at once. All this was just made here, by `{name}` where no other model is named."
    )
    footer = "Photographs come with scikit-image. All other pictures were made by this run."
    return write_page(page, TITLE, sections, lead=lead, facts=facts, footer=footer, overwrite=demo.overwrite)


def _samples(demo: _Demo, samples: Drawn) -> Section:
    columns = len(demo.classes)
    names = [demo.name(label) for label in samples.labels]
    demo.png(contact_sheet(samples.images, columns, names, demo.scale), "samples")
    first = [
        Figure(image, f"a drawn {names[i]}", names[i], scale=demo.scale)
        for i, image in enumerate(samples.images[:columns])
    ]
    rest = contact_sheet(samples.images[columns:], columns, scale=demo.scale)
    text = "One class after another, the seeds simply counted up: nothing here was picked."
    more = Figure(
        demo.png(rest, "more-samples"), f"{PER_CLASS - 1} more rows of the same classes", "More of each class."
    )
    return Section("What it draws", [text, Gallery(first, tile=84), more])


def _forming(demo: _Demo, samples: Drawn) -> Section:
    assert samples.forming is not None
    stages, grids = samples.forming, [f"{s.height} x {s.width}" for s in demo.model.config.schedule.scales]
    frames = [contact_sheet(stage, 5, scale=demo.scale) for stage in stages]
    moving = animate(frames, demo.folder / "forming.webp", 0.6, scale=1, overwrite=demo.overwrite)
    rows = [(demo.name(samples.labels[i]), list(stages[:, i])) for i in range(0, stages.shape[1], 2)]
    strip = demo.png(comparison_sheet(rows, grids, demo.scale), "forming")
    return Section(
        "How a picture forms",
        [
            f"Five looks at each picture: what is decoded after {', '.join(grids)} tokens."
            if len(grids) == 5
            else f"What is decoded after {', '.join(grids)} tokens.",
            Figure(moving, "pictures that gain detail scale by scale", "The same pictures, scale after scale."),
            Figure(strip, "rows of one picture after each scale", "Coarse to fine, from left to right."),
        ],
    )


def _seeds(demo: _Demo, samples: Drawn) -> Section:
    """An image depends on its own seed, not on what is drawn beside it."""
    chosen = [0, len(samples.images) // 2, len(samples.images) - 1]
    rows, same, farthest = [], True, 0.0
    for i in chosen:
        alone = demo.draw(samples.labels[i], 1, samples.seeds[i])
        same &= bool((alone.tokens[0] == samples.tokens[i]).all())
        farthest = max(farthest, float((alone.images[0] - samples.images[i]).abs().max()))
        label = f"{demo.name(samples.labels[i])}, seed {samples.seeds[i]}"
        rows.append((label, [samples.images[i], alone.images[0]]))
    sheet = demo.png(comparison_sheet(rows, [f"among {len(samples.images)}", "alone"], demo.scale), "seeds")
    verdict = "every token is the same" if same else "some tokens differ, as the arithmetic rounds differently"
    return Section(
        "A seed is a picture",
        [
            f"Every image has its own source of randomness. Drawn in a batch of {len(samples.images)} and drawn alone, "
            f"{verdict}; pixel values differ by at most {farthest:.1e}.",
            Figure(sheet, "pairs of pictures from the same seed", "The same seed in a batch, and by itself."),
        ],
    )


def _guidance(demo: _Demo) -> Section:
    shown, strengths = demo.classes[:8], (0.0, 1.5, 3.0, 6.0)
    rows = [(f"guidance {t:g}", list(demo.draw(shown, len(shown), 100, guidance=t).images)) for t in strengths]
    sheet = demo.png(comparison_sheet(rows, [demo.name(label) for label in shown], demo.scale), "guidance")
    return Section(
        "How strictly it keeps to the class",
        [
            "Guidance pushes every scale away from what the model would draw without a class, more so at finer scales. "
            "Little of it gives variety, much of it gives plain examples of the class.",
            Figure(sheet, "rows of the same seeds at four strengths", "The same seeds at four strengths of guidance."),
        ],
    )


def _edits(demo: _Demo, samples: Drawn) -> Section:
    grid = demo.model.config.schedule.final.grid
    source, other = 1 % len(demo.classes), 9 % len(demo.classes)
    image, label = samples.images[source], samples.labels[source]
    hole, centre = (0.25, 0.25, 0.75, 0.75), (0.25, 0.0, 0.75, 0.5)
    cases = [
        ("in-painting", box_mask(grid, hole, keep_inside=False), label),
        ("out-painting", box_mask(grid, centre, keep_inside=True), label),
        (f"{demo.name(demo.classes[other])} inside", box_mask(grid, (0.1, 0.1, 0.9, 0.9), False), demo.classes[other]),
    ]
    rows = []
    for what, mask, condition in cases:
        drawn = edit(demo.model, image, mask, condition, 4, seed=7)
        kept = torch.nn.functional.interpolate(mask[None, None].float(), size=image.shape[-2:])[0]
        rows.append((what, [image, image * kept + 0.5 * (1 - kept), *drawn]))
    headings = ["drawn before", "what is kept", *(f"seed {7 + i}" for i in range(4))]
    sheet = demo.png(comparison_sheet(rows, headings, demo.scale), "edits")
    return Section(
        "Changing a part",
        [
            "The model was never trained for it: where a picture is to stay, its own tokens replace those drawn, "
            "at every scale.",
            Figure(sheet, "a picture, its mask and four new versions, three times", "Grey is drawn anew."),
        ],
    )


def _photographs(size: int) -> dict[str, Tensor]:
    """Photographs, squared and resized: name -> (3, size, size) in [0, 1]."""
    found = {}
    for name, picture in photographs().items():
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        found[name] = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return found


@torch.inference_mode()
def _tokenizer(demo: _Demo) -> Section:
    tokenizer, schedule = demo.model.tokenizer, demo.model.config.schedule
    photographs = _photographs(demo.size)
    images = torch.stack(list(photographs.values())).to(demo.model.device)
    tokens = tokenizer.encode(images * 2 - 1, schedule)
    stages = [(tokenizer.decode_features(t).cpu() + 1) / 2 for t in tokenizer.quantizer.decode(tokens, schedule)]
    errors = (stages[-1] - images.cpu()).square().mean((1, 2, 3))
    decibels = [f"{value:.1f} dB" for value in (-10 * errors.log10()).tolist()]
    rows = [
        (f"{name}, {decibels[i]}", [images[i].cpu(), *(stage[i] for stage in stages)])
        for i, name in enumerate(photographs)
    ]
    headings = ["picture", *(f"{s.height} x {s.width}" for s in schedule.scales)]
    sheet = demo.png(comparison_sheet(rows, headings, demo.scale), "reconstructions")
    maps = _token_maps(demo, tokens[0])
    vocabulary = tokenizer.config.quantizer.vocabulary
    some = torch.arange(0, vocabulary, max(1, vocabulary // 96))[:96]
    wall = contact_sheet(_looks(demo, some), 16, scale=max(1, 48 // demo.size), padding=2)
    name = next(iter(photographs))
    return Section(
        "The tokenizer",
        [
            f"A picture of {demo.size} x {demo.size} pixels becomes {schedule.length} tokens out of "
            f"{tokenizer.config.quantizer.vocabulary:,} codes. Photographs it has never seen, from coarse to fine:",
            Figure(
                sheet,
                "photographs and their reconstructions",
                "Decoded from the first scale, the first two, and so on.",
            ),
            Figure(
                demo.png(maps, "tokens"),
                f"the token maps of {name}, each token as a patch of colour",
                f"The tokens of {name}, each in the colour of its code: fine scales hold what coarse ones left over.",
            ),
            Figure(
                demo.png(wall, "codes"),
                "a wall of patches of colour",
                "Codes as pictures: what is decoded when a code fills the coarsest scale by itself.",
            ),
        ],
    )


def _looks(demo: _Demo, codes: Tensor) -> Tensor:
    """Codes as pictures: what is decoded where each alone fills the first scale, (codes, 3, height, width)."""
    tokenizer, schedule = demo.model.tokenizer, demo.model.config.schedule
    pictures = []
    for part in codes.split(64):
        filled = part.to(demo.model.device)[:, None].expand(-1, schedule.lengths[0])
        total = tokenizer.quantizer.contribution(tokenizer.quantizer.lookup(filled), schedule, 0)
        pictures.append((tokenizer.decode_features(total).cpu() + 1) / 2)
    return torch.cat(pictures)


def _token_maps(demo: _Demo, tokens: Tensor) -> Image.Image:
    """One picture's token maps, side by side at one size; a token has the mean colour of its code's picture."""
    schedule = demo.model.config.schedule
    used, places = tokens.cpu().unique(return_inverse=True)
    colours = _looks(demo, used).mean((2, 3))[places]
    maps = []
    for (start, stop), scale in zip(schedule.ranges, schedule.scales, strict=True):
        colour = colours[start:stop].T.unflatten(-1, scale.grid)
        maps.append(torch.nn.functional.interpolate(colour[None], size=(128, 128), mode="nearest")[0])
    return contact_sheet(maps, len(maps), [f"{s.height} x {s.width}" for s in schedule.scales])


def _speed(demo: _Demo, name: str, whole: float) -> Section:
    rows = [(what, f"{seconds:.1f} s") for what, seconds in demo.seconds.items()]
    kind = demo.model.device.type
    threads = f"{torch.get_num_threads()} CPU threads" if kind == "cpu" else kind
    commands = f"""nextscale generate {name} --classes {demo.name(demo.classes[0])!r} --num 16 --animate
nextscale edit {name} photograph.jpg --box 0.2,0.2,0.8,0.8
nextscale info {name}
nextscale train tokenizer --data.source my-photographs
nextscale generate var_d16.pth --classes "golden retriever" volcano"""
    return Section(
        "Time, and what to try next",
        [
            Table(("part", "time"), rows, f"{whole:.1f} s in all, on {threads}."),
            Code(commands, "Try"),
        ],
    )
