"""`ursa demo`: a page in the browser to try a model."""

from ursa.cli.models import check_device, model_directory
from ursa.errors import ConfigError


def demo(*, model: str, port: int = 7860, device: str = "cpu") -> None:
    """Open a page in the browser to try a model: prompt, first frame, motion, seed, steps.

    Example: ursa demo --model models:/ursa@champion

    Args:
        model: As in `ursa generate`.
        port: Port on 127.0.0.1.
        device: Where to run, such as cpu or cuda.

    Raises:
        UrsaError: If the port is taken, or the model cannot be read.
    """
    _check_port(port)
    from ursa.demo import serve
    from ursa.generation import UrsaPipeline

    check_device(device)

    with model_directory(model) as directory:
        pipeline = UrsaPipeline.from_pretrained(directory, device=device)
    pipeline.set_progress_bar_config(disable=True)
    serve(pipeline, port=port, announce=lambda url: print(f"{url}  (Ctrl+C ends it)"))


def _check_port(port: int) -> None:
    import socket

    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port {port} cannot be opened on 127.0.0.1: {error}; give another"
        ) from error
