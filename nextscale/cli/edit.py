"""``nextscale edit``"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_arguments(parser: Any) -> None:
    from typing import Literal

    from nextscale.cli.parsing import add_drawing, add_loading

    parser.add_argument("model", type=str, help="name, file or folder")
    parser.add_argument("image", type=str, help="image file; it is resized and cropped to the model's size")
    parser.add_argument(
        "--mode",
        type=Literal["inpaint", "outpaint", "class"],
        default="inpaint",
        help="inpaint: draw the box anew; outpaint: keep the box, draw around it; class: draw --class into the box",
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
        "--class", dest="class_", type=str | None, default=None, help="number or name, for --mode class"
    )
    parser.add_argument("--num", type=int, default=4, help="number of versions")
    add_drawing(parser, guidance=3.0, top_p=0.95)
    parser.add_argument("--out", type=str, default="out/edits", help="folder; what is there is kept")
    add_loading(parser)


def run(arguments: Any) -> None:
    from nextscale.cli.console import note, progress, say
    from nextscale.cli.parsing import drawing_options
    from nextscale.cli.records import write_record

    options = drawing_options(arguments)
    if arguments.num < 1:
        raise ValueError(f"--num is {arguments.num}; expected 1 or more")
    if (arguments.box is None) == (arguments.mask is None):
        raise ValueError("say what is drawn anew: --box top,left,bottom,right or --mask FILE, one of the two")
    if (arguments.class_ is None) == (arguments.mode == "class"):
        raise ValueError("--mode class needs --class, a number or a name; the other modes take none")
    box = None if arguments.box is None else parse_box(arguments.box)
    import nextscale
    from nextscale.cli.parsing import loading_options

    model = nextscale.load(arguments.model, **loading_options(arguments))
    if not hasattr(model, "steps"):
        raise ValueError(f"{arguments.model} is a {type(model).__name__}, which edits no images")
    import torch

    from nextscale.pictures import comparison_sheet, save_png, save_pngs
    from nextscale.tasks.generation.editing import box_mask, edit

    size = model.tokenizer.image_size(model.config.schedule)[0]
    image, remark = read_image(arguments.image, size)
    grid = model.config.schedule.final.grid
    if box is not None:
        mask = box_mask(grid, box, keep_inside=arguments.mode == "outpaint")
    else:
        mask = read_mask(arguments.mask, grid)
    if mask.all() or not mask.any():
        raise ValueError(f"the {'mask' if box is None else 'box'} leaves nothing to {'draw' if mask.all() else 'keep'}")
    if remark:
        note(remark)
    batch, pictures = options.pop("batch_size"), []
    with progress("drawing", "images") as report:
        for start in range(0, arguments.num, batch):
            count = min(batch, arguments.num - start)
            pictures.append(edit(model, image, mask, arguments.class_, count, seed=arguments.seed + start, **options))
            report(start + count, arguments.num)
    images, out = torch.cat(pictures), Path(arguments.out)
    paths = save_pngs(images, out, stem=arguments.mode)
    shown = [image, veiled(image, mask), *images[:6]]
    headings = ["the image", "what is kept", *(f"seed {arguments.seed + i}" for i in range(len(shown) - 2))]
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
        | {"class": arguments.class_, "num": arguments.num, "seed": arguments.seed, **options}
        | {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")},
        {"images": [path.name for path in paths], "sheet": sheet.name},
    )
    say(f"{len(paths)} versions in {out}: {paths[0].name} to {paths[-1].name}; also there: {sheet.name}, {record.name}")


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


def read_image(path: str, size: int) -> tuple[Any, str]:
    """An image (3, size, size) in [0, 1]: its shorter side resized to ``size`` by Lanczos, its centre cropped.

    Returns:
        The image, and what was done to it ("" where nothing was).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no image.
    """
    import torch

    from nextscale.datasets.decoding import CENTRE, decode, square, to_signed
    from nextscale.datasets.errors import ImageError

    try:
        planes = decode(Path(path).read_bytes())
    except ImageError as error:
        raise ValueError(f"{path} {error}") from None
    width, height = planes[0].size
    pixels = square(planes, size, ratio=1.0, flip=False, across=CENTRE, down=CENTRE)
    remark = ""
    if (width, height) != (size, size):
        cropped = ", its centre cropped" if width != height else ""
        remark = f"{path} is {width} x {height} pixels; it is resized to the model's {size} x {size}{cropped}"
    return (torch.from_numpy(to_signed(pixels)) + 1) / 2, remark


def read_mask(path: str, grid: tuple[int, int]) -> Any:
    """1 = keep, at the finest grid: a cell that white covers in any place is drawn anew."""
    import torch.nn.functional as F

    side = max(grid)
    # Eight pixels a cell are enough to see whether any of it is white.
    image, _ = read_image(path, side * 8)
    white = (image.mean(0, keepdim=True) > 0.5).float()
    return 1 - F.adaptive_max_pool2d(white[None], grid)[0, 0].long()


def veiled(image: Any, mask: Any) -> Any:
    """The image, grey where it is drawn anew."""
    import torch.nn.functional as F

    kept = F.interpolate(mask[None, None].float(), size=image.shape[-2:], mode="nearest")[0]
    return image * kept + 0.5 * (1 - kept)
