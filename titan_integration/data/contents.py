"""What a document holds before it is packed: text, token ids, or the messages of a chat."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torchtitan.components.tokenizer import BaseTokenizer
from xxhash import xxh3_64_digest

from titan_integration.data.identity import tokenizer_digest
from titan_integration.data.records import (
    DEFAULT_TEXT_COLUMN,
    IGNORED,
    LABELS,
    LOSS_MASK,
    MESSAGES,
    TOKEN_IDS,
    Columns,
    check_encodable,
    lookup,
    missing_column,
)

_MOST = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Tokens:
    """Token ids of a whole document, int32; and which of them are predicted, if not all."""

    ids: np.ndarray
    predicted: np.ndarray | None = None

    def __len__(self) -> int:
        """Return how many ids there are."""
        return len(self.ids)


@dataclass(frozen=True)
class Chat:
    """Messages, each with a ``role`` and its ``content``; those of the assistant are predicted."""

    messages: list[Mapping[str, Any]]
    place: str

    def __len__(self) -> int:
        """Return how many messages there are."""
        return len(self.messages)


Content = str | Tokens | Chat


class Encoded(NamedTuple):
    """Token ids of a document with begin and end; and which are predicted, if not all."""

    ids: Sequence[int] | np.ndarray
    predicted: np.ndarray | None = None


def content_of(record: Mapping[str, Any], columns: Columns, place: str) -> Content:
    """Return what a record holds to train on; empty where that is nothing.

    It is in the text column: a string, a list of token ids (beside it perhaps ``labels`` or
    ``loss_mask``), or a list of messages. A record without a ``text``, if the column is not named
    otherwise, holds it in ``input_ids`` or in ``messages``.

    Raises:
        ValueError: If the column is missing or holds something else; names the place.
    """
    name = columns.text
    try:
        held = lookup(record, name)
    except KeyError:
        others = (TOKEN_IDS, MESSAGES) if name == DEFAULT_TEXT_COLUMN else ()
        found = [other for other in others if other in record]
        if not found:
            raise missing_column(record, name, "text_column", place) from None
        name = found[0]
        held = record[name]
    if isinstance(held, str) and name != TOKEN_IDS:
        return held
    if isinstance(held, list):
        if held and isinstance(held[0], Mapping):
            return Chat(_messages(held, name, place), place)
        return _tokens(held, record, name, place)
    what = {DEFAULT_TEXT_COLUMN: "a string", MESSAGES: "a list of messages"}.get(
        name, "a list of token ids" if name == TOKEN_IDS else "a string"
    )
    msg = f"{place}: text column {name!r} holds {type(held).__name__}, not {what}"
    raise ValueError(msg)


def encoded(
    encode: Callable[[str], list[int]], content: Content, place: Callable[[], str]
) -> Encoded:
    """Return the tokens of a document; text gets begin and end, token ids stay as they are.

    Raises:
        ValueError: If messages cannot be rendered, or the tokenizer lacks a token id; names the
            place.
    """
    if isinstance(content, str):
        return Encoded(encode(content))
    if isinstance(content, Tokens):
        if isinstance(encode, Encoder) and (largest := largest_id(content)) >= encode.vocab_size:
            check_vocabulary(largest, encode.vocab_size, place())
        return Encoded(content.ids, None if content.predicted is None else content.predicted[1:])
    assert isinstance(encode, Encoder), "the loader hands on what can render messages"
    return encode.chat(content)


class Encoder:
    """A tokenizer as the loader calls it: with begin and end of text, and for messages.

    The last text is remembered: checking data, opening it and reading its first row need the same.
    """

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        """Take a tokenizer."""
        self.vocab_size = tokenizer.get_vocab_size()
        self.digest = tokenizer_digest(tokenizer)
        self._tokenizer = tokenizer
        self.last: tuple[str, list[int]] = ("", [])

    def __call__(self, text: str) -> list[int]:
        """Return a text's token ids, with begin and end of text."""
        last, ids = self.last
        if text != last or not ids:
            ids = self._tokenizer.encode(text, add_bos=True, add_eos=True)
            self.last = (text, ids)
        return ids

    def chat(self, chat: Chat) -> Encoded:
        """Return the tokens of a chat in the tokenizer's template; the assistant's are predicted.

        As the host does it: the whole is encoded once, and where an answer begins and ends is the
        number of tokens of what comes before it.

        Raises:
            ValueError: If the tokenizer has no template, or it does not render these messages.
        """
        messages = chat.messages
        ids = self._rendered(chat, messages)
        if (end := getattr(self._tokenizer, "eos_id", None)) is not None and ids[-1] != end:
            ids.append(end)
        predicted = np.zeros(len(ids), bool)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                first = len(self._rendered(chat, messages[:i], add_generation_prompt=True))
                past = len(self._rendered(chat, messages[: i + 1]))
                last = len(ids) if i == len(messages) - 1 else past
                predicted[first:last] = True
        return Encoded(ids, predicted[1:])

    def _rendered(
        self, chat: Chat, messages: Sequence[Mapping[str, Any]], **more: bool
    ) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template([*messages], **more)  # pyrefly: ignore
        except Exception as error:  # a template raises whatever its author chose
            reason = str(error).strip().partition("\n")[0]
            msg = (
                f"{chat.place}: the tokenizer's chat template does not render these messages: "
                f"{type(error).__name__}: {reason}; give a tokenizer with a template for them, "
                "--hf_assets_path, or render them to a column of text"
            )
            raise ValueError(msg) from error
        text = text if more else text.rstrip("\n")
        return [*self._tokenizer.encode(text, add_bos=True, add_eos=False)]


def packed(content: Content) -> bytes:
    """Return a document as bytes, of which `unpacked` makes it again."""
    if isinstance(content, str):
        return b"t" + content.encode("utf-8", "surrogatepass")
    if isinstance(content, Chat):
        return b"c" + json.dumps([content.messages, content.place]).encode()
    if content.predicted is None:
        return b"i" + content.ids.tobytes()
    return b"m" + content.ids.tobytes() + content.predicted.tobytes()


def unpacked(content: bytes) -> Content:
    """Return a document from its bytes."""
    kind, held = content[:1], content[1:]
    if kind == b"t":
        return held.decode("utf-8", "surrogatepass")
    if kind == b"c":
        return Chat(*json.loads(held))
    count = len(held) // (5 if kind == b"m" else 4)
    ids = np.frombuffer(held, np.int32, count)
    predicted = np.frombuffer(held, bool, offset=4 * count) if kind == b"m" else None
    return Tokens(ids, predicted)


def hash_of(content: Content) -> bytes:
    """Return 64 bits that differ for another content."""
    if isinstance(content, Chat):
        return xxh3_64_digest(json.dumps(content.messages).encode())
    return xxh3_64_digest(
        content.encode("utf-8", "surrogatepass") if isinstance(content, str) else packed(content)
    )


def largest_id(content: Content) -> int:
    """Return the largest token id there is already; -1 if none."""
    return int(content.ids.max(initial=-1)) if isinstance(content, Tokens) else -1


def check_vocabulary(largest: int, vocab_size: int, place: str) -> None:
    """Check that the tokenizer has a token id.

    Raises:
        ValueError: It has not; names the place.
    """
    if largest >= vocab_size:
        msg = (
            f"{place}: token id {largest}, but the tokenizer has {vocab_size}, from 0 to "
            f"{vocab_size - 1}; give the tokenizer that made these ids: --hf_assets_path"
        )
        raise ValueError(msg)


def _tokens(held: list[Any], record: Mapping[str, Any], name: str, place: str) -> Tokens:
    ids = _whole_numbers(held, name, place)
    wrong = np.flatnonzero((ids < 0) | (ids > _MOST))
    if len(wrong):
        msg = f"{place}: column {name!r} holds {ids[wrong[0]]} at {wrong[0]}, which is no token id"
        raise ValueError(msg)
    predicted: np.ndarray | None = None
    for other, rule in ((LABELS, _by_labels), (LOSS_MASK, _by_mask)):
        if (values := record.get(other)) is None:
            continue
        if not isinstance(values, list) or len(values) != len(ids):
            count = len(values) if isinstance(values, list) else type(values).__name__
            msg = f"{place}: column {other!r} holds {count}, but there are {len(ids)} {name!r}"
            raise ValueError(msg)
        mask = rule(np.asarray(values), ids, name, place)
        predicted = mask if predicted is None else predicted & mask
    return Tokens(ids.astype(np.int32), predicted)


def _by_labels(labels: np.ndarray, ids: np.ndarray, name: str, place: str) -> np.ndarray:
    """Return which tokens labels of Hugging Face's kind predict: the token itself, or -100."""
    wrong = np.flatnonzero((labels != IGNORED) & (labels != ids))
    if len(wrong):
        i = wrong[0]
        msg = (
            f"{place}: label {labels[i]} at {i}, where the token id is {ids[i]}; {LABELS!r} are "
            f"the {name!r} themselves, not shifted, or {IGNORED} where none is predicted"
        )
        raise ValueError(msg)
    return labels != IGNORED


def _by_mask(mask: np.ndarray, ids: np.ndarray, name: str, place: str) -> np.ndarray:  # noqa: ARG001
    wrong = np.flatnonzero((mask != 0) & (mask != 1))
    if len(wrong):
        msg = f"{place}: {LOSS_MASK!r} holds {mask[wrong[0]]} at {wrong[0]}, not 0 or 1"
        raise ValueError(msg)
    return mask == 1


def _whole_numbers(held: list[Any], name: str, place: str) -> np.ndarray:
    try:
        ids = np.array(held) if held else np.array([], np.int64)
    except (ValueError, OverflowError):
        ids = np.array([None])
    if name != TOKEN_IDS and held and isinstance(held[0], str):
        msg = f"{place}: column {name!r} holds a list of strings; make each a record of its own"
        raise ValueError(msg)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        at = next((i for i, x in enumerate(held) if type(x) is not int), 0)
        msg = f"{place}: column {name!r} holds {held[at]!r:.50} at {at}, not a token id"
        raise ValueError(msg)
    return ids


def _messages(held: list[Any], name: str, place: str) -> list[Mapping[str, Any]]:
    for i, message in enumerate(held):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                msg = (
                    f"{place}: message {i} of {name!r} has no text as its {key!r}; a message is "
                    '{"role": "user", "content": "..."}'
                )
                raise ValueError(msg)  # noqa: TRY004 -- it is the data that is wrong
            check_encodable(value, name, place)
    return held
