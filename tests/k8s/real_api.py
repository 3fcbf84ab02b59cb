"""The fixture `kube` on a real kube-apiserver with its etcd: binaries named by the environment.

KUBE_APISERVER=/path/to/kube-apiserver, and ETCD=/path/to/etcd if it is not on the PATH. There is no
kubelet, scheduler or controller: the stand-in for KubeRay does their part.
"""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from cluster.launcher import free_port
from tests.k8s.api_server.access import ALMIGHTY, USERS, token_of
from tests.k8s.api_server.kubeconfig import write_kubeconfig

VARIABLE = "KUBE_APISERVER"
SHARED_MEMORY = Path("/dev/shm")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.2
KEY_BITS = "2048"


class RealEnv:
    """etcd and kube-apiserver of our own on loopback; the same interface as `SimEnv`."""

    is_simulated = False

    def __init__(self, apiserver: str) -> None:
        etcd = os.environ.get("ETCD") or shutil.which("etcd")
        if etcd is None:
            raise RuntimeError(f"{VARIABLE} is set, but there is no etcd: name one with ETCD")
        self._apiserver, self._etcd = apiserver, etcd
        fast = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-kube-", dir=fast))
        self._port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.minor = 0

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    def cluster(self, user: str = "admin") -> Path:
        """The kubeconfig of `admin`, `operator` or `deployer`."""
        return write_kubeconfig(self._folder, self.url, user, self._authority)

    @property
    def _authority(self) -> Path:
        """Written by the server: its own certificate and who signed it."""
        return self._folder / "certificates" / "apiserver.crt"

    def __enter__(self) -> RealEnv:
        try:
            self._start_etcd_and_server()
            self._wait("/readyz")
            self._wait("/openapi/v2")  # apply needs it; ready a moment later
            version = json.loads(self._read("/version"))
            self.minor = int(version["minor"].rstrip("+"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start_etcd_and_server(self) -> None:
        clients, peers = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self._start(
            self._etcd,
            f"--data-dir={self._folder / 'etcd'}",
            f"--listen-client-urls={clients}",
            f"--advertise-client-urls={clients}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
        )
        key = self._folder / "service-accounts.key"
        subprocess.run(
            ["openssl", "genrsa", "-out", key, KEY_BITS], check=True, capture_output=True
        )
        self._start(
            self._apiserver,
            f"--etcd-servers={clients}",
            f"--secure-port={self._port}",
            "--bind-address=127.0.0.1",
            f"--cert-dir={self._folder / 'certificates'}",
            "--service-cluster-ip-range=10.0.0.0/16",
            "--authorization-mode=RBAC",
            f"--token-auth-file={self._write_tokens()}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--disable-admission-plugins=ServiceAccount",
            "--enable-admission-plugins=Priority",
        )

    def _write_tokens(self) -> Path:
        path = self._folder / "tokens.csv"
        groups = {user: "system:masters" if user in ALMIGHTY else "" for user in USERS}
        path.write_text("".join(f"{token_of(u)},{u},{u},{groups[u]}\n" for u in USERS))
        return path

    def _start(self, *command: str) -> None:
        with self._log(command[0]).open("wb") as log:
            process = subprocess.Popen(
                command, cwd=self._folder, stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append(process)

    def _log(self, binary: str) -> Path:
        return self._folder / f"{Path(binary).name}.log"

    def _wait(self, path: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self._read(path)
                return
            except OSError as error:
                is_dead = any(process.poll() is not None for process in self._processes)
                if is_dead or time.monotonic() > deadline:
                    text = self._log(self._apiserver).read_text()[-3000:]
                    raise RuntimeError(f"kube-apiserver did not start: {text}") from error
            time.sleep(POLL_S)

    def _read(self, path: str) -> bytes:
        context = ssl.create_default_context(cafile=self._authority)
        headers = {"Authorization": f"Bearer {token_of('admin')}"}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, context=context, timeout=30) as response:
            content: bytes = response.read()
            return content
