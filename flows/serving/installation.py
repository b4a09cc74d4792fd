"""Finds the inference server on this machine and says what is missing before it hangs or fails for want of it."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.config import RunError

PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


class ServerError(RunError):
    """The inference server is missing, cannot start, stopped, or refused a model."""


@dataclass(frozen=True)
class Installation:
    """How to start the inference server."""

    binary: Path
    arguments: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class _EmbeddedFiles:
    """Where the `nvidia-pytriton` wheel and the interpreter keep what the embedded server is made of."""

    server_dir: Path
    libraries_dir: Path
    stub: Path
    environment: Mapping[str, str]


def check_server_available() -> None:
    """Raises `ServerError`, naming the remedy, unless an inference server can be started here. Takes milliseconds."""
    if shutil.which("tritonserver") is None:
        _find_embedded()


def prepare_installation(runtime_dir: Path) -> Installation:
    """How to start the server: `tritonserver` on PATH, else the binary inside the `nvidia-pytriton` wheel.

    Args:
        runtime_dir: Empty directory that has to live as long as the server.

    Raises:
        ServerError: There is neither, or what the embedded server needs is missing.
    """
    if binary := shutil.which("tritonserver"):
        return Installation(Path(binary), (), dict(os.environ))
    embedded = _find_embedded()
    # The wheel's backend folder lacks the stub. A copy in the wheel's layout keeps its $ORIGIN paths valid.
    root = runtime_dir / "pytriton" / "tritonserver"
    backend = root / "backends" / "python"
    backend.mkdir(parents=True)
    (root / "repoagents").mkdir()
    (runtime_dir / "nvidia_pytriton.libs").symlink_to(embedded.libraries_dir)
    (root / "bin").symlink_to(embedded.server_dir / "bin")
    shutil.copytree(embedded.server_dir / "caches", root / "caches")
    shutil.copytree(embedded.server_dir / "backends" / "python", backend, dirs_exist_ok=True)
    Path(shutil.copy(embedded.stub, backend)).chmod(0o755)
    arguments = (
        f"--backend-directory={root / 'backends'}",
        f"--cache-directory={root / 'caches'}",
        f"--repoagent-directory={root / 'repoagents'}",
        "--model-config-name=embedded",  # it brings the python backend only
    )
    return Installation(root / "bin" / "tritonserver", arguments, embedded.environment)


def _find_embedded() -> _EmbeddedFiles:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(
            "No inference server is installed: there is no `tritonserver` on PATH and no nvidia-pytriton in this "
            'Python environment. Install the embedded server with: pip install "millrace[embedded]"'
        )
    package = Path(spec.origin).parent
    server_dir = package / "tritonserver"
    _check_numpy(importlib.metadata.version("numpy"))
    stub = server_dir / "python_backend_stubs" / PYTHON_VERSION / "triton_python_backend_stub"
    if not stub.exists():
        known = sorted(path.name for path in stub.parents[1].iterdir())
        raise ServerError(
            f"The embedded inference server does not know Python {PYTHON_VERSION}; it knows {', '.join(known)}. "
            "Make the environment anew with Python 3.11."
        )
    environment = _environment()
    _check_shared_libraries(stub, environment)
    return _EmbeddedFiles(server_dir, package.parent / "nvidia_pytriton.libs", stub, environment)


def _check_numpy(version: str) -> None:
    if int(version.split(".")[0]) >= 2:
        raise ServerError(
            f"numpy {version} is installed, and the embedded inference server (2.51) reads its arrays as empty: it "
            'needs numpy below 2. Install it with: pip install "numpy<2"'
        )


def _environment() -> dict[str, str]:
    """The environment in which the server's Python models see the packages of this one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # The server embeds the first python3 on PATH, and loads libpython by name.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    for directory in (Path(sys.base_prefix) / "lib", Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")):
        if glob.glob(str(directory / f"libpython{PYTHON_VERSION}.so*")):
            before = environment.get("LD_LIBRARY_PATH")
            environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(directory)] + ([before] if before else []))
            break
    return environment


def _check_shared_libraries(binary: Path, environment: Mapping[str, str]) -> None:
    listing = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, env=environment, check=False).stdout
    missing = [line.split()[0] for line in listing.splitlines() if "not found" in line]
    if missing:  # without this check the server says "loading" for ever
        raise ServerError(
            f"The embedded inference server cannot load {', '.join(missing)}. On Debian and Ubuntu: "
            f"apt-get install libpython{PYTHON_VERSION}; with pyenv, build Python with --enable-shared."
        )
