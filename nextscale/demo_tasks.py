"""What the small models of other tasks do, as sections of the demo's page."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import nextscale
from nextscale.datasets.degradations import degrade, parse_steps
from nextscale.datasets.scenes import SceneSettings, make_scene
from nextscale.models import shipped
from nextscale.pictures import Figure, Section, comparison_sheet, contact_sheet, depth_picture, save_png

PHOTOGRAPHS = ("chelsea", "astronaut", "coffee", "rocket", "motorcycle_left", "ihc")
"""Pictures inside scikit-image's package."""

DAMAGE = {
    "chelsea": ("noise", "noise25"),
    "astronaut": ("JPEG", "jpeg10"),
    "coffee": ("too dark", "low-light"),
    "rocket": ("rain", "rain-heavy"),
    "motorcycle": ("haze", "hazy"),
}
"""What is done to which photograph; :data:`nextscale.datasets.degradations.PRESETS` says how."""

DAMAGED_SIDE = 224
SCENES, SCENES_SEED = 4, 1
SHAPES_PER_CLASS, SHAPE_GRID, SHAPE_PIXELS = 2, 96, 144
PROMPTED = (
    "a white airplane",
    "a blue airplane",
    "a brown horse",
    "a green horse",
    "a white horse",
    "a blue ship",
    "a white ship",
    "a white truck",
)
PER_PROMPT = 4


def photographs(names: tuple[str, ...] = PHOTOGRAPHS) -> dict[str, Image.Image]:
    """Those of the pictures that the installed scikit-image has, RGB, by name."""
    import skimage

    folder, found = Path(skimage.__file__).parent / "data", {}
    for name in names:
        path = next((p for p in (folder / f"{name}.png", folder / f"{name}.jpg") if p.is_file()), None)
        if path is not None:
            with Image.open(path) as opened:
                found[name.split("_")[0]] = opened.convert("RGB")
    return found


def depth_section(folder: Path, overwrite: bool, say: Callable[[str], None]) -> Section:
    """Depth of photographs, and of scenes whose depth is known."""
    name, began = shipped("model of depth", "dar", "depthart"), time.perf_counter()
    model = nextscale.load(name)
    rows = []
    for title, photograph in photographs(PHOTOGRAPHS[:5]).items():
        photograph.thumbnail((256, 192))
        pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1).float() / 255
        rows.append((title, [photograph, depth_picture(model.predict(pixels).depth)]))
    photographed = save_png(comparison_sheet(rows, ["photograph", "depth"]), folder / "depth.png", overwrite=overwrite)
    settings, rows = SceneSettings(seed=SCENES_SEED), []
    for index in range(SCENES):
        scene = make_scene(settings, index)
        found = model.predict(torch.from_numpy(scene.image).permute(2, 0, 1).float() / 255).depth.numpy()
        known = scene.depth > 0
        ends = float(scene.depth[known].min()), float(scene.depth[known].max())
        aligned = (found * np.median(scene.depth[known]) / np.median(found[known])).clip(*ends)
        coloured = [depth_picture(depth, near=ends[0], far=ends[1]) for depth in (scene.depth, aligned)]
        rows.append((f"{scene.kind} {index}", [scene.image.transpose(2, 0, 1), *coloured]))
    sheet = comparison_sheet(rows, ["scene", "true depth", "predicted"])
    scenes = save_png(sheet, folder / "depth-scenes.png", overwrite=overwrite)
    say(f"depth: {time.perf_counter() - began:.1f} s")
    return Section(
        "Depth",
        [
            f"`{name}` learned from synthetic rooms and streets alone; photographs are new ground for it. Red is near, "
            "blue far.",
            Figure(scenes, "scenes, their true depth and what was predicted", "Scenes that it never saw."),
            Figure(photographed, "photographs beside their depth", f"`nextscale depth photograph.jpg`, by `{name}`."),
        ],
    )


def restoration_section(folder: Path, overwrite: bool, say: Callable[[str], None]) -> Section:
    """Photographs damaged in several ways, and what becomes of them."""
    name, began = shipped("model of restoration", "varformer"), time.perf_counter()
    model, rows = nextscale.load(name), []
    for title, photograph in photographs().items():
        if title not in DAMAGE:
            continue
        left, top = ((side - DAMAGED_SIDE) // 2 for side in photograph.size)
        middle = photograph.crop((left, top, left + DAMAGED_SIDE, top + DAMAGED_SIDE))
        clean = torch.from_numpy(np.array(middle)).permute(2, 0, 1).float() / 255
        kind, preset = DAMAGE[title]
        damaged, _ = degrade(clean, parse_steps(preset), 0, title)
        restored = model.restore(damaged)
        before, after = (-10 * (picture - clean).square().mean().log10() for picture in (damaged, restored))
        rows.append((f"{kind}: {before:.1f}, {after:.1f}", [damaged, restored, clean]))
    sheet = comparison_sheet(rows, ["damaged", "restored", "photograph"])
    drawn = save_png(sheet, folder / "restored.png", overwrite=overwrite)
    say(f"restoration: {time.perf_counter() - began:.1f} s")
    return Section(
        "Restoration",
        [
            f"`{name}` is one model for noise, JPEG, darkness, haze, rain and blur, and is not told which it is. PSNR "
            "in dB, before and after.",
            Figure(drawn, "damaged photographs, restored ones and the originals", "`nextscale restore photograph.jpg`"),
        ],
    )


def shape_section(folder: Path, overwrite: bool, say: Callable[[str], None]) -> Section:
    """Two shapes of every class, as meshes and as pictures."""
    from nextscale.tasks.shapes.viewing import pictures

    name, began = shipped("generator of shapes", "g3pt", "sar3d"), time.perf_counter()
    model = nextscale.load(name)
    wanted = [label for label in model.config.class_names for _ in range(SHAPES_PER_CLASS)]
    shapes = model.generate(wanted, seed=0, batch_size=len(wanted), resolution=SHAPE_GRID)
    views, titles = [], []
    for label, shape in zip(wanted, shapes, strict=True):
        if not shape.empty:
            views.append(pictures(shape, [30.0], size=SHAPE_PIXELS)[0].transpose(2, 0, 1))
            titles.append(label)
    sheet = save_png(contact_sheet(views, 8, titles), folder / "shapes.png", overwrite=overwrite)
    say(f"shapes: {time.perf_counter() - began:.1f} s")
    return Section(
        "Shapes",
        [
            f"`{name}` draws sets of tokens at growing levels of detail; what they mean is an occupancy field, meshed.",
            Figure(sheet, "rendered shapes of every class", "`nextscale shape --class chair`: the first seeds."),
        ],
    )


def prompt_section(folder: Path, overwrite: bool, say: Callable[[str], None]) -> Section:
    """Images of prompts."""
    name, began = shipped("model of prompts", "infinity"), time.perf_counter()
    model = nextscale.load(name)
    count = len(PROMPTED) * PER_PROMPT
    images = model.generate(PROMPTED, count, seed=0, batch_size=count)
    sheet = contact_sheet(images, len(PROMPTED), PROMPTED * PER_PROMPT, scale=4)
    drawn = save_png(sheet, folder / "prompts.png", overwrite=overwrite)
    say(f"prompts: {time.perf_counter() - began:.1f} s")
    return Section(
        "Prompts",
        [
            f"`{name}` predicts bits in place of codes, and reads captions of ten things, each in the colour that "
            "most of its picture has.",
            Figure(drawn, "columns of small pictures, one for each prompt", "The first seeds of every prompt."),
        ],
    )


SECTIONS = {
    "prompts": prompt_section,
    "restoration": restoration_section,
    "depth": depth_section,
    "shapes": shape_section,
}
