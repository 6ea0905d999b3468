"""The text tokenizer: prompt to a fixed number of ids, left-padded.

References:
    Prompt conventions (left padding, motion prefix, empty prompt): URSA, arXiv 2510.24717,
    section 4.2 and docs/math.md.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ursa.errors import ConfigError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
COMPANION_FILES = (
    *(CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "generation_config.json"),
)
"""Files beside tokenizer.json that transformers reads: kept as they are, for its sake."""
PAD_TOKEN = "<|endoftext|>"  # noqa: S105
BOV_TOKEN = "<|vision_start|>"  # noqa: S105


class TextTokenizer:
    """Byte-level BPE with a pad token and the begin-of-video token of the Qwen vocabulary."""

    def __init__(self, tokenizer: Tokenizer, *, files: Mapping[str, bytes] | None = None) -> None:
        """Take a tokenizer over.

        Args:
            tokenizer: Any tokenizer of the `tokenizers` library.
            files: The files that it was read from, by name; `save` writes them again as they are.

        Raises:
            ConfigError: If it lacks the pad or the begin-of-video token.
        """
        self._tokenizer = tokenizer
        self._files = dict(files or {})
        self.pad_id = _token_id(tokenizer, PAD_TOKEN)
        self.bov_id = _token_id(tokenizer, BOV_TOKEN)

    @property
    def vocab_size(self) -> int:
        """Number of ids including special tokens."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def class_name(self) -> str:
        """The class of transformers that reads the saved files."""
        config = json.loads(self._files.get(CONFIG_FILE, b"{}"))
        name = str(config.get("tokenizer_class", "PreTrainedTokenizerFast"))
        return "Qwen2TokenizerFast" if name.startswith("Qwen2Tokenizer") else name

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token, special ones too."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def encode(self, prompts: Sequence[str], *, max_length: int) -> Tensor:
        """Encode prompts to ids, cut at the right and padded at the left.

        Args:
            prompts: Texts, none too; "" gives pads alone.
            max_length: Number of ids of every prompt.

        Returns:
            Ids, shape (B, max_length), int64.
        """
        rows = [
            encoding.ids[:max_length]
            for encoding in self._tokenizer.encode_batch(list(prompts), add_special_tokens=False)
        ]
        padded = [[self.pad_id] * (max_length - len(row)) + row for row in rows]
        return torch.tensor(padded, dtype=torch.int64).view(len(rows), max_length)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens.

        Args:
            ids: In [0, vocab_size), of one prompt.
        """
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, and what transformers reads beside it, into a directory.

        Args:
            directory: Made if missing; files of the same names are replaced.
        """
        directory.mkdir(parents=True, exist_ok=True)
        files = self._files or {
            TOKENIZER_FILE: self._tokenizer.to_str(pretty=True).encode(),
            CONFIG_FILE: json.dumps(
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "pad_token": PAD_TOKEN,
                    "eos_token": PAD_TOKEN,
                    "padding_side": "left",
                    "clean_up_tokenization_spaces": False,
                },
                indent=2,
            ).encode(),
        }
        for name, content in files.items():
            (directory / name).write_bytes(content)


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ConfigError(f"the text tokenizer lacks the token {token}")
    return index


def motion_prompt(prompt: str, motion_px_per_s: float | None) -> str:
    """Put the motion prefix before a prompt: `motion=9.0, a red ball`.

    Args:
        prompt: Any text.
        motion_px_per_s: Motion at 256 px width, pixels per second, written to one decimal; None
            adds nothing.

    Returns:
        The prompt as the network was trained on it.
    """
    return prompt if motion_px_per_s is None else f"motion={motion_px_per_s:.1f}, {prompt}"


def train_text_tokenizer(texts: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE; any text can be encoded, the given ones shortest.

    Args:
        texts: Captions; order does not matter.
        vocab_size: Upper limit of the vocabulary, at least 256 bytes + 2 special tokens.

    Returns:
        The tokenizer, with `PAD_TOKEN` and `BOV_TOKEN`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, BOV_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    return TextTokenizer(tokenizer)


def load_text_tokenizer(directory: Path) -> TextTokenizer:
    """Read tokenizer.json and its companions from a directory.

    Args:
        directory: Written by `TextTokenizer.save` or by transformers.

    Returns:
        The tokenizer; padding and truncation in the file are not taken over.

    Raises:
        ConfigError: If the file is missing, no tokenizer, or lacks the pad or the begin-of-video
            token.
    """
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise ConfigError(
            f"no text tokenizer at {directory}: {TOKENIZER_FILE} is missing; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes it"
        )
    files = {
        name: (directory / name).read_bytes()
        for name in (TOKENIZER_FILE, *COMPANION_FILES)
        if (directory / name).is_file()
    }
    try:
        tokenizer = Tokenizer.from_buffer(files[TOKENIZER_FILE])
    except ValueError as error:  # what the library raises for bytes that are no tokenizer
        raise ConfigError(f"{path} is not a tokenizer file: {error}") from error
    # a file may carry padding and truncation of its own; here they are arguments
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return TextTokenizer(tokenizer, files=files)
