"""Of which images kept features are, told by pixels: names and sizes in bytes may stay where pixels do not."""

from rae.data.image_set import Images, digest
from rae.data.images import read
from rae.evaluation.reference import pixels_sha256

EVERY = 512  # of so many images the pixels of one count


def fingerprint(images: Images, on_broken: str) -> str:
    """SHA-256 (hex) of `Images.identity` and of the pixels of every 512th image, the first one among them.

    Two folders of uncompressed images that have the same names, or one that was written anew in its place, are of one
    identity, which is of sizes in bytes; to read all images would take as long as to read them for their features. An
    image between these that was exchanged is found by `check_unchanged`.

    Args:
        images: a set.
        on_broken: of `DataConfig`; with "skip" the next readable image stands for one that cannot be read.

    Raises:
        ImageError: one of these images cannot be read.
    """
    found = (read(images, index, on_broken)[1] for index in range(0, len(images), EVERY))
    return digest([images.identity, *(pixels_sha256(image).hex() for image in found)])
