"""The folder of announcements, on machines that others use too."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pad_vllm import channel
from pad_vllm.channel import ANNOUNCE_DIR, OWNER, Announcement, stats_path
from pad_vllm.personas import Personas, personas_path, show_personas
from pad_vllm.worker.board import touch_files

GUIDED = Announcement(True, head_names=("alice",))


class Owner:
    """Something that announcements live as long as."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that is named by hand."""
    monkeypatch.setenv(ANNOUNCE_DIR, str(tmp_path))
    return tmp_path


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The temporary directory, and no folder yet."""
    monkeypatch.delenv(ANNOUNCE_DIR, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o1777)
    return tmp_path


def start(code: str, root: Path, **kwargs) -> subprocess.Popen:
    """A process that tells what it is at, a line each, and goes on where it gets one."""
    head = "import os, sys\nfrom pad_vllm import channel\n"
    environment = {k: v for k, v in os.environ.items() if k != ANNOUNCE_DIR} | {"TMPDIR": str(root)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", head + code], text=True, env=environment, **pipes, **kwargs)


ANNOUNCE = """
class Engine: pass
engine = Engine()
channel.announce(channel.Announcement(True), engine)
print(os.environ[channel.ANNOUNCE_DIR], flush=True)
sys.stdin.readline()
print(len(channel.announced()), flush=True)
"""


def test_folders_of_killed_processes_are_swept(root):
    process = start(ANNOUNCE, root)
    folder = Path(process.stdout.readline().strip())
    channel._sweep(root)
    assert len(list(folder.glob("*.json"))) == 1
    process.kill()
    process.wait()
    channel._sweep(root)
    assert not folder.exists()


def test_a_folder_stays_until_the_last_who_knows_it_has_gone(root):
    """A launcher that ends early leaves its server's, and the server removes it."""
    launch = f"""
import subprocess
channel.make_folder()
print(os.environ[channel.ANNOUNCE_DIR], flush=True)
code = "import os, sys\\nfrom pad_vllm import channel\\nsys.stdin.readline()\\n" + {ANNOUNCE!r}
subprocess.Popen([sys.executable, "-c", code])
"""
    launcher = start(launch, root)
    folder = Path(launcher.stdout.readline().strip())
    launcher.wait()  # before its server has begun
    assert not folder.exists()
    launcher.stdin.write("begin\n")
    launcher.stdin.flush()
    assert launcher.stdout.readline().strip() == str(folder)
    channel._sweep(root)
    assert folder.stat().st_mode & 0o077 == 0
    launcher.stdin.write("end\n")
    launcher.stdin.close()
    assert launcher.stdout.read() == "1\n"
    for _ in range(500):
        if not folder.exists():
            break
        time.sleep(0.01)
    assert not folder.exists()


def test_a_folder_that_was_named_by_hand_stays(folder):
    for _ in range(2):
        channel.make_folder()
        owner = Owner()
        channel.announce(GUIDED, owner)
        assert len(channel.announced()) == 1
        del owner
    assert list(folder.iterdir()) == []
    channel._remove_if_left(folder)
    assert folder.is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="to be another user")
@pytest.mark.parametrize("thing", ["fifo", "link", "folder", "file"])
def test_another_users_things_are_let_be(monkeypatch, thing):
    """In the temporary directory, which everybody may write."""
    monkeypatch.delenv(ANNOUNCE_DIR, raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        root = Path(made)
        root.chmod(0o1777)
        target, theirs = root / "target", root / "pad-vllm-x"
        target.mkdir()
        (target / OWNER).touch()
        make = {
            "fifo": f"mkdir {theirs} && mkfifo {theirs}/{OWNER}",
            "folder": f"mkdir {theirs} && touch {theirs}/{OWNER}",
            "link": f"ln -s {target} {theirs}",
            "file": f"touch {theirs}",
        }[thing]
        subprocess.run(["sh", "-c", make], check=True, user=65534, group=65534, extra_groups=())
        process = start("channel.make_folder(); print(os.environ[channel.ANNOUNCE_DIR])", root)
        folder = Path(process.communicate(timeout=60)[0].strip())
        assert folder.parent == root
        assert not folder.exists()
        assert os.path.lexists(theirs)
        assert (target / OWNER).exists()


@pytest.mark.parametrize("spoil", ["folder", "file", "fifo", "link", "owner"])
def test_what_others_may_write_says_nothing(folder, monkeypatch, spoil):
    """Nor is it waited for. (An own FIFO, as others' cannot be made here without being them.)"""
    owner = Owner()
    path = channel.announce(GUIDED, owner)
    assert len(channel.announced()) == 1
    if spoil == "folder":
        folder.chmod(0o777)
    elif spoil == "file":
        path.chmod(0o666)
    elif spoil == "owner":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        elsewhere = path.rename(folder / "elsewhere")
        path.symlink_to(elsewhere) if spoil == "link" else os.mkfifo(path)
    assert channel.announced() == {}
    if spoil in ("folder", "owner"):
        words = "chmod go-w" if spoil == "folder" else "and this process is user 12345's"
        with pytest.raises(ValueError, match=f"{words}.*; set TMPDIR or {ANNOUNCE_DIR} to a folder of your own"):
            channel.announce(GUIDED, owner)
        assert channel.announce(Announcement(configured=False), owner) is None
    monkeypatch.undo()


def test_an_engine_that_lives_long_keeps_all_of_its_files_young(folder):
    """Temporary files of a certain age are tidied away."""
    owner = Owner()
    path = channel.announce(GUIDED, owner)
    channel.make_stats(path, 64)
    show_personas(path, Personas())
    (folder / OWNER).touch()
    others = folder / "others.json"
    others.touch()
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    touch_files(path)
    kept = {file.name for file in folder.iterdir() if file.stat().st_mtime > 0}
    assert kept == {path.name, stats_path(path).name, personas_path(path).name, OWNER}


@pytest.mark.parametrize("full", ["announcement", "numbers"])
def test_a_full_disk_is_named_at_the_start(root, full):
    code = """
class Engine: pass
engine = Engine()
import resource
channel.make_folder()
path = channel.announce(channel.Announcement(True), engine) if sys.argv[1:] == ["numbers"] else None
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    channel.make_stats(path, 64) if path else channel.announce(channel.Announcement(True), engine)
except ValueError as error:
    print(error)
print(sorted(os.listdir(os.environ[channel.ANNOUNCE_DIR])))
"""
    process = start(f"sys.argv[1:] = [{full!r}]\n" + code, root)
    words, left = process.communicate(timeout=60)[0].splitlines()
    assert words.startswith("pad cannot ")
    assert f"File too large; set TMPDIR or {ANNOUNCE_DIR} to a folder of your own" in words
    assert words.endswith("on a disk with free space")
    assert [name.rpartition(".")[2] for name in eval(left)] == ["json", "lock"][full == "announcement" :]
    assert list(root.iterdir()) == []


def test_where_no_folder_can_be_made_the_start_says_why(root, monkeypatch):
    assert "plugin hook" in channel.why_no_folder()
    monkeypatch.setattr(tempfile, "tempdir", str(root / "missing"))
    monkeypatch.setattr(channel, "_failure", "")
    channel.make_folder()
    assert ANNOUNCE_DIR not in os.environ
    for words in (channel.why_no_folder(), refusal()):
        assert "No such file or directory" in words
        assert f"set TMPDIR or {ANNOUNCE_DIR} to a folder of your own" in words
    assert channel.announce(Announcement(configured=False), Owner()) is None


def refusal() -> str:
    with pytest.raises(ValueError, match="pad cannot tell") as error:
        channel.announce(GUIDED, Owner())
    return str(error.value)
