"""What a file is that is not what its name says: photos with the wrong suffix, web pages, archives."""

START_BYTES = 300  # that `kind_of_file` looks at
_PACKED = "an archive of a kind that is not read; unpack it, and give the folder"
_TIFF = (
    "a TIFF that is cut short, or of a kind that is not read, such as 16 bits for each of three colors; save it as PNG"
)
_NOT_READ = "which is not read; convert it to PNG"
# what a file is: its first bytes, from which byte on, and what to do about it
_KINDS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "a pointer of Git LFS, not the file itself; run `git lfs pull`"),
    (0, b"\xff\x0a", f"a JPEG XL image, {_NOT_READ}"),
    (0, b"\0\0\0\x0cJXL ", f"a JPEG XL image, {_NOT_READ}"),
    (0, b"\0\0\0\x0cjP  ", f"a JPEG 2000 image, {_NOT_READ}"),
    (4, b"ftypavi", f"an AVIF image, {_NOT_READ}"),
    (
        4,
        b"ftyphe",
        "a HEIC photo, not an image that can be read: it is damaged, or the package pillow-heif is missing (pip "
        "install 'edm2kit[heic]')",
    ),
    (4, b"ftypmif1", "a HEIC or AVIF image; convert it to PNG"),
    (4, b"ftypmsf1", "a HEIC or AVIF image; convert it to PNG"),
    (4, b"ftyp", "a video"),
    (0, b"II*\0", _TIFF),
    (0, b"MM\0*", _TIFF),
    (0, b"8BPS", f"a Photoshop file, {_NOT_READ}"),
    (0, b"%PDF", f"a PDF document, {_NOT_READ}"),
    (0, b"<svg", f"an SVG drawing, {_NOT_READ}"),
    (0, b"<?xml", "an XML file"),
    (0, b"<html", "a web page, not an image or a network; download the file itself"),
    (0, b"<!doctype", "a web page, not an image or a network; download the file itself"),
    (0, b"{", "a JSON file"),
    (0, b"Rar!", _PACKED),
    (0, b"7z\xbc\xaf", _PACKED),
    (0, b"\x1f\x8b", _PACKED),
    (0, b"BZh", _PACKED),
    (0, b"\xfd7zXZ", _PACKED),
    (257, b"ustar", _PACKED),
)


def kind_of_file(start: bytes) -> str | None:
    """What a file is that is not what was expected, by its first bytes, and what to do about it; None if unknown."""
    start = start[:START_BYTES]
    for position, magic, kind in _KINDS:
        found = start[position : position + len(magic)]
        if found == magic or (magic.startswith(b"<") and found.lower() == magic):
            return kind
    return None


def single_image(start: bytes) -> str | None:
    """What to do about a file that is an image where a folder or zip of images is expected; or None."""
    is_image = (
        start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or start[8:12] == b"WEBP"
    )
    return "a single image, not a folder or zip of images; give its folder" if is_image else None
