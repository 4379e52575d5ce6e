"""Columns of a file that suit each key of a task: their kinds, and their usual names."""

from __future__ import annotations

from typing import NamedTuple

from launcher.data.columns import Kind


class Role(NamedTuple):
    """The columns that `launcher init` offers for a key of `data`."""

    kinds: tuple[Kind, ...] = (Kind.TEXT,)
    """Kinds of values that fit, whatever the column is called."""
    names: tuple[str | tuple[str, ...], ...] = ()
    """Usual names besides the key's own, the most common first; two for a pair."""
    by_name: tuple[Kind, ...] = ()
    """Kinds that fit only a column with one of these names."""


TEXT = Role(names=("text", "sentence", "content", "body", "review"), by_name=(Kind.CLASS,))
PAIR_OR_TEXT = Role(
    names=(
        *TEXT.names,
        *("utterance", "question", "query", "title"),
        *(
            ("premise", "hypothesis"),
            ("sentence1", "sentence2"),
            ("question1", "question2"),
            ("text1", "text2"),
        ),
    ),
    by_name=(Kind.CLASS,),
)
PROMPT = Role(
    names=("prompt", "question", "instruction", "input", "query", "problem"),
    by_name=(Kind.CLASS, Kind.NUMBER),
)
COMPLETION = Role(
    names=("completion", "answer", "response", "output", "solution"), by_name=(Kind.CLASS, Kind.NUMBER)
)
MESSAGES = Role(kinds=(Kind.MESSAGES,), names=("messages", "conversations", "conversation"))
IMAGE_MESSAGES = Role((Kind.IMAGE_MESSAGES, Kind.MESSAGES), MESSAGES.names)
IMAGES = Role(kinds=(), names=("images", "image"), by_name=(Kind.IMAGE, Kind.WORDS, Kind.TAGS, Kind.OTHER))
LABEL = Role(
    kinds=(Kind.CLASS,),
    names=(
        *("label", "labels", "class", "category", "intent", "sentiment", "emotion", "topic", "target"),
        *("entailment", "stars", "score", "rating", "similarity", "relatedness", "value"),
    ),
    by_name=(Kind.TEXT, Kind.NUMBER, Kind.WORDS, Kind.TAGS),
)
WORDS = Role(kinds=(Kind.WORDS,), names=("words", "tokens", "0"), by_name=(Kind.TAGS,))
TAGS = Role(kinds=(Kind.TAGS,), names=("tags", "ner_tags", "pos_tags", "labels"), by_name=(Kind.WORDS,))
SPANS = Role(kinds=(Kind.SPANS,), names=("spans", "entities", "labels"))
QUESTION = Role(names=("question", "query"), by_name=(Kind.CLASS,))
CONTEXT = Role(names=("context", "passage", "paragraph", "text"), by_name=(Kind.CLASS,))
ANSWERS = Role(kinds=(Kind.ANSWERS,), names=("answers", "answer"), by_name=(Kind.TEXT, Kind.CLASS))
SOURCE = Role(names=("source", "src", "document", "article", "dialogue", "en"), by_name=(Kind.CLASS,))
TARGET = Role(names=("target", "tgt", "summary", "highlights", "translation", "de"), by_name=(Kind.CLASS,))
IMAGE = Role(kinds=(Kind.IMAGE,), names=("image", "file_name", "img"))
SOUND = Role(kinds=(Kind.SOUND,), names=("audio", "file_name", "sound", "path"))
CAPTION = Role(names=("text", "caption", "sentence", "description"), by_name=(Kind.CLASS,))
SPOKEN = Role(names=("text", "sentence", "transcription", "transcript"), by_name=(Kind.CLASS,))

OF_CAUSAL_LM = {"prompt": PROMPT, "completion": COMPLETION, "messages": MESSAGES, "text": TEXT}
OF_MASKED_LM = {"text": TEXT}
OF_TEXTS = {"text": PAIR_OR_TEXT, "label": LABEL}
OF_WORDS = {"words": WORDS, "tags": TAGS, "text": TEXT, "spans": SPANS}
OF_QUESTIONS = {"question": QUESTION, "context": CONTEXT, "answers": ANSWERS}
OF_PAIRS = {"source": SOURCE, "target": TARGET}
OF_IMAGES = {"image": IMAGE, "label": LABEL}
OF_SOUNDS = {"audio": SOUND, "label": LABEL}
OF_IMAGE_CHATS = {"messages": IMAGE_MESSAGES, "images": IMAGES}
OF_CAPTIONS = {"image": IMAGE, "text": CAPTION}
OF_SPEECH = {"audio": SOUND, "text": SPOKEN}
