#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""mydocker: a Linux container runtime in one file.

    sudo python3 mydocker.py run -ti -m 100m /bin/sh

A container is an ordinary process to which the kernel shows a world of its own: namespaces decide
what it sees, a root filesystem what it has, cgroups what it may use, capabilities and seccomp what it
may ask for. Two functions build one, joined by two pipes:

    run()  outside                              init()  inside: PID 1, and then the command
    --------------------------------------      ----------------------------------------------
    parse(), prepare(): refuse what cannot work
    Cgroups.create(): limits, read back
    (without root: a user namespace)
    unshare(CLONE_NEWPID), fork --------------> die with the parent
    supervise(): signals, terminal              unshare: mount, uts, ipc, net namespaces
    |                                           every mount private
    |                                           enter_rootfs(): overlay, pivot_root, /proc ...
    | <------ with -t: "the terminal is there"
    send the command, close the pipe ---------> read the command until EOF
    |                                           join_cgroups(); unshare: cgroup namespace
    |                                           drop_privileges(): user, capabilities, seccomp
    | <------------ EOF of the status pipe ---- execve: the command is PID 1
    wait, report, Cgroups.remove()

Read from the top, where a section builds on those above it (only Log uses two helpers from below it),
or start with run() and init(), which are tables of contents; the sections for the root filesystem and
for init tell the story first, its steps after it. Every call that changes something outside this process
goes through call(), which is what `run --explain` prints. It leaves out most of what changes only this
process (close, umask) or only looks (stat), and the bytes of the terminal.

Capabilities, system calls and masked paths are as in Docker; there is no AppArmor or SELinux profile.
The kernel is shared: whoever exploits a bug in it is out.
See namespaces(7), pivot_root(2), cgroups(7), capabilities(7), seccomp(2), pty(7); in the kernel's own
documentation, admin-guide/cgroup-v2.rst and filesystems/overlayfs.rst.
"""

import sys

if sys.platform != "linux" or sys.version_info < (3, 8) or sys.maxsize < 2**32:
    sys.stderr.write("mydocker: this needs a 64-bit Linux and Python 3.8 or newer\n")
    sys.exit(125)

try:  # every run pays for each import: hence _signal, which is signal without enum (3 ms), no argparse (8)
    import _signal as signal  # type: ignore[import-not-found]
    import ctypes
    import errno
    import fcntl
    import math
    import os
    import select
    import stat
    import struct
    import termios
    import time
except ImportError as missing:
    sys.stderr.write(f"mydocker: {missing}: this Python is incomplete: apt-get install python3\n")
    sys.exit(125)

VERSION = "1.0"
EXIT_MYDOCKER, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_SIGNAL = 125, 126, 127, 128  # as docker run's

# ---- Constants of the kernel: Flag, CLONE_*, MS_*, O_*, PR_* -------------------------------------


class Flag(int):
    """A number that prints as its name in C; MS_REC | MS_PRIVATE prints as MS_REC|MS_PRIVATE."""

    name: str

    def __new__(cls, name: str, value: int) -> "Flag":
        flag = super().__new__(cls, value)
        flag.name = name
        return flag

    def __or__(self, other: int) -> "Flag":
        words = [name for flag in (self, other) for name in repr(flag).split("|")]
        names = "|".join(name for name in dict.fromkeys(words) if name != "0")  # by name: O_RDONLY is 0, too
        return Flag(names or "0", int(self) | int(other))

    def __repr__(self) -> str:
        return self.name


NO_FLAGS = Flag("0", 0)


def union(flags: "set[Flag]") -> Flag:
    """Return the flags as one."""
    result = NO_FLAGS
    for flag in sorted(flags):
        result = result | flag
    return result


# <linux/sched.h>
CLONE_NEWNS = Flag("CLONE_NEWNS", 0x00020000)
CLONE_NEWCGROUP = Flag("CLONE_NEWCGROUP", 0x02000000)
CLONE_NEWUTS = Flag("CLONE_NEWUTS", 0x04000000)
CLONE_NEWIPC = Flag("CLONE_NEWIPC", 0x08000000)
CLONE_NEWUSER = Flag("CLONE_NEWUSER", 0x10000000)
CLONE_NEWPID = Flag("CLONE_NEWPID", 0x20000000)
CLONE_NEWNET = Flag("CLONE_NEWNET", 0x40000000)

# <linux/mount.h>, <sys/mount.h>, <linux/fcntl.h>
MS_RDONLY = Flag("MS_RDONLY", 0x1)
MS_NOSUID = Flag("MS_NOSUID", 0x2)
MS_NODEV = Flag("MS_NODEV", 0x4)
MS_NOEXEC = Flag("MS_NOEXEC", 0x8)
MS_REMOUNT = Flag("MS_REMOUNT", 0x20)
MS_NOATIME = Flag("MS_NOATIME", 0x400)
MS_NODIRATIME = Flag("MS_NODIRATIME", 0x800)
MS_BIND = Flag("MS_BIND", 0x1000)
MS_REC = Flag("MS_REC", 0x4000)
MS_PRIVATE = Flag("MS_PRIVATE", 0x40000)
MS_RELATIME = Flag("MS_RELATIME", 0x200000)
MS_STRICTATIME = Flag("MS_STRICTATIME", 0x1000000)
MNT_DETACH = Flag("MNT_DETACH", 0x2)
AT_EMPTY_PATH = Flag("AT_EMPTY_PATH", 0x1000)
AT_RECURSIVE = Flag("AT_RECURSIVE", 0x8000)

# <fcntl.h>: all of ours are close-on-exec; O_PATH names a place without opening what is there
O_CLOEXEC = Flag("O_CLOEXEC", os.O_CLOEXEC)
O_NOFOLLOW = Flag("O_NOFOLLOW", os.O_NOFOLLOW)
O_RDONLY = Flag("O_RDONLY", os.O_RDONLY) | O_CLOEXEC
O_WRONLY = Flag("O_WRONLY", os.O_WRONLY) | O_CLOEXEC
# O_CREATE, O_REPLACE, O_PATH_DIR and O_PTY are our names for several of them together
O_CREATE = Flag("O_WRONLY|O_CREAT|O_EXCL", os.O_WRONLY | os.O_CREAT | os.O_EXCL) | O_CLOEXEC
O_REPLACE = Flag("O_WRONLY|O_CREAT|O_TRUNC", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) | O_CLOEXEC
O_PATH = Flag("O_PATH", os.O_PATH) | O_CLOEXEC
O_PATH_DIR = O_PATH | Flag("O_DIRECTORY", os.O_DIRECTORY)
O_NONBLOCK = Flag("O_NONBLOCK", os.O_NONBLOCK)
O_PTY = Flag("O_RDWR|O_NOCTTY", os.O_RDWR | os.O_NOCTTY) | O_CLOEXEC
LOCK_EX_NB = Flag("LOCK_EX|LOCK_NB", fcntl.LOCK_EX | fcntl.LOCK_NB)
MODE_755, MODE_700, MODE_644 = Flag("0755", 0o755), Flag("0700", 0o700), Flag("0644", 0o644)

# <linux/prctl.h>, <linux/keyctl.h>, <sys/wait.h>, <sys/socket.h>, <linux/sockios.h>, <asm/ioctls.h>
WNOHANG = Flag("WNOHANG", os.WNOHANG)
PR_SET_PDEATHSIG = Flag("PR_SET_PDEATHSIG", 1)
PR_SET_SECCOMP = Flag("PR_SET_SECCOMP", 22)
PR_CAPBSET_DROP = Flag("PR_CAPBSET_DROP", 24)
PR_SET_NO_NEW_PRIVS = Flag("PR_SET_NO_NEW_PRIVS", 38)
SECCOMP_MODE_FILTER = Flag("SECCOMP_MODE_FILTER", 2)
KEYCTL_JOIN_SESSION_KEYRING = Flag("KEYCTL_JOIN_SESSION_KEYRING", 1)
SIGKILL = Flag("SIGKILL", 9)
AF_INET = Flag("AF_INET", 2)
SOCK_DGRAM = Flag("SOCK_DGRAM|SOCK_CLOEXEC", 2 | 0o2000000)
SIOCSIFFLAGS = Flag("SIOCSIFFLAGS", 0x8914)
TCSANOW = Flag("TCSANOW", termios.TCSANOW)
TIOCSCTTY = Flag("TIOCSCTTY", 0x540E)
TIOCGWINSZ = Flag("TIOCGWINSZ", 0x5413)
TIOCSWINSZ = Flag("TIOCSWINSZ", 0x5414)
TIOCSPTLCK = Flag("TIOCSPTLCK", 0x40045431)
TIOCGPTPEER = Flag("TIOCGPTPEER", 0x5441)

# ---- What mydocker says: Failure, CallError, Log -------------------------------------------------


class Failure(Exception):
    """The end of a run: a line for the user, at most one more with the remedy, the exit status."""

    hint = ""

    def __init__(self, message: str, hint: str = "", status: int = EXIT_MYDOCKER, line: int = 0) -> None:
        super().__init__(message)
        self.message, self.hint, self.status = message, hint or self.hint, status
        self.line = line  # of this file, where that is not where it was raised


class CallError(OSError):
    """A system call that failed. As text: what it was for, the call itself, the reason."""

    def __init__(self, number: int, shown: str, why: str) -> None:
        super().__init__(number, os.strerror(number))
        self.shown, self.why = shown, why

    def __str__(self) -> str:
        return f"{self.why}: {self.shown}: {self.strerror}"


# Functions that speak for their caller: "source" in the JSON log is the caller's line, not theirs
TELLERS = "step warning failure call mount open_path read_file read_to_end write_file".split()


class Log:
    """All that mydocker says, on stderr: stdout is the command's. The options say how."""

    fd = 2
    json = explain = False
    side = "run"  # or "init": which of the two processes speaks

    def set_up(self, options: "Options") -> None:
        """Take --log-format and --explain from the options."""
        self.json, self.explain = options.log_format == "json", options.explain
        if options.explain:  # a copy: with -t init's descriptor 2 becomes the container's terminal
            self.fd = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
        else:
            self.fd = open_unblocked(2)

    def line(self, level: str, message: str, line_number: int = 0) -> None:
        """Write one line; in JSON with the number of the line of this file that is responsible."""
        # a name that an image or a caller chose must not add a line, nor speak to the terminal
        text = "".join(repr(c)[1:-1] if is_control(c) else c for c in message)
        if self.json:
            frame = sys._getframe(1)
            while frame.f_back and frame.f_code.co_name in TELLERS:
                frame = frame.f_back
            source = f"mydocker.py:{line_number or frame.f_lineno}"
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            pairs = {"level": level, "msg": message, "source": source, "time": now}
            text = ",".join(f'"{key}":{json_string(value)}' for key, value in pairs.items())
            text = "{" + text + "}"
        try:  # in one write, lest lines of two processes mix; only --explain waits for a stopped terminal
            poll({self.fd: select.POLLOUT}, time.monotonic() + 1)
            os.write(self.fd, (text + "\n").encode(errors="surrogateescape"))
        except OSError:
            pass  # a stderr that is gone must not change the exit status

    def step(self, shown: str, result: str, why: str) -> None:
        """Tell of one system call, if --explain asks for it."""
        if self.explain:
            self.line("info", f"[{os.getpid():>7} {self.side:4}] {shown} = {result}   # {why}")

    def warning(self, message: str) -> None:
        """Say what the user should know of a run that goes on."""
        self.line("warning", f"mydocker: {message}")

    def failure(self, failure: Failure) -> None:
        """Say why a run has ended, and the remedy if there is one."""
        self.line("error", f"mydocker: {failure.message}", failure.line)
        if failure.hint:
            self.line("error", f"  hint: {failure.hint}", failure.line)


def json_string(text: str) -> str:
    """Return `text` as JSON has it, without 7 ms of import json."""
    escaped = (f"\\u{ord(c):04x}" if is_control(c) or c in '"\\' or "\ud800" <= c < "\ue000" else c
               for c in text)  # fmt: skip
    return '"' + "".join(escaped) + '"'


def is_control(c: str) -> bool:
    """Tell whether a character may command a terminal; U+DC80 is the byte 0x80 where it is no UTF-8."""
    return c < " " or "\x7f" <= c < "\xa0" or "\udc80" <= c < "\udca0"


log = Log()

# ---- System calls: call() is the one door to the kernel ------------------------------------------

MACHINES = {  # uname -m: which column of numbers below, AUDIT_ARCH_* of <linux/audit.h>
    "x86_64": (0, 0xC000003E),
    "aarch64": (1, 0xC00000B7),
    "riscv64": (1, 0xC00000F3),
    "loongarch64": (1, 0xC0000102),
}
COLUMN, ARCHITECTURE = MACHINES.get(os.uname().machine, (-1, 0))
_NUMBERS = {"keyctl": (250, 219), "mount_setattr": (442, 442)}  # made by syscall(2): not every libc has them
# Arguments as in section 2 of the manual: s a string or struct, i int, l long, L unsigned long; for those of
# _NUMBERS the number, l, comes first.
# A call that is not here is made by Python's function of that name, in os or as _MODULES says.
_PROTOTYPES = {
    "capget": "ss",
    "capset": "ss",
    "keyctl": "lis",
    "mount": "sssLs",
    "mount_setattr": "lisLsL",
    "pivot_root": "ss",
    "prctl": "iLLLL",
    "sethostname": "sL",
    "signalfd": "isi",
    "socket": "iii",
    "umount2": "si",
    "unshare": "i",
}
_MODULES = {"ioctl": fcntl, "flock": fcntl, "tcgetattr": termios, "tcsetattr": termios}
_TYPES = {"s": "c_char_p", "i": "c_int", "l": "c_long", "L": "c_ulong"}
_libc = ctypes.CDLL(None, use_errno=True)  # the libc that Python itself runs on, glibc or musl
_bound: "dict[str, object]" = {}  # what _bind returned, by name


def give_back_memory() -> None:
    """Give freed memory back to the kernel, which libc would not. See malloc_trim(3), which glibc has."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def _bind(name: str):  # type: ignore[no-untyped-def]
    """Return the function behind call(`name`): of libc, raising OSError at -1, or of a module."""
    if name not in _PROTOTYPES:
        return getattr(_MODULES.get(name, os), name)
    number = [_NUMBERS[name][COLUMN]] if name in _NUMBERS else []
    # getattr() would return one cached function for all that are syscall(), with the argtypes of the last
    function = _libc["syscall" if number else name]
    function.argtypes = [getattr(ctypes, _TYPES[letter]) for letter in _PROTOTYPES[name]]

    def invoke(*args):  # type: ignore[no-untyped-def]
        result = function(*number, *[os.fsencode(arg) if isinstance(arg, str) else arg for arg in args])
        if result == -1:
            raise OSError(ctypes.get_errno(), "")
        return result

    return invoke


def show(arg: object) -> str:
    """Return one argument or result of a call as a C programmer would write it."""
    if arg is None:
        return "NULL"
    if isinstance(arg, bytes) and arg.isascii():
        text = arg.decode()
        if "".join(text.split()).replace("\0", "").isprintable() and (text.strip("\0") or not text):
            arg = text
    if isinstance(arg, (bytes, ctypes.Array)):
        return f"<struct of {len(arg)} bytes>"
    if isinstance(arg, list) and arg and isinstance(arg[-1], list):
        return "<struct termios>"
    text = repr(arg).replace("'", '"')
    return text if len(text) <= 200 else text[:197] + "..."


def show_call(name: str, args: "tuple[object, ...]", dir_fd: "int | None") -> str:
    """Return a call as the manual would write it."""
    return f"{name}({', '.join(map(show, args))}{'' if dir_fd is None else f', dir_fd={dir_fd}'})"


def call(name: str, *args: object, why: str, dir_fd: "int | None" = None):  # type: ignore[no-untyped-def]
    """Make the system call `name`, return its result; raise CallError, which tells what it was for.

    `why` is what --explain says of the call, and how the message begins if it fails. What changes something
    outside this process comes through here, so --explain shows it. str becomes bytes as by os.fsencode.
    """
    if name not in _bound:
        _bound[name] = _bind(name)
    if name == "execve":  # when it succeeds nobody is left to tell
        log.step(show_call(name, args, None), "?", why)
    at_directory = {} if dir_fd is None else {"dir_fd": dir_fd}
    try:
        result = _bound[name](*args, **at_directory)  # type: ignore[operator]
    except (OSError, termios.error) as error:
        number, shown = error.args[0] or errno.EIO, show_call(name, args, dir_fd)
        log.step(shown, f"-1 {errno.errorcode.get(number, number)}", why)
        raise CallError(number, shown, why) from None
    if log.explain and (name != "fork" or result):  # fork returns twice, the story goes on once
        log.step(show_call(name, args, dir_fd), "0" if result is None else show(result), why)
    return result


HINTS = (  # how a call begins, its error, the remedy: where the error misleads, or has but one cause
    ('mount("overlay"', errno.ENODEV, "this kernel lacks overlay; on the host: modprobe overlay"),
    ('mount("overlay"', errno.EPERM, "overlay in a user namespace needs Linux 5.11; sudo works before"),
    ('mount("overlay"', errno.EINVAL, "overlay takes no --upperdir on overlay, and no third overlay on two"),
    ('mount("overlay"', errno.ELOOP, "the same directory twice: each --rootfs has to be another"),
    ("pivot_root", errno.EINVAL, "the root here is an initramfs or a chroot: pivot_root cannot swap it"),
    ("unshare(CLONE_NEWPID", errno.EPERM,
     "root here lacks CAP_SYS_ADMIN, as in a container that was started without --privileged"),
)  # fmt: skip


def as_failure(error: BaseException) -> Failure:
    """Return what to tell of an exception. An OSError not from call() begins with our function's name."""
    trace = error.__traceback__
    while trace and trace.tb_next and trace.tb_next.tb_frame.f_code.co_name not in TELLERS:
        trace = trace.tb_next
    line, step = (trace.tb_lineno, trace.tb_frame.f_code.co_name.replace("_", " ")) if trace else (0, "")
    if isinstance(error, Failure):
        error.line = error.line or line
        return error
    if isinstance(error, CallError):
        fits = (row[2] for row in HINTS if error.shown.startswith(row[0]) and error.errno == row[1])
        return Failure(str(error), next(fits, ""), line=line)
    if isinstance(error, OSError):
        text = ": ".join(filter(None, (step, str(error.filename or ""), error.strerror or str(error))))
        return Failure(text, line=line)
    return Failure(f"internal error: {type(error).__name__}: {error}", line=line)  # a mistake in this file


def attempt(step, *args: object, **keywords: object):  # type: ignore[no-untyped-def]
    """Take a step that may fail: return its result, or None."""
    try:
        return step(*args, **keywords)
    except OSError:
        return None


def tolerate(step, *args: object, **keywords: object) -> None:  # type: ignore[no-untyped-def]
    """Take a step of the teardown; its failure is a warning."""
    try:
        step(*args, **keywords)
    except OSError as error:
        log.warning(as_failure(error).message)


def mount(
    source: "str | None", target: str, fstype: "str | None", flags: int, data: "str | None", why: str
) -> None:
    """Attach a filesystem, or change how it is attached. See mount(2). Raises CallError, Failure."""
    if data and len(os.fsencode(data)) >= os.sysconf("SC_PAGE_SIZE"):  # the kernel would cut it off unsaid
        raise Failure(f"{why}: mount(2) takes no more than a page of options: too many, or too long")
    call("mount", source, target, fstype, flags, data, why=why)


def open_path(path: str, why: str, flags: int = O_PATH, dir_fd: "int | None" = None) -> int:
    """Return an O_PATH descriptor: it names the place from now on, whatever becomes of the name."""
    return int(call("open", path, flags, why=why, dir_fd=dir_fd))


def at(fd: int) -> str:
    """Return a path to what `fd` refers to, by the /proc that is mounted just then.

    It stays right when the name changes, and has no comma or colon for overlay to take for its own.
    """
    return f"/proc/self/fd/{fd}"


def read_file(path: str, why: str) -> str:
    """Return the text of a file. Raises CallError."""
    fd = call("open", path, O_RDONLY, why=why)
    try:
        return os.fsdecode(read_to_end(fd, why))
    finally:
        os.close(fd)


def read_to_end(fd: int, why: str) -> bytes:
    """Return all that can be read from `fd`, until EOF. See read(2)."""
    data = chunk = call("read", fd, 1 << 16, why=why)
    while chunk:
        chunk = os.read(fd, 1 << 16)
        data += chunk
    return bytes(data)


def write_file(path: str, value: str, why: str) -> None:
    """Write `value` to an existing file, in a single write(2), as files of the kernel require.

    Not open(path, "w"): its O_CREAT makes a missing file of a cgroup EACCES, where set_limit() needs ENOENT.
    """
    fd = call("open", path, O_WRONLY, why=why)
    try:
        call("write", fd, value.encode(), why=f"{why} ({path})")
    finally:
        os.close(fd)


def read_mountinfo() -> "list[tuple[int, int, str, str, str, str, str]]":
    """Return (id, parent, root, mount point, options, type, options of the type) of each mount.

    See proc_pid_mountinfo(5).
    """
    rows = []
    table = read_file("/proc/self/mountinfo", "read the table of mounts")
    for line in table.rstrip("\n").split("\n"):  # splitlines() also splits at what a name may have
        left, _, right = line.partition(" - ")
        mount_id, parent, _, root, point, options = left.split(" ")[:6]
        for escaped, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            root, point = root.replace(escaped, char), point.replace(escaped, char)
        fstype, _, super_options = right.split(" ", 2)
        rows.append((int(mount_id), int(parent), root, point, options, fstype, super_options))
    return rows


def poll(interests: "dict[int, int]", deadline: "float | None") -> "dict[int, int]":
    """Wait until one of the descriptors is ready, or until the deadline; return what is. See poll(2)."""
    waiter = select.poll()
    for fd, events in interests.items():
        if events:  # 0 is for nothing at all; registered, poll(2) would report a hang-up again and again
            waiter.register(fd, events)
    if deadline is None:
        return dict(waiter.poll())
    milliseconds = int((deadline - time.monotonic()) * 1000) + 1
    return dict(waiter.poll(min(max(0, milliseconds), (1 << 31) - 1)))  # poll(2) takes an int


def open_unblocked(fd: int) -> int:
    """Return a descriptor for the terminal `fd` by which a write does not wait for it; `fd` if it is none.

    A terminal that polls writable can still block (Ctrl-S), and signals would wait with us. Opened anew,
    because O_NONBLOCK on the caller's own would be seen by all who share it.
    """
    if os.isatty(fd):
        flags = O_WRONLY | os.O_NOCTTY | O_NONBLOCK
        return attempt(os.open, at(fd), flags) or fd
    return fd


# ---- Options, what can be asked for: LIMITS, OPTIONS, parse --------------------------------------


class Options:
    """What `run` was asked for; the defaults are here. Sizes in bytes, times in seconds."""

    interactive = tty = read_only = privileged = explain = False
    memory: "int | None" = None
    memory_swap: "int | None" = None  # memory plus swap; -1 = unlimited
    memory_swappiness: "int | None" = None
    cpu_shares: "int | None" = None
    cpus: "float | None" = None
    cpuset_cpus: "str | None" = None
    cpuset_mems: "str | None" = None
    pids_limit: "int | None" = 2048  # so that a fork bomb stays inside
    oom_score_adj: "int | None" = None
    upperdir = workdir = user = hostname = name = pidfile = cgroup_parent = ""
    network = "none"
    stop_timeout = 10.0
    log_format = "text"

    def __init__(self) -> None:
        self.rootfs: "list[str]" = []
        self.volume: "list[tuple[str, str, bool]]" = []  # source, target, read-only
        self.tmpfs: "list[tuple[str, int, str]]" = []  # target, mount flags, data
        self.env: "list[tuple[str, str | None]]" = []
        self.cap_add: "list[str]" = []
        self.cap_drop: "list[str]" = []
        self.asked: "set[str]" = set()  # the options that came with a value, as opposed to defaults
        self.id = os.urandom(6).hex()
        self.rootless = os.geteuid() != 0
        self.cwd: str = attempt(os.getcwd) or ""  # the caller's directory; "" when it has been deleted

    def is_bound_view(self) -> bool:
        """Tell whether the root is the host's, bound read-only: it has no writable layer."""
        return self.rootless and not self.rootfs


# <linux/capability.h>: the place in the list is the number
CAPABILITIES = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP
    LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE
    SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME
    SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG
    WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE""".split()

ALL_CAPABILITIES = CAPABILITIES + ["ALL"] * (64 - len(CAPABILITIES))  # "ALL": newer than the list

# Each parse_ function below turns the text of a value into the value; it raises ValueError.
_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def is_number(text: str) -> bool:
    """Tell whether `text` is a whole number in plain digits, and not absurdly long."""
    return text.isascii() and text.isdecimal() and len(text) < 20


def parse_size(text: str) -> int:
    """Return the bytes that `text` stands for: 100m, 1.5g, 64MiB, 1048576."""
    number = text.lower().rstrip("bkmgti")
    unit = text.lower()[len(number) :]
    if unit[1:] in ("b", "ib"):
        unit = unit[0]
    whole, dot, fraction = number.partition(".")
    if unit not in _UNITS or not is_number(whole) or (dot and not is_number(fraction)):
        raise ValueError(f"{text!r} is not a size such as 100m, 1.5g or 64MiB")
    size = (int(whole + fraction) << _UNITS[unit]) // int("1" + "0" * len(fraction))
    if not 0 < size < 1 << 63:
        raise ValueError(f"{text!r} is out of range: more than 0 and less than 8388608t")
    return size


def parse_memory(text: str) -> int:
    """Return the bytes of --memory: with less than a page nothing could start."""
    size = parse_size(text)
    if size < 4096:
        raise ValueError(f"{text!r} is less than one page of memory: 4096 bytes")
    return size


def parse_memory_swap(text: str) -> int:
    """Return the bytes of --memory-swap; -1 stands for no limit."""
    return -1 if text == "-1" else parse_size(text)


def whole_number(low: int, high: int):  # type: ignore[no-untyped-def]
    """Return a parse function for the whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        if not is_number(text[text.startswith("-") :]) or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def parse_pids_limit(text: str) -> "int | None":
    """Return a number of processes and threads; None, for -1, is no limit."""
    limit: int = whole_number(-1, 1 << 22)(text)
    if limit == 0:
        raise ValueError("0 would leave no room for the command itself; -1 is no limit")
    return None if limit == -1 else limit


def parse_decimal(text: str) -> float:
    """Return a number that may have a fraction."""
    if not is_number(text.replace(".", "", 1)):
        raise ValueError(f"{text!r} is not a number such as 0.5 or 2")
    return float(text)


def parse_cpus(text: str) -> float:
    """Return a number of CPUs, which this machine has to have."""
    cpus, available = parse_decimal(text), os.cpu_count() or 1
    if not 0.01 <= cpus <= available:
        raise ValueError(f"{text!r} is not within 0.01 and {available}, the CPUs of this machine")
    return cpus


def expand_list(text: str) -> "set[int]":
    """Return the numbers of a list such as 0-1,3. See cpuset(7), "List format"."""
    numbers: "set[int]" = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not is_number(first) or not is_number(last if dash else first):
            raise ValueError(f"{text!r} is not a list such as 0-1,3")
        if max(int(first), int(last or 0)) >= 1 << 16:  # more than any kernel has, and to be written out
            raise ValueError(f"{text!r} goes beyond {(1 << 16) - 1}")
        if int(last or first) < int(first):
            raise ValueError(f"{text!r} has a range that runs backwards")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def parse_list(text: str) -> str:
    """Check a list of CPUs or nodes; return it unchanged."""
    expand_list(text)
    return text


def parse_text(text: str) -> str:
    """Return a path or a name, which is not empty."""
    if not text:
        raise ValueError("the value is empty")
    return text


def parse_inside(text: str) -> str:
    """Return an absolute path inside the container, for --workdir."""
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is not an absolute path")
    return text


def parse_volume(text: str) -> "tuple[str, str, bool]":
    """Return (source, target, read-only) of SRC:DST[:ro|rw]; a colon in SRC is part of its name."""
    rest, _, mode = text.rpartition(":")
    if mode not in ("ro", "rw"):
        rest, mode = text, "rw"
    source, _, target = rest.rpartition(":")
    if not source or not target.startswith("/") or not target.strip("/."):
        raise ValueError(f"{text!r} is not SRC:DST[:ro|rw] with an absolute DST other than /")
    return source, target, mode == "ro"


# Options of a mount as mountinfo and --tmpfs name them
MOUNT_WORDS = {"ro": MS_RDONLY, "nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC}
_OPPOSITES = {"rw": "ro", "suid": "nosuid", "dev": "nodev", "exec": "noexec"}


def parse_tmpfs(text: str) -> "tuple[str, int, str]":
    """Return (target, mount flags, data) of DST[:OPTIONS]. See tmpfs(5)."""
    target, _, rest = text.partition(":")
    if not target.startswith("/") or not target.strip("/."):
        raise ValueError(f"{text!r} is not DST[:OPTIONS] with an absolute DST other than /")
    flags, data = {MS_NOEXEC, MS_NOSUID, MS_NODEV}, ["mode=1777"]
    for word in filter(None, rest.split(",")):
        key, _, value = word.partition("=")
        if word in MOUNT_WORDS:
            flags.add(MOUNT_WORDS[word])
        elif word in _OPPOSITES:
            flags.discard(MOUNT_WORDS[_OPPOSITES[word]])
        elif key == "size" and not value.endswith("%"):
            data.append(f"size={parse_size(value)}")
        elif key in ("size", "mode", "uid", "gid", "nr_inodes") and value:
            data.append(word)
        else:
            raise ValueError(f"{word!r} is not an option of tmpfs known here")
    return target, union(flags), ",".join(data)


def parse_env(text: str) -> "tuple[str, str | None]":
    """Return (name, value) of K=V, or of K with the caller's value; None when that has none."""
    name, equals, value = text.partition("=")
    if not name:
        raise ValueError(f"{text!r} is not NAME=VALUE or NAME")
    return name, value if equals else os.environ.get(name)


def parse_name(text: str) -> str:
    """Return a name for the host or the cgroup: no slash, so it is no path; no newline, so no second line."""
    plain = text.replace("-", "").replace(".", "").replace("_", "")
    if not (plain.isascii() and plain.isalnum() and text[0].isalnum() and len(text) <= 64):
        raise ValueError(f"{text!r} is not a name: [a-zA-Z0-9][a-zA-Z0-9_.-]*, up to 64 characters")
    return text


def one_of(*choices: str):  # type: ignore[no-untyped-def]
    """Return a parse function that takes these words and no others."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is neither {' nor '.join(choices)}")
        return text

    return parse


def parse_cgroup_parent(text: str) -> str:
    """Return the path of a cgroup from the top of its hierarchy, with no way back up in it."""
    parts = [part for part in text.split("/") if part]
    if not parts or "." in parts or ".." in parts:
        raise ValueError(f"{text!r} is not the path of a cgroup, such as /batch.slice/job")
    return "/" + "/".join(parts)


def parse_capability(text: str) -> str:
    """Return the name of a capability as in CAPABILITIES, or ALL."""
    name = text.upper()
    name = name[4:] if name.startswith("CAP_") else name
    if name != "ALL" and name not in CAPABILITIES:
        raise ValueError(f"{text!r} is not a capability; capabilities(7) lists them")
    return name


class Option:
    """One row of the command line: its names, what it takes, and what makes a value of the text."""

    def __init__(self, names, text, metavar="", parse=None, repeat=False) -> None:  # type: ignore[no-untyped-def]
        self.names, self.metavar, self.parse = names.split(), metavar, parse
        self.text, self.repeat = text, repeat
        self.long = next(name for name in self.names if name.startswith("--"))
        self.dest = self.long[2:].replace("-", "_")


class Limit(Option):
    """An option that is written to a file of a cgroup controller: which file, which value, on v1 and v2."""

    def __init__(self, names, metavar, parse, text, controller, v1_file, v2_file, v1=None, v2=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__(names, text, metavar, parse)
        self.controller = controller
        self.files = {1: v1_file, 2: v2_file}
        v1 = v1 or (lambda options: getattr(options, self.dest))
        self.values = {1: v1, 2: v2 or v1}  # functions from Options to the value, None: do not write it


def shares_to_weight(shares: int) -> int:
    """Return the v2 weight (1..10000, normal 100) for v1 CPU shares (2..262144, normal 1024).

    The kernel has no conversion; this is the curve that runc (since 1.3.2) and crun (1.23) use.
    """
    log2 = math.log2(shares)
    return math.ceil(10 ** ((log2 * log2 + 125 * log2) / 612 - 7 / 34))


def swap_of(options: Options) -> "str | None":
    """Return v2's limit, which is for swap alone; the option means memory plus swap, as v1 does."""
    if options.memory is None or options.memory_swap is None:
        return None
    return "max" if options.memory_swap == -1 else str(options.memory_swap - options.memory)


CPU_PERIOD = 100000  # microseconds: the kernel's default

# In this order: v1 refuses a memsw limit below the memory limit; on v2 --memory-swappiness 0 is a second
# value for memory.swap.max, which has to replace the first.
# Adding a limit is adding a row here, its default to Options, and its rows to the README's two tables.
# This table is the parser, the help, what is written and what is read back.
LIMITS = (
    Limit("-m --memory", "SIZE", parse_memory, "memory limit: bytes, or with b, k, m, g, t",
          "memory", "memory.limit_in_bytes", "memory.max"),
    Limit("--memory-swap", "SIZE", parse_memory_swap,
          "memory plus swap; -1 = unlimited (default: twice the memory)",
          "memory", "memory.memsw.limit_in_bytes", "memory.swap.max", v2=swap_of),
    Limit("--memory-swappiness", "N", whole_number(0, 100),
          "0 to 100; cgroup v2 has 0 only, which is no swap",
          "memory", "memory.swappiness", "memory.swap.max"),
    Limit("-c --cpu-shares --cpushare", "N", whole_number(2, 262144),
          "CPU weight against others, 1024 = normal", "cpu", "cpu.shares", "cpu.weight",
          v2=lambda o: o.cpu_shares and shares_to_weight(o.cpu_shares)),
    Limit("--cpus", "N", parse_cpus, "at most this many CPUs' worth of time, such as 0.5",
          "cpu", "cpu.cfs_quota_us", "cpu.max", lambda o: o.cpus and round(o.cpus * CPU_PERIOD),
          lambda o: o.cpus and f"{round(o.cpus * CPU_PERIOD)} {CPU_PERIOD}"),
    Limit("--cpuset-cpus --cpuset", "LIST", parse_list, "run on these CPUs only, such as 0-1,3",
          "cpuset", "cpuset.cpus", "cpuset.cpus"),
    Limit("--cpuset-mems", "LIST", parse_list, "use memory of these NUMA nodes only",
          "cpuset", "cpuset.mems", "cpuset.mems"),
    Limit("--pids-limit", "N", parse_pids_limit,
          "at most N processes and threads (default: 2048); -1 = no limit",
          "pids", "pids.max", "pids.max"),
)  # fmt: skip

OPTIONS = (
    Option("-i --interactive", "keep stdin open; without it stdin is /dev/null"),
    Option("-t --tty", "give the command a terminal of its own"),
    *LIMITS,
    Option("--oom-score-adj", "-1000 to 1000: whom the kernel kills first when memory runs out",
           "N", whole_number(-1000, 1000)),
    Option("--rootfs",
           "root filesystem, never written to; repeatable, each stacked on those before; "
           "without it: a throwaway view of the host's files", "DIR", parse_text, repeat=True),
    Option("--upperdir", "keep what is written in DIR, to go on with it later", "DIR", parse_text),
    Option("--read-only", "make the root read-only"),
    Option("-v --volume", "show the host's SRC at DST", "SRC:DST[:ro]", parse_volume, repeat=True),
    Option("--tmpfs", "an empty filesystem in memory; size=, mode=, exec and others",
           "DST[:OPTIONS]", parse_tmpfs, repeat=True),
    Option("-w --workdir", "start in DIR, made if missing", "DIR", parse_inside),
    Option("-e --env", "set an environment variable; K alone copies the caller's",
           "K[=V]", parse_env, repeat=True),
    Option("-u --user", "names in the container's /etc, or numbers", "USER[:GROUP]", parse_text),
    Option("--hostname", "host name (default: the container's id)", "NAME", parse_name),
    Option("--name", "name of the cgroup; refused while in use", "NAME", parse_name),
    Option("--network --net", "none: one of its own, with loopback only (default); host: the host's",
           "none|host", one_of("none", "host")),
    Option("--cap-add", "one capability more, or ALL", "NAME", parse_capability, repeat=True),
    Option("--cap-drop", "one capability less, or ALL", "NAME", parse_capability, repeat=True),
    Option("--privileged", "all capabilities, no seccomp filter, nothing masked: for trusted code"),
    Option("--pidfile", "write the command's pid on the host to FILE", "FILE", parse_text),
    Option("--cgroup-parent", "make the cgroup below this one", "PATH", parse_cgroup_parent),
    Option("--stop-timeout", "from the first TERM, INT or HUP to the kill (default: 10)",
           "SECONDS", parse_decimal),
    Option("--explain", "tell on stderr what is done, call by call, and why"),
    Option("--log-format", "how mydocker's own lines look", "text|json", one_of("text", "json")),
)  # fmt: skip

BY_NAME = {name: option for option in OPTIONS for name in option.names}
SEE_HELP = "mydocker.py run --help lists the options"
USAGE = "mydocker.py run [OPTIONS] COMMAND [ARG...]"


def parse(words: "list[str]", options: Options) -> "list[str]":
    """Fill in the options and return the command of `run`; the first word that is no option begins it.

    Return no command where help is asked for. Raises Failure.

    Not by argparse, which takes the command's own words for options (sh -c, stress -m) and costs
    8 ms; it describes the same table in print_help().
    """
    rest = words[::-1]  # reversed: the next word is the last
    while rest and rest[-1].startswith("-") and rest[-1] != "-":
        word = rest.pop()
        if word in ("-h", "--help"):
            return []
        if word == "--":
            break
        if word.startswith(("-cpuset", "-cpushare")):  # one dash, as the book has it
            word = "-" + word
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            take(options, name, value if equals else None, rest)
            continue
        letters = word[1:]
        while letters:  # -ti is -t -i; -m100m, -m=100m and -m 100m are one
            name, letters = "-" + letters[0], letters[1:]
            if letters and name in BY_NAME and BY_NAME[name].metavar:
                take(options, name, letters[letters[0] == "=" :], rest)
                break
            take(options, name, None, rest)
    if not rest:
        raise Failure("run: no command given", SEE_HELP)
    return rest[::-1]


def take(options: Options, name: str, value: "str | None", rest: "list[str]") -> None:
    """Store one option, with its value from `value` or, when that is None, from the end of `rest`."""
    option = BY_NAME.get(name)
    if not option:
        raise Failure(f"run: there is no option {name}", SEE_HELP)
    if not option.metavar:
        if value is not None:
            raise Failure(f"run: {name} takes no value")
        setattr(options, option.dest, True)
        return
    if value is None:
        if not rest:
            raise Failure(f"run: {name} needs a value: {option.metavar}")
        value = rest.pop()
    try:
        parsed = option.parse(value)
    except ValueError as error:
        raise Failure(f"run: {name}: {error}") from None
    if option.repeat:
        getattr(options, option.dest).append(parsed)
    else:
        setattr(options, option.dest, parsed)
    options.asked.add(option.dest)


# ---- Cgroups, what it may use: Hierarchy, Cgroups ------------------------------------------------

NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)  # how the kernel says that a cgroup is another's


class Unavailable(Failure):
    """No cgroup can be had here. Fatal when a limit was asked for; otherwise the run goes on without."""

    hint = (
        "as root, or in a cgroup of your own: "
        "systemd-run --user --scope -p Delegate=yes python3 mydocker.py run ..."
    )


class Hierarchy:
    """One mounted tree of cgroups. A controller (memory, cpu) bounds one resource; v2 has one tree for all
    of them, with the key "" in find_hierarchies(), v1 one per controller or group of them.
    """

    def __init__(self, controllers: str, top: str, own: str) -> None:
        self.version = 1 if controllers else 2
        self.controllers, self.top, self.own = controllers, top, own  # own: where we are in it
        self.rows: "list[tuple[Limit, str]]" = []  # the limits to set in it, each with its value
        self.shared = ""  # the cgroup above those of all containers
        self.directory = ""  # the container's own


def find_hierarchies() -> "dict[str, Hierarchy]":
    """Return the hierarchy of each v1 controller, and that of v2 under "". See cgroups(7).

    v1, hybrid and v2 differ per controller. The usual mount points are tried first: mountinfo takes
    9 ms to read where 5000 filesystems are mounted.
    """
    found: "dict[str, Hierarchy]" = {}
    # split at \n alone, as a name may have other ends of a line; empty where nothing was ever mounted
    for line in filter(None, read_file("/proc/self/cgroup", "find the cgroups we are in").split("\n")):
        _, controllers, path = line.split(":", 2)
        if controllers.startswith("name=") or path.startswith("/.."):  # no limits; outside our namespace
            continue
        top, own = "", path
        names = [controllers] if controllers else [".", "unified"]
        for usual in [os.path.normpath(f"/sys/fs/cgroup/{name}") for name in names]:
            if os.path.exists(f"{usual}{path}/{'tasks' if controllers else 'cgroup.controllers'}"):
                top = usual
                break
        else:  # mounted elsewhere, or, inside another container, not from its root
            for _, _, root, point, _, fstype, options in read_mountinfo():
                same = set(controllers.split(",")) <= set(options.split(","))
                if fstype == "cgroup2" and not controllers or fstype == "cgroup" and same:
                    if (path + "/").startswith(root.rstrip("/") + "/"):
                        top, own = point, path[len(root.rstrip("/")) :]
        if top:
            hierarchy = Hierarchy(controllers, top, (top + own).rstrip("/"))
            found.update(dict.fromkeys(controllers.split(","), hierarchy))
    return found


def start_time(pid: "int | str") -> str:
    """Return when process `pid` started, in ticks since boot. See proc_pid_stat(5)."""
    why = "numbers are used again: pid and start time together name one process"
    return read_file(f"/proc/{pid}/stat", why).rpartition(")")[2].split()[19]


def is_alive(pid: str, started: str) -> bool:
    """Tell whether process `pid` is still the one that started then; when in doubt, it is."""
    try:
        return start_time(pid) == started
    except CallError as error:
        return error.errno not in (errno.ENOENT, errno.ESRCH)


class Cgroups:
    """The cgroups of one container: PARENT/mydocker/NAME.PID.STARTTIME in each hierarchy with a limit.

    Two levels, because systemd rewrites its own cgroup.subtree_control at every daemon-reload. With one
    level below it our controllers, and so the limits, would vanish without a word; with a second that
    has them enabled the kernel refuses to take them away ("top-down constraint" in cgroup-v2.rst).
    PID and start time are those of run(): a later run sees by them whose leftovers it may sweep.
    Runs outside.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.name = f"{options.name or options.id}.{os.getpid()}.{start_time('self')}"
        self.used: "list[Hierarchy]" = []
        # each with an open file: init writes "0" to it, and the kernel moves the writer into our cgroup
        self.joins: "list[tuple[Hierarchy, int]]" = []
        self.leaf = ""  # the leaf below our own cgroup, when we had to move there

    def create(self) -> None:
        """Make the cgroups, write every limit, read it back, open the files to join by. Raises Failure."""
        found = find_hierarchies()
        for limit in LIMITS:
            hierarchy = found.get(limit.controller) or found.get("")
            if hierarchy:
                value = limit.values[hierarchy.version](self.options)
                if value is not None:
                    hierarchy.rows.append((limit, str(value)))
            elif self.is_asked(limit.dest):
                raise Unavailable(f"{limit.long}: no cgroup hierarchy is mounted")
        wanted = [hierarchy for hierarchy in dict.fromkeys(found.values()) if hierarchy.rows]
        if "" in found and not any(hierarchy.version == 1 for hierarchy in wanted):
            wanted = [found[""]]  # on v2 always: so the container sees a cgroup of its own
        if not wanted and self.is_asked("cgroup_parent"):
            raise Unavailable("--cgroup-parent: no cgroup can be made here")
        for hierarchy in wanted:
            try:
                self.build(hierarchy)
            except Unavailable:
                if self.is_asked("cgroup_parent", *(row[0].dest for row in hierarchy.rows)):
                    raise
                continue  # nobody asked for a limit, and there are none to be had
            # v1 by "tasks": a thread that moves only itself is spared the wait that hurry_join() tells of
            path = f"{hierarchy.directory}/{'tasks' if hierarchy.version == 1 else 'cgroup.procs'}"
            fd = call("open", path, O_WRONLY, why="init will join the cgroup by it: it sees no path to it")
            self.joins.append((hierarchy, fd))

    def hurry_join(self) -> None:
        """On v2 wait for the kernel's cgroup lock now, while init makes its mounts.

        The first write to any cgroup.procs waits 5 to 20 ms for an RCU grace period, until every CPU has
        let go of what it was reading; one soon after does not. So run() writes itself into the cgroup that
        it is in, which changes nothing, and init's own write goes through at once.
        """
        for hierarchy, _ in self.joins:
            if hierarchy.version == 2:
                path = f"{self.leaf or hierarchy.own}/cgroup.procs"  # where it is not ours, init will wait
                attempt(write_file, path, "0", "let the kernel get ready for init's move")

    def is_asked(self, *names: str) -> bool:
        """Tell whether one of these options was given, and is not only a default."""
        return not self.options.asked.isdisjoint(names)

    def build(self, hierarchy: Hierarchy) -> None:
        """Make our cgroup in `hierarchy` and set its limits. Raises Unavailable, Failure, CallError."""
        parent = self.find_parent(hierarchy)
        if hierarchy.version == 2:
            source = parent if self.options.rootless else hierarchy.top  # for root hand_down() enables them
            available = read_file(f"{source}/cgroup.controllers", "which are there").split()
            for limit, _ in hierarchy.rows:
                if limit.controller not in available and self.is_asked(limit.dest):
                    text = f"{limit.long}: {source} has no {limit.controller} controller (it has: "
                    raise Unavailable(f"{text}{' '.join(available) or 'none'})", "as root there may be more")
            hierarchy.rows = [row for row in hierarchy.rows if row[0].controller in available]
            if parent == hierarchy.own and parent != hierarchy.top:  # the top one may hold processes
                self.leave(parent)
        controllers = {limit.controller for limit, _ in hierarchy.rows}
        hierarchy.shared = f"{parent}/mydocker"
        self.used.append(hierarchy)
        while not hierarchy.directory:
            self.make_directory(hierarchy)
        if hierarchy.version == 2:
            hand_down(controllers, hierarchy.top, hierarchy.shared)
        elif "cpuset" in controllers:
            inherit_cpuset(hierarchy.directory)
        self.check_neighbours(hierarchy.shared)  # now that ours is there: two of one --name see each other
        for limit, value in hierarchy.rows:
            self.set_limit(limit, value, hierarchy)

    def make_directory(self, hierarchy: Hierarchy) -> None:
        """Make the shared cgroup, and ours in it: from then on no other run can remove the shared one.

        `directory` stays "" when one did between the two mkdir calls; the caller tries again.
        """
        directory = f"{hierarchy.shared}/{self.name}"
        try:
            if not os.path.isdir(hierarchy.shared):
                call("mkdir", hierarchy.shared, MODE_755, why="the cgroup above all containers")
            call("mkdir", directory, MODE_755, why="the container's own cgroup")
            hierarchy.directory = directory
        except CallError as error:
            if error.errno in NOT_OURS:
                raise Unavailable(str(error)) from None
            if error.errno not in (errno.EEXIST, errno.ENOENT, errno.ENODEV):
                raise  # those: another run was faster to make the shared one, or has just removed it

    def find_parent(self, hierarchy: Hierarchy) -> str:
        """Return the cgroup below which ours goes. Raises Unavailable when none is ours to use."""
        if self.options.cgroup_parent:
            parent = hierarchy.top + self.options.cgroup_parent
            if not os.path.isdir(parent):
                raise Failure(f"--cgroup-parent: there is no {parent}", "mkdir makes a cgroup")
            return parent
        if hierarchy.version == 1:
            if os.access(hierarchy.own, os.W_OK):
                return hierarchy.own
        elif is_delegated(hierarchy.own) and is_alone(hierarchy.own):
            return hierarchy.own  # ours to divide
        elif not self.options.rootless:
            return find_managed(hierarchy) or hierarchy.top  # root need not ask
        names = ", ".join(row[0].long for row in hierarchy.rows if self.is_asked(row[0].dest))
        raise Unavailable(f"{names}: no cgroup here is ours to use")

    def leave(self, own: str) -> None:
        """Move run() itself to a leaf: v2 hands controllers down only from a cgroup without processes."""
        leaf = f"{own}/mydocker-run.{os.getpid()}"
        call("mkdir", leaf, MODE_755, why="a leaf for run(): processes and controllers do not mix")
        self.leaf = leaf
        write_file(f"{leaf}/cgroup.procs", "0", "move there")

    def check_neighbours(self, shared: str) -> None:
        """Refuse a --name in use, and sweep empty cgroups whose run() was killed.

        At most 16 are looked at in a run, so that a crowd does not slow the start. Of two runs that
        take one name at the same moment both may be refused; never do both go on.
        """
        rows = [entry.rsplit(".", 2) for entry in os.listdir(shared) if entry != self.name]
        rows = [row for row in rows if len(row) == 3 and all(map(is_number, row[1:]))]
        begin = os.getpid() % (len(rows) or 1)  # elsewhere in each run, so that all get their turn
        for name, pid, started in (rows[begin:] + rows[:begin])[:16]:
            if not is_alive(pid, started):
                path = f"{shared}/{name}.{pid}.{started}"  # which may be in use, or swept by another run
                attempt(call, "rmdir", path, why="sweep: the run that made it is dead")
        for name, pid, started in rows:
            if name and name == self.options.name and is_alive(pid, started):
                raise Failure(f"--name {name}: in use by the container of process {pid}")

    def set_limit(self, limit: Limit, value: str, hierarchy: Hierarchy) -> None:
        """Write one limit and read it back: a value that the kernel changed is not the one asked for."""
        file = limit.files[hierarchy.version]
        path = f"{hierarchy.directory}/{file}"
        if limit.dest == "memory_swappiness" and hierarchy.version == 2 and value != "0":
            raise Failure("--memory-swappiness: cgroup v2 has none; 0 is possible: no swap")
        if limit.controller == "cpuset":
            above = f"{os.path.dirname(hierarchy.directory)}/{limit.files[2]}"
            above += "" if hierarchy.version == 1 else ".effective"
            available = read_file(above, "which are there").strip()
            if not expand_list(value) <= expand_list(available):
                raise Failure(f"{limit.long} {value}: not all of these exist; available: {available}")
        try:
            write_file(path, value, f"set {limit.long}")
        except CallError as error:
            if error.errno != errno.ENOENT:
                raise
            if self.is_asked(limit.dest):
                raise Failure(f"{limit.long}: this kernel has no {file}") from None
            return  # the swap limit that --memory implies, where swap is not accounted for
        back = read_file(path, "read it back").strip()
        same = value == back
        if limit.metavar == "SIZE" and back.isdecimal():
            page = os.sysconf("SC_PAGE_SIZE")  # memory is counted in whole pages
            same = int(value) // page == int(back) // page if value != "-1" else int(back) > 1 << 62
        elif limit.controller == "cpuset":
            same = expand_list(value) == expand_list(back)
        if not same:
            raise Failure(f"{limit.long}: the kernel set {back} instead of {value} in {path}")

    def report(self, container: "Container") -> None:
        """Say which limits were hit: that a child was killed is easily overlooked. Runs at the end."""
        files_bytes = container.count_file_bytes()
        for hierarchy, _ in self.joins:
            for limit, _ in hierarchy.rows:
                if limit.dest == "memory":
                    self.report_memory(hierarchy, files_bytes)
                elif limit.dest == "pids_limit":
                    refused = read_counts(f"{hierarchy.directory}/pids.events").get("max", 0)
                    if refused:
                        log.warning(f"pids limit: the kernel refused {refused} fork{'s' * (refused > 1)} "
                                    f"at the limit of {self.options.pids_limit} processes")  # fmt: skip

    def report_memory(self, hierarchy: Hierarchy, files_bytes: int) -> None:
        """Say what the kernel killed for memory."""
        files = {1: ("memory.oom_control", "memory.max_usage_in_bytes"), 2: ("memory.events", "memory.peak")}
        events, peak_file = files[hierarchy.version]
        counts = read_counts(f"{hierarchy.directory}/{events}")
        killed = counts.get("oom_kill", 0)
        if not killed or not self.options.memory:
            return
        text = f"out of memory: the kernel killed {killed} process{'es' if killed > 1 else ''}"
        if hierarchy.version == 2 and not counts.get("oom"):
            text += " at the limit of a cgroup above"  # that of a service, or a job
        else:
            text += f" at the {show_size(self.options.memory)} limit"
        peak = attempt(read_file, f"{hierarchy.directory}/{peak_file}", "how far it went")
        if peak:  # memory.peak came with Linux 5.19
            text += f" (peak {show_size(int(peak))})"
        if files_bytes > self.options.memory // 4:
            text += f"; {show_size(files_bytes)} of it are files in the writable layer and /dev/shm"
        log.warning(text)

    def remove(self) -> None:
        """Remove what create() made, even if it stopped half-way. Never raises."""
        for hierarchy in self.used:
            if hierarchy.directory:
                tolerate(call, "rmdir", hierarchy.directory, why="remove the container's cgroup")
            attempt(call, "rmdir", hierarchy.shared, why="remove the one above if we were the last")
        if self.leaf:
            tolerate(self.go_back)

    def go_back(self) -> None:
        """Undo leave(): a cgroup that hands something down takes no process. Raises CallError."""
        own = os.path.dirname(self.leaf)
        handed = read_file(f"{own}/cgroup.subtree_control", "what is handed down").split()
        if handed:
            text = " ".join("-" + name for name in handed)
            write_file(f"{own}/cgroup.subtree_control", text, "hand nothing down any more")
        write_file(f"{own}/cgroup.procs", "0", "move back")
        call("rmdir", self.leaf, why="remove the leaf of run()")


def is_delegated(cgroup: str) -> bool:
    """Tell whether a v2 cgroup is handed to us, so that we may divide it."""
    if os.geteuid():
        files = ("", "cgroup.procs", "cgroup.subtree_control")
        return all(os.access(f"{cgroup}/{file}", os.W_OK) for file in files)
    # to root everything is writable, which proves nothing: systemd marks what it gave away by Delegate=yes,
    # and what it gave to another user belongs to that user
    marks = os.listxattr(cgroup)
    return ("trusted.delegate" in marks or "user.delegate" in marks) and os.stat(cgroup).st_uid == 0


def is_alone(cgroup: str) -> bool:
    """Tell whether a v2 cgroup holds nobody but us: with others, it can hand no controller down."""
    return read_file(f"{cgroup}/cgroup.procs", "who is here").split() == [str(os.getpid())]


def find_managed(hierarchy: Hierarchy) -> str:
    """Return the v2 cgroup above our own if a manager such as Slurm divides it; "" if systemd itself does.

    Ours goes there, beside our own, so that the limits of the job hold for the container as well, and
    run() stays where the manager looks for it, to signal it.
    """
    above = level = os.path.dirname(hierarchy.own)
    while len(level) > len(hierarchy.top):
        if is_delegated(level):  # handed over here by systemd: what is below is the manager's
            busy = read_file(f"{above}/cgroup.procs", "who is here")  # then it can hand nothing down
            return "" if busy else above
        level = os.path.dirname(level)
    return ""


def hand_down(controllers: "set[str]", top: str, cgroup: str) -> None:
    """Enable v2 controllers for what is below `cgroup`: they have to be handed down from the top."""
    level = top
    for name in cgroup[len(top) :].split("/"):
        level = os.path.join(level, name).rstrip("/")
        path = f"{level}/cgroup.subtree_control"
        missing = controllers.difference(read_file(path, "what is handed down").split())
        if missing:
            try:
                text = " ".join("+" + name for name in sorted(missing))
                write_file(path, text, "hand the controllers down to the cgroups below")
            except CallError as error:
                if error.errno == errno.EBUSY:
                    raise Unavailable(f"{level} has processes, so it can hand no controller down",
                                      "--cgroup-parent names another") from None  # fmt: skip
                if error.errno in NOT_OURS:
                    raise Unavailable(str(error)) from None
                raise


def inherit_cpuset(cgroup: str) -> None:
    """Fill an empty v1 cpuset from the one above: v1 lets nobody into one without CPUs and nodes."""
    for file in ("cpuset.cpus", "cpuset.mems"):
        if not read_file(f"{cgroup}/{file}", "is it filled").strip():
            inherit_cpuset(os.path.dirname(cgroup))  # from the top down: a --cgroup-parent may be empty, too
            above = read_file(f"{os.path.dirname(cgroup)}/{file}", "what the cgroup above has")
            write_file(f"{cgroup}/{file}", above.strip(), "v1: an empty cpuset lets nobody in")


def read_counts(path: str) -> "dict[str, int]":
    """Return the numbers of a cgroup's file of `key value` lines; none when there is no such file."""
    words = (attempt(read_file, path, "what happened") or "").split()
    return dict(zip(words[::2], map(int, words[1::2])))


def show_size(size: float) -> str:
    """Return bytes as a person would say them: 104857600 -> 100 MiB."""
    units = ["GiB", "MiB", "KiB", "bytes"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop()
    return f"{size:.1f}".replace(".0", "") + " " + units[-1]


# ---- Root filesystem, what it has: enter_rootfs. In init, in a mount namespace of its own --------

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
# What Docker hides or freezes of /proc and /sys: of these the kernel has one for all containers
MASKED_PATHS = """/proc/acpi /proc/asound /proc/interrupts /proc/kcore /proc/keys /proc/latency_stats
    /proc/sched_debug /proc/scsi /proc/timer_list /proc/timer_stats /sys/firmware
    /sys/devices/virtual/powercap""".split()
READ_ONLY_PATHS = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()
# The container's own in every view: the host's processes, hardware, devices and sockets stay outside
PRIVATE_PATHS = ("/proc", "/sys", "/dev", "/run")
# Filesystems that hold no files of the host's, wherever they are mounted
PSEUDO_FILESYSTEMS = """autofs binfmt_misc bpf cgroup cgroup2 configfs debugfs devpts devtmpfs
    efivarfs fusectl hugetlbfs mqueue nsfs proc pstore rpc_pipefs securityfs selinuxfs sysfs
    tracefs""".split()
# A mount that is covered by another, or a user's FUSE mount, which is closed even to root
UNREACHABLE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)
SCRATCH = "/tmp"  # a directory that every host has: ours are mounted over it, in our namespace only
TMPFS_FLAGS = MS_NOSUID | MS_NODEV
INERT = MS_NOSUID | MS_NODEV | MS_NOEXEC  # for filesystems of which nothing is to be executed


def layer_of(options: Options) -> str:
    """Return where the layer is in --upperdir: for its owner alone, as it may have setuid programs."""
    return f"{options.upperdir}/layer"


class HostFiles:
    """What the container takes from the host, as descriptors: opened before anything is covered."""

    def __init__(self, options: Options) -> None:
        host_network = options.network == "host"
        rootfs = options.rootfs[::-1] or ["/"]  # overlay wants the topmost first
        self.lowers = [open_path(path, "a lowerdir of the overlay", O_PATH_DIR) for path in rootfs]
        self.filesystems = [] if options.rootfs or options.rootless else open_host_mounts()
        self.devices = [(f"/dev/{name}", open_path(f"/dev/{name}", "for /dev inside")) for name in DEVICES]
        names = filter(exists, ("/etc/resolv.conf", "/etc/hosts") if host_network else ())
        volumes = [("--network host:", name, name, True) for name in names]  # before those of the user
        volumes += [("--volume", *volume) for volume in options.volume]
        self.volumes = [(open_path(source, f"{what} {source}"), target, read_only, f"{what} {target}")
                        for what, source, target, read_only in volumes]  # fmt: skip
        flags = O_PATH_DIR | O_NOFOLLOW
        self.layer = open_path(layer_of(options), "--upperdir", flags) if options.upperdir else -1
        self.sys = -1
        if host_network and options.rootless:  # only the owner of a network namespace may mount its sysfs
            self.sys = open_path("/sys", "the host's, as is the network")


def enter_rootfs(options: Options) -> None:
    """Assemble the container's root, make it "/", let go of the host's. See pivot_root(2).

    What is needed of the host is opened before anything is covered; everything inside is made only
    after the root is entered, where absolute symlinks cannot lead out.

    pivot_root(".", ".") takes the directory we stand in for both arguments: it becomes the root, and the
    old root is stacked on top of it. A path from "/" starts at the new one, underneath; only "/.." would
    climb onto the old. It stays there because the binds come from it, and goes last: umount2(".") follows
    "." up to what is mounted on top.

    The root is one of three. The last two are the host view:
        --rootfs             its directories, under an overlay with a writable layer
        none, as root        each filesystem of the host under such an overlay; /run is its own
        none, without root   the host's mounts, bound and read-only, no layer; /run and /tmp are its own
    """
    host = HostFiles(options)
    scratch = os.path.realpath(SCRATCH)  # later on an absolute symlink would lead into the new root
    layer = mount_new_root(options, host)
    call("chdir", SCRATCH, why="stand in the new root")
    why = 'the new root becomes "/"; the old one is mounted on top of it, until umount2'
    call("pivot_root", ".", ".", why=why)
    mount_proc()
    mount_dev(options, host.devices)
    mount_sys(options, host.sys)
    overlays = [mount_host_filesystem(path, fd, layer, options) for path, fd in host.filesystems]
    if not options.rootfs:
        place = at(open_mount_point("/run"))
        mount("tmpfs", place, "tmpfs", TMPFS_FLAGS, "mode=755", "the host's has sockets")
        if options.rootless:
            place = at(open_mount_point("/tmp"))
            mount("tmpfs", place, "tmpfs", TMPFS_FLAGS, "mode=1777", "a writable place")
    if layer >= 0:  # not before: overlay takes no upperdir of a filesystem that is not mounted
        why = "uncover the host's: a volume may come from there"
        call("umount2", f"/..{scratch}", MNT_DETACH, why=why)
    mount_volumes(options, host.volumes)
    call("umount2", ".", MNT_DETACH, why="let go of the old root: no path leads to it any more")
    if not os.path.samestat(os.stat("/.."), os.stat("/")):
        raise Failure("the old root is still there")
    if options.read_only and layer >= 0:  # last: mount points were made there; no layer: it is read-only
        flags = MS_REMOUNT | MS_BIND | MS_RDONLY | nodev(options)
        for place in ["/", *[at(fd) for fd in overlays if fd >= 0]]:
            mount(None, place, None, flags, None, "--read-only: the root alone; volumes keep their own flags")
    if not options.privileged:
        mask_paths()


def mount_new_root(options: Options, host: HostFiles) -> int:
    """Mount the root-to-be on SCRATCH; return a descriptor of its writable layer's directory, -1 for none.

    Two mounts on one place: the overlay covers the tmpfs, which only that descriptor still reaches.
    """
    if options.is_bound_view():
        why = "the host's root with all that is mounted below: overlay would show what mounts cover"
        mount("/", SCRATCH, None, MS_BIND | MS_REC, None, why)
        fd = open_path(SCRATCH, "the new root")
        mount_setattr(fd, MS_RDONLY | MS_NODEV, "all of it")
        os.close(fd)
        log.warning("without root the host's files are read-only inside; /tmp and /run are its own")
        return -1
    why = "memory for what is written: it goes with the container"
    mount("tmpfs", SCRATCH, "tmpfs", TMPFS_FLAGS, "mode=700", why)
    layer = host.layer if options.upperdir else open_path(SCRATCH, "the writable layer", O_PATH_DIR)
    why = f"the new root: {'the rootfs' if options.rootfs else 'the host'} with a writable layer"
    mount_overlay(host.lowers, layer, "", SCRATCH, options, why)
    return layer


def open_in_root(path: str, why: str, create: str = "") -> int:
    """Return an O_PATH descriptor for `path`, every symlink resolved inside the container's root.

    `create` is "dir" or "file" to make what is missing. The kernel follows no link here: each
    component is opened with O_NOFOLLOW and a link's text is walked in its place, so neither image
    nor volume can lead a mount elsewhere; a magic link of /proc (/proc/self/root, an open
    descriptor) is refused. openat2(2) with RESOLVE_IN_ROOT walks so in one call, from Linux 5.6, but
    makes nothing that is missing. See path_resolution(7). Runs in init, after pivot_root. Raises
    CallError, Failure.
    """
    stack = [open_path("/", why, O_PATH_DIR)]
    inside = f"{why}: {path} in the container"
    proc, links = os.stat("/proc").st_dev, 0
    names = path.split("/")[::-1]
    try:
        while names:
            name = names.pop()
            if name == ".." and len(stack) > 1:
                os.close(stack.pop())
            if name in ("", ".", ".."):
                continue
            kind = "dir" if create and any(names) else create  # only the last can be a file
            stack.append(open_component(name, inside, stack[-1], kind))
            status = os.fstat(stack[-1])
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > 40:
                    raise Failure(f"{why}: {path}: a loop of symlinks")
                # these four are text; every other link of /proc leads where no path was walked
                if status.st_dev == proc and name not in ("self", "thread-self", "mounts", "net"):
                    raise Failure(f"{why}: {path} leads through a magic link of /proc: refused")
                text = os.readlink("", dir_fd=stack[-1])
                keep = 1 if text.startswith("/") else len(stack) - 1
                while len(stack) > keep:
                    os.close(stack.pop())
                names += text.split("/")[::-1]
        return stack.pop()
    finally:
        for fd in stack:
            os.close(fd)


def open_target(path: str, create: str, options: Options, why: str) -> int:
    """Return a descriptor, as open_in_root() does, for a place that may be mounted on.

    The root may not: the old root is still stacked there; the mount would land on top of it, and be
    what umount2() then detaches in place of the old root. Refused, too: /proc, for what we read
    there must come from the kernel; /sys/fs/cgroup, which is mounted later; and /dev, /dev/null and all in
    /dev/pts, by which we and run() open null and the terminal (--privileged without -t allows these).
    """
    fd = open_in_root(path, why, create)
    status = os.fstat(fd)
    places, filesystems = ["/", "/sys/fs/cgroup"], ["/proc"]
    if options.tty or not options.privileged:
        places, filesystems = [*places, "/dev", "/dev/null"], ["/proc", "/dev/pts"]
    is_ours = any(os.path.samestat(status, os.stat(place)) for place in filter(exists, places))
    if is_ours or status.st_dev in [os.stat(place).st_dev for place in filesystems]:
        os.close(fd)
        raise Failure(f"{why}: {path} in the container is the root, /dev, /dev/null, /sys/fs/cgroup, "
                      "or in /proc or /dev/pts: refused")  # fmt: skip
    return fd


def open_component(name: str, why: str, dir_fd: "int | None", create: str) -> int:
    """Return an O_PATH descriptor for `name` in the directory `dir_fd`, following no link."""
    try:
        return open_path(name, why, O_PATH | O_NOFOLLOW, dir_fd)
    except CallError as error:
        if error.errno != errno.ENOENT or not create:
            raise
    if create == "dir":
        call("mkdir", name, MODE_755, dir_fd=dir_fd, why=f"{why}: it is missing")
    else:
        create_file(name, f"{why}: it is missing", dir_fd)
    return open_path(name, why, O_PATH | O_NOFOLLOW, dir_fd)


def create_file(path: str, why: str, dir_fd: "int | None" = None) -> None:
    """Create an empty file for something to be mounted on."""
    os.close(call("open", path, O_CREATE, MODE_644, why=why, dir_fd=dir_fd))


def exists(path: str) -> bool:
    """Tell whether `path` exists. os.path.exists() says no to every error: a path to hide would stay."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def open_mount_point(path: str) -> int:
    """Return a descriptor for a directory such as /proc in the new root; a symlink there is refused.

    close_all() closes it at the latest.
    """
    fd = open_component(path, "where to mount", None, "dir")
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        raise Failure(f"{path} in the rootfs is not a directory (a symlink?): refused")
    return fd


def mount_setattr(fd: int, flags: Flag, why: str) -> None:
    """Add MS_RDONLY, MS_NODEV to the mount behind `fd` and to all below it. See mount_setattr(2)."""
    # struct mount_attr: set, clear, propagation, userns; MOUNT_ATTR_* have the values of MS_* for these
    attributes = struct.pack("4Q", flags, 0, 0, 0)
    try:
        why = f"{why} ({flags!r})"
        where = AT_EMPTY_PATH | AT_RECURSIVE
        call("mount_setattr", fd, "", where, attributes, len(attributes), why=why)
    except CallError as error:
        if error.errno != errno.ENOSYS:
            raise
        remount_each(fd, flags, why)


def remount_each(fd: int, flags: Flag, why: str) -> None:
    """Do the work of mount_setattr before Linux 5.12: remount what is below one by one.

    Each keeps the flags that it has: in a user namespace those of the host's mounts are locked, and a
    remount without one of them is refused with EPERM.
    """
    words = dict(MOUNT_WORDS, noatime=MS_NOATIME, nodiratime=MS_NODIRATIME, relatime=MS_RELATIME)
    below = {mount_id(fd)}
    for number, parent, _, point, options, _, _ in read_mountinfo():
        if number in below or parent in below:
            below.add(number)
            try:
                place = open_path(point, why)
            except CallError as error:
                if error.errno not in UNREACHABLE:
                    raise
                continue  # covered, or beyond a directory that neither we nor the container may enter
            if mount_id(place) == number:  # else it is covered by another, where nobody can reach it
                kept = {words[word] for word in options.split(",") if word in words}
                if kept.isdisjoint((MS_NOATIME, MS_RELATIME)):
                    kept.add(MS_STRICTATIME)
                mount(None, at(place), None, MS_REMOUNT | MS_BIND | flags | union(kept), None, why)
            os.close(place)


def mount_id(fd: int) -> int:
    """Return the number that mountinfo gives the mount behind `fd`. See proc_pid_fdinfo(5)."""
    text = read_file(f"/proc/self/fdinfo/{fd}", "which mount is this")
    return int(text.partition("mnt_id:")[2].split()[0])


def mount_overlay(
    lowers: "list[int]", layer: int, suffix: str, target: str, options: Options, why: str
) -> None:
    """Mount on `target` the directories `lowers`, topmost first, with a writable layer in `layer`.

    `lowers` are overlay's lowerdirs, which are never changed; what is written goes to its upperdir,
    upper + `suffix` in `layer`; its workdir, beside that, is where it prepares a file before it moves it
    there. All are named through descriptors, so no name can bring in an option of its own. See
    overlayfs.rst of the kernel.
    """
    upper_and_work = []
    for name in ("upper" + suffix, "work" + suffix):
        path = f"{at(layer)}/{name}"
        if not os.path.isdir(path):
            call("mkdir", path, MODE_700, why="a directory for the overlay")
            if name.startswith("upper"):  # the merged root has the owner and the mode of upperdir
                status = os.stat(at(lowers[0]))
                mode = stat.S_IMODE(status.st_mode)
                if not options.rootless:
                    call("chown", path, status.st_uid, status.st_gid, why="as the one below")
                call("chmod", path, Flag(f"0{mode:o}", mode), why="as the one below")
        upper_and_work.append(open_path(path, "for the overlay", O_PATH_DIR | O_NOFOLLOW))
    upper, work = upper_and_work
    data = f"lowerdir={':'.join(map(at, lowers))},upperdir={at(upper)},workdir={at(work)}"
    if options.rootless:
        data += ",userxattr"  # overlay marks files by xattrs; trusted.* needs root outside
    try:
        mount("overlay", target, "overlay", nodev(options), data, why)
    finally:
        os.close(upper)
        os.close(work)


def nodev(options: Options) -> Flag:
    """Return MS_NODEV unless --privileged: for every mount on which a device node could be made."""
    return NO_FLAGS if options.privileged else MS_NODEV


def open_host_mounts() -> "list[tuple[str, int]]":
    """Return (path, descriptor) of each filesystem below / that holds files, parents first."""
    found = []
    for number, _, _, point, _, fstype, _ in sorted(read_mountinfo(), key=lambda row: row[3]):
        if point == "/" or fstype in PSEUDO_FILESYSTEMS or is_below(point, PRIVATE_PATHS):
            continue
        try:
            fd = open_path(point, "a filesystem of the host")
            if mount_id(fd) == number:  # else it is covered by another mount, which may be the host's proc
                mode = os.stat(at(fd)).st_mode
                if stat.S_ISDIR(mode) or stat.S_ISREG(mode):  # a socket would be one of the host's inside
                    found.append((point, fd))
        except OSError as error:
            if error.errno in (errno.ENOTCONN, errno.ESTALE, errno.EIO):  # its server or disk is dead
                log.warning(f"the host's {point} cannot be shown inside: {error.strerror}")
            elif error.errno not in UNREACHABLE:
                raise
    return found


def is_below(path: str, places: "tuple[str, ...]") -> bool:
    """Tell whether `path` is one of `places` or somewhere below one."""
    return any((path + "/").startswith(place + "/") for place in places)


def mount_host_filesystem(path: str, lower: int, layer: int, options: Options) -> int:
    """Show a filesystem of the host like its root: with a writable layer, else read-only.

    Return a descriptor of the overlay; -1 where there is none.
    """
    why = f"the host's {path}"
    if stat.S_ISDIR(os.stat(at(lower)).st_mode):
        suffix = path.replace("%", "%25").replace("/", "%2F")
        target = open_in_root(path, why, "dir")
        try:
            mount_overlay([lower], layer, suffix, at(target), options, why)
            return open_in_root(path, why)
        except CallError as error:  # EINVAL: overlay takes no directory of this filesystem, such as FAT
            if error.errno not in (errno.EINVAL, errno.ENAMETOOLONG):  # too long: the suffix
                raise
        finally:
            os.close(target)
    bind(lower, path, True, options, why, NO_FLAGS)
    return -1


def mount_volumes(options: Options, volumes: "list[tuple[int, str, bool, str]]") -> None:
    """Mount what --tmpfs and --volume ask for; parents first, whatever the order they came in."""
    steps = [(target, -1, False, f"--tmpfs {target}", flags, data) for target, flags, data in options.tmpfs]
    steps += [(target, fd, read_only, why, 0, "") for fd, target, read_only, why in volumes]
    for target, source, read_only, why, flags, data in sorted(steps, key=lambda step: step[0].count("/")):
        if source < 0:
            fd = open_target(target, "dir", options, why)
            mount("tmpfs", at(fd), "tmpfs", flags | nodev(options), data, why)
            os.close(fd)
        else:
            bind(source, target, read_only, options, why)


def bind(source: int, target: str, read_only: bool, options: Options, why: str, rec: Flag = MS_REC) -> None:
    """Show what is behind `source` at `target` inside, made in the writable layer if missing.

    With MS_REC in `rec` what is mounted below it comes along.
    """
    status = os.stat(at(source))
    fd = open_target(target, "dir" if stat.S_ISDIR(status.st_mode) else "file", options, why)
    mount(at(source), at(fd), None, MS_BIND | rec, None, why)
    os.close(fd)
    flags = nodev(options) | (MS_RDONLY if read_only else NO_FLAGS)
    if flags:
        fd = open_in_root(target, why)  # anew: the first descriptor refers to what the mount now covers
        if not os.path.samestat(status, os.fstat(fd)):  # in a volume that others write to as well
            raise Failure(f"{why}: {target} was exchanged meanwhile: refused")
        mount_setattr(fd, flags, why)
        os.close(fd)


def mount_proc() -> None:
    """Mount the container's /proc, first of all: other mounts name their places by /proc/self/fd.

    It shows the pid namespace of whoever mounts it. See proc(5).
    """
    fd = open_mount_point("/proc")
    call("fchdir", fd, why="stand where it goes")
    mount("proc", ".", "proc", INERT, None, "the processes of the new pid namespace")
    call("chdir", "/", why="back to the root")
    os.close(fd)


def mount_dev(options: Options, devices: "list[tuple[str, int]]") -> None:
    """Mount /dev: harmless devices, bound from the host, and a devpts of its own. See pts(4).

    Bound, not made with mknod: a bind keeps the flags of the host's /dev, so the container's own can be
    nodev, and a node that root makes inside can be opened nowhere.
    """
    flags = MS_NOSUID | MS_STRICTATIME | nodev(options)
    mount("tmpfs", at(open_mount_point("/dev")), "tmpfs", flags, "mode=755,size=64m", "no device of the host")
    for path, fd in devices:
        create_file(path, "where to bind it")
        mount(at(fd), path, None, MS_BIND, None, "a device that is harmless")
    for name, text in DEVICE_LINKS.items():
        call("symlink", text, f"/dev/{name}", why="programs expect it")
    for name in ("pts", "shm", "mqueue"):
        call("mkdir", f"/dev/{name}", MODE_755, why="where to mount it")
    flags = MS_NOSUID | MS_NOEXEC
    data = "newinstance,ptmxmode=0666,mode=0620" + ("" if options.rootless else ",gid=5")  # tty
    mount("devpts", "/dev/pts", "devpts", flags, data, "terminals of its own, numbered from 0")
    mount("shm", "/dev/shm", "tmpfs", INERT, "mode=1777,size=64m", "POSIX shared memory")
    mount("mqueue", "/dev/mqueue", "mqueue", INERT, None, "POSIX queues of the ipc namespace")
    if options.tty:
        create_file("/dev/console", "where to bind the terminal")


def mount_sys(options: Options, host_sys: int) -> None:
    """Mount /sys, read-only: its network part is the container's, the hardware is the host's."""
    fd = open_mount_point("/sys")
    flags = INERT | (NO_FLAGS if options.privileged else MS_RDONLY)
    if host_sys < 0:
        mount("sysfs", at(fd), "sysfs", flags, None, "devices as the network namespace has them")
    else:
        mount(at(host_sys), at(fd), None, MS_BIND | MS_REC, None, "the host's, as is the network")
        mount_setattr(open_mount_point("/sys"), MS_RDONLY | MS_NODEV, "all of it")
    os.close(fd)


def mask_paths() -> None:
    """Hide what tells of the host, freeze what would change the one kernel that all share."""
    for path in filter(exists, MASKED_PATHS):
        if stat.S_ISDIR(os.stat(path).st_mode):
            mount("tmpfs", path, "tmpfs", MS_RDONLY | INERT, "size=0", "hide this directory")
        else:
            mount("/dev/null", path, None, MS_BIND, None, "hide this file")
    for path in filter(exists, READ_ONLY_PATHS):  # in two calls: a bind ignores all other flags, see mount(2)
        mount(path, path, None, MS_BIND | MS_REC, None, "a mount of its own, with flags of its own")
        mount(None, path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | INERT, None, "make it read-only")


def mount_cgroup(hierarchies: "list[Hierarchy]") -> None:
    """Mount /sys/fs/cgroup, read-only. Runs in init, in a cgroup namespace: its root is our cgroup."""
    top, flags, why = "/sys/fs/cgroup", MS_RDONLY | INERT, "the container's own cgroup, nothing above"
    if not hierarchies:
        if os.listdir(top):  # without root, --network host shows the host's /sys with its cgroups
            mount("tmpfs", top, "tmpfs", flags, "size=0", "hide the host's")
        return
    if not any(hierarchy.controllers for hierarchy in hierarchies):
        mount("cgroup2", top, "cgroup2", flags, None, why)
        return
    mount("tmpfs", top, "tmpfs", INERT, "mode=755,size=64k", "a place for each hierarchy")
    for hierarchy in hierarchies:
        names = hierarchy.controllers or "unified"  # v2 beside v1 is there on a hybrid host
        fstype = "cgroup" if hierarchy.controllers else "cgroup2"
        call("mkdir", f"{top}/{names}", MODE_755, why="where to mount it")
        mount(fstype, f"{top}/{names}", fstype, flags, hierarchy.controllers or None, why)
        for name in names.split(",") if "," in names else ():
            call("symlink", names, f"{top}/{name}", why="as on the host")
    mount(None, top, None, MS_REMOUNT | MS_BIND | flags, None, "it is complete")


# ---- Isolation, what it may ask for: seccomp_filter, drop_privileges -----------------------------

# What the container's root keeps: Docker's 14. MKNOD is harmless: where a node can be made all is nodev.
DEFAULT_CAPABILITIES = """CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP
    NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE""".split()

# Refused calls, name:x86_64:generic ("-": there is none; aarch64, riscv64 and loongarch64 share one
# table). The key names the capabilities with any of which Docker allows them; "" is none. It is
# Docker's default profile turned around: what that does not allow.
REFUSED_CALLS = {
    "SYS_ADMIN BPF": "bpf:321:280",
    "SYS_ADMIN PERFMON": "perf_event_open:298:241",
    "SYS_ADMIN SYSLOG": "syslog:103:116",
    "SYS_ADMIN": """mount:165:40 umount2:166:39 sethostname:170:161 setdomainname:171:162
        quotactl:179:60 lookup_dcookie:212:18 unshare:272:97 fanotify_init:300:262 setns:308:268
        open_tree:428:428 move_mount:429:429 fsopen:430:430 fsconfig:431:431 fsmount:432:432
        fspick:433:433 mount_setattr:442:442 quotactl_fd:443:443 lsm_get_self_attr:459:459
        lsm_set_self_attr:460:460 lsm_list_modules:461:461""",
    "SYS_BOOT": "reboot:169:142",
    "SYS_MODULE": "init_module:175:105 delete_module:176:106 finit_module:313:273",
    "SYS_NICE": """mbind:237:235 set_mempolicy:238:237 get_mempolicy:239:236
        set_mempolicy_home_node:450:450""",
    "SYS_PACCT": "acct:163:89",
    "SYS_PTRACE": "kcmp:312:272 pidfd_getfd:438:438 process_madvise:440:440",
    "SYS_RAWIO": "iopl:172:- ioperm:173:-",
    "SYS_TIME": "settimeofday:164:170 clock_settime:227:112",
    "SYS_TTY_CONFIG": "vhangup:153:58",
    "DAC_READ_SEARCH": "open_by_handle_at:304:265",
    "": """uselib:134:- ustat:136:- sysfs:139:- pivot_root:155:41 _sysctl:156:- swapon:167:224 swapoff:168:225
        kexec_load:246:104 add_key:248:217 request_key:249:218 keyctl:250:219 migrate_pages:256:238
        move_pages:279:239 kexec_file_load:320:294 userfaultfd:323:282 io_uring_setup:425:425
        io_uring_enter:426:426 io_uring_register:427:427""",
}
# ENOSYS, for which libc has another way, is the answer to numbers that nobody has looked at here yet:
# those above the newest known call (x32's too, which have bit 30 set), and those of the gap up to 423,
# which the kernel has begun to fill. From 424 on all machines share one numbering. A new call that is to
# be let through raises LAST_CALL; what is refused among those up to it then needs its word above.
LAST_CALL, GAP_FROM, GAP_TO = 466, (336, 295), 423
# clone3 has its flags behind a pointer, which a filter cannot follow; on ENOSYS libc falls back to clone
CLONE3 = 435
# Judged by the low 32 bits of an argument, which are all that the kernel looks at, too; the numbers
# are those of x86_64 and of the others, as above
CLONE, SOCKET, PERSONALITY, IOCTL = (56, 220), (41, 198), (135, 92), (16, 29)
NAMESPACE_FLAGS = 0x7E020000  # all CLONE_NEW*: in a user namespace of its own, root has powers again
REFUSED_FAMILIES = (38, 40)  # AF_ALG, AF_VSOCK: no namespace divides them
ALLOWED_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
REFUSED_REQUESTS = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: they type into a terminal


def seccomp_filter(kept: "set[str]") -> bytes:
    """Return the program that the kernel runs at every system call of the container. See seccomp(2).

    Classic BPF, <linux/bpf_common.h>, over struct seccomp_data: the number at offset 0, the
    architecture at 4, six 64-bit arguments from 16. A step is (code, how far to jump if true, if
    false, value), counted from the next step. Calls that take a capability in `kept` are let through.
    """
    # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_JGE, BPF_JSET, BPF_RET
    load, equal, at_least, any_bit, verdict = 0x20, 0x15, 0x35, 0x45, 0x06
    # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with the error that the call is to return
    allow, refuse, unknown = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS

    def if_so(test: int, result: int, *values: int) -> "list[tuple[int, int, int, int]]":
        # when the test fails, jump over the verdict
        return [step for value in values for step in ((test, 0, 1, value), (verdict, 0, 0, result))]

    program = [(load, 0, 0, 4), (equal, 1, 0, ARCHITECTURE), (verdict, 0, 0, unknown), (load, 0, 0, 0)]
    program += if_so(at_least, unknown, LAST_CALL + 1)
    program += [(at_least, 2, 0, GAP_TO + 1), *if_so(at_least, unknown, GAP_FROM[COLUMN])]  # 2: over if_so
    for capabilities, calls in REFUSED_CALLS.items():
        for row in calls.split() if kept.isdisjoint(capabilities.split()) else ():
            number = row.split(":")[1 + COLUMN]
            if number != "-":
                program += if_so(equal, refuse, int(number))
    if "SYS_ADMIN" not in kept:
        program += if_so(equal, unknown, CLONE3)
    for numbers, argument, tests in (
        (CLONE, 0, [] if "SYS_ADMIN" in kept else if_so(any_bit, refuse, NAMESPACE_FLAGS)),
        (SOCKET, 0, if_so(equal, refuse, *REFUSED_FAMILIES)),
        (PERSONALITY, 0, [*if_so(equal, allow, *ALLOWED_PERSONALITIES), (verdict, 0, 0, refuse)]),
        (IOCTL, 1, if_so(equal, refuse, *REFUSED_REQUESTS)),
    ):
        body = [(load, 0, 0, 16 + 8 * argument), *tests, (verdict, 0, 0, allow)]
        program += [(equal, 0, len(body), numbers[COLUMN]), *body]
    program.append((verdict, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *step) for step in program)  # struct sock_filter


def find_kept_capabilities(options: Options) -> "set[str]":
    """Return the capabilities that the container's root keeps; "ALL" are those newer than CAPABILITIES."""
    kept = set(DEFAULT_CAPABILITIES)
    if options.privileged or "ALL" in options.cap_add:
        kept = {"ALL", *CAPABILITIES}
    if "ALL" in options.cap_drop:
        kept = set()
    return (kept | set(options.cap_add)) - set(options.cap_drop)


def join_session_keyring() -> None:
    """Leave the caller's keyring, which no namespace divides. See keyctl_join_session_keyring(3)."""
    try:
        why = "a session keyring of its own: root's keys stay out of reach"
        call("keyctl", KEYCTL_JOIN_SESSION_KEYRING, None, why=why)
    except CallError as error:
        if error.errno != errno.ENOSYS:  # a kernel built without keys has none to leak
            raise


def cut_bounding_set(kept: "set[str]") -> None:
    """Drop from the bounding set what is not kept: execve gives root all of it, whatever capset left.

    Runs in init while it has CAP_SETPCAP. See capabilities(7).
    """
    last = int(read_file("/proc/sys/kernel/cap_last_cap", "how many there are"))
    for number in range(last + 1):
        name = ALL_CAPABILITIES[number]
        if name not in kept:
            flag = Flag("CAP_" + name, number)
            call("prctl", PR_CAPBSET_DROP, flag, 0, 0, 0, why="nobody inside can get it any more")


def set_capabilities(kept: "set[str]") -> int:
    """Reduce effective and permitted to `kept`, as far as we have it; return that as a bit set.

    After a change to another user there is nothing left: the kernel took it. Inheritable and, with
    it, ambient are emptied: through them the caller's capabilities would survive execve.
    See capset(2).
    """
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3; this thread
    current = ctypes.create_string_buffer(24)
    call("capget", header, current, why="which capabilities are there")
    words = struct.unpack("6I", current.raw)  # effective, permitted, inheritable; twice 32 bits
    wanted = sum(1 << number for number, name in enumerate(ALL_CAPABILITIES) if name in kept)
    low, high = words[1] & wanted, words[4] & (wanted >> 32)  # permitted, as far as it is wanted
    data = struct.pack("6I", low, low, 0, high, high, 0)
    call("capset", header, data, why="keep these capabilities and no others")
    return int(low | high << 32)


NGROUPS_MAX = 65536  # <linux/limits.h>


def read_inside(path: str) -> "list[list[str]]":
    """Return the fields of a file like /etc/passwd inside; none when there is no such file."""
    try:
        fd = open_in_root(path, "look up the user")
    except CallError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return []
        raise
    try:
        status = os.fstat(fd)
        # to open a FIFO would be to wait for its writer, to read /proc/kmsg for the next message
        filesystems = [os.stat(place).st_dev for place in ("/proc", "/sys")]
        if not stat.S_ISREG(status.st_mode) or status.st_dev in filesystems or status.st_size > 1 << 20:
            raise Failure(f"{path} in the container is not a regular file of at most 1 MiB")
        lines = read_file(at(fd), f"look up the user in {path}").split("\n")
        return [line.split(":") for line in lines if "\0" not in line]
    finally:
        os.close(fd)


def find_user(options: Options) -> "tuple[int, int, list[int], str]":
    """Return (uid, gid, supplementary groups, home) for --user, by the container's own files."""
    user, colon, group = (options.user or "0").partition(":")
    rows = [row for row in read_inside("/etc/passwd") if len(row) > 5 and user in (row[0], row[2])]
    name, _, uid, gid, _, home = (rows + [["", "", user, "0", "", "/"]])[0][:6]  # a number needs no row
    groups: "list[str]" = []
    if options.user:
        table = [row for row in read_inside("/etc/group") if len(row) > 3]
        if colon:
            gid = next((row[2] for row in table if group in (row[0], row[2])), group)
        else:
            groups = [row[2] for row in table if name and name in row[3].split(",")]
    if len(groups) > NGROUPS_MAX:
        raise Failure(f"--user {options.user}: in more than {NGROUPS_MAX} groups of the container's /etc")
    for what, number in (("user", uid), *[("group", number) for number in (gid, *groups)]):
        if not is_number(number) or int(number) >= (1 << 32) - 1:
            raise Failure(f"--user {options.user or 0}: no such {what} in the container's /etc")
    return int(uid), int(gid), [int(number) for number in groups], home or "/"


def drop_privileges(options: Options, uid: int, gid: int, groups: "list[int]") -> None:
    """Give up, for good, what the command is not to have. Runs in init, last before execve.

    In this order: cutting the bounding set and setting groups need what a change of user takes away;
    without CAP_SYS_ADMIN the kernel takes a filter only after no_new_privs; and the filter is last
    because it refuses calls made before it, keyctl among them. See credentials(7), seccomp(2).
    """
    kept = find_kept_capabilities(options)
    join_session_keyring()
    cut_bounding_set(kept)
    try:
        if not options.rootless:  # denied there: who gives up a group may open a file that shuts it out
            call("setgroups", groups, why="its groups, none of the caller's")
        call("setresgid", gid, gid, gid, why="its group")
        call("setresuid", uid, uid, uid, why="its user")
    except CallError as error:
        hint = "without root there is but one user inside: 0, the caller; with sudo there are all"
        raise Failure(f"--user {options.user}: {error}", hint if options.rootless else "") from None
    had = set_capabilities(kept)
    for name in options.cap_add:
        if uid == 0 and name in kept and name != "ALL" and not had >> CAPABILITIES.index(name) & 1:
            raise Failure(f"--cap-add {name}: mydocker was started without it")
    why = "die with the parent, again: the change of user took that back"
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, why=why)
    if not options.privileged:
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, why="setuid programs give nothing more")
        program = ctypes.create_string_buffer(seccomp_filter(kept))
        count = len(program.raw) // 8
        fprog = ctypes.create_string_buffer(struct.pack("HP", count, ctypes.addressof(program)))  # sock_fprog
        where = Flag(f"&fprog[{count}]", ctypes.addressof(fprog))
        why = "from here on the kernel asks this filter at every call"
        call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, where, 0, 0, why=why)


# ---- Init, inside, PID 1, which becomes the command: init, execute -------------------------------

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TERMINAL_READY = b"T"  # on the status pipe: the devpts is there


class Pipes:
    """The two pipes between run() and init(): the command goes in, what failed comes back.

    The command is argv, a NUL after each word, then EOF, which says go. The status is, with -t, first
    TERMINAL_READY; then, if init fails, what send_failure() sends; then EOF. EOF without a failure before
    it says that init has become the command: execve closed the last writing end.
    """

    def __init__(self) -> None:
        why = "carries the command to init; its EOF says go"
        self.command_read, self.command_write = call("pipe2", O_CLOEXEC, why=why)
        why = "carries a failure of init back; a successful execve closes it"
        self.status_read, self.status_write = call("pipe2", O_CLOEXEC, why=why)
        self.own_reader = -1  # of the status pipe, in init_by_hand(): there is no run()


def send_failure(failure: Failure, status_write: int) -> None:
    """Send run() what failed, for it to say and to end with: status, line, message, hint, a NUL between."""
    text = "\0".join((str(failure.status), str(failure.line), failure.message, failure.hint))
    try:
        os.write(status_write, text.encode(errors="surrogateescape"))
    except BrokenPipeError:
        pass  # run() is dead, and so are we in a moment
    except OSError:
        log.failure(failure)  # better by ourselves than not at all


def parse_failure(data: bytes) -> Failure:
    """Return the failure that send_failure() sent."""
    status, line, message, hint = data.decode(errors="surrogateescape").split("\0")
    return Failure(message, hint, int(status), int(line))


def init(options: Options, cgroups: Cgroups, pipes: Pipes, caller_mask: "set[int]") -> Failure:
    """Turn this process, just forked into a new pid namespace, into the container.

    Returns only when that has failed: the failure.
    """
    log.side = "init"
    try:
        # first: whatever is done here is to end with run(), also when SIGKILL ends that at this moment
        call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, why="die with the parent, whatever kills it")
        os.close(pipes.command_write)  # or the read of the command would never see EOF
        os.close(pipes.status_read)  # or is_orphan() would take us for its reader
        os.umask(0o022)  # the caller's would change the modes of what is made below
        call("setsid", why="a session of its own: /dev/tty is not the caller's terminal, Ctrl-C not for us")
        flags, what = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC, "mounts, host name, System V IPC"
        if options.network == "none":
            flags, what = flags | CLONE_NEWNET, f"{what}, network"
        call("unshare", flags, why=f"{what}: its own from here on")
        # systemd has made "/" shared: without this every mount below would show up on the host, and stay
        mount(None, "/", None, MS_REC | MS_PRIVATE, None, "no mount made here may reach the host")
        enter_rootfs(options)
        hostname = options.hostname or options.id
        call("sethostname", hostname, len(hostname), why="in the new uts namespace")
        if options.network == "none":
            bring_up_loopback()
        if options.tty:
            call("write", pipes.status_write, TERMINAL_READY, why="run() may open the pty, then send argv")
        argv = read_command(pipes.command_read)
        if options.oom_score_adj is not None:  # while we may: to lower it takes CAP_SYS_RESOURCE
            write_file("/proc/self/oom_score_adj", str(options.oom_score_adj), "set --oom-score-adj")
        join_cgroups(cgroups)
        uid, gid, groups, home = find_user(options)
        enter_workdir(options)  # it may warn, and with -t our stderr may be the container's terminal next
        attach_stdio(options, uid)
        env = environment(options, hostname, home)
        for path in find_command(argv[0], env["PATH"]):
            refuse_own_python(path)
        close_all((pipes.status_write, pipes.own_reader, log.fd))
        drop_privileges(options, uid, gid, groups)
        if is_orphan(pipes):  # run() died before PR_SET_PDEATHSIG was set: then no signal comes
            os._exit(EXIT_MYDOCKER)
        restore_signals(caller_mask)
        execute(argv, env)
    except BaseException as error:  # whatever it is: no container
        failure = as_failure(error)
    return failure


def is_orphan(pipes: Pipes) -> bool:
    """Tell whether run() is dead: then the status pipe has no reader, which is POLLERR. See poll(2)."""
    return bool(poll({pipes.status_write: select.POLLERR}, 0))  # a deadline long past: look, do not wait


def close_all(kept: "tuple[int, ...]") -> None:
    """Close every descriptor but 0 to 2 and `kept`.

    Close-on-exec would be too late: while execve looks up the command, its #! interpreter and its loader,
    a symlink to /proc/self/fd/N could still lead through a directory of the host that is open here
    (CVE-2024-21626). Before the change of user, because after it /proc/self/fd may not be listed.
    """
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in kept:
            attempt(os.close, fd)  # fails for the one by which listdir read


def bring_up_loopback() -> None:
    """Bring up lo, all that a new network namespace has. See netdevice(7)."""
    fd = call("socket", AF_INET, SOCK_DGRAM, 0, why="any socket can speak of network devices")
    request = struct.pack("16sH14x", b"lo", 1)  # struct ifreq: IFF_UP
    call("ioctl", fd, SIOCSIFFLAGS, request, why="bring up lo")
    os.close(fd)


def read_command(fd: int) -> "list[str]":
    """Return the argv that run() sends: words that end in NUL, as in /proc/PID/cmdline, until EOF.

    EOF without a word is a parent that died: nothing to do any more.
    """
    data = read_to_end(fd, "the command, as run() sends it")
    os.close(fd)
    if not data:
        os._exit(EXIT_MYDOCKER)
    return [os.fsdecode(word) for word in data[:-1].split(b"\0")]


def join_cgroups(cgroups: Cgroups) -> None:
    """Enter the cgroups, then see them as the root of all cgroups. See cgroup_namespaces(7).

    Late, so that this interpreter is not charged and small limits work; before the command's first
    instruction, so that no child of it can be outside.
    """
    for hierarchy, fd in cgroups.joins:
        call("write", fd, b"0", why=f'join, "0" is the one who writes ({hierarchy.directory})')
        os.close(fd)
    call("unshare", CLONE_NEWCGROUP, why="the root of a cgroup namespace is the cgroup it is made in")
    mount_cgroup([hierarchy for hierarchy, _ in cgroups.joins])


def attach_stdio(options: Options, uid: int) -> None:
    """Give the command its descriptors 0 to 2: its own terminal, or the caller's files untouched."""
    if options.tty:
        fd = call("open", "/dev/pts/0", O_PTY, why="the terminal whose other end run() holds")
        call("ioctl", fd, TIOCSCTTY, 0, why="the controlling terminal: Ctrl-C, job control")
        if uid:
            call("fchown", fd, uid, -1, why="the terminal is its user's")
        for number in (0, 1, 2):
            call("dup2", fd, number, why="stdin, stdout, stderr")
        os.close(fd)
        mount("/dev/pts/0", "/dev/console", None, MS_BIND, None, "its terminal by another name")
    elif not options.interactive:
        fd = call("open", "/dev/null", O_RDONLY, why="without -i there is no stdin")
        call("dup2", fd, 0, why="an empty stdin")
        os.close(fd)


def enter_workdir(options: Options) -> None:
    """Stand where the command is to start: --workdir, or in host view the caller's directory."""
    call("chdir", "/", why="inside, in any case")
    if options.workdir:
        chdir_inside(options.workdir, f"--workdir {options.workdir}", "dir")
    elif not options.rootfs:
        private = PRIVATE_PATHS + (("/tmp",) if options.rootless else ())
        try:  # a private place has other files inside, under the same names
            visible = options.cwd and not is_below(options.cwd, private)
            if visible:
                chdir_inside(options.cwd, "the caller's directory")
        except (CallError, Failure):
            visible = False
        if not visible:
            where = options.cwd or "which is deleted,"
            log.warning(f"the current directory {where} is not visible inside: starting in /")


def chdir_inside(path: str, why: str, create: str = "") -> None:
    """Enter a directory of the container, found as open_in_root() does it. Raises CallError, Failure."""
    fd = open_in_root(path, why, create)
    call("fchdir", fd, why=why)
    os.close(fd)


def environment(options: Options, hostname: str, home: str) -> "dict[str, str]":
    """Return the command's environment: these and what --env names, nothing else of the caller's."""
    env = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname, "HOME": home}
    if options.tty:
        env["TERM"] = "xterm"
    env.update((name, value) for name, value in options.env if value is not None)
    return env


def restore_signals(caller_mask: "set[int]") -> None:
    """Reset what execve would hand on: the signals that Python ignores, and the mask of run()."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # a pending one would be a KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, caller_mask)


def find_command(command: str, path: str) -> "list[str]":
    """Return where `command` may be: as it is with a slash in it, else in each directory of `path`."""
    if "/" in command:
        return [command]
    return [f"{place or '.'}/{command}" for place in path.split(":") if command]


def execute(argv: "list[str]", env: "dict[str, str]") -> None:
    """Become the command, searched for inside, by the container's PATH. Raises Failure when it cannot.

    By hand, not by os.execvp: that imports a module when it searches, and Python is out of reach now.
    See execve(2).
    """
    command, denied = argv[0], ""
    for path in find_command(command, env["PATH"]):
        try:
            call("execve", path, argv, env, why="become the command, as PID 1 of the container")
        except CallError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                if os.path.isfile(path):
                    what: "str | None" = path
                    while what and os.path.isfile(what):
                        what = attempt(find_interpreter, what)
                    text = f"{path}: its interpreter, {what or 'the ELF loader'}, is not in the container"
                    raise Failure(text, status=EXIT_NOT_FOUND) from None
            elif error.errno == errno.EACCES and "/" not in command:
                denied = path  # a later directory of PATH may have another
            else:
                why = "it is a directory" if os.path.isdir(path) else error.strerror
                raise Failure(f"{path}: cannot execute: {why}", status=EXIT_NOT_EXECUTABLE) from None
    if denied:
        raise Failure(f"{denied}: cannot execute: Permission denied", status=EXIT_NOT_EXECUTABLE)
    raise Failure(f"{command or repr(command)}: command not found", status=EXIT_NOT_FOUND)


def refuse_own_python(path: str) -> None:
    """Refuse what leads to the host's Python by /proc/self/exe: a command, or what its #! names.

    Until execve, our /proc/self/exe is the host's Python. A command that leads there would start it with
    the image's own loader: code of the image that can open the host's Python to write (CVE-2019-5736).
    Done as root: the kernel reads the #! of a script that the command's user may not read. run() looks
    once more, when it runs, for what leads there by another way: Container.check_program().
    """
    for _ in range(6):  # the command, and the 5 interpreters that the kernel follows
        try:
            if is_own_python(path):
                text = f"{path}: leads to the program that runs mydocker: refused"
                raise Failure(text, status=EXIT_NOT_EXECUTABLE)
            path = find_interpreter(path)
        except OSError:
            return  # execve will say what is wrong
        if not path:
            return


def find_interpreter(path: str) -> str:
    """Return what the #! of a script names, as the kernel reads it, or "". Raises OSError. See execve(2)."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        return ""
    fd = os.open(path, O_RDONLY)
    head = os.read(fd, 256)
    os.close(fd)
    # up to a newline or a NUL; words part at spaces and tabs, not at all that bytes.split() takes
    words = head[2:].partition(b"\n")[0].partition(b"\0")[0].replace(b"\t", b" ").split(b" ")
    return os.fsdecode(next(filter(None, words), b"")) if head[:2] == b"#!" else ""


def is_own_python(path: str) -> bool:
    """Tell whether `path` is this process's program: the same file, by the same mount. Raises OSError.

    By another mount, as with the host's /usr in a volume, it is like any other file that is there.
    """
    own = "/proc/self/exe"
    if not os.path.samestat(os.stat(path), os.stat(own)):
        return False
    mounts = set()
    for place in (path, own):
        fd = open_path(place, "is it the host's Python")
        mounts.add(mount_id(fd))
        os.close(fd)
    return len(mounts) == 1


# ---- Terminal, between the container's pty and the caller's: Pump, Terminal ----------------------


class Pump:
    """One direction of the relay: it holds what was read until it can be written; it waits for neither end.

    4 KiB at a time: a pty gives no more, and a pipe that polls writable takes as much.
    """

    def __init__(self, source: int, target: int, at_end: bytes = b"") -> None:
        self.source, self.target, self.at_end = source, target, at_end
        self.held, self.last = b"", b"\n"
        self.ended = False  # the source has nothing more
        self.broken = False  # the target takes nothing more: what comes is thrown away

    def interest(self) -> "tuple[int, int]":
        """Return what to poll for: a place to put what is held, or else something to take."""
        if self.held:
            return self.target, select.POLLOUT
        return self.source, 0 if self.ended else select.POLLIN

    def advance(self, ready: "dict[int, int]") -> None:
        """Read or write once, as far as the descriptors in `ready` allow."""
        if self.held:
            if ready.get(self.target):
                self.put()
        elif not self.ended and ready.get(self.source):
            self.take()

    def take(self) -> None:
        """Read once; at the end of the source, hold what is to be written for it."""
        try:
            data = os.read(self.source, 4096)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: nobody has the other end of the pty open, and all is read
                if not self.at_end:
                    raise  # or the container's output would lack something, and nobody know
                log.warning(f"stdin: {error.strerror}")
            data = b""
        if data:
            self.held, self.last = b"" if self.broken else data, data[-1:]
        else:  # EOF on a terminal is a key, ^D; after an unfinished line the first only sends the line
            self.ended = True
            self.held = self.at_end if self.last == b"\n" else self.at_end * 2

    def put(self) -> None:
        """Write once; give the target up when it takes nothing more."""
        try:
            self.held = self.held[os.write(self.target, self.held) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self.broken, self.held = True, b""
            if error.errno not in (errno.EPIPE, errno.EIO):
                log.warning(f"stdout: {error.strerror}")


class Terminal:
    """The outside end of the container's terminal.

    A pty is a pair: what is written to one end, the master, the other reads as if typed. It is made in the
    container's own devpts, so that it has a name there; only its master is here. The caller's terminal
    never goes in: whoever holds a terminal can type into it (TIOCSTI). See pty(7), ioctl_tty(2).
    """

    def __init__(self, pid: int, interactive: bool) -> None:
        # by the root of the new process: no code of the container runs yet
        path = f"/proc/{pid}/root/dev/pts/ptmx"
        flags = O_PTY | O_NONBLOCK
        self.master = call("open", path, flags, why="the master of a new pty in the container's devpts")
        call("ioctl", self.master, TIOCSPTLCK, struct.pack("i", 0), why="unlock its other end, pts/0")
        why = "held while the container lives: it may close its terminal and open it again"
        self.peer = call("ioctl", self.master, TIOCGPTPEER, O_PTY, why=why)
        self.out = Pump(self.master, open_unblocked(1))
        self.pumps = [self.out]
        self.saved: list = []  # type: ignore[type-arg]  # as tcgetattr has it
        self.resize()
        if not os.isatty(0):
            log.warning("stdin is not a terminal: -t gives the command one all the same")
        elif interactive:
            self.saved = call("tcgetattr", 0, why="to put the caller's terminal back in the end")
            self.make_raw()
        if interactive:
            self.pumps.append(Pump(0, self.master, b"\x04"))

    def make_raw(self) -> None:
        """Pass every key on as it is: what Ctrl-C means is for the container's terminal to say."""
        iflag, oflag, cflag, lflag, ispeed, ospeed, characters = self.saved
        iflag &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
        iflag &= ~(termios.INLCR | termios.IGNCR)
        cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        lflag &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        characters = characters[:]
        characters[termios.VMIN], characters[termios.VTIME] = 1, 0
        mode = [iflag, oflag & ~termios.OPOST, cflag, lflag, ispeed, ospeed, characters]
        call("tcsetattr", 0, TCSANOW, mode, why="the caller's terminal passes on every key")

    def resize(self) -> None:
        """Give the container's terminal the size of the caller's; the kernel sends SIGWINCH inside."""
        for fd in (0, 1, 2):
            if os.isatty(fd):
                size = call("ioctl", fd, TIOCGWINSZ, bytes(8), why="the size of the caller's terminal")
                call("ioctl", self.master, TIOCSWINSZ, size, why="the container's has the same")
                return

    def advance(self, ready: "dict[int, int]") -> None:
        """Let both directions read or write once."""
        for pump in self.pumps:
            pump.advance(ready)

    def drain(self) -> None:
        """Read what is left in the master: the container is gone, and what it wrote last is still to come."""
        if self.pumps:
            os.close(self.peer)
            self.pumps = [self.out]

    def hang_up(self) -> None:
        """Close the terminal under the container, as when a window is closed: who writes gets EIO."""
        self.drain()
        os.close(self.master)
        self.out.ended, self.pumps = True, []

    def restore(self) -> None:
        """Put the caller's terminal back as it was. Runs on every way out."""
        if self.saved:  # not TCSADRAIN: it waits for a terminal that is stopped
            call("tcsetattr", 0, TCSANOW, self.saved, why="put the caller's terminal back")


# ---- Run, outside: Container, run ----------------------------------------------------------------

# The first of these starts --stop-timeout: all that would end run(), by way of timers and limits, too
STOPPING = "SIGTERM SIGINT SIGHUP SIGALRM SIGVTALRM SIGPROF SIGXCPU SIGIO SIGPWR".split()
LAST_OUTPUT_SECONDS = 1  # for a reader to take it, when the container has been stopped
FORWARDED = {getattr(signal, name): name for name in [*STOPPING, "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT"]}


def watch_signals() -> "tuple[set[int], int]":
    """Block the signals that run() cares for; return (the mask before, a descriptor to read them from).

    Blocked, none can end run() between two steps, and none is lost between fork and exec. What the
    caller ignores, as under nohup, stays ignored. See signalfd(2).
    """
    watched = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    watched += [signal.SIGCHLD, signal.SIGWINCH]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a caller may have left it ignored: no word of the end
    caller_mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    # sigset_t: bit n-1 is signal n
    sigset = sum(1 << number - 1 for number in watched).to_bytes(128, "little")
    fd = call("signalfd", -1, sigset, O_CLOEXEC, why="signals as something to poll for")
    return caller_mask, fd


class Container:
    """The container as seen from outside, while it runs. One loop waits for everything at once."""

    def __init__(self, options: Options, argv: "list[str]", pid: int, pipes: Pipes, signal_fd: int) -> None:
        self.options, self.argv, self.pid = options, argv, pid
        self.pipes, self.signal_fd = pipes, signal_fd
        self.wstatus: "int | None" = None  # as wait(2) has it; None while the container lives
        self.received = b""  # what init sent through the status pipe
        self.started = False  # the status pipe has ended without a failure
        self.early_signals: "list[int]" = []  # signals from before that
        self.stopped_by = 0
        self.deadline: "float | None" = None
        self.file_fds: "list[int]" = []
        self.terminal: "Terminal | None" = None

    def supervise(self) -> int:
        """Relay signals and terminal until the command has ended; return its wait status."""
        # poll(2) looks at signals first: when it sees SIGCHLD, what init wrote before its end is in the pipe
        watched = {self.signal_fd: select.POLLIN, self.pipes.status_read: select.POLLIN}
        if not self.options.tty:
            self.send_command()
        while self.wstatus is None or self.terminal and not self.terminal.out.ended:
            interests = dict(watched)
            for pump in self.terminal.pumps if self.terminal else ():
                fd, events = pump.interest()
                interests[fd] = interests.get(fd, 0) | events
            ready = poll(interests, self.deadline)
            # handled the other way round: a signal that came when the command ran already is for the command
            if ready.get(self.pipes.status_read) and self.read_status():
                del watched[self.pipes.status_read]
            if ready.get(self.signal_fd):
                self.take_signals()
            if self.terminal:
                self.terminal.advance(ready)
                if self.terminal.out.broken and not self.stopped_by and self.wstatus is None:
                    self.terminal.hang_up()
                    self.stop(signal.SIGHUP)
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self.deadline = None
                if self.wstatus is None:
                    name, timeout = FORWARDED[self.stopped_by], self.options.stop_timeout
                    self.kill(f"{name} did not end it within {timeout:g} s: killed")
                elif self.terminal:
                    self.end_output(self.terminal.out, ready)
        return self.wstatus

    def send_command(self) -> None:
        """Send argv, a NUL after each word, and close: EOF says go. Spaces and quotes survive."""
        data = b"".join(os.fsencode(word) + b"\0" for word in self.argv)
        try:
            while data:
                data = data[call("write", self.pipes.command_write, data, why="send the command") :]
        except CallError as error:
            if error.errno != errno.EPIPE:  # then init has failed, and the other pipe says how
                raise
        os.close(self.pipes.command_write)

    def read_status(self) -> bool:
        """Take what init tells: that the pty can be opened, or a failure. Return True at EOF."""
        data = os.read(self.pipes.status_read, 1 << 16)
        if data.startswith(TERMINAL_READY):
            data = data[1:]
            if not data:  # else init has failed since, and says how
                self.open_terminal()
                return False
        self.received += data
        if data:
            return False
        self.started = not self.received
        if self.started:
            self.check_program()
        if self.started and self.options.memory:
            self.hold_files()
        for number in self.early_signals if self.started else ():
            self.forward(number)
        return True

    def check_program(self) -> None:
        """Kill what came to run on the host's Python past refuse_own_python(): see there.

        By a file exchanged meanwhile, or an interpreter that the host's binfmt_misc names. While run()
        lives nobody can write to that program, which is running: ETXTBSY (Linux 6.1, 6.12, 6.18).
        """
        if attempt(is_own_python, f"/proc/{self.pid}/exe"):  # None: it has ended already
            self.kill("the command became the program that runs mydocker: killed")

    def open_terminal(self) -> None:
        """Open the master of the container's terminal, then let init go on."""
        try:
            self.terminal = Terminal(self.pid, self.options.interactive)
        except CallError as error:
            if error.errno != errno.ENOENT and not self.stopped_by:  # ENOENT: init was killed meanwhile
                raise
        else:
            self.send_command()

    def hold_files(self) -> None:
        """Hold the writable layer and /dev/shm open: their size is asked for when the container is gone."""
        in_memory = not self.options.upperdir and not self.options.is_bound_view()
        for path in ("/", "/dev/shm") if in_memory else ("/dev/shm",):
            fd = attempt(os.open, f"/proc/{self.pid}/root{path}", O_PATH_DIR | O_NOFOLLOW)
            if fd:  # else it has ended already
                self.file_fds.append(fd)

    def count_file_bytes(self) -> int:
        """Return the bytes of memory in the writable layer and /dev/shm, and let go of them."""
        total = 0
        for fd in self.file_fds:
            usage = os.fstatvfs(fd)
            total += (usage.f_blocks - usage.f_bfree) * usage.f_frsize
            os.close(fd)
        return total

    def take_signals(self) -> None:
        """Take the signals that are pending: 128 bytes each, struct signalfd_siginfo."""
        for (number,) in struct.iter_unpack("I124x", os.read(self.signal_fd, 128 * 32)):
            if number == signal.SIGCHLD:
                self.reap()
            elif number == signal.SIGWINCH:
                if self.terminal and self.terminal.pumps:
                    self.terminal.resize()
            elif FORWARDED[number] in STOPPING:
                self.stop(number)
            else:
                self.forward(number)

    def reap(self) -> None:
        """Take the wait status if the container has ended. SIGCHLD may come for more: a stop, by kill(1)."""
        if self.wstatus is None:
            pid, wstatus = call("waitpid", self.pid, WNOHANG, why="has the container ended")
            if pid:
                self.wstatus = wstatus
                self.deadline = time.monotonic() + LAST_OUTPUT_SECONDS
                if self.terminal:
                    self.terminal.drain()

    def end_output(self, out: Pump, ready: "dict[int, int]") -> None:
        """Give up the last output if nobody reads it after a stop, or if none comes.

        Without this, whoever outside holds the container's terminal open would hold run() here.
        """
        if self.stopped_by or not out.held and not ready.get(out.source):
            out.ended = True
        else:  # there is a reader, though a slow one
            self.deadline = time.monotonic() + LAST_OUTPUT_SECONDS

    def forward(self, number: int) -> None:
        """Pass a signal on to PID 1; init would ignore it, so it waits for the command."""
        if not self.started:
            self.early_signals.append(number)
        elif self.wstatus is None:
            call("kill", self.pid, Flag(FORWARDED[number], number), why="pass the signal on")

    def stop(self, number: int) -> None:
        """Pass on the first of STOPPING and start the timeout; kill at the next, unless it is HUP."""
        name = FORWARDED[number]
        if self.wstatus is not None:
            if self.terminal:  # its last output waits for a reader who is stuck: drop it
                self.terminal.out.ended = True
        elif self.stopped_by:
            if number != signal.SIGHUP:
                self.kill(f"{name}, the second signal: killed")
        else:
            self.stopped_by = number
            if self.started:
                self.deadline = time.monotonic() + self.options.stop_timeout
                self.forward(number)
            else:
                self.kill(f"{name} before the command was started")

    def kill(self, message: str) -> None:
        """Kill the container, and say which step ended it: last, as stderr may be a stopped terminal."""
        call("kill", self.pid, SIGKILL, why="with PID 1 the kernel kills all of its namespace")
        self.deadline = None
        log.warning(message)

    def end(self) -> None:
        """Leave no process and no changed terminal behind, also when run() fails half-way."""
        try:
            if self.wstatus is None:
                call("kill", self.pid, SIGKILL, why="run() has failed: no container without it")
                call("waitpid", self.pid, NO_FLAGS, why="until it is gone")
        finally:
            if self.terminal:
                self.terminal.restore()


def enter_user_namespace() -> None:
    """Become root of a user namespace, where root is the caller outside. See user_namespaces(7).

    Before any other namespace: to make one takes CAP_SYS_ADMIN, which is had in this one only.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        call("unshare", CLONE_NEWUSER, why="a user namespace: in it, its maker is root")
        write_file("/proc/self/setgroups", "deny", "the kernel wants this before a gid_map")
        write_file("/proc/self/gid_map", f"0 {gid} 1", "group 0 inside is the caller's")
        write_file("/proc/self/uid_map", f"0 {uid} 1", "user 0 inside is the caller")
    except CallError as error:
        hint = "with sudo it works"
        for setting, bad, good in (
            ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
            ("kernel.unprivileged_userns_clone", "0", "1"),
            ("user.max_user_namespaces", "0", "15000"),
        ):
            path = "/proc/sys/" + setting.replace(".", "/")  # not every kernel has each of them
            if (attempt(read_file, path, "what forbids it") or "").strip() == bad:
                hint = f"{setting} = {bad} forbids it: sudo sysctl {setting}={good}, or use sudo"
        raise Failure(str(error), hint) from None


def prepare(options: Options) -> None:
    """Refuse what cannot work, and fill in what follows from the rest, before anything is done."""
    if os.readlink("/proc/self") != str(os.getpid()):  # we would take strangers for our processes
        raise Failure("/proc is that of another pid namespace", "mount -t proc proc /proc")
    if options.memory is None and options.memory_swap is not None:
        raise Failure("--memory-swap: it is memory plus swap, so it needs --memory")
    if options.memory is not None:
        if options.memory_swap is None:
            options.memory_swap = min(2 * options.memory, (1 << 63) - 4096)
        elif -1 < options.memory_swap < options.memory:
            swap, memory = show_size(options.memory_swap), show_size(options.memory)
            raise Failure(f"--memory-swap: {swap} is less than --memory, {memory}: it is both together")
    for path in options.rootfs:
        if not os.path.isdir(path):
            raise Failure(f"--rootfs {path}: {'not a' if os.path.lexists(path) else 'no such'} directory")
        if options.upperdir and is_below(os.path.realpath(layer_of(options)), (os.path.realpath(path),)):
            raise Failure(f"--upperdir {options.upperdir}: it is in the --rootfs, which is never written to")
    for source, target, _ in options.volume:
        if not os.path.exists(source):
            raise Failure(f"--volume {source}:{target}: there is no {source}")
    if options.upperdir and options.is_bound_view():
        raise Failure("--upperdir: without root the view of the host is read-only", "--rootfs, or sudo")
    if options.pidfile and os.path.lexists(options.pidfile):  # one that was left by a killed run
        path = options.pidfile
        pid = read_file(path, "is it a pidfile").strip() if os.path.isfile(path) else "-"
        if pid and not is_number(pid):
            raise Failure(f"--pidfile {path}: it exists and holds something other than a pid: not replaced")
        theirs = attempt(os.stat, f"/proc/{pid or 0}/ns/pid")
        if theirs and not os.path.samestat(theirs, os.stat("/proc/self/ns/pid")):
            raise Failure(f"--pidfile {path}: in use by the container of process {pid}")


def lock_upperdir(options: Options) -> None:
    """Make what --upperdir needs and lock it until this process ends: one container at a time."""
    layer, why = layer_of(options), f"--upperdir {options.upperdir}"
    call("makedirs", layer, MODE_700, True, why=why)  # True: it may exist, or be made by another run just now
    fd = call("open", layer, O_RDONLY | O_NOFOLLOW, why=why)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise Failure(f"{why}: {layer} is open to others, who could use its setuid programs: refused")
    try:
        call("flock", fd, LOCK_EX_NB, why=why)
    except CallError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise Failure(f"{why}: another container is using it") from None


def write_pidfile(path: str, pid: int) -> None:
    """Write the host's pid of PID 1: nsenter -t $(cat FILE) -a enters the container."""
    fd = call("open", path, O_REPLACE | O_NOFOLLOW, MODE_644, why=f"--pidfile {path}")
    try:
        call("write", fd, b"%d\n" % pid, why=f"--pidfile {path}")
    except CallError:  # a full disk
        attempt(remove_pidfile, path)
        raise
    finally:
        os.close(fd)


def remove_pidfile(path: str) -> None:
    """Remove the file that write_pidfile() wrote. Raises CallError."""
    call("unlink", path, why="the --pidfile of a container that is gone")


def run(options: Options, argv: "list[str]") -> int:
    """Run `argv` in a new container; return the exit status that docker run would have."""
    prepare(options)
    caller_mask, signal_fd = watch_signals()
    cgroups = Cgroups(options)
    container, pidfile = None, ""
    try:
        if options.upperdir:
            lock_upperdir(options)
        cgroups.create()
        if options.rootless:
            enter_user_namespace()
        call("unshare", CLONE_NEWPID, why="the next child is PID 1 of a new pid namespace")
        pipes = Pipes()
        # nothing is buffered here that the child would write again: all our output is by os.write
        pid = call("fork", why="the child goes on with the code that is here: no second interpreter")
        if pid == 0:
            try:
                send_failure(init(options, cgroups, pipes, caller_mask), pipes.status_write)
            finally:
                os._exit(EXIT_MYDOCKER)  # a child that went on here would clean up for the parent
        os.close(pipes.command_read)
        os.close(pipes.status_write)  # the other end reads EOF when init's copy is closed, too
        container = Container(options, argv, pid, pipes, signal_fd)
        if options.pidfile:
            write_pidfile(options.pidfile, pid)
            pidfile = options.pidfile
        cgroups.hurry_join()
        wstatus = container.supervise()
    finally:  # whatever fails in here is a warning: the status is the command's
        if container:
            tolerate(container.end)
            tolerate(cgroups.report, container)
        if pidfile:
            tolerate(remove_pidfile, pidfile)
        tolerate(cgroups.remove)
    if container.received:
        raise parse_failure(container.received)
    if os.WIFSIGNALED(wstatus):
        return EXIT_SIGNAL + os.WTERMSIG(wstatus)
    return os.WEXITSTATUS(wstatus)


# ---- Command line: print_help, init_by_hand, main ------------------------------------------------

def print_help(of_run: bool) -> None:
    """Describe the command line. argparse is imported here only: nothing else needs it."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="mydocker.py",
        usage=USAGE,
        description="Run COMMAND in a new container; the first word that is no option begins it.",
        epilog="Exit status: the command's; 125 when mydocker failed, 126 when the command cannot be "
        "executed, 127 when it is not found, 128+n when signal n killed it."
        if of_run
        else f"{SEE_HELP}.",
    )
    if not of_run:
        parser.add_argument("--version", action="version", version=VERSION)
    for option in OPTIONS if of_run else ():
        kind = {"metavar": option.metavar} if option.metavar else {"action": "store_true"}
        parser.add_argument(*option.names, help=option.text, **kind)
    print(parser.format_help(), end="")  # by print_help, an error of stdout would be lost


def init_by_hand(words: "list[str]") -> None:
    """Be `mydocker.py init FD`: become a container whose command comes by pipe FD, where that is safe.

    Safe is PID 1 of a pid namespace, in a mount namespace, neither of them the host's.
    """
    pid_ns, mnt_ns = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "mnt"))
    first_mnt_ns = 0xF0000001  # up to here are the numbers of those that the kernel booted with
    of_host = pid_ns == 0xEFFFFFFC or mnt_ns <= first_mnt_ns  # PROC_PID_INIT_INO: the host's, on any kernel
    try:
        if os.readlink("/proc/self") != "1":  # this /proc is an ancestor's, whose PID 1 has the host's
            of_host = of_host or os.stat("/proc/1/ns/mnt").st_ino == mnt_ns
    except OSError:
        of_host = True  # not ours to see, so not a place that was made for us
    if os.getpid() != 1 or of_host:
        raise Failure("init: only for PID 1 of new pid and mount namespaces", "mydocker.py run makes them")
    fd = int(words[0]) if len(words) == 1 and is_number(words[0]) else -1
    if not 0 <= fd < 1 << 31 or not stat.S_ISFIFO(os.fstat(fd).st_mode):
        raise Failure("init: its argument is the descriptor of a pipe", "mydocker.py run makes it")
    options, pipes = Options(), Pipes()
    pipes.command_read = os.dup(fd)
    pipes.own_reader = os.dup(pipes.status_read)
    raise init(options, Cgroups(options), pipes, signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def main(words: "list[str]") -> int:
    """Be the program; return its exit status."""
    for fd in (0, 1, 2):  # the next file that we open would get the number of a closed one
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open("/dev/null", os.O_RDWR), True)
    try:
        if COLUMN < 0:
            raise Failure(f"the system calls of {os.uname().machine} are not known here")
        if not words:
            log.line("error", f"usage: {USAGE}   ({SEE_HELP})")
            return EXIT_MYDOCKER
        command, rest = words[0], words[1:]
        if command == "run":
            options = Options()
            try:
                argv = parse(rest, options)
            finally:  # for the line about what could not be parsed, too
                log.set_up(options)
            if argv:
                return run(options, argv)
        if command == "init":
            init_by_hand(rest)
        elif command == "--version":
            print(f"mydocker {VERSION}")
        elif command in ("run", "-h", "--help"):  # run without argv: help was asked for
            print_help(command == "run")
        else:
            raise Failure(f"there is no command {command}", SEE_HELP)
        if sys.stdout:  # None when the caller closed it
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return EXIT_SIGNAL + int(signal.SIGINT)
    except Exception as error:
        failure = as_failure(error)
        log.failure(failure)
        return failure.status


def main_after_script(*_: object) -> None:
    """Be the program as sys.excepthook, which Python calls when the script has been left."""
    give_back_memory()
    os._exit(main(sys.argv[1:]))  # all is flushed: to take the interpreter apart in order costs 2 ms


if __name__ == "__main__":
    # Left by an exception, because Python keeps the syntax tree of a script for as long as it runs:
    # 6 MiB that every run() would hold while it waits.
    sys.excepthook = main_after_script
    raise SystemError("this is no error: main_after_script() goes on")
