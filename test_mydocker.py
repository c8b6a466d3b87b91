"""The specification of mydocker.py: what it promises, tried against the real kernel.

    sudo python3 -m pytest test_mydocker.py     everything
    python3 -m pytest -m 'not root'             what needs no root
    python3 -m pytest -m 'not slow'             the quick run
    python3 -m pytest -m faults                 an error, a signal at every call: some minutes
    MYDOCKER_MUST_WORK=1                        what the machine lacks fails, not skips
    MYDOCKER=FILE, MYDOCKER_PYTHON=FILE         the program under test, and what it is started with

The program is used as its users use it: by its command line, in a process of its own.
A test that takes `mydocker` (the host's view) or `busybox` (a --rootfs) runs twice, as
root and as an ordinary user, unless it says @root_only, @user_only or @once.  After every
test the fixture `nothing_is_left` looks for mounts, processes, cgroups, temporary files.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
PROGRAM = Path(os.environ.get("MYDOCKER", HERE / "mydocker.py")).resolve()
SOURCE = PROGRAM if PROGRAM.suffix == ".py" else HERE / "mydocker.py"  # it may be compiled
ROOTFS_SCRIPT = HERE / "busybox-rootfs.sh"
MUST_WORK = os.environ.get("MYDOCKER_MUST_WORK") == "1"
PATIENCE = float(os.environ.get("MYDOCKER_PATIENCE", "60"))  # seconds; beyond them it hangs
ORDINARY_UID = 12345  # an account that nobody has
MIB, PAGE = 1 << 20, os.sysconf("SC_PAGE_SIZE")
SH = ("sh", "-c")
LOOP = "echo ready; while :; do sleep 0.05; done"
IDLE = ("tail", "-n", "1", "-f", "/etc/hosts")  # a line, then deaf to every signal
USAGE_ERROR = 125
PYTHON = "/usr/bin/python3"  # inside the host's view
SETPRIV = shutil.which("setpriv") or "setpriv"
OWN_PYTHON = os.environ.get("MYDOCKER_PYTHON", sys.executable)  # runs mydocker.py

with warnings.catch_warnings():  # this file is all there is: no ini file registers them
    warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
    root, slow, faults = pytest.mark.root, pytest.mark.slow, pytest.mark.faults
AS_ROOT = pytest.param("root", marks=root)
root_only = pytest.mark.parametrize("account", [AS_ROOT], indirect=True)
user_only = pytest.mark.parametrize("account", ["user"], indirect=True)
once = user_only  # where root and the ordinary user go the same way


# ---- What the tests speak in ---------------------------------------------------------


def need(condition, reason):
    """Skip where the machine cannot do what the test is about; or fail there."""
    if not condition:
        (pytest.fail if MUST_WORK else pytest.skip)(f"this machine lacks: {reason}")


def wait_until(predicate, what="it", seconds=PATIENCE):
    """The first true value of `predicate()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = predicate()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s for {what}")


Result = namedtuple("Result", "status out err")  # how a run ended and what it said


def decoded(data):
    return data.decode("utf-8", "surrogateescape")


def ended(process, data=None):
    """Result of a process that is to end by itself."""
    try:
        out, err = process.communicate(data, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"{process.args} hangs; so far: {out[-2000:]} {err[-2000:]}")
    return Result(process.returncode, decoded(out or b""), decoded(err or b""))


class Running:
    """A container that runs while the test looks at it."""

    def __init__(self, process, pidfile):
        self.process = process
        self.pidfile = pidfile

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End the command, not `run`: that is to clear up as it always does."""
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(read(self.pidfile)), signal.SIGKILL)
        ended(self.process)

    @property
    def pid1(self):
        """The container's first process, as the host numbers it."""
        return int(wait_until(lambda: read(self.pidfile), "the pidfile"))

    def line(self, stream="stdout"):
        """The next line that the command prints."""
        source, line = getattr(self.process, stream), b""
        while not line.endswith(b"\n"):
            assert select.select([source], [], [], PATIENCE)[0], f"no line after {line}"
            byte = os.read(source.fileno(), 1)
            assert byte, f"end of file after {line}: {self.end()}"
            line += byte
        return decoded(line[:-1])

    def send(self, number):
        self.process.send_signal(number)

    def end(self):
        return ended(self.process)


class Terminal:
    """A terminal window, and a program in it that thinks itself at home."""

    def __init__(self, command, become, owner, **how):
        self.master, self.slave = pty.openpty()
        os.fchown(self.slave, owner, -1)  # as login(1) does
        self.size(24, 80)
        self.seen = b""
        self.before = self.attributes

        def sit_down():
            os.setsid()
            fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)
            become()

        how = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave, **how}
        self.process = subprocess.Popen(command, preexec_fn=sit_down, **how)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.slave)
        if self.master is not None:
            os.close(self.master)

    def size(self, rows, columns):
        packed = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, packed)

    def type(self, text, *expected):
        os.write(self.master, text.encode())
        for answer in expected:
            self.expect(answer)

    def expect(self, text):
        """Read until `text` is on the screen; what stands before it."""
        wanted, deadline = text.encode(), time.monotonic() + PATIENCE
        while wanted not in self.seen:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self.master], [], [], left)[0]
            assert ready, f"no {text!r} in {self.seen[-2000:]!r}"
            self.seen += os.read(self.master, 65536)
        before, _, self.seen = self.seen.partition(wanted)
        return decoded(before)

    def end(self):
        """The status of the program, and the rest of what it wrote."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            over = self.process.poll() is not None
            if select.select([self.master], [], [], 0 if over else 0.02)[0]:
                self.seen += os.read(self.master, 65536)
            elif over:
                return Result(self.process.returncode, decoded(self.seen), "")
        raise AssertionError(f"the program does not end; so far: {self.seen!r}")

    @property
    def attributes(self):
        return [*(modes := termios.tcgetattr(self.slave))[:6], modes[6][:19]]  # musl has more than the kernel


class Caller(NamedTuple):
    """An account that uses mydocker.py, a directory of its own, and the first options."""

    uid: int
    python: str
    dir: Path
    rootfs: Path
    options: tuple = ()

    def __call__(self, *words, **how):
        """Run `mydocker.py run WORDS` to its end."""
        return self.cli("run", *self.options, *words, **how)

    def out(self, *words, **how):
        """What the command printed, when all went well and mydocker said nothing."""
        result = self(*words, **how)
        assert (result.status, result.err) == (0, ""), result
        return result.out

    def cli(self, *words, data=None, **how):
        if data is not None:
            how["stdin"] = subprocess.PIPE
        return ended(self.popen(self.words(*words), **how), data)

    def under(self, around, *words, **how):
        """Run `mydocker.py run WORDS` by another program, such as strace, to its end."""
        return ended(self.popen([*around, *self.words("run", *self.options, *words)], **how))

    def start(self, *words, around=(), **how):
        """A container that runs on; its pidfile is where Running.pid1 looks."""
        pidfile = Path(tempfile.mktemp(prefix="pid", dir=str(self.dir)))
        words = self.words("run", "--pidfile", pidfile, *self.options, *words)
        return Running(self.popen([*around, *words], bufsize=0, **how), pidfile)

    def terminal(self, *words, around=(), **how):
        how = {"cwd": self.dir, "env": {**os.environ, "TERM": "xterm"}, **how}
        words = self.words("run", *self.options, *words)
        return Terminal([*around, *words], self.become, self.uid, **how)

    def words(self, *words):
        return [self.python, str(PROGRAM), *map(str, words)]

    def popen(self, command, **how):
        """Start a program as that account. A preexec_fn, with which fork() has to copy pytest, costs time."""
        pipe = subprocess.PIPE
        if "preexec_fn" not in how and os.geteuid() != self.uid:
            command = [SETPRIV, f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", *command]
        how = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, "cwd": self.dir, **how}
        return subprocess.Popen(command, **how)

    def become(self):
        """In the child: be that account from here on."""
        if os.geteuid() != self.uid:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)

    def path(self, name, text=None, mode=None):
        """A file of the caller (a directory without `text`) in its own directory."""
        path = self.dir / name
        if text is None:
            path.mkdir(parents=True)
        else:
            path.write_text(text)
        os.chown(str(path), self.uid, self.uid)
        if mode is not None:
            path.chmod(mode)
        return path


def refusal(result, status=USAGE_ERROR):
    """What mydocker said when it would not run the command: one line, and a remedy."""
    assert (result.status, result.out) == (status, ""), result
    assert re.fullmatch("mydocker: .*\n(  hint: .*\n)?", result.err), result
    return result.err


def injecting(call, what):
    """The beginning of a command line in which strace has a system call fail, or take long."""
    need(shutil.which("strace"), "strace")
    return ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{what}"]


def in_shell(script, place="sh", exec_by="exec"):
    """The beginning of one in which a shell does something before; `place` is its $0."""
    return ["sh", "-c", f'{script} && {exec_by} "$@"', str(place)]


def in_own_mounts(script, place="sh", exec_by="exec"):
    """The same, where the mounts are changed for this command alone."""
    return ["unshare", "--mount", *in_shell(script, place, exec_by)]


@contextlib.contextmanager
def mounted(path, kind="tmpfs", bind=None):
    """A filesystem of the host on a directory, or what another path shows."""
    if os.geteuid():
        pytest.skip("only root can mount the example")
    what = ["--bind", str(bind)] if bind else ["-t", kind, kind]
    subprocess.run(["mount", *what, str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def read(path):
    """The text of a file, empty when there is none."""
    try:
        return Path(path).read_text(errors="surrogateescape")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def status_field(text, name):
    return re.search(rf"^{name}:\s*(.*)$", text, re.MULTILINE).group(1)


Mount = namedtuple("Mount", "root options type source super_options")  # of mountinfo; see proc(5)


def mounts(text):
    """Mount point to Mount; the topmost, where there are several."""
    table = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        here, there = left.split(" "), right.split(" ")
        options, super_options = set(here[5].split(",")), set(there[2].split(","))
        table[here[4]] = Mount(here[3], options, there[0], there[1], super_options)
    return table


def children(pid):
    """The living children of a process."""
    processes = filter(str.isdigit, os.listdir("/proc"))
    stats = {entry: read(f"/proc/{entry}/stat").rpartition(")")[2].split() for entry in processes}
    return [int(entry) for entry in stats if stats[entry][1:2] == [str(pid)] and stats[entry][0] != "Z"]


def processes_in(pid_namespace):
    """The host's numbers of the processes of a pid namespace."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, AttributeError):  # it may end while we look
            state = status_field(read(f"/proc/{entry}/status"), "State")
            if os.readlink(f"/proc/{entry}/ns/pid") == pid_namespace and "Z" not in state:
                found.append(int(entry))
    return found


def signal_pending(pid, number):
    return int(status_field(read(f"/proc/{pid}/status"), "ShdPnd"), 16) >> number - 1 & 1


def cpu_seconds(pid):
    fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cgroup_mounts():
    """Controller to mount point on the host; "" is the unified hierarchy."""
    table = {}
    for point, mount in mounts(read("/proc/self/mountinfo")).items():
        if mount.type == "cgroup2":
            table[""] = point
        elif mount.type == "cgroup":
            table.update(dict.fromkeys(mount.super_options, point))
    return table


def version(controller):
    """1 or 2, by the hierarchy that has the controller here; 0 when none has."""
    table = cgroup_mounts()
    if controller in table:
        return 1
    unified = f"{table.get('')}/cgroup.controllers"
    return 2 if controller in read(unified).split() else 0


def cgroup_of(pid, controller):
    """The directory, on the host, of the cgroup that a process is in."""
    table = cgroup_mounts()
    name = controller if controller in table else ""
    for line in read(f"/proc/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if name in controllers.split(","):
            return Path(table[name] + path)
    raise AssertionError(f"{pid} is in no cgroup with {controller}")


def is_locked(directory):
    """Whether somebody holds the lock of a container's cgroup: run() does as long as it lives."""
    fd = os.open(str(directory), os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def cgroups_called(pattern):
    """The cgroups with such a name, in whatever hierarchy, but for another user's."""
    found = set()
    for point in set(cgroup_mounts().values()):
        for parent, below, _ in os.walk(point):
            if os.access(parent, os.W_OK):
                found |= {os.path.join(parent, name) for name in below if re.fullmatch(pattern, name)}
    return found


def cgroups_left():
    """What runs that have ended left of their mydocker-NAME."""
    found = set()
    for path in cgroups_called("mydocker-.*"):
        with contextlib.suppress(FileNotFoundError):
            if not is_locked(path):
                found.add(path)
    return found


def tree(directory):
    """Everything that can be seen of a directory tree."""
    found = {}
    for parent, directories, files in os.walk(str(directory)):
        for name in [".", *directories, *files]:
            path = os.path.join(parent, name)
            entry = os.lstat(path)
            content = os.readlink(path) if stat.S_ISLNK(entry.st_mode) else ""
            if stat.S_ISREG(entry.st_mode):
                content = hashlib.sha256(Path(path).read_bytes()).digest()
            about = (entry.st_mode, entry.st_uid, entry.st_gid, entry.st_mtime_ns, content)
            found[os.path.relpath(path, str(directory))] = about
    return found


def remove(directory):
    """Remove a tree, also where overlay left its work/work with mode 0."""
    subprocess.run(["chmod", "-R", "u+rwX", str(directory)], check=True)
    shutil.rmtree(str(directory))


ANOTHER_PID_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]
KIND_OF_PROC = ("stat", "-f", "-c", "%T", "/proc")

EXCHANGE = """import ctypes, os, sys
one, two = map(os.fsencode, sys.argv[1:])
renameat2, at_fdcwd, rename_exchange = ctypes.CDLL(None).renameat2, -100, 2
while renameat2(at_fdcwd, one, at_fdcwd, two, rename_exchange) == 0: pass"""


@contextlib.contextmanager
def exchanging(one, two):
    """Another process has two names change places all the while; afterwards they are as they were."""

    def inode():
        return os.lstat(str(one)).st_ino

    before = inode()
    process = subprocess.Popen([PYTHON, "-c", EXCHANGE, str(one), str(two)])
    try:
        wait_until(lambda: inode() != before, "the first exchange")
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        if inode() != before:
            spare = Path(f"{one}.spare")
            Path(one).rename(spare), Path(two).rename(one), spare.rename(two)


def image(caller, *options):
    """A layer on top of busybox's, and the caller with both."""
    layer = caller.path("image")
    (layer / "etc").mkdir()
    return layer, caller._replace(options=("--rootfs", caller.rootfs, "--rootfs", layer, *options))


def own_cgroup(pid1, controller="memory"):
    """The directory of a container's own, which on v2 has another below it that holds the processes."""
    path = cgroup_of(pid1, controller)
    return path.parent if version(controller) == 2 else path


# ---- Fixtures ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def playground():
    """A directory outside /tmp that every account can reach; orphans come to us.

    Root leaves the mount namespace for another: a neighbour's mounts are no business of the tests, nor theirs
    a neighbour's. Like that of a host with systemd it is shared: what does not stay inside will show."""
    libc, pr_set_child_subreaper, clone_newns = ctypes.CDLL(None, use_errno=True), 36, 0x00020000
    libc.prctl(pr_set_child_subreaper, 1, 0, 0, 0)
    if os.geteuid() == 0:
        assert libc.unshare(clone_newns) == 0, os.strerror(ctypes.get_errno())
        for propagation in "--make-rprivate", "--make-rshared":
            subprocess.run(["mount", propagation, "/"], check=True)
    directory = Path(tempfile.mkdtemp(prefix="mydocker-test-", dir="/var/tmp"))
    directory.chmod(0o755)
    yield directory
    remove(directory)


@pytest.fixture(scope="session")
def accounts(playground):
    """For each account: its uid, a Python it can run, and a rootfs that it built."""
    made, before = {}, {}
    for name, uid in ("root", 0), ("user", os.geteuid() or ORDINARY_UID):
        if name == "root" and os.geteuid() != 0:
            continue
        home = playground / name
        home.mkdir()
        os.chown(str(home), uid, uid)
        caller = Caller(uid, OWN_PYTHON, home, home / "rootfs")
        try:
            ended(caller.popen([caller.python, "-c", ""], preexec_fn=caller.become))
        except OSError:  # a Python in root's home
            caller = caller._replace(python=PYTHON)
        script = ["sh", str(ROOTFS_SCRIPT), str(caller.rootfs)]
        assert ended(caller.popen(script)).status == 0
        made[name] = caller
        before[name] = tree(caller.rootfs)
    yield made
    for name, caller in made.items():
        assert tree(caller.rootfs) == before[name], "a test changed the rootfs itself"


@pytest.fixture(scope="session")
def user_namespaces(accounts):
    """Whether the ordinary user may have them."""
    return ended(accounts["user"].popen(["unshare", "-Ur", "true"])).status == 0


@pytest.fixture(params=[AS_ROOT, "user"])
def account(request, accounts, user_namespaces):
    """The caller, with a fresh directory for this test."""
    need(request.param in accounts, "root (use sudo)")
    need(request.param == "root" or user_namespaces, "user namespaces for everybody")
    caller = accounts[request.param]
    fresh = Path(tempfile.mkdtemp(dir=str(caller.rootfs.parent)))
    os.chown(str(fresh), caller.uid, caller.uid)
    return caller._replace(dir=fresh)


@pytest.fixture
def mydocker(account):
    """mydocker.py run, in the host's view."""
    return account


@pytest.fixture
def busybox(account):
    """mydocker.py run --rootfs DIR."""
    return account._replace(options=("--rootfs", account.rootfs))


@pytest.fixture(autouse=True)
def nothing_is_left(playground):
    """After every test the host is as it was before it."""

    def temporary():
        """What mydocker would have put in the host's /tmp, had it not covered that before."""
        return {name for name in os.listdir("/tmp") if re.fullmatch("(upper|work)(%2F.*)?", name)}

    def none_lives():
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return True

    def mounted_here():
        """But for a login's: a logout takes that from all namespaces. Without root they are everybody's."""
        rows = read("/proc/self/mountinfo").split("\n") if os.geteuid() == 0 else []
        return [row for row in rows if " /run/user/" not in row]

    mountinfo, cgroups, files = mounted_here(), cgroups_left(), temporary()
    yield
    wait_until(none_lives, "the last process of the test to end")
    assert mounted_here() == mountinfo
    try:
        wait_until(lambda: cgroups_left() <= cgroups, seconds=3)  # a neighbour's run may be just ending
    except AssertionError:
        assert cgroups_left() <= cgroups
    assert temporary() <= files


# ---- Command line --------------------------------------------------------------------

OPTIONS = """--interactive --tty --memory --memory-swap --memory-swappiness --cpu-shares
    --cpus --cpuset-cpus --cpuset-mems --pids-limit --oom-score-adj --rootfs --upperdir
    --read-only --volume --tmpfs --workdir --env --user --hostname --name --network
    --cap-add --cap-drop --privileged --pidfile --cgroup-parent --stop-timeout
    --explain --log-format --rm --ulimit --group-add --env-file --shm-size --device --add-host
    --security-opt""".split()


@pytest.fixture
def anybody(accounts):
    return next(iter(accounts.values()))


LOAD_PROGRAM = """import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("mydocker", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)"""


def load_program():
    """mydocker.py as a module, for what only its functions show."""
    spec = importlib.util.spec_from_file_location("mydocker", str(PROGRAM))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_help_names_run_and_every_option_and_version_is_one_line(anybody):
    """What cannot be written is an error; what is for nobody is none."""
    for words in "--help", "-ti --help", "-m 100m --help", "--help true":
        status, out, err = anybody.cli("run", *words.split())
        assert (status, err, [name for name in OPTIONS if name not in out]) == (0, "", []), words
    status, out, err = anybody.cli("--help")
    assert (status, err) == (0, "") and "run" in out and "usage" in out.lower()
    status, out, err = anybody.cli()
    assert (status, out) == (USAGE_ERROR, "") and "usage" in err.lower()
    status, out, err = anybody.cli("--version")
    assert (status, err) == (0, "") and re.fullmatch(r"mydocker(\.py)? \d\S*\n", out)
    for words in ["--version"], ["--help"], ["run", "--help"]:
        with open("/dev/full", "w") as full:
            assert "No space left" in refusal(anybody.cli(*words, stdout=full))
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *anybody.words(*words)]
        assert ended(anybody.popen(command)) == Result(0, "", "")


def test_a_usage_error_is_one_line_and_125_and_an_option_that_cannot_be_is_told_with_what_to_do(anybody):
    for line, said in [
        ("frobnicate", "frobnicate"), ("run", "command"), ("run -ti", "command"), ("run --", "command"),
        ("run --nosuch true", "no option --nosuch"), ("run --mem 5m true", "no option --mem"),
        ("run --interact true", "no option --interact"), ("run -m", "-m"), ("run -tx true", "-"),
        ("run --tty=yes true", "--tty"), ("run -v /nonexistent:/mnt true", "/nonexistent"),
        ("run -m 20m --memory-swap 10m true", "--memory-swap"), ("run -v /:/x -v /:/x true", "/x"),
        ("run -v /:/x -v /:/x/ true", "/x"), ("run -v /:/x --tmpfs //x true", "/x"),
        ("run -d true", "background"), ("run --detach true", "background"), ("run -id true", "background"),
        ("run -p 8080:80 true", "--network"), ("run --publish 80:80 true", "--network"),
        ("run --publish=80:80 true", "--network"), ("run --mount=type=bind true", "-v"),
        ("run --mount type=bind,src=/etc,dst=/x true", "-v"), ("run --entrypoint sh true", "command"),
        ("run --init true", "tini"), ("run --restart always true", "supervisor"),
        *((f"init{words}", "run") for words in ("", " 0", " sh", " --help", " -ti sh")),
    ]:  # fmt: skip
        told = refusal(anybody.cli(*line.split(" "), data=b"echo\0ran\0"))
        assert said in told and ("init" in told or line[:4] != "init") and "internal error" not in told, line


NONSENSE = {  # the values, with | between them
    "--memory": "abc|-5m|10x|10mbb|nan|inf|99999999999t|m|1.|.|1..5m|1.2.3m|1,5m|1 m| 1m|1m |+1m|1e3|0x10|1mm"
    "|1ibm|1i|1p|٣m|1_000|0.0001b||" + "9" * 5000,
    "--memory-swap": "10m", "--memory-swappiness": "101", "--shm-size": "much|0|", "-c": "1|262145",
    "-cpushare": "many", "--cpus": "0.001|99999|nan|half", "-cpuset": "0-|1-0|zero|0-999999999",
    "--pids-limit": "few|-2|4194305", "--oom-score-adj": "1001|-1001", "--rootfs": "/nonexistent|/etc/passwd",
    "-v": "/etc|/etc:relative|/etc:/mnt:rx|:/mnt", "--tmpfs": "relative", "-w": "relative", "-e": "=value",
    "--hostname": "a/b|a\nb|a b|ä|a_b\t|" + "h" * 65, "--name": "-x|a/b|" + "n" * 201,
    "--network": "bridge", "--cap-add": "NOSUCH", "--cap-drop": "CAP_NOSUCH", "--stop-timeout": "soon|-1",
    "--log-format": "xml", "--cgroup-parent": "../x|/a/../..|/", "--device": "/dev/nosuch|/etc/passwd:/dev/x",
    "--ulimit": "nofile|nofile=x|nofile=1:2:3|nofile=200:100|nosuch=1|nofile=9999999999",
    "--add-host": "name|name:|:10.0.0.1|name:not-an-address|a\nb:10.0.0.1|a b:10.0.0.1",
    "--security-opt": "nosuch|seccomp=/etc/passwd|no-new-privileges=perhaps|",
    "--env-file": "/dev/nosuch|/etc",
}  # fmt: skip


@once
@pytest.mark.parametrize("option", NONSENSE)
def test_a_value_that_cannot_be_is_refused_by_its_name(busybox, option):
    for value in NONSENSE[option].split("|"):
        said = refusal(busybox(option, value, "true"))
        assert (option in said or value and value in said) and "no option" not in said, said


@root_only
def test_cpuset_confines_the_command_to_its_cpu_and_what_is_not_there_is_told_with_those_that_are(busybox):
    """At once, not after a long list has been written out in memory. The memory nodes stay as they were."""
    out = busybox.out("-cpuset", LAST_CPU, "cat", "/proc/self/status")
    assert status_field(out, "Cpus_allowed_list") == LAST_CPU
    ours = status_field(read("/proc/self/status"), "Mems_allowed_list")
    assert status_field(out, "Mems_allowed_list") == ours
    for option, kind in ("-cpuset", "cpu"), ("--cpuset-mems", "node"):
        available = read(f"/sys/devices/system/{kind}/online").strip()
        assert f"available: {available}" in refusal(busybox(option, "0,4095", "true"))
    limited = ["prlimit", f"--as={1 << 30}"]
    assert "cpuset" in refusal(busybox.under(limited, "--cpuset-cpus", "0-999999999", "true"))


@once
def test_a_size_is_a_number_and_a_unit_of_1024(busybox):
    for sizes, number in [
        ("1048576 1024k 1024Kb 1m 1M 1mb 1MiB 1048576b", 1 << 20), ("1.5g 1536m", 1536 << 20),
        ("0.5m", 1 << 19), ("4.5k 4608b", 4608), ("2t 2TiB", 2 << 40), ("1 1b 0.0009765625k", 1),
    ]:  # fmt: skip
        for size in sizes.split():
            table = mounts(busybox.out("--shm-size", size, "cat", "/proc/self/mountinfo"))
            assert f"size={-(-number // PAGE) * PAGE >> 10}k" in table["/dev/shm"].super_options, size


def readme_table(*heading):
    """The rows of the table in README.md with that heading, a list of cells each."""
    lines = iter((HERE / "README.md").read_text().splitlines())
    assert any(line == f"| {' | '.join(heading)} |" for line in lines), heading
    next(lines)
    return [re.split(r" *(?<!\\)\| *", row)[1:-1] for row in iter(lambda: next(lines), "")]


def test_the_readme_has_every_option_of_the_help_and_what_it_names_is_in_the_program(anybody):
    told = anybody.cli("run", "--help").out
    blocks = re.findall(r"^  (-.*(?:\n   +.*)*)", told, re.MULTILINE)[1:]  # not --help
    rows = readme_table("option", "value", "default", "meaning")
    assert len(rows) == len(blocks) > 30
    for block, (names, takes, default, _) in zip(blocks, rows):
        told, _, text = re.sub(r"\n +", "  ", block).partition("  ")
        value = told.rpartition(", ")[2].partition(" ")[2]
        told = [name.split(" ")[0] for name in told.split(", ")]
        assert names == ", ".join(f"`{name}`" for name in told)
        assert (bool(takes), "repeatable" in takes) == (bool(value), value.endswith("...")), names
        if told[-1] in ("--stop-timeout", "--net", "--log-format", "--pids-limit", "--shm-size"):
            assert re.search(r"\(default: (\w+)\)", " ".join(text.split()))[1] == default.strip("`"), names
    limits = readme_table("option", "controller", "cgroup v1 file", "cgroup v2 file")
    assert len(limits) == 8
    for names, controller, *files in limits:
        assert all(file.startswith(f"`{controller}.") for file in files), names
        told = re.findall("`(.*?)`", names + "".join(files))
        assert [name for name in told if name not in SOURCE.read_text()] == []
    heading = ("mechanism", "what it stops", "kernel interface", "function", "manual page", "chapter")
    functions = [name for row in readme_table(*heading) for name in re.findall(r"`(.*?)`", row[3])]
    assert len(functions) > 20
    program = load_program()
    for name in functions:
        owner = program
        for part in name.split("."):
            owner = getattr(owner, part)


@once
def test_options_end_at_the_first_word_that_is_none_or_at_a_double_dash_and_the_rest_is_unchanged(busybox):
    words = "-m 5m --help -v -- -cpuset -c"
    assert busybox.out("echo", *words.split()) == words + "\n"
    assert busybox.out("--", "echo", "--", "-i") == "-- -i\n"
    assert busybox.out("-i", *SH, 'echo "$0 $1"', "-cpuset", "-ti") == "-cpuset -ti\n"
    strange = "a b|||c|'single'|\"double\"|$HOME|`id`|\\|*|!|new\nline|tab\t|\x01\x7f|ünï|字🐳|\udcff\udc80"
    long = ["x" * 65536, *["y" * 100000] * 5, *map(str, range(5000))]
    for words in f"{strange}|-m|--|--help|-|".split("|"), long:
        command = [*SH, "cat /proc/$$/cmdline; :", "sh", *words]
        assert busybox.out(*command).split("\0") == [*command, ""]


def test_what_docker_reads_as_not_set_is_not_set(busybox):
    script = "readlink /proc/self/fd/0; : >/file && id -u && grep CapEff /proc/self/status"
    default = busybox.out(*SH, script)
    assert default.startswith("/dev/null\n0\n")
    for words in (
        "-m 0 --memory-swap 0 --memory-swappiness -1 --cpus 0 -c 0 --pids-limit 0 --user= --cpuset-cpus="
        " --name= --rm -ti --tty=false --interactive=false --read-only=false --privileged=false",
        "--memory=0 --cpus=0.0 --cpu-shares 0 --cpuset-mems= --rm=true -t --tty=0 -i --interactive=F",
        "--memory-swap 0 --tty=False",
    ):
        assert busybox.out(*words.split(), *SH, script) == default, words


# ---- Namespaces and root filesystem --------------------------------------------------


def test_the_command_is_pid_1_in_namespaces_of_its_own(busybox):
    names = ["pid", "mnt", "uts", "ipc", "net", "cgroup", "user"]
    script = f"""echo $$ /proc/[0-9]* $(pwd); cd /sys/class/net; echo * $(cat lo/flags)
        for name in {' '.join(names)}; do readlink /proc/self/ns/$name; done"""
    processes, network, *inside = busybox.out(*SH, script).splitlines()
    assert processes == "1 /proc/1 /"
    name, flags = network.split()
    assert name == "lo" and int(flags, 16) & 1
    shared = [name for name, link in zip(names, inside) if link == os.readlink(f"/proc/self/ns/{name}")]
    assert len(inside) == len(names) and shared == ["user"] * (busybox.uid == 0)


def test_the_hostname_is_an_id_of_the_containers_own_or_what_is_asked_for(busybox):
    before, script = socket.gethostname(), "hostname; echo $HOSTNAME; env | grep ^HOSTNAME="
    runs = [(), (), ("--hostname", "box.example"), ("--network", "host"), ("--network", "host", "-h", "box")]
    found = [busybox.out(*options, *SH, script).splitlines() for options in runs]
    names = [name for name, *_ in found]
    assert found == [[name, name, f"HOSTNAME={name}"] for name in names]
    assert names[0] != names[1] and all(re.fullmatch("[0-9a-f]{12}", name) for name in names[:2])
    assert names[2:] == ["box.example", before, "box"] and socket.gethostname() == before


def test_loopback_works_and_is_not_the_hosts_and_low_ports_and_ping_are_everybodys(busybox, mydocker):
    script = "nc -l -p 8080 -e echo hello & until nc 127.0.0.1 8080; do :; done"
    result = busybox("--network", "none", *SH, f"({script}) 2>/dev/null")
    assert (result.status, result.out) == (0, "hello\n")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        assert busybox("nc", "-w", "5", "127.0.0.1", server.getsockname()[1]).status == 1
    source = """if 1:
        import os, socket
        socket.socket().bind(("", 80))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as ping:
            ping.sendto(bytes([8, 0, 0xf7, 0xff]) + bytes(4), ("127.0.0.1", 0))
            print(ping.recv(64)[0])"""
    user = () if mydocker.uid else ("-u", "1000:1000")
    assert mydocker(*user, "--cap-drop", "ALL", PYTHON, "-c", source, cwd="/")[:2] == (0, "0\n")


DEVICES = {"null": "1,3", "zero": "1,5", "full": "1,7", "random": "1,8", "urandom": "1,9", "tty": "5,0"}
DOCKERS_MOUNTS = """/ overlay rw
    /proc proc rw,nosuid,nodev,noexec
    /dev tmpfs nosuid
    /dev/pts devpts nosuid,noexec
    /dev/shm tmpfs rw,nosuid,nodev
    /dev/mqueue mqueue nosuid,nodev,noexec
    /sys sysfs ro,nosuid,nodev,noexec""".split("\n")


def test_every_mount_is_the_containers_own_and_private_and_as_in_docker(busybox):
    """Although the host's are shared, as under systemd. What came out would fail nothing_is_left."""
    mountinfo = busybox.out("cat", "/proc/self/mountinfo")
    if os.geteuid() == 0:
        assert " shared:" in read("/proc/self/mountinfo")
    assert " shared:" not in mountinfo and " master:" not in mountinfo
    table = mounts(mountinfo)
    ours = {"overlay", "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"}
    for mount in table.values():  # device nodes may be the host's, by bind
        assert mount.type in ours or mount.root.split("/")[-1] in DEVICES, mount
    for row in DOCKERS_MOUNTS:
        point, kind, options = row.split()
        assert table[point].type == kind and set(options.split(",")) <= table[point].options, row
    assert [point for point in table if "/cgroup" in point and "ro" not in table[point].options] == []
    assert busybox.uid or "/sys/fs/cgroup" in table


def test_dev_has_what_programs_expect_and_nothing_of_the_hosts(busybox):
    script = f"""cd /dev; echo *; for link in fd stdin stdout stderr ptmx; do readlink $link; done
        stat -c '%n %F %a %t,%T' {' '.join(DEVICES)}; stat -c '%n %a' shm pts/ptmx .
        df -k shm . | awk '{{print $2}}'; echo gone >null; head -c 3 zero | od -An -tx1"""
    names, *rest, _, shm_size, size, zeros = busybox.out(*SH, script).splitlines()
    usual = "console fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero core"
    assert set(names.split()) <= set(usual.split())
    assert rest[:5] == [*(f"/proc/self/fd{number}" for number in ("", "/0", "/1", "/2")), "pts/ptmx"]
    assert rest[5:-3] == [f"{name} character special file 666 {DEVICES[name]}" for name in DEVICES]
    assert rest[-3:] == ["shm 1777", "pts/ptmx 666", ". 755"]
    assert int(shm_size) == 64 << 10 >= int(size) and zeros.split() == ["00"] * 3
    with busybox.terminal("-t", "stat", "-c", "%a %G", "/dev/pts/0") as window:
        assert window.end().out.split() == ["620", "root" if busybox.uid else "tty"]


def test_the_root_is_the_rootfs_and_what_is_written_to_it_is_gone_afterwards(busybox):
    """Files and directories are on one device: overlay does without only with xino=on. It is bounded."""
    script = """test ! -e /new && ls / && stat -c %d / /bin /bin/busybox /etc/passwd | uniq | wc -l
        echo x >/new && rm -r /bin/sh && test -e /new && df -k / | tail -n 1"""
    for _ in range(2):
        *seen, size, _, _, _, _ = busybox.out(*SH, script).split()
        assert seen == [*sorted(os.listdir(str(busybox.rootfs))), "1", "overlay"]
        assert not (busybox.rootfs / "new").exists()
        total = int(re.search(r"MemTotal: *(\d+)", read("/proc/meminfo")).group(1))
        assert int(size) <= total / 2 + 4


def test_layers_of_any_name_are_stacked_and_the_topmost_file_is_shown(busybox):
    """A relative name is relative to the caller's directory."""
    names = ["a:b", "c,d", "e\\f", "g h", "ö", "x=y,upperdir=z", "\\:", "new\nline"]
    for number, name in enumerate(names):
        layer = busybox.path(name)
        (layer / f"{number}").write_text(name), (layer / "top").write_text(name)
    stack = [f"--rootfs={name}" for name in names]
    files = [f"/{number}" for number in range(len(names))]
    assert busybox.out(*stack, "cat", *files, "/top") == "".join(names) + names[-1]


def test_layers_that_overlay_cannot_take_or_that_may_not_be_entered_are_refused(busybox):
    """The kernel would cut their list off in silence, which once left the host's root at the bottom."""
    assert "the same directory twice" in refusal(busybox("--rootfs", busybox.rootfs, "true"))
    layers = [f"--rootfs={busybox.path(f'layer{number}')}" for number in range(250)]
    assert PAGE > 4096 or "too many" in refusal(busybox(*layers, "true"))  # for one page of options
    assert busybox.out(*layers[:150], "echo", "fine") == "fine\n"
    inside = busybox.path("closed/inside")
    inside.parent.chmod(0)
    for options in (("-v", f"{inside}:/m"), ("--rootfs", inside)) if busybox.uid else ():
        assert "Permission denied" in refusal(busybox(*options, "true"))
    inside.parent.chmod(0o755)


@root_only
def test_a_root_that_the_kernel_refuses_is_told_with_the_reason_and_so_is_one_that_is_too_old(busybox):
    explained, _ = steps(busybox("--explain", "true").err)
    for call, error, said in [
        ('mount("overlay"', "ENODEV", "modprobe"), ('mount("overlay"', "EINVAL", "on overlay"),
        ('mount("overlay"', "ELOOP", "same directory twice"), ("pivot_root(", "EINVAL", "initramfs"),
        ("pivot_root(", "EPERM", ""),
    ]:  # fmt: skip
        name, _, start = call.partition("(")
        shown = [step.arguments.startswith(start) for step in explained if step.call == name]
        around = injecting(name, f"error={error}:when={1 + shown.index(True)}")
        text = refusal(busybox.under(around, "echo", "no"))
        assert call in text and said in text, error
    for call in "mount_setattr", "openat2", "move_mount":
        words = ("-v", f"{busybox.rootfs}:/mnt:ro", "echo", "no")
        assert "Linux 5.12" in refusal(busybox.under(injecting(call, "error=ENOSYS"), *words))


def test_an_upperdir_keeps_the_files_for_the_next_run_of_its_owner_alone(busybox, mydocker, accounts):
    """CVE-2021-41091: a setuid program made inside is none for the users of the host."""
    kept = busybox.path("kept", mode=0o777)  # also in a directory that was there before
    keep = ("--upperdir", kept)
    busybox.out(*keep, *SH, "echo kept >/file; rm /etc/group; cp bin/busybox suid && chmod 4755 suid")
    assert [stat.S_IMODE(path.stat().st_mode) for path in kept.iterdir()] == [0o700]
    assert busybox.out(*keep, *SH, "cat /file; test ! -e /etc/group") == "kept\n"
    if busybox.uid == 0:
        busybox.dir.chmod(0o755)
        (program,) = kept.rglob("suid")
        assert program.stat().st_mode & stat.S_ISUID
        with pytest.raises(PermissionError):
            accounts["user"].popen([str(program), "id"], preexec_fn=accounts["user"].become)
    with begun(busybox, *keep, *IDLE):
        assert str(kept) in refusal(busybox(*keep, "true"))
    remove(kept)
    assert busybox(*keep, "cat", "/file").status == 1
    keep = ("--upperdir", mydocker.dir / "layer")  # in the host's view, where that can be written
    if mydocker.uid:
        assert "--upperdir" in refusal(mydocker(*keep, "true"))
    else:
        mydocker.out(*keep, *SH, "echo kept >/etc/mydocker-test")
        assert mydocker.out(*keep, "cat", "/etc/mydocker-test") == "kept\n"
        assert not os.path.exists("/etc/mydocker-test")


def test_a_layer_that_others_may_enter_or_another_made_is_refused(busybox):
    layer, uid = busybox.path("kept/layer"), busybox.uid
    for mode, owner in (0o755, uid), (0o770, uid), (0o701, uid), (0o700, uid or ORDINARY_UID):
        layer.chmod(mode)
        os.chown(str(layer), owner, -1)
        if (mode, owner) != (0o700, uid):
            assert f"{layer} is open to others" in refusal(busybox("--upperdir", layer.parent, "true"))
            assert list(layer.iterdir()) == []
    victim = busybox.path("victim")
    for name in "upper", "work":  # a link that another container has put there
        (busybox.path(f"{name}/layer", mode=0o700) / name).symlink_to(victim)
        assert refusal(busybox("--upperdir", busybox.dir / name, "true")) and list(victim.iterdir()) == []


def test_neither_mount_points_that_it_lacks_nor_an_upperdir_are_made_in_a_rootfs(account):
    """Nor does an upperdir lead elsewhere by a link."""
    bare, victim = account.path("bare"), account.path("victim", mode=0o700)
    ended(account.popen(["cp", "-a", f"{account.rootfs}/bin", str(bare)]))
    (account.dir / "link").symlink_to(bare)
    (account.path("one") / "layer").symlink_to(victim)
    (account.path("two") / "layer").symlink_to(bare)
    before = tree(bare)
    assert account.out("--rootfs", bare, "-v", f"{account.rootfs}:/deep/below", "ls", "/deep/below/bin/sh")
    assert tree(bare) == before
    for name in "one", "two", "bare", "bare/below", "link/upper":
        said = refusal(account("--rootfs", bare, "--upperdir", account.dir / name, "true"))
        assert f"--upperdir {account.dir / name}" in said
        assert name in ("one", "two") or "never written to" in said
        assert list(victim.iterdir()) == [] and tree(bare) == before, name


def test_read_only_is_the_root_and_nothing_that_is_mounted_on_it(busybox):
    """What it is mounted on is made before, and so is the workdir."""
    file, volume = busybox.path("file", "mine"), busybox.path("volume")
    volumes = ("-v", f"{file}:/other/file", "-v", f"{volume}:/volume", "--tmpfs", "/third")
    script = """pwd; cat /other/file; echo x >/dev/null || exit 8
        for d in /dev /dev/shm /volume /third; do echo x >$d/file || exit 9; done; touch here /there"""
    result = busybox("--read-only", "-w", "/new/dir", *volumes, *SH, script)
    assert result[:2] == (1, "/new/dir\nmine") and result.err.count("Read-only file system") == 2, result


def test_the_callers_directory_is_the_commands_or_else_the_root_and_a_line_says_so(mydocker, busybox):
    mydocker.path("one", ""), mydocker.path("two", "")
    assert mydocker("/bin/ls")[:2] == (0, "one\ntwo\n")
    status, out, err = mydocker("pwd", cwd="/dev/shm")
    assert (status, out) == (0, "/\n") and "/dev/shm is not visible" in err
    for how in (), ("--explain",), ("--log-format", "json"):  # nor is that in what the command says
        result = mydocker(*how, "-t", "echo", "fine", cwd="/run")
        assert result.out == "fine\r\n" and "current directory /run is not visible" in result.err, how
    deleted = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    assert within(busybox, deleted, "pwd") == Result(0, "/\n", "")
    result = within(mydocker, deleted, "pwd")
    assert (result.status, result.out) == (0, "/\n") and "deleted" in result.err


@root_only
def test_the_hosts_view_may_be_wrecked_and_no_filesystem_of_the_host_is_touched(mydocker):
    """And /run is the container's own, with a directory for locks."""
    assert os.listdir("/run")
    with mounted(mydocker.path("other")) as other:
        (other / "file").write_text("gold "), mydocker.path("precious", "gold")
        script = f"""ls -A /run; stat -c %a /run/lock; touch /run/lock/x && ls /run/lock
            cat file; echo mine >file; cat file; rm -rf {mydocker.dir} /etc /opt; echo x >/etc 2>&1
            test -e /etc/passwd -o -e {mydocker.dir}/precious || echo gone"""
        assert mydocker(*SH, script, cwd=other).out == "lock\n1777\nx\ngold mine\ngone\n"
        assert os.path.exists("/etc/passwd") and read(mydocker.dir / "precious") == "gold"
        assert os.listdir(other) == ["file"] and read(other / "file") == "gold "
        assert not os.path.exists("/run/lock/x")
        result = mydocker("--read-only", "touch", "new", cwd=other)
    assert result.status != 0 and "Read-only file system" in result.err


@root_only
def test_the_hosts_mounts_are_shown_wherever_they_are_but_no_socket_and_no_other_proc(mydocker):
    """Docker mounts files, such as /etc/hosts. Of a socket a bind would be the host's own; overlay's is none.
    A proc shows the host's processes, on another mount or below one that overlay cannot have."""
    long_path = "/".join(letter * 200 for letter in "abcd")  # longer than a name of the layer can be
    names = ["a b", "a\fb", "a\u2028b", "a\\b", "a\nb", "a\x1cb", "%2F", long_path]
    file, on_file = mydocker.path("file", "text"), mydocker.path("on file", "below")
    on_socket = mydocker.path("on socket", "")
    with socket.socket(socket.AF_UNIX) as server, contextlib.ExitStack() as stack:
        server.bind(str(mydocker.dir / "socket"))
        stack.enter_context(mounted(on_file, bind=file))
        stack.enter_context(mounted(on_socket, bind=mydocker.dir / "socket"))
        assert stat.S_ISSOCK(os.stat(str(on_socket)).st_mode)
        places = [stack.enter_context(mounted(mydocker.path(name))) for name in names]
        for place, name in zip(places, names):
            (place / "file").write_text(name)
        covered, below = stack.enter_context(mounted(mydocker.path("covered"))), places[-1] / "below"
        below.mkdir()
        for proc in covered, below:
            assert (stack.enter_context(mounted(proc, "proc")) / "self").exists()
        assert mydocker.out("cat", on_file, *(place / "file" for place in places)) == "text" + "".join(names)
        assert mydocker.out("stat", "-c", "%F", on_socket) == "regular empty file\n"
        assert mydocker.out("ls", "-A", covered, below) == f"{below}:\n\n{covered}:\n"


MOUNT_FUSE = """import ctypes, os, sys
fd = os.open("/dev/fuse", os.O_RDWR)
data = f"fd={fd},rootmode=40000,user_id={sys.argv[2]},group_id={sys.argv[2]}".encode()
assert ctypes.CDLL(None).mount(b"fuse", sys.argv[1].encode(), b"fuse", 0, data) == 0
if sys.argv[2] == "0":
    os.close(fd)  # its server is gone
else:
    os.set_inheritable(fd, True)
os.execvp(sys.argv[3], sys.argv[3:])"""


@root_only
def test_a_filesystem_whose_file_or_place_was_deleted_is_left_out_and_told_a_covered_one_is_silent(mydocker):
    gone, place, layer = mydocker.path("gone", ""), mydocker.path("place", ""), mydocker.dir / "layer"
    with mounted(place, bind=gone):
        gone.unlink()
        result = mydocker("echo", "fine")
    line = f"mydocker: the host's {place} cannot be shown inside: No such file or directory\n"
    assert result == Result(0, "fine\n", line)
    outer = mydocker.path("outer")
    (outer / "inner").mkdir()
    with mounted(outer / "inner"), mounted(outer):
        assert mydocker("echo", "fine") == Result(0, "fine\n", "")
    assert mydocker("--upperdir", layer, "rm", "-r", outer).status == 0
    with mounted(outer):
        said = mydocker("--upperdir", layer, "true")
    assert said.status == 0 and said.err.startswith(f"mydocker: the host's {outer} cannot be shown"), said


@root_only
def test_a_filesystem_that_cannot_be_seen_is_not_shown_and_told_as_that(mydocker):
    """It is a user's, whom root may not follow; or root's, and its server is dead."""
    need(os.path.exists("/dev/fuse"), "FUSE")
    remote = mydocker.path("remote")

    def beside_fuse(user, *words):
        around = ["unshare", "--mount", PYTHON, "-c", MOUNT_FUSE, str(remote), user]
        return mydocker.under(around, *words)

    for user in "0", "1000":
        status, out, err = beside_fuse(user, "echo", "fine")
        assert (status, out) == (0, "fine\n"), user
        assert [str(remote) in line for line in err.splitlines()] == [True], user
    for options in ("--rootfs", mydocker.rootfs, "-v", f"{remote}:/m"), ("--rootfs", remote):
        said = refusal(beside_fuse("1000", *options, "true"))
        assert "Permission denied" in said and str(remote) in said


@user_only
def test_without_root_the_hosts_view_is_read_only_but_for_places_of_its_own(mydocker):
    name = f"mydocker-test-{os.urandom(4).hex()}"
    places = ("/tmp", "/run", "/dev/shm", "/run/lock")
    script = f"""touch {mydocker.dir}/new; for d in {' '.join(places)}; do touch $d/{name} && ls $d; done
        stat -c %a /run/lock; cat /proc/self/mountinfo"""
    result = mydocker(*SH, script, cwd="/")
    *seen, mode, mountinfo = result.out.split("\n", 6)
    assert (seen, mode) == ([name, "lock", name, name, name], "1777")
    assert not any(os.path.exists(f"{place}/{name}") for place in places)
    table, own = mounts(mountinfo), ("/proc", "/sys", "/dev", "/run", "/tmp")
    assert table["/"].options >= {"ro", "nodev"}
    assert [point for point in table if "ro" not in table[point].options and not point.startswith(own)] == []
    said = [line for line in result.err.splitlines() if line.startswith("mydocker: ")]
    assert len(said) == 1 and "read-only" in said[0]
    assert "Read-only file system" in result.err and os.listdir(str(mydocker.dir)) == []


@root_only
@slow
def test_no_mount_of_the_hosts_comes_to_lie_on_proc(mydocker):
    """Its owner exchanges a directory above it for a link while the path is walked."""
    place, link = mydocker.path("place"), mydocker.dir / "link"
    (place / "proc").mkdir()
    link.symlink_to("/")
    with mounted(place / "proc"), exchanging(place, link):
        results = [mydocker(*KIND_OF_PROC, cwd="/") for _ in range(20)]
    assert {result[:2] for result in results} == {(0, "proc\n")}


@root_only
def test_no_mount_of_the_hosts_comes_to_lie_on_proc_by_a_link_in_the_upperdir(mydocker):
    usb, upper = mydocker.path("usb"), mydocker.path("up", mode=0o700)
    for link in "/proc", "/":
        script = f"rm -rf {usb} && ln -s {link} {usb}"
        assert mydocker("--upperdir", upper, *SH, script, cwd="/").status == 0
        with mounted(usb):
            (usb / "proc").mkdir(), (usb / "file").touch()
            result = mydocker("--upperdir", upper, *KIND_OF_PROC, cwd="/")
        assert result[:2] == (0, "proc\n"), result


@root_only
@slow
def test_what_was_locked_as_upperdir_is_what_is_used(busybox):
    """A user who owns the directory exchanges the layer for one of his own."""
    upper = busybox.path("up")
    for name, uid, mode in ("layer", 0, 0o700), ("evil", ORDINARY_UID, 0o755):
        busybox.path(f"up/{name}", mode=mode)
        os.chown(str(upper / name), uid, uid)
    evil = os.open(str(upper / "evil"), os.O_RDONLY)
    with exchanging(upper / "layer", upper / "evil"):
        results = [busybox("--upperdir", upper, *SH, "echo x >/mark; cat /mark") for _ in range(40)]
    found = os.listdir(evil)
    os.close(evil)
    assert found == []
    assert any(result.status == 0 for result in results)
    assert all(result == Result(0, "x\n", "") or refusal(result) for result in results)


def test_started_in_a_chroot_nobody_climbs_out_of_both_nor_is_a_proc_of_strangers_taken(busybox, mydocker):
    """pivot_root works there, and what is above it is the machine's own root. The numbers in a proc of
    another pid namespace would name strangers."""
    around = ["unshare", *(["--user", "--map-root-user"] if busybox.uid else []), "--pid", "--fork"]
    assert "another pid namespace" in refusal(busybox.under(around, "-t", "echo", "no"))
    around = in_own_mounts('mount --rbind / "$0"', busybox.path("chroot"), 'exec chroot "$0"')
    for caller in (busybox, mydocker) if busybox.uid == 0 else ():
        assert "chroot" in refusal(caller.under(around, "echo", "in", cwd="/"))


@root
@user_only
def test_without_root_other_procs_and_binds_of_run_are_hidden(mydocker):
    proc, run = mydocker.path("proc"), mydocker.path("run")
    with tempfile.TemporaryDirectory(dir="/run") as secret, mounted(proc, "proc"), mounted(run, bind=secret):
        Path(secret, "secret").write_text("")
        os.chmod(secret, 0o755)
        assert (proc / "self").exists() and (run / "secret").exists()
        result = mydocker(*SH, f"echo $(ls -A {proc} {run})")
    assert result.status == 0 and not {"self", "version", "secret"} & set(result.out.split()), result


@root_only
def test_the_device_nodes_are_the_containers_own(busybox):
    """And so is the file that masks others."""
    nodes = [f"/dev/{name}" for name in DEVICES]

    def on_the_host():
        return [(entry.st_mode, entry.st_uid, entry.st_mtime) for entry in map(os.stat, nodes)]

    before = on_the_host()
    masked = [path for path in ("/proc/kcore", "/proc/keys", "/proc/timer_list") if os.path.isfile(path)]
    script = f"""touch -d 2001-01-01 {' '.join(nodes)}; touch -d 2001-01-01 {' '.join(masked)} 2>/dev/null
        chmod 0600 /dev/full && chown 1:1 /dev/full && stat -c '%a %u' /dev/full; echo x >/dev/null"""
    try:
        result = busybox(*SH, script)
        after = on_the_host()
    finally:
        for path, (mode, uid, mtime) in zip(nodes, before):
            os.chmod(path, stat.S_IMODE(mode)), os.chown(path, uid, -1), os.utime(path, (mtime, mtime))
    assert (after, result) == (before, Result(0, "600 1\n", ""))


@root_only
def test_the_hosts_view_is_one_filesystem_to_du_and_ismount_and_its_python_is_not_the_hosts(mydocker):
    """What /proc/PID/exe opens is a file of the container, from PID 1 on."""
    (mydocker.path("some/below") / "file").write_bytes(b"x" * MIB)
    kib = mydocker.out("du", "-xs", "some").split()[0]
    assert kib == mydocker.out("du", "-s", "some").split()[0] and int(kib) >= 1024
    source = "import os; print(os.path.ismount('/etc/passwd'), *os.stat('/proc/1/exe')[1:3])"
    mount_point, *found = mydocker.out(PYTHON, "-c", source).split()
    assert mount_point == "False" and found != list(map(str, os.stat(PYTHON)[1:3]))


@root
@user_only
def test_a_covered_proc_or_no_sys_is_told_with_the_remedy(busybox):
    need(os.geteuid() == 0, "root (use sudo)")
    become = ["setpriv", f"--reuid={busybox.uid}", f"--regid={busybox.uid}", "--clear-groups"]
    for script in "mount -t tmpfs none /proc/fs", "umount --lazy /sys":  # as in a container of docker's
        around = [*in_own_mounts(script), *become]
        assert "covered in part: it takes sudo" in refusal(busybox.under(around, "true", preexec_fn=None))


@root
@user_only
def test_a_rootfs_of_anothers_works_or_is_told_as_that(account, accounts):
    """Overlay cannot make a file in a directory whose owner the user namespace does not have."""
    need(os.geteuid() == 0, "root (use sudo)")
    data = account.path("data")
    for options in f"-v {data}:/usr/data", "-w /usr/work", "--network host", "-h box", "":
        result = account("--rootfs", accounts["root"].rootfs, *options.split(), "echo", "fine")
        if "/usr" in options and result.status:
            assert "own" in refusal(result)
        else:
            assert result == Result(0, "fine\n", ""), options


# ---- Options -------------------------------------------------------------------------


def test_volumes_show_what_the_host_has_and_are_written_through(busybox):
    """Files and directories, by relative names or with a colon, on what is not there yet, parents first."""
    odd, file, inner = busybox.path("a:b", "odd "), busybox.path("file", "mine "), busybox.path("inner")
    source, labels, outer = busybox.path("source"), busybox.path("labels"), busybox.path("outer")
    (inner / "deep").write_text("deep "), (source / "there").write_text("and back ")
    modes = ["z", "Z", "rw,Z", "ro,z", "z,ro", "ro"]  # the labels that docker's have do nothing
    volumes = [
        f"{source}:/mnt", "./file:/etc/passwd", f"{odd}:/not/yet/file:rw",
        *(f"{inner}:/x{n}/y" for n in range(4)), f"{outer}:/x0/", f"{outer}://x1", f"{outer}:/x2",
        *(f"./labels:/label/{n}:{mode}" for n, mode in enumerate(modes)),
    ]  # fmt: skip
    script = """echo kept >/mnt/file; cat /mnt/there /etc/passwd /not/yet/file /x?/y/deep; pwd
        for n in 0 1 2 3 4 5; do touch /label/$n/$n; done"""
    words = [f"--volume={volume}" for volume in volumes]
    result = busybox(*words, "--tmpfs", "/x3/", "-w", "/not/there", *SH, script)
    assert result.out == f"and back mine odd {'deep ' * 4}/not/there\n", result
    kept = source / "file"
    assert kept.read_text() == "kept\n" and kept.stat().st_uid == busybox.uid and file.read_text() == "mine "
    assert sorted(os.listdir(str(labels))) == ["0", "1", "2"]
    assert [line.split(": ")[-1] for line in result.err.splitlines()] == ["Read-only file system"] * 3


def test_a_volume_brings_the_mounts_below_it_with_its_flags_but_no_later_ones(busybox):
    """The host's mounts are shared."""
    source, late = busybox.path("source"), busybox.path("source/late")
    script = "cat /rw/below/file; echo x >/rw/below/new; touch /ro/below/file; read line; ls /*/late"
    words = ("-i", "-v", f"{source}:/rw", "-v", f"{source}:/ro:ro", *SH, script)
    with mounted(busybox.path("source/below")) as below:
        below.chmod(0o777)
        (below / "file").write_text("deep\n")
        with busybox.start(*words, stdin=subprocess.PIPE) as container:
            assert container.line() == "deep"
            assert "Read-only file system" in container.line("stderr")
            with mounted(late):
                (late / "file").write_text("")
                container.process.stdin.write(b"go\n")
                assert container.end() == Result(0, "/ro/late:\n\n/rw/late:\n", "")
        assert (below / "new").read_text() == "x\n"


def test_a_volume_shows_the_hosts_tmp_where_the_root_is_assembled(busybox, mydocker):
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="mydocker-test-") as directory:
        os.chmod(directory, 0o777)
        script = f"touch /host{directory}/a && cd /volume{directory[4:]} && touch b && ls"
        for options in (), ("--read-only",), ("--upperdir", "up"):
            assert busybox.out(*options, "-v/tmp:/volume", "-v/:/host", *SH, script) == "a\nb\n"
            assert sorted(os.listdir(directory)) == ["a", "b"]
            os.unlink(f"{directory}/a"), os.unlink(f"{directory}/b")
        script = f"touch {directory}/a; echo x >/run/{directory[5:]}/b; umask"
        words = ("-v", "/tmp:/tmp", "-v", f"{directory}:/run/{directory[5:]}", *SH, script)
        assert mydocker(*words, cwd="/")[:2] == (0, "0022\n")
        assert sorted(os.listdir(directory)) == ["a", "b"]


@root_only
@pytest.mark.parametrize("tmp, source", [("mknod tmp c 0 0", "/var"), ("ln -s /var/tmp tmp", "/tmp")])
def test_a_host_may_have_no_tmp_or_a_link(busybox, tmp, source):
    script = f"""mount -t tmpfs none "$0" && cd "$0" && mkdir upper work root && (cd upper && {tmp}) &&
        mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work none root && cd root &&
        mount -t proc none proc && mount --rbind /sys sys && mount --rbind /dev dev &&
        mkdir old && {busybox.python} -c 'import ctypes; ctypes.CDLL(None).pivot_root(b".", b"old")' &&
        cd / && umount -l /old"""
    devices = {os.stat(str(path)).st_dev for path in ("/", PROGRAM, busybox.rootfs, busybox.python)}
    if len(devices) > 1 or str(PROGRAM).startswith("/tmp/"):
        pytest.skip("all on one filesystem, and the program not in /tmp")
    around = in_own_mounts(script, busybox.path("host"))
    assert busybox.under(around, "-v", f"{source}:/volume", "echo", "fine") == Result(0, "fine\n", "")


@root_only
@slow
def test_no_flag_of_a_volume_is_lost_to_a_rename(busybox):
    """One source at two places, and who shares a volume leads the second mount to the first."""
    data = busybox.path("data")
    (data / "x").mkdir(), (data / "sub").mkdir(), (data / "link").symlink_to("/w")
    volumes = ("-v", f"{data}:/v", "-v", f"{data}/x:/w", "-v", f"{data}/x:/v/sub:ro")
    with exchanging(data / "sub", data / "link"):
        results = crowd(busybox, [(*volumes, "cat", "/proc/self/mountinfo")] * 150, at_once=2)
    assert any(result.status == 0 for result in results)
    for result in results:
        if result.status:
            refusal(result)
            continue
        rows = [line.split() for line in result.out.splitlines()]
        flags = {row[0]: row[5].split(",") for row in rows if re.search("/data(/x)?$", row[3])}
        assert len(flags) == 3 and all("nodev" in words for words in flags.values()), result
        assert sum("ro" in words for words in flags.values()) == 1, result


def test_a_tmpfs_is_empty_and_careful_and_what_is_asked_for(busybox):
    """Without a mode it has that of the directory, or 1777."""
    places = "/etc /t:size=1m,mode=700 /x:exec /root /new /tmp:mode=750".split()
    script = """stat -c '%n %a' /etc /t /root /new /tmp; df -k /t /dev/shm | awk '{print $2}'
        touch /etc/x && ls -A /etc; cp /bin/busybox /x/echo && /x/echo ran
        cp /bin/busybox /new/echo; /new/echo ran 2>/dev/null || echo $?; cat /proc/mounts"""
    out = busybox.out(*(f"--tmpfs={place}" for place in places), "--shm-size", "3m", *SH, script).splitlines()
    assert out[:5] == ["/etc 755", "/t 700", "/root 700", "/new 1777", "/tmp 750"]
    assert out[6:11] == ["1024", "3072", "x", "ran", "126"]
    flags = {row.split()[1]: set(row.split()[3].split(",")) for row in out[11:]}
    assert flags["/etc"] >= {"rw", "nosuid", "nodev", "noexec"} <= flags["/t"] and "noexec" not in flags["/x"]


@once
def test_the_environment_is_the_containers_own_as_is_the_path_and_env_adds_to_it(busybox):
    callers = {**{name: os.environ[name] for name in os.environ if name != "HOSTNAME"}, "CALLERS": "its own"}

    def environment(*variables):
        words = [f"--env={variable}" for variable in variables]
        return dict(line.split("=", 1) for line in busybox.out(*words, "env", env=callers).splitlines())

    default = environment()
    assert sorted(default) == ["HOME", "HOSTNAME", "PATH"] and default["HOME"] == "/root"
    assert default["PATH"].split(":")[-2:] == ["/sbin", "/bin"]
    del default["HOSTNAME"]  # as the caller has none
    given = environment("A=b c=d", "B=", "C=1", "C=2", "CALLERS", "NOBODY_HAS_IT", "HOME=/else", "HOSTNAME")
    assert given == {**default, "A": "b c=d", "B": "", "C": "2", "CALLERS": "its own", "HOME": "/else"}
    assert environment("HOME=")["HOME"] == "/root"
    busybox.path("place"), busybox.path("place/tool", "#!/bin/sh\necho found\n", 0o755)
    assert busybox.out("-v", "./place:/place", "-e", "PATH=/nowhere:/place:/bin", "tool") == "found\n"


@once
def test_env_file_is_read_as_docker_reads_it(busybox):
    text = "# a comment|  # another|\t|PLAIN=a b # c|QUOTED=\"x\" 'y'|  LEADS=1|EMPTY=|CALLERS|ABSENT"
    text += "|TRAILS=x  |EQUALS=a=b|CR=x\r|OVER=file|TWICE=1|TWICE=2|"
    file = busybox.path("file", text.replace("|", "\n"))
    busybox.path("other", "OTHER=1")
    words = ("-e", "OVER=option", "--env-file", file, "--env-file=other")
    out = busybox.out(*words, "env", env={**os.environ, "CALLERS": "its own"})
    found = dict(line.split("=", 1) for line in out.split("\n")[:-1])
    assert {name: found[name] for name in found if name not in ("HOME", "HOSTNAME", "PATH")} == {
        "PLAIN": "a b # c", "QUOTED": "\"x\" 'y'", "LEADS": "1", "EMPTY": "", "CALLERS": "its own",
        "TRAILS": "x  ", "EQUALS": "a=b", "CR": "x", "OVER": "option", "TWICE": "2", "OTHER": "1",
    }  # fmt: skip
    for text in "A B=1\n", "=1\n":
        file.write_text(text)
        assert str(file) in refusal(busybox("--env-file", file, "true"))


@pytest.fixture
def staff(account):
    """A rootfs with accounts of its own on top of busybox's."""
    layer, caller = image(account)
    (layer / "etc/passwd").write_text(
        "root:x:0:0::/root:/bin/sh\nann:x:1001:100::/home/ann:/bin/sh\n1000:x:0:0::/bad:/bin/sh\n"
    )
    (layer / "etc/group").write_text("root:x:0:\nusers:x:100:\nwheel:x:10:root,ann\n7:x:0:\n")
    return caller


@root_only
def test_a_user_and_the_groups_are_the_containers_and_a_number_is_no_name(staff):
    """The number 1000 is, although the image's user *named* 1000 is root. The default is the user 0."""
    for user, seen in [
        ("4242:4343 --group-add 7 --group-add=wheel", "4242 4343 / 7 10 4343"),
        ("ann --group-add 7", "1001 100 /home/ann 7 10 100"), (" --group-add 7", "0 0 /root 0 7 10"),
        ("1000", "1000 0 / 0"), ("ann", "1001 100 /home/ann 10 100"), ("1001", "1001 100 /home/ann 10 100"),
        ("ann:7", "1001 7 /home/ann 7"), ("ann:wheel", "1001 10 /home/ann 10"),
        ("ann:", "1001 100 /home/ann 10 100"), (":wheel", "0 10 /root 10"), ("root", "0 0 /root 0 10"),
        ("", "0 0 /root 0 10"), ("4242:4343", "4242 4343 / 4343"), ("4294967294", "4294967294 0 / 0"),
        (None, "0 0 /root 0 10"),
    ]:  # fmt: skip
        options = [] if user is None else f"--user={user}".split()
        out = staff.out(*options, *SH, "cat /proc/self/status; echo $(id -u) $(id -g) $HOME")
        groups = sorted(status_field(out, "Groups").split(), key=int)
        assert " ".join([out.splitlines()[-1], *groups]) == seen, user
    script = "echo hello >$(tty) && stat -c %u $(tty)"  # the terminal belongs to the user
    assert staff("-t", "-u", "ann", *SH, script).out == "hello\r\n1001\r\n"


def test_a_user_or_group_that_cannot_be_is_refused(staff):
    with open(str(staff.dir / "image/etc/passwd"), "a") as passwd:  # a line ends at a newline only: no eve
        passwd.write("zed:x:5:5:\feve:x:0:0::/:/bin/sh\n")
    for user in ("bob", "ann:nogroup", "bob:users", "-1", "eve", "4294967295", "0:4294967295", "4294967296",
                 "99999999999999999999"):  # fmt: skip
        assert "--user" in refusal(staff("-u", user, "true")), user
    for group in "nosuch", "4294967295":
        assert group in refusal(staff("--group-add", group, "true"))
    if staff.uid:
        said = refusal(staff("-u", "1000", "true"))
        assert "--user 1000" in said and "without root there is but one user" in said and "sudo" in said


def test_users_are_found_in_files_of_megabytes(account):
    layer, caller = image(account)
    users = "".join(f"user{n}:x:1{n}:100:Some User &:/home/user:/bin/sh\n" for n in range(30000))
    (layer / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n" + users)
    crowd = ",".join(f"user{n}" for n in range(100000, 250000))
    (layer / "etc/group").write_text(f"root:x:0:\nusers:x:100:\ncrowd:x:500:{crowd},user29999\n")
    assert (layer / "etc/group").stat().st_size > MIB < (layer / "etc/passwd").stat().st_size
    assert caller.out(*SH, "echo $HOME") == "/root\n"
    if not account.uid:
        assert caller.out("-u", "user29999", *SH, "echo $(id -u; id -G)") == "129999 100 500\n"


def test_network_host_is_the_hosts_with_copies_of_its_files(busybox):
    """Without root /sys is the host's then, but not its cgroups. There may be a delegated one, and its own
    processes; an outsider has the number 0 in this pid namespace."""
    files = [f"/etc/{name}" for name in ("hosts", "hostname", "resolv.conf")]
    before = [read(path) for path in files]
    append = f"for f in {' '.join(files)}; do echo mine >>$f && tail -n 1 $f; done"
    script = f"readlink /proc/self/ns/net; cat /etc/hosts /etc/resolv.conf; {append}"
    out = busybox.out("--network", "host", *SH, script)
    assert out == f"{os.readlink('/proc/self/ns/net')}\n{before[0]}{before[2]}mine\nmine\nmine\n"
    assert busybox.out("--network", "none", *SH, append) == "mine\nmine\nmine\n"
    assert [read(path) for path in files] == before
    script = "ls -A /sys/fs/cgroup | grep -q . && cat /sys/fs/cgroup/cgroup.procs; :"
    assert busybox.uid == 0 or "0" not in busybox.out("--network", "host", *SH, script).split()
    for network in "none", "host":
        said = busybox("--network", network, "--explain", "true").err
        (line,) = [line for line in said.splitlines() if "CLONE_NEWNS" in line]
        assert ("CLONE_NEWNET" in line, "network" in line) == (network == "none", network == "none")
    busybox.path("file", "mine")
    volumes = [f"--volume=./file:{path}" for path in files]
    assert busybox.out("--network", "host", *volumes, "cat", *files) == "mine" * 3


def test_the_container_resolves_its_own_name_and_those_it_is_given(busybox, mydocker):
    names = ("--add-host", "db:10.1.2.3", "--add-host", "six:2001:db8::1")
    for options in "", "-h box", "--read-only", "--network host":
        words = (*options.split(), *names, *SH, "hostname; cat /etc/hostname /etc/hosts")
        name, file, *lines = busybox.out(*words).splitlines()
        known = {name: line.split()[0] for line in lines if "#" not in line for name in line.split()[1:]}
        assert options == "--network host" or (name == file and known[name])
        assert known["localhost"] in ("127.0.0.1", "::1")
        assert (known["db"], known["six"]) == ("10.1.2.3", "2001:db8::1")
        assert "box" not in options or name == "box"
    if mydocker.uid == 0:
        source = "import socket as s; print(s.gethostbyname(s.gethostname()), s.gethostbyname('db'))"
        assert mydocker.out(*names, PYTHON, "-c", source).split()[1] == "10.1.2.3"


def test_a_dangling_link_of_an_image_is_followed_inside_and_files_that_lead_nowhere_are_no_matter(account):
    layer, caller = image(account)
    kinds = [
        Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("/proc/net/pnp"), lambda path: path.symlink_to("/no/where/../x"),
    ]  # fmt: skip
    (layer / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    assert caller.out("--network", "host", "cat", "/etc/resolv.conf") == read("/etc/resolv.conf")
    for turn in range(6):
        shutil.rmtree(str(layer / "etc"))
        (layer / "etc").mkdir()
        for name, kind in zip(["hosts", "hostname", "resolv.conf"], kinds[turn:] + kinds[:turn]):
            kind(layer / "etc" / name)
        if turn == 5:  # there is not even a directory
            (layer / "etc").rename(layer / "moved")
            (layer / "etc").write_text("")
        for network in "none", "host":
            assert caller("--network", network, "echo", "fine")[:2] == (0, "fine\n"), turn


@root_only
def test_a_host_whose_resolv_conf_is_in_proc_starts_all_the_same(busybox, mydocker):
    script = """mount -t tmpfs none "$0" && cd "$0" && mkdir u w &&
        mount -t overlay -o lowerdir=/etc,upperdir=u,workdir=w none /etc &&
        ln -sf /proc/net/pnp /etc/resolv.conf && cd /"""
    around = in_own_mounts(script, busybox.path("scratch"))
    for caller in busybox, mydocker:
        assert caller.under(around, "--network", "host", "echo", "fine", cwd="/")[:2] == (0, "fine\n")


#    as in /proc/PID/limits, which has "as" besides, whose limit docker does not know
RLIMITS = """cpu=1000:1001 fsize=1000:2000 data=1073741824 stack=1048576:2097152 core=0 rss=1000000
    nproc=500:600 nofile=5 memlock=4096:8192 as locks=100 sigpending=100 msgqueue=1000 nice=0 rtprio=0
    rttime=1000""".split()


@user_only
def test_ulimit_sets_every_limit_that_docker_names_but_none_beyond_the_callers(busybox):
    words = [f"--ulimit={limit}" for limit in ["nofile=99:200", *RLIMITS] if limit != "as"]
    _, *lines = busybox.out(*words, "cat", "/proc/self/limits").splitlines()
    for limit, line in zip(RLIMITS, lines):
        name, _, value = limit.partition("=")
        soft, _, hard = value.partition(":")
        assert name == "as" or line[26:].split()[:2] == [soft, hard or soft], line
    around = ["prlimit", "--nofile=100:100"]
    assert busybox.under(around, "--ulimit", "nofile=99", "echo", "fine") == Result(0, "fine\n", "")
    assert "--ulimit" in refusal(busybox.under(around, "--ulimit", "nofile=101", "true"))


def test_a_device_of_the_hosts_works_has_its_name_and_is_the_containers_own(busybox):
    before = os.stat("/dev/zero")
    script = "head -c 3 /dev/mine|od -An -tx1; stat -c '%F %t:%T' /dev/mine; touch -d 2001-01-01 /dev/mine"
    out = busybox("--device", "/dev/zero:/dev/mine", *SH, script).out
    assert out == " 00 00 00\ncharacter special file 1:5\n"
    assert os.stat("/dev/zero").st_mtime == before.st_mtime
    assert busybox.out("--device", "/dev/zero:/dev/null", *SH, "head -c 1 | wc -c") == "0\n"  # no stdin
    if busybox.uid == 0:
        hosts = [f"/dev/{name}" for name in ("fuse", "net/tun", "kvm", "loop0")]
        names = [name for name in hosts if os.path.exists(name)]
        need(names, "a device that a container has not")
        words = [f"--device={name}" for name in names]
        numbers = busybox.out(*words, "stat", "-c", "%n %t:%T", *names)
        assert numbers == subprocess.check_output(["stat", "-c", "%n %t:%T", *names]).decode()
        assert busybox.out(*words, *SH, f"exec 3<>{names[0]} && echo opened") == "opened\n"


def test_the_pidfile_is_there_while_the_container_lives_and_is_removed_where_it_was_made(busybox):
    with begun(busybox, "--hostname", "entered", *IDLE) as container:
        pid1 = int(container.pidfile.read_text())  # written before the command started
        assert status_field(read(f"/proc/{pid1}/status"), "NSpid").split()[-1] == "1"
        assert "in use" in refusal(busybox("--pidfile", container.pidfile, "true"))
        assert container.pidfile.read_text() == f"{pid1}\n"
        if busybox.uid == 0:
            enter = ["nsenter", "-t", str(pid1), "-u", "hostname"]  # -a would run what is inside
            assert subprocess.check_output(enter, cwd="/") == b"entered\n"
        os.kill(pid1, signal.SIGKILL)
        assert container.end().status == 137
        assert not container.pidfile.exists()
    place, other = busybox.path("place"), busybox.path("other")
    (other / "pid").write_text("4194304\n")
    with begun(busybox, "--pidfile", place / "pid", *IDLE) as container:
        pid1 = int(read(place / "pid"))
        place.rename(busybox.dir / "moved")  # the directory is exchanged for a link to another
        place.symlink_to(other)
        os.kill(pid1, signal.SIGKILL)
        container.end()
    assert read(other / "pid") == "4194304\n" and os.listdir(str(busybox.dir / "moved")) == []


def test_a_pidfile_replaces_what_a_killed_run_left_and_nothing_else(busybox):
    """It follows no link, nor does it wait for what is in a fifo, or in the kernel's log."""
    stale = busybox.path("pid", f"{os.getpid()}\n")  # who holds the lock lives, not who has the number
    assert busybox.out("--pidfile", stale, "echo", "fine") == "fine\n" and not stale.exists()
    text, more = busybox.path("text", "text of mine\n"), busybox.path("more", "17 and more\n")
    fifo, empty = busybox.dir / "fifo", busybox.path("empty", "")
    os.mkfifo(str(fifo))
    files = [text, more, fifo, busybox.path("dir")]
    for name, target in ("to fifo", fifo), ("to empty", empty), ("to kmsg", "/proc/kmsg"):
        (busybox.dir / name).symlink_to(target)
        files.append(busybox.dir / name)
    before = tree(busybox.dir)
    for file in files:
        assert str(file) in refusal(busybox("--pidfile", file, "true"))
        assert tree(busybox.dir) == before, file
    if busybox.uid == 0:  # in a directory of everybody's it is not another's
        file = busybox.path("sticky", mode=0o1777) / "pid"
        file.write_text("4194304\n")
        os.chown(str(file), ORDINARY_UID, ORDINARY_UID)
        words = ("-v", f"{file.parent}:/sticky", "stat", "-c", "%u %a", "/sticky/pid")
        result = busybox("--pidfile", file, *words)
        if result.status:  # where /proc/sys/fs/protected_regular is set
            assert str(file) in refusal(result)
        else:
            uid, mode = result.out.split()
            assert uid == "0" and int(mode, 8) & 0o022 == 0 and not file.exists()


# ---- Limits --------------------------------------------------------------------------

LAST_CPU = str(max(os.sched_getaffinity(0)))

#    options; what the files then have on v1; and on v2: written down here for a second time, so that a
#    mistake in the program's own table shows
LIMITS = [
    (f"-m 100m -cpushare 512 -cpuset {LAST_CPU} --cpus 0.5 --pids-limit 64",
     "memory.limit_in_bytes=104857600, memory.memsw.limit_in_bytes=209715200, cpu.shares=512, pids.max=64, "
     f"cpu.cfs_quota_us=50000, cpu.cfs_period_us=100000, cpuset.cpus={LAST_CPU}",
     "memory.max=104857600, memory.swap.max=104857600, cpu.weight=59, pids.max=64, "
     f"cpu.max=50000 100000, cpuset.cpus={LAST_CPU}"),
    ("--memory=64MiB --memory-swap 64m --cpu-shares=262144 --cpus 1 --cpuset-cpus 0 --cpuset-mems 0",
     "memory.limit_in_bytes=67108864, memory.memsw.limit_in_bytes=67108864, cpu.shares=262144, "
     "cpu.cfs_quota_us=100000, cpuset.cpus=0, cpuset.mems=0, pids.max=2048",
     "memory.max=67108864, memory.swap.max=0, cpu.weight=10000, pids.max=2048, "
     "cpu.max=100000 100000, cpuset.cpus=0, cpuset.mems=0"),
    ("-m1.5G --memory-swap -1 --cpushare 10 --cpus .25 --cpuset 0",
     "memory.limit_in_bytes=1610612736, memory.memsw.limit_in_bytes=9223372036854771712, cpu.shares=10, "
     "cpu.cfs_quota_us=25000, cpuset.cpus=0",
     "memory.max=1610612736, memory.swap.max=max, cpu.weight=4, cpu.max=25000 100000, cpuset.cpus=0"),
    ("-m 62914560 --memory-swap 150m -c 2",
     "memory.limit_in_bytes=62914560, memory.memsw.limit_in_bytes=157286400, cpu.shares=2",
     "memory.max=62914560, memory.swap.max=94371840, cpu.weight=1"),
    ("--memory-swappiness 0 -cpushare=1024", "memory.swappiness=0, cpu.shares=1024",
     "memory.swap.max=0, cpu.weight=100"),
]  # fmt: skip


@contextlib.contextmanager
def begun(caller, *words, **how):
    """A container from when its command has written a line, which says that it has begun."""
    with caller.start(*words, **how) as container:
        container.line()
        yield container


@contextlib.contextmanager
def host_cgroups(name, *controllers):
    """Cgroups of the host with this name, by controller; afterwards they are gone with all that is below."""
    table = cgroup_mounts()
    made = {controller: Path(table.get(controller, table.get("")), name) for controller in controllers}
    for path in set(made.values()):
        path.mkdir()
    try:
        yield made
    finally:
        for path in set(made.values()):
            wait_until(lambda: not read(path / "cgroup.procs"), "the end of what is in it")  # noqa: B023
            for directory, _, _ in os.walk(str(path), topdown=False):
                os.rmdir(directory)


@root_only
@pytest.mark.parametrize("options, on_v1, on_v2", LIMITS, ids=[row[0] for row in LIMITS])
def test_limits_are_seen_on_the_host_and_inside(busybox, options, on_v1, on_v2):
    values = {1: dict(pair.split("=") for pair in on_v1.split(", ")),
              2: dict(pair.split("=") for pair in on_v2.split(", "))}  # fmt: skip
    with begun(busybox, *options.split(), *IDLE) as container:
        for controller in {file.partition(".")[0] for file in values[1]}:
            number = version(controller)
            need(number, f"the cgroup controller {controller}")
            own = own_cgroup(container.pid1, controller)  # on v2 the processes are below, in one like it
            inside = Path(f"/proc/{container.pid1}/root/sys/fs/cgroup", controller if number == 1 else "")
            for file in [file for file in values[number] if file.startswith(f"{controller}.")]:
                seen = [read(place / file) for place in (own, cgroup_of(container.pid1, controller), inside)]
                assert seen == [values[number][file] + "\n"] * 3, file
            if number == 2:
                assert controller in read(own / "cgroup.subtree_control").split()
                assert read(own / "cgroup.procs") == ""


@root_only
@pytest.mark.parametrize("options", [("-m", "50m"), ("--pids-limit", "9"), ()], ids=" ".join)
def test_the_cgroup_is_the_containers_own_directly_below_ours_and_all_that_it_sees(busybox, options):
    """On v1 it has all that a program may look for: a JVM that misses one takes all memory for its own."""
    first = [name for name in ("memory", "pids", "cpu", "cpuacct", "cpuset") if version(name) == 1]
    others = [name for name in ("freezer", "devices", "blkio", "net_cls") if version(name) == 1]
    script = "cat /proc/self/cgroup; ls /sys/fs/cgroup; echo end; tail -f /dev/null"
    with host_cgroups("test-job", *first[:2]) as jobs:
        around = in_shell("; ".join([":", *(f"echo $$ >{job}/tasks" for job in jobs.values())]))
        with busybox.start("--name", "box", *options, *SH, script, around=around) as container:
            lines, pid1 = list(iter(container.line, "end")), container.pid1
            for name in first:
                above = jobs.get(name) or cgroup_of(os.getpid(), name)
                assert cgroup_of(pid1, name) == above / "mydocker-box"
            for name in others:
                assert cgroup_of(pid1, name) == cgroup_of(os.getpid(), name)
            for name in filter(version, ("memory", "pids")):
                own = own_cgroup(pid1, name)
                assert own.name == "mydocker-box" and is_locked(own)
                assert version(name) == 1 or cgroup_of(pid1, name).name == "container"
        assert not own.exists()
    paths = [line.split(":", 2) for line in lines if ":" in line]
    limited = {path for _, names, path in paths if not names or set(names.split(",")) & {*first, "pids"}}
    assert limited == {"/"} and set(first) <= set(lines)


BUSY = "while :; do :; done"
HOG = "dd if=/dev/zero of=/dev/null bs={} count=1 2>/dev/null"
FILL = "dd if=/dev/zero of={}/file bs=1M count=100 2>/dev/null"


@root_only
def test_a_process_is_inside_before_its_first_instruction_but_the_interpreter_is_not(busybox):
    script = "sh -c 'sleep 1000 & sleep 1000 & echo ready; wait'; :"
    with begun(busybox, "-m", "50m", *SH, script) as container:
        inside = processes_in(os.readlink(f"/proc/{container.pid1}/ns/pid"))
        procs = read(cgroup_of(container.pid1, "memory") / "cgroup.procs").split()
        assert len(inside) == 4 and sorted(map(int, procs)) == sorted(inside)
    limit = "768k" if version("memory") == 1 else "1m"  # v2 charges the upper cgroup for the lower one itself
    assert busybox.out("-m", limit, *SH, "echo fine") == "fine\n"
    assert busybox("-m", "100m", *SH, "exec " + HOG.format("50M")) == Result(0, "", "")


@root_only
def test_what_goes_beyond_its_memory_is_killed_and_the_reason_told(busybox, mydocker):
    said = """mydocker: out of memory: the kernel killed [1-9][0-9]* process(es)? at the 50 MiB limit; files
        in the writable layer .* count, too: --upperdir and -v .*"""
    for options, script, statuses in [
        ("", "exec " + HOG.format("100M"), [137]), ("--memory-swap 50m", "exec " + HOG.format("60M"), [137]),
        ("", HOG.format("100M") + "; exit 0", [0]),  # a child, while the command itself succeeds
        ("", "exec " + FILL.format(""), [137]), ("", FILL.format("/dev/shm") + "; exit 0", [0, 137]),
        ("--upperdir kept", FILL.format("/dev/shm") + "; exit 0", [0, 137]),
    ]:  # fmt: skip
        result = busybox("-m", "50m", *options.split(), *SH, script)
        assert re.fullmatch(" ".join(said.split()) + "\n", result.err), result
        assert result.status in statuses, (options, script)
        assert "shm" in script or "killed 1 process " in result.err
    need(shutil.which("stress"), "stress")  # the book's
    words = ("-ti", "-m", "100m", "stress", "--vm-bytes", "200m", "--vm-keep", "-m", "1")
    result = mydocker(*words)
    assert result.status == 1 and "got signal 9" in result.out and "at the 100 MiB limit" in result.err
    limits = ("--cpushare", "8000", "--cpuset", f"0-{LAST_CPU}", "-m", "50m")
    words = ("--vm-bytes", "30m", "--vm-keep", "--vm", "1", "--timeout", "1")
    result = mydocker(*limits, shutil.which("stress"), *words)
    assert result.status == 0 and "successful run completed" in result.out and result.err == ""


def cpu_time(*pids, seconds):
    before = list(map(cpu_seconds, pids))
    time.sleep(seconds)  # the stretch itself: nothing is awaited
    return [cpu_seconds(pid) - start for pid, start in zip(pids, before)]


@root_only
def test_half_a_cpu_is_half_and_shares_are_a_weight_against_the_host_and_another_container(busybox):
    busy = (*SH, f"echo ready; {BUSY}")
    with begun(busybox, "--cpus", "0.5", *busy) as container:
        (used,) = cpu_time(container.pid1, seconds=2)
        counts = read(cgroup_of(container.pid1, "cpu") / "cpu.stat")
    assert 0.1 < used / 2 < 0.65  # the machine may have little to give
    assert int(status_field(counts.replace(" ", ":"), "nr_throttled")) > 0
    need(version("cpu") and version("cpuset") and shutil.which("taskset"), "cpu, cpuset and taskset")
    host = subprocess.Popen(["taskset", "-c", LAST_CPU, *SH, BUSY], start_new_session=True)
    words = ("-cpuset", LAST_CPU, "-cpushare")
    try:
        with begun(busybox, *words, "512", *busy) as small, begun(busybox, *words, "1024", *busy) as large:
            less, more, others = cpu_time(small.pid1, large.pid1, host.pid, seconds=5)
    finally:
        host.kill()
        host.wait()
    if less + more + others < 2.5:
        pytest.skip(f"the machine had only {less + more + others:.1f} s of 5 to give")
    assert 0.28 <= less / (less + others) <= 0.45
    assert 0.25 < less / (less + more) < 0.42


def test_no_more_processes_than_the_pids_limit_can_be_made_and_that_is_told(mydocker, busybox):
    """Without a cgroup, too; what the same user runs outside does not count."""
    source = """if 1:
        import os
        made = 0
        try:
            while True:
                if os.fork() == 0:
                    os.read(os.pipe()[0], 1)
                made += 1
        except BlockingIOError:
            print(made)"""
    with contextlib.ExitStack() as crowd:
        for _ in range(30):
            crowd.callback(crowd.enter_context(mydocker.popen(["sleep", "1000"])).kill)
        result = mydocker("--pids-limit", "20", PYTHON, "-c", source)
    assert (result.status, result.out) == (0, "19\n")
    if mydocker.uid == 0:
        assert re.search("^mydocker: pids limit: .* 20 processes$", result.err, re.MULTILINE), result
        with begun(busybox, "--pids-limit", "-1", "-m", "50m", *IDLE) as container:  # no limit
            assert read(cgroup_of(container.pid1, "pids") / "pids.max") in ("max\n", "")


@root_only
def test_swappiness_is_v1s_and_v2_says_so_and_oom_score_adj_is_the_commands(busybox):
    cap_sys_resource = 24  # a root inside a container lacks it
    may_lower = capabilities(read("/proc/self/status"))[2] >> cap_sys_resource & 1
    for score in ["0", "1000", *(["-500"] if may_lower else [])]:
        assert busybox.out("--oom-score-adj", score, "cat", "/proc/self/oom_score_adj") == score + "\n"
    need(version("memory"), "the cgroup controller memory")
    if version("memory") == 1:
        words = ("--memory-swappiness", "30", *SH, "cat /sys/fs/cgroup/*/memory.swappiness")
        assert busybox.out(*words) == "30\n"
    else:
        said = refusal(busybox("--memory-swappiness", "30", "true"))
        assert "swappiness" in said and "v2" in said


@root_only
def test_a_limit_that_reads_back_as_another_is_an_error_naming_both(busybox):
    """strace keeps the kernel from seeing what is written."""
    need(version("pids"), "the cgroup controller pids")
    with host_cgroups("test-faked", "pids") as made:
        unseen = [*injecting("write", "retval=1"), "-P", str(made["pids"] / "mydocker-box/pids.max")]
        words = ("--cgroup-parent", "/test-faked", "--name", "box", "--pids-limit", "5", "echo", "no")
        said = refusal(busybox.under(unseen, *words))
    assert "--pids-limit" in said and "max instead of 5 " in said
    if version("memory") == 2:  # where so much is as good as no limit
        said = refusal(busybox("-m", str((1 << 63) - PAGE), "true"))
        assert re.search(f"the kernel .*max.* {(1 << 63) - PAGE} ", said)


@root_only
def test_cgroup_parent_is_where_the_cgroup_goes_and_on_v1_one_hierarchy_is_enough(busybox):
    controllers = [name for name in ("memory", "pids") if version(name)]
    with host_cgroups("test-parent", *controllers):
        with begun(busybox, "--cgroup-parent", "/test-parent", "-m", "50m", *IDLE) as container:
            for name in controllers:
                assert "test-parent" in cgroup_of(container.pid1, name).parts
    assert "/test-parent" in refusal(busybox("--cgroup-parent", "/test-parent", "-m", "50m", "true"))
    if {version(name) for name in ("memory", "cpu", "cpuset")} != {1}:
        return
    parent, words = ("--cgroup-parent", "/test-one"), ("--pids-limit", "-1")
    with host_cgroups("test-one", "memory"):
        for options in (), ("-m", "50m"):
            assert busybox.out(*parent, *options, "echo", "fine") == "fine\n"
        assert "/test-one" in refusal(busybox(*parent, "--cpus", "0.5", "echo", "no"))
    with host_cgroups("test-one", "cpuset"):  # a new one is empty, and is filled
        out = busybox.out(*parent, *words, "--cpuset-cpus", "0", "cat", "/proc/self/status")
        assert status_field(out, "Cpus_allowed_list") == "0"
    with host_cgroups("test-one", "cpu") as made:  # none has more time than the one above it
        (made["cpu"] / "cpu.cfs_quota_us").write_text("10000")
        said = refusal(busybox(*parent, *words, "--cpus", "0.5", "echo", "no"))
        assert "--cpus" in said and "Invalid argument" in said


@root_only
def test_a_container_holds_the_lock_of_its_cgroup_while_it_lives(busybox):
    need(version("memory"), "the cgroup controller memory")
    with begun(busybox, "--name", "box", "-m", "50m", *IDLE) as container:
        own = own_cgroup(container.pid1)
        assert is_locked(own)
        container.process.kill()
        container.process.wait()
        wait_until(lambda: not read(own / "cgroup.procs"), "the container to die")
        assert own.exists() and not is_locked(own)
        container.pidfile.unlink()
    assert busybox.out("--name", "box", "-m", "50m", "echo", "again") == "again\n"
    assert not own.exists()


@root_only
def test_what_nobody_holds_is_swept_and_nothing_else(busybox):
    need(version("memory"), "the cgroup controller memory")
    with begun(busybox, "-m", "50m", *IDLE) as container:
        own = own_cgroup(container.pid1)
        left, held, foreign = (own.parent / name for name in ("mydocker-left", "mydocker-held", "other-left"))
        for path in left, held, foreign:
            path.mkdir()
        try:
            fd = os.open(str(held), os.O_RDONLY)
            fcntl.flock(fd, fcntl.LOCK_EX)
            assert "in use" in refusal(busybox("--name", "held", "-m", "50m", "true"))
            assert busybox("-m", "50m", "true") == Result(0, "", "")
            assert [path.exists() for path in (own, left, held, foreign)] == [True, False, True, True]
            os.close(fd)
        finally:
            for path in left, held, foreign:
                with contextlib.suppress(FileNotFoundError):
                    path.rmdir()


@root_only
def test_a_run_of_another_pid_namespace_is_seen_to_live(busybox):
    words = busybox.words("run", *busybox.options, "--name", "box", "-m", "50m", "-i", *SH, "echo up; cat")
    process = busybox.popen([*ANOTHER_PID_NAMESPACE, *words], stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    try:
        assert "in use" in refusal(busybox("--name", "box", "-m", "50m", "true"))
    finally:
        assert ended(process, b"mine") == Result(0, "mine", "")


@root_only
@slow
def test_two_pid_namespaces_over_one_tree_lose_no_run(busybox):
    words = busybox.words("run", *busybox.options, "-m", "50m", "true")
    loop = ["sh", "-c", 'for n in $(seq 40); do "$@" || echo lost $n; done', "sh", *words]
    runs = [busybox.popen([*around, *loop]) for around in ([], ANOTHER_PID_NAMESPACE)]
    assert [ended(run) for run in runs] == [Result(0, "", "")] * 2


@root_only
def test_a_cgroup_namespace_whose_root_holds_processes_is_no_hindrance(busybox):
    """As in a privileged container: nothing can be handed down from there, and nothing of it may change."""
    if version("memory") != 2:
        pytest.skip("cgroup v2")
    point = cgroup_mounts()[""]
    script = f"""umount -l {point} && mount -t cgroup2 none {point} && cd {point} || exit 1
        show() {{ cat cgroup.subtree_control cgroup.type; }}
        show >"$0"; "$@" echo plain && "$@" echo again; show | cmp - "$0" && echo same
        "$@" -m 50m true; echo $?"""
    words = busybox.words("run", *busybox.options)
    with host_cgroups("test-outer", "memory") as made:
        around = ["sh", "-c", 'echo $$ >"$0"/cgroup.procs && exec unshare --cgroup --mount "$@"']
        command = [*around, made["memory"], "sh", "-c", script, busybox.dir / "before", *words]
        result = ended(busybox.popen(list(map(str, command))))
    assert result.out.split() == ["plain", "again", "same", "125"], result


@root_only
def test_a_controller_that_is_missing_is_named_and_is_no_matter_where_no_limit_is_asked_for(busybox):
    fine = Result(0, "fine\n", "")
    assert busybox.under(in_own_mounts("umount -l /sys/fs/cgroup"), "echo", "fine") == fine
    if version("memory") == 1:  # which can be unmounted
        around = in_own_mounts(f"umount -l {cgroup_mounts()['memory']}")
        said = refusal(busybox.under(around, "-m", "50m", "true"))
        assert "memory" in said.replace("--memory", "") and "as root there may be more" not in said
        assert busybox.under(around, "echo", "fine") == fine
    if version("pids") == 1 and os.path.isdir("/sys/fs/cgroup/unified"):  # then v2 has to have it
        script = "cd /sys/fs/cgroup; ls; cat memory/memory.limit_in_bytes"
        result = busybox.under(in_own_mounts("umount /sys/fs/cgroup/pids"), "-m", "64m", *SH, script)
        assert result == Result(0, f"cpu\ncpuacct\ncpuset\nmemory\nunified\n{64 * MIB}\n", "")


@root_only
def test_a_real_time_caller_has_its_container_or_is_told(busybox):
    """v1 may give a new cgroup no real-time at all."""
    around = ["chrt", "-f", "1"]
    need(shutil.which("chrt") and subprocess.call([*around, "true"]) == 0, "chrt")
    for options in [], ["-m", "50m"], ["-c", "512"]:
        result = busybox.under(around, *options, "echo", "fine")
        if result.status and "-c" in options:
            assert "real-time" in refusal(result)
        else:
            assert (result.status, result.out) == (0, "fine\n"), result


@root_only
def test_a_jvm_takes_its_heap_from_the_limit_and_mydocker_in_mydocker_sets_some(mydocker):
    need(version("memory"), "the cgroup controller memory")
    file = "memory/memory.limit_in_bytes" if version("memory") == 1 else "memory.max"
    options = ("-m", "64m", "--rootfs", mydocker.rootfs)
    inner = [PYTHON, PROGRAM, "run", *options, "cat", f"/sys/fs/cgroup/{file}"]
    assert mydocker.out("--privileged", "-m", "300m", *inner, cwd="/") == f"{64 * MIB}\n"
    need(shutil.which("java"), "java")
    words = ("java", "-XX:+PrintFlagsFinal", "-version")
    out = mydocker("-m", "200m", "--cpus", "0.5", *words, cwd="/").out
    assert int(re.search(r"MaxHeapSize\s*=\s*(\d+)", out).group(1)) <= 100 * MIB  # half, of so little


# ---- Terminal ------------------------------------------------------------------------


def is_raw(window):
    return not window.attributes[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


def test_a_shell_in_a_terminal_has_its_keys_and_its_jobs(busybox):
    start_cat = ("cat /etc/hosts -\r", "localhost\r\n")
    with busybox.terminal("-ti", "sh") as window:
        window.expect("# ")
        window.type(*start_cat)
        window.type("\x03", "# ")  # ctrl-c ends the program and not the shell
        window.type("echo ali''ve $?\r", "alive 130", "# ")
        window.type(*start_cat)
        window.type("\x1c", "Quit", "# ")  # ctrl-backslash, too
        window.type(*start_cat)
        window.type("\x1a", "Stopped")  # ctrl-z stops it
        window.type("jobs; echo ali''ve\r", "Stopped", "alive")
        window.type("fg\r", "fg\r\ncat /etc/hosts -\r\n")
        window.type("pong\r", "pong\r\npong\r\n")
        window.type("\x04", "# ")  # ctrl-d ends the input
        window.type("vi /tmp/file\r", "~")
        window.type("ihello\x1b", "hello")
        window.type(":wq\r", "# ")
        window.type("cat /tmp/file\r", "file\r\nhello\r\n", "# ")
        window.type("false\r", "# ")
        window.type("\x04")
        assert window.end().status == 1


@root_only
def test_the_books_first_shell_works_and_ps_shows_it_as_pid_1(mydocker):
    """run -ti -m 100m -cpuset 1 -cpushare 512 /bin/sh, and ps -ef in it; the next time, too."""
    need(shutil.which("ps"), "ps (procps)")
    words = ("-ti", "-m", "100m", "-cpuset", LAST_CPU, "-cpushare", "512", "/bin/sh")
    for _ in range(2):
        with mydocker.terminal(*words) as window:
            window.expect("# ")
            window.type("ps -ef; exit 4\r")
            result = window.end()
        assert result.status == 4
        assert re.search(r"CMD\r\nroot +1 +0 .* pts/0 .* /bin/sh\r\nroot +\d+ +1 .* ps -ef\r\n$", result.out)


def test_the_terminal_is_the_containers_own(busybox):
    script = """tty; ls /dev/pts; test -t 0 -a -t 1 -a -t 2 && echo all; stty size; echo TERM=$TERM
        echo console >/dev/console; trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"""
    environment, pidfile = {**os.environ, "TERM": "dumb"}, busybox.dir / "pid"
    with busybox.terminal("-ti", "--pidfile", pidfile, *SH, script, env=environment) as window:
        seen = window.expect("ready\r\n")
        assert seen == "/dev/pts/0\r\n0     ptmx\r\nall\r\n24 80\r\nTERM=xterm\r\nconsole\r\n"
        ours, place = os.fstat(window.slave), f"/proc/{int(read(pidfile))}/fd"
        assert [fd for fd in os.listdir(place) if os.path.samestat(os.stat(f"{place}/{fd}"), ours)] == []
        window.size(33, 111)
        assert window.end() == Result(0, "33 111\r\n", "")
    assert busybox.out(*SH, "echo TERM=$TERM", env=environment) == "TERM=\n"


@once
def test_what_is_typed_is_echoed_once_and_the_terminal_is_as_it_was_after_the_end(busybox):
    for flags in ["-it"], ["-i", "-t"], ["--interactive", "--tty"]:
        with busybox.terminal(*flags, *SH, "echo ready; exec cat") as window:
            window.expect("ready\r\n")
            window.type("word\r", "word\r\nword\r\n")
            window.type("\x04")
            assert window.end() == (0, "", "") and window.attributes == window.before
    for words, status in [
        ([*SH, "stty raw -echo; exit 3"], 3), (["no-such-command"], 127),
        (["-v", "/nonexistent:/x", "true"], 125), (["-w", "/etc/passwd/x", "true"], 125),
    ]:  # fmt: skip
        with busybox.terminal("-ti", *words) as window:
            assert window.end().status == status
            assert window.attributes == window.before, words


def test_the_callers_terminal_never_goes_in(busybox):
    """Without -t, too: who holds it can read what is typed next, and change its mode."""
    script = "for n in 0 1 2; do test ! -t $n || echo tty; done; cd /dev; chmod 666 stdout stderr; echo done"
    for options in (), ("-i",):
        with busybox.terminal(*options, *SH, script) as window:
            mode = os.fstat(window.slave).st_mode
            assert window.end() == Result(0, "done\r\n", "")
            assert os.fstat(window.slave).st_mode == mode and window.attributes == window.before


@once
def test_without_t_the_callers_terminal_is_relayed_and_has_no_name_inside(busybox):
    script = """echo ready; echo $0 >&2; read a; echo got $a; readlink /proc/self/fd/0 /proc/self/fd/1
        ! tty && echo typed >/dev/tty"""
    with busybox.terminal("-i", *SH, script, "stderr") as window:
        window.expect("ready")
        window.expect("stderr")
        assert not is_raw(window)
        window.type("typed\r", "got typed")
        end = window.end()
        assert end.status == 1 and "/dev/tty: No such device or address" in end.out
        assert "/dev/" not in end.out.replace("/dev/tty:", "")


@once
def test_without_ti_the_keyboard_stays_the_callers_and_ctrl_c_reaches_the_command(busybox):
    script = "trap 'exit 5' INT; echo ready; while :; do sleep 0.05; done"
    for options in [], ["-t"]:
        with busybox.terminal(*options, *SH, script) as window:
            window.expect("ready")
            assert not is_raw(window)
            window.type("\x03")
            assert window.end().status == 5


@once
def test_t_without_a_terminal_makes_one_and_a_line_editor_reads_what_is_before_the_end(busybox, mydocker):
    """It goes raw, and ^D then is no end but a key: it has to come when the program asks for it."""
    for flag in "-t", "-ti":
        result = busybox(flag, *SH, "tty; echo done")
        assert (result.status, result.out) == (0, "/dev/pts/0\r\ndone\r\n")
        assert re.fullmatch("mydocker: .*terminal.*\n", result.err)
    result = busybox("-ti", *SH, "cat >/tmp/file; cat /tmp/file", data=b"one\ntwo\n")
    assert (result.status, result.out) == (0, "one\r\ntwo\r\n" * 2)  # the echo of it, and the file
    need(shutil.which("bash"), "bash")
    for caller, words, data in [
        (mydocker, ["bash", "--norc"], b"echo $((40 + 2))\n"), (mydocker, [PYTHON, "-i"], b"print(40 + 2)\n"),
        (busybox, ["busybox", "sh"], b"read x; echo $((x + 2))\n40\n"),
    ]:  # fmt: skip
        for _ in range(4):
            result = caller("-ti", *words, data=data, cwd="/")
            assert result.status == 0 and "42\r\n" in result.out, result


@once
def test_nothing_of_the_output_of_a_terminal_is_lost_or_mixed(busybox):
    """Be the reader slow or fast."""
    run, seen = busybox.popen(busybox.words("run", *busybox.options, "-t", "seq", "100000"), bufsize=0), b""
    for data in iter(lambda: os.read(run.stdout.fileno(), 1000), b""):
        seen += data
    assert seen.decode() == "".join(f"{number}\r\n" for number in range(1, 100001))
    assert ended(run).status == 0
    results = [busybox("-t", *SH, "seq 1000; echo last; exit 9") for _ in range(5)]
    assert {(result.status, result.out[-6:]) for result in results} == {(9, "last\r\n")}


@once
def test_a_run_whose_last_output_nobody_reads_ends_on_request_and_sigchld_is_none(busybox):
    """It is sent for more than the end: when PID 1 is stopped, and for a child of the caller's."""
    for number in signal.SIGTERM, signal.SIGCHLD:
        with busybox.start("-t", *SH, f"head -c {15 * PAGE + 5560} /dev/zero; exit 5") as container:
            pid1, run = container.pid1, container.process  # which has what 15 pages and a write leave
            wait_until(lambda: not os.path.exists(f"/proc/{pid1}"), "run to see the end")  # noqa: B023
            assert run.poll() is None
            container.send(number)
            if number == signal.SIGTERM:
                assert run.wait(PATIENCE) == 5
            else:
                wait_until(lambda: not signal_pending(run.pid, number), "it to be taken")  # noqa: B023
                result = container.end()
                assert (result.status, len(result.out)) == (5, 15 * PAGE + 5560)


@once
def test_a_reader_or_terminal_that_takes_nothing_cannot_keep_a_run_from_its_end_and_none_is_the_end(busybox):
    """After Ctrl-S, or in a window that hangs. When it is closed the command ends."""
    reader, writer = os.pipe()
    with busybox.start("-t", "--stop-timeout", "0", "seq", "100000", stdout=writer) as container:
        wait_until(lambda: not select.select([], [writer], [], 0)[1], "the pipe to be full")
        container.send(signal.SIGTERM)
        assert container.process.wait(PATIENCE) == 137
    os.close(reader), os.close(writer)
    for action in termios.TCOOFF, termios.TCOON:
        with busybox.terminal("-t", "--stop-timeout", "0", "yes") as window:
            window.expect("y")
            termios.tcflow(window.slave, action)
            full = wait_until(lambda: not select.select([], [window.slave], [], 0)[1])  # noqa: B023
            window.process.send_signal(signal.SIGTERM)
            assert full and window.process.wait(PATIENCE) == 137
            termios.tcflow(window.slave, termios.TCOON)
    with busybox.terminal("-ti", "--stop-timeout", "0", *IDLE) as window:
        window.expect("localhost")
        os.close(window.master)
        window.master = None
        wait_until(lambda: window.process.poll() is not None, "run to end")
    for options in [], ["-t", "--stop-timeout", "0"]:
        process = busybox.popen(busybox.words("run", *busybox.options, *options, "yes"))
        process.stdout.read(1 << 16)
        process.stdout.close()
        process.stdout = None
        assert ended(process).status in (1, 128 + signal.SIGHUP, 128 + signal.SIGPIPE, 137), options


@once
def test_a_container_in_the_background_or_stopped_takes_no_line_typed_for_the_shell(busybox):
    def lines_for_the_shell_and_then_for_the_container(text):
        for number in range(5):
            desk.type(f"echo mine$(({number} + 10))\r", f"mine{number + 10}\r\n", "PROMPT> ")
        desk.type("kill -STOP %1; wait %1; fg\r")  # fg sends CONT to what bash knows to be stopped
        desk.type(f"{text}\r", f"GOT:{text}\r\n")
        desk.type("\x04", "PROMPT> ")

    need(shutil.which("bash"), "bash")
    shell, env = ["bash", "--norc", "--noediting", "-i"], {**os.environ, "PS1": "PROMPT> ", "HISTFILE": ""}
    pidfile = busybox.dir / "pid"
    reader = ("-i", "--stop-timeout", "0", *SH, "echo u''p; while read x; do echo GOT:$x; done")
    words = shlex.join(busybox.words("run", *busybox.options, "--pidfile", pidfile, *reader))
    with Terminal(shell, busybox.become, busybox.uid, cwd=busybox.dir, env=env) as desk:
        desk.expect("PROMPT> ")
        desk.type(f"{words} &\r")
        pid1 = wait_until(lambda: read(pidfile).strip(), "the pidfile")
        wait_until(lambda: read(f"/proc/{pid1}/cmdline").startswith("sh\0"), "the command to start")
        lines_for_the_shell_and_then_for_the_container("yours")
        desk.type(f"{words}\r", "up\r\n")
        desk.type("mine\r", "GOT:mine\r\n")
        desk.type("\x1a", "Stopped", "PROMPT> ")
        lines_for_the_shell_and_then_for_the_container("again")
        desk.type("exit\r")
        assert desk.end().status == 0


@once
def test_timeout_ends_a_container_with_a_terminal(busybox):
    """It is started in the background then, where a terminal stops who changes it."""
    words = shlex.join(busybox.words("run", *busybox.options, "-ti", "--stop-timeout", "0.2", *IDLE))
    script = busybox.path("script", f"timeout 2 {words}; echo status=$?\n")
    with Terminal(["bash", str(script)], busybox.become, busybox.uid, cwd=busybox.dir) as window:
        window.expect("status=124")
        assert window.end().status == 0 and window.attributes == window.before


@once
def test_own_lines_begin_at_the_left_while_the_terminal_is_raw(busybox):
    with busybox.terminal("-ti", "--explain", "--stop-timeout", "0", *IDLE) as window:
        before = window.expect("localhost")
        window.process.send_signal(signal.SIGTERM)
        out = before + window.end().out
    lines = [line for line in out.split("\n")[:-1] if line]
    assert "killed\r" in out and [line for line in lines if not line.endswith("\r")] == []


@once
def test_ctrl_c_ends_a_program_although_the_caller_ignores_it(busybox):
    pidfile = busybox.dir / "pid"
    with busybox.terminal("-ti", "--pidfile", pidfile, "sh", around=in_shell("trap '' INT")) as window:
        window.expect("# ")
        window.type("sleep 1000\r")
        wait_until(lambda: children(int(read(pidfile))), "sleep to start")
        window.type("\x03", "# ")
        window.type("exit 4\r")
        assert window.end().status == 4


# ---- Pipes, argv and statuses --------------------------------------------------------


@once
def test_100_mib_go_through_files_and_a_pipeline_of_containers_unchanged_and_nothing_without_i(busybox):
    source, target, block = busybox.dir / "source", busybox.dir / "target", os.urandom(MIB)
    with open(str(source), "wb") as file:
        file.writelines(block[number:] + block[:number] for number in range(100))
    words = busybox.words("run", "-i", *busybox.options, "cat")
    with open(str(source), "rb") as one, open(str(target), "wb") as other:
        first = busybox.popen(words, stdin=one)
        second = busybox.popen(words, stdin=first.stdout, stdout=other)
        first.stdout.close()
        first.stdout = None
        assert [ended(second), ended(first)] == [Result(0, "", "")] * 2
    assert target.read_bytes() == source.read_bytes()
    result = busybox(*SH, "cat; readlink /proc/self/fd/0; echo err >&2", data=b"secret")
    assert result == Result(0, "/dev/null\n", "err\n")


@once
def test_the_status_is_the_commands_own_or_128_and_the_number_of_the_signal(busybox, mydocker):
    for status in 0, 1, 2, 125, 126, 127, 128, 137, 255:
        assert busybox(*SH, f"exit {status}") == Result(status, "", "")
    with begun(busybox, *IDLE) as container:
        os.kill(container.pid1, signal.SIGKILL)
        assert container.end() == Result(128 + 9, "", "")
    source = "import ctypes; ctypes.string_at(0)"
    assert mydocker(PYTHON, "-c", source).status == 128 + signal.SIGSEGV


def test_a_command_that_cannot_start_is_126_and_one_that_is_not_there_127(busybox, mydocker):
    made = busybox.path("made")
    busybox.path("made/lost-interpreter", "#!/no/such/interpreter\n", 0o755)
    busybox.path("made/no-format", "\x7fno format", 0o755)
    busybox.path("made/empty", "", 0o755)
    busybox.path("made/tool", "#!/bin/sh\n", 0o644)
    busybox.path("made/script", "#!/bin/sh -e\necho $0 $1\n", 0o755)
    for command, status, said in [
        ("no-such-command", 127, "no-such-command"), ("/no/such/command", 127, "/no/such/command"),
        ("/etc/passwd/x", 127, "/etc/passwd/x"), ("/made/lost-interpreter", 127, "interpreter"),
        ("", 127, ""), ("/made", 126, "/made"), ("/made/no-format", 126, "/made/no-format"),
        ("/made/empty", 126, "/made/empty"), ("/made/tool", 126, "/made/tool"), ("tool", 126, "tool"),
    ]:  # fmt: skip
        words = ("-v", f"{made}:/made", "-e", "PATH=/bin:/made", command)
        assert said in refusal(busybox(*words), status), command
    for script in "./script", "/made/script":  # from the workdir, too
        assert busybox.out("-v", f"{made}:/made", "-w", "/made", script, "word") == f"{script} word\n"
    nothing = busybox._replace(options=("--rootfs", busybox.path("nothing")))
    assert "sh" in refusal(nothing("sh"), 127)
    for name in ("alpine", "ubuntu:22.04", "busybox:latest") if mydocker.uid == 0 else ():  # of an image
        said = refusal(mydocker(name, "sh", cwd="/"), 127)
        assert said.startswith(f"mydocker: {name}: command not found\n") and "--rootfs" in said


@once
def test_no_signal_but_hup_is_ignored_or_blocked_by_inheritance(busybox):
    """With SIGCHLD ignored the kernel tells no parent of an end; run() has the status even so."""
    for ignored, left in ("CHLD", 0), ("INT QUIT TERM USR1 PIPE", 0), ("INT HUP", 1):
        result = within(busybox, f"trap '' {ignored}; exec \"$@\"", *SH, "cat /proc/self/status; exit 5")
        assert (result.status, result.err) == (5, "")
        found = [int(status_field(result.out, name), 16) for name in ("SigIgn", "SigBlk")]
        assert found == [left << signal.SIGHUP - 1, 0], ignored


@root_only
def test_a_pipe_belongs_to_the_user_and_a_file_to_its_owner(busybox):
    script = "cat /dev/stdin; echo out >/dev/stdout; echo err >/dev/stderr"
    assert busybox("-i", "-u", "1000", *SH, script, data=b"in\n") == Result(0, "in\nout\n", "err\n")
    file = busybox.path("file", "", 0o600)
    with file.open("w") as stdout:
        assert busybox("-u", "1000", "echo", "x", stdout=stdout).status == 0
    assert (file.read_text(), file.stat().st_uid) == ("x\n", 0)


# ---- Signals and the end -------------------------------------------------------------

@once
@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_command_that_ends_on_request_is_not_killed_and_one_that_ignores_it_is(busybox, name):
    with begun(busybox, "--stop-timeout", "60", *SH, f"trap 'sleep 0.2; exit 4' {name}; {LOOP}") as container:
        container.send(signal.Signals[f"SIG{name}"])
        assert container.end() == Result(4, "", "")
    with begun(busybox, "--stop-timeout", "0.5", *IDLE) as container:
        begin = time.monotonic()
        container.send(signal.Signals[f"SIG{name}"])
        result = container.end()
        assert time.monotonic() - begin > 0.5
    assert result == Result(137, "", f"mydocker: SIG{name} did not end it within 0.5 s: killed\n")


@once
def test_a_second_request_kills_at_once(busybox):
    script = f"trap 'echo first' TERM INT HUP; {LOOP}"
    forever = "99999999"  # longer than the kernel can wait
    for first, second in ("TERM", "INT"), ("INT", "TERM"), ("HUP", "TERM"):
        with begun(busybox, "--stop-timeout", forever, *SH, script) as container:
            container.send(signal.Signals[f"SIG{first}"])
            assert container.line() == "first"
            container.send(signal.Signals[f"SIG{second}"])
            result = container.end()
        assert result == Result(137, "", f"mydocker: SIG{second}, the second signal: killed\n")


@once
def test_a_second_hangup_does_not_kill_and_under_nohup_it_stays_ignored(busybox):
    script = f"trap 'echo got' HUP; trap 'exit 6' USR1; {LOOP}"
    with begun(busybox, "--stop-timeout", "100000", *SH, script) as container:
        container.send(signal.SIGHUP)
        assert container.line() == "got"
        container.send(signal.SIGHUP)
        container.send(signal.SIGUSR1)
        result = container.end()
    assert (result.status, result.err) == (6, "")
    with begun(busybox, "--stop-timeout", "0", *SH, script, around=in_shell("trap '' HUP")) as container:
        container.send(signal.SIGHUP)
        container.send(signal.SIGUSR1)
        assert container.end() == Result(6, "", "")


@once
def test_a_signal_before_the_command_has_started_is_not_lost(busybox, mydocker):
    """A request to end, at some moment before or after; test_a_signal_at_any_call tries them all. Any other
    waits: it pends since before run began, and is blocked, so that the command can be seen to have it."""
    for _ in range(7):
        with busybox.start("--stop-timeout", "0", "sleep", "1000") as container:
            assert container.pid1
            container.send(signal.SIGTERM)
            assert container.end().status in (137, 143)
    numbers = signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT

    def become():
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:
            os.kill(os.getpid(), number)
        busybox.become()

    # no shell: busybox's of 2026 unblocks what it was started with
    source = f"import signal, time\nwhile signal.sigpending() != {set(map(int, numbers))}: time.sleep(0.02)"
    assert mydocker(PYTHON, "-c", source, preexec_fn=become, cwd="/").status == 0


def test_the_end_of_run_by_sigkill_is_the_containers_end(busybox):
    """A change of user clears PDEATHSIG, also when run dies meanwhile; strace gives the time for that."""
    for options in [(), *([] if busybox.uid else [("-u", "1000")])]:
        with begun(busybox, *options, *IDLE) as container:
            namespace = os.readlink(f"/proc/{container.pid1}/ns/pid")
            container.process.kill()
            container.process.wait()
            wait_until(lambda: not processes_in(namespace), "the container to die")  # noqa: B023
        busybox.out("true")  # sweeps the empty cgroup
    if busybox.uid == 0:
        slowly = injecting("setresuid", "delay_exit=1000000")
        with busybox.start("-u", "1000", "sleep", "1000", around=slowly) as container:
            status = f"/proc/{container.pid1}/status"
            namespace = os.readlink(f"/proc/{container.pid1}/ns/pid")
            wait_until(lambda: status_field(read(status), "Uid")[:4] == "1000", "the change of user")
            os.kill(int(status_field(read(status), "PPid")), signal.SIGKILL)
            wait_until(lambda: not processes_in(namespace), "the end of the container", seconds=10)
            container.pidfile.unlink()
        busybox.out("true")


@once
def test_children_end_with_the_command_and_do_not_hold_it_up(busybox):
    children = "sleep 1000 &\n(trap '' HUP TERM; setsid sleep 1000 &)"
    for options in [], ["-t"]:
        for last in "exit 3", "exec 1>&- 2>&-; exit 3":
            result = busybox(*options, *SH, f"readlink /proc/self/ns/pid\n{children}\n{last}")
            assert result.status == 3 and result.out.startswith("pid:"), (options, last)
            assert processes_in(result.out.strip()) == []


NOT_FORWARDED = "KILL STOP CHLD PIPE URG WINCH TSTP TTIN TTOU".split()
FORWARDED = sorted(signal.valid_signals() - {signal.Signals[f"SIG{name}"] for name in NOT_FORWARDED})
WAIT_FOR_SIGNALS = """import os, signal, sys
numbers = list(map(int, sys.argv[1:]))
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
os.write(1, b"ready\\n")
while True: os.write(1, b"%d\\n" % signal.sigwait(numbers))"""


@once
def test_every_signal_that_docker_forwards_arrives_and_some_are_no_request_to_end(mydocker):
    """All but a second request to end, which kills."""
    numbers = [int(number) for number in FORWARDED if number not in (signal.SIGTERM, signal.SIGINT)]
    assert {signal.SIGRTMIN, signal.SIGRTMAX} < set(numbers) and len(numbers) >= 50
    no_request = [int(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)]
    for seconds, tried in (0, no_request), (100000, numbers):
        words = ("--stop-timeout", seconds, PYTHON, "-c", WAIT_FOR_SIGNALS, *numbers)
        with begun(mydocker, *words, cwd="/") as container:
            for number in [*tried, *tried[:1]]:  # the countdown would be over
                container.send(number)
                assert container.line() == str(number)
            os.kill(container.pid1, signal.SIGKILL)
            result = container.end()
            assert result.status == 137 and "killed" not in result.err, result
            assert not container.pidfile.exists()


QUICK = [signal.Signals[f"SIG{name}"] for name in "KILL TERM HUP INT ALRM PWR".split()]
OTHERS = sorted(set(FORWARDED) - {*QUICK, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2})


@once
@pytest.mark.parametrize(
    "number", QUICK + [pytest.param(int(n), marks=slow) for n in OTHERS if not 36 < n < 63]
)
def test_no_signal_ends_run_alone_or_leaves_the_terminal_raw(busybox, number):
    pidfile, quick = busybox.dir / "pid", number in QUICK
    words = ("-ti", "--stop-timeout", "0" if quick else "100000", "--pidfile", pidfile, *IDLE)
    with busybox.terminal(*words) as window:
        window.expect("localhost")
        assert is_raw(window)
        run = window.process
        os.kill(int(read(pidfile)) if number == signal.SIGKILL else run.pid, number)
        for request in () if quick else (signal.SIGTERM, signal.SIGINT):  # be it the first or the second
            for sent in number, signal.SIGTERM:
                wait_until(lambda: run.poll() is not None or not signal_pending(run.pid, sent))  # noqa: B023
            run.send_signal(request)
            run.send_signal(signal.SIGCONT)
        assert window.end().status == 137
        assert window.attributes == window.before and not pidfile.exists()


# ---- Explain -------------------------------------------------------------------------


class Step(NamedTuple):
    """A line of --explain."""

    pid: int
    side: str
    call: str
    arguments: str
    result: str
    why: str


def steps(err):
    """The steps of an explained run, and the lines that are none."""
    pattern = re.compile(r"\[ *(\d+) (run|init) *\] (\w+)\((.*)\) = (.*?)\s+# (.+)")
    found = [(line, pattern.fullmatch(line)) for line in err.splitlines()]
    rest = [line for line, match in found if not match]
    return [Step(int(m[1]), *m.groups()[1:]) for _, m in found if m], rest


def test_explain_tells_the_story_on_both_sides_with_symbols_and_reasons_and_what_failed(busybox):
    result = busybox("--explain", "echo", "out")
    told, rest = steps(result.err)
    assert (result.status, result.out, rest) == (0, "out\n", [])
    assert [step for step in told if " " not in step.why] == []
    story = "prctl unshare mount pivot_root umount2 sethostname keyctl capset prctl execve"
    for side, names in ("run", "unshare fork"), ("init", story):
        calls = iter([step.call for step in told if step.side == side])
        assert all(call in calls for call in names.split())  # in this order, among others
    for symbol in ("CLONE_NEWPID", "CLONE_NEWNS", "MS_REC|MS_PRIVATE", "MNT_DETACH"):
        assert symbol in result.err
    for option, value, step in [
        ("-v", "/etc:/etc/passwd/x", r"openat2\(.* = -1 ENOTDIR "),
        ("--tmpfs", "/etc/passwd", r"mount\(.* = -1 ENOTDIR "),
        ("--pidfile", "/nonexistent/pid", r'open\("/nonexistent".* = -1 ENOENT '),
    ]:
        result = busybox("--explain", option, value, "true")
        assert re.search(step, result.err)
        (said,) = [line for line in steps(result.err)[1] if line.startswith("mydocker: ")]
        assert result.status == USAGE_ERROR and value.partition(":/")[2].partition("/x")[0] in said


def straced(caller, calls, *words):
    """How a run ended, and what strace saw of some calls of it, a line each."""
    need(shutil.which("strace"), "strace")
    log = caller.dir / "log"
    around = ["strace", "-f", "-qq", "-s", "200", "-o", str(log), "-e", f"trace={calls}"]
    return caller.under(around, *words), read(log).splitlines()


@root_only
def test_explain_tells_what_strace_sees_and_init_tells_its_own_failure(busybox):
    """And run only passes the status on. The limits are told as they are written."""
    calls = ["mount", "umount2", "pivot_root", "unshare", "sethostname", "capset"]
    result, lines = straced(busybox, ",".join(calls), "--explain", "-m", "100m", "true")
    told, _ = steps(result.err)
    seen = re.findall(r"^\d+ +(\w+)\(.*= 0$", "\n".join(lines), re.MULTILINE)
    assert [step.call for step in told if step.call in calls] == seen
    writes = [step for step in told if step.call == "write" and "104857600" in step.arguments]
    assert writes and writes[0].side == "run"
    result, lines = straced(busybox, "write", "no-such-command")
    assert "command not found" in refusal(result, 127)
    (writer,) = [line.split()[0] for line in lines if "write(" in line and "command not found" in line]
    assert writer != lines[0].split()[0]


@once
def test_a_message_is_one_line_and_speaks_to_no_terminal_whatever_the_name(busybox):
    """Bidirectional characters show another text than there is. The JSON log survives any."""
    result = busybox("no\nsuch\x1b]0;title\x07 \x9bcommand\x7f")
    said = r"mydocker: no\nsuch\x1b]0;title\x07 \x9bcommand\x7f: command not found"
    assert result == Result(127, "", said + "\n")
    process = busybox.popen([*busybox.words("run", *busybox.options), b"a\x9bb\x1b"])
    assert process.communicate()[1] == b"mydocker: a\\x9bb\\x1b: command not found\n"  # alone it is no UTF-8
    script = busybox.path("script", "#!/no\x1b[2Jwhere\n", 0o755)
    said = refusal(busybox("-v", f"{script}:/script", "/script"), 127)
    assert r"its interpreter, /no\x1b[2Jwhere, is not" in said
    for how in (), ("--log-format", "json"):
        said = busybox(*how, "a\u202e\u2066b\u200f\u061cc\u2028\u2029d").err
        assert not set("\u202e\u2066\u200f\u061c\u2028\u2029") & set(said)
        assert all(f"\\u{mark}" in said for mark in ("202e", "2066", "200f", "061c", "2028", "2029"))
    name = 'no "such"\\\n\x01\x1b\x9b\x7fcommand ü 🐳\U000e0001'
    (line,) = busybox("--log-format", "json", name).err.split("\n")[:-1]
    assert json.loads(line)["msg"] == f"mydocker: {name}: command not found"
    assert not {"\x1b", "\x9b", "\x7f"} & set(line)


@once
def test_the_json_log_is_an_object_a_line_like_the_books_with_level_and_side(busybox):
    for line, level, side in [
        ("true", "", ""), ("--explain true", "info", "run init"), ("-t true", "warning", "run"),
        ("-m lots true", "error", "run"), ("-v /nonexistent:/x true", "error", "run"),
        ("--upperdir /proc/nowhere true", "error", "run"), ("-v /etc/passwd:/etc true", "error", "init"),
        ("-v /etc:/etc/passwd true", "error", "init"), ("--tmpfs /mnt:size=lots true", "error", "init"),
        ("--tmpfs /etc/passwd true", "error", "init"), ("-w /etc/passwd/x true", "error", "init"),
        ("/etc", "error", "init"), ("no-such-command", "error", "init"),
    ]:  # fmt: skip
        words = line.split()
        result = busybox("--log-format", "json", *words)
        entries = [json.loads(entry) for entry in result.err.splitlines()]
        for entry in entries:
            assert set(entry) == {"time", "level", "msg", "source"}
            assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", entry["time"])
            narrated = re.match(r"\[ *\d+ (run|init)", entry["msg"])
            assert not narrated or entry["source"] == f"mydocker.py:{narrated[1]}"
            assert narrated or entry["msg"].startswith(("mydocker: ", "  hint: "))
        assert {entry["level"] for entry in entries} == ({level} if level else set()), line
        assert {entry["source"] for entry in entries} == {f"mydocker.py:{name}" for name in side.split()}
        if level == "error":
            assert [entry["msg"][:8] for entry in entries] in (["mydocker"], ["mydocker", "  hint: "])
            assert result.out == ""
            assert result.status == {"no-such-command": 127, "/etc": 126}.get(line, 125)
            assert any(part in entries[0]["msg"] for part in words[-2 if len(words) > 1 else 0].split(":"))


# ---- Init ----------------------------------------------------------------------------


# ---- Isolation -----------------------------------------------------------------------

DOCKERS_14 = 0xA80425FB  # see capabilities(7) for the bits
MKNOD = 1 << 27
CAPABILITY_SETS = ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb")


def capabilities(text):
    """Bounding, permitted, effective, inheritable and ambient, from /proc/PID/status."""
    return [int(status_field(text, name), 16) for name in CAPABILITY_SETS]


def test_by_default_there_are_dockers_14_capabilities_no_new_privileges_and_a_filter(busybox):
    """Without root it is 13: MKNOD is missing; root is the caller then, and no groups can be changed."""
    out = busybox.out("cat", "/proc/self/status")
    bounding, *others = capabilities(out)
    assert bounding | MKNOD == DOCKERS_14 and others == [bounding, bounding, 0, 0]
    assert (status_field(out, "NoNewPrivs"), status_field(out, "Seccomp")) == ("1", "2")
    if busybox.uid == 0:  # whom the bounding set leaves nothing, for he is not root
        assert capabilities(busybox.out("-u", "1:1", "cat", "/proc/self/status")) == [bounding, 0, 0, 0, 0]
    else:
        files = [f"/proc/self/{name}" for name in ("uid_map", "gid_map", "setgroups")]
        assert busybox.out("cat", *files).split() == ["0", str(busybox.uid), "1"] * 2 + ["deny"]


@root_only
def test_capabilities_are_added_and_dropped_and_none_and_no_group_of_the_callers_comes_in(busybox):
    ours = capabilities(read("/proc/self/status"))[0]
    for options, bits in [
        ("--cap-drop all", 0), ("--cap-add CAP_KILL --cap-drop ALL", 1 << 5), ("--cap-add ALL", -1),
        ("--cap-add cap_net_admin --cap-drop CHOWN", DOCKERS_14 & ~(1 << 0) | 1 << 12),
        ("--cap-drop CHOWN --cap-drop CAP_KILL", DOCKERS_14 & ~(1 << 0 | 1 << 5)),
        ("--cap-add ALL --cap-drop SYS_ADMIN", -1 & ~(1 << 21)), ("--privileged", -1),
    ]:
        found = capabilities(busybox.out(*options.split(), "cat", "/proc/self/status"))
        assert [value | MKNOD for value in found[:3]] == [bits & ours | MKNOD] * 3, options
        assert found[3:] == [0, 0]
    around = [SETPRIV, "--inh-caps", "+chown,+kill", "--ambient-caps", "+chown,+kill"]
    result = busybox.under(around, "cat", "/proc/self/status", preexec_fn=lambda: os.setgroups([4, 27]))
    assert (result.status, result.err, capabilities(result.out)[3:]) == (0, "", [0, 0])
    assert status_field(result.out, "Groups").split() == ["0"]
    around = [SETPRIV, "--bounding-set", "-sys_time"]  # and what he lacks cannot be added
    assert "--cap-add SYS_TIME" in refusal(busybox.under(around, "--cap-add", "SYS_TIME", "echo", "no"))


MACHINE = os.uname().machine
COLUMN = 0 if MACHINE == "x86_64" else 1
EPERM, ENOSYS = 1, 38
NEWUSER, SIGCHLD = 0x10000000, 17
HIGH = 1 << 32  # in an argument of 32 bits, a bit that the kernel ignores

#    AUDIT_ARCH_* of each machine, and the column of its numbers below
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1),
                 "riscv64": (0xC00000F3, 1), "loongarch64": (0xC0000102, 1)}  # fmt: skip
#    Docker's default profile turned around: what it does not allow, by the capabilities that bring it; a
#    name, the number on x86_64 and elsewhere. Written down here for a second time.
NOT_DOCKERS = {
    "SYS_ADMIN BPF": "bpf:321:280", "SYS_ADMIN PERFMON": "perf_event_open:298:241",
    "SYS_ADMIN SYSLOG": "syslog:103:116", "SYS_BOOT": "reboot:169:142", "SYS_PACCT": "acct:163:89",
    "SYS_ADMIN": """mount:165:40 umount2:166:39 setns:308:268 unshare:272:97 open_tree:428:428
        move_mount:429:429 fsopen:430:430 fsconfig:431:431 fsmount:432:432 fspick:433:433
        mount_setattr:442:442 quotactl:179:60 quotactl_fd:443:443 sethostname:170:161
        setdomainname:171:162 fanotify_init:300:262 lookup_dcookie:212:18 lsm_get_self_attr:459:459
        lsm_set_self_attr:460:460 lsm_list_modules:461:461 open_tree_attr:467:467 listns:470:470""",
    "SYS_MODULE": "init_module:175:105 finit_module:313:273 delete_module:176:106",
    "SYS_NICE": "mbind:237:235 set_mempolicy:238:237 get_mempolicy:239:236 set_mempolicy_home_node:450:450",
    "SYS_PTRACE": "kcmp:312:272 pidfd_getfd:438:438 process_madvise:440:440",
    "SYS_RAWIO": "iopl:172:- ioperm:173:-", "SYS_TIME": "settimeofday:164:170 clock_settime:227:112",
    "SYS_TTY_CONFIG": "vhangup:153:58", "DAC_READ_SEARCH": "open_by_handle_at:304:265",
    "": """pivot_root:155:41 add_key:248:217 request_key:249:218 keyctl:250:219 userfaultfd:323:282
        io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427 kexec_load:246:104
        kexec_file_load:320:294 swapon:167:224 swapoff:168:225 move_pages:279:239 migrate_pages:256:238
        uselib:134:- ustat:136:- sysfs:139:- _sysctl:156:-""",
}  # fmt: skip
NEWEST, GAP = 471, {0: range(336, 424), 1: range(295, 424)}  # what nobody has looked at is unknown
#    Judged by an argument: the numbers, its place, what is refused, what is not
BY_ARGUMENT = {
    "clone": ((56, 220), 0, [NEWUSER | SIGCHLD, HIGH | NEWUSER, *(1 << n for n in (17, 25, 26, 27, 29, 30))],
              [SIGCHLD, 0x3D0F00, NEWUSER << 32]),
    "socket": ((41, 198), 0, [38, 40, HIGH | 40], [1, 2, 10, 16, 17]),  # AF_ALG, AF_VSOCK
    "personality": ((135, 92), 0, [0x0040000, 1], [0, 8, 0x20000, 0x20008, 0xFFFFFFFF]),
    "ioctl": ((16, 29), 1, [0x5412, HIGH | 0x5412, 0x541C], [0x5401, 0x5413]),  # TIOCSTI, TIOCLINUX
}  # fmt: skip


@pytest.fixture(params=ARCHITECTURES)
def answer(request, monkeypatch):
    """What the filter answers on a machine, by carrying it out: an errno, or 0 when it lets the call through.

    See <linux/bpf_common.h>, and struct seccomp_data of <linux/seccomp.h>."""
    uname = os.uname_result((*os.uname()[:4], request.param))
    monkeypatch.setattr(os, "uname", lambda: uname)
    programs, module = {}, load_program()

    def carry_out(number, *words, kept="", architecture=ARCHITECTURES[request.param][0]):
        if kept not in programs:
            programs[kept] = list(struct.iter_unpack("HBBI", module.seccomp_filter({kept} - {""})))
        data = struct.pack("IIQ6Q", number, architecture, 0, *words, *[0] * (6 - len(words)))
        at = value = 0
        while True:
            code, if_true, if_false, operand = programs[kept][at]
            at += 1
            if code == 0x20:
                (value,) = struct.unpack_from("I", data, operand)
            elif code == 0x06:
                return {0x7FFF: 0, 0x0005: operand & 0xFFFF}[operand >> 16]
            else:
                holds = {0x15: value == operand, 0x35: value >= operand, 0x45: value & operand}[code]
                at += if_true if holds else if_false

    carry_out.column = ARCHITECTURES[request.param][1]
    return carry_out


def test_the_filter_refuses_what_dockers_refuses_and_nothing_else(answer):
    """It looks at numbers, arguments and architectures."""
    for kept in ["", *sorted({word for row in NOT_DOCKERS for word in row.split()})]:
        expected = dict.fromkeys([*GAP[answer.column], *range(NEWEST + 1, 600)], ENOSYS)
        if kept != "SYS_ADMIN":
            expected[435] = ENOSYS  # clone3 has its flags behind a pointer: libc falls back to clone
        for names, calls in NOT_DOCKERS.items():
            numbers = [call.split(":")[1 + answer.column] for call in calls.split()]
            if kept not in names.split():
                expected.update((int(number), EPERM) for number in numbers if number != "-")
        answers = {number: answer(number, kept=kept) for number in range(600)}
        assert {number: error for number, error in answers.items() if error} == expected, kept
    for name, (numbers, place, refused, allowed) in BY_ARGUMENT.items():
        for value in refused + allowed:
            words = [0] * place + [value]
            assert answer(numbers[answer.column], *words) == EPERM * (value in refused), (name, value)
    assert answer(BY_ARGUMENT["clone"][0][answer.column], NEWUSER, kept="SYS_ADMIN") == 0
    getpid = 39, 172
    assert answer(getpid[answer.column]) == 0
    assert answer(0x40000000 | 39) == ENOSYS  # x32
    assert answer(20, architecture=0x40000003) == answer(20, architecture=0x40000028) == ENOSYS  # i386, arm


#    name, numbers, arguments, error; without the filter the error of these arguments is another one, even
#    for a process with every capability
TRIED = [
    ("mount", (165, 40), (1, 1, 1, 0, 0), EPERM), ("clone3", (435, 435), (0, 0), ENOSYS),
    ("ioctl", (16, 29), (-1, 0x5412, 0), EPERM), ("bpf", (321, 280), (-1, 0, 0), EPERM),
    ("keyctl", (250, 219), (-1,), EPERM), ("getpid", (39, 172), (), 0),
    ("unshare", (272, 97), (NEWUSER,), EPERM),  # last: it changes the answers to the others
]  # fmt: skip
TRY = """if 1:
    import ctypes, json, sys
    libc, answers = ctypes.CDLL(None, use_errno=True), {}
    for name, numbers, words, _ in json.loads(sys.argv[1]):
        ctypes.set_errno(0)
        result = libc.syscall(*map(ctypes.c_long, [numbers[int(sys.argv[2])], *words]))
        answers[name] = ctypes.get_errno() if result == -1 else 0
    print(json.dumps(answers))"""


def test_the_filter_is_in_force(mydocker):
    words = (PYTHON, "-c", TRY, json.dumps(TRIED), COLUMN)
    assert json.loads(mydocker(*words).out) == {call[0]: call[3] for call in TRIED}
    if mydocker.uid == 0:
        without = json.loads(mydocker("--privileged", *words).out)
        assert [call[0] for call in TRIED if call[3] and without[call[0]] == call[3]] == []
        some = json.loads(mydocker("--cap-add", "SYS_ADMIN", *words).out)
        assert [call[0] for call in TRIED if call[3] and some[call[0]] == call[3]] == ["ioctl", "keyctl"]
        mydocker.out("--cap-add", "SYS_ADMIN", "mount", "-t", "tmpfs", "tmpfs", "/mnt")


@once
def test_ordinary_programs_run_under_the_filter_and_the_32_bit_entry_is_closed(mydocker):
    source = "import subprocess as s, threading as t; t.Thread(target=s.run, args=[['echo', 'ok']]).start()"
    assert mydocker(PYTHON, "-c", source)[:2] == (0, "ok\n")
    need(shutil.which("dpkg") and shutil.which("apt-cache"), "dpkg and apt")
    script = "dpkg --version | cat >/dev/null && apt-cache policy >/dev/null && echo ok"
    assert mydocker(*SH, script)[:2] == (0, "ok\n")
    if MACHINE != "x86_64":
        pytest.skip("only x86_64 has the other entry")
    source = """if 1:
        import ctypes, mmap
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, getpid; int 0x80; ret
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())"""
    on_host = ended(subprocess.Popen([PYTHON, "-c", source], stdout=subprocess.PIPE))
    result = mydocker(PYTHON, "-c", source)
    if on_host.status:  # the kernel has no such entry
        assert result.status == 128 + signal.SIGSEGV
    else:
        assert result[:2] == (0, f"-{ENOSYS}\n") and on_host.out != result.out


def test_the_masked_paths_are_empty_and_what_rules_the_host_cannot_be_written(busybox, mydocker):
    masked = """/proc/acpi /proc/asound /proc/interrupts /proc/kcore /proc/keys /proc/latency_stats
        /proc/sched_debug /proc/scsi /proc/timer_list /proc/timer_stats /sys/firmware
        /sys/devices/virtual/powercap""".split()
    assert sorted(load_program().MASKED_PATHS) == sorted(masked)
    script = """for path in "$@"; do
        if test -d $path; then ls -A $path; elif test -e $path; then head -c 9 $path; fi; done"""
    assert busybox.out(*SH, script, "sh", *masked, "/sys/devices/system/cpu/cpu*/thermal_throttle") == ""
    rules = """/proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe /proc/sys/kernel/hostname
        /proc/sysrq-trigger /proc/sys/vm/drop_caches /proc/irq/default_smp_affinity /sys/kernel/uevent_helper
        /sys/kernel/mm/ksm/run /proc/sys/fs/binfmt_misc/register /sys/fs/cgroup/*/release_agent
        /sys/fs/cgroup/*/cgroup.procs /sys/fs/cgroup/cgroup.procs /sys/power/state /proc/bus/pci/devices"""
    script = f"""cat /proc/self/mountinfo; echo end
        for file in {" ".join(rules.split())}; do test -e $file && : >>$file && echo $file; done; :"""
    table, _, written = busybox(*SH, script).out.partition("end\n")
    assert written == ""
    for path in filter(os.path.exists, "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()):
        assert {"ro", "nosuid", "nodev", "noexec"} <= mounts(table)[path].options
    source = """if 1:
        import os
        for top in "/proc/sys", "/sys":
            for parent, _, files in os.walk(top):
                for file in files:
                    try:
                        os.close(os.open(os.path.join(parent, file), os.O_WRONLY))
                        print(os.path.join(parent, file))
                    except OSError:
                        pass
        print("looked")"""
    assert mydocker(PYTHON, "-c", source).out == "looked\n"


def block_device():
    """Major and minor of a block device that root of the host can open."""
    for name in sorted(os.listdir("/dev")):
        status = os.stat(f"/dev/{name}")
        with contextlib.suppress(OSError):
            if stat.S_ISBLK(status.st_mode):
                os.close(os.open(f"/dev/{name}", os.O_RDONLY))
                return os.major(status.st_rdev), os.minor(status.st_rdev)
    return pytest.skip("this machine lets root open no block device")


@root_only
@pytest.mark.parametrize("options", [[], ["--cap-add", "ALL"]], ids=["default", "all"])
def test_no_disk_can_be_opened_whatever_node_is_made(account, options):
    major, minor = block_device()
    layer, caller = image(account)
    os.mknod(str(layer / "disk"), stat.S_IFBLK | 0o666, os.makedev(major, minor))
    volume = account.path("volume")
    tmpfs = ("--tmpfs", "/tmpfs", "--tmpfs", "/t:dev", "--tmpfs", "/u:dev,suid,exec")
    script = f"""for place in /dev /dev/shm /tmp /volume /tmpfs /t /u; do
            mknod $place/disk b {major} {minor}; test -b $place/disk && (exec 3<$place/disk) && echo $place
        done
        (exec 3</disk) && echo image; rm /disk; mknod /disk b {major} {minor}; exec 3</disk; echo root"""
    result = caller(*options, "-v", f"{volume}:/volume", *tmpfs, *SH, script)
    assert result.status != 0 and result.out == ""


@root_only
def test_a_privileged_container_has_all_of_that(busybox):
    script = """cat /proc/self/status /proc/self/mountinfo
        for file in /proc/sys/kernel/hostname /sys/kernel/mm/ksm/run; do : >>$file || exit; done"""
    out = busybox.out("--privileged", *SH, script)
    assert status_field(out, "Seccomp") == "0"
    masks = ("/proc/", "/sys/firmware", "/sys/devices")
    assert [line for line in out.splitlines() if " - " in line and line.split()[4].startswith(masks)] == []
    major, minor = block_device()
    script = f"mknod /disk b {major} {minor}; exec 3</disk; echo opened"
    assert busybox.out("--privileged", *SH, script) == "opened\n"


def test_a_container_cannot_make_another_unless_it_is_privileged(mydocker):
    program = mydocker.dir / PROGRAM.name  # in /tmp it would not be seen
    shutil.copy(str(PROGRAM), str(program))
    words = (PYTHON, program, "run", "echo", "inner")
    result = mydocker(*words, cwd="/")
    assert result.status == 125
    assert "unshare(CLONE_NEW" in result.err and "--privileged" in result.err
    if mydocker.uid == 0:
        assert mydocker.out("--privileged", *words, cwd="/") == "inner\n"
        again, script = (PYTHON, program, "run"), "touch /x || touch /tmp/x && ls /tmp; stat -c %a /tmp"
        third = mydocker("--privileged", *again, "--privileged", *again, *SH, script, cwd="/")
        assert (third.status, third.out) == (0, "x\n1777\n")
        assert "overlay does not take the host's /" in third.err and "Read-only file system" in third.err


@once
def test_no_descriptor_and_no_variable_of_the_caller_reaches_the_command(busybox):
    environment = {**os.environ, "SECRET": "of the caller"}
    directory = os.open("/etc", os.O_RDONLY)
    try:
        os.set_inheritable(directory, True)
        how = {"close_fds": False, "env": environment}
        seen = [busybox.out(*SH, "ls /proc/1/fd; :", **how).split()]
        with busybox.terminal("-t", *SH, "ls /proc/1/fd; :", **how) as window:
            seen.append(window.end().out.split())
    finally:
        os.close(directory)
    assert seen == [["0", "1", "2"]] * 2
    script = "cat /proc/1/cmdline /proc/1/comm; env; tr '\\0' '\\n' </proc/1/environ"
    out = busybox.out(*SH, script, env=environment).lower()
    assert "secret" not in out and "python" not in out and "mydocker" not in out


def test_no_directory_that_init_opens_is_a_way_out_for_the_workdir_or_the_command(busybox):
    """CVE-2024-21626: the kernel looks for the command before it closes what is close-on-exec."""
    paths = "/ /.. /../.. /proc/1/root /proc/1/cwd /proc/self/root"
    assert busybox.out(*SH, f"stat -L -c %d:%i {paths} | uniq | wc -l") == "1\n"
    for number in 3, 5, 8, 12:
        for path in f"/proc/self/fd/{number}", f"/proc/self/fd/{number}/../../etc":
            assert "workdir" in refusal(busybox("-w", path, *SH, "pwd -P; ls /"))
    outside, layer, volume = busybox.dir / "outside", busybox.path("layer"), busybox.path("volume")
    shutil.copy(str(busybox.rootfs / "bin/busybox"), str(outside))
    for number in range(3, 40):
        (layer / str(number)).mkdir()
        (layer / str(number) / "echo").symlink_to(f"/proc/self/fd/{number}/../outside")
    path = ":".join(f"/{number}" for number in range(3, 40))
    for options in (), ("-t",), () if busybox.uid else ("-u", "nobody"):
        options = (*options, "--rootfs", layer, "-v", f"{volume}:/volume")
        results = [busybox(*options, "-e", f"PATH={path}", "echo", "outside")]
        results += [busybox(*options, f"/{number}/echo", "outside") for number in (3, 5, 8, 12)]
        assert [r for r in results if r.status not in (126, 127) or "outside\n" in r.out] == [], options


@root_only
def test_the_session_keyring_is_new_where_the_kernel_has_keys(mydocker):
    session = f"import ctypes; print(ctypes.CDLL(None).syscall({(250, 219)[COLUMN]}, 0, -3, 0))"
    host = subprocess.check_output([PYTHON, "-c", session]).decode()
    inside = mydocker.out("--privileged", PYTHON, "-c", session)
    assert int(inside) > 0 and inside != host
    result = mydocker.under(injecting("keyctl", "error=ENOSYS"), "echo", "fine")
    assert result == Result(0, "fine\n", "")


@once
def test_abstract_sockets_and_shared_memory_of_the_host_are_not_there(mydocker):
    need(shutil.which("ipcmk"), "ipcmk (util-linux)")
    name = f"\0mydocker-test-{os.getpid()}"
    source = """if 1:
        import socket, sys
        try:
            socket.socket(socket.AF_UNIX).connect("\\0" + sys.argv[1])
            print("reached")
        except OSError:
            print("not there", len(open("/proc/sysvipc/shm").readlines()))"""
    made = subprocess.check_output(["ipcmk", "-M", "4096"]).split()[-1].decode()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen(1)
        result = mydocker(PYTHON, "-c", source, name[1:])
    subprocess.run(["ipcrm", "-m", made], check=True)
    assert result.out == "not there 1\n"


SELVES = ["/proc/self/exe", "/proc/1/exe", "/proc/thread-self/exe", "/link"]
LEADS_OUT = "leads to the program that runs mydocker: refused"


def test_the_hosts_python_is_no_command_and_no_interpreter(account):
    """CVE-2019-5736: it would run in here, with a loader from in here."""
    layer, caller = image(account)
    (layer / "link").symlink_to("/proc/self/exe")
    account.path("image/script2", "#!/script1\n", 0o755)
    for path in SELVES:
        account.path("image/script1", f"#!{path} -c\nprint('ran')\n", 0o755)
        for words in (path, "-c", "print('ran')"), ["/script1"], ["/script2"]:
            assert LEADS_OUT in refusal(caller(*words), 126)


@once
def test_a_first_line_is_split_as_the_kernel_splits_it(account):
    """At spaces and tabs, until a NUL. Split in another way, the link is overlooked."""
    layer, caller = image(account)
    shutil.copy(str(account.rootfs / "bin/busybox"), str(layer / "a"))
    for link in "a\vb", "a\fb", "a\r", "a2":
        (layer / link).symlink_to("/proc/self/exe")
    script = account.path("image/script", "", 0o755)
    for line in "#!/a\vb", "#!/a\fb", "#!/a\r", "#!/a2\0b", "#! \t/a2\tb":
        script.write_text(f"{line}\n")
        assert LEADS_OUT in refusal(caller("/script"), 126), ascii(line)
    account.path("image/other", "#!/bin/sh\0-no-such-option\necho ran\n", 0o755)
    assert caller.out("/other") == "ran\n"


@root_only
def test_a_script_that_cannot_be_read_is_looked_at_and_no_file_of_the_kernels_is(account):
    """The kernel needs no leave to read its first line."""
    layer, caller = image(account)
    script = account.path("image/script", "#!/proc/self/exe\n", 0o111)
    os.chown(str(script), 1, 1)
    for options in "--cap-drop ALL", "--cap-drop DAC_OVERRIDE", "-u 1000":
        assert LEADS_OUT in refusal(caller(*options.split(), "/script"), 126)
    shutil.copy(str(account.rootfs / "bin/busybox"), str(layer / "echo"))
    (layer / "echo").chmod(0o111)
    assert caller.out("-u", "1000", "/echo", "ran") == "ran\n"
    account.path("image/log", "#!/proc/kmsg\n", 0o755)  # its reader takes what others are to have
    result, lines = straced(caller, "open,openat,openat2", "/log")
    refusal(result, 126)
    assert [line for line in lines if "kmsg" in line and "O_PATH" not in line] == []


# What a hostile image would have for Python's standard library. It runs before anything else of
# Python does, so only if mydocker has executed the host's interpreter in the container.
HOSTILE_LIBRARY = """if 1:
    import posix
    posix.write(1, b"the host's Python runs in here\\n")
    held = posix.open("/proc/self/exe", posix.O_RDONLY)
    for path in "/proc/self/exe", "/proc/1/exe", "/proc/self/fd/%d" % held:
        try:
            posix.write(posix.open(path, posix.O_WRONLY), b"hostile")
            posix.write(1, b"and was written to by %s\\n" % path.encode())
        except OSError as error:
            posix.write(1, b"%s: %s\\n" % (path.encode(), error.strerror.encode()))
    posix._exit(0)"""


@pytest.fixture
def hostile(account):
    """A rootfs that the host's Python would run in, with libraries that write to its file."""
    own = account.dir / "python"  # a copy: the test is to be safe when the protection is not
    shutil.copy(PYTHON, str(own))
    layer = account.path("hostile")
    facts = "import sys; print('usr/lib/python%d.%d' % sys.version_info[:2])"
    library = layer / subprocess.check_output([PYTHON, "-c", facts]).decode().strip()
    for path in re.findall(r"(/\S+) \(", subprocess.check_output(["ldd", PYTHON]).decode()):
        (layer / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, str(layer / path[1:]))
    (library / "encodings").mkdir(parents=True)
    (library / "os.py").write_text("")
    (library / "encodings/__init__.py").write_text(HOSTILE_LIBRARY)
    script = layer / "script"
    script.write_text("#!/proc/self/exe\n")
    script.chmod(0o755)
    subprocess.run(["chown", "-R", f"{account.uid}:{account.uid}", str(account.dir)], check=True)
    options = ("--rootfs", account.rootfs, "--rootfs", layer)
    before = own.read_bytes()
    yield Caller(account.uid, str(own), account.dir, account.rootfs, options)
    assert own.read_bytes() == before, "the Python that runs mydocker was written to"


def test_a_hostile_image_cannot_write_to_the_python_that_runs_mydocker(hostile):
    """Nor can a child that holds the exe of PID 1, while the container lives and after, when a SIGKILL of run
    has left the child no time: that is a file of the container."""
    for words in ["/proc/self/exe"], ["/script"], ["-t", "/proc/self/exe"], ["-t", "/script"]:
        result = hostile(*words)
        assert result.status in (125, 126) and result.out == "", result
    shutil.copy(hostile.python, str(hostile.dir / "hostile/python"))  # it would: with a file of its own
    lines = hostile("/python").out.splitlines()
    assert lines[0] == "the host's Python runs in here" and len(lines) == 4, lines
    script = """
        (exec 9</proc/1/exe; cmp /proc/1/exe /bin/busybox && echo its own
         while :; do echo hostile >/proc/1/exe; echo hostile >/proc/self/fd/9; done 2>/dev/null) &
        wait"""
    with hostile.start(*SH, script) as container:
        assert container.line() == "its own"
        namespace = os.readlink(f"/proc/{container.pid1}/ns/pid")
        container.send(signal.SIGKILL)
        wait_until(lambda: not processes_in(namespace), "the end of the container")
    hostile.out("true")  # sweeps the empty cgroup


@root_only
def test_a_command_that_becomes_the_hosts_python_past_the_check_is_killed(hostile):
    """By a script that is exchanged after it; strace gives the time for that."""
    (library,) = hostile.dir.glob("hostile/usr/lib/python*/encodings/__init__.py")
    library.write_text("while True: pass")
    script = hostile.path("script", "#!/bin/sh\n", 0o755)
    other = hostile.path("other", "#!/proc/self/exe\n", 0o755)
    slowly = injecting("capset", "delay_enter=4000000")
    with hostile.start("-v", f"{hostile.dir}:/dir", "/dir/script", around=slowly) as container:
        status = f"/proc/{container.pid1}/status"
        wait_until(lambda: capabilities(read(status))[0] == DOCKERS_14, "init to come to capset")
        other.rename(script)
        wait_until(lambda: container.process.poll() is not None, "the end of it")
        said = refusal(container.end(), 137)
    assert said == "mydocker: the command became the program that runs mydocker: killed\n"


UP = "../" * 20
HOSTILE_PLACES = {  # what they are: links, or else what is written there
    "dev": "/", "volume": UP, "etc/hosts": "{victim}", "work": "{victim}", "sys": UP + "{victim}",
    "etc": UP + "{victim}", "etc/resolv.conf": UP + "{victim}", "volume/below": UP + "{victim}",
    "proc": "/proc/self/root", "etc/group": "/proc/self/root", "tmpfs": "/proc/self/root", "run": "run",
    "tmp": "no/where", "dev/pts": "a fifo", "etc/passwd": "a fifo", "etc/hostname": "a fifo",
    "dev/shm": "a file",
}  # fmt: skip


@pytest.mark.parametrize("place", HOSTILE_PLACES)
def test_a_hostile_rootfs_cannot_lead_us_out(account, place):
    hostile, victim, source = (account.path(name) for name in ("hostile", "victim", "source"))
    (victim / "precious").write_text("gold")
    (hostile / place).parent.mkdir(exist_ok=True)
    what = HOSTILE_PLACES[place].format(victim=victim)
    if what == "a fifo":
        os.mkfifo(str(hostile / place))
    elif what == "a file":
        (hostile / place).write_text("")
    else:
        (hostile / place).symlink_to(what)
    before = tree(victim), tree(hostile), tree(source)
    options = f"""--network host -u 0:0 -v {source}:/volume/below -w /work/place
        --tmpfs /tmpfs --rootfs {account.rootfs} --rootfs {hostile}""".split()
    result = account(*options, "/bin/true")
    if place in ("proc", "sys", "dev"):
        said = refusal(result)
        assert f"/{place}" in said and "link" in said
    elif result.status:
        refusal(result)
    else:
        assert result.err == ""
    assert (tree(victim), tree(hostile), tree(source)) == before


@once
def test_users_are_looked_up_in_files_that_are_some(account):
    """/proc/kmsg has its reader wait, and takes the host's messages from who is to have them."""
    layer, caller = image(account)
    many = "".join(f"g:x:{number}:root\n" for number in range(1, 65600))
    for name, content, said in [
        ("passwd", Path("/proc/version"), "/etc/passwd in the container is not a regular file"),
        ("group", Path("/proc/version"), "/etc/group in the container is not a regular file"),
        ("passwd", (64 << 20) + 1, "at most 64 MiB"), ("group", many, "more than 65536 groups"),
        ("passwd", "root:x:0:nonsense:::/bin/sh\n", "--user 0: no such group"),
        ("passwd", "root:x:0:0:r:/ro\0ot:/bin/sh\n", ""),
    ]:  # fmt: skip
        file = layer / "etc" / name
        if isinstance(content, Path):
            file.symlink_to(content)
        else:
            file.write_text(content if isinstance(content, str) else "")
            os.truncate(str(file), content if isinstance(content, int) else file.stat().st_size)
        options = ("-u", "root" if content == many else "0")
        if said:
            assert said in refusal(caller(*options, "true"))
        else:
            assert caller.out(*options, *SH, "echo $HOME") == "/\n"
        file.unlink()


def test_what_mydocker_relies_on_cannot_be_mounted_over(account):
    """On the root it would be detached in place of the host's, which "/.." would then lead to."""
    layer, caller = image(account)
    volume = account.path("volume")
    (layer / "x").mkdir()
    for kind, target, text in [
        ("volume", "/link", "/"), ("volume", "/link", "/proc"), ("volume", "/x/../link", "/proc/self"),
        ("tmpfs", "/x/../link", "/"), ("tmpfs", "/link", "/proc"), ("tmpfs", "/link", "/sys/fs/cgroup"),
    ]:  # fmt: skip
        (layer / "link").symlink_to(text)
        option = ("--tmpfs", target) if kind == "tmpfs" else ("-v", f"{volume}:{target}")
        said = refusal(caller(*option, "ls", "/.."))
        assert f"--{kind}" in said and "refused" in said, (kind, text)
        (layer / "link").unlink()


def test_no_file_of_the_host_takes_the_place_of_what_mydocker_opens_itself(busybox):
    """They are open when a volume covers them: the command does not get the file as stdin or terminal."""
    file, directory = busybox.path("file", "of the host\n"), busybox.path("directory")
    script = "cat <&0; echo end; [ -t 1 ] && echo terminal; :"
    for source, target, options in [
        (file, "/dev/null", []), (file, "/dev/null", ["-t"]), (file, "/dev/pts/0", ["-t"]),
        (directory, "/dev/pts", ["-t"]),
    ]:  # fmt: skip
        result = busybox(*options, "-i", "-v", f"{source}:{target}", *SH, script)
        assert result.status == 0 and "of the host" not in result.out, (target, options)
        assert ("terminal" in result.out) == bool(options)
    for options in [[], ["-t"], ["--privileged"]] if busybox.uid == 0 else []:
        out = busybox(*options, "-i", "-v", "/dev:/dev", *SH, "cat <&0 && echo fine").out
        assert out.splitlines()[-1] == "fine"


def test_a_volume_cannot_be_led_out_by_a_link_in_another_volume(busybox):
    """CVE-2021-30465."""
    one, two, victim = (busybox.path(name) for name in ("one", "two", "victim"))
    (one / "link").symlink_to(f"{'../' * 20}{victim}")
    (two / "file").write_text("")
    volumes = ("-v", f"{one}:/one", "-v", f"{two}:/one/link/place")
    result = busybox(*volumes, *SH, "ls /one/link/place")
    if result.status:
        refusal(result)
    else:
        assert result.out == "file\n"
    assert os.listdir(str(victim)) == []


def test_security_opt_turns_off_what_it_names(busybox, mydocker):
    for words, found in (
        (["no-new-privileges=false"], ("0", "2")), (["seccomp=unconfined"], ("1", "0")),
        (["label=disable", "label=type:container_t", "apparmor=unconfined"], ("1", "2")),
    ):  # fmt: skip
        out = busybox.out(*(f"--security-opt={word}" for word in words), "cat", "/proc/self/status")
        assert (status_field(out, "NoNewPrivs"), status_field(out, "Seccomp")) == found
    if mydocker.uid == 0:  # so a setuid program works
        mydocker.dir.chmod(0o755)
        program = mydocker.dir / "suid-id"
        shutil.copy(shutil.which("id"), str(program))
        program.chmod(0o4755)
        words = ("-u", "1000:1000", program, "-u")
        assert mydocker.out(*words) == "1000\n"
        assert mydocker.out("--security-opt", "no-new-privileges=false", *words) == "0\n"


INTRUDER = "print('code from beside the script')\nraise SystemExit(77)\n"
MODULES = "ctypes fcntl json select signal struct termios errno stat time pty tty socket random array".split()


@once
@pytest.mark.parametrize("how", ["script", "link", "module"])
def test_nothing_beside_the_script_or_in_the_current_directory_is_part_of_it(busybox, how):
    place, here = busybox.path("place"), busybox.path("here")
    shutil.copy(str(SOURCE), str(place / "mydocker.py"))
    (here / "link").symlink_to(place / "mydocker.py")
    script = {"script": [place / "mydocker.py"], "link": ["./link"], "module": ["-m", "mydocker"]}[how]
    for name in MODULES[:3] if how == "module" else MODULES:  # runpy, which is not ours, imports some
        for directory in [here] if how == "module" else [here, place]:
            (directory / f"{name}.py").write_text(INTRUDER)
    environment = {**os.environ, "PYTHONPATH": str(place) if how == "module" else ""}
    words = [busybox.python, *map(str, script), "run", "-t", "--log-format", "json", "--explain"]
    result = ended(busybox.popen([*words, *busybox.options, "echo", "fine"], cwd=here, env=environment))
    assert result[:2] == (0, "fine\r\n")


def tiny_program(text):
    """An ELF file for x86_64 that writes a text and ends: program and interpreter of others."""
    need(os.uname().machine == "x86_64", "x86_64")
    code = b"\xb8\1\0\0\0\xbf\1\0\0\0\x48\x8d\x35\x10\0\0\0\xba" + struct.pack("<I", len(text))
    code += b"\x0f\x05\xb8\x3c\0\0\0\x31\xff\x0f\x05" + text  # write(1, text, len(text)); exit(0)
    size = 64 + 56 + len(code)
    head = b"\x7fELF\2\1\1" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, size, size, 4096) + code


@root_only
@pytest.mark.parametrize("kind", ["script", "link"])
@slow
def test_the_hosts_python_is_held_before_its_first_instruction(busybox, kind):
    """Its command is exchanged all the while for /proc/self/exe, and the image has the dynamic linker."""
    held = b"the host's Python runs in here\n"
    elf = tiny_program(held)
    layer, shared = busybox.path("layer"), busybox.path("shared")
    linker = re.search(r"(/lib\S+/ld-linux\S+)", subprocess.check_output(["ldd", PYTHON]).decode()).group(1)
    (layer / linker[1:]).parent.mkdir(parents=True)
    for path in layer / linker[1:], layer / "tiny":
        path.write_bytes(elf)
        path.chmod(0o755)
    words = ("--rootfs", layer, "-v", f"{shared}:/v")
    assert busybox.out(*words, "/tiny").encode() == held  # it does run
    busybox.path("shared/one", "#!/bin/busybox echo\n", 0o755)
    if kind == "script":
        busybox.path("shared/two", "#!/proc/self/exe\n", 0o755)
    else:
        (shared / "two").symlink_to("/proc/self/exe")
    with exchanging(shared / "one", shared / "two"):
        results = crowd(busybox, [(*words, "/v/one")] * 40, at_once=2)
    assert {result.status for result in results} <= {0, 126, 137}, results
    assert [result for result in results if held.decode() in result.out] == []


# ---- Ordinary user -------------------------------------------------------------------


@user_only
def test_an_ordinary_user_has_limits_where_a_cgroup_is_delegated_and_is_told_the_way_where_not(busybox):
    if os.geteuid() == 0:  # to a session of this user one may be
        said = refusal(busybox("-m", "50m", "true"))
        assert "--memory" in said and "systemd-run --user --scope -p Delegate=yes" in said
        return
    scope = ["systemd-run", "--user", "--scope", "--quiet", "-p", "Delegate=yes"]
    if not shutil.which(scope[0]) or subprocess.call([*scope, "true"]):
        pytest.skip("a session of systemd as an ordinary user")
    files = [f"/sys/fs/cgroup/{name}" for name in ("memory.max", "pids.max", "cpu.max")]
    result = busybox.under(scope, "-m", "50m", "--pids-limit", "9", "--cpus", "0.5", "cat", *files)
    assert (result.status, result.out) == (0, "52428800\n9\n50000 100000\n")


FORBIDDEN = """if 1:
    import ctypes, os, sys
    here, there = os.pipe(), os.pipe()
    if os.fork() == 0:  # stays outside, to map two users: root, who forbids, and the ordinary one
        os.read(here[0], 1)
        for file in "uid_map", "gid_map":
            with open(f"/proc/{os.getppid()}/{file}", "w") as map:
                map.write(f"0 0 1\\n1 {sys.argv[1]} 1\\n")
        os._exit(os.write(there[1], b"."))
    assert ctypes.CDLL(None).unshare(0x10000000) == 0  # CLONE_NEWUSER
    os.write(here[1], b"."), os.read(there[0], 1), os.wait()
    with open("/proc/sys/user/max_user_namespaces", "w") as setting:  # of this user namespace
        setting.write("0")
    os.setgroups([]), os.setresgid(1, 1, 1), os.setresuid(1, 1, 1)
    os.execv(sys.argv[2], sys.argv[2:])"""


@user_only
def test_a_setting_that_forbids_user_namespaces_is_named_with_both_remedies(busybox):
    said = refusal(busybox.under(injecting("write", "error=EPERM:when=1"), "true"))  # as by AppArmor
    assert "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or use sudo" in said
    if os.geteuid():
        pytest.skip("only root can forbid it")
    words = [PYTHON, "-c", FORBIDDEN, str(busybox.uid), *busybox.words("run", *busybox.options, "true")]
    said = refusal(ended(busybox.popen(words, preexec_fn=None)))
    assert "sysctl user.max_user_namespaces=" in said and "sudo" in said.partition("or use")[2]


# ---- Many machines: under systemd ----------------------------------------------------


class Service(Running):
    """A command as a service of this machine's systemd; `process` waits for its end."""

    def __init__(self, caller, name, properties, command):
        self.name = name
        self.cgroup = Path(f"/sys/fs/cgroup/system.slice/{name}")
        options = [f"--property={line}" for line in ("KillMode=mixed", *properties)]
        start = ["systemd-run", "--quiet", "--collect", "--wait", "--pipe", f"--unit={name}"]
        words = [word.replace("$", "$$") for word in command]  # systemd would expand $NAME
        process = caller.popen([*start, *options, *words], stdin=subprocess.PIPE, bufsize=0)
        super().__init__(process, caller.dir / "pid")

    def __exit__(self, *error):
        subprocess.run(["systemctl", "stop", "--quiet", self.name], stderr=subprocess.DEVNULL)
        super().__exit__(*error)


@pytest.fixture
def service(busybox):
    """Start `mydocker.py run --rootfs DIR WORDS` in a service that has these properties."""
    systemd = read("/proc/1/comm") == "systemd\n" and shutil.which("systemd-run")
    if not (systemd and version("memory") == version("pids") == 2):
        pytest.skip("systemd as PID 1 and cgroup v2")

    def start(*words, properties=(), around=()):
        name = f"mydocker-test-{os.urandom(4).hex()}.service"
        command = busybox.words("run", "--pidfile", busybox.dir / "pid", *busybox.options, *words)
        return Service(busybox, name, properties, [*around, *command])

    return start


EAT_100_MIB = "dd if=/dev/zero of=/dev/null bs=100M count=1; echo memory $?"  # Linux 7.2 may kill beside it
DELEGATION = [["Delegate=no"], ["Delegate=yes"]]


@root_only
@pytest.mark.parametrize("properties", DELEGATION, ids=" ".join)
def test_limits_outlive_a_reload_of_systemd(service, properties):
    """A delegated service holds its container in its own cgroup."""
    script = f"""
        echo ready; read go
        {EAT_100_MIB}
        grep nr_throttled /sys/fs/cgroup/cpu.stat
        (while :; do sleep 1000 & done)
        echo end"""
    words = ("-i", "-m", "50m", "--memory-swap", "50m", "--cpus", "0.5", "--pids-limit", "9")
    files = ("memory.max", "memory.swap.max", "cpu.max", "pids.max")
    with service(*words, *SH, script, properties=properties) as container:
        assert container.line() == "ready"
        cgroup = cgroup_of(container.pid1, "memory")
        if properties == ["Delegate=yes"]:
            run = cgroup_of(status_field(read(f"/proc/{container.pid1}/status"), "PPid"), "memory")
            assert own_cgroup(container.pid1).parent == run.parent == container.cgroup
            assert run.name.startswith("mydocker-run-")
        before = [read(cgroup / name) for name in files]
        assert before == ["52428800\n", "0\n", "50000 100000\n", "9\n"]
        for verb in "daemon-reload", "daemon-reexec":
            subprocess.check_call(["systemctl", verb])
            assert [read(cgroup / name) for name in files] == before
        container.process.stdin.write(b"go\n")
        result = container.end()
    assert re.fullmatch("memory 137\nnr_throttled [1-9][0-9]*\nend\n", result.out)
    assert re.search("out of memory: .* 1 process at the 50 MiB limit", result.err)
    assert re.search("pids limit: .* 9 processes", result.err)
    assert not cgroup.exists() and not container.cgroup.exists()


BECOME_A_LEAF = """
    own=$(sed -n s/^0:://p /proc/self/cgroup)
    mkdir "/sys/fs/cgroup$own/leaf"
    echo $$ >"/sys/fs/cgroup$own/leaf/cgroup.procs"
    python=$1 program=$2; shift 3
    "$python" "$program" run --cgroup-parent "$own" "$@"
    status=$?
    ls -d "/sys/fs/cgroup$own"/*/
    exit $status"""
#    What Slurm does: SCOPE/job/user has the limits, SCOPE/job/user/task_0 the processes
BE_A_MANAGER = """
    scope=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)
    mkdir -p "$scope/manager" "$scope/job/user/task_0"
    echo $$ >"$scope/manager/cgroup.procs"
    for level in "$scope" "$scope/job" "$scope/job/user"; do
        echo +memory >"$level/cgroup.subtree_control"
    done
    echo 60M >"$scope/job/user/memory.max"
    echo 0 >"$scope/job/user/memory.swap.max"
    (sh -c 'echo $PPID' >"$scope/job/user/task_0/cgroup.procs"; "$@"; exit $?)
    status=$?
    ls "$scope/job/user" | grep mydocker
    exit $status"""


@root_only
@pytest.mark.parametrize("manager", ["", BECOME_A_LEAF, BE_A_MANAGER], ids=["own", "cgroup-parent", "slurm"])
def test_the_limit_of_a_service_or_of_a_manager_in_it_holds_for_its_container(service, manager):
    limits = [] if manager == BE_A_MANAGER else ["MemoryMax=60M", "MemorySwapMax=0"]
    file, value = ("memory.max", 500 * MIB) if limits else ("pids.max", 2048)
    words = ("-m", "500m", *SH, f"cat /sys/fs/cgroup/{file}; {EAT_100_MIB}; exit 5")
    around = ("sh", "-c", manager, "sh") if manager else ()
    with service(*words, properties=["Delegate=yes", *limits], around=around) as container:
        result = container.end()
    left = f"{container.cgroup}/leaf/\n" if manager == BECOME_A_LEAF else ""
    assert (result.status, result.out) == (5, f"{value}\nmemory 137\n{left}")
    assert ("out of memory" if limits else "killed 1 process at the limit of a cgroup above") in result.err


@root_only
@pytest.mark.parametrize("properties", DELEGATION, ids=" ".join)
@pytest.mark.parametrize("trap, status", [("echo bye; exit 0", 0), ("echo bye; exit 7", 7), ("", 137)])
def test_systemctl_stop_ends_the_container(service, properties, trap, status):
    script = f"trap '{trap}' TERM; echo ready; while :; do sleep 0.1; done"
    properties = [*properties, "TimeoutStopSec=50"]
    with service("--stop-timeout", "2", *SH, script, properties=properties) as container:
        container.line()
        namespace = os.readlink(f"/proc/{container.pid1}/ns/pid")
        cgroup = cgroup_of(container.pid1, "pids")
        subprocess.check_call(["systemctl", "stop", container.name])
        assert not processes_in(namespace)
        assert not cgroup.exists() and not container.cgroup.exists()
        result = container.end()
    said = "" if trap else "mydocker: SIGTERM did not end it within 2 s: killed\n"
    assert result == Result(status, "bye\n" if trap else "", said)


# ---- Faults ----------------------------------------------------------------------------
#
# strace attaches to one process of a run, stopped at its first own call, and makes one call fail, or sends a
# signal there: a recording of a run without faults tells which calls there are.  Then the same again at the
# next call, until every one has had its turn.

BUDGET = float(os.environ.get("MYDOCKER_BUDGET", "20"))  # seconds a test may try faults for

LAUNCHER = LOAD_PROGRAM + """
import _socket
side, peer = sys.argv[2], int(sys.argv[3])
os.set_inheritable(peer, False)
peer = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, peer)
def wait():
    peer.send(b".")
    peer.recv(1)
if side == "run":
    wait()
else:  # strace comes first: run() cannot hold its child by ptrace then, and looks as well as it can
    one, other = _socket.socketpair()
    def wait_in_child():
        wait()
        one.send(b".")
    os.register_at_fork(after_in_child=wait_in_child, after_in_parent=lambda: other.recv(1))
os._exit(module.main(sys.argv[4:]))"""


Fault = namedtuple("Fault", "call number what")  # at the number-th such call: error=EIO, signal=KILL


class Faulty(NamedTuple):
    """How a run with a fault ended, and where the fault was."""

    fault: Fault
    status: int
    out: str
    err: str
    trace: str
    seconds: float  # to the last call in it
    cgroups: list  # of this run, that are still there
    terminal_changed: bool

    @property
    def lines(self):
        """What mydocker said, without the notice that is no fault."""
        return [line for line in self.err.splitlines() if "without root" not in line]

    @property
    def place(self):
        """The call that failed, as strace shows it."""
        own = re.split(r"^execve\(", self.trace, maxsplit=1, flags=re.MULTILINE)[0]  # then it is the command
        return next((line for line in own.splitlines() if "INJECTED" in line), "")

    @property
    def hit(self):
        """Whether the fault came at all: the number of calls varies with the neighbours."""
        return len(re.findall(rf"^{self.fault.call}\(", self.trace, re.MULTILINE)) >= self.fault.number

    @property
    def late(self):
        """Whether the container was at its end before."""
        return re.search(r"^wait4\(.*WIF(EXITED|SIGNALED)", self.trace, re.MULTILINE) or self.seconds > 4.9

    def told(self, what, whole=""):
        """This, as a line for the one who has to mend it."""
        ours, theirs = (text.splitlines() for text in (normal(self.out), whole))
        lost = [line for line in theirs if line not in ours][:3] if ours else []
        new = [line for line in ours if line not in theirs][:3]
        return f"{what}: {self.fault} {self.place} -> {self.status} {self.lines} -{lost} +{new}"


class Traced:
    """Runs of one command line, with strace at `run` or at `init`."""

    def __init__(self, caller, side, options, command, terminal):
        need(os.geteuid() == 0, "root, to trace any process")
        need(shutil.which("strace"), "strace")
        self.caller, self.side, self.terminal = caller, side, terminal
        self.options, self.command = options, command

    def run(self, fault=None, command=None):
        """Run to the end; the trace has the calls that come after the start."""
        here, there = socket.socketpair()
        master, slave = pty.openpty()
        before, log = termios.tcgetattr(slave)[:6], tempfile.mktemp(dir=str(self.caller.dir))
        name = f"traced-{os.urandom(4).hex()}"
        words = [
            self.caller.python, "-S", "-X", f"pycache_prefix={self.caller.dir}/pyc", "-c", LAUNCHER,
            str(PROGRAM), self.side, str(there.fileno()), "run", "--name", name,
            *(str(word).replace("FRESH", log) for word in self.options), *(command or self.command),
        ]  # fmt: skip
        stdin = slave if self.terminal else subprocess.DEVNULL
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
        process = self.caller.popen(words, stdin=stdin, pass_fds=[there.fileno()], env=environment)
        there.close()
        try:
            assert here.recv(1), ended(process)
            pid = process.pid if self.side == "run" else wait_until(lambda: children(process.pid))[0]
            what = ["-e", "trace=all"]
            if fault:
                inject = f"inject={fault.call}:{fault.what}:when={fault.number}"
                what = ["-ttt", "-e", f"trace={fault.call},wait4,execve", "-e", inject]
            null, what = subprocess.DEVNULL, ["strace", "-o", log, *what, "-p", str(pid)]
            tracer = subprocess.Popen(what, stdin=null, stdout=null, stderr=subprocess.PIPE)
            said = tracer.stderr.readline()
            assert b"attached" in said, said
            begin = time.time()
            here.send(b".")
            result = ended(process)
            ended(tracer)
            own = sorted(cgroups_called(f"mydocker-{name}"))
            changed = termios.tcgetattr(slave)[:6] != before
        finally:
            here.close(), os.close(master), os.close(slave)
        trace = read(log)
        os.unlink(log)
        times = [float(number) - begin for number in re.findall(r"^(\d+\.\d+) ", trace, re.MULTILINE)]
        trace = re.sub(r"^\d+\.\d+ ", "", trace, flags=re.MULTILINE)
        return Faulty(fault, *result, trace, max(times + [0]), own, changed)

    def calls(self, trace):
        """(call, number) of every call of a trace, as far as it is mydocker's and not the launcher's."""
        seen = []
        for name in re.findall(r"^(\w+)\(", trace, re.MULTILINE):
            seen.append((name, 1 + sum(name == earlier for earlier, _ in seen)))
            if name == "execve":
                break
        return [call for call in seen if call[0] not in ("sendto", "recvfrom", "restart_syscall")]

    def each(self, cases):
        """Results of run(*case), for as many cases as there is time for, taken evenly."""
        begin, workers = time.monotonic(), os.cpu_count() or 1
        self.run()
        seconds = time.monotonic() - begin
        step = int(len(cases) * seconds / workers / BUDGET) + 1
        with ThreadPoolExecutor(workers + 1) as pool:
            return list(pool.map(lambda case: self.run(*case), cases[::step]))


# What a container shows of its isolation; the same in each run but for the numbers.
SELF_PORTRAIT = """
    exec 2>&1
    cut -d ' ' -f 4- /proc/self/mountinfo
    grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|SigBlk|SigIgn)' /proc/self/status
    cat /proc/self/cgroup /proc/1/oom_score_adj /proc/sys/kernel/hostname
    for name in cgroup ipc mnt net pid uts; do readlink /proc/1/ns/$name; done
    echo /proc/[0-9]*; ls /proc/1/fd /dev; umask; pwd; echo ${A-unset}
    for file in memory.limit_in_bytes memory.max cpu.cfs_quota_us cpu.max pids.max; do
        cat /sys/fs/cgroup/$file /sys/fs/cgroup/*/$file
    done
    cat /sys/class/net/lo/flags; echo end
""".replace("\n    ", "\n")
HOST_NAMESPACES = [os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")]


def normal(portrait):
    """A self-portrait without what differs from run to run."""
    for namespace in HOST_NAMESPACES:
        portrait = portrait.replace(namespace, "THE HOST'S")
    portrait = re.sub(r":\[\d+\]", ":[own]", portrait.replace("\r", ""))
    portrait = re.sub(r"\b[0-9a-f]{12}\b", "ID", portrait)
    return re.sub(r"/fd/\d+|FRESH\S*|\b\d+ (?=/proc)", "N", portrait)


LIMITED = """-m 64m --cpus 0.5 --cpuset-cpus 0 --oom-score-adj 100 -u 0:0
    --read-only -v .:/volume:ro --tmpfs /scratch -w /volume -e A=b --stop-timeout 0.1
    --upperdir FRESH.layer --pidfile FRESH.pid""".split()


@pytest.fixture(params=["limits", "terminal", "host"])
def situation(request, account):
    """How a container is asked for; a function that makes Traced of it."""
    rootfs = ("--rootfs", account.rootfs)
    words = {"limits": [*rootfs, *LIMITED], "terminal": [*rootfs, "-ti"], "host": ["--network", "host"]}
    words = words[request.param]
    if account.uid and request.param == "limits":
        pytest.skip("limits take root")
    if account.uid == 0:
        words += ["--pids-limit", "50"]

    def traced(side, *command):
        return Traced(account, side, words, command, request.param == "terminal")

    return traced


# They cannot fail, or only where Python itself cannot go on
SURE = """brk exit exit_group futex getegid geteuid getpid getrandom madvise mmap mprotect mremap munmap
    rt_sigaction rt_sigprocmask rt_sigreturn sched_yield umask uname""".split()
ERRORS = {"clone": "EAGAIN", "openat": "EMFILE", "mkdir": "ENOSPC", "read": "ENOMEM", "write": "ENOSPC"}
# These only look, or let go: what is said need not name them, but what was done
LOOKS = """access capget close faccessat faccessat2 fcntl fgetxattr fstat fstatfs getcwd getdents64 listxattr
    lseek lstat newfstatat poll read readlink readlinkat stat statfs statx""".split()
NAMES = {  # what call() names, where libc makes another call of it
    "clone": "fork", "newfstatat": "stat", "openat": "open", "wait4": "waitpid",
    "signalfd4": "signalfd", "mkdirat": "mkdir", "symlinkat": "symlink", "dup3": "dup2", "pwrite64": "pwrite",
}  # fmt: skip


def verdict(faulty, whole, side, cwd):
    """What is wrong with how a run took an error; "" for nothing."""
    name, lines, portrait = faulty.fault.call, faulty.lines, normal(faulty.out)
    problem = next((line for line in lines if not line.startswith("  hint: ")), "")
    if any(not line.startswith(("mydocker: ", "  hint: ")) for line in lines):
        return "says what is no message"
    if not faulty.place or faulty.status and "/lib/python" in faulty.place:
        return ""  # the command had it, or Python itself
    if "internal error" in problem or problem.startswith("mydocker: [Errno"):
        return "does not say what was being done"
    if faulty.terminal_changed and "terminal" not in problem:
        return "the terminal is changed"
    if faulty.cgroups and "rmdir(" not in problem:
        return f"leaves {faulty.cgroups}"
    if "starting in /" in problem:
        whole = whole.replace(f"\n{cwd}\n", "\n/\n")
    new = set(portrait.split("\n")) - set(whole.split("\n"))
    if faulty.status == 0 and portrait == whole:
        return "many warnings" if len(lines) > 1 else ""
    if "cannot be shown inside" in problem and faulty.status == 0 and len(lines) == 1:
        return "more than asked for" if new else ""
    if "stdout: " in problem and not new - {portrait.split("\n")[-1]}:  # the last line may be cut
        return ""
    if faulty.status == 0 and name == "mount" and "overlay" in faulty.place:
        return "" if all(" ro," in line for line in new) else "less than asked for"
    if faulty.status == 0 or not whole.startswith(portrait):
        return "less than asked for"
    if faulty.status in (126, 127):
        return "" if "cannot execute" in problem and not faulty.out else "status"
    if faulty.status != 125:
        return "status"
    if side == "init" and faulty.out:
        return "the command has run"
    if len(lines) - any("  hint: " in line for line in lines) != 1:
        return "not one line"
    paths = re.findall('"(/[^"]+)"', faulty.place)
    if name in LOOKS or any(path in problem for path in [f"{NAMES.get(name, name)}(", *paths]):
        return ""
    return "" if name == "ioctl" and "terminal" in problem else "does not name the call"


@slow
@faults
@pytest.mark.parametrize("side", ["run", "init"])
def test_every_call_that_fails_is_told_and_leaves_nothing(situation, side):
    traced = situation(side, *SH, SELF_PORTRAIT)
    clean = traced.run()
    assert (clean.status, clean.lines) == (0, []), clean
    calls = [call for call in traced.calls(clean.trace) if call[0] not in SURE]
    errors = ["error=" + ERRORS.get(name, "EIO") for name, _ in calls]
    wrong, whole = [], normal(clean.out)
    for faulty in traced.each([(Fault(*call, error),) for call, error in zip(calls, errors)]):
        what = verdict(faulty, whole, side, traced.caller.dir)
        wrong += [faulty.told(what, whole)] if what else []
    traced.run()  # sweeps what could not be removed
    assert wrong == [], "\n" + "\n".join(wrong)


GOOD_ENDS = {  # statuses, by the side that gets a signal; a PID 1 gets only what it has a handler for
    ("run", "KILL"): (-signal.SIGKILL,), ("run", "TERM"): (143, 137, -signal.SIGTERM),
    ("init", "KILL"): (137,), ("init", "TERM"): (0, 143),
}  # fmt: skip


@slow
@faults
@pytest.mark.parametrize("situation", ["limits", "terminal"], indirect=True)
@pytest.mark.parametrize("side, name", GOOD_ENDS)
def test_a_signal_at_any_call_ends_it_in_good_order(situation, side, name):
    """SIGKILL of run leaves at most an empty cgroup, and the terminal as it is. The command does not end by
    itself where the signal comes before it has begun, or late, for the sake of runs that it did not hit."""
    traced, to_run = situation(side, "true"), (side, name) == ("run", "TERM")
    clean = traced.run()
    assert clean.status == 0, clean
    calls = traced.calls(clean.trace)
    begun = next((i for i, call in enumerate(calls) if call[0] == "poll"), len(calls))
    long = [*SH, "sleep 5; echo survived"]
    commands = [long if side == "run" and i <= begun else None for i in range(len(calls))]
    results = traced.each([(Fault(*call, f"signal={name}"), words) for call, words in zip(calls, commands)])
    for _ in range(len(results) // 16 + 2):
        traced.run()  # sweeps a few cgroups each time
    wrong = [faulty.told("not hit") for faulty in results if not faulty.hit and faulty.status]
    for faulty in filter(lambda faulty: faulty.hit, results):
        told = "mydocker: SIGTERM" if to_run else "nothing"
        if faulty.status not in GOOD_ENDS[side, name] and not (to_run and faulty.late and faulty.status == 0):
            wrong.append(faulty.told("status"))
        elif faulty.out and not faulty.late:
            wrong.append(faulty.told("somebody has lived on"))
        elif any(not line.startswith(told) for line in faulty.lines):
            wrong.append(faulty.told("says something else"))
        elif (side, name) != ("run", "KILL") and faulty.cgroups:
            wrong.append(faulty.told(f"left {faulty.cgroups}"))
        elif to_run and faulty.terminal_changed:
            wrong.append(faulty.told("the terminal is changed"))
    assert wrong == [], "\n" + "\n".join(wrong)


# ---- Crowds --------------------------------------------------------------------------


def crowd(caller, lines, at_once):
    """Results of many runs, a number of them at any time, in order."""
    running, results = [], []
    for words in lines:
        if len(running) == at_once:
            results.append(ended(running.pop(0)))
        running.append(caller.popen(caller.words("run", *caller.options, *words)))
    return results + [ended(process) for process in running]


@pytest.mark.parametrize("number", [36, pytest.param(200, marks=slow)])
def test_a_crowd_of_containers_is_as_good_as_one(busybox, number):
    limits = ["-m", "64m", "--pids-limit", "50", "--cpus", "0.5"] if busybox.uid == 0 else []
    lines = [[*limits, *SH, f"hostname; exit {i % 100}"] for i in range(number)]
    results = crowd(busybox, lines, at_once=32)
    assert [r for i, r in enumerate(results) if (r.status, r.err) != (i % 100, "")] == []
    assert len({result.out for result in results}) == number


def test_a_name_can_be_used_again_and_of_runs_that_begin_at_once_one_has_it_or_the_upperdir(busybox):
    for name in ["n" * 200] * 2 + ["my.box_1-2"] * 2:
        assert busybox.out("--name", name, "echo", "fine") == "fine\n"
    for option, value, told in [
        ("--upperdir", busybox.dir / "layer", "another container is using it"), ("--name", "one", "in use"),
    ][: 1 if busybox.uid else 2]:  # fmt: skip
        words = busybox.words("run", *busybox.options, "-i", option, value, "cat")
        runs = [busybox.popen(words, stdin=subprocess.PIPE) for _ in range(4)]
        wait_until(lambda: sum(run.poll() is not None for run in runs) >= 3, "three refusals")  # noqa: B023
        results = [ended(run, b"mine" if run.poll() is None else None) for run in runs]
        winners = results.count(Result(0, "mine", ""))
        assert winners == 1 or (winners, option) == (0, "--name")  # each may see another
        said = [refusal(result) for result in results if result.status]
        assert len(said) == 4 - winners and all(told in line for line in said)


@root_only
def test_a_sweep_under_load_takes_the_cgroups_of_the_dead_and_none_of_the_living(busybox):
    """Runs that have just begun are empty, too, and others are killed all the while."""
    with begun(busybox, "-m", "50m", *IDLE) as container:
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                runs = [stack.enter_context(begun(busybox, "-m", "50m", *IDLE)) for _ in range(4)]
                dead = [own_cgroup(run.pid1, "memory") for run in runs]
                namespaces = [os.readlink(f"/proc/{run.pid1}/ns/pid") for run in runs]
                for run in runs:
                    run.process.kill()
                    run.process.wait()
                    run.pidfile.unlink()
            wait_until(lambda: not any(map(processes_in, namespaces)), "their death")  # noqa: B023
            assert all(path.exists() for path in dead)
            for _ in range(8):  # each run looks at a few only
                assert set(crowd(busybox, [["-m", "50m", "true"]] * 8, at_once=8)) == {Result(0, "", "")}
                if not any(path.exists() for path in dead):
                    break
            assert [path for path in dead if path.exists()] == []
            alive = read(cgroup_of(container.pid1, "memory") / "cgroup.procs").split()
            assert alive == [str(container.pid1)]


# ---- Hostile insides -----------------------------------------------------------------

BOMB = """if 1:
    import os, time
    while True:
        try:
            os.fork()
        except BlockingIOError:
            time.sleep(0.1)"""


@root_only
def test_a_fork_bomb_leaves_the_host_at_work_and_can_be_ended(mydocker):
    words = ("--pids-limit", "60", "--stop-timeout", "0", "-w", "/", PYTHON, "-c", BOMB)
    with mydocker.start(*words) as container:
        namespace = os.readlink(f"/proc/{container.pid1}/ns/pid")
        wait_until(lambda: len(processes_in(namespace)) == 60, "the bomb")
        mydocker.out("true")
        assert len(processes_in(namespace)) <= 60
        container.send(signal.SIGTERM)
        assert container.end().status == 137
        assert processes_in(namespace) == []


@once
def test_a_command_whose_processes_stop_themselves_runs_on_until_it_is_ended(busybox):
    script = "sh -c 'kill -STOP $$' & kill -STOP 1; echo ready; wait"
    for options in [], ["-t"]:
        with begun(busybox, *options, "--stop-timeout", "0", *SH, script) as container:
            (child,) = wait_until(lambda: children(container.pid1), "the child")  # noqa: B023
            wait_until(lambda: "T (stopped)" in read(f"/proc/{child}/status"), "it to stop")  # noqa: B023
            assert container.process.poll() is None
            os.kill(container.pid1, signal.SIGSTOP)  # which it cannot do itself
            container.send(signal.SIGTERM)
            assert container.end().status == 137


@once
def test_input_that_nobody_reads_keeps_no_signal_from_the_command(busybox):
    flood = busybox.path("flood", "x" * MIB)
    script = f"stty raw -echo; trap 'echo over; exit 7' TERM; {LOOP}"
    for options in ["-t"], ["-ti"]:
        with open(str(flood)) as stdin:
            words = (*options, "--stop-timeout", "1000", *SH, script)
            with busybox.start(*words, stdin=stdin) as container:
                while "ready" not in container.line():
                    pass
                container.send(signal.SIGTERM)
                result = container.end()
        assert result.status == 7 and "over" in result.out, options


@once
def test_input_that_breaks_off_is_input_that_ends(busybox):
    here, there = socket.socketpair()
    with here:
        here.sendall(b"unread")
        there.sendall(b"line\n")
        there.close()  # with something unread: the other side gets ECONNRESET
        result = busybox("-ti", *SH, "read line; echo over; exit 3", stdin=here)
    assert result.status == 3 and "over" in result.out
    assert result.err.splitlines()[-1] == "mydocker: stdin: Connection reset by peer"


@root_only
def test_a_terminal_that_is_held_outside_does_not_hold_the_run(busybox):
    words = ("-ti", *SH, "echo ready; read line; echo last; exit 4")
    with begun(busybox, *words, stdin=subprocess.PIPE) as container:
        fd = os.open(f"/proc/{container.pid1}/root/dev/pts/0", os.O_RDWR | os.O_NOCTTY)
        try:
            container.process.stdin.write(b"go\n")
            result = container.end()
        finally:
            os.close(fd)
        assert result.status == 4 and "last" in result.out


@once
def test_a_terminal_may_be_closed_and_opened_again_and_costs_no_processor_time_meanwhile(busybox):
    script = "exec 0<&- 1>&- 2>&-; exec 1>/dev/tty; echo back; exit 4"
    assert busybox("-t", *SH, script)[:2] == (4, "back\r\n")
    script = "echo ready; exec 0<&- 1>&- 2>&-; exec sleep 1000"
    with begun(busybox, "-t", "--stop-timeout", "0", *SH, script) as container:
        wait_until(lambda: read(f"/proc/{container.pid1}/comm") == "sleep\n", "sleep")
        before = cpu_seconds(container.process.pid)
        with pytest.raises(subprocess.TimeoutExpired):
            container.process.wait(0.5)
        assert cpu_seconds(container.process.pid) - before < 0.1
        container.send(signal.SIGTERM)
        assert container.end().status == 137


# ---- Bad input -----------------------------------------------------------------------

# A word a line on stdin, an empty line ends a command line; answers on stdout.  It is the
# whole program, in a child that begins where the interpreter has read it.
FUZZED = LOAD_PROGRAM + """
import json, resource
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
answers = os.dup(1)
null = os.open("/dev/null", os.O_RDWR)
for line in open(0, closefd=False):
    words = [bytes.fromhex(word).decode("utf-8", "surrogateescape") for word in json.loads(line)]
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        for fd, number in (null, 0), (null, 1), (writer, 2):
            os.dup2(fd, number)
        os._exit(module.main(words))
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read().decode("utf-8", "replace")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(answers, (json.dumps([status, said]) + "\\n").encode())"""

SHORT = "i t m c v w e u".split()
MADE_UP = """--nosuch --mem -x - -- --- --= -= -ti -it -tm -m= -tix -m100m --memory= --tty=1 -cpuset -cpushare
    -cpu""".split() + [""]
VALUES = """0 1 -1 2 007 1e9 0x10 1.5 .5 5. nan inf -inf 99999999999999999999 -0 +1 64m 1.5g 10tb 1k 0-1 0-0
    1-0 0,, ,0 0-999999999 0-99999 0-4294967296 a:b :/x /x: .:/v .:/v:ro .:/v:rx .:relative /:/ /v:/v/v:ro
    /scratch /scratch:size=1m /scratch:size=1% /scratch:mode=9999 /scratch:exec,,ro . .. /proc/self/fd/3
    nonexistent/x pid 0:0 nobody root:nogroup 65534 4294967295 4294967296 A=b A= =b A A==b none host ALL
    CAP_CHOWN chown cap_nosuch json text name -name a.b_c-d true sh /bin/true run init --help
    --version""".split()
MONSTROUS = ["9" * 5000, "x" * 100000, "\udcff\udcfe", "ü字🐳", "a\nb", "\t \x7f", "'\"\\$`", "/" * 5000]


def random_line(random):
    """A command line such as nobody would write, and now and then one that works."""
    words = [random.choice(["run"] * 18 + ["init", "", "-h", "frobnicate", "--version"])]
    for _ in range(random.randrange(8)):
        value = random.choice(VALUES if random.random() < 0.85 else MONSTROUS)
        option = random.choice(OPTIONS + ["-" + letter for letter in SHORT] * 2 + MADE_UP)
        words += random.choice([[option], [option, value], [f"{option}={value}"], [value, option]])
        if random.random() < 0.1:
            random.shuffle(words)
    words[1:1] = ["-e", "PATH=/nowhere"] * (words[0] == "run")  # no word is a command by chance
    ends = [[], ["/bin/true"], ["/bin/true"], ["--", "/bin/true"], [random.choice(VALUES)]]
    return words + random.choice(ends)


@pytest.mark.parametrize("number", [200, pytest.param(3000, marks=slow)])
def test_no_command_line_at_all_gives_a_traceback_or_a_strange_status(account, number):
    lines, workers = [random_line(random.Random(seed)) for seed in range(number)], os.cpu_count() or 1

    def answers(share):
        data = [json.dumps([os.fsencode(word).hex() for word in words]) + "\n" for words in share]
        server = account.popen([account.python, "-S", "-c", FUZZED, str(PROGRAM)], stdin=subprocess.PIPE)
        out, err = server.communicate("".join(data).encode(), timeout=PATIENCE * 10)
        assert err == b""
        return [json.loads(line) for line in out.splitlines()]

    shares, wrong = [lines[first::workers] for first in range(workers)], []
    with ThreadPoolExecutor(workers) as pool:
        answered = list(pool.map(answers, shares))
    assert list(map(len, answered)) == list(map(len, shares))
    for words, (status, said) in zip(sum(shares, []), sum(answered, [])):
        told = ("usage: ", "[")  # --explain begins with a pid
        spoken = [line for line in said.splitlines() if not line.strip().startswith(told)]
        good = all(line.startswith(("mydocker: ", "  hint: ", "{")) for line in spoken)
        small = status == 137 and "2" in words  # bytes of memory: killed at its limit
        if not (status in (0, 125, 126, 127) or small) or not good or "internal" in said:
            wrong.append([word[:80] for word in words] + [status, said[-500:]])
    assert wrong == []


# ---- Strange surroundings ------------------------------------------------------------


def within(caller, shell, *words, **how):
    """Run `mydocker.py run` by a shell that prepares and redirects: "$@" is the command."""
    return caller.under(["sh", "-c", shell, "sh"], *words, **how)


@once
def test_a_closed_descriptor_is_dev_null_and_never_something_of_ours(busybox):
    script = "(for fd in /proc/1/fd/*; do readlink $fd; done) >&2; exit 3"
    for closed in "<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-":
        for options in (), ("-i",):
            result = within(busybox, f'"$@" {closed}', *options, *SH, script)
            assert result.status == 3
            links = result.err.splitlines()
            assert len(links) == (0 if "2>" in closed else 3)
            assert all(link == "/dev/null" or "pipe:" in link for link in links), links
        assert within(busybox, f'"$@" {closed}', "-ti", *SH, "tty; exit 3").status == 3


@once
def test_a_full_disk_as_stdout_is_the_commands_to_report_and_as_stderr_changes_no_status(busybox):
    result = within(busybox, '"$@" >/dev/full', "echo", "text")
    assert result.status == 1 and "No space left" in result.err and "mydocker" not in result.err
    result = within(busybox, '"$@" >/dev/full', "-t", "--stop-timeout", "0", "yes")
    assert result.status in (1, 129, 137)  # 1: it wrote, and was told EIO
    assert "mydocker: stdout: No space left on device" in result.err.splitlines()
    for full in "2>/dev/full", "2>&-":
        assert within(busybox, f'"$@" {full}', "no-such-command").status == 127
        assert within(busybox, f'"$@" {full}', "-m", "lots", "true").status == USAGE_ERROR
        assert within(busybox, f'"$@" {full}', "--explain", "true").status == 0


def test_few_descriptors_are_enough_or_the_end_is_clear(busybox):
    """On v1 five hierarchies, each with a lock and a file to join by, and six devices are open at once."""
    for number in 4, 6, 8, 12, 16, 24, 48:
        result = within(busybox, f'ulimit -n {number}; exec "$@"', "echo", "done")
        if result.status == 0:
            assert result == Result(0, "done\n", "")
        elif "mydocker" in result.err:
            assert os.strerror(24) in refusal(result) and number < 48  # EMFILE
        else:  # the interpreter itself could not start
            assert number < 8 and result.out == ""


@once
def test_an_empty_environment_is_enough(busybox):
    assert within(busybox, 'exec env -i "$@"', *SH, "echo $HOME") == Result(0, "/root\n", "")


@once
def test_words_are_bytes_in_every_locale(busybox):
    strict = "PYTHONCOERCECLOCALE=0 PYTHONUTF8=0"
    for locale in "C", f"C {strict}", f"POSIX {strict}", "C.UTF-8", "nosuch_LOCALE.latin1":
        shell = f'export LC_ALL={locale}; exec "$@"'
        assert within(busybox, shell, "echo", "ü字🐳", "\udcff").out == "ü字🐳 \udcff\n", locale
        assert "ü-no-such-字" in refusal(within(busybox, shell, "ü-no-such-字"), 127)


def test_a_narrow_umask_does_not_narrow_the_container(busybox):
    script = "umask; cat /etc/passwd >/dev/null && : >/dev/shm/x && : >/tmp/x && cat /new/work 2>&1"
    words = ("-w", "/new/work", "--tmpfs", "/scratch", *SH, f"{script}; stat -c %a / /dev /new")
    plain = within(busybox, '"$@"', *words)
    assert within(busybox, 'umask 077; "$@"', *words) == plain
    assert plain.out.startswith("0022\n")


def test_a_system_or_python_that_it_does_not_run_on_is_told_in_one_line(anybody):
    """Or one that is incomplete: python3-minimal has no ctypes."""

    def said(source, *words):
        return refusal(ended(anybody.popen([anybody.python, "-c", source, *words])))

    source = "import runpy, sys; _, module, path = sys.argv; sys.modules[module] = None; "
    source += "runpy.run_path(path, run_name='__main__')"
    for module in "ctypes", "fcntl", "termios", "select":
        told = said(source, module, str(PROGRAM))
        assert module in told and "apt-get install python3" in told and len(told.splitlines()) == 1
    for how in "sys.platform = 'darwin'", "sys.version_info = (3, 7)", "sys.maxsize = 2**31 - 1":
        source = f"import sys; {how}; exec(compile(open(sys.argv[1]).read(), 'mydocker.py', 'exec'))"
        assert said(source, str(SOURCE)) == "mydocker: this needs a 64-bit Linux and Python 3.9 or newer\n"


# ---- busybox-rootfs.sh ---------------------------------------------------------------


def test_a_rootfs_has_what_programs_expect_and_is_built_in_an_empty_directory(accounts, anybody, tmp_path):
    """With a busybox that works, or nothing is left."""
    for caller in accounts.values():
        for name in "proc sys dev run tmp root etc/passwd etc/group etc/hosts bin/busybox".split():
            assert (caller.rootfs / name).exists(), name
        assert os.listdir(str(caller.rootfs / "proc")) == []
        assert stat.S_IMODE((caller.rootfs / "tmp").stat().st_mode) == 0o1777
        names = subprocess.check_output([str(caller.rootfs / "bin/busybox"), "--list-full"]).decode().split()
        assert [name for name in names if "/" in name and not (caller.rootfs / name).exists()] == []
    tools, place = tmp_path / "tools", tmp_path / "place"
    tools.mkdir(), place.mkdir()
    for tool in "ls od tr dirname mkdir install rm mv cat".split():
        (tools / tool).symlink_to(shutil.which(tool))

    def build(directory, **environment):
        how = {"cwd": str(tmp_path), "env": {**os.environ, **environment}, "preexec_fn": None}
        return ended(anybody.popen([shutil.which("sh"), str(ROOTFS_SCRIPT), str(directory)], **how))

    for variables, said in (
        ({"BUSYBOX": "/bin/ls"}, "not a static 64-bit"), ({"BUSYBOX": "/no/busybox"}, "/no/busybox"),
        ({"PATH": str(tools)}, "apt-get install busybox-static"),
    ):
        result = build("new", **variables)
        assert (result.status, result.out) == (1, "") and said in result.err
        assert sorted(os.listdir(str(tmp_path))) == ["place", "tools"]
    assert build(place) == Result(0, "", "")
    before = sorted(os.listdir(str(place)))
    result = build(place)
    assert result.status == 1 and "not an empty directory" in result.err
    assert sorted(os.listdir(str(place))) == before and (place / "bin/sh").exists()


