"""A conversation: turns as one text, by a template, and a session that keeps what it has read.

The template that Apple's instruct models were tuned with is `TEMPLATE`: a checkpoint without one of
its own gets it. (CoreNet's recipe for them has it, their cards show none.)

    <|user|>
    {what is said}</s>
    <|assistant|>
    {the reply}</s>
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checks import fail, one_line
from ..openelm.model import OpenELM
from ..openelm.tokenizer import Tokenizer
from .session import Session
from .streaming import Stream

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}  # Llama 2's
Message = dict[str, str]


class Template:
    """How turns become one text.

    Args:
        source: in Jinja, as transformers' templates are.
        special: the texts of `bos_token` and `eos_token`.

    Raises:
        ImportError: jinja2 is missing.
        ValueError: it can't be read.

    Example:
        >>> Template(TEMPLATE)([{"role": "user", "content": "Hi"}])
        '<|user|>\\nHi</s>\\n<|assistant|>\\n'
    """

    def __init__(self, source: str, special: dict[str, str] | None = None) -> None:
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError("a chat template needs jinja2: pip install jinja2") from error
        self.special = _SPECIAL | (special or {})
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self._wrong = jinja2.TemplateError
        try:
            self._template = environment.from_string(source)
        except self._wrong as error:
            raise ValueError(f"the chat template can't be read: {one_line(error)}") from error

    @classmethod
    def of(cls, checkpoint: str | Path | None) -> "Template":
        """The template of a checkpoint's tokenizer, TEMPLATE if it has none.

        Args:
            checkpoint: its folder; None for none.

        Returns:
            The template.

        Raises:
            ValueError: a file beside the checkpoint isn't what it should be.
        """
        folder = None if checkpoint is None else Path(checkpoint)
        if folder is None or not folder.is_dir():
            return cls(TEMPLATE)
        values: dict[str, Any] = {}
        if (folder / _CONFIG).is_file():
            from ..text.metadata import parsed

            values = parsed(folder / _CONFIG, (folder / _CONFIG).read_bytes())
        special = {name: _text(values[name]) for name in _SPECIAL if values.get(name)}
        if (folder / _FILE).is_file():
            return cls((folder / _FILE).read_text(encoding="utf-8"), special)
        source = values.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        return cls(source if isinstance(source, str) else TEMPLATE, special)

    def __call__(self, messages: Sequence[Message]) -> str:
        """The text of turns, up to where the next reply begins.

        Args:
            messages: {"role": "user", "assistant" or "system", "content": text}.

        Returns:
            The text.

        Raises:
            ValueError: the template refuses them.
        """
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, **self.special
            )
        except (self._wrong, TypeError) as error:
            raise ValueError(f"the chat template refuses it: {one_line(error)}") from error


def _refuse(message: str) -> None:
    raise ValueError(f"the chat template refuses it: {message}")


def _text(token: Any) -> str:
    """A special token of tokenizer_config.json: text, or an object that has it."""
    found = token.get("content") if isinstance(token, dict) else token
    if not isinstance(found, str):
        fail("special token", "text", json.dumps(token))
    return found


class Chat:
    """A conversation with a model; of each turn only what is new is read.

    Args:
        model: the model, accelerated or not.
        tokenizer: of its texts.
        template: how turns become one text; None for TEMPLATE.
        max_new_tokens: of a reply.
        decode_mode, draft, draft_tokens: see `Session`.
        options: of `generate` (temperature, seed, ...).

    Attributes:
        messages: what was said so far.

    Example:
        >>> chat = Chat(model, tokenizer, max_new_tokens=20)
        >>> for piece in chat.say("Hello").text():
        ...     print(piece, end="")
    """

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        template: Template | None = None,
        *,
        max_new_tokens: int,
        decode_mode: str | None = None,
        draft: str | OpenELM | None = None,
        draft_tokens: int | None = None,
        **options: Any,
    ) -> None:
        how: dict[str, Any] = {"draft": draft, "draft_tokens": draft_tokens}
        self.session = Session(model, decode_mode=decode_mode, **how)
        self.tokenizer, self._bare = tokenizer, Tokenizer(tokenizer.path, None)
        self.template = Template(TEMPLATE) if template is None else template
        self.max_new_tokens, self.options = max_new_tokens, options
        self.messages: list[Message] = []
        self.forgotten = 0  # messages that had to go, as no more fit
        self._stream: Stream | None = None
        known = {
            "bos_token": tokenizer.bos,
            "eos_token": next(iter(model.config.eos_token_ids), None),
        }
        self._ids = {self.template.special[k]: i for k, i in known.items() if i is not None}

    def say(self, text: str) -> Stream:
        """A turn: the reply as it comes. It becomes part of the conversation with the next turn.

        Args:
            text: what the user says.

        Returns:
            The Stream of the reply. The oldest turns are forgotten if all of them don't fit.

        Raises:
            ValueError: the text alone doesn't fit.
        """
        self._close()
        messages = [*self.messages, {"role": "user", "content": text}]
        room = self.session.cache.max_length - self.max_new_tokens
        ids = self.encode(self.template(messages))
        forgotten = 0
        while len(ids) > room and len(messages) > 1:
            # A system's message stays; a question goes with its answer.
            first = 1 if messages[0]["role"] == "system" else 0
            if len(messages) - first < 2:
                break
            del messages[first : first + 2]
            forgotten += 2
            ids = self.encode(self.template(messages))
        if len(ids) > room:
            limit = self.session.cache.max_length
            fail("text", f"at most {limit} tokens with its reply", len(ids) + self.max_new_tokens)
        self._stream = self.session.stream(
            [ids], self.max_new_tokens, tokenizer=self.tokenizer, **self.options
        )
        self.messages, self.forgotten = messages, self.forgotten + forgotten
        return self._stream

    def _close(self) -> None:
        """Take the last reply into the conversation."""
        if self._stream is not None:
            reply = (self._stream.rows[0].text or "").strip()
            self.messages.append({"role": "assistant", "content": reply})
            self._stream = None

    def encode(self, text: str) -> list[int]:
        """The ids of a whole conversation: special tokens in the text are ids, whatever library
        reads the tokenizer.
        """
        parts = [text]
        if self._ids:
            parts = re.split(f"({'|'.join(map(re.escape, self._ids))})", text)
        ids = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        for part in parts:
            if part in self._ids:
                ids.append(self._ids[part])
            elif part:
                ids += self._bare.encode(part)
        doubled = self.tokenizer.bos is not None and ids[1:2] == [self.tokenizer.bos]
        return ids[1:] if doubled else ids
