"""Images of a run that cannot be read, where they may be skipped: each is named once, by whichever process met it.

In training the next image takes the place of one; held-out ones are left out, so that figures are of the same images
with it and without.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate.utils import gather_object

from rae.data.images import DataConfig, Images, Stream, readable
from rae.data.order import image_index


class Unreadable:
    """Those that one run met.

    Args:
        warn: shows a message.
        record: writes the name of one into the run's log, as `broken`.
    """

    def __init__(self, warn: Callable[[str], None], record: Callable[..., None]) -> None:
        self._warn, self._record = warn, record
        self._names, self._new = set(), set()

    def remember(self, lines: Iterable[dict]) -> None:
        """What the log says already is not said again."""
        self._names |= {line["broken"] for line in lines if "broken" in line}

    def watch(self, stream: Stream, batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        """Pass batches of the stream on; `tell` names the images in whose place another one was read."""
        for batch in batches:
            for position, index in zip(batch["position"].tolist(), batch["index"].tolist()):
                wanted = image_index(position, len(stream.images), stream.seed)
                if wanted != index:
                    self._new.add(stream.images.names[wanted])
            yield batch

    def tell(self) -> None:
        """All processes call it: name those that were met since the last time."""
        for name in sorted({*gather_object(list(self._new))} - self._names):
            self._names.add(name)
            self._warn(f"{name} cannot be read; the next image takes its place ({len(self._names)} so far)")
            self._record(broken=name)
        self._new = set()

    def leave_out(self, name: str) -> None:
        """Say of a held-out image that it is left out."""
        if name not in self._names:
            self._names.add(name)
            self._warn(f"{name} cannot be read; it is left out of the held-out images")

    def check_held_out(self, images: Images, data: DataConfig, size: tuple[int, int]) -> None:
        """Read the held-out images once, so that one that cannot be read ends the run at once.

        Raises:
            ImageError: one cannot be read, or, where they may be left out, none can.
        """
        for _ in readable(images, data, size, range(len(images)), batch=64, left_out=self.leave_out):
            pass
