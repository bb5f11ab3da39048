"""``nextscale edit``"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def add_arguments(parser: Any) -> None:
    from typing import Literal

    from nextscale.cli.parsing import add_drawing, add_loading, add_schedule

    parser.add_argument("model", type=str, help="name, file or folder")
    parser.add_argument("image", type=str, help="image file; it is resized and cropped to the model's size")
    parser.add_argument(
        "--mode",
        type=Literal["inpaint", "outpaint", "class", "expand", "refine"],
        default="inpaint",
        help="inpaint: draw the box anew; outpaint: keep the box, draw around it; class: draw --class into the box; "
        "expand: draw a picture of --size around the image; refine: draw the scales after the first --keep anew",
    )
    parser.add_argument(
        "--box",
        type=str | None,
        default=None,
        help="top,left,bottom,right as shares of the image, such as 0.1,0.1,0.8,0.8",
    )
    parser.add_argument(
        "--mask", type=str | None, default=None, help="instead of --box: image file, white is drawn anew"
    )
    parser.add_argument(
        "--class",
        dest="class_",
        type=str | None,
        default=None,
        help="number or name, for --mode class, expand and refine",
    )
    parser.add_argument("--keep", type=int | None, default=None, help="with --mode refine: so many first scales stay")
    parser.add_argument("--num", type=int, default=4, help="number of versions")
    add_schedule(parser)
    add_drawing(parser, guidance=3.0, top_p=0.95)
    parser.add_argument("--out", type=str, default="out/edits", help="folder; what is there is kept")
    add_loading(parser)


def run(arguments: Any) -> None:
    from nextscale.cli.console import note, progress, say
    from nextscale.cli.parsing import chosen_schedule, drawing_options
    from nextscale.cli.records import write_record

    options = drawing_options(arguments)
    _check(arguments)
    box = None if arguments.box is None else parse_box(arguments.box)
    import nextscale
    from nextscale.cli.parsing import loading_options

    model = nextscale.load(arguments.model, **loading_options(arguments))
    if not hasattr(model, "steps"):
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which edits no images")
    if arguments.mode in ("expand", "refine") and not hasattr(model, "schedule_for"):
        raise ValueError(f"--mode {arguments.mode} is for models whose scales stand alone, such as FlexVAR")
    import torch

    from nextscale.pictures import comparison_sheet, save_png, save_pngs

    schedule = chosen_schedule(arguments, model)
    image, remark, draw = _prepared(model, arguments, box, schedule)
    if remark:
        note(remark)
    batch, pictures = options.pop("batch_size"), []
    with progress("drawing", "images") as report:
        for start in range(0, arguments.num, batch):
            count = min(batch, arguments.num - start)
            pictures.append(draw(arguments.class_, count, arguments.seed + start, **options))
            report(start + count, arguments.num)
    images, out = torch.cat(pictures), Path(arguments.out)
    paths = save_pngs(images, out, stem=arguments.mode)
    shown = [*image.values(), *images[:6]]
    headings = [*image, *(f"seed {arguments.seed + i}" for i in range(len(shown) - len(image)))]
    size = max(picture.shape[-1] for picture in shown)
    sheet = save_png(
        comparison_sheet([(arguments.mode, shown)], headings, scale=max(1, 128 // size)), out / "sheet.png"
    )
    record = write_record(
        out / "edit.json",
        {
            "model": arguments.model,
            "image": arguments.image,
            "mode": arguments.mode,
            "box": box,
            "mask": arguments.mask,
        }
        | ({} if arguments.keep is None else {"keep": arguments.keep})
        | ({} if schedule is None else {"scales": str(schedule)})
        | {"class": arguments.class_, "num": arguments.num, "seed": arguments.seed, **options}
        | {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")},
        {"images": [path.name for path in paths], "sheet": sheet.name},
    )
    say(f"{len(paths)} versions in {out}: {paths[0].name} to {paths[-1].name}; also there: {sheet.name}, {record.name}")


def _check(arguments: Any) -> None:
    """Raises:

    ValueError: options are missing, or do not belong to the mode.
    """
    mode = arguments.mode
    if arguments.num < 1:
        raise ValueError(f"--num is {arguments.num}; expected 1 or more")
    named = (arguments.box is not None) + (arguments.mask is not None)
    if mode in ("expand", "refine"):
        if named:
            raise ValueError(f"--mode {mode} takes neither --box nor --mask")
    elif named != 1:
        raise ValueError("say what is drawn anew: --box top,left,bottom,right or --mask FILE, one of the two")
    if mode == "class" and arguments.class_ is None:
        raise ValueError("--mode class needs --class, a number or a name")
    if mode in ("inpaint", "outpaint") and arguments.class_ is not None:
        raise ValueError(f"--mode {mode} takes no --class; --mode class does")
    if (arguments.keep is None) == (mode == "refine"):
        raise ValueError("--mode refine needs --keep, a number of scales; the other modes take none")
    if mode == "expand" and arguments.size is None and arguments.scales is None:
        raise ValueError("--mode expand needs --size, such as 32x64, or --scales")


def _prepared(
    model: Any, arguments: Any, box: tuple[float, float, float, float] | None, schedule: Any
) -> tuple[dict[str, Any], str, Callable[..., Any]]:
    """What the sheet shows before the versions, a remark on the image, and what draws versions of it.

    Raises:
        ValueError: nothing is left to draw, or to keep.
    """
    from nextscale.tasks.generation.editing import box_mask, edit

    scales, mode = schedule or model.config.schedule, arguments.mode
    if mode == "expand":
        from nextscale.tasks.generation.flexvar_editing import on_canvas

        image, remark = read_image(arguments.image, model.tokenizer.image_size(model.config.schedule))
        image, mask = on_canvas(image, scales, model.tokenizer.stride)
    else:
        image, remark = read_image(arguments.image, model.tokenizer.image_size(scales))
    if mode == "refine":
        from nextscale.tasks.generation.flexvar_editing import refine

        return {"the image": image}, remark, partial(refine, model, image, arguments.keep, schedule=schedule)
    if mode != "expand":
        grid = scales.final.grid
        outside = mode == "outpaint"
        mask = read_mask(arguments.mask, grid) if box is None else box_mask(grid, box, keep_inside=outside)
    if mask.all() or not mask.any():
        raise ValueError(f"the {'mask' if box is None else 'box'} leaves nothing to {'draw' if mask.all() else 'keep'}")
    given = {} if schedule is None else {"schedule": schedule}
    return {"the image": image, "what is kept": veiled(image, mask)}, remark, partial(edit, model, image, mask, **given)


def parse_box(text: str) -> tuple[float, float, float, float]:
    """Raises:

    ValueError: not four numbers, as shares of the image.
    """
    try:
        top, left, bottom, right = (float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(
            f"--box is {text!r}; expected top,left,bottom,right as shares of the image, such as 0.1,0.1,0.8,0.8"
        ) from None
    return top, left, bottom, right


def read_image(path: str, size: tuple[int, int]) -> tuple[Any, str]:
    """An image (3, height, width) in [0, 1]: resized by Lanczos so that it covers that size, its centre cropped.

    Returns:
        The image, and what was done to it ("" where nothing was).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no image.
    """
    import torch
    from PIL import Image

    from nextscale.datasets.decoding import CENTRE, decode, square, to_signed
    from nextscale.datasets.errors import ImageError

    try:
        planes = decode(Path(path).read_bytes())
    except ImageError as error:
        raise ValueError(f"{path} {error}") from None
    (width, height), (high, wide) = planes[0].size, size
    if high == wide:
        pixels = square(planes, high, ratio=1.0, flip=False, across=CENTRE, down=CENTRE)
    else:
        # The crop reaches beyond the image to a square; what lies there is cut off again.
        side, share = max(size), max(high / height, wide / width)
        larger = max(round(width * share), wide), max(round(height * share), high)
        left, top = (larger[0] - wide) // 2, (larger[1] - high) // 2
        planes = tuple(
            plane.resize(larger, Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
            for plane in planes
        )
        pixels = square(planes, side, ratio=0, flip=False, across=0, down=0)[:, :high, :wide]
    remark = ""
    if (height, width) != size:
        cropped = ", its centre cropped" if width * high != height * wide else ""
        remark = f"{path} is {width} x {height} pixels; it is resized to the model's {wide} x {high}{cropped}"
    return (torch.from_numpy(to_signed(pixels)) + 1) / 2, remark


def read_mask(path: str, grid: tuple[int, int]) -> Any:
    """1 = keep, at the finest grid: a cell that white covers in any place is drawn anew."""
    import torch.nn.functional as F

    # Eight pixels a cell are enough to see whether any of it is white.
    image, _ = read_image(path, (grid[0] * 8, grid[1] * 8))
    white = (image.mean(0, keepdim=True) > 0.5).float()
    return 1 - F.adaptive_max_pool2d(white[None], grid)[0, 0].long()


def veiled(image: Any, mask: Any) -> Any:
    """The image, grey where it is drawn anew."""
    import torch.nn.functional as F

    kept = F.interpolate(mask[None, None].float(), size=image.shape[-2:], mode="nearest")[0]
    return image * kept + 0.5 * (1 - kept)
