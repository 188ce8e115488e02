"""Crops and resizing: images of any size to training images of one size."""

from PIL import Image


def keep(image: Image.Image, width: int, height: int) -> Image.Image:
    """The complete image, resized (Lanczos) if necessary.

    Raises ValueError if that would distort it.
    """
    if image.width * height != image.height * width:
        raise ValueError(
            f"is {image.width}x{image.height} and would be distorted to {width}x{height}; "
            "use --transform center-crop or center-crop-dhariwal"
        )
    return _resize(image, width, height)


def center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest central square, resized (Lanczos); `width` equals `height`."""
    side = min(image.size)
    return _resize(_crop_center(image, side, side), width, height)


def center_crop_wide(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest central part with the aspect ratio width:height, resized (Lanczos), with black bars above and below.

    The result is width x width; `width` exceeds `height`.
    """
    part_width = min(image.width, round(image.height * width / height))
    part_height = min(image.height, max(1, round(image.width * height / width)))
    picture = _resize(_crop_center(image, part_width, part_height), width, height)
    square = Image.new(image.mode, (width, width))
    square.paste(picture, (0, (width - height) // 2))
    return square


def center_crop_dhariwal(image: Image.Image, width: int, height: int) -> Image.Image:
    """The central square, as in ADM's and EDM2's ImageNet; `width` equals `height`.

    The image is halved by area averaging while its shorter side is at least twice `width`, then resized (bicubic) until
    the shorter side is `width`, then cropped. Dhariwal and Nichol 2021; bit-exact.
    """
    size = width
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _crop_center(image, size, size)


TRANSFORMS = {
    "none": keep,
    "center-crop": center_crop,
    "center-crop-wide": center_crop_wide,
    "center-crop-dhariwal": center_crop_dhariwal,
}


def _crop_center(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
