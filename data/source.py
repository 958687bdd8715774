"""What the modules of the source formats hand to the converters."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from data.dataset import FRAME, DatasetWriter, InputError

LONGEST = 60_000  # steps of an episode; half an hour of play is 27,000


class Episode(NamedTuple):
    where: str  # file and record
    observation: NDArray  # [L + 1, 84, 84] uint8 or [L + 1, ...] float32
    action: NDArray  # [L]
    reward: NDArray  # [L]
    terminal: bool

    def add_to(self, writer: DatasetWriter) -> None:
        """Raises InputError, with the place, if it does not fit."""
        try:
            writer.add_episode(self.observation, self.action, self.reward, self.terminal)
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from None


class Source(NamedTuple):
    items: Iterable[Any]  # one an episode, in order of time; an item is cheap to pass over
    read: Callable[[Iterator[Any]], Iterator[Episode]]  # the episodes of some of the items
    steps: float  # about how many there are
    length: float  # about how many an episode has
    meta: dict[str, Any]  # for meta.json
    shape: tuple[int, ...] = FRAME  # of an observation
    num_actions: int | None = None  # if the data tell


def refuse_copies(beginnings: Iterable[tuple[Path, bytes]]) -> None:
    """Takes files and what each begins with. Raises InputError for two that begin alike: no two episodes are the same."""
    seen: dict[int, Path] = {}
    for file, beginning in beginnings:
        if (key := hash(beginning)) in seen:
            raise InputError(f"{file} is a copy of {seen[key]}: they hold the same episodes")
        seen[key] = file
