"""Texts of others (captions, file names, prompts, reasons) where they are shown.

A terminal, a log and Markdown each take some characters for commands: a caption may move the
cursor, begin a line that looks like one of ours, turn the direction of what follows, or become a
link. Here they stay texts. HTML is escaped by `ursa.inspection.page.escape`.
"""

import logging
import re
import traceback
from urllib.parse import unquote

# control characters (C0, DEL, C1), marks that turn the direction or that nobody sees (those that
# join letters stay), separators of lines and paragraphs, what no text is (surrogates, tags,
# annotations, byte order marks)
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
# addresses become links without any mark
_MARKDOWN = re.compile(r"([\\`\[\]<>|@]|:(?=//)|(?<=www)\.)", re.IGNORECASE)
_ODD_PORT = re.compile(r":(?!\d*$)[^\]]*$")
_MAX_NAME_BYTES = 255
_AFTER_SCHEME = re.compile(r"(?<=://)[^\s'\"<>]+")
_SECRET_NAMES = re.compile(
    r"(.*[-_])?(sig|signature|token|secret|credentials?|passw(or)?d|pwd|jwt|hmac|hdnts|hdnea|"
    r"authorization|auth[-_]?key|(api|access|account|private|rl|resource|secret)[-_]?key|"
    r"awsaccesskeyid|access_key_id|passphrase|bearer)"
    r"|(access|id|auth|security|session|refresh)token",
    re.IGNORECASE,
)
_OFTEN_SECRET = re.compile(r"auth|code|key|md5|pass|pw|session|sign|verify", re.IGNORECASE)
"""Names that have other uses: what they hold is a secret if it is long and looks drawn."""
_DRAWN = re.compile(r"[\w+/=~-]*\d[\w+/=~-]*")
_LEAST_DRAWN = 8
_OWN_LOGGERS = re.compile(
    r"(ursa|tasks|flows|prefect\.(flow|task)_(runs|engine)|prefect\.engine)\b"
)


def printable(text: object) -> str:
    r"""Return a text in one line that says nothing to a terminal.

    Args:
        text: Anything.

    Returns:
        The text with control characters, line breaks and marks of direction as Python writes them,
        such as `\n`, `\x1b` and `\u202e`.
    """
    return _UNPRINTABLE.sub(_written, str(text))


def _written(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def is_file_name(name: object) -> bool:
    """Whether a text can be the name of a file in a folder, and of none elsewhere.

    Args:
        name: Anything; `/` and the backslash of Windows are no part of a name.
    """
    if not isinstance(name, str) or re.search(r"[/\\\0]", name):
        return False
    return name not in {"", ".", ".."} and len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES


def markdown_text(text: object) -> str:
    """Return a text that stays a text in Markdown, in a cell of a table too.

    Args:
        text: Anything.
    """
    return _MARKDOWN.sub(r"\\\1", printable(text))


def markdown_code(text: object) -> str:
    """Return a text as code in Markdown, in a cell of a table.

    Args:
        text: Anything; nothing gives nothing.
    """
    plain = printable(text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    space = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{space}{plain}{space}{fence}" if plain.strip() else ""


def without_user(text: str) -> str:
    """Return a text in which addresses name no user and no password.

    Args:
        text: An address, or an error that names some.
    """
    return _AFTER_SCHEME.sub(_hide_user, text)


def _hide_user(found: re.Match[str]) -> str:
    rest = found[0]
    # a password may hold what ends a host or itself: rather too much is hidden
    return f"***@{rest.rpartition('@')[2]}" if _names_user(rest) else rest


def _names_user(rest: str) -> bool:
    """Whether an address names a user, from what comes after its scheme."""
    host = re.split("[/?#]", rest)[0]
    if host.startswith("arn:") and "@" not in host:  # of an access point, in place of a bucket
        return False
    # a slash in a password ends what is read as the host
    return "@" in host or ("@" in rest and _ODD_PORT.search(host) is not None)


def secret_of_address(address: str) -> str | None:
    """Return what of an address looks like a secret, in words that do not show it; None if nothing.

    Names that signed addresses use are known; a service with names of its own is not recognised.

    Args:
        address: Any URI, also one that is none.
    """
    scheme, _, rest = address.partition("://")
    if _names_user(rest):
        return "a user name or password"
    if scheme.lower() in {"s3", "file"}:  # there a question mark is part of the name
        return None
    for item in re.split("[?&;#]", rest)[1:]:
        name, _, value = (unquote(part) for part in item.partition("="))
        looks_drawn = len(value) >= _LEAST_DRAWN and _DRAWN.fullmatch(value)
        if value and (
            _SECRET_NAMES.fullmatch(name) or (_OFTEN_SECRET.fullmatch(name) and looks_drawn)
        ):
            return f"{printable(name)}=..."
    return None


def host_of(address: str) -> str:
    """Return the host of an address, to name it without what it may hold of a secret.

    Args:
        address: Any URI.

    Returns:
        Host and port; `***` where a password may have a part in what looks like them.
    """
    rest = address.partition("://")[2]
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    if _names_user(rest):
        return "***" if "@" in rest[len(host) :] else host.rpartition("@")[2]
    return host


class PrintableRecords(logging.Filter):
    """Makes the lines of a handler that come from this program printable, and hides passwords.

    A line of a log is then one line, whatever was in a file name; only the traceback of an error
    that nobody expected has several.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite a record in place; all are let through.

        Args:
            record: The record.
        """
        if not _OWN_LOGGERS.match(record.name):
            return True
        record.msg, record.args = without_user(printable(record.getMessage())), ()
        if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
            lines = "".join(traceback.format_exception(record.exc_info[1])).splitlines()
            record.exc_text = without_user("\n".join(printable(line) for line in lines))
        return True
