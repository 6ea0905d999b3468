"""The services of infra/compose/compose.yaml as plain processes of this machine.

Commands, variables and secrets are those of the file; only addresses, ports and folders become
others. So what the file says is what is tested, although no container runs.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.running_services import free_port

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "infra" / "compose"
ENTRYPOINT = ROOT / "infra" / "image" / "entrypoint.sh"
PORTS = {"postgres": 5432, "s3": 8333, "prefect-server": 4200, "mlflow": 5000, "ray-head": 6379}
DASHBOARD = 8265


def load_compose() -> dict[str, Any]:
    """Return the compose file with the defaults of its variables."""
    text = (COMPOSE / "compose.yaml").read_text()
    return dict(yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)))


def postgres_binaries() -> Path | None:
    """Return the folder of the programs of a PostgreSQL server."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def postgres_account() -> dict[str, Any]:
    """Return who runs PostgreSQL, which refuses to be root."""
    if os.geteuid() != 0:
        return {}
    return {"user": "nobody", "group": "nogroup", "extra_groups": []}


@functools.cache
def has_namespaces() -> bool:
    """Whether a process may be given a view of the file system of its own."""
    command = ["unshare", "--mount", "mount", "-o", "remount,ro,bind", "/"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def read_only(command: list[str], folder: Path) -> list[str]:
    """Return a command that may write to nothing but a folder, as in a container."""
    if not has_namespaces():
        return command
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind / && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(folder), *command]


class Stack:
    """The services of a folder of their own."""

    def __init__(self) -> None:
        self.compose = load_compose()
        # short, as the names of sockets below it may not be long
        self.folder = Path(tempfile.mkdtemp(prefix="ursa-"))
        self.folder.chmod(0o755)
        self.secrets = self.folder / "secrets"
        subprocess.run([COMPOSE / "secrets.sh", self.secrets], check=True)
        # whoever runs the services must get at them; on a host Docker does that
        self.secrets.chmod(0o755)
        self.ports = {number: free_port() for number in (*PORTS.values(), DASHBOARD)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("logs", "tmp", "home"):
            self.make_folder(name)

    def make_folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def address(self, service: str) -> str:
        return f"http://127.0.0.1:{self.port(service)}"

    def port(self, service: str) -> int:
        return self.ports[DASHBOARD if service == "dashboard" else PORTS[service]]

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text()

    def here(self, text: str) -> str:
        """Replace what is true in a container by what is true here."""
        text = re.sub(rf"\b({'|'.join(PORTS)})(?=:\d)", "127.0.0.1", text)
        text = text.replace("0.0.0.0", "127.0.0.1").replace("/app/", f"{ROOT}/")
        text = text.replace("/run/secrets", str(self.secrets))
        numbers = "|".join(str(number) for number in self.ports)
        return re.sub(
            rf"(?<![\w.])({numbers})(?!\w)", lambda found: str(self.ports[int(found[1])]), text
        )

    def environment(self, service: str) -> dict[str, str]:
        """Return the variables of a service, as the image and the file set them."""
        binaries = postgres_binaries()
        inherited = ("LANG", "OMP_NUM_THREADS", "SSL_CERT_FILE")
        given = self.compose["services"][service].get("environment") or {}
        values = {key: self.here("" if v is None else str(v)) for key, v in given.items()}
        for key in ("PGHOST", "PREFECT_SERVER_DATABASE_HOST"):
            if key in values:
                values[key] = "127.0.0.1"
        home = self.make_folder(f"home/{service}")
        return {
            **{key: os.environ[key] for key in inherited if key in os.environ},
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), str(binaries or ""), os.defpath]
            ),
            "HOME": str(home),
            "LOGNAME": "ursa",
            "MPLCONFIGDIR": str(home / "matplotlib"),
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "prefect-ui"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "RAY_TMPDIR": str(self.folder / "tmp"),
            "TMPDIR": str(self.folder / "tmp"),
            "URSA_HOME": str(ROOT),
            "URSA_SECRETS_DIR": str(self.mounted(service)),
            **values,
        }

    def mounted(self, service: str) -> Path:
        """Return a folder with the secrets that the service is given, under the names it sees."""
        folder = self.folder / "mounted" / service
        folder.mkdir(parents=True, exist_ok=True)
        for item in self.compose["services"][service].get("secrets", []):
            source, target = (item, item) if isinstance(item, str) else item.values()
            shutil.copy(self.secrets / source, folder / target)
        return folder

    def command(self, service: str) -> list[str]:
        given = [self.here(str(item)) for item in self.compose["services"][service]["command"]]
        return [str(ENTRYPOINT), *given]

    def log(self, service: str) -> Path:
        return self.folder / "logs" / f"{service}.txt"

    def start(self, service: str, command: list[str] | None = None, **options: Any) -> None:
        with self.log(service).open("ab") as output:
            self.processes[service] = subprocess.Popen(
                command or read_only(self.command(service), self.folder),
                cwd=ROOT,
                env=self.environment(service),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )

    def run(self, service: str, *command: str, limit_s: float = 300) -> str:
        """Run a command with the variables and secrets of a service; return what it writes."""
        done = subprocess.run(
            read_only([str(ENTRYPOINT), *command], self.folder),
            cwd=ROOT,
            env={**self.environment(service), "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        return done.stdout + done.stderr

    def start_postgres(self) -> None:
        """Start PostgreSQL as its image would: superuser, password, script of the first start."""
        binaries = postgres_binaries()
        assert binaries is not None
        data = self.make_folder("postgres")
        account = postgres_account()
        if account:
            shutil.chown(data, account["user"], account["group"])
        options = self.compose["services"]["postgres"]["environment"]["POSTGRES_INITDB_ARGS"]
        password = f"--pwfile={self.secrets / 'postgres-password'}"
        done = subprocess.run(
            [binaries / "initdb", "-D", data, *options.split(), "--username=postgres", password],
            capture_output=True,
            text=True,
            **account,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        listen = ["-h", "127.0.0.1", "-p", str(self.port("postgres")), "-k", str(data)]
        self.start("postgres", [str(binaries / "postgres"), "-D", str(data), *listen], **account)
        self.wait("postgres", lambda: not self.psql("SELECT 1").returncode)
        done = self.psql(script=COMPOSE / "databases.sh")
        assert done.returncode == 0, done.stderr

    def psql(
        self, statement: str = "", script: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a statement or a script as the superuser."""
        command = [str(script)] if script else ["psql", "-U", "postgres", "-c", statement]
        environment = {
            **self.environment("postgres"),
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port("postgres")),
            "PGPASSWORD": self.secret("postgres-password"),
        }
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    def start_s3(self) -> None:
        """Start moto in the place of the store of the file, which is no Python program."""
        listen = ["-H", "127.0.0.1", "-p", str(self.port("s3"))]
        self.start("s3", [sys.executable, "-m", "moto.server", *listen])

    def wait(self, service: str, ready: Callable[[], bool], limit_s: float = 180) -> None:
        deadline = time.monotonic() + limit_s
        while not ready():
            text = self.log(service).read_text(errors="replace")[-4000:]
            assert self.processes[service].poll() is None, f"{service} has ended:\n{text}"
            assert time.monotonic() < deadline, f"{service} is not ready:\n{text}"
            time.sleep(0.5)

    def family(self, service: str) -> list[psutil.Process]:
        """Return the process of a service and everything that it has started."""
        try:
            leader = psutil.Process(self.processes[service].pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.Error:
            return []

    def kill(self, service: str) -> None:
        """End a service as a lost machine does."""
        for process in self.family(service):
            try:
                process.kill()
            except psutil.Error:
                continue
        self.processes.pop(service).wait(20)

    def close(self) -> None:
        """Stop all services and remove their folder."""
        for service in reversed(list(self.processes)):
            family = self.family(service)
            for process in family:
                try:
                    process.send_signal(signal.SIGINT if service == "postgres" else signal.SIGTERM)
                except psutil.Error:
                    continue
            _, left = psutil.wait_procs(family, timeout=15)
            for process in left:
                process.kill()
            self.processes.pop(service).wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)
