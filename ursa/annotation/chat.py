"""A captioner behind the chat completions protocol of OpenAI.

vLLM, Ollama, llama.cpp, LM Studio and paid services speak it. The address is the operator's own
configuration, so it is not judged as addresses of a source are (`ursa.sources.https`); redirects
are not followed and proxies of the environment not used. The key comes from the environment and
goes into the header of a request, nowhere else.

References:
    OpenAI, API reference, "Chat completions", with images as data URLs.
"""

import base64
import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import urllib3
from pydantic import BaseModel, ConfigDict, ValidationError
from urllib3.util import Retry

from ursa.annotation.records import AnnotationError, Measurement, NoAnswerError, SeenClip
from ursa.config import UrlCaptionerConfig
from ursa.errors import ConfigError, ServiceError
from ursa.video.captions import clean_caption

KEY_VARIABLE = "URSA_CAPTIONER_API_KEY"
_HTML_NAMES = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}
_CONNECT_S = 10.0
_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_REFUSED = frozenset({401, 403, 404, 405})
_TOO_MANY = 429
_MAX_ANSWER_BYTES = 1 << 20
_MAX_WAIT_S = 30
_JPEG_QUALITY = 90
_MAX_SHOWN_CHARACTERS = 120


class Captions(BaseModel):
    """The JSON object that a model answers with."""

    model_config = ConfigDict(strict=True, extra="ignore")

    short: str
    long: str


class ChatCaptioner:
    """Asks a server for the captions of one clip at a time; may be called by several threads."""

    def __init__(self, config: UrlCaptionerConfig) -> None:
        """Take address and key over; nothing is asked yet.

        Args:
            config: The captioner.
        """
        self._config = config
        self._url = f"{config.base_url.rstrip('/')}/chat/completions"
        check_key()
        self._headers = {"Content-Type": "application/json"}
        if _key():
            self._headers["Authorization"] = f"Bearer {_key()}"
        self._pool = urllib3.PoolManager(
            maxsize=config.concurrency,
            timeout=urllib3.Timeout(connect=_CONNECT_S, read=config.timeout_s),
            retries=Retry(
                total=config.max_retries,
                redirect=False,
                allowed_methods=None,
                status_forcelist=_BUSY,
                backoff_factor=0.5,
                backoff_max=_MAX_WAIT_S,
                backoff_jitter=0.5,
                retry_after_max=_MAX_WAIT_S,
                raise_on_status=False,
            ),
        )

    def __call__(self, seen: SeenClip) -> Measurement:
        """Return the captions of a clip.

        Args:
            seen: Frames of a clip; its caption is not sent.

        Raises:
            AnnotationError: If there is no answer, or none that can be used.
            ConfigError: If the server refuses the key or knows no such model.
            ServiceError: If the server cannot be reached or stays busy.
        """
        found = parse_captions(self._ask(request_body(seen.frames, self._config)))
        return Measurement(caption=found.short, caption_long=found.long)

    def _ask(self, body: Mapping[str, Any]) -> str:
        """Return the text of an answer."""
        try:
            response = self._pool.request(
                "POST",
                self._url,
                body=json.dumps(body).encode(),
                headers=self._headers,
                redirect=False,
                preload_content=False,
            )
            try:
                data = response.read(_MAX_ANSWER_BYTES + 1)
            finally:
                response.drain_conn() if response.status in _BUSY else response.close()
        except urllib3.exceptions.MaxRetryError as error:
            if isinstance(error.reason, urllib3.exceptions.ReadTimeoutError):
                raise NoAnswerError(
                    f"no answer within captioner.timeout_s {self._config.timeout_s:g} s, asked "
                    f"{1 + self._config.max_retries} times"
                ) from error
            raise ServiceError(
                f"the captioner at {self._config.base_url} cannot be reached ({error.reason}); "
                "start it or correct annotation.captioner.base_url"
            ) from error
        except urllib3.exceptions.HTTPError as error:
            raise NoAnswerError(f"the answer broke off ({type(error).__name__})") from error
        data = masked(data, _key())  # a server may repeat it, in errors above all
        self._check(response.status, data)
        return answer_text(data)

    def _check(self, status: int, data: bytes) -> None:
        if status == 200:
            if len(data) > _MAX_ANSWER_BYTES:
                raise AnnotationError(f"the answer has more than {_MAX_ANSWER_BYTES} bytes")
            return
        said = f"status {status}: {_shown(data)}"
        where = f"the captioner at {self._config.base_url}"
        if status in _REFUSED:
            raise ConfigError(
                f"{where} refuses model {self._config.model!r} ({said}); correct "
                f"annotation.captioner or set {KEY_VARIABLE}"
            )
        if status == _TOO_MANY:
            raise ServiceError(
                f"{where} stays busy ({said}); lower annotation.captioner.concurrency"
            )
        kind = NoAnswerError if status in _BUSY else AnnotationError
        raise kind(said)


def request_body(frames: np.ndarray, config: UrlCaptionerConfig) -> dict[str, Any]:
    """Return what a server is asked: the prompt and the frames as JPEG.

    Args:
        frames: RGB, shape (T, H, W, 3), uint8.
        config: Prompt, model and limits.
    """
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_jpeg(frame)}"}}
        for frame in frames
    ]
    content = [*pictures, {"type": "text", "text": config.prompt}]
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
    }
    if config.response_format == "json_object":
        body["response_format"] = {"type": "json_object"}
    elif config.response_format == "json_schema":
        schema = {
            "type": "object",
            "properties": {"short": {"type": "string"}, "long": {"type": "string"}},
            "required": ["short", "long"],
            "additionalProperties": False,
        }
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "captions", "strict": True, "schema": schema},
        }
    return body


def answer_text(data: bytes) -> str:
    """Return the text of the first choice of an answer.

    Args:
        data: The body of the answer.

    Raises:
        AnnotationError: If it is no answer of this protocol.
    """
    try:
        text = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise AnnotationError(
            f"expected an answer of the chat completions protocol, got {_shown(data)!r}"
        ) from error
    if not isinstance(text, str):
        raise AnnotationError(f"the answer has no text but {type(text).__name__}")
    return text


def parse_captions(text: str) -> Captions:
    """Read the JSON object in an answer; what stands before or after it is passed over.

    Args:
        text: The text of a model: untrusted.

    Returns:
        The captions as the model wrote them.

    Raises:
        AnnotationError: If there is no such object, or a caption is missing, empty or no text.
    """
    thought = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    start = thought.find("{")
    try:
        values, _ = json.JSONDecoder().raw_decode(thought, max(start, 0))
        found = Captions.model_validate(values)
    except (ValueError, RecursionError) as error:
        what = "texts in it" if isinstance(error, ValidationError) else "JSON"
        raise AnnotationError(
            f'expected {{"short": "...", "long": "..."}}, found no such {what}: {_shown(text)!r}; '
            "if it is cut off, raise captioner.max_tokens"
        ) from error
    return found


def masked(data: bytes, key: str) -> bytes:
    """Return a text without a key, also where it is escaped as in JSON, URLs or HTML, or twice so.

    Args:
        data: Any text, from anybody.
        key: Printable ASCII text; an empty one is nowhere.
    """
    return _key_pattern(key).sub(b"***", data) if key else data


@functools.lru_cache(maxsize=1)
def _key_pattern(key: str) -> re.Pattern[bytes]:
    """Return a pattern of a key in which each character may be written in any way.

    Repetitions are bounded, so that no answer takes long to search.
    """
    characters = []
    for character in key:
        code = ord(character)
        forms = [
            rf"\\{{1,8}}u00{code:02x}",
            rf"%(?:25){{0,3}}{code:02x}",
            rf"&(?:amp;){{0,3}}#0{{0,5}}{code};",
            rf"&(?:amp;){{0,3}}#x0{{0,5}}{code:x};",
            *([rf"&(?:amp;){{0,3}}{_HTML_NAMES[character]};"] if character in _HTML_NAMES else []),
            *([r"\+"] if character == " " else []),
            rf"\\{{0,8}}{re.escape(character)}",  # JSON in JSON has several backslashes
        ]
        characters.append(f"(?:{'|'.join(forms)})")
    return re.compile("".join(characters).encode(), re.IGNORECASE)


def check_key() -> None:
    """Refuse a key that cannot be sent; none is fine, as many servers want none.

    Raises:
        ConfigError: If it is no printable ASCII text; does not show it.
    """
    key = _key()
    if not (key.isascii() and (key.isprintable() or not key)):
        raise ConfigError(f"the value of {KEY_VARIABLE} must be printable ASCII text")


def _key() -> str:
    return os.environ.get(KEY_VARIABLE, "").strip()


def _shown(said: str | bytes) -> str:
    text = said if isinstance(said, str) else said.decode("utf-8", "replace")
    return clean_caption(text)[:_MAX_SHOWN_CHARACTERS]


def _jpeg(frame: np.ndarray) -> str:
    _, data = cv2.imencode(
        ".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    )
    return base64.b64encode(data.tobytes()).decode("ascii")
