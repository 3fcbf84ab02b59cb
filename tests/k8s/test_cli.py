"""`shoal k8s` as a command: what it prints, its status, what it imports."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from typer.testing import CliRunner

from cluster.deploy.cli import k8s_app
from cluster.deploy.config import preset_config
from cluster.deploy.manifest import load
from cluster.deploy.render import render
from tests.k8s.shoal_cli import Shoal

if TYPE_CHECKING:
    from tests.k8s.api_server.server import SimEnv

COMMANDS = ("render", "check", "diff", "apply", "status", "scale", "logs", "forward", "down")


@pytest.fixture
def deploy_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "deploy.yaml"
    path.write_text("preset: cpu-dev\n")
    return path


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(k8s_app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


class TestHelp:
    def test_lists_all_commands(self) -> None:
        code, out, _ = run("--help")
        firsts = [line.split()[1] for line in out.splitlines() if len(line.split()) > 1]
        assert (code, [word for word in firsts if word in COMMANDS]) == (0, list(COMMANDS))

    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_each_command(self, command: str) -> None:
        code, out, _ = run(command, "--help")
        assert (code, "--config" in out) == (0, True)

    def test_an_unknown_command(self) -> None:
        code, _, err = run("deploy")
        assert (code, "No such command 'deploy'" in err) == (2, True)

    def test_loads_neither_the_kubernetes_client_nor_ray(self) -> None:
        script = (
            "import sys\n"
            "from typer.testing import CliRunner\n"
            "from cluster.deploy.cli import k8s_app\n"
            "assert 'cluster.deploy.apply' not in sys.modules\n"
            "assert CliRunner().invoke(k8s_app, ['apply', '--help']).exit_code == 0\n"
            "heavy = {'kubernetes', 'kubernetes_validate', 'ray', 'torch'}\n"
            "print(*sorted(heavy & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


class TestRender:
    def test_prints_what_render_makes(self, deploy_yaml: Path) -> None:
        code, out, _ = run("render", "-c", deploy_yaml)
        assert code == 0
        assert load(out) == render(preset_config("cpu-dev"))

    def test_a_file_for_each_object(self, deploy_yaml: Path, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        assert run("render", "-c", deploy_yaml, "-o", folder)[0] == 0
        manifests = render(preset_config("cpu-dev"))
        assert len(list(folder.iterdir())) == len(manifests)
        text = (folder / "rayservice-shoal.yaml").read_text()
        assert load(text) == [each for each in manifests if each["kind"] == "RayService"]

    def test_a_folder_that_cannot_be_written(self, deploy_yaml: Path) -> None:
        code, _, err = run("render", "-c", deploy_yaml, "-o", deploy_yaml / "out")
        assert (code, "name a folder to write to" in err) == (2, True)


class TestErrors:
    def test_no_configuration(self, tmp_path: Path) -> None:
        code, _, err = run("render", "-c", tmp_path / "absent.yaml")
        assert (code, len(err.splitlines())) == (2, 1)
        assert "absent.yaml" in err

    def test_a_setting_that_does_not_exist(self, deploy_yaml: Path) -> None:
        deploy_yaml.write_text("preset: cpu-dev\nimagee: x\n")
        code, _, err = run("render", "-c", deploy_yaml)
        assert (code, "imagee" in err) == (2, True)

    def test_no_kubeconfig(self, deploy_yaml: Path, tmp_path: Path) -> None:
        code, _, err = run("status", "-c", deploy_yaml, "--kubeconfig", tmp_path / "absent")
        assert (code, "check --kubeconfig" in err) == (2, True)

    def test_an_unknown_context(self, deploy_yaml: Path, tmp_path: Path) -> None:
        path = tmp_path / "config"
        cluster = {"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}
        context = {"name": "one", "context": {"cluster": "c", "user": "u"}}
        user = {"name": "u", "user": {"token": "t"}}
        config = {"clusters": [cluster], "contexts": [context], "users": [user]}
        path.write_text(yaml.safe_dump({**config, "current-context": "one"}))
        options = ("-c", deploy_yaml, "--kubeconfig", path)
        code, _, err = run("status", *options, "--context", "two")
        assert (code, "two" in err and "--context" in err) == (2, True)
        code, _, err = run("status", *options)
        assert (code, "Connection refused" in err) == (3, True)

    def test_the_client_is_not_installed(
        self, deploy_yaml: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "kubernetes.client", None)
        code, _, err = run("status", "-c", deploy_yaml)
        assert (code, "pip install 'shoal-serve[k8s]'" in err) == (2, True)


class TestCheck:
    def test_presets_are_fine(self, deploy_yaml: Path) -> None:
        for preset in ("cpu-dev", "gpu-small", "gpu-large"):
            deploy_yaml.write_text(f"preset: {preset}\n")
            code, out, err = run("check", "-c", deploy_yaml)
            assert (code, out, "to exist" in err) == (0, "", False)  # apply makes its Secrets

    def test_a_mistake_is_told_with_file_path_and_fix(
        self, deploy_yaml: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "out"
        run("render", "-c", deploy_yaml, "-o", folder)
        path = folder / "rayservice-shoal.yaml"
        path.write_text(path.read_text().replace("rayVersion:", "rayVersoin:"))
        code, out, _ = run("check", folder)
        assert code == 1
        assert "rayservice-shoal.yaml" in out and "rayVersoin" in out and "rayVersion?" in out

    def test_secrets_that_have_to_exist_are_noted(self, deploy_yaml: Path, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        run("render", "-c", deploy_yaml, "-o", folder)
        code, _, err = run("check", folder)
        assert code == 0
        assert "note: " in err and "Secret shoal-ray-token is not among these objects" in err
        deploy_yaml.write_text("preset: cpu-dev\nimage_pull_secrets: [registry]\n")
        _, _, err = run("check", "-c", deploy_yaml)
        assert "Secret registry is not among" in err and "shoal-ray-token" not in err

    def test_schemas_of_another_version(self, deploy_yaml: Path) -> None:
        assert run("check", "-c", deploy_yaml, "--kubernetes-version", "1.30")[0] == 0
        code, _, err = run("check", "-c", deploy_yaml, "--kubernetes-version", "1.2")
        assert (code, "1.2" in err) == (2, True)

    def test_nothing_given(self) -> None:
        code, _, err = run("check")
        assert (code, "--config" in err) == (2, True)


@pytest.mark.k8s
class TestCtrlC:
    @pytest.fixture
    def shoal(self, kube: SimEnv, namespace: str, tmp_path: Path) -> Shoal:
        shoal = Shoal(kube, namespace, tmp_path)
        assert shoal("apply", "--no-wait").exit_code == 0
        return shoal

    @contextmanager
    def running(self, shoal: Shoal, *args: str) -> Iterator[subprocess.Popen[str]]:
        script = (  # a background process of a shell starts deaf to SIGINT
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from cluster.deploy.cli import k8s_app; k8s_app()"
        )
        options = ["--config", shoal.path, "--kubeconfig", shoal.kube.cluster("admin")]
        command = [sys.executable, "-c", script, *args, *map(str, options)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    @pytest.mark.parametrize(
        ("args", "first_line"),
        [
            (("status", "--watch"), "RayService/shoal: waiting, "),
            (("forward", "--http=0", "--grpc=0", "--dashboard=0"), "http://127.0.0.1:"),
        ],
        ids=["status", "forward"],
    )
    def test_ends_the_command_without_a_traceback(
        self, shoal: Shoal, args: tuple[str, ...], first_line: str
    ) -> None:
        with self.running(shoal, *args) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(first_line)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=300)
            assert (process.returncode, err) == (130, "")
