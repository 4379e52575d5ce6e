"""The section `data` of a job that learns from chats with images."""

from __future__ import annotations

from typing import ClassVar

from launcher.data.chat_files import FilesInMessages, ListedFiles
from launcher.data.section import Data
from launcher.values import Day

_IMAGES = "images"


class ChatImageColumns(Data):
    """Rows of chats whose messages have images."""

    tools: ClassVar[None] = None
    messages: str = "messages"
    """The column of a chat's messages; what the assistant says in them is learned. A part of a message may be
    an image: `{type: image, image: a.png}`, relative to the file that it stands in."""
    images: str | None = None
    """The column with a list of a chat's images, which stand where the messages have `<image>`. Left out, it
    is the column `images`, where rows have it."""
    date: Day | None = None
    """The date that a chat template writes, where it writes one. Left out, the day of the plan, for all
    attempts of a run."""

    @property
    def file_columns(self) -> tuple[FilesInMessages, ListedFiles]:
        """Return the columns that name files: the messages, and the list of images."""
        return FilesInMessages(self.messages), ListedFiles(self.images or _IMAGES)
