"""What is published: one version, archives that hold what is listed, workflows that call what the Makefile has."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib
import yaml

import pad_vllm
from pad_vllm.cli import main
from release import contents

ROOT = Path(__file__).parents[2]
BUILT = ("pad_vllm", "kernels", "benchmarks", "*.toml", "*.in", "*.py", "*.md", "*.cff", "LICENSE")
"""What archives are built from."""
BUILD = (
    "from setuptools import build_meta; print(build_meta.build_sdist('dist')); print(build_meta.build_wheel('dist'))"
)
LISTED = tomllib.loads(contents.LIST.read_text())


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> list[Path]:
    """Source distribution and wheel, built beside the repository and not in it."""
    folder = tmp_path_factory.mktemp("release")
    for pattern in BUILT:
        for path in ROOT.glob(pattern):
            ignore = shutil.ignore_patterns("__pycache__", "results")
            (shutil.copytree if path.is_dir() else shutil.copy)(
                path, folder / path.name, **({"ignore": ignore} if path.is_dir() else {})
            )
    command = [sys.executable, "-c", BUILD]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return [folder / "dist" / line for line in done.stdout.splitlines() if line.startswith("pad_vllm-")]


def test_archives_hold_what_is_listed(archives):
    assert sorted(archive.suffix for archive in archives) == [".gz", ".whl"]
    assert [fault for archive in archives for fault in contents.faults(archive, LISTED)] == []


def test_what_does_not_belong_is_named(archives, tmp_path):
    """A test, the synthetic world and an adapter; a module that is missing; a wheel that is too large."""
    wheel = next(archive for archive in archives if archive.suffix == ".whl")
    strangers = ["tests/oracle.py", "pad_vllm/synthetic/world.py", "pad_vllm/demo/adapter/adapter_model.safetensors"]
    changed = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as there, zipfile.ZipFile(changed, "w") as other:
        for name in there.namelist():
            if name not in ("pad_vllm/kernels/fused.py", "pad_vllm/py.typed"):
                other.writestr(name, there.read(name))
        for name in strangers:
            other.writestr(name, "")
    changed_list = LISTED | {"pad_vllm-*.whl": LISTED["pad_vllm-*.whl"] | {"max_bytes": 1000}}
    found = [fault.removeprefix(f"{wheel.name}: ") for fault in contents.faults(changed, changed_list)]
    assert {f"{name} does not belong in it" for name in strangers} < set(found)
    assert {"pad_vllm/kernels/fused.py is missing", "pad_vllm/py.typed is missing"} < set(found)
    assert any(fault.endswith("and at most 1,000 are allowed") for fault in found)
    assert len(found) == len(strangers) + 2 + 1 + 1  # and py.typed's line names nothing


def test_one_version(archives, capsys):
    version = pad_vllm.__version__
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"{version}\n"
    assert {archive.name for archive in archives} == {
        f"pad_vllm-{version}.tar.gz",
        f"pad_vllm-{version}-py3-none-any.whl",
    }
    newest = re.findall(
        r"^## \[(\d[\w.]*)\] - (not yet tagged|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert newest[0][0] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_call_the_makefile(path):
    """Nothing but a target of it, so that what they do can be done anywhere; actionlint reads the rest."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    jobs = yaml.safe_load(path.read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert runs
    assert {run.partition(" ")[0] for run in runs} == {"make"}
    assert {run.partition(" ")[2] for run in runs} <= targets


def test_issues_bring_what_check_prints():
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    labels = [
        [field["attributes"].get("label") for field in yaml.safe_load(form.read_text())["body"]] for form in forms
    ]
    assert len(forms) == 3
    assert all("What `pad-vllm check` prints" in of_form for of_form in labels)
