"""A gallery of generated clips: one HTML file in which every clip plays beside its prompt.

It holds everything itself and loads nothing. Prompts come from users: they are escaped.
"""

import base64

from ursa import storage
from ursa.errors import DataError
from ursa.inspection.page import escape
from ursa.texts import is_file_name

PROMPTS = "prompts.tsv"
MODES = {"t2v": "from noise", "i2v": "from the first frame of a real clip"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2430; background: #f6f7f9; margin: 20px; }
h1 { font-size: 20px; margin: 0 0 14px; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 14px; }
figure { margin: 0; background: #fff; border: 1px solid #e1e5ea; border-radius: 8px;
  overflow: hidden; }
video, img { display: block; width: 100%; image-rendering: auto; background: #11151b; }
figcaption { padding: 8px 12px; overflow-wrap: anywhere; }
.small { color: #5a6472; font-size: 13px; }
"""
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def samples_page(samples_uri: str, title: str) -> str:
    """Return a page with the samples of an evaluation.

    Args:
        samples_uri: Folder of the samples, with their prompts.
        title: Headline, any text.

    Returns:
        A whole HTML document; the same samples give the same text.

    Raises:
        FileNotFoundError: If a sample or the list of prompts is gone.
        StorageError: If the store refuses or does not answer.
    """
    figures = sample_figures(samples_uri)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><main>{''.join(figures) or 'no samples'}</main></body>"
        "</html>\n"
    )


def sample_figures(samples_uri: str, *, max_bytes: int | None = None) -> list[str]:
    """Return each sample of an evaluation as a figure that plays, with its prompt.

    Args:
        samples_uri: Folder of the samples, with their prompts.
        max_bytes: How much of the files there may be together, bytes; the later ones are left out.

    Returns:
        HTML.

    Raises:
        DataError: If the list of prompts names what is no sample.
        FileNotFoundError: If a sample or the list of prompts is gone.
        StorageError: If the store refuses or does not answer.
    """
    text = storage.read_bytes(storage.join(samples_uri, PROMPTS)).decode("utf-8")
    rows = [line.partition("\t") for line in text.split("\n") if "\t" in line]
    figures: list[str] = []
    num_bytes = 0
    for name, _, prompt in rows:
        if not is_file_name(name):
            raise DataError(f"{samples_uri}: {name[:200]!r} is no name of a sample")
        num_bytes += storage.size_bytes(storage.join(samples_uri, f"{name}.mp4"))
        if max_bytes is not None and num_bytes > max_bytes:
            break
        figures.append(_figure(samples_uri, name, prompt))
    return figures


def _figure(samples_uri: str, name: str, prompt: str) -> str:
    data = storage.read_bytes(storage.join(samples_uri, f"{name}.mp4"))
    source = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    mode = MODES.get(name.partition("-")[0], "")
    return (
        f'<figure><video src="{source}" autoplay loop muted playsinline controls></video>'
        f'<figcaption>{escape(prompt) or "<i>no prompt</i>"}<div class="small">{escape(name)}'
        f"{', ' * bool(mode)}{escape(mode)}</div></figcaption></figure>"
    )
