"""Text to token ids and back, as the checkpoint defines it: tokenizer, chat template, and decoding as a stream."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError
from .files import first_line, read_json_if_any
from .vocabulary import add_bos_eos, vocabulary_from_gguf, vocabulary_from_sentencepiece

if TYPE_CHECKING:
    import jinja2
    import tokenizers

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        special_tokens: "bos_token", "eos_token", ... -> token, as far as the checkpoint names them.
        chat_template: the Jinja source, or None.
        special_ids: ids that `decode` hides.
        eos_token_ids: the end-of-text ids the tokenizer itself names; the model's are in `ModelConfig`.
        missing_because: why there is no tokenizer, or an empty string.
    """

    missing_because = ""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        eos_token_ids: Iterable[int] = (),
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder().items()
        self.special_ids = frozenset(index for index, token in added if token.special)
        eos = backend.token_to_id(self.special_tokens.get("eos_token", ""))
        self.eos_token_ids = tuple(dict.fromkeys(i for i in (eos, *eos_token_ids) if i is not None))

    @classmethod
    def missing(cls, reason: str) -> Tokenizer:
        """Of a checkpoint without one: knows no token, so ids have no text, and says `reason` to whoever encodes."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import models

        made = cls(Backend(models.WordLevel({}, unk_token="")), {}, None)
        made.missing_because = reason
        return made

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads tokenizer.json, or else a SentencePiece tokenizer.model, and the configuration files beside it; a
        folder with neither has a `missing` one.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        from tokenizers import Tokenizer as Backend

        named, configured = folder / "special_tokens_map.json", folder / "tokenizer_config.json"
        config = {**read_json_if_any(named), **read_json_if_any(configured)}
        special = {name: _content(config[name]) for name in _NAMED if config.get(name)}
        if (folder / "tokenizer.json").is_file():
            try:
                backend = Backend.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # tokenizers raises bare Exception
                raise CheckpointError(
                    f"{folder / 'tokenizer.json'}: not readable ({error}); download it again"
                ) from None
        elif (folder / "tokenizer.model").is_file():
            vocabulary = vocabulary_from_sentencepiece(folder / "tokenizer.model")
            backend, special = vocabulary.backend, {**vocabulary.special_tokens, **special}
        else:
            return cls.missing(
                f"{folder} has no tokenizer.json or tokenizer.model: copy the base model's into it, or pass token ids"
            )
        _add_configured_tokens(backend, config, read_json_if_any(folder / "added_tokens.json"), special)
        if not (folder / "tokenizer.json").is_file():
            # tokenizer.json says itself what is added to a text; a SentencePiece model cannot.
            bos, eos = config.get("add_bos_token", True), config.get("add_eos_token", False)
            add_bos_eos(backend, special, bos=bos, eos=eos)
        return cls(backend, special, _chat_template(folder, config))

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], path: Path) -> Tokenizer:
        """Builds the tokenizer from a GGUF file's metadata; `path` is named in errors.

        Raises:
            CheckpointError: for a kind of tokenizer that is not supported.
        """
        vocabulary = vocabulary_from_gguf(fields, path)
        eos = [fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        template = fields.get("tokenizer.chat_template")
        return cls(vocabulary.backend, vocabulary.special_tokens, template, [i for i in eos if i is not None])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers loads too."""
        folder = Path(folder)
        self._backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
            **({"chat_template": self.chat_template} if self.chat_template else {}),
        }
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with BOS or EOS added where the checkpoint's tokenizer adds them, unless told not to.

        Special tokens spelled out in the text become those tokens, as in transformers.

        Raises:
            CheckpointError: the checkpoint has no tokenizer.
            ValueError: for text with an unpaired surrogate, which is not Unicode text.
        """
        if self.missing_because:
            raise CheckpointError(self.missing_because)
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, found {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds an unpaired surrogate at character {error.start}: not Unicode text") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_prompt(self, text: str, chat: bool = True) -> list[int]:
        """Token ids of a user's message, through the chat template if there is one and it is wanted."""
        return self.encode_chat(text) if chat and self.has_chat_template else self.encode(text)

    def vocabulary(self) -> dict[str, int]:
        """Every token as the vocabulary spells it, added ones too, and its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def encode_chat(self, messages: list[dict[str, Any]] | str, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, written out by the checkpoint's chat template.

        Args:
            messages: objects with "role" and "content"; a str is one user message.
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            ValueError: without a template, for malformed messages, and when the template itself refuses them.
        """
        return self.encode(self.render_chat(messages, add_generation_prompt), add_special_tokens=False)

    def render_chat(self, messages: list[dict[str, Any]] | str, add_generation_prompt: bool = True) -> str:
        """The text that `encode_chat` encodes."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not messages:
            raise ValueError("messages must not be empty")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"a message must be a dict with 'role' and 'content', found {message!r:.80}")
        try:
            return self._template.render(
                messages=[{key: value for key, value in m.items() if value is not None} for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a template is a program: it may divide by 0
            raise ValueError(f"the checkpoint's chat template refuses these messages: {first_line(error)}") from None

    @cached_property
    def _template(self) -> jinja2.Template:
        import jinja2

        if self.chat_template is None:
            raise ValueError("the checkpoint has no chat template; pass chat=False to encode the text as it is")
        try:
            return _chat_environment().from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the checkpoint's chat template is not valid Jinja: {error}") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, exactly as the tokens spell it; ids outside the vocabulary are skipped."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def _decoder_kinds(self) -> frozenset[str]:
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        return frozenset(part["type"] for part in decoder.get("decoders", [decoder]) if part)


class StreamDecoder:
    """Decodes ids as they come: what `push` and `flush` return joins to `decode` of all ids.

    Text is held back while it could still change: half a UTF-8 sequence, and with byte-fallback vocabularies (Llama 2,
    Mistral) a run of byte tokens, whose decoding depends on the whole run. The work is that of the new ids alone.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._byte_level = tokenizer._decoder_kinds == {"ByteLevel"}
        self._byte_fallback = "ByteFallback" in tokenizer._decoder_kinds
        self._reset()

    def _reset(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []  # the last id that is out: decoders treat the very first one differently
        self._pending: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """Adds ids; returns the text that is final with them. Special tokens have none."""
        tokenizer = self._tokenizer
        tokens = [(i, tokenizer._backend.id_to_token(i)) for i in ids if i not in tokenizer.special_ids]
        known = [(index, token) for index, token in tokens if token is not None]
        if self._byte_level:
            return self._utf8.decode(b"".join(_spelled_bytes(token) for _, token in known))
        out = ""
        for index, token in known:
            self._pending.append(index)
            if not (self._byte_fallback and _BYTE_TOKEN.fullmatch(token)):
                out += self._emit()
        return out

    def pending(self) -> str:
        """What `flush` would return, and nothing changes; "" while it would end in half a character."""
        if not self._pending:
            return ""
        text = self._decode_pending()
        return "" if "\ufffd" in text else text

    def flush(self) -> str:
        """The rest of the text, with U+FFFD for what never became a character. The stream is then at its start."""
        rest = self._utf8.decode(b"", final=True) if self._byte_level else self._emit()
        self._reset()
        return rest

    def _emit(self) -> str:
        text = self._decode_pending()
        self._context, self._pending = self._pending[-1:] or self._context, []
        return text

    def _decode_pending(self) -> str:
        decode = self._tokenizer.decode
        return decode([*self._context, *self._pending])[len(decode(self._context)) :]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTE_OF = _byte_alphabet()


def _spelled_bytes(token: str) -> bytes:
    """A byte-level token's bytes; an added token with a character outside the alphabet stands for itself."""
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode("utf-8")


def _chat_environment() -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates: they are code from the checkpoint, so sandboxed."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`: marks the assistant's text for training; here it renders its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ):
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or tokenizer_config.json's chat_template: a string, or the list's entry named 'default'."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of named ones"
        )
    return found


def _add_configured_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], added: Mapping[str, int], special: Mapping[str, str]
) -> None:
    """Added tokens that only the configuration files know, and the named ones marked special, as transformers does."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    declared = {index: AddedToken(content) for content, index in added.items()}
    for index, entry in (config.get("added_tokens_decoder") or {}).items():
        declared[int(index)] = AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
    present = {index: repr(token) for index, token in backend.get_added_tokens_decoder().items()}
    backend.add_tokens([token for index, token in sorted(declared.items()) if present.get(index) != repr(token)])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    names = [*special.values(), *(_content(token) for token in (extra.values() if isinstance(extra, dict) else extra))]
    known_special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    new = [AddedToken(name, special=True, normalized=False) for name in names if name not in known_special]
    backend.add_special_tokens(new)


def _content(token: Any) -> str:
    """A token that a configuration file writes as a string or as an object."""
    return token["content"] if isinstance(token, Mapping) else str(token)
